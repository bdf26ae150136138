//! What it costs a service that its port is followed, and others that somebody's is.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use plumb::kernel::{Kernel, Plan, Ring, Sockets};
use plumb_common::{
    counts,
    sockets::{CONNECTED, Port},
};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::{
    Effort,
    calm::Calm,
    stats::{Median, Pair, added, ratio},
};

/// What a side of a pair is measured in.
const SLICE: Duration = Duration::from_micros(500);
const SLOT: u32 = 0;

/// Whose port is followed.
#[derive(Clone, Copy, PartialEq)]
enum Whose {
    Nobody,
    Another,
    Ours,
}

const SUBJECTS: [(&str, Whose); 3] =
    [("nothing (control)", Whose::Nobody), ("another port", Whose::Another), ("this port", Whose::Ours)];

const OPERATIONS: [&str; 2] = ["connect, request, answer, close", "request, answer on a kept connection"];

/// A service and its client.
struct Hands {
    listener: TcpListener,
    kept: (TcpStream, TcpStream),
}

impl Hands {
    fn new() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let kept = pair(&listener)?;
        Ok(Self { listener, kept })
    }

    fn times(&self, operation: usize, count: u64) -> Result<Duration> {
        let start = Instant::now();
        for _ in 0..count {
            if operation == 1 {
                converse(&self.kept.0, &self.kept.1)?;
                continue;
            }
            let (client, server) = pair(&self.listener)?;
            converse(&client, &server)?;
            // Closed with a reset: a port in TIME_WAIT could not be used again for a minute.
            abort(&client)?;
            drop((client, server));
        }
        Ok(start.elapsed())
    }
}

fn pair(listener: &TcpListener) -> Result<(TcpStream, TcpStream)> {
    let client = TcpStream::connect(listener.local_addr()?)?;
    let (server, _) = listener.accept()?;
    for end in [&client, &server] {
        end.set_nodelay(true)?;
    }
    Ok((client, server))
}

fn converse(mut client: &TcpStream, mut server: &TcpStream) -> Result<()> {
    let mut bytes = [0; 64];
    client.write_all(&bytes)?;
    server.read_exact(&mut bytes)?;
    server.write_all(&bytes)?;
    Ok(client.read_exact(&mut bytes)?)
}

fn abort(stream: &TcpStream) -> Result<()> {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let (value, len) = ((&raw const linger).cast(), size_of_val(&linger) as libc::socklen_t);
    // SAFETY: the pointer and the length are those of a live linger.
    let set = unsafe { libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, value, len) };
    ensure!(set == 0, "{}", std::io::Error::last_os_error());
    Ok(())
}

/// Attaches and detaches; the ring is read in between.
struct Followed {
    kernel: Kernel,
    ring: Ring,
    port: Port,
    another: Port,
}

impl Followed {
    fn new(hands: &Hands) -> Result<Self> {
        let mut kernel = Kernel::load_all(Plan { sockets: Sockets::OnDemand, ..Plan::SOCKETS })?;
        let ring = kernel.ring()?;
        let netns = u32::try_from(std::fs::metadata("/proc/self/ns/net")?.ino())?;
        let port = Port { netns, port: u32::from(hands.listener.local_addr()?.port()) };
        Ok(Self { kernel, ring, port, another: Port { port: 1, ..port } })
    }

    fn set(&mut self, whose: Whose) -> Result<()> {
        self.ring.drain(usize::MAX);
        for port in [self.port, self.another] {
            self.kernel.unfollow_port(port)?;
        }
        match whose {
            Whose::Nobody => {}
            Whose::Another => self.kernel.follow_port(self.another, SLOT)?,
            Whose::Ours => self.kernel.follow_port(self.port, SLOT)?,
        }
        self.kernel.follow_sockets(whose != Whose::Nobody);
        Ok(())
    }
}

pub(crate) fn run(effort: Effort) -> Result<()> {
    let mut cpu = CpuSet::new();
    let before = rustix::thread::sched_getaffinity(None)?;
    cpu.set(0);
    sched_setaffinity(None, &cpu)?;
    let done = compare(effort);
    sched_setaffinity(None, &before)?;
    done
}

fn compare(effort: Effort) -> Result<()> {
    let hands = Hands::new()?;
    let mut followed = Followed::new(&hands)?;
    let mut calm = Calm::default();
    let slices = (effort.side.as_nanos() / SLICE.as_nanos()) as usize;
    let sizes = [0, 1].map(|operation| -> Result<u64> {
        let took = hands.times(operation, 1000)?;
        Ok(((1000.0 * SLICE.as_secs_f64() / took.as_secs_f64()) as u64).max(1))
    });
    let [first, second] = sizes;
    let sizes = [first?, second?];
    println!("\nWith the sockets of a port followed, and without: medians of pairs (95 % interval).\n");
    println!("| followed | pairs | {} | {} |\n|---|---|---|---|", OPERATIONS[0], OPERATIONS[1]);
    for (name, whose) in SUBJECTS {
        eprintln!("bench: sockets, {name}");
        let mut pairs = [Vec::new(), Vec::new()];
        for index in 0..effort.pairs {
            let mut sides = [[0.0; 2]; 2];
            for with in if index % 2 == 0 { [false, true] } else { [true, false] } {
                followed.set(if with { whose } else { Whose::Nobody })?;
                for (operation, size) in sizes.into_iter().enumerate() {
                    let took = calm.slices(slices, || hands.times(operation, size))?;
                    sides[usize::from(with)][operation] = Median::of(took).median * 1e9 / size as f64;
                }
            }
            for (operation, pairs) in pairs.iter_mut().enumerate() {
                pairs.push(Pair { without: sides[0][operation], with: sides[1][operation] });
            }
        }
        let cells = pairs.each_ref().map(|pairs| {
            let (times, ns) = (ratio(pairs), added(pairs));
            let alone = Median::of(pairs.iter().map(|pair| pair.without).collect()).median;
            format!(
                "{:.3} ({:.3} to {:.3}); {:+.0} ns ({:+.0} to {:+.0}) of {alone:.0}",
                times.median, times.low, times.high, ns.median, ns.low, ns.high
            )
        });
        println!("| {name} | {} | {} | {} |", pairs[0].len(), cells[0], cells[1]);
    }
    storm(&hands, &mut followed, effort.load)
}

/// As many connections as one CPU makes; each must be counted.
fn storm(hands: &Hands, followed: &mut Followed, time: Duration) -> Result<()> {
    println!(
        "\nOne CPU that opens and closes connections with one request each, for {} s:\n",
        time.as_secs()
    );
    println!("| followed | connections | per second | counted | events lost | known at the end |");
    println!("|{}", "---|".repeat(6));
    for (name, whose) in SUBJECTS {
        followed.set(whose)?;
        let before = followed.kernel.socket_counts(SLOT)?[CONNECTED as usize];
        let lost_before = lost(&followed.kernel)?;
        let (begin, mut done) = (Instant::now(), 0);
        while begin.elapsed() < time {
            hands.times(0, 64)?;
            done += 64;
            followed.ring.drain(usize::MAX);
        }
        let took = begin.elapsed().as_secs_f64();
        let counted = followed.kernel.socket_counts(SLOT)?[CONNECTED as usize] - before;
        println!(
            "| {name} | {done} | {:.0} | {counted} | {} | {} |",
            f64::from(done) / took,
            lost(&followed.kernel)? - lost_before,
            followed.kernel.conversations().context("conversations")?
        );
    }
    followed.set(Whose::Nobody)
}

fn lost(kernel: &Kernel) -> Result<u64> {
    let ledger = kernel.counts()?;
    let of = counts::LOSSES.iter().map(|outcome| ledger.of(counts::SOCKET, *outcome)).sum::<u64>();
    Ok(of + kernel.not_run())
}

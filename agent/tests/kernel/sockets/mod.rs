//! What becomes of requests, listeners and signals of a followed port: each scenario is scripted, and what the kernel side
//! tells of it must be that and nothing else.

mod again;
mod before;
mod hands;
mod many;
mod requests;
mod signals;
mod ways;

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::unix::fs::MetadataExt,
    sync::{Mutex, MutexGuard, PoisonError},
    thread::sleep,
    time::{Duration, Instant},
};

use plumb::{
    decode::Event,
    kernel::{Kernel, Plan, Ring},
    losses::{Class, Tally},
};
use plumb_common::{
    counts,
    sockets::{COUNTERS, LISTENER_CLOSED, LOST_LATE, MARK_EXITING, Port, SLOTS, Signal},
    task::ProcKey,
};

/// Which addresses are listened on, and from which one connects: also by IPv4 to a socket of IPv6.
const WAYS_IN: [(IpAddr, IpAddr); 3] = [
    (IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V4(Ipv4Addr::LOCALHOST)),
    (IpAddr::V6(Ipv6Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)),
    (IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::LOCALHOST)),
];

const PATIENCE: Duration = Duration::from_secs(20);

/// All that was told of one port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Told {
    lost: Vec<(&'static str, u64)>,
    /// Of these from the kernel's clocks, after the connection was closed, and by the end of the process.
    guessed: u64,
    late: u64,
    exiting: u64,
    /// Of each listener that was closed, how many were waiting.
    backlogs: Vec<u32>,
    counts: Vec<(&'static str, u64)>,
}

impl Told {
    fn counting(counts: &[(&'static str, u64)]) -> Self {
        Self { counts: counts.to_vec(), ..Self::default() }
    }

    fn losing(mut self, class: Class, many: u64) -> Self {
        self.lost.push((class.word(), many));
        self
    }

    fn late(self) -> Self {
        Self { late: self.lost.iter().map(|(_, many)| many).sum(), ..self }
    }

    fn exiting(self) -> Self {
        Self { exiting: self.lost.iter().map(|(_, many)| many).sum(), ..self }
    }

    fn closing(self, backlogs: &[u32]) -> Self {
        Self { backlogs: backlogs.to_vec(), ..self }
    }
}

/// What was collected of one slot.
#[derive(Default)]
struct Heard {
    tally: Tally,
    told: Told,
}

/// The programs, and what they have told. One at a time: a test that forks holds the sockets of others for a moment.
struct Stage {
    kernel: Kernel,
    ring: Ring,
    heard: HashMap<u32, Heard>,
    signals: Vec<Signal>,
    next: u32,
    before: counts::Counts,
    _alone: MutexGuard<'static, ()>,
}

fn netns() -> u32 {
    std::fs::metadata("/proc/thread-self/ns/net").unwrap().ino() as u32
}

fn port_of(listener: &TcpListener) -> Port {
    Port { netns: netns(), port: u32::from(listener.local_addr().unwrap().port()) }
}

/// A listener; none where this host has no such address.
fn listen(at: IpAddr) -> Option<TcpListener> {
    match TcpListener::bind(SocketAddr::new(at, 0)) {
        Err(error) if at.is_ipv6() => {
            eprintln!("no IPv6 here: {error}");
            None
        }
        bound => Some(bound.unwrap()),
    }
}

impl Stage {
    fn new() -> Self {
        Self::of(Plan::SOCKETS)
    }

    fn of(plan: Plan) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kernel = Kernel::load_all(plan).unwrap();
        let (ring, before) = (kernel.ring().unwrap(), kernel.counts().unwrap());
        Self { kernel, ring, heard: HashMap::new(), signals: Vec::new(), next: 0, before, _alone: alone }
    }

    /// Follows a port, by the slot that is returned.
    fn follow(&mut self, port: Port) -> u32 {
        let slot = self.next;
        // The last one is that of `catch_up`.
        assert!(slot < SLOTS - 1);
        self.next += 1;
        self.kernel.follow_port(port, slot).unwrap();
        slot
    }

    fn unfollow(&mut self, port: Port) {
        self.kernel.unfollow_port(port).unwrap();
    }

    /// Reads what there is.
    fn read(&mut self) {
        for event in self.ring.drain(usize::MAX) {
            match event {
                Event::Socket(socket) => {
                    let Heard { tally, told } = self.heard.entry(socket.slot).or_default();
                    if socket.what == LISTENER_CLOSED {
                        told.backlogs.push(socket.unread);
                    } else if tally.take(&socket).is_some() {
                        told.late += u64::from(socket.what == LOST_LATE);
                        told.exiting += u64::from(socket.marks & MARK_EXITING != 0);
                    }
                }
                Event::Signal(signal) => self.signals.push(signal),
                _ => {}
            }
        }
    }

    /// All that was told of a slot until now.
    fn told(&mut self, slot: u32) -> Told {
        self.read();
        let counts = self.kernel.socket_counts(slot).unwrap();
        let Heard { tally, told } = self.heard.entry(slot).or_default();
        let lost = Class::ALL.iter().filter_map(|class| Some((class.word(), *tally.lost().get(class)?)));
        Told {
            lost: lost.collect(),
            guessed: tally.guessed,
            counts: COUNTERS.into_iter().zip(counts).filter(|(_, many)| *many > 0).collect(),
            ..told.clone()
        }
    }

    /// Waits until something holds of what was told.
    fn until(&mut self, slot: u32, what: &str, holds: impl Fn(&Told) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !holds(&self.told(slot)) {
            assert!(Instant::now() < end, "{what}: {:?}", self.told(slot));
            sleep(Duration::from_millis(1));
        }
    }

    fn until_counted(&mut self, slot: u32, counter: &str, many: u64) {
        self.until(slot, counter, |told| told.counts.contains(&(named(counter), many)));
    }

    /// Waits until all that has happened is told.
    fn catch_up(&mut self) {
        let (listener, slot) = (listen(WAYS_IN[0].0).unwrap(), SLOTS - 1);
        let port = port_of(&listener);
        self.heard.remove(&slot);
        self.kernel.follow_port(port, slot).unwrap();
        drop(listener);
        self.until(slot, "the last event", |told| !told.backlogs.is_empty());
        self.unfollow(port);
    }

    /// That this, and nothing else, is told of a slot.
    #[track_caller]
    fn expect(&mut self, slot: u32, what: &str, expected: &Told) {
        let end = Instant::now() + PATIENCE;
        // A packet may be handled a moment later, by somebody else.
        while self.told(slot) != *expected && Instant::now() < end {
            sleep(Duration::from_millis(1));
        }
        self.catch_up();
        assert_eq!(self.told(slot), *expected, "{what}");
    }

    /// That the ring has lost nothing, and every program has run.
    fn is_complete(&self) {
        let now = self.kernel.counts().unwrap();
        for outcome in counts::LOSSES {
            for source in [counts::SOCKET, counts::SIGNAL] {
                assert_eq!(now.of(source, outcome), self.before.of(source, outcome), "{source} {outcome}");
            }
        }
        assert_eq!(self.ring.ledger().rejected, 0);
    }

    fn follow_signals(&mut self, pid: u32) -> ProcKey {
        let key =
            self.kernel.processes().unwrap().iter().map(|record| record.key).find(|key| key.tgid == pid);
        self.kernel.follow_signals(key.unwrap()).unwrap();
        key.unwrap()
    }
}

fn named(counter: &str) -> &'static str {
    COUNTERS.into_iter().find(|name| *name == counter).unwrap()
}

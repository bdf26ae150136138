//! The programs that follow sockets and signals of services: attached on demand, for the ports and processes that are
//! named.

use std::io;

use aya::{
    Btf,
    maps::{HashMap, MapData, MapError, PerCpuArray, PerCpuValues},
};
use plumb_common::{
    offsets,
    sockets::{self, COUNTERS, SLOTS},
    task::ProcKey,
};

use super::{
    btf::Facts,
    fds::{Attached, attach, unload},
    load::{Kernel, Sockets, load},
    programs::{Hook, PROGRAMS, Program, Status, Verdict},
};

/// Ways to see the same, the better ones first: the others are not needed.
const WAYS: [&[&str]; 2] = [
    &["sock_send_length", "tcp_sendmsg", "do_tcp_sendpages"],
    &["tcp_send_reset", "tcp_v4_send_reset", "tcp_v6_send_reset"],
];
const RESETS: &str = "tcp_send_reset";

/// The socket programs of a kernel handle.
#[derive(Debug, Default)]
pub(super) struct SocketHooks {
    attached: Vec<Attached>,
}

/// What is counted of one service, by `sockets::COUNTERS`.
pub type SocketCounts = [u64; COUNTERS.len()];

#[repr(transparent)]
#[derive(Clone, Copy)]
struct Key(sockets::Port);

#[repr(transparent)]
#[derive(Clone, Copy)]
struct PerCpu(SocketCounts);

#[repr(transparent)]
#[derive(Clone, Copy)]
struct Known(sockets::Conversation);

#[repr(transparent)]
#[derive(Clone, Copy)]
struct Connection(sockets::Connection);

#[repr(transparent)]
#[derive(Clone, Copy)]
struct Closed(sockets::Closed);

// SAFETY: plain numbers.
unsafe impl aya::Pod for Key {}
// SAFETY: plain numbers.
unsafe impl aya::Pod for PerCpu {}
// SAFETY: plain numbers.
unsafe impl aya::Pod for Known {}
// SAFETY: plain numbers.
unsafe impl aya::Pod for Connection {}
// SAFETY: plain numbers.
unsafe impl aya::Pod for Closed {}

fn of_sockets() -> impl Iterator<Item = &'static Program> {
    PROGRAMS.iter().filter(|program| program.sockets)
}

impl SocketHooks {
    /// Loads them, and adds a verdict for each.
    pub(super) fn load(
        wanted: Sockets,
        ebpf: &mut aya::Ebpf,
        btf: &Btf,
        known: &Facts,
        statuses: &mut Vec<Status>,
    ) -> Self {
        let mut hooks = Self::default();
        if wanted == Sockets::Never {
            return hooks;
        }
        for program in of_sockets() {
            let verdict = match first_way(program, statuses) {
                Some(by) => Verdict::Substituted { by, why: "one way is enough".to_owned() },
                None => hooks.load_one(wanted, ebpf, program, btf, known),
            };
            statuses.push(Status { program, verdict });
        }
        // What the first way has to say for itself is of no consequence where another one does.
        for at in 0..statuses.len() {
            let Status { program, verdict } = &statuses[at];
            let other = WAYS.iter().find(|way| way.first() == Some(&program.name)).and_then(|way| {
                let is_fine = |name: &&&str| {
                    statuses.iter().any(|status| status.program.name == **name && status.is_fine())
                };
                way.iter().skip(1).find(is_fine)
            });
            if let Some(by) = other
                && !statuses[at].is_fine()
            {
                statuses[at].verdict = Verdict::Substituted { by, why: verdict.cause() };
            }
        }
        hooks
    }

    fn load_one(
        &mut self,
        wanted: Sockets,
        ebpf: &mut aya::Ebpf,
        program: &'static Program,
        btf: &Btf,
        known: &Facts,
    ) -> Verdict {
        if program.name == RESETS && !known.has_reset_reason {
            return Verdict::Unsupported { why: "before 6.10 it does not tell of every reset".to_owned() };
        }
        match load(ebpf, program, btf, &known.offsets) {
            Ok(()) if wanted == Sockets::AtOnce => match attach(ebpf, program) {
                Ok(link) => {
                    self.attached.push(link);
                    Verdict::Attached
                }
                Err(verdict) => verdict,
            },
            // Whether a function may be followed is known only when it is.
            Ok(()) => {
                match attach(ebpf, program).map(drop).and_then(|()| renew(ebpf, program, btf, &known.offsets))
                {
                    Ok(()) => Verdict::Loaded,
                    Err(verdict) => verdict,
                }
            }
            Err(verdict) => verdict,
        }
    }
}

/// Before 5.13 a program on a function can be attached once: then it is loaded again, and not only when it is needed.
fn renew(
    ebpf: &mut aya::Ebpf,
    program: &Program,
    btf: &Btf,
    known: &[u32; offsets::LEN],
) -> Result<(), Verdict> {
    if !matches!(program.hook, Hook::Entry(_)) || attach(ebpf, program).is_ok() {
        return Ok(());
    }
    unload(ebpf, program)?;
    load(ebpf, program, btf, known)
}

/// A program before this one that sees the same.
fn first_way(program: &Program, statuses: &[Status]) -> Option<&'static str> {
    let way = WAYS.iter().find(|way| way.iter().skip(1).any(|name| *name == program.name))?;
    let first = statuses.iter().find(|status| Some(&status.program.name) == way.first())?;
    first.is_fine().then_some(first.program.name)
}

impl Kernel {
    /// Whether the socket programs are attached now.
    #[must_use]
    pub fn follows_sockets(&self) -> bool {
        !self.sockets.attached.is_empty()
    }

    /// Attaches or detaches the socket programs; each that cannot be attached says so in its verdict.
    pub fn follow_sockets(&mut self, on: bool) {
        if on == self.follows_sockets() {
            return;
        }
        self.sockets.attached.clear();
        if let Err(error) = self.forget_connections() {
            tracing::warn!("what was known of connections is not forgotten: {error}");
        }
        let mut btf = None;
        for at in 0..self.programs.len() {
            let Status { program, verdict } = &self.programs[at];
            if !program.sockets || !matches!(verdict, Verdict::Loaded | Verdict::Attached) {
                continue;
            }
            let verdict = match on {
                true => attach(&mut self.ebpf, program).map(|link| self.sockets.attached.push(link)),
                false => self.renew(program, &mut btf),
            };
            self.programs[at].verdict = match verdict {
                Ok(()) if on => Verdict::Attached,
                Ok(()) => Verdict::Loaded,
                Err(verdict) => verdict,
            };
        }
    }

    /// Makes a program ready for the next time. The kernel's types are read for that only where they are needed.
    fn renew(&mut self, program: &'static Program, btf: &mut Option<Btf>) -> Result<(), Verdict> {
        if !matches!(program.hook, Hook::Entry(_)) || attach(&mut self.ebpf, program).is_ok() {
            return Ok(());
        }
        let types = match btf {
            Some(types) => types,
            None => {
                let types = Btf::from_sys_fs();
                btf.insert(types.map_err(|error| Verdict::Broken { why: error.to_string() })?)
            }
        };
        renew(&mut self.ebpf, program, types, &self.offsets)
    }

    /// How many connections are known.
    pub fn conversations(&mut self) -> Result<usize, MapError> {
        Ok(self.map_of::<u64, Known>("CONVERSATIONS")?.keys().count())
    }

    /// How many are known to be closed.
    pub fn closed_conversations(&mut self) -> Result<usize, MapError> {
        Ok(self.map_of::<Connection, Closed>("CLOSED")?.keys().count())
    }

    /// What was known of connections is not true any more: nobody has followed them since.
    fn forget_connections(&mut self) -> Result<(), MapError> {
        let mut known = self.map_of::<u64, Known>("CONVERSATIONS")?;
        for key in known.keys().collect::<Result<Vec<_>, _>>()? {
            forgotten(known.remove(&key))?;
        }
        let mut closed = self.map_of::<Connection, Closed>("CLOSED")?;
        for key in closed.keys().collect::<Result<Vec<_>, _>>()? {
            forgotten(closed.remove(&key))?;
        }
        Ok(())
    }

    /// From now on what becomes of the sockets of a port is told as of `slot`.
    pub fn follow_port(&mut self, port: sockets::Port, slot: u32) -> Result<(), MapError> {
        self.map_of::<Key, u32>("PORTS")?.insert(Key(port), slot, 0)
    }

    /// No longer; nothing to do if it was not followed.
    pub fn unfollow_port(&mut self, port: sockets::Port) -> Result<(), MapError> {
        forgotten(self.map_of::<Key, u32>("PORTS")?.remove(&Key(port)))
    }

    /// From now on the signals of a process are told.
    pub fn follow_signals(&mut self, process: ProcKey) -> Result<(), MapError> {
        self.map_of::<u32, u64>("TARGETS")?.insert(process.tgid, process.start_boottime, 0)
    }

    /// No longer; nothing to do if they were not.
    pub fn unfollow_signals(&mut self, process: ProcKey) -> Result<(), MapError> {
        forgotten(self.map_of::<u32, u64>("TARGETS")?.remove(&process.tgid))
    }

    fn map_of<K: aya::Pod, V: aya::Pod>(
        &mut self,
        name: &'static str,
    ) -> Result<HashMap<&mut MapData, K, V>, MapError> {
        let missing = || MapError::InvalidName { name: name.to_owned() };
        HashMap::try_from(self.ebpf.map_mut(name).ok_or_else(missing)?)
    }

    /// What was counted of a slot since it was last set to nothing.
    pub fn socket_counts(&self, slot: u32) -> io::Result<SocketCounts> {
        let map = self.ebpf.map("SOCKET_COUNTS").ok_or(io::ErrorKind::NotFound)?;
        let array = PerCpuArray::<_, PerCpu>::try_from(map).map_err(io::Error::other)?;
        let per_cpu: PerCpuValues<PerCpu> = array.get(&slot.min(SLOTS - 1), 0).map_err(io::Error::other)?;
        let mut sums = SocketCounts::default();
        for PerCpu(counts) in per_cpu.iter() {
            sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        }
        Ok(sums)
    }
}

fn forgotten(done: Result<(), MapError>) -> Result<(), MapError> {
    match done {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        done => done,
    }
}

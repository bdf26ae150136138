//! What pre-flight looks at, of one process.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fs::{self, File},
    ops::RangeInclusive,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    thread,
    time::Duration,
};

use plumb_common::sockets::Port;
use procfs::net::{TcpNetEntry, TcpState};
use serde::Serialize;

use super::{
    matching::{all_of, sockets_of},
    process::{self, Process},
};
use crate::text;

/// Threads whose signal mask is read at most.
const MAX_THREADS: usize = 1024;
/// Fds of all processes of a service that are looked at, each time: a second or two. A user may have any number of processes
/// that share any number of fds.
const MAX_FDS: usize = 1 << 20;

/// Between two looks at what may be blocked for a moment only.
const MOMENT: Duration = Duration::from_millis(2);

/// What is known of a process that is to be signalled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    pub caught: bool,
    pub ignored: bool,
    /// By each of its threads.
    pub blocked: bool,
    /// It reads this signal from an fd, for which it has to be blocked.
    pub has_signalfd: bool,
    /// One of its threads waits for it by sigwait(3) or its like, and no other one is to take it.
    pub is_awaited: bool,
    /// The first of a pid namespace of its own: the kernel keeps signals without a handler from it.
    pub is_init: bool,
    pub supervisor: Supervisor,
}

impl Facts {
    /// Whether something of the process takes the signal, and decides what it means.
    #[must_use]
    pub(crate) fn is_handled(&self) -> bool {
        self.caught || self.is_awaited || (self.blocked && self.has_signalfd)
    }
}

/// The TCP sockets of some processes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tcp {
    /// Addresses on which they listen.
    pub listeners: Vec<Listener>,
    /// Established connections.
    pub connections: usize,
    /// Of these, with data that nobody has read, or that the other end has not acknowledged.
    pub busy: usize,
}

/// A TCP socket that listens.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) struct Listener {
    pub address: String,
    /// Connections that wait to be accepted.
    pub waiting: u32,
}

/// Who may start it again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Supervisor {
    #[default]
    Nobody,
    /// A unit of the host's systemd.
    Unit(String),
    /// A systemd of a user.
    UserUnit(String),
    Pod,
    Container,
    /// A process that supervises others, by name and pid.
    Parent(String, u32),
}

/// Names of programs that start again what ends.
const SUPERVISORS: &[&str] = &[
    "supervisord",
    "runsv",
    "s6-supervise",
    "supervise",
    "perpd",
    "circusd",
    "conmon",
    "monit",
    "PM2",
    "nodenv",
    "honcho",
    "foreman",
];

/// Looks at a process; nothing when it has gone meanwhile.
pub(crate) fn of(process: &Process, signal: i32) -> Option<Facts> {
    let folder = process.folder();
    let status = process::status(&folder).ok()?;
    let masks = |key: &str| mask(&status, key).is_some_and(|mask| has(mask, signal));
    let caught = masks("SigCgt:");
    let facts = Facts {
        caught,
        // Of those by which a service can be asked, the only one that does nothing by default.
        ignored: masks("SigIgn:") || (signal == libc::SIGWINCH && !caught),
        blocked: stays_blocked(&folder, signal),
        has_signalfd: has_signalfd(&folder, signal),
        is_awaited: is_awaited(&folder, signal),
        is_init: is_init(&status),
        supervisor: supervisor(process),
    };
    process.is_alive().then_some(facts)
}

/// The TCP sockets of processes; what several of them share counts once.
#[must_use]
pub(crate) fn tcp_of<'a>(processes: impl IntoIterator<Item = &'a Process>) -> Tcp {
    let mut by_namespace: HashMap<u64, (u32, HashSet<u64>)> = HashMap::new();
    let mut left = MAX_FDS;
    for process in processes {
        let pid = process.identity.pid;
        let Ok(namespace) = fs::metadata(format!("/proc/{pid}/ns/net")) else { continue };
        by_namespace
            .entry(namespace.ino())
            .or_insert((pid, HashSet::new()))
            .1
            .extend(sockets_of(pid, &mut left).unwrap_or_default());
    }
    let (mut listeners, mut sum) = (BTreeSet::new(), Tcp::default());
    for (pid, sockets) in by_namespace.values().filter(|(_, sockets)| !sockets.is_empty()) {
        // These take the kernel milliseconds, however few sockets there are.
        for entry in tcp(*pid).iter().flatten().filter(|entry| sockets.contains(&entry.inode)) {
            let address = || entry.local_address.to_string();
            match entry.state {
                // Of a listener that is the length of its accept queue (net/ipv4/tcp_ipv4.c, get_tcp4_sock).
                TcpState::Listen => {
                    listeners.insert(Listener { address: address(), waiting: entry.rx_queue });
                }
                TcpState::Established => {
                    sum.connections += 1;
                    sum.busy += usize::from(is_busy(entry));
                }
                _ => {}
            }
        }
    }
    sum.listeners = listeners.into_iter().collect();
    sum
}

/// The ports on which each of some processes listens or has listened, with its network namespace; nothing of one of which that
/// cannot be read. In the agent's namespace a connection whose own port is none that the kernel gives to clients is one that was
/// accepted.
#[must_use]
pub(crate) fn ports(pids: &[u32]) -> Vec<Option<HashSet<Port>>> {
    let mut left = MAX_FDS;
    let sockets = |pid: &u32| {
        let namespace = fs::metadata(format!("/proc/{pid}/ns/net")).ok()?;
        Some((namespace.ino(), sockets_of(*pid, &mut left)?))
    };
    let all: Vec<Option<(u64, HashSet<u64>)>> = pids.iter().map(sockets).collect();
    let own = fs::metadata("/proc/self/ns/net").map(|own| own.ino()).ok();
    let of_clients = ports_of_clients();
    let mut tables: HashMap<u64, Option<Vec<TcpNetEntry>>> = HashMap::new();
    let of = |(pid, found): (&u32, Option<(u64, HashSet<u64>)>)| {
        let (namespace, sockets) = found?;
        let netns = u32::try_from(namespace).ok()?;
        if sockets.is_empty() {
            return Some(HashSet::new());
        }
        // With many connections, also closed ones, these take the kernel a while.
        let table = tables.entry(namespace).or_default();
        if table.is_none() {
            // Whoever was asked before may have gone.
            *table = tcp(*pid);
        }
        let table = table.as_ref()?;
        // Another namespace may have other ones.
        let clients = if own == Some(namespace) { of_clients.clone() } else { 0..=u16::MAX };
        let is_its = |entry: &&TcpNetEntry| match entry.state {
            TcpState::Listen => sockets.contains(&entry.inode),
            TcpState::Established | TcpState::CloseWait => {
                sockets.contains(&entry.inode) && !clients.contains(&entry.local_address.port())
            }
            _ => false,
        };
        let its = table.iter().filter(is_its);
        Some(its.map(|entry| Port { netns, port: u32::from(entry.local_address.port()) }).collect())
    };
    pids.iter().zip(all).map(of).collect()
}

/// The ports that the kernel gives to who connects: ip(7).
fn ports_of_clients() -> RangeInclusive<u16> {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut numbers = text.split_whitespace().filter_map(|number| number.parse().ok());
    numbers.next().unwrap_or(32_768)..=numbers.next().unwrap_or(60_999)
}

/// A set of signals, as proc_pid_status(5) has it.
fn mask(status: &str, key: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix(key))?;
    u64::from_str_radix(value.trim(), 16).ok()
}

fn has(mask: u64, signal: i32) -> bool {
    u32::try_from(signal - 1).is_ok_and(|bit| mask.checked_shr(bit).unwrap_or(0) & 1 == 1)
}

fn is_busy(entry: &TcpNetEntry) -> bool {
    entry.rx_queue > 0 || entry.tx_queue > 0
}

/// Whoever forks blocks signals for a moment.
fn stays_blocked(folder: &Path, signal: i32) -> bool {
    let mut looks = (0..3).map(|look| {
        thread::sleep(MOMENT * look);
        is_blocked_everywhere(folder, signal)
    });
    looks.all(|blocked| blocked)
}

fn is_blocked_everywhere(folder: &Path, signal: i32) -> bool {
    let threads = fs::read_dir(folder.join("task")).into_iter().flatten().filter_map(Result::ok);
    let status = |entry: fs::DirEntry| process::status(&entry.path()).ok();
    let blocks = |status: String| mask(&status, "SigBlk:").is_some_and(|mask| has(mask, signal));
    let mut all = threads.take(MAX_THREADS).filter_map(status).map(blocks).peekable();
    all.peek().is_some() && all.all(|blocks| blocks)
}

fn has_signalfd(folder: &Path, signal: i32) -> bool {
    let fds = fs::read_dir(folder.join("fd")).into_iter().flatten().filter_map(Result::ok);
    let reads = |fd: fs::DirEntry| {
        let is_one = fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == "anon_inode:[signalfd]");
        let info = || fs::read_to_string(folder.join("fdinfo").join(fd.file_name())).ok();
        // One of which this cannot be read may be for this signal.
        is_one && info().and_then(|info| mask(&info, "sigmask:")).is_none_or(|mask| has(mask, signal))
    };
    fds.take(MAX_FDS).any(reads)
}

/// While a thread waits for a signal the kernel shows it as not blocked: it takes it, and nothing handles it.
fn is_awaited(folder: &Path, signal: i32) -> bool {
    let memory = File::open(folder.join("mem")).ok();
    let threads = fs::read_dir(folder.join("task")).into_iter().flatten().filter_map(Result::ok);
    let awaits = |entry: fs::DirEntry| {
        let call = fs::read_to_string(entry.path().join("syscall")).ok()?;
        let mut words = call.split_whitespace();
        if words.next()?.parse() != Ok(libc::SYS_rt_sigtimedwait) {
            return None;
        }
        let address = u64::from_str_radix(words.next()?.trim_start_matches("0x"), 16).ok()?;
        let mut set = [0; 8];
        memory.as_ref()?.read_exact_at(&mut set, address).ok()?;
        Some(has(u64::from_le_bytes(set), signal))
    };
    threads.take(MAX_THREADS).any(|entry| awaits(entry) == Some(true))
}

/// `NSpid` has its number in each namespace, the innermost last.
fn is_init(status: &str) -> bool {
    let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
    pids.split_whitespace().last() == Some("1")
}

/// The TCP sockets of the network namespace of a process; nothing where these cannot be read.
fn tcp(pid: u32) -> Option<Vec<TcpNetEntry>> {
    let process = procfs::process::Process::new(i32::try_from(pid).ok()?).ok()?;
    let all = all_of(process.tcp(), process.tcp6()).ok();
    // Where it has gone in between there is no table of IPv6 either.
    all.filter(|_| process.is_alive())
}

/// Who may start a process again.
pub(super) fn supervisor(process: &Process) -> Supervisor {
    let by_cgroup = of_cgroup(&process.identity.cgroup);
    if by_cgroup != Supervisor::Nobody {
        return by_cgroup;
    }
    let comm = fs::read(format!("/proc/{}/comm", process.ppid)).unwrap_or_default();
    let comm = text::printable(comm.trim_ascii_end());
    if SUPERVISORS.iter().any(|name| comm.starts_with(name)) || comm.starts_with("containerd-shim") {
        return Supervisor::Parent(comm, process.ppid);
    }
    Supervisor::Nobody
}

/// By /proc/PID/cgroup.
fn of_cgroup(cgroup: &str) -> Supervisor {
    let paths: Vec<&str> = cgroup.lines().filter_map(|line| line.splitn(3, ':').nth(2)).collect();
    if paths.iter().any(|path| path.contains("kubepods")) {
        return Supervisor::Pod;
    }
    let is_container = |part: &str| {
        let id = part.trim_end_matches(".scope").rsplit('-').next().unwrap_or_default();
        id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit())
    };
    if paths.iter().any(|path| path.split('/').any(is_container)) {
        return Supervisor::Container;
    }
    for path in paths {
        let mut units = path.split('/').filter(|part| part.ends_with(".service"));
        match (units.next(), units.next_back()) {
            (Some(manager), Some(unit)) if manager.starts_with("user@") => {
                return Supervisor::UserUnit(unit.to_owned());
            }
            (Some(unit), _) if !unit.starts_with("user@") => return Supervisor::Unit(unit.to_owned()),
            _ => {}
        }
    }
    Supervisor::Nobody
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, process::Command};

    use super::*;

    #[test]
    fn the_cgroup_tells_who_starts_it_again() {
        let id = "0123456789abcdef".repeat(4);
        for (cgroup, expected) in [
            ("0::/system.slice/nginx.service\n".to_owned(), Supervisor::Unit("nginx.service".to_owned())),
            ("0::/system.slice/a.service/worker\n".to_owned(), Supervisor::Unit("a.service".to_owned())),
            ("12:pids:/system.slice/b.service\n0::/\n".to_owned(), Supervisor::Unit("b.service".to_owned())),
            (
                "0::/user.slice/user-1000.slice/user@1000.service/app.slice/x.service\n".to_owned(),
                Supervisor::UserUnit("x.service".to_owned()),
            ),
            ("0::/user.slice/user-1000.slice/session-3.scope\n".to_owned(), Supervisor::Nobody),
            (format!("0::/system.slice/docker-{id}.scope\n"), Supervisor::Container),
            (format!("0::/docker/{id}\n"), Supervisor::Container),
            (
                format!("0::/kubepods.slice/kubepods-burstable.slice/cri-containerd-{id}.scope\n"),
                Supervisor::Pod,
            ),
            ("0::/\n".to_owned(), Supervisor::Nobody),
        ] {
            assert_eq!(of_cgroup(&cgroup), expected, "{cgroup}");
        }
    }

    #[test]
    fn masks_and_numbers_are_read_as_proc_has_them() {
        let status = "SigBlk:\t0000000000004000\nSigIgn:\t0000000000000001\nNSpid:\t4711\t1\n";
        assert_eq!(mask(status, "SigBlk:"), Some(0x4000));
        assert!(has(0x4000, libc::SIGTERM) && !has(0x4000, libc::SIGINT) && has(1, libc::SIGHUP));
        assert!(!has(u64::MAX, 0) && !has(u64::MAX, 65));
        assert!(is_init(status) && !is_init("NSpid:\t1\t7\n") && !is_init(""));
    }

    #[test]
    fn a_trap_is_a_handler_and_an_empty_one_ignores() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let script = "trap : TERM; trap '' INT; echo; while :; do sleep 0.1; done";
        let mut child = Command::new("/bin/sh")
            .args(["-c", script])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        let process = Process::open(child.id()).unwrap();
        let facts = |signal| of(&process, signal).unwrap();
        assert!(facts(libc::SIGTERM).caught && !facts(libc::SIGTERM).ignored);
        assert!(facts(libc::SIGINT).ignored && !facts(libc::SIGQUIT).caught);
        assert!(!facts(libc::SIGTERM).blocked && tcp_of([&process]).listeners.is_empty());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(of(&process, libc::SIGTERM), None);
        drop(listener);
    }
}

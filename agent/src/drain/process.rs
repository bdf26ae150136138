//! A process that is held by a pidfd: what is read of it here is of this process and of no other one that has had its
//! number.

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    process,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, getppid, pidfd_open},
};

use super::identity::Identity;
use crate::{clock, text};

/// Why a process cannot be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoProcess {
    #[error("there is no process {0}")]
    Gone(u32),
    #[error("process {0} is {1}, which plumb signals for nobody")]
    Denied(u32, &'static str),
    #[error("process {0} cannot be looked at: {1}")]
    Unreadable(u32, String),
    /// Plumb has no more fds, or the host no memory.
    #[error("process {0} cannot be looked at: {1}")]
    NoRoom(u32, String),
}

impl NoProcess {
    fn unreadable(pid: u32, error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM) => Self::NoRoom(pid, error.to_string()),
            _ => Self::Unreadable(pid, error.to_string()),
        }
    }
}

/// A process, looked at.
#[derive(Debug)]
pub(crate) struct Process {
    pidfd: OwnedFd,
    pub identity: Identity,
    pub ppid: u32,
    /// Real and saved user.
    pub uids: (u32, u32),
    /// Its arguments, escaped and cut.
    pub command: String,
    /// It is a thread of the kernel.
    pub is_kernels: bool,
    /// When it was looked at, nanoseconds since boot: what happened before to a process of its number was another's.
    pub looked: u64,
}

/// Longest command line that is kept, in bytes; of the rest a sum.
const COMMAND: usize = 256;
/// So much of it is read at most.
const READ: u64 = 128 << 10;
/// `PF_KTHREAD` of include/linux/sched.h.
const KERNEL_THREAD: u32 = 0x0020_0000;
/// `PF_EXITING` of the same.
const EXITING: u32 = 0x0000_0004;
/// `PIDFS_MAGIC` of include/uapi/linux/magic.h, since 6.9: there each process has an inode of its own.
const PIDFS: i64 = 0x5049_4446;

impl Process {
    /// The process that has a number now.
    pub(crate) fn open(pid: u32) -> Result<Self, NoProcess> {
        Self::of_pidfd(pid, Self::pidfd_of(pid)?)
    }

    fn pidfd_of(pid: u32) -> Result<OwnedFd, NoProcess> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(NoProcess::Gone(pid))?;
        pidfd_open(number, PidfdFlags::empty()).map_err(|error| match error {
            // A thread has a number, too: INVAL, and NOENT since 6.9.
            rustix::io::Errno::SRCH | rustix::io::Errno::INVAL | rustix::io::Errno::NOENT => {
                NoProcess::Gone(pid)
            }
            error => NoProcess::unreadable(pid, &error.into()),
        })
    }

    /// The process that has a number now, also one that is not to be signalled; for who only looks.
    pub(crate) fn look_at(pid: u32) -> Result<Self, NoProcess> {
        Self::looked_at(pid, Self::pidfd_of(pid)?)
    }

    /// The process of a pidfd, whose number is known.
    pub(crate) fn of_pidfd(pid: u32, pidfd: OwnedFd) -> Result<Self, NoProcess> {
        if pid == 1 {
            return Err(NoProcess::Denied(pid, "the first process of the host"));
        }
        if pid == process::id() {
            return Err(NoProcess::Denied(pid, "plumb itself"));
        }
        if getppid().is_some_and(|parent| i64::from(parent.as_raw_nonzero().get()) == i64::from(pid)) {
            return Err(NoProcess::Denied(pid, "the process that has started plumb"));
        }
        let process = Self::looked_at(pid, pidfd)?;
        if process.is_kernels {
            return Err(NoProcess::Denied(pid, "a thread of the kernel"));
        }
        Ok(process)
    }

    fn looked_at(pid: u32, pidfd: OwnedFd) -> Result<Self, NoProcess> {
        let looked = clock::boottime();
        let read = read(pid, &pidfd);
        // Whoever is there now was there before, so what was read is of it.
        if !is_alive(&pidfd) {
            return Err(NoProcess::Gone(pid));
        }
        let (identity, ppid, uids, flags) =
            read.map_err(|error| match NoProcess::unreadable(pid, &error) {
                // Whoever ends has no executable any more a moment before it is gone.
                NoProcess::Unreadable(..) if ends(pid) => NoProcess::Gone(pid),
                why => why,
            })?;
        let command = command(pid);
        if !is_alive(&pidfd) {
            return Err(NoProcess::Gone(pid));
        }
        let is_kernels = flags & KERNEL_THREAD != 0;
        Ok(Self { pidfd, identity, ppid, uids, command, looked, is_kernels })
    }

    /// It as it is now; its number is its own for as long as it is there.
    pub(crate) fn again(&self) -> Result<Self, NoProcess> {
        let pid = self.identity.pid;
        let pidfd = self.pidfd.try_clone();
        Self::of_pidfd(pid, pidfd.map_err(|error| NoProcess::unreadable(pid, &error))?)
    }

    #[must_use]
    pub(crate) fn is_alive(&self) -> bool {
        is_alive(&self.pidfd)
    }

    /// Whether it has gone, or is about to.
    #[must_use]
    pub(super) fn ends(&self) -> bool {
        !self.is_alive() || ends(self.identity.pid)
    }

    /// Whether a user could signal it himself: kill(2), without capabilities.
    #[must_use]
    pub(crate) fn may_be_signalled_by(&self, uid: u32) -> bool {
        uid == 0 || uid == self.uids.0 || uid == self.uids.1
    }

    /// Below /proc. What is read there is of this process only if it is alive afterwards.
    #[must_use]
    pub(crate) fn folder(&self) -> PathBuf {
        folder(self.identity.pid)
    }

    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Below /proc.
pub(super) fn folder(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}"))
}

/// A pidfd is readable once all threads have ended (since 5.3).
fn is_alive(pidfd: &OwnedFd) -> bool {
    let mut ready = [PollFd::new(pidfd, PollFlags::IN)];
    matches!(poll(&mut ready, Some(&Timespec::default())), Ok(0))
}

type Facts = (Identity, u32, (u32, u32), u32);

fn read(pid: u32, pidfd: &OwnedFd) -> io::Result<Facts> {
    let folder = folder(pid);
    let stat = fs::read(folder.join("stat"))?;
    let (comm, fields) = stat_fields(&stat).ok_or_else(|| io::Error::other("its stat is not understood"))?;
    let field = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
    // proc_pid_stat(5) counts from 1, and the name is 2.
    let (ppid, flags, start_ticks) = (field(4 - 3), field(9 - 3), field(22 - 3));
    let is_kernels = flags as u32 & KERNEL_THREAD != 0;
    let exe = match fs::metadata(folder.join("exe")) {
        Ok(found) => (found.dev(), found.ino()),
        Err(_) if is_kernels => (0, 0),
        Err(error) => return Err(error),
    };
    let status = status(&folder)?;
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap_or_default();
    let uids: Vec<u32> = uids.split_whitespace().filter_map(|uid| uid.parse().ok()).collect();
    let [real, _, saved, _] = uids[..] else { return Err(io::Error::other("its users are not known")) };
    let identity = Identity {
        pid,
        start_ticks,
        pidfd_inode: inode(pidfd),
        exe,
        cgroup: String::from_utf8_lossy(&fs::read(folder.join("cgroup"))?).into_owned(),
        uid: real,
        comm,
    };
    Ok((identity, u32::try_from(ppid).unwrap_or(0), (real, saved), flags as u32))
}

/// What proc_pid_status(5) has of a process or a thread, whose name may hold anything.
pub(super) fn status(folder: &Path) -> io::Result<String> {
    Ok(String::from_utf8_lossy(&fs::read(folder.join("status"))?).into_owned())
}

/// The name, escaped, and the fields after it. A name may hold anything, also `)`.
fn stat_fields(stat: &[u8]) -> Option<(String, Vec<String>)> {
    let open = stat.iter().position(|byte| *byte == b'(')?;
    let close = stat.iter().rposition(|byte| *byte == b')')?;
    let comm = text::printable(stat.get(open + 1..close)?);
    let rest = String::from_utf8_lossy(stat.get(close + 1..)?).into_owned();
    Some((comm, rest.split_whitespace().map(str::to_owned).collect()))
}

/// Whether all threads of a process are ending. Of one whose first thread alone has ended nothing can be looked at either, and
/// it goes on.
fn ends(pid: u32) -> bool {
    let has_gone = |error: &io::Error| matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH));
    let is_exiting = |thread: io::Result<fs::DirEntry>| {
        let stat = match thread.and_then(|thread| fs::read(thread.path().join("stat"))) {
            Ok(stat) => stat,
            Err(error) => return has_gone(&error),
        };
        let flags = stat_fields(&stat).and_then(|(_, fields)| fields.get(9 - 3)?.parse::<u32>().ok());
        flags.is_some_and(|flags| flags & EXITING != 0)
    };
    // When one thread ends all the others have KILL pending first (kernel/signal.c, zap_other_threads).
    let is_killed = |thread: &fs::DirEntry| {
        let status = status(&thread.path()).unwrap_or_default();
        let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:"));
        let pending = pending.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
        pending.is_some_and(|mask| mask & 1 << (libc::SIGKILL - 1) != 0)
    };
    let ends = |thread: io::Result<fs::DirEntry>| thread.as_ref().is_ok_and(is_killed) || is_exiting(thread);
    match fs::read_dir(folder(pid).join("task")) {
        Ok(mut threads) => threads.all(ends),
        Err(error) => has_gone(&error),
    }
}

/// When the process was started that has a number now, as `Identity` has it.
#[must_use]
pub(crate) fn start_ticks(pid: u32) -> Option<u64> {
    let (_, fields) = stat_fields(&fs::read(folder(pid).join("stat")).ok()?)?;
    fields.get(22 - 3)?.parse().ok()
}

/// The name of the process that has a number now, as `Identity` has it; empty when it has gone.
#[must_use]
pub(crate) fn comm(pid: u32) -> String {
    let stat = fs::read(folder(pid).join("stat")).unwrap_or_default();
    stat_fields(&stat).map_or_else(String::new, |(comm, _)| comm)
}

/// The parent of the process that has a number now.
#[must_use]
pub(crate) fn parent(pid: u32) -> Option<u32> {
    let (_, fields) = stat_fields(&fs::read(folder(pid).join("stat")).ok()?)?;
    fields.get(4 - 3)?.parse().ok()
}

fn inode(pidfd: &OwnedFd) -> Option<u64> {
    let is_own = rustix::fs::fstatfs(pidfd).is_ok_and(|found| found.f_type == PIDFS);
    if is_own { rustix::fs::fstat(pidfd).ok().map(|found| found.st_ino) } else { None }
}

fn command(pid: u32) -> String {
    let mut bytes = Vec::new();
    let read = |file: fs::File| file.take(READ).read_to_end(&mut bytes);
    let _ = fs::File::open(folder(pid).join("cmdline")).and_then(read);
    let rest = bytes.split_off(bytes.len().min(COMMAND));
    let words = bytes.split(|byte| *byte == 0).filter(|word| !word.is_empty());
    let command = words.map(text::printable).collect::<Vec<_>>().join(" ");
    // Two that differ far behind are two.
    let mut hasher = DefaultHasher::new();
    rest.hash(&mut hasher);
    if rest.is_empty() { command } else { format!("{command} #{:016x}", hasher.finish()) }
}

/// The number in a pidfd's fdinfo: of the process in our pid namespace; `None` when it has ended or is not in it.
#[must_use]
pub(crate) fn pid_of(pidfd: &OwnedFd) -> Option<u32> {
    use std::os::fd::AsRawFd;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse::<i64>().ok()?;
    u32::try_from(pid).ok().filter(|pid| *pid > 0)
}

/// Every process of the host.
pub(crate) fn all() -> io::Result<Vec<u32>> {
    let number = |entry: fs::DirEntry| entry.file_name().to_str()?.parse().ok();
    fs::read_dir("/proc")?.filter_map(|entry| entry.map(number).transpose()).collect()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_name_may_hold_what_ends_a_name() {
        let (comm, fields) = stat_fields(b"7 (a) R 1 (b)) S 3 4 5").unwrap();
        assert_eq!(
            (comm.as_str(), &fields[..]),
            ("a) R 1 (b)", &["S", "3", "4", "5"].map(str::to_owned)[..])
        );
        assert!(stat_fields(b"7").is_none() && stat_fields(b")(").is_none());
    }

    #[test]
    fn a_process_is_known_until_it_ends_and_the_denied_ones_never() {
        let mut child = Command::new("sleep").arg("30").spawn().unwrap();
        // A child of vfork is on its own a moment before its arguments are in place.
        let opened = std::iter::repeat_with(|| Process::open(child.id()).unwrap());
        let process = opened.take(100_000).find(|process| !process.command.is_empty()).unwrap();
        assert!(process.is_alive() && process.command == "sleep 30", "{process:?}");
        assert_eq!(process.identity.differs(&process.again().unwrap().identity), None);
        assert_eq!(pid_of(&process.pidfd), Some(child.id()));
        // SAFETY: the id of this process's user.
        let own = unsafe { libc::getuid() };
        assert!(process.may_be_signalled_by(own) && !process.may_be_signalled_by(own + 1234));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(process.again().unwrap_err(), NoProcess::Gone(child.id()));
        assert!(matches!(Process::open(1), Err(NoProcess::Denied(1, _))));
        assert!(matches!(Process::open(process::id()), Err(NoProcess::Denied(..))));
        let parent = getppid().unwrap().as_raw_nonzero().get() as u32;
        assert!(matches!(Process::open(parent), Err(NoProcess::Denied(..))));
        // kthreadd.
        assert!(matches!(
            Process::open(2),
            Err(NoProcess::Denied(2, "a thread of the kernel") | NoProcess::Gone(2))
        ));
        assert_eq!(Process::open(0).unwrap_err(), NoProcess::Gone(0));
    }
}

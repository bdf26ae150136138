//! What the kernel tells about the address spaces of a process and all its descendants, from the first instruction on:
//! executable mappings, execs and forks, put into one order.

use std::{io, os::fd::BorrowedFd};

use aya::util::online_cpus;

use super::sideband::Sideband;

/// Rounds over all rings in one `drain` at most: who makes records without end is not waited for.
const MAX_ROUNDS: usize = 4;

/// Why a process cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    #[error(
        "the kernel does not let this process ask for mappings (perf_event_open: {0}); it takes CAP_PERFMON"
    )]
    Refused(#[source] io::Error),
    #[error("this kernel has no perf events ({0})")]
    Missing(#[source] io::Error),
    #[error("which CPUs are online: {0}")]
    Cpus(#[source] io::Error),
    #[error("no CPU is online")]
    NoCpu,
    #[error("asking for the mappings of process {pid} on CPU {cpu}: {source}")]
    Open { pid: u32, cpu: u32, source: io::Error },
}

impl FollowError {
    fn new(pid: u32, cpu: u32, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::EACCES | libc::EPERM) => Self::Refused(source),
            Some(libc::ENOSYS | libc::EOPNOTSUPP | libc::ENOENT) => Self::Missing(source),
            _ => Self::Open { pid, cpu, source },
        }
    }
}

/// One thing the kernel told about the address spaces of a process tree. Times are nanoseconds since boot
/// (`CLOCK_BOOTTIME`), processes are named as in the pid namespace of whoever follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapEvent {
    /// Memory that may be executed, by mmap or mprotect. What was there before is replaced.
    Mapped { time: u64, tgid: u32, mapping: Mapping },
    /// The old address space is gone; what is mapped of the new one follows.
    Exec { time: u64, tgid: u32 },
    /// A process was made, with a copy of its parent's address space, or the same one until it execs. Comes before
    /// whatever the child does.
    Forked { time: u64, parent: u32, child: u32 },
}

impl MapEvent {
    #[must_use]
    pub fn time(&self) -> u64 {
        match self {
            Self::Mapped { time, .. } | Self::Exec { time, .. } | Self::Forked { time, .. } => *time,
        }
    }
}

/// An executable mapping (`perf_event_mmap`, kernel/events/core.c).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub start: u64,
    pub end: u64,
    /// Of the file, in bytes, at `start`; without a file it means nothing.
    pub offset: u64,
    /// Major and minor number of the file's superblock, as in /proc/PID/maps. From 6.6 to 6.17, and before 6.6 as
    /// there, a file of an overlay has those of the layer it is in.
    pub device: (u32, u32),
    /// 0 for memory without a file.
    pub inode: u64,
    /// Seen from the root of the process; ` (deleted)` is appended as in /proc/PID/maps. `//anon` is memory without
    /// a file, `[vdso]` and the like are the kernel's, `//toolong` and `//enomem` are names it could not make.
    pub path: Vec<u8>,
}

/// Follows a process tree. Nothing is stopped or slowed down by it but for the records themselves, and for one small
/// object per CPU that the kernel makes with each thread.
///
/// Not told by the kernel: memory that is unmapped, moved (mremap) or made not executable, and what a process shares
/// with its parent after a vfork or clone(`CLONE_VM`) without an exec. A process that execs a set-uid program as
/// somebody else, or one that it may not read, is followed no further, nor are its children (`begin_new_exec`,
/// fs/exec.c); nor is what runs on a CPU that was not online in the beginning.
pub struct Mappings {
    rings: Vec<Sideband>,
    /// Read last, so that their causes may be in a ring that was read before.
    held: Vec<MapEvent>,
}

impl Mappings {
    /// Follows process `pid`, which has one thread so far and does not run yet, and all it will fork. Takes 132 KiB
    /// and an fd for each CPU that is online.
    ///
    /// # Errors
    ///
    /// If the kernel refuses: it takes `CAP_PERFMON` (`CAP_SYS_ADMIN` before 5.8) where perf_event_paranoid is above
    /// 2 or the process is somebody else's, and `CAP_IPC_LOCK` where perf_event_mlock_kb is below 132.
    pub fn follow(pid: u32) -> Result<Self, FollowError> {
        let cpus = online_cpus().map_err(|(_, error)| FollowError::Cpus(error))?;
        let mut rings = Vec::with_capacity(cpus.len());
        for cpu in cpus {
            match Sideband::open(pid, cpu) {
                Ok(ring) => rings.push(ring),
                // It went offline a moment ago.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                Err(error) => return Err(FollowError::new(pid, cpu, error)),
            }
        }
        if rings.is_empty() {
            return Err(FollowError::NoCpu);
        }
        Ok(Self { rings, held: Vec::new() })
    }

    /// What there is, ordered by time, and causes before what they caused: a ring that was read early may lack the
    /// fork of a child whose exec is in the next, so all are read until none has something new. What came too late
    /// for that is kept for the next call; the fds are readable then.
    pub fn drain(&mut self) -> Vec<MapEvent> {
        let mut events = std::mem::take(&mut self.held);
        let mut settled = 0;
        for _ in 0..MAX_ROUNDS {
            // Whatever happened before these was in a ring when they were read: this round finds it.
            settled = events.iter().map(MapEvent::time).max().unwrap_or(0);
            let before = events.len();
            self.rings.iter_mut().for_each(|ring| ring.drain_into(&mut events));
            if events.len() == before {
                break;
            }
        }
        events.sort_by_key(MapEvent::time);
        self.held = events.split_off(events.partition_point(|event| event.time() <= settled));
        events
    }

    /// Records that the rings had no room for, or that could not be understood. Before 6.0 the kernel tells about the
    /// former with the next record that has room again (`PERF_RECORD_LOST`), so that the last ones are missing here.
    #[must_use]
    pub fn lost(&self) -> u64 {
        let accounts = self.rings.iter().map(Sideband::account);
        accounts.map(|account| account.lost + account.damaged).sum()
    }

    /// To put into an epoll: readable from the first record on, once per record, whether it has been read or not. When
    /// all followed processes have ended it hangs up (`EPOLLHUP`), and stays so: edge-triggered is better.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.rings.iter().map(Sideband::fd)
    }
}

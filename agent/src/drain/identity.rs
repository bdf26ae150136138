//! Which process is meant, so that it cannot be mistaken for another one with the same number.

use plumb_common::task::ProcKey;
use serde::{Deserialize, Serialize};

/// `USER_HZ` of all Linux on x86: in such parts of a second /proc tells when a process was started.
pub(crate) const TICKS: u64 = 100;

/// A time since boot as /proc has it, from nanoseconds.
#[must_use]
pub(crate) const fn ticks(nanoseconds: u64) -> u64 {
    nanoseconds / (1_000_000_000 / TICKS)
}

/// A process as it was when it was looked at through a pidfd of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub pid: u32,
    /// When it was started: field 22 of /proc/PID/stat, in 1/100 s since boot.
    pub start_ticks: u64,
    /// Inode number of its pidfd, which no other process of this boot has; since 6.9.
    pub pidfd_inode: Option<u64>,
    /// Device and inode of its executable.
    pub exe: (u64, u64),
    /// As /proc/PID/cgroup has it.
    pub cgroup: String,
    /// Real user.
    pub uid: u32,
    /// Name, escaped.
    pub comm: String,
}

impl Identity {
    /// Whether both are one process, whatever program it runs.
    #[must_use]
    pub(crate) fn is_same_process(&self, other: &Self) -> bool {
        let is_same_pidfd = match (self.pidfd_inode, other.pidfd_inode) {
            (Some(one), Some(other)) => one == other,
            _ => true,
        };
        is_same_pidfd && (self.pid, self.start_ticks) == (other.pid, other.start_ticks)
    }

    /// Whether it is the process of an event.
    #[must_use]
    pub(crate) const fn is(&self, process: ProcKey) -> bool {
        self.pid == process.tgid && self.start_ticks == ticks(process.start_boottime)
    }

    /// Why `now` is not what was registered, although it may be the same process.
    #[must_use]
    pub(crate) fn differs(&self, now: &Self) -> Option<String> {
        if !self.is_same_process(now) {
            return Some(format!("pid {} is another process now ({})", self.pid, now.comm));
        }
        if self.exe != now.exe {
            return Some(format!("process {} runs another program now ({})", self.pid, now.comm));
        }
        if self.cgroup != now.cgroup {
            return Some(format!("process {} is in another cgroup now", self.pid));
        }
        None
    }
}

#[cfg(test)]
impl Identity {
    pub(crate) fn example(pid: u32) -> Self {
        Self {
            pid,
            start_ticks: 100,
            pidfd_inode: None,
            exe: (1, 2),
            cgroup: "0::/a\n".to_owned(),
            uid: 0,
            comm: "app".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_another_process_has_now_is_not_the_same_nor_is_another_program() {
        let was = Identity::example(7);
        assert_eq!(was.differs(&was), None);
        for (now, why) in [
            (Identity { start_ticks: 101, ..was.clone() }, "another process"),
            (Identity { exe: (1, 3), ..was.clone() }, "another program"),
            (Identity { cgroup: "0::/b\n".to_owned(), ..was.clone() }, "another cgroup"),
        ] {
            assert!(was.differs(&now).unwrap().contains(why), "{why}");
        }
        let old = Identity { pidfd_inode: Some(5), ..was.clone() };
        assert!(old.is_same_process(&was));
        assert!(!old.is_same_process(&Identity { pidfd_inode: Some(6), ..was }));
    }
}

//! One process in the table: plain numbers and shared words.

use std::sync::Arc;

use plumb_common::task::{FLAG_FDS_TRUNCATED, FLAG_FDS_UNKNOWN, FLAG_KERNEL_THREAD, ProcKey, TaskRecord};

use crate::procfs::ProcStatic;

/// x86_64.
const PAGE_BYTES: u64 = 4096;

/// One process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub key: ProcKey,
    /// Changes with each exec.
    pub exec_id: u64,
    /// Soft `RLIMIT_NOFILE`.
    pub fd_limit: u64,
    /// Soft `RLIMIT_NPROC`; counted per user.
    pub nproc_limit: u64,
    pub rss_bytes: u64,
    pub ppid: u32,
    pub uid: u32,
    /// Open fds. A lower bound if the table is larger than the kernel side counts; if it could not be
    /// read, the number before, or 0 if there is none.
    pub fds: u32,
    pub threads: u32,
    /// Scheduler state bits.
    pub state: u32,
    /// `task::FLAG_*`.
    pub flags: u32,
    /// No thread is left; the parent has not waited yet.
    pub exited: bool,
    pub info: Arc<ProcStatic>,
}

#[cfg(test)]
impl Row {
    /// A process with one thread.
    pub(crate) fn example(fds: u32, fd_limit: u64) -> Self {
        let info = ProcStatic { comm: "app".into(), exe: None, group: "app.service".into() };
        Self {
            key: ProcKey::new(42, 7),
            exec_id: 1,
            fd_limit,
            nproc_limit: u64::MAX,
            rss_bytes: 0,
            ppid: 1,
            uid: 0,
            fds,
            threads: 1,
            state: 0,
            flags: 0,
            exited: false,
            info: Arc::new(info),
        }
    }
}

impl Row {
    /// A row as a pass saw it.
    #[must_use]
    pub(crate) fn from_record(record: &TaskRecord, info: Arc<ProcStatic>) -> Self {
        Self {
            key: record.key,
            exec_id: record.exec_id,
            fd_limit: record.fd_limit,
            nproc_limit: record.nproc_limit,
            rss_bytes: record.rss_pages * PAGE_BYTES,
            ppid: record.ppid,
            uid: record.uid,
            fds: record.fds,
            threads: record.threads,
            state: record.state,
            flags: record.flags,
            exited: record.exit_state != 0 && record.threads <= 1,
            info,
        }
    }

    #[must_use]
    pub(crate) fn is_kernel_thread(&self) -> bool {
        self.flags & FLAG_KERNEL_THREAD != 0
    }

    /// Whether `fds` is exact.
    #[must_use]
    pub(crate) fn fds_exact(&self) -> bool {
        self.flags & (FLAG_FDS_TRUNCATED | FLAG_FDS_UNKNOWN) == 0
    }

    /// Open fds over the limit, 0 to 1 (more after a lowered limit).
    #[must_use]
    pub(crate) fn fd_ratio(&self) -> f64 {
        if self.fd_limit == 0 { 0.0 } else { f64::from(self.fds) / self.fd_limit as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_stays_within_its_budget() {
        assert!(size_of::<Row>() <= 128, "{} bytes", size_of::<Row>());
    }
}

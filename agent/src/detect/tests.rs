use super::*;
use crate::procfs::ProcStatic;

const SECOND: u64 = 1_000_000_000;
const LIMITS: HostLimits = HostLimits { threads: 32_768 };

pub(super) fn row(fds: u32, threads: u32) -> Row {
    Row {
        key: ProcKey::new(42, 7),
        exec_id: 1,
        fd_limit: 1024,
        nproc_limit: u64::MAX,
        rss_bytes: 0,
        ppid: 1,
        uid: 0,
        fds,
        threads,
        state: 0,
        flags: 0,
        exited: false,
        info: Arc::new(ProcStatic { comm: "test".into(), exe: None, group: "test".into() }),
    }
}


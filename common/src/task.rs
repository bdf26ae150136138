//! Processes and threads as the iterators report them.

use bytemuck::{Pod, Zeroable};

use crate::limits::COMM_LEN;

/// Identity of a process: a pid is reused, a pid together with its start time is not.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct ProcKey {
    /// Start of the thread group's leader, nanoseconds since boot (`task_struct.start_boottime`, since 5.5).
    /// A thread that becomes leader by calling exec inherits it.
    pub start_boottime: u64,
    /// Thread group id in the initial pid namespace.
    pub tgid: u32,
    /// Always 0; keeps the layout free of padding.
    pub reserved: u32,
}

impl ProcKey {
    /// The process `tgid` that started `start_boottime` nanoseconds after boot.
    #[must_use]
    pub const fn new(tgid: u32, start_boottime: u64) -> Self {
        Self { start_boottime, tgid, reserved: 0 }
    }
}

/// The task has no user address space and never will (`PF_KTHREAD`).
pub const FLAG_KERNEL_THREAD: u32 = 1;
/// The leader has exited; the record was read from another thread of the group.
pub const FLAG_STAND_IN: u32 = 1 << 1;
/// The fd table is larger than the counting bound: `fds` is a lower limit.
pub const FLAG_FDS_TRUNCATED: u32 = 1 << 2;
/// Reading the bitmap faulted: `fds` is unknown.
pub const FLAG_FDS_UNKNOWN: u32 = 1 << 3;

/// One process as `iter/task` saw it at `time`. Records of one pass have different times.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct TaskRecord {
    pub key: ProcKey,
    /// When the record was read, nanoseconds since boot (`CLOCK_BOOTTIME`).
    pub time: u64,
    /// Address of the `files_struct`, 0 when the process has none any more. Equal for processes that
    /// share their fd table; an identity, never dereferenced.
    pub files: u64,
    /// Address of the task's `css_set`: changes when the process moves to another cgroup.
    pub css_set: u64,
    /// `task_struct.self_exec_id`: changes with each exec.
    pub exec_id: u64,
    /// Soft `RLIMIT_NOFILE`; `u64::MAX` is unlimited.
    pub fd_limit: u64,
    /// Soft `RLIMIT_NPROC`; `u64::MAX` is unlimited. Counted per user, and not applied to root.
    pub nproc_limit: u64,
    /// Resident pages: file, anonymous and shared memory. Approximate since 6.2, where the kernel
    /// counts per CPU.
    pub rss_pages: u64,
    /// Set bits of the `open_fds` bitmap: the numbers that are taken. That is what the limit applies to, and one more
    /// than /proc/PID/fd shows for each thread that waits in accept(2), or in open(2) of a FIFO: the number is
    /// reserved first (`__sys_accept4_file`, net/socket.c; `do_sys_openat2`, fs/open.c).
    pub fds: u32,
    /// Tasks of the group, as `Threads:` in /proc/PID/status (`signal_struct.nr_threads`).
    pub threads: u32,
    /// Thread group id of the parent, 0 for none.
    pub ppid: u32,
    /// Real user id in the initial user namespace.
    pub uid: u32,
    /// Scheduler state bits (`task_struct.__state`, `state` before 5.14).
    pub state: u32,
    /// `EXIT_ZOMBIE` (32) or `EXIT_DEAD` (16) once the leader has exited, else 0.
    pub exit_state: u32,
    /// `FLAG_*` bits.
    pub flags: u32,
    /// Always 0.
    pub reserved: u32,
    pub comm: [u8; COMM_LEN],
}

/// One thread as `iter/task` saw it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct ThreadRecord {
    /// The thread's own start, nanoseconds since boot.
    pub start_boottime: u64,
    pub tid: u32,
    pub tgid: u32,
    /// Scheduler state bits.
    pub state: u32,
    pub exit_state: u32,
    /// Where it entered the kernel, as in `event::Stack`: of a thread that is blocked, where it is blocked. All 0
    /// for one that did not come from 64-bit user space.
    pub ip: u64,
    pub sp: u64,
    pub bp: u64,
    pub comm: [u8; COMM_LEN],
}

//! What travels through the ring: one `Header`, then the fields of its kind.

use bytemuck::{Pod, Zeroable};

use crate::{
    limits::{COMM_LEN, NAME_LEN},
    task::ProcKey,
};

pub const KIND_CLONE: u32 = 1;
pub const KIND_EXEC: u32 = 2;
pub const KIND_RENAME: u32 = 3;
pub const KIND_EXIT: u32 = 4;
pub const KIND_FD: u32 = 5;
/// In the ring of stacks only.
pub const KIND_STACK: u32 = 6;
/// In the ring of stacks only: which fds are open at an exec or at the end of a process.
pub const KIND_TABLE: u32 = 7;
/// `sockets::Signal` and `sockets::Socket`.
pub const KIND_SIGNAL: u32 = 8;
pub const KIND_SOCKET: u32 = 9;

/// In `Clone::flags` (linux/sched.h): the new task joins its creator's thread group.
pub const CLONE_THREAD: u64 = 0x0001_0000;

/// The beginning of every event.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Header {
    /// `KIND_*`.
    pub kind: u32,
    /// Thread that did it.
    pub tid: u32,
    /// When, nanoseconds since boot (`bpf_ktime_get_boot_ns`, since 5.8).
    pub time: u64,
    /// Process that did it.
    pub process: ProcKey,
    /// Name of the thread; for a rename and an exec the new one.
    pub comm: [u8; COMM_LEN],
}

/// A thread or process came to be. The header is its creator.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Clone {
    pub header: Header,
    /// The new task's process; equal to the creator's for a thread.
    pub child: ProcKey,
    /// `CLONE_*` of sched.h.
    pub flags: u64,
    pub child_tid: u32,
    /// Where trees are followed: 1 when there was no room to follow the new process.
    pub left_out: u32,
}

/// A process runs a new image; close-on-exec has happened.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Exec {
    pub header: Header,
    /// Thread that called exec; it has since become the leader.
    pub old_tid: u32,
    /// Always 0.
    pub reserved: u32,
}

/// A thread changed its name.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Rename {
    pub header: Header,
}

/// A thread is exiting. Its fd table is still there: it goes with its last user.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Exit {
    pub header: Header,
    /// As wait(2) reports it: exit code in bits 8 to 15, killing signal in bits 0 to 6.
    pub code: u32,
    /// 1 when no thread of the process is left. Two threads that exit at once may both say so.
    pub group_dead: u32,
    /// 1 when the whole process is ending (`SIGNAL_GROUP_EXIT` of `signal->flags`), not this thread by itself.
    pub group_exit: u32,
    /// 1 when this thread asked for it by exit_group(2).
    pub called: u32,
}

/// A new fd, verified against its slot.
pub const FD_OPENED: u32 = 1;
/// dup2 or dup3: like opened, and whatever was open at that number has been closed.
pub const FD_REPLACED: u32 = 2;
/// `fd` to `fd_last` are closed; what was not open in between stayed so. With `FD_UNKNOWN` one fd that held
/// `file`, of which only the file is known.
pub const FD_CLOSED: u32 = 3;
/// `fd` to `fd_last` will be closed at the next exec.
pub const FD_CLOSE_ON_EXEC: u32 = 4;
/// close(2) of `fd`, where nothing was open. Only where trees are followed.
pub const FD_BAD_CLOSE: u32 = 5;

/// In `FdChange::marks`: the removal of an fd whose slot another thread had filled again before the event.
pub const MARK_REUSED: u32 = 1;
/// In `FdChange::marks`: the new fd has close-on-exec.
pub const MARK_CLOEXEC: u32 = 1 << 1;
/// In `FdChange::marks`: made by the same call as the one before it of that thread. Only through `sys_exit`.
pub const MARK_SAME_CALL: u32 = 1 << 2;

/// In `FdChange::fd` of a removal: the hook was told the file, not the number.
pub const FD_UNKNOWN: u32 = u32::MAX;

/// The only fd event, whatever hook saw it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct FdChange {
    pub header: Header,
    /// Address of the `files_struct` the change was made in.
    pub files: u64,
    /// Address of the `struct file` found in the slot; for a removal that of the file, 0 if only its number
    /// is known. A removal with `MARK_REUSED` carries the file that is in the slot since.
    pub file: u64,
    pub fd: u32,
    /// Last fd of a range, else equal to `fd`.
    pub fd_last: u32,
    /// `FD_*`.
    pub change: u32,
    /// Index into `syscalls::TABLE`, or `syscalls::OTHER`.
    pub how: u32,
    /// As in `file::FdRecord`; 0 without a file.
    pub mode: u32,
    /// `MARK_*` bits.
    pub marks: u32,
    /// As in `file::FdRecord`; empty without a file.
    pub name: [u8; NAME_LEN],
}

/// The user stack of a thread at the call that made an fd or a thread. It is in its ring before that event is
/// in the other. `len` bytes of the stack follow, from `sp` up; whatever else the record holds means nothing.
///
/// As `KIND_TABLE` the `open_fds` bitmap of a process instead, beside the event of its exec, where close-on-exec has
/// happened, or of the end of its last thread: `len` bytes of it follow, `made` is the number of slots of the table, and
/// registers are 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Stack {
    /// Thread and time are those of the event.
    pub header: Header,
    /// Just behind the syscall instruction.
    pub ip: u64,
    pub sp: u64,
    pub bp: u64,
    /// The new fd, or the id of the new thread.
    pub made: u32,
    pub len: u32,
}

/// What the kernel side knows of a watched process.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Watch {
    /// As in `ProcKey`.
    pub start_boottime: u64,
    /// The second (2^30 ns) in which stacks were last taken.
    pub second: u64,
    /// And how many in it.
    pub taken: u32,
    /// 1: with the stacks of whoever makes fds and threads.
    pub stacks: u32,
}

/// Whose fd events reach the ring of the agent, beside the processes it watches.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct FdControl {
    /// 1: everybody's.
    pub all: u32,
    /// This thread's, 0 for none: the agent's canary.
    pub canary_tid: u32,
}

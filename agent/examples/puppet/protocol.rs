//! What the driver of the model tests and its puppets share: one file that all of them map, with a queue of
//! commands for each puppet.

use std::sync::atomic::{AtomicI32, AtomicU32};

/// Puppets at a time, the stage included.
pub(crate) const SLOTS: usize = 32;
/// Commands of one puppet that are not done yet, at most.
pub(crate) const QUEUE: usize = 1024;
/// Threads of one puppet at a time.
pub(crate) const THREADS: usize = 8;
/// The slot of the first process, from which all others descend.
pub(crate) const STAGE: usize = 0;

/// Both ends of the mailbox, through which any puppet sends fds to any other.
pub(crate) const MAIL_IN: u32 = 3;
pub(crate) const MAIL_OUT: u32 = 4;
/// Opened and closed by an exec'd puppet that has started: what came before was its runtime's.
pub(crate) const STARTED_FD: u32 = 1023;

/// A system call whose arguments are numbers: number, then three arguments.
pub(crate) const CALL: u32 = 1;
/// openat of /dev/null: flags.
pub(crate) const OPEN: u32 = 2;
/// pipe2: flags.
pub(crate) const PIPE: u32 = 3;
/// socketpair of the Unix domain: type.
pub(crate) const SOCKETPAIR: u32 = 4;
/// memfd_create: flags.
pub(crate) const MEMFD: u32 = 5;
/// Sends fds by SCM_RIGHTS: first fd, how many.
pub(crate) const SEND: u32 = 6;
/// Receives what one `SEND` has sent: flags of recvmsg. The reply is how many fds, then the fds.
pub(crate) const RECEIVE: u32 = 7;
/// A child in another slot: slot, flags of clone.
pub(crate) const FORK: u32 = 8;
/// A thread of this number, which then waits: number, flags of clone.
pub(crate) const THREAD: u32 = 9;
/// The thread of this number goes on with the commands.
pub(crate) const PASS: u32 = 10;
/// The thread of this number ends; nobody waits for it.
pub(crate) const END: u32 = 11;
/// This thread takes another name and its own again: 1, or only its own: 0.
pub(crate) const RENAME: u32 = 12;
/// The same program again, in this slot.
pub(crate) const EXEC: u32 = 13;
/// exit_group: code.
pub(crate) const EXIT: u32 = 14;
/// SIGKILL for the puppet of a slot.
pub(crate) const KILL: u32 = 15;
/// Goes on when the puppet of a slot has done a command: slot, its number.
pub(crate) const AWAIT: u32 = 16;

/// SCM_RIGHTS of one `SEND`, at most.
pub(crate) const MAX_SENT: usize = 3;

/// All fields are atomic only because several processes see them; one of them writes at a time.
#[repr(C)]
pub(crate) struct Command {
    /// The operation and its arguments.
    pub(crate) words: [AtomicU32; 5],
    /// Not 0: somebody sleeps until this command is done.
    pub(crate) wakes: AtomicU32,
    /// What the call returned, an error as a negative number, and further fds.
    pub(crate) reply: [AtomicI32; 4],
}

#[repr(C)]
pub(crate) struct Slot {
    /// Commands written so far; a futex.
    pub(crate) filled: AtomicU32,
    /// Commands done so far; a futex.
    pub(crate) done: AtomicU32,
    pub(crate) pid: AtomicI32,
    pub(crate) reserved: AtomicU32,
    /// Command n is at n modulo the length.
    pub(crate) queue: [Command; QUEUE],
}

#[repr(C)]
pub(crate) struct Shared {
    /// Not 0: every puppet ends.
    pub(crate) over: AtomicU32,
    pub(crate) reserved: AtomicU32,
    pub(crate) slots: [Slot; SLOTS],
}

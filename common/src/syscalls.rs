//! The one table of syscalls that change an fd table and are followed by name.
//!
//! The kernel handler, the names in the output and the tests all derive from it. Numbers: 64-bit from
//! arch/x86/entry/syscalls/syscall_64.tbl, 32-bit (compat) from syscall_32.tbl; they never change.

/// How a syscall tells which fds it made or removed.
pub const RETURNS: u32 = 1;
/// As `RETURNS`; what was open at the returned number is closed.
pub const REPLACES: u32 = 2;
/// Two fds in user memory, at the address in the first argument.
pub const PAIR: u32 = 3;
/// Closes the first argument.
pub const CLOSES: u32 = 4;
/// Closes, or marks, first argument to second argument.
pub const CLOSES_RANGE: u32 = 5;
/// As `RETURNS` when the second argument is `F_DUPFD` or `F_DUPFD_CLOEXEC`.
pub const FCNTL: u32 = 6;
/// As `PAIR`, with the address in the fourth argument.
pub const PAIR_IN_FOURTH: u32 = 7;
/// As `RETURNS` when the first argument is -1: any other is the fd that is changed and returned.
pub const SIGNALFD: u32 = 8;
/// As `RETURNS` when the first argument, a command of `enum bpf_cmd`, makes an fd.
pub const BPF: u32 = 9;
/// As `RETURNS` when the first argument is `SECCOMP_SET_MODE_FILTER` and the second asks for a listener.
pub const SECCOMP: u32 = 10;
/// The 32-bit entry's multiplexer of socket calls: as `RETURNS` when the first argument is `SYS_SOCKET`,
/// `SYS_ACCEPT` or `SYS_ACCEPT4`.
pub const SOCKETCALL: u32 = 11;

/// The second argument is a `struct user_msghdr`: what it brought as `SCM_RIGHTS`.
pub const MESSAGE: u32 = 12;
/// As `MESSAGE` for each of an array of `struct mmsghdr`.
pub const MESSAGES: u32 = 13;

/// In an event: the hook fired outside the calls of `TABLE`.
pub const OTHER: u32 = u32::MAX;

/// One syscall.
#[derive(Clone, Copy, Debug)]
pub struct Syscall {
    pub name: &'static str,
    /// Number on x86_64.
    pub nr: u32,
    /// Number through the 32-bit entry.
    pub nr_compat: u32,
    /// `RETURNS`, `REPLACES`, …
    pub shape: u32,
}

const fn call(name: &'static str, nr: u32, nr_compat: u32, shape: u32) -> Syscall {
    Syscall { name, nr, nr_compat, shape }
}

/// No such call through that entry.
pub const NONE: u32 = u32::MAX;

pub const TABLE: [Syscall; 47] = [
    call("open", 2, 5, RETURNS),
    call("openat", 257, 295, RETURNS),
    call("openat2", 437, 437, RETURNS),
    call("creat", 85, 8, RETURNS),
    call("open_by_handle_at", 304, 342, RETURNS),
    call("close", 3, 6, CLOSES),
    call("close_range", 436, 436, CLOSES_RANGE),
    call("dup", 32, 41, RETURNS),
    call("dup2", 33, 63, REPLACES),
    call("dup3", 292, 330, REPLACES),
    call("fcntl", 72, 55, FCNTL),
    // The 32-bit entry has a second fcntl, for large files.
    call("fcntl64", NONE, 221, FCNTL),
    call("pipe", 22, 42, PAIR),
    call("pipe2", 293, 331, PAIR),
    call("socket", 41, 359, RETURNS),
    call("socketpair", 53, 360, PAIR_IN_FOURTH),
    call("accept", 43, NONE, RETURNS),
    call("accept4", 288, 364, RETURNS),
    call("socketcall", NONE, 102, SOCKETCALL),
    // Natively only: the 32-bit layout of the message is another.
    call("recvmsg", 47, NONE, MESSAGE),
    call("recvmmsg", 299, NONE, MESSAGES),
    call("epoll_create", 213, 254, RETURNS),
    call("epoll_create1", 291, 329, RETURNS),
    call("eventfd", 284, 323, RETURNS),
    call("eventfd2", 290, 328, RETURNS),
    call("timerfd_create", 283, 322, RETURNS),
    call("signalfd", 282, 321, SIGNALFD),
    call("signalfd4", 289, 327, SIGNALFD),
    call("inotify_init", 253, 291, RETURNS),
    call("inotify_init1", 294, 332, RETURNS),
    call("fanotify_init", 300, 338, RETURNS),
    call("memfd_create", 319, 356, RETURNS),
    call("memfd_secret", 447, 447, RETURNS),
    call("userfaultfd", 323, 374, RETURNS),
    call("perf_event_open", 298, 336, RETURNS),
    call("io_uring_setup", 425, 425, RETURNS),
    call("mq_open", 240, 277, RETURNS),
    call("pidfd_open", 434, 434, RETURNS),
    call("pidfd_getfd", 438, 438, RETURNS),
    call("landlock_create_ruleset", 444, 444, RETURNS),
    call("open_tree", 428, 428, RETURNS),
    call("open_tree_attr", 467, 467, RETURNS),
    call("fsopen", 430, 430, RETURNS),
    call("fspick", 433, 433, RETURNS),
    call("fsmount", 432, 432, RETURNS),
    call("bpf", 321, 357, BPF),
    call("seccomp", 317, 354, SECCOMP),
];

/// Name of an event's call.
#[must_use]
pub fn name(how: u32) -> &'static str {
    // Outside a followed call: by a message, an ioctl, io_uring.
    TABLE.get(how as usize).map_or("other", |call| call.name)
}

/// In `BY_NUMBER`: not followed.
pub const UNKNOWN: u8 = u8::MAX;

/// Every number in `TABLE` is below this.
pub const NUMBERS: usize = 512;

/// Index into `TABLE` by number: native in the low byte, through the 32-bit entry in the high byte.
pub static BY_NUMBER: [u16; NUMBERS] = {
    let mut slots = [u16::MAX; NUMBERS];
    let mut i = 0;
    while i < TABLE.len() {
        let index = i as u16;
        if TABLE[i].nr != NONE {
            let slot = &mut slots[TABLE[i].nr as usize];
            *slot = (*slot & 0xff00) | index;
        }
        if TABLE[i].nr_compat != NONE {
            let slot = &mut slots[TABLE[i].nr_compat as usize];
            *slot = (*slot & 0x00ff) | (index << 8);
        }
        i += 1;
    }
    slots
};

/// Shape of each call by index into `TABLE`; a table of its own so that no string reaches the kernel.
pub static SHAPES: [u32; TABLE.len()] = {
    let mut shapes = [0; TABLE.len()];
    let mut i = 0;
    while i < TABLE.len() {
        shapes[i] = TABLE[i].shape;
        i += 1;
    }
    shapes
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_finds_its_call_and_no_other() {
        for nr in 0..NUMBERS as u32 {
            let entry = BY_NUMBER[nr as usize];
            let native = TABLE.iter().position(|c| c.nr == nr).map_or(UNKNOWN, |i| i as u8);
            let compat = TABLE.iter().position(|c| c.nr_compat == nr).map_or(UNKNOWN, |i| i as u8);
            assert_eq!((entry as u8, (entry >> 8) as u8), (native, compat), "number {nr}");
        }
    }
}

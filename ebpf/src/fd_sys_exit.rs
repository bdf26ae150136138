//! The fd seam through `sys_exit`: one program for all calls of `syscalls::TABLE`.
#![allow(clippy::needless_pass_by_value, reason = "the attribute macro passes the context by value")]

use aya_ebpf::{helpers::bpf_probe_read_user, macros::btf_tracepoint, programs::BtfTracePointContext};
use plumb_common::{
    counts,
    event::{FD_BAD_CLOSE, FD_CLOSE_ON_EXEC, FD_CLOSED, FD_OPENED, FD_REPLACED, MARK_SAME_CALL},
    limits::{MESSAGE_FDS, MESSAGES},
    offsets, syscalls,
};

use crate::{
    emit,
    fd::{Added, Removed, added, call, header, is_compat, removed},
    kernel, maps,
    regs::{self, PtRegs},
    stack,
};

const F_DUPFD: u32 = 0;
const F_DUPFD_CLOEXEC: u32 = 1030;
const CLOSE_RANGE_CLOEXEC: u64 = 4;
const EBADF: i64 = 9;
/// linux/seccomp.h.
const SECCOMP_SET_MODE_FILTER: u32 = 1;
const SECCOMP_FILTER_FLAG_NEW_LISTENER: u64 = 8;
/// linux/net.h.
const SYS_SOCKET: u32 = 1;
const SYS_ACCEPT: u32 = 5;
const SYS_ACCEPT4: u32 = 18;

/// Whether a command of bpf(2) returns an fd (`enum bpf_cmd`, include/uapi/linux/bpf.h): map and program
/// made, object and id looked up, raw tracepoint, BTF, link, iterator, statistics, token.
#[inline(always)]
fn makes_fd(command: u32) -> bool {
    const MAKES_FD: u64 = 1 << 0
        | 1 << 5
        | 1 << 7
        | 1 << 13
        | 1 << 14
        | 1 << 17
        | 1 << 18
        | 1 << 19
        | 1 << 28
        | 1 << 30
        | 1 << 32
        | 1 << 33
        | 1 << 36;
    command < 64 && MAKES_FD >> command & 1 == 1
}

/// `void sys_exit(struct pt_regs *regs, long ret)`, since 2.6.32 as a tracepoint. Runs at the end of every
/// syscall of the host while it is attached: the first lines are what everybody pays.
#[btf_tracepoint(function = "sys_exit")]
pub(crate) fn sys_exit(ctx: BtfTracePointContext) -> i32 {
    let regs: *const PtRegs = ctx.arg(0);
    // SAFETY: the tracepoint's first argument.
    let number = unsafe { regs::number(regs) };
    if number < syscalls::NUMBERS as u64 && syscalls::BY_NUMBER[number as usize] != u16::MAX {
        let began = if maps::tree() { emit::now() } else { 0 };
        followed(regs, ctx.arg(1), number);
        if maps::tree() {
            emit::spend(began);
        }
    }
    0
}

/// A call that is followed natively, through the 32-bit entry, or both.
#[inline(always)]
fn followed(regs: *const PtRegs, ret: i64, number: u64) {
    let compat = is_compat();
    let how = call(number, compat);
    if how >= syscalls::TABLE.len() {
        return;
    }
    // SAFETY: the tracepoint's first argument.
    let [first, second, third, fourth] = unsafe { regs::arguments(regs, compat) };
    let shape = syscalls::SHAPES[how];
    let how = how as u32;
    let returns = match shape {
        syscalls::RETURNS => true,
        syscalls::FCNTL => second as u32 == F_DUPFD || second as u32 == F_DUPFD_CLOEXEC,
        syscalls::REPLACES => first as u32 != second as u32,
        syscalls::SIGNALFD => first as u32 == u32::MAX,
        syscalls::BPF => makes_fd(first as u32),
        syscalls::SECCOMP => {
            first as u32 == SECCOMP_SET_MODE_FILTER && second & SECCOMP_FILTER_FLAG_NEW_LISTENER != 0
        }
        syscalls::SOCKETCALL => {
            first as u32 == SYS_SOCKET || first as u32 == SYS_ACCEPT || first as u32 == SYS_ACCEPT4
        }
        _ => false,
    };
    match shape {
        syscalls::PAIR if ret == 0 => pair(first, how),
        syscalls::PAIR_IN_FOURTH if ret == 0 => pair(fourth, how),
        // Whatever else close reports, the fd is gone.
        syscalls::CLOSES if ret != -EBADF => emptied([first as u32; 2], FD_CLOSED, how),
        syscalls::CLOSES if maps::tree() => emptied([first as u32; 2], FD_BAD_CLOSE, how),
        syscalls::MESSAGE if ret >= 0 => _ = plumb_message(second, u64::from(how)),
        syscalls::MESSAGES if ret > 0 => messages(second, ret as u64, how),
        syscalls::CLOSES_RANGE if ret == 0 => {
            let change = if third & CLOSE_RANGE_CLOEXEC == 0 { FD_CLOSED } else { FD_CLOSE_ON_EXEC };
            emptied([first as u32, second as u32], change, how);
        }
        syscalls::REPLACES if returns && ret >= 0 => filled(ret as u32, FD_REPLACED, how, 0),
        _ if returns && ret >= 0 => filled(ret as u32, FD_OPENED, how, 0),
        _ => {}
    }
}

#[inline(always)]
fn pair(address: u64, how: u32) {
    // SAFETY: the helper checks the user address. The process may rewrite the memory: both numbers are
    // verified against the table like any other.
    match unsafe { bpf_probe_read_user(address as *const [u32; 2]) } {
        Ok([one, two]) => {
            filled(one, FD_OPENED, how, 0);
            filled(two, FD_OPENED, how, MARK_SAME_CALL);
        }
        Err(_) => pair_unread(),
    }
}

/// `struct user_msghdr` (linux/socket.h) and `struct mmsghdr`, in bytes; where the former has its control data.
const MESSAGE_SIZE: u64 = 64;
const CONTROL: u64 = 32;
/// `struct cmsghdr` with what says that fds follow.
#[repr(C)]
#[derive(Clone, Copy)]
struct ControlHead {
    len: u64,
    level: u32,
    kind: u32,
}
const SOL_SOCKET: u32 = 1;
const SCM_RIGHTS: u32 = 1;
/// Pieces of control data of one message that are looked at: credentials or a time stamp may come first.
const PIECES: usize = 4;

fn messages(address: u64, received: u64, how: u32) {
    for index in 0..MESSAGES as u64 {
        if index >= received {
            break;
        }
        plumb_message(address + index * MESSAGE_SIZE, u64::from(how));
    }
}

/// The fds that came with a message, of which the kernel has written how much control data there is. The process may
/// rewrite its memory: each number is verified against the table like any other.
///
/// Global: verified once, for any arguments.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn plumb_message(message: u64, how: u64) -> u64 {
    // SAFETY: the helper checks the user address.
    let Ok([mut at, len]) = (unsafe { bpf_probe_read_user((message + CONTROL) as *const [u64; 2]) }) else {
        return 0;
    };
    let end = at.saturating_add(len);
    for _ in 0..PIECES {
        if at.saturating_add(size_of::<ControlHead>() as u64) > end {
            break;
        }
        // SAFETY: as above.
        let Ok(head) = (unsafe { bpf_probe_read_user(at as *const ControlHead) }) else { break };
        if head.level == SOL_SOCKET && head.kind == SCM_RIGHTS {
            return plumb_received(at + size_of::<ControlHead>() as u64, head.len, how);
        }
        // Each piece begins at a multiple of eight.
        at += (head.len.max(1) + 7) & !7;
    }
    0
}

/// The fds of one piece of control data of `len` bytes with its head.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn plumb_received(at: u64, len: u64, how: u64) -> u64 {
    let count = len.saturating_sub(size_of::<ControlHead>() as u64) / 4;
    for index in 0..MESSAGE_FDS as u64 {
        if index >= count {
            break;
        }
        // SAFETY: as above.
        let Ok(fd) = (unsafe { bpf_probe_read_user((at + index * 4) as *const u32) }) else { break };
        let marks = if index == 0 { 0 } else { MARK_SAME_CALL };
        filled(fd, FD_OPENED, how as u32, marks);
    }
    count
}

/// Two fds were made, and the memory that says which cannot be read.
#[inline(never)]
fn pair_unread() {
    // Each of the two is an event.
    for _ in 0..2 {
        if header().is_some() {
            emit::count(counts::FD, counts::FAULT);
        }
    }
}

/// A call claims to have filled a slot.
#[inline(always)]
fn filled(fd: u32, change: u32, how: u32, marks: u32) {
    plumb_filled(u64::from(fd), u64::from(change), u64::from(how), u64::from(marks));
}

/// As `filled`, and global.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn plumb_filled(fd: u64, change: u64, how: u64, marks: u64) -> u64 {
    let (fd, change, how, marks) = (fd as u32, change as u32, how as u32, marks as u32);
    let Some(header) = header() else { return 0 };
    match slot(fd) {
        None => emit::count(counts::FD, counts::FAULT),
        Some((_, 0)) => emit::count(counts::FD, counts::FORGED),
        Some((files, file)) => {
            stack::take(&header, fd);
            added(header, &Added { files, file, fd, change, how, marks });
        }
    }
    0
}

#[inline(never)]
fn emptied([fd, fd_last]: [u32; 2], change: u32, how: u32) {
    let Some(header) = header() else { return };
    // At the end of a close another thread may have filled the slot again, and its event may come first.
    match slot(fd) {
        None => emit::count(counts::FD, counts::FAULT),
        Some((files, file)) => {
            let reused = change == FD_CLOSED && fd == fd_last && file != 0;
            let file = if reused { file } else { 0 };
            removed(header, &Removed { files, file, fd, fd_last, change, how, reused });
        }
    }
}

/// The fd table of the running task and the file in one slot of it; file 0 when the slot is empty or beyond the
/// table, `None` when the table could not be read.
#[inline(always)]
fn slot(fd: u32) -> Option<(u64, u64)> {
    let (mut files, mut fdt, mut max_fds) = (0, 0, 0);
    match kernel::typed_current() {
        // SAFETY: a typed task, and what it points to.
        Some(task) => unsafe {
            if let Some(table) = kernel::follow(task, offsets::TASK_FILES) {
                files = table as u64;
                if let Some(table) = kernel::follow(table, offsets::FILES_FDT) {
                    fdt = table as u64;
                    max_fds = kernel::load::<u32>(table, offsets::FDT_MAX_FDS).unwrap_or(0);
                }
            }
        },
        None => {
            files = kernel::read_or_zero::<u64>(kernel::current(), offsets::TASK_FILES);
            fdt = kernel::read_or_zero::<u64>(files, offsets::FILES_FDT);
            max_fds = kernel::read_or_zero::<u32>(fdt, offsets::FDT_MAX_FDS);
        }
    }
    // No table is without slots.
    if max_fds == 0 {
        return None;
    }
    if fd >= max_fds {
        return Some((files, 0));
    }
    // Not by a plain load: the result is a number to add to.
    let array = kernel::read::<u64>(fdt, offsets::FDT_FD)?;
    Some((files, kernel::read_at::<u64>(array + u64::from(fd) * 8)?))
}

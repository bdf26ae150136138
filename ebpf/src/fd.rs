//! The fd seam: whatever hook sees it, the only fd event is one `FdChange`.
//!
//! Here the hook is `sys_exit`, in one program for all calls of `syscalls::TABLE`. A result alone proves
//! nothing (a seccomp listener may forge it), so a new fd is sent only when its slot holds a file.
#![allow(clippy::needless_pass_by_value, reason = "the attribute macro passes the context by value")]

use aya_ebpf::{helpers::bpf_probe_read_user, macros::btf_tracepoint, programs::BtfTracePointContext};
use bytemuck::Zeroable;
use plumb_common::{
    counts,
    event::{FD_CLOSE_ON_EXEC, FD_CLOSED, FD_OPENED, FD_REPLACED, FdChange, KIND_FD},
    offsets, syscalls,
};

use crate::{
    emit, kernel,
    regs::{self, PtRegs},
};

const F_DUPFD: u64 = 0;
const F_DUPFD_CLOEXEC: u64 = 1030;
const CLOSE_RANGE_CLOEXEC: u64 = 4;
const EBADF: i64 = 9;

/// `void sys_exit(struct pt_regs *regs, long ret)`, since 2.6.32 as a tracepoint. Runs at the end of every
/// syscall of the host while it is attached: the first lines are what everybody pays.
#[btf_tracepoint(function = "sys_exit")]
pub(crate) fn sys_exit(ctx: BtfTracePointContext) -> i32 {
    let regs: *const PtRegs = ctx.arg(0);
    // SAFETY: the tracepoint's first argument.
    let number = unsafe { regs::number(regs) } as usize;
    if number >= syscalls::NUMBERS {
        return 0;
    }
    let candidates = syscalls::BY_NUMBER[number];
    if candidates != u16::MAX {
        followed(regs, ctx.arg(1), candidates);
    }
    0
}

/// A call that is followed natively, through the 32-bit entry, or both.
#[inline(always)]
fn followed(regs: *const PtRegs, ret: i64, candidates: u16) {
    let task = kernel::current();
    let status = kernel::read::<u32>(task, offsets::TASK_THREAD_STATUS).unwrap_or(0);
    let compat = status & regs::TS_COMPAT != 0;
    let how = if compat { candidates >> 8 } else { candidates & 0xff } as usize;
    if how >= syscalls::TABLE.len() {
        return;
    }
    // SAFETY: the tracepoint's first argument.
    let [first, second, third] = unsafe { regs::arguments(regs, compat) };
    let how32 = how as u32;
    match syscalls::SHAPES[how] {
        syscalls::RETURNS if ret >= 0 => added(task, ret as u32, FD_OPENED, how32),
        syscalls::REPLACES if ret >= 0 && first as u32 != second as u32 => {
            added(task, ret as u32, FD_REPLACED, how32);
        }
        syscalls::FCNTL if ret >= 0 && (second == F_DUPFD || second == F_DUPFD_CLOEXEC) => {
            added(task, ret as u32, FD_OPENED, how32);
        }
        syscalls::PAIR if ret == 0 => pair(task, first, how32),
        // Whatever else close reports, the fd is gone.
        syscalls::CLOSES if ret != -EBADF => removed(task, [first as u32; 2], FD_CLOSED, how32),
        syscalls::CLOSES_RANGE if ret == 0 => {
            let change = if third & CLOSE_RANGE_CLOEXEC == 0 { FD_CLOSED } else { FD_CLOSE_ON_EXEC };
            removed(task, [first as u32, second as u32], change, how32);
        }
        _ => {}
    }
}

#[inline(always)]
fn pair(task: u64, address: u64, how: u32) {
    // SAFETY: the helper checks the user address. The process may rewrite the memory: both numbers are
    // verified against the table like any other.
    let Ok([one, two]) = (unsafe { bpf_probe_read_user(address as *const [u32; 2]) }) else {
        return faulted(2);
    };
    added(task, one, FD_OPENED, how);
    added(task, two, FD_OPENED, how);
}

/// Counts events whose fds could not be read, if somebody asked for this process.
#[inline(never)]
fn faulted(events: u32) {
    if emit::by_current(counts::FD, KIND_FD).is_some() {
        for _ in 0..events {
            emit::count(counts::FD, counts::FAULT);
        }
    }
}

#[inline(never)]
fn added(task: u64, fd: u32, change: u32, how: u32) {
    let Some(header) = emit::by_current(counts::FD, KIND_FD) else { return };
    let (files, file) = match slot(task, fd) {
        None => return emit::count(counts::FD, counts::FAULT),
        Some((_, 0)) => return emit::count(counts::FD, counts::FORGED),
        Some(found) => found,
    };
    // Field by field: a literal would stand on the stack twice, which has 512 bytes for all calls.
    let mut event = FdChange::zeroed();
    (event.header, event.files, event.file) = (header, files, file);
    (event.fd, event.fd_last, event.change, event.how) = (fd, fd, change, how);
    if let Some(inode) = kernel::read::<u64>(file, offsets::FILE_INODE) {
        event.mode = u32::from(kernel::read::<u16>(inode, offsets::INODE_MODE).unwrap_or(0));
    }
    let dentry = kernel::read::<u64>(file, offsets::FILE_DENTRY);
    if let Some(name) = dentry.and_then(|dentry| kernel::read::<u64>(dentry, offsets::DENTRY_NAME)) {
        kernel::read_str(name, &mut event.name);
    }
    emit::send(counts::FD, event);
}

#[inline(never)]
fn removed(task: u64, [fd, fd_last]: [u32; 2], change: u32, how: u32) {
    let Some(header) = emit::by_current(counts::FD, KIND_FD) else { return };
    match kernel::read::<u64>(task, offsets::TASK_FILES) {
        None => emit::count(counts::FD, counts::FAULT),
        Some(files) => {
            let mut event = FdChange::zeroed();
            (event.header, event.files) = (header, files);
            (event.fd, event.fd_last, event.change, event.how) = (fd, fd_last, change, how);
            emit::send(counts::FD, event);
        }
    }
}

/// The fd table of a task and the file in one slot of it; file 0 when the slot is empty or beyond the
/// table, `None` when the table could not be read.
#[inline(always)]
fn slot(task: u64, fd: u32) -> Option<(u64, u64)> {
    let files = kernel::read::<u64>(task, offsets::TASK_FILES)?;
    let fdt = kernel::read::<u64>(files, offsets::FILES_FDT)?;
    if fd >= kernel::read::<u32>(fdt, offsets::FDT_MAX_FDS)? {
        return Some((files, 0));
    }
    let array = kernel::read::<u64>(fdt, offsets::FDT_FD)?;
    Some((files, kernel::read_at::<u64>(array + u64::from(fd) * 8)?))
}

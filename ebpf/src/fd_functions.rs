//! The fd seam through the kernel's own functions (fentry and fexit, since 5.5): each fd passes through one
//! of them, whatever made it.
#![allow(clippy::needless_pass_by_value, reason = "the attribute macro passes the context by value")]

use aya_ebpf::{
    macros::{fentry, fexit},
    programs::{FEntryContext, FExitContext},
};
use plumb_common::{
    event::{FD_CLOSED, FD_OPENED, FD_REPLACED, FD_UNKNOWN},
    offsets, syscalls,
};

use crate::{
    fd::{Added, Removed, added, call, header, is_compat, removed},
    kernel, regs, stack,
};

/// Table and call of the running task; `OTHER` for a call that is not followed.
#[inline(always)]
fn caller() -> (u64, u32, u64) {
    let files = kernel::read::<u64>(kernel::current(), offsets::TASK_FILES).unwrap_or(0);
    let compat = is_compat();
    let (number, first) = regs::current_call(compat).unwrap_or((u64::MAX, 0));
    let how = call(number, compat);
    (files, if how < syscalls::TABLE.len() { how as u32 } else { syscalls::OTHER }, first)
}

/// `void fd_install(unsigned int fd, struct file *file)`, fs/file.c. Installs into the caller's own table.
#[fentry(function = "fd_install")]
pub(crate) fn fd_install(ctx: FEntryContext) -> i32 {
    if let Some(header) = header() {
        let (files, how, _) = caller();
        let (fd, file): (u32, *const u8) = (ctx.arg(0), ctx.arg(1));
        stack::take_in_call(&header, fd);
        added(header, &Added { files, file: file as u64, fd, change: FD_OPENED, how, marks: 0 });
    }
    0
}

/// `static int do_dup2(struct files_struct *files, struct file *file, unsigned fd, unsigned flags)`,
/// fs/file.c: dup2, dup3, and a listener's answer into a chosen slot. What was open there has been closed
/// by `filp_close` before this returns.
#[fexit(function = "do_dup2")]
pub(crate) fn do_dup2(ctx: FExitContext) -> i32 {
    let result: i32 = ctx.arg(4);
    if result >= 0
        && let Some(header) = header()
    {
        let (_, how, _) = caller();
        let (files, file, fd): (*const u8, *const u8, u32) = (ctx.arg(0), ctx.arg(1), ctx.arg(2));
        stack::take_in_call(&header, fd);
        added(
            header,
            &Added { files: files as u64, file: file as u64, fd, change: FD_REPLACED, how, marks: 0 },
        );
    }
    0
}

/// `int filp_flush(struct file *filp, fl_owner_t id)`, fs/open.c; before 6.6 `filp_close` of the same form.
/// `id` is the table that the file leaves. The end of a process empties a table that is no longer its own,
/// and is told by its exit.
#[fentry(function = "filp_flush")]
pub(crate) fn filp_flush(ctx: FEntryContext) -> i32 {
    let (file, id): (*const u8, u64) = (ctx.arg(0), ctx.arg(1));
    if id == 0 || kernel::read::<u64>(kernel::current(), offsets::TASK_FILES) != Some(id) {
        return 0;
    }
    if let Some(header) = header() {
        let (files, how, first) = caller();
        let is_close =
            (how as usize) < syscalls::TABLE.len() && syscalls::SHAPES[how as usize] == syscalls::CLOSES;
        let fd = if is_close { first as u32 } else { FD_UNKNOWN };
        removed(
            header,
            &Removed { files, file: file as u64, fd, fd_last: fd, change: FD_CLOSED, how, reused: false },
        );
    }
    0
}

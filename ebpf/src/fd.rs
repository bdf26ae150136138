//! The fd seam: whatever hook sees it, the only fd event is one `FdChange`.
//!
//! Two ways of attaching. `fd_sys_exit` sees the results of syscalls and verifies each against the slot it
//! names: a result alone proves nothing, a seccomp listener may forge it. `fd_functions` sees the kernel's
//! own functions that fill and empty slots: nothing to forge, and other syscalls pay nothing, but not every
//! kernel lets them be attached. Both end in `added` or `removed`.

use plumb_common::{
    counts,
    event::{FD_BAD_CLOSE, FD_CLOSED, FdChange, Header, KIND_FD, MARK_CLOEXEC, MARK_REUSED},
    limits::NAME_LEN,
    offsets, syscalls,
};

use crate::{emit, kernel, maps, regs, stack};

/// Whether the running task came through the 32-bit entry.
#[inline(always)]
pub(crate) fn is_compat() -> bool {
    let status = kernel::of_current::<u32>(offsets::TASK_THREAD_STATUS);
    status & regs::TS_COMPAT != 0
}

/// Index into `syscalls::TABLE`; beyond its end for a call that is not followed.
#[inline(always)]
pub(crate) fn call(number: u64, compat: bool) -> usize {
    if number >= syscalls::NUMBERS as u64 {
        return usize::MAX;
    }
    let candidates = syscalls::BY_NUMBER[number as usize];
    if compat { (candidates >> 8) as usize } else { (candidates & 0xff) as usize }
}

/// The header of an fd event of the running task; `None`, counted, when nobody asked for it.
#[inline(always)]
pub(crate) fn header() -> Option<Header> {
    emit::by_current(counts::FD, KIND_FD)
}

/// A file that has been put into a slot of the running task's table.
pub(crate) struct Added {
    pub files: u64,
    pub file: u64,
    pub fd: u32,
    pub change: u32,
    pub how: u32,
    /// `MARK_SAME_CALL` or 0.
    pub marks: u32,
}

/// Its stack has been taken before.
#[inline(always)]
pub(crate) fn added(header: Header, added: &Added) {
    emit::send_filled::<FdChange>(counts::FD, |event| {
        // SAFETY: the record has been reserved.
        let event = unsafe { begin(event, header) };
        (event.files, event.file) = (added.files, added.file);
        (event.fd, event.fd_last, event.change, event.how) = (added.fd, added.fd, added.change, added.how);
        let goes = maps::tree() && is_closed_on_exec(added.fd);
        event.marks = added.marks | if goes { MARK_CLOEXEC } else { 0 };
        describe(added.file, event);
    });
}

/// Whether an fd of the running task goes at the next exec.
#[inline(always)]
fn is_closed_on_exec(fd: u32) -> bool {
    let fdt = kernel::beyond_current::<u64>(offsets::TASK_FILES, offsets::FILES_FDT);
    let bitmap = kernel::read_or_zero::<u64>(fdt, offsets::FDT_CLOSE_ON_EXEC);
    kernel::read_at_or_zero::<u64>(bitmap + u64::from(fd / 64) * 8) >> (fd % 64) & 1 == 1
}

/// Slots of the running task's table that have been emptied or marked.
pub(crate) struct Removed {
    pub files: u64,
    /// 0 when only the numbers are known.
    pub file: u64,
    pub fd: u32,
    pub fd_last: u32,
    pub change: u32,
    pub how: u32,
    /// `file` is what has been put into the slot since.
    pub reused: bool,
}

#[inline(always)]
pub(crate) fn removed(header: Header, removed: &Removed) {
    match removed.change {
        FD_CLOSED if removed.fd == removed.fd_last => stack::take_of_close(&header, removed.fd),
        FD_BAD_CLOSE => stack::take_of_bad_close(&header, removed.fd),
        _ => {}
    }
    emit::send_filled::<FdChange>(counts::FD, |event| {
        // SAFETY: the record has been reserved.
        let event = unsafe { begin(event, header) };
        (event.files, event.file) = (removed.files, removed.file);
        (event.fd, event.fd_last, event.change, event.how) =
            (removed.fd, removed.fd_last, removed.change, removed.how);
        event.marks = if removed.reused { MARK_REUSED } else { 0 };
        if removed.file != 0 {
            describe(removed.file, event);
        }
    });
}

/// An event of which only the header is known, and that it has no file; the caller fills in the rest.
///
/// # Safety
/// `event` can be written.
#[inline(always)]
unsafe fn begin<'a>(event: *mut FdChange, header: Header) -> &'a mut FdChange {
    // SAFETY: as required. By the word: zeroing the whole record would be a call that goes byte by byte.
    unsafe {
        (&raw mut (*event).header).write(header);
        (&raw mut (*event).mode).write(0);
        let name = (&raw mut (*event).name).cast::<u64>();
        (0..NAME_LEN / 8).for_each(|word| name.add(word).write_volatile(0));
        &mut *event
    }
}

#[inline(always)]
fn describe(file: u64, event: &mut FdChange) {
    if let Some(inode) = kernel::read::<u64>(file, offsets::FILE_INODE) {
        event.mode = u32::from(kernel::read::<u16>(inode, offsets::INODE_MODE).unwrap_or(0));
    }
    let dentry = kernel::read::<u64>(file, offsets::FILE_DENTRY);
    if let Some(name) = dentry.and_then(|dentry| kernel::read::<u64>(dentry, offsets::DENTRY_NAME)) {
        kernel::read_str(name, &mut event.name);
    }
}

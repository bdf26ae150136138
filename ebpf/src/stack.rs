//! User stacks: registers and a copy of what lies above the stack pointer, to be unwound in user space. Walking
//! frame pointers here would name the wrong line: the C library's wrappers keep none.

use aya_ebpf::helpers::generated::{bpf_probe_read_kernel, bpf_probe_read_user};
use plumb_common::{
    counts,
    event::{Header, KIND_STACK, KIND_TABLE, Stack, Watch},
    limits::{
        BAD_CLOSE_STACK_BYTES, CLOSE_STACK_BYTES, FEW_STACKS, STACK_BYTES, STACKS_PER_SECOND,
        TREE_STACK_BYTES,
    },
    offsets,
};

use crate::{
    emit::{self, MOST, WHOLE},
    kernel, maps,
    regs::{self, Place},
};

/// A record with room for so many bytes of stack.
#[repr(C)]
struct Record<const BYTES: usize> {
    head: Stack,
    bytes: [u8; BYTES],
}

/// The parent waits until its child runs another program or ends (linux/sched.h).
const CLONE_VFORK: u64 = 0x4000;

/// Pieces in which a stack is read that ends inside the record.
const PIECES: usize = 16;
const SHALLOW: usize = STACK_BYTES[0];
const DEEP: usize = STACK_BYTES[1];

/// Takes the stack of the running task, if it is asked for. `header` is that of the event to come.
#[inline(always)]
pub(crate) fn take(header: &Header, made: u32) {
    if is_asked(header) {
        copy::<false>(header, made);
    }
}

/// As `take`, where the kernel's own function is followed: outside of a system call it completes something that began
/// elsewhere, such as an accept of io_uring, and what it interrupts is not who made it.
#[inline(always)]
pub(crate) fn take_in_call(header: &Header, made: u32) {
    if !is_asked(header) {
        return;
    }
    if regs::is_in_call() {
        copy::<false>(header, made);
    } else {
        emit::count(counts::STACK, counts::FILTERED);
    }
}

/// As `take`, of whoever made a child, where trees are followed.
#[inline(always)]
pub(crate) fn take_of_fork(header: &Header, child: u32, flags: u64) {
    if flags & CLONE_VFORK == 0 {
        copy::<false>(header, child);
    } else {
        copy::<true>(header, child);
    }
}

#[inline(always)]
fn is_asked(header: &Header) -> bool {
    if !maps::watched_only() {
        return maps::all_stacks();
    }
    if maps::tree() {
        // Nobody else has a header.
        return true;
    }
    let Some(watch) = maps::WATCHED.get_ptr_mut(header.process.tgid) else { return false };
    // SAFETY: a map value; what another CPU writes meanwhile makes the number a little larger.
    let watch = unsafe { &mut *watch };
    watch.stacks != 0
        && watch.start_boottime == header.process.start_boottime
        && is_within_budget(watch, header)
}

#[inline(always)]
fn is_within_budget(watch: &mut Watch, header: &Header) -> bool {
    let second = header.time >> 30;
    if watch.second != second {
        (watch.second, watch.taken) = (second, 0);
    }
    watch.taken += 1;
    let is_granted =
        watch.taken <= FEW_STACKS || (watch.taken <= STACKS_PER_SECOND && emit::has_room_for_stacks());
    if !is_granted {
        emit::count(counts::STACK, counts::QUOTA);
    }
    is_granted
}

/// As `take`, of whoever closes an fd: only the next few callers, and only where trees are followed.
#[inline(always)]
pub(crate) fn take_of_close(header: &Header, closed: u32) {
    if maps::tree() {
        copy_short::<CLOSE_STACK_BYTES>(header, closed);
    }
}

/// As `take_of_close`, where nothing was open.
#[inline(always)]
pub(crate) fn take_of_bad_close(header: &Header, closed: u32) {
    if maps::tree() {
        copy_short::<BAD_CLOSE_STACK_BYTES>(header, closed);
    }
}

#[inline(never)]
fn copy_short<const BYTES: usize>(header: &Header, closed: u32) {
    let Some(place) = regs::place() else {
        return emit::count(counts::STACK, counts::FILTERED);
    };
    emit::send_stack::<Record<BYTES>>(MOST, |to| fill(to, header, &place, closed));
}

/// Sends which fds of the running process are open, as far as the record has room: 131,072 of them.
#[inline(never)]
pub(crate) fn table(header: &Header) {
    let files = kernel::read::<u64>(kernel::current(), offsets::TASK_FILES).unwrap_or(0);
    let fdt = kernel::read::<u64>(files, offsets::FILES_FDT).unwrap_or(0);
    let slots = kernel::read::<u32>(fdt, offsets::FDT_MAX_FDS);
    let bitmap = kernel::read::<u64>(fdt, offsets::FDT_OPEN_FDS);
    let (Some(slots), Some(bitmap)) = (slots, bitmap) else {
        return emit::count(counts::STACK, counts::FAULT);
    };
    if slots as usize <= CLOSE_STACK_BYTES * 8 {
        emit::send_stack::<Record<CLOSE_STACK_BYTES>>(WHOLE, |to| fill_table(to, header, slots, bitmap));
    } else {
        emit::send_stack::<Record<DEEP>>(WHOLE, |to| fill_table(to, header, slots, bitmap));
    }
}

#[inline(always)]
fn fill_table<const BYTES: usize>(to: *mut Record<BYTES>, header: &Header, slots: u32, bitmap: u64) {
    // SAFETY: the record has been reserved, and that many bytes fit into it.
    unsafe {
        let head = &raw mut (*to).head;
        head.write_bytes(0, 1);
        (&raw mut (*head).header).write(*header);
        (&raw mut (*head).header.kind).write(KIND_TABLE);
        (&raw mut (*head).made).write(slots);
        // A table has slots by the 64. Read again, so that the compiler does not conclude the bound from what the caller has
        // compared: the verifier does not.
        let slots = core::ptr::read_volatile(&raw const (*head).made);
        let len = u64::from(slots / 8).min(BYTES as u64);
        let status = bpf_probe_read_kernel((&raw mut (*to).bytes).cast(), len as u32, bitmap as *const _);
        (&raw mut (*head).len).write(if status == 0 { len as u32 } else { 0 });
    }
}

/// Once for each of its two users, so that what it calls has one each and is inlined: a call costs a frame.
#[inline(never)]
fn copy<const IS_VFORK: bool>(header: &Header, made: u32) {
    let Some(place) = regs::place() else {
        return emit::count(counts::STACK, counts::FILTERED);
    };
    let place = if IS_VFORK { regs::behind_vfork(place) } else { place };
    let left = regs::stack_left(place.sp);
    if maps::tree() && left <= TREE_STACK_BYTES[0] as u64 {
        emit::send_stack::<Record<{ TREE_STACK_BYTES[0] }>>(MOST, |to| fill(to, header, &place, made));
    } else if maps::tree() && left <= TREE_STACK_BYTES[1] as u64 {
        emit::send_stack::<Record<{ TREE_STACK_BYTES[1] }>>(MOST, |to| fill(to, header, &place, made));
    } else if left <= SHALLOW as u64 || !is_readable(place.sp + SHALLOW as u64) {
        emit::send_stack::<Record<SHALLOW>>(MOST, |to| fill(to, header, &place, made));
    } else if maps::tree() && left <= TREE_STACK_BYTES[2] as u64 {
        emit::send_stack::<Record<{ TREE_STACK_BYTES[2] }>>(MOST, |to| fill(to, header, &place, made));
    } else {
        emit::send_stack::<Record<DEEP>>(MOST, |to| fill(to, header, &place, made));
    }
}

/// Field by field, into the ring itself: all calls together have 512 bytes of stack.
#[inline(always)]
fn fill<const BYTES: usize>(to: *mut Record<BYTES>, header: &Header, place: &Place, made: u32) {
    // SAFETY: the record has been reserved.
    unsafe {
        let head = &raw mut (*to).head;
        (&raw mut (*head).header).write(*header);
        (&raw mut (*head).header.kind).write(KIND_STACK);
        (&raw mut (*head).ip).write(place.ip);
        (&raw mut (*head).sp).write(place.sp);
        (&raw mut (*head).bp).write(place.bp);
        (&raw mut (*head).made).write(made);
        (&raw mut (*head).len).write(read::<BYTES>(place.sp, (&raw mut (*to).bytes).cast()));
    }
}

/// Reads as much of a stack as there is, and says how much that was.
#[inline(always)]
fn read<const BYTES: usize>(sp: u64, to: *mut u8) -> u32 {
    // SAFETY: the record has room for so many bytes; the helper checks the address.
    if unsafe { bpf_probe_read_user(to.cast(), BYTES as u32, sp as *const _) } == 0 {
        return BYTES as u32;
    }
    let piece = BYTES / PIECES;
    let mut len = 0;
    while len < BYTES {
        // SAFETY: as above, `len` bytes further on.
        let status =
            unsafe { bpf_probe_read_user(to.add(len).cast(), piece as u32, (sp + len as u64) as *const _) };
        if status != 0 {
            break;
        }
        len += piece;
    }
    len as u32
}

/// Whether the eight bytes below an address can be read.
#[inline(always)]
fn is_readable(end: u64) -> bool {
    let mut word = 0u64;
    // SAFETY: the helper checks the address and writes eight bytes.
    unsafe { bpf_probe_read_user((&raw mut word).cast(), 8, (end - 8) as *const _) == 0 }
}

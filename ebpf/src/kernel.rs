//! Reading kernel structs, by offsets that the agent resolved from BTF.
//!
//! Two ways: `load` is a plain load through a pointer whose type the verifier knows (an argument of a
//! BTF tracepoint or iterator, or what was loaded from one): checked at load time, nothing to fail at run
//! time. `read` copies through `bpf_probe_read_kernel` from any address and may fault.

use aya_ebpf::helpers::{
    bpf_probe_read_kernel,
    generated::{bpf_get_current_task, bpf_probe_read_kernel_str},
};
use plumb_common::{offsets, task::ProcKey};

use crate::maps::offset;

/// A pointer to a kernel struct whose type the verifier tracks. Null is possible.
pub(crate) type Typed = *const u8;

/// A field through a typed pointer; `None` when the kernel has no such field.
///
/// # Safety
/// `base` points to the struct that `index` names and is not null.
#[inline(always)]
pub(crate) unsafe fn load<T: Copy>(base: Typed, index: usize) -> Option<T> {
    let at = offset(index)?;
    // SAFETY: the verifier checks the access against the kernel's own type at load time.
    Some(unsafe { core::ptr::read_volatile(base.add(at).cast::<T>()) })
}

/// A pointer field through a typed pointer; `None` also for null.
///
/// # Safety
/// As for `load`.
#[inline(always)]
pub(crate) unsafe fn follow(base: Typed, index: usize) -> Option<Typed> {
    // SAFETY: forwarded.
    let pointer = unsafe { load::<Typed>(base, index) }?;
    if pointer.is_null() { None } else { Some(pointer) }
}

/// A field at any kernel address; `None` when the field is unknown or the read faults.
#[inline(always)]
pub(crate) fn read<T: Copy>(base: u64, index: usize) -> Option<T> {
    read_at(base + offset(index)? as u64)
}

/// A value at any kernel address; `None` when the read faults.
#[inline(always)]
pub(crate) fn read_at<T: Copy>(address: u64) -> Option<T> {
    // SAFETY: the helper checks the address and reports a fault instead of taking one.
    unsafe { bpf_probe_read_kernel(address as *const T) }.ok()
}

/// A NUL-terminated string at a kernel address, cut to the buffer. Left empty on a fault.
#[inline(always)]
pub(crate) fn read_str(address: u64, to: &mut [u8]) {
    // SAFETY: the helper writes at most `to.len()` bytes and always terminates.
    unsafe { bpf_probe_read_kernel_str(to.as_mut_ptr().cast(), to.len() as u32, address as *const _) };
}

/// The address of the running task, to be used with `read`. `bpf_get_current_task_btf`, which would be
/// typed, exists since 5.11 only.
#[inline(always)]
pub(crate) fn current() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_get_current_task() }
}

/// Identity of the process that a typed task belongs to.
///
/// # Safety
/// `task` is a non-null typed pointer to a `task_struct`.
#[inline(always)]
pub(crate) unsafe fn process_of(task: Typed) -> Option<ProcKey> {
    // SAFETY: `task` as required; the leader is never null.
    unsafe {
        let leader = follow(task, offsets::TASK_GROUP_LEADER)?;
        Some(ProcKey::new(load(task, offsets::TASK_TGID)?, load(leader, offsets::TASK_START_BOOTTIME)?))
    }
}

//! Reading kernel structs, by offsets that the agent resolved from BTF.
//!
//! Two ways: `load` is a plain load through a pointer whose type the verifier knows (an argument of a
//! BTF tracepoint or iterator, or what was loaded from one): checked at load time, nothing to fail at run
//! time. `read` copies through `bpf_probe_read_kernel` from any address and may fault.

use core::mem::MaybeUninit;

use aya_ebpf::helpers::{
    bpf_probe_read_kernel,
    generated::{
        bpf_get_current_comm, bpf_get_current_task, bpf_get_current_task_btf,
        bpf_probe_read_kernel as probe_read_kernel, bpf_probe_read_kernel_str,
    },
};
use bytemuck::Zeroable;
use plumb_common::{limits::COMM_LEN, offsets, task::ProcKey};

use crate::maps::{self, offset};

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

/// The address of the running task, to be used with `read`.
#[inline(always)]
pub(crate) fn current() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_get_current_task() }
}

/// As `read`; 0 when the field is unknown or the read faults.
///
/// For what is read in one of two ways: where these meet again the compiler may copy the value of a `None`, which nobody
/// has written, and the verifier refuses that.
#[inline(always)]
pub(crate) fn read_or_zero<T: Zeroable>(base: u64, index: usize) -> T {
    offset(index).map_or_else(T::zeroed, |at| read_at_or_zero(base + at as u64))
}

/// As `read_at`; 0 when the read faults.
#[inline(always)]
pub(crate) fn read_at_or_zero<T: Zeroable>(address: u64) -> T {
    let mut value = MaybeUninit::<T>::uninit();
    // SAFETY: the helper writes all of it: zeros where it cannot read.
    unsafe {
        probe_read_kernel(value.as_mut_ptr().cast(), size_of::<T>() as u32, address as *const _);
        value.assume_init()
    }
}

/// The running task, where trees are followed and the kernel gives it with its type: `bpf_get_current_task_btf`
/// exists since 5.11, and plumb asks for a helper that came with 5.15. A call of a helper takes as long as ten loads.
#[inline(always)]
pub(crate) fn typed_current() -> Option<Typed> {
    if maps::tree() && maps::has_task_pt_regs() {
        // SAFETY: the helper has no preconditions; the running task is never null.
        return Some(unsafe { bpf_get_current_task_btf() } as Typed);
    }
    None
}

/// A field of the running task; 0 when it is unknown.
#[inline(always)]
pub(crate) fn of_current<T: Copy + Zeroable>(index: usize) -> T {
    match typed_current() {
        // SAFETY: a typed task.
        Some(task) => unsafe { load(task, index) }.unwrap_or(T::zeroed()),
        None => read_or_zero(current(), index),
    }
}

/// A field of what a field of the running task points to; 0 when there is none.
#[inline(always)]
pub(crate) fn beyond_current<T: Copy + Zeroable>(pointer: usize, index: usize) -> T {
    match typed_current() {
        Some(task) => {
            // SAFETY: a typed task, and what it points to.
            let found = unsafe { follow(task, pointer).and_then(|base| load(base, index)) };
            found.unwrap_or(T::zeroed())
        }
        None => read_or_zero(read_or_zero(current(), pointer), index),
    }
}

/// The name of the running thread. The helper fails for no running task.
#[inline(always)]
pub(crate) fn current_comm() -> [u8; COMM_LEN] {
    let mut comm = MaybeUninit::<[u8; COMM_LEN]>::uninit();
    // SAFETY: the helper writes all of it, whatever it returns.
    unsafe {
        bpf_get_current_comm(comm.as_mut_ptr().cast(), COMM_LEN as u32);
        comm.assume_init()
    }
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

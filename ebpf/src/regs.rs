//! x86_64: the only file that knows registers. At syscall exit `orig_ax` still holds the number and the
//! argument registers are untouched (only rcx and r11 are clobbered, by the instruction itself).

use aya_ebpf::helpers::generated::{bpf_get_current_task_btf, bpf_task_pt_regs};
use plumb_common::offsets;

use crate::{kernel, maps};

/// `struct pt_regs`, arch/x86/include/asm/ptrace.h; the order is user ABI.
#[repr(C)]
pub(crate) struct PtRegs {
    r15: u64,
    r14: u64,
    r13: u64,
    r12: u64,
    bp: u64,
    bx: u64,
    r11: u64,
    r10: u64,
    r9: u64,
    r8: u64,
    ax: u64,
    cx: u64,
    dx: u64,
    si: u64,
    di: u64,
    orig_ax: u64,
}

/// `TS_COMPAT` in `thread_info.status`: the task is inside a syscall through the 32-bit entry.
pub(crate) const TS_COMPAT: u32 = 0x2;

/// Size of a kernel stack, `THREAD_SIZE` of arch/x86 without KASAN.
const STACK_SIZE: u64 = 16 << 10;

/// Number of the syscall that is ending.
///
/// # Safety
/// `regs` is the typed argument of `sys_exit`.
#[inline(always)]
pub(crate) unsafe fn number(regs: *const PtRegs) -> u64 {
    // SAFETY: as required.
    unsafe { core::ptr::read_volatile(&raw const (*regs).orig_ax) }
}

/// The first four arguments of the syscall that is ending.
///
/// # Safety
/// `regs` is the typed argument of `sys_exit`.
#[inline(always)]
pub(crate) unsafe fn arguments(regs: *const PtRegs, compat: bool) -> [u64; 4] {
    // SAFETY: as required.
    unsafe {
        if compat {
            let low = |p: *const u64| core::ptr::read_volatile(p) & 0xffff_ffff;
            [
                low(&raw const (*regs).bx),
                low(&raw const (*regs).cx),
                low(&raw const (*regs).dx),
                low(&raw const (*regs).si),
            ]
        } else {
            let whole = |p: *const u64| core::ptr::read_volatile(p);
            [
                whole(&raw const (*regs).di),
                whole(&raw const (*regs).si),
                whole(&raw const (*regs).dx),
                whole(&raw const (*regs).r10),
            ]
        }
    }
}

/// Number and first argument of the syscall that the running task is in, from inside the kernel. A kernel
/// thread is in none; whatever its stack says there is found in no table.
#[inline(always)]
pub(crate) fn current_call(task: u64, compat: bool) -> Option<(u64, u64)> {
    let regs = if maps::has_task_pt_regs() {
        // SAFETY: the running task has registers; the result is only read through a helper.
        unsafe { bpf_task_pt_regs(bpf_get_current_task_btf()) as u64 }
    } else {
        kernel::read::<u64>(task, offsets::TASK_STACK)? + STACK_SIZE - FRAME_SIZE
    };
    let field = |offset: usize| kernel::read_at::<u64>(regs + offset as u64);
    let first = if compat { core::mem::offset_of!(PtRegs, bx) } else { core::mem::offset_of!(PtRegs, di) };
    Some((field(core::mem::offset_of!(PtRegs, orig_ax))?, field(first)?))
}

/// Size of the whole `struct pt_regs`: behind `orig_ax` follow ip, cs, flags, sp, ss.
const FRAME_SIZE: u64 = size_of::<PtRegs>() as u64 + 5 * 8;

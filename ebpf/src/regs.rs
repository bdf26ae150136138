//! x86_64: the only file that knows registers. At syscall exit `orig_ax` still holds the number and the
//! argument registers are untouched (only rcx and r11 are clobbered, by the instruction itself).

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

/// Number of the syscall.
///
/// # Safety
/// `regs` is the typed argument of `sys_exit`.
#[inline(always)]
pub(crate) unsafe fn number(regs: *const PtRegs) -> u64 {
    // SAFETY: as required.
    unsafe { core::ptr::read_volatile(&raw const (*regs).orig_ax) }
}

/// The first three arguments.
///
/// # Safety
/// `regs` is the typed argument of `sys_exit`.
#[inline(always)]
pub(crate) unsafe fn arguments(regs: *const PtRegs, compat: bool) -> [u64; 3] {
    // SAFETY: as required.
    unsafe {
        if compat {
            let low = |p: *const u64| core::ptr::read_volatile(p) & 0xffff_ffff;
            [low(&raw const (*regs).bx), low(&raw const (*regs).cx), low(&raw const (*regs).dx)]
        } else {
            let whole = |p: *const u64| core::ptr::read_volatile(p);
            [whole(&raw const (*regs).di), whole(&raw const (*regs).si), whole(&raw const (*regs).dx)]
        }
    }
}

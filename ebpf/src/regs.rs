//! x86_64: the only file that knows registers. At syscall exit `orig_ax` still holds the number and the
//! argument registers are untouched (only rcx and r11 are clobbered, by the instruction itself).

use aya_ebpf::helpers::{
    bpf_probe_read_user,
    generated::{bpf_get_current_task_btf, bpf_task_pt_regs},
};
use plumb_common::offsets;

use crate::{
    kernel::{self, Typed},
    maps,
};

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
    ip: u64,
    cs: u64,
    flags: u64,
    sp: u64,
    ss: u64,
}

/// `__USER_CS`, arch/x86/include/asm/segment.h: 64-bit user code.
const USER_CS: u64 = 0x33;

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
pub(crate) fn current_call(compat: bool) -> Option<(u64, u64)> {
    let regs = user_registers();
    let field = |offset: usize| kernel::read_at::<u64>(regs + offset as u64);
    let first = if compat { core::mem::offset_of!(PtRegs, bx) } else { core::mem::offset_of!(PtRegs, di) };
    Some((field(core::mem::offset_of!(PtRegs, orig_ax))?, field(first)?))
}

/// Address of the registers that the running task entered the kernel with; where nothing can be read if there are none.
#[inline(always)]
fn user_registers() -> u64 {
    if maps::has_task_pt_regs() {
        // SAFETY: the running task has registers; the result is only read through a helper.
        return unsafe { bpf_task_pt_regs(bpf_get_current_task_btf()) as u64 };
    }
    let stack = kernel::read_or_zero::<u64>(kernel::current(), offsets::TASK_STACK);
    stack + STACK_SIZE - size_of::<PtRegs>() as u64
}

/// `__NR_exit_group`.
const EXIT_GROUP: u64 = 231;

/// Whether the running task is in exit_group(2), through the 64-bit entry.
#[inline(always)]
pub(crate) fn is_exiting_group() -> bool {
    matches!(current_call(false), Some((EXIT_GROUP, _)))
}

/// Where a thread is in user space.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub ip: u64,
    pub sp: u64,
    pub bp: u64,
}

/// What the entry of a system call puts where its result will be, until it has one.
const ENOSYS: i64 = 38;

/// Whether the running task is inside a system call: neither in what is done on the way back to user space, nor in an
/// interrupt, nor a thread that never was in user space.
#[inline(always)]
pub(crate) fn is_in_call() -> bool {
    let ax = match kernel::typed_current() {
        // SAFETY: the running task has registers, and the verifier knows their type.
        Some(task) => unsafe {
            let regs = bpf_task_pt_regs(task.cast_mut().cast()) as *const PtRegs;
            core::ptr::read_volatile(&raw const (*regs).ax)
        },
        None => kernel::read_at_or_zero(user_registers() + core::mem::offset_of!(PtRegs, ax) as u64),
    };
    ax as i64 == -ENOSYS
}

/// Where the running task entered the kernel; `None` for one that did not come from 64-bit user space. A worker of io_uring
/// has the segment of its maker, and no instruction.
#[inline(always)]
pub(crate) fn place() -> Option<Place> {
    let (cs, place) = match kernel::typed_current() {
        // SAFETY: the running task has registers, and the verifier knows their type.
        Some(task) => unsafe {
            let regs = bpf_task_pt_regs(task.cast_mut().cast()) as *const PtRegs;
            let field = |field: *const u64| core::ptr::read_volatile(field);
            let (ip, sp, bp) = (&raw const (*regs).ip, &raw const (*regs).sp, &raw const (*regs).bp);
            (field(&raw const (*regs).cs), Place { ip: field(ip), sp: field(sp), bp: field(bp) })
        },
        None => {
            let regs = user_registers();
            // In one piece: ip, cs, flags, sp.
            let at = regs + core::mem::offset_of!(PtRegs, ip) as u64;
            let [ip, cs, _, sp] = kernel::read_at_or_zero::<[u64; 4]>(at);
            let bp = kernel::read_at_or_zero(regs + core::mem::offset_of!(PtRegs, bp) as u64);
            (cs, Place { ip, sp, bp })
        }
    };
    if cs == USER_CS && place.ip != 0 { Some(place) } else { None }
}

/// `__NR_vfork`, and the instructions behind the syscall in the C library's vfork: child and parent share a stack, so it
/// keeps its return address in a register, and then pushes it again. `push %rdi` in glibc, `push %rdx` in musl.
const VFORK: u64 = 58;
const PUSH_DI: u8 = 0x57;
const PUSH_DX: u8 = 0x52;

/// Where vfork(2) was called from, if the running task is in it; else the place itself.
#[inline(always)]
pub(crate) fn behind_vfork(mut place: Place) -> Place {
    let regs = user_registers();
    let field = |offset: usize| kernel::read_at_or_zero::<u64>(regs + offset as u64);
    if field(core::mem::offset_of!(PtRegs, orig_ax)) == VFORK {
        // SAFETY: the helper checks the user address.
        match unsafe { bpf_probe_read_user(place.ip as *const u8) } {
            Ok(PUSH_DI) => place.ip = field(core::mem::offset_of!(PtRegs, di)),
            Ok(PUSH_DX) => place.ip = field(core::mem::offset_of!(PtRegs, dx)),
            _ => {}
        }
    }
    place
}

/// Bytes of the running task's stack from `sp` up, as far as that is known; else `u64::MAX`. The first thread's ends where
/// the kernel put the arguments. The C library puts the control block of any other, to which fs points, at the
/// upper end of its stack. What lies elsewhere, such as a stack of Go, lies far below either, or so near that less than a
/// shallow copy reaches up to it.
#[inline(always)]
pub(crate) fn stack_left(sp: u64) -> u64 {
    let start = kernel::beyond_current::<u64>(offsets::TASK_MM, offsets::MM_START_STACK);
    let base = kernel::of_current::<u64>(offsets::TASK_FSBASE);
    let left = |end: u64| if end > sp { end - sp } else { u64::MAX };
    left(start).min(left(base))
}

/// Where a task that is not running entered the kernel.
///
/// # Safety
/// `task` is a non-null typed pointer to a `task_struct`.
#[inline(always)]
pub(crate) unsafe fn place_of(task: Typed) -> Option<Place> {
    if maps::has_task_pt_regs() {
        // SAFETY: as required; the result is only read through a helper.
        return place_in(unsafe { bpf_task_pt_regs(task.cast_mut().cast()) as u64 });
    }
    // SAFETY: as required.
    let stack = unsafe { kernel::load::<u64>(task, offsets::TASK_STACK)? };
    place_in(stack + STACK_SIZE - size_of::<PtRegs>() as u64)
}

#[inline(always)]
fn place_in(regs: u64) -> Option<Place> {
    let field = |offset: usize| kernel::read_at::<u64>(regs + offset as u64);
    if field(core::mem::offset_of!(PtRegs, cs))? != USER_CS {
        return None;
    }
    Some(Place {
        ip: field(core::mem::offset_of!(PtRegs, ip))?,
        sp: field(core::mem::offset_of!(PtRegs, sp))?,
        bp: field(core::mem::offset_of!(PtRegs, bp))?,
    })
}

//! System calls without libc between: several tasks share one errno here, and a child of clone knows of no
//! thread but itself.

use std::{
    arch::{asm, naked_asm},
    sync::atomic::AtomicU32,
};

/// Makes a system call; an error is a negative number.
///
/// # Safety
/// As for the call itself.
pub(crate) unsafe fn call(number: i64, arguments: [usize; 6]) -> i32 {
    let result: i64;
    // SAFETY: the instruction clobbers nothing else.
    unsafe {
        asm!(
            "syscall",
            inout("rax") number => result,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            in("r8") arguments[4],
            in("r9") arguments[5],
            out("rcx") _,
            out("r11") _,
        );
    }
    result as i32
}

/// Makes a system call whose arguments are numbers.
pub(crate) fn plain(number: i64, arguments: [u32; 3]) -> i32 {
    let [a, b, c] = arguments.map(|argument| argument as usize);
    // SAFETY: the caller passes no pointer.
    unsafe { call(number, [a, b, c, 0, 0, 0]) }
}

/// Sleeps while `word` is `value`, a second at most where `bounded`.
pub(crate) fn wait(word: &AtomicU32, value: u32, bounded: bool) {
    let second = libc::timespec { tv_sec: 1, tv_nsec: 0 };
    let timeout = if bounded { &raw const second as usize } else { 0 };
    // SAFETY: the pointers are to a live word and a live timespec.
    unsafe {
        call(
            libc::SYS_futex,
            [word.as_ptr() as usize, libc::FUTEX_WAIT as usize, value as usize, timeout, 0, 0],
        );
    }
}

/// Wakes everybody who sleeps on `word`.
pub(crate) fn wake(word: &AtomicU32) {
    let all = i32::MAX as usize;
    // SAFETY: the pointer is to a live word.
    unsafe { call(libc::SYS_futex, [word.as_ptr() as usize, libc::FUTEX_WAKE as usize, all, 0, 0, 0]) };
}

/// Starts a task on a stack of its own that runs `entry(index)`; returns its id. `tid` holds the id while
/// it lives and is 0 afterwards.
///
/// # Safety
/// `stack` is the aligned end of memory that nobody uses while `tid` is not 0.
pub(crate) unsafe fn start(
    flags: u32,
    stack: usize,
    tid: &AtomicU32,
    entry: extern "C" fn(usize) -> !,
    index: usize,
) -> i32 {
    // SAFETY: as required of the caller.
    unsafe { clone_onto(flags as usize, stack, tid.as_ptr() as usize, entry, index) as i32 }
}

/// In the order of the C calling convention: rdi, rsi, rdx, rcx, r8. The child finds the last two in the
/// registers that the system call preserves.
#[unsafe(naked)]
unsafe extern "C" fn clone_onto(
    flags: usize,
    stack: usize,
    tid: usize,
    entry: extern "C" fn(usize) -> !,
    index: usize,
) -> i64 {
    naked_asm!(
        "mov r9, rcx",
        "mov r10, rdx",
        "mov eax, 56",
        "syscall",
        "test rax, rax",
        "jz 2f",
        "ret",
        "2:",
        "xor ebp, ebp",
        "mov rdi, r8",
        "call r9",
        "ud2",
    )
}

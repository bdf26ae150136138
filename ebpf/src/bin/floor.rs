//! Programs that do nothing, for the benchmark: what an attached program costs before its first line.
//! An object of its own, no part of the agent's.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![allow(clippy::needless_pass_by_value, reason = "the attribute macro passes the context by value")]

use aya_ebpf::{macros::btf_tracepoint, programs::BtfTracePointContext};

#[btf_tracepoint(function = "sys_exit")]
fn sys_exit(_: BtfTracePointContext) -> i32 {
    0
}

#[btf_tracepoint(function = "task_newtask")]
fn task_newtask(_: BtfTracePointContext) -> i32 {
    0
}

#[btf_tracepoint(function = "sched_process_exec")]
fn sched_process_exec(_: BtfTracePointContext) -> i32 {
    0
}

#[btf_tracepoint(function = "task_rename")]
fn task_rename(_: BtfTracePointContext) -> i32 {
    0
}

#[btf_tracepoint(function = "sched_process_exit")]
fn sched_process_exit(_: BtfTracePointContext) -> i32 {
    0
}

/// Lets the workspace be checked for the host.
#[cfg(not(target_arch = "bpf"))]
fn main() {}

/// Unreachable: nothing here panics.
#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

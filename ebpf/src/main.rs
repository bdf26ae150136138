//! plumb's kernel programs. They count, verify and hand on; what a number means is decided in the agent.
//!
//! `task` follows clone, exec, rename and exit; `fd` turns every hook into one `FdChange`; `iter` answers "what
//! is there now". `stack` copies the user's stack beside them. `signals` and `sockets` tell what becomes of services that are drained. `emit` is the only writer of the rings, `kernel` the only reader of kernel structs.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(core_intrinsics), allow(internal_features))]

mod emit;
mod fd;
mod fd_functions;
mod fd_sys_exit;
mod iter;
mod kernel;
mod maps;
mod regs;
mod signals;
mod sockets;
mod stack;
mod task;

/// Lets the workspace be checked for the host, where this crate has no use.
#[cfg(not(target_arch = "bpf"))]
fn main() {}

/// Unreachable: the verifier refuses a program that could get here.
#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel lends `bpf_probe_read_kernel` and others to GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

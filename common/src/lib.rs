//! The boundary between plumb's kernel programs and its agent.
//!
//! Everything here is read by both sides: records are `repr(C)` with explicit-width integers, no
//! `bool`, no `Option`, no enum and no padding (`bytemuck::Pod` proves it at compile time), and kinds
//! are `u32` constants, because a byte from the kernel must never become an invalid Rust value.
#![no_std]

pub mod counts;
pub mod event;
pub mod file;
pub mod limits;
pub mod offsets;
pub mod sockets;
pub mod syscalls;
pub mod task;

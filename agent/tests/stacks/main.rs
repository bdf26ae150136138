//! Stacks of real programs, taken at their syscalls, must name the line that made the call. What is expected comes
//! from marks in the sources of the programs, never from what an unwinder said.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod cost;
mod golang;
mod hostile;
mod images;
mod memory;
mod native;
mod processes;
mod sampler;
mod sources;
#[path = "../support/mod.rs"]
mod support;
mod watched;

//! What must hold on every kernel: run as root on the host's, and in virtual machines on others. Needs
//! nothing but the plumb binary and the examples.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "../support/mod.rs"]
mod support;
#[path = "../support/variants.rs"]
mod variants;

mod agent;
mod check;
mod follow;
mod isolation;
mod ledger;
mod mappings;
mod model;
mod origins;
mod paths;
mod snapshot;
mod sockets;
mod stacks;
mod uring;
mod watch;

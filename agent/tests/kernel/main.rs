//! What must hold on every kernel: run as root on the host's, and in virtual machines on others. Needs
//! nothing but the plumb binary and the `workload` example.

#[path = "../support/mod.rs"]
mod support;

mod agent;
mod snapshot;
mod watch;

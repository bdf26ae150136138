//! What readers see: the host at one moment.

use std::sync::Arc;

use plumb_common::counts::{self, Counts};

use crate::{
    admission::Untracked,
    detect::Finding,
    follow::Following,
    kernel::{Ledger, Status},
    origins::FdDrift,
    stacks::Losses,
    table::{Drift, Row},
};

/// The host at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct HostView {
    /// Passes so far; 0 before the first.
    pub passes: u64,
    /// When the last pass ended, nanoseconds since boot.
    pub time: u64,
    /// How long it took, nanoseconds.
    pub pass_nanos: u64,
    pub rows: Vec<Row>,
    pub findings: Vec<Finding>,
    pub drift: Drift,
    /// The kernel's ledger, by `counts::index`.
    pub counts: Counts,
    /// What became of the events that were sent.
    pub ledger: Ledger,
    pub stack_ledger: Ledger,
    pub stack_losses: Losses,
    /// How often a program was not run.
    pub not_run: u64,
    /// Passes that failed.
    pub failed: u64,
    pub following: Following,
    /// What is not followed one by one.
    pub untracked: Untracked,
    /// What listings of watched processes found that no event told of.
    pub fd_drift: FdDrift,
    /// Origins of fds held now.
    pub origins: usize,
    /// Suspects that wait for a place among the watched.
    pub watch_waiting: usize,
    /// Listeners, and events that they missed because they did not keep up.
    pub subscribers: (usize, u64),
    /// Events lost between the last two passes.
    pub lost_lately: u64,
    /// Each kernel program with its verdict.
    pub programs: Arc<[Status]>,
}

impl HostView {
    /// Events lost so far, whatever the cause.
    #[must_use]
    pub(crate) fn lost(&self) -> u64 {
        lost(&self.counts) + self.ledger.rejected + self.not_run
    }
}

/// Sum of the outcomes that are losses.
#[must_use]
pub(crate) fn lost(counts: &Counts) -> u64 {
    counts::LOSSES.map(|outcome| counts.of_outcome(outcome)).iter().sum()
}

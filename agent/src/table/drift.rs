//! How far the events had drifted from the passes. Events may come after the pass that shows their effect, so
//! a difference is counted only at the next pass, when none of the late events has explained it.

use plumb_common::task::TaskRecord;

use super::{Entry, Table};

/// A record is sure to contain, or not to contain, only events this far away from it, in nanoseconds: a
/// thread is counted by the kernel a moment before its clone event and until a moment after its exit event.
const SETTLED: u64 = 50_000_000;

/// How far the events had drifted from the passes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Drift {
    /// Processes that a pass found and no clone event told of.
    pub clones_missed: u64,
    /// Processes that were gone without an exit event.
    pub exits_missed: u64,
    /// Sum of differences of thread counts.
    pub threads: u64,
}

impl Drift {
    /// By cause, as exported.
    #[must_use]
    pub(crate) fn by_cause(&self) -> [(&'static str, u64); 3] {
        [("clone_missed", self.clones_missed), ("exit_missed", self.exits_missed), ("threads", self.threads)]
    }
}

/// What the events still owe for one process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owed {
    /// Its clone event.
    pub clone: bool,
    /// Threads started less threads ended; `None` when that cannot be told.
    pub threads: Option<i64>,
    /// Whether it is sure which events the row contains.
    pub exact: bool,
}

impl Owed {
    /// Of a process that its clone event told of.
    pub(super) const NOTHING: Self = Self { clone: false, threads: None, exact: true };
    /// Of a process that a record told of.
    pub(super) const CLONE: Self = Self { clone: true, ..Self::NOTHING };
    /// Of a process that the first pass told of: what happened just before it is not known.
    pub(super) const UNKNOWN: Self = Self { exact: false, ..Self::NOTHING };
}

impl Entry {
    /// Takes an event at `time` that changed the number of threads. Whether the row did not contain it yet.
    pub(super) fn advance(&mut self, time: u64, change: i32) -> bool {
        self.moved = self.moved.max(time);
        let later = time > self.adopted;
        if time.abs_diff(self.adopted) <= SETTLED {
            (self.owed.threads, self.owed.exact) = (None, false);
        }
        if later {
            self.row.threads = self.row.threads.saturating_add_signed(change);
        } else if let Some(threads) = &mut self.owed.threads {
            *threads -= i64::from(change);
        }
        later
    }

    /// What the events owe once `record` is adopted.
    pub(super) fn owed_for(&self, record: &TaskRecord) -> Owed {
        let exact = record.time.saturating_sub(self.moved) > SETTLED;
        let comparable = exact && self.owed.exact;
        let difference = i64::from(record.threads) - i64::from(self.row.threads);
        Owed { threads: comparable.then_some(difference), exact, ..self.owed }
    }
}

impl Table {
    /// Counts what no event has explained since the last pass.
    pub(super) fn count_drift(&mut self) {
        for entry in self.entries.values_mut() {
            if entry.owed.clone {
                // Whatever became of its threads was lost with it.
                self.drift.clones_missed += 1;
            } else if let Some(threads) = entry.owed.threads
                && !entry.row.exited
            {
                // Threads that end with their process may all say that it is dead: they are not followed.
                self.drift.threads += threads.unsigned_abs();
            }
            (entry.owed.clone, entry.owed.threads) = (false, None);
        }
        self.drift.exits_missed += self.gone.drain().count() as u64;
    }
}

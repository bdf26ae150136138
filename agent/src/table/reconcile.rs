//! Events meet the truth: a pass is merged record by record, each at its own time, and what the events
//! had got wrong is counted by cause.
//!
//! A pass is not one instant. Each record holds at its own time stamp, so it is merged just before the
//! first event of its process that is later than it.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use plumb_common::task::{FLAG_STAND_IN, ProcKey, TaskRecord};

use super::Table;
use crate::{decode::Event, procfs::ProcStatic};

/// Thread counts are compared only for a process whose events lie this far away, in nanoseconds: a
/// thread is counted by the kernel a moment before its clone event and until a moment after its exit event.
const SETTLED: u64 = 50_000_000;

/// One pass of the iterator over all processes, with the events around it.
#[derive(Debug, Default)]
pub(crate) struct Pass {
    /// When it began, nanoseconds since boot.
    pub began: u64,
    /// Events consumed before it began.
    pub before: Vec<Event>,
    /// One record per process, with the words that describe it.
    pub records: Vec<(TaskRecord, Arc<ProcStatic>)>,
    /// Events consumed since: some older, some younger than a given record.
    pub after: Vec<Event>,
}

/// How far the events had drifted from a pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Drift {
    /// Processes that a pass found and no clone event had told of.
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

impl Table {
    /// Merges a pass. The first one seeds the table; from the second on differences are drift.
    pub(crate) fn reconcile(&mut self, pass: &Pass) {
        pass.before.iter().for_each(|event| self.apply(event));
        let mut unmerged = one_per_process(&pass.records);
        let announced: HashMap<ProcKey, u64> = pass
            .after
            .iter()
            .filter_map(|event| match event {
                Event::Clone(event) => Some((event.child, event.header.time)),
                _ => None,
            })
            .collect();
        let mut found: HashSet<ProcKey> = HashSet::with_capacity(unmerged.len());
        for event in &pass.after {
            for key in subjects(event) {
                if let Some((record, info)) = unmerged.get(&key)
                    && record.time < event.header().time
                {
                    self.merge(record, info, &announced);
                    found.insert(key);
                    unmerged.remove(&key);
                }
            }
            self.apply(event);
        }
        for (key, (record, info)) in unmerged {
            self.merge(record, info, &announced);
            found.insert(key);
        }
        let seeded = std::mem::replace(&mut self.seeded, true);
        let drift = &mut self.drift;
        self.entries.retain(|key, entry| {
            // A process announced since the pass began may have been attached behind the iterator. Its start
            // says nothing of that: the kernel takes the time well before it attaches the process.
            if found.contains(key) || announced.get(key).is_some_and(|time| *time >= pass.began) {
                return true;
            }
            drift.exits_missed += u64::from(seeded && !entry.row.exited);
            false
        });
    }

    fn merge(&mut self, record: &TaskRecord, info: &Arc<ProcStatic>, announced: &HashMap<ProcKey, u64>) {
        if self.seeded {
            match self.entries.get(&record.key) {
                // The clone event of a young process may still be on its way.
                None if record.time.saturating_sub(record.key.start_boottime) <= SETTLED => {}
                None if !announced.contains_key(&record.key) => self.drift.clones_missed += 1,
                Some(entry) if settled(entry.moved, record) => {
                    self.drift.threads += u64::from(entry.row.threads.abs_diff(record.threads));
                }
                _ => {}
            }
        }
        self.adopt(record, info);
    }
}

/// Whether the last event of a process is far enough away to compare its thread count.
fn settled(moved: u64, record: &TaskRecord) -> bool {
    record.exit_state == 0 && record.time.saturating_sub(moved) > SETTLED
}

/// One record per process with the leader's words: the leader's record or, once that has exited and has no
/// fds any more, the last of those that stand in for it.
fn one_per_process(
    records: &[(TaskRecord, Arc<ProcStatic>)],
) -> HashMap<ProcKey, (&TaskRecord, &Arc<ProcStatic>)> {
    let mut by_key: HashMap<ProcKey, (&TaskRecord, &Arc<ProcStatic>)> = HashMap::with_capacity(records.len());
    for (record, info) in records {
        let (kept, words) = by_key.entry(record.key).or_insert((record, info));
        if record.files != 0 || kept.files == 0 {
            *kept = record;
        }
        // Records come in the order of thread ids, which start over: the leader need not be the first.
        if record.flags & FLAG_STAND_IN == 0 {
            *words = info;
        }
    }
    by_key
}

/// The processes whose row an event changes.
fn subjects(event: &Event) -> impl Iterator<Item = ProcKey> {
    let subject = match event {
        Event::Clone(event) => Some(event.child),
        Event::Exit(event) => Some(event.header.process),
        Event::Exec(event) => Some(event.header.process),
        Event::Rename(_) | Event::Fd(_) => None,
    };
    subject.into_iter()
}

#[cfg(test)]
#[path = "reconcile_tests.rs"]
mod tests;

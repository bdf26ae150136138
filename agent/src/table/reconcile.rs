//! Events meet the truth: a pass is merged record by record, each at its own time, and what the events
//! had got wrong is noted.
//!
//! A pass is not one instant. Each record holds at its own time stamp, so it is merged just before the
//! first event of its process that is later than it.

use std::sync::Arc;

use foldhash::{HashMap, HashSet};
use plumb_common::task::{ProcKey, TaskRecord};

use super::Table;
use crate::{admission::Untracked, decode::Event, origins::Listing, procfs::ProcStatic};

/// One pass of the iterator over all processes, with the events of its time. Those from before it have been
/// applied.
#[derive(Debug, Default)]
pub(crate) struct Pass {
    /// When it began and ended, nanoseconds since boot.
    pub began: u64,
    pub ended: u64,
    /// One record per process, with the words that describe it.
    pub records: Vec<(TaskRecord, Arc<ProcStatic>)>,
    /// Events consumed since: some older, some younger than a given record.
    pub after: Arc<Vec<Event>>,
    /// What the records do not contain.
    pub untracked: Untracked,
    /// The fds of watched processes.
    pub listings: Vec<(ProcKey, Listing)>,
}

impl Table {
    /// Merges a pass. The first one seeds the table; from the second on differences are drift.
    pub(crate) fn reconcile(&mut self, pass: &Pass) {
        self.count_drift();
        self.passes += 1;
        let named: HashSet<ProcKey> = pass.after.iter().flat_map(subjects).collect();
        // Of the others no event tells when they have to be merged; most of the time that is all of them.
        let mut unmerged: HashMap<ProcKey, _> = HashMap::default();
        if !named.is_empty() {
            let records = pass.records.iter().filter(|(record, _)| named.contains(&record.key));
            unmerged.extend(records.map(|(record, info)| (record.key, (record, info))));
        }
        let mut announced: HashSet<ProcKey> = HashSet::default();
        let mut merged: HashSet<ProcKey> = HashSet::default();
        for event in pass.after.iter() {
            for key in subjects(event) {
                if let Some((record, info)) = unmerged.get(&key)
                    && record.time < event.header().time
                {
                    self.adopt(record, info);
                    unmerged.remove(&key);
                    merged.insert(key);
                }
            }
            self.apply(event);
            // A process announced since the pass began may have been attached behind the iterator. Its start
            // says nothing of that: the kernel takes the time well before it attaches the process.
            if let Event::Clone(event) = event
                && event.header.time >= pass.began
            {
                announced.insert(event.child);
            }
        }
        for (record, info) in &pass.records {
            if merged.is_empty() || !merged.contains(&record.key) {
                self.adopt(record, info);
            }
        }
        self.is_full = pass.untracked.processes > 0;
        self.ended.clear();
        let Self { entries, gone, passes, is_full, .. } = self;
        entries.retain(|key, entry| {
            let kept = entry.pass == *passes || announced.contains(key);
            if !kept && *passes > 1 && !entry.row.exited && !*is_full {
                gone.insert(*key);
            }
            kept
        });
    }
}

/// The processes whose row an event changes.
fn subjects(event: &Event) -> impl Iterator<Item = ProcKey> {
    let subject = match event {
        Event::Clone(event) => Some(event.child),
        Event::Exit(event) => Some(event.header.process),
        Event::Exec(event) => Some(event.header.process),
        Event::Rename(_) | Event::Fd(_) | Event::Signal(_) | Event::Socket(_) => None,
    };
    subject.into_iter()
}

#[cfg(test)]
#[path = "reconcile_tests.rs"]
mod tests;

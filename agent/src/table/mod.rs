//! The process table: every process of the host with its counts. Pure: it takes events and passes, and
//! returns how far the events had drifted from what a pass found.

mod drift;
mod reconcile;
mod row;
#[cfg(test)]
mod testing;

use std::sync::Arc;

use bytemuck::Zeroable;
use foldhash::{HashMap, HashSet};
use plumb_common::{
    event::{CLONE_THREAD, Clone as CloneEvent, Exec, Exit, Header},
    task::{FLAG_FDS_UNKNOWN, ProcKey, TaskRecord},
};

pub(crate) use drift::Drift;
pub(crate) use reconcile::Pass;
pub(crate) use row::Row;

use self::drift::Owed;
use crate::{decode::Event, procfs::ProcStatic};

/// The table. Events keep it fresh between passes; a pass is the truth.
#[derive(Debug, Default)]
pub(crate) struct Table {
    entries: HashMap<ProcKey, Entry>,
    /// Processes that the last pass no longer found and whose exit no event has told of.
    gone: HashSet<ProcKey>,
    /// Processes whose end was told before the first pass could show them.
    ended: HashSet<ProcKey>,
    /// Passes so far.
    passes: u64,
    /// Not every process is followed: what is missing is no drift.
    is_full: bool,
    drift: Drift,
}

#[derive(Clone, Debug)]
struct Entry {
    row: Row,
    /// Time of the record that the row was taken from, 0 while only events told of the process. Events
    /// may come late: what is not younger is in the record.
    adopted: u64,
    /// The pass that the record was of.
    pass: u64,
    /// Time of the last known clone, exec or exit of this process.
    moved: u64,
    /// What the events have not told of that record yet.
    owed: Owed,
}

impl Table {
    /// Applies one event.
    pub(crate) fn apply(&mut self, event: &Event) {
        match event {
            Event::Clone(event) if event.flags & CLONE_THREAD != 0 => self.thread_started(event),
            Event::Clone(event) => self.process_started(event),
            Event::Exit(event) => self.thread_exited(event),
            Event::Exec(event) => self.image_replaced(event),
            // A pass notices a new name by itself; these are for those who listen.
            Event::Rename(_) | Event::Fd(_) | Event::Signal(_) | Event::Socket(_) => {}
        }
    }

    fn thread_started(&mut self, event: &CloneEvent) {
        if let Some(entry) = self.entries.get_mut(&event.child) {
            entry.advance(event.header.time, 1);
        }
    }

    fn process_started(&mut self, event: &CloneEvent) {
        // The child begins as a copy of its parent, fds and limits included. A parent that no pass has
        // shown (PID 1 is hidden from the iterators on some machines) leaves them to the next pass.
        let copied = match self.entries.get(&event.header.process) {
            Some(parent) => parent.row.clone(),
            None => {
                let unknown = TaskRecord { flags: FLAG_FDS_UNKNOWN, ..TaskRecord::zeroed() };
                Row::from_record(&unknown, Arc::new(ProcStatic::of_comm(&event.header.comm)))
            }
        };
        let row = Row {
            key: event.child,
            ppid: event.header.process.tgid,
            threads: 1,
            rss_bytes: 0,
            exited: false,
            ..copied
        };
        if self.is_full {
            // Whether it is followed is for the pass to say.
            return;
        }
        let fresh = Entry { row, adopted: 0, pass: 0, moved: event.header.time, owed: Owed::NOTHING };
        self.entries.entry(event.child).or_insert(fresh).owed.clone = false;
    }

    fn thread_exited(&mut self, event: &Exit) {
        let Header { process, tid, time, .. } = event.header;
        let Some(entry) = self.entries.get_mut(&process) else {
            if event.group_dead != 0 {
                self.gone.remove(&process);
                if self.passes <= 1 {
                    self.ended.insert(process);
                }
            }
            return;
        };
        // A leader that exits first still counts as a thread until the others are gone.
        let counts = event.group_dead == 0 && tid != process.tgid;
        entry.advance(time, if counts { -1 } else { 0 });
        if event.group_dead != 0 {
            // The entry stays until a pass no longer finds it: until then it is a zombie. A record read
            // in the midst of the exit does not show it, so this holds for a late event too.
            entry.row.exited = true;
        }
    }

    fn image_replaced(&mut self, event: &Exec) {
        // exec leaves one thread. When another than the leader calls it, the leader is killed and the
        // caller takes its place: of the two only the leader exits, and a leader's exit counts for nothing.
        // The new image itself is for the next pass to notice.
        let Header { process, time, .. } = event.header;
        if let Some(entry) = self.entries.get_mut(&process)
            && entry.advance(time, if event.old_tid == process.tgid { 0 } else { -1 })
        {
            entry.row.threads = 1;
        }
    }

    /// Every process, in the order of start.
    #[must_use]
    pub(crate) fn rows(&self) -> Vec<Row> {
        let mut rows: Vec<_> = self.entries.values().map(|entry| entry.row.clone()).collect();
        rows.sort_unstable_by_key(|row| row.key);
        rows
    }

    /// What all passes so far found wrong in the events, summed.
    #[must_use]
    pub(crate) fn drift(&self) -> Drift {
        self.drift
    }

    /// Takes a record over as the truth about its process.
    fn adopt(&mut self, record: &TaskRecord, info: &Arc<ProcStatic>) {
        let row = Row::from_record(record, Arc::clone(info));
        let entry = self.entries.entry(record.key).or_insert_with(|| Entry {
            // It began with one thread.
            row: Row { threads: 1, ..row.clone() },
            adopted: 0,
            pass: 0,
            moved: record.key.start_boottime,
            owed: Owed::CLONE,
        });
        entry.owed = if self.passes > 1 && !self.is_full { entry.owed_for(record) } else { Owed::UNKNOWN };
        let exited = entry.row.exited || row.exited || self.ended.contains(&record.key);
        // A count that could not be read is no sign that the fds are gone.
        let fds = if row.flags & FLAG_FDS_UNKNOWN != 0 { entry.row.fds } else { row.fds };
        entry.row = Row { exited, fds, ..row };
        entry.adopted = record.time;
        entry.pass = self.passes;
    }
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod model_tests;

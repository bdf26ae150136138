//! Stacks of whoever made something, as copied, until somebody asks for their names: of most that is opened nobody
//! ever does.

use std::{
    cell::{Cell, OnceCell, RefCell},
    collections::{HashMap, VecDeque},
    rc::{Rc, Weak},
    sync::Arc,
};

use plumb_common::event::{CLONE_THREAD, FD_BAD_CLOSE, FD_CLOSED, KIND_TABLE, Stack as Head};

use crate::{
    decode::{Event, Sample},
    stacks::Stack,
};

/// Bytes of copied stacks that are kept at a time. Beyond them the oldest get their names, which are shared.
const MAX_BYTES: usize = 128 << 20;

/// From so many on it is looked which are in use.
const MANY: usize = 32_768;

/// A stack.
#[derive(Debug)]
pub(crate) struct Trace {
    /// Just behind the call instruction: equal for equal stacks.
    pub ip: u64,
    raw: RefCell<Option<Sample>>,
    named: OnceCell<Option<Arc<Stack>>>,
    held: Rc<Cell<usize>>,
}

/// Gives stacks their names.
pub(crate) trait Namer {
    /// `None` for one that cannot be had.
    fn name(&mut self, sample: Sample) -> Option<Arc<Stack>>;
}

impl Trace {
    pub(crate) fn named(&self, namer: &mut impl Namer) -> Option<Arc<Stack>> {
        let name = || {
            let sample = self.raw.borrow_mut().take()?;
            self.held.set(self.held.get().saturating_sub(sample.bytes.len()));
            namer.name(sample)
        };
        self.named.get_or_init(name).clone()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let bytes = self.raw.get_mut().as_ref().map_or(0, |sample| sample.bytes.len());
        self.held.set(self.held.get().saturating_sub(bytes));
    }
}

/// All of them, and those whose events are still to come.
#[derive(Debug, Default)]
pub(crate) struct Traces {
    early: HashMap<At, Sample>,
    all: VecDeque<Weak<Trace>>,
    /// How many of them were in use when that was last looked at.
    alive: usize,
    held: Rc<Cell<usize>>,
}

/// An event: its thread and time.
type At = (u32, u64);

/// Which of what is read beside a batch of events is of use.
#[derive(Debug, Default)]
pub(crate) struct Wanted(HashMap<At, bool>);

impl Wanted {
    /// Of what the batch opens and closes again, and of all closes of one number but the last one, and the one before a
    /// failed one, nobody will ask.
    pub(crate) fn of(events: &[Event]) -> Self {
        let mut wanted = HashMap::with_capacity(events.len());
        let mut last: HashMap<(u32, u32), (At, Option<At>)> = HashMap::new();
        for event in events {
            let header = event.header();
            let at = (header.tid, header.time);
            wanted.insert(at, true);
            if let Event::Clone(clone) = event
                && clone.flags & CLONE_THREAD == 0
            {
                // The child has it too, and may keep it longer.
                last.retain(|(tgid, _), _| *tgid != header.process.tgid);
            }
            let Event::Fd(change) = event else { continue };
            let slot = (header.process.tgid, change.fd);
            match change.change {
                FD_BAD_CLOSE => drop(last.remove(&slot)),
                FD_CLOSED if change.fd == change.fd_last => {
                    let before = last.insert(slot, (at, None));
                    if let Some((made, closed)) = before {
                        // What was opened and is closed now; and the close before that.
                        [Some(made), closed]
                            .into_iter()
                            .flatten()
                            .for_each(|at| _ = wanted.insert(at, false));
                    }
                }
                FD_CLOSED => {}
                _ => {
                    let closed = last.remove(&slot).map(|(closed, _)| closed);
                    last.insert(slot, (at, closed));
                }
            }
        }
        Self(wanted)
    }

    /// What belongs to an event that has not been read yet is kept.
    pub(crate) fn takes(&self, head: &Head) -> bool {
        let at = (head.header.tid, head.header.time);
        head.header.kind == KIND_TABLE || self.0.get(&at).copied().unwrap_or(true)
    }
}

impl Traces {
    pub(crate) fn add(&mut self, samples: Vec<Sample>) {
        self.early.extend(
            samples.into_iter().map(|sample| ((sample.head.header.tid, sample.head.header.time), sample)),
        );
    }

    /// What came beside an event.
    pub(crate) fn beside(&mut self, event: &Event) -> Option<Sample> {
        let header = event.header();
        self.early.remove(&(header.tid, header.time))
    }

    /// What is older than this belongs to events that were lost.
    pub(crate) fn forget_before(&mut self, time: u64) {
        self.early.retain(|(_, at), _| *at >= time);
    }

    pub(crate) fn trace(&mut self, sample: Sample) -> Rc<Trace> {
        self.held.set(self.held.get() + sample.bytes.len());
        let (ip, raw, named) = (sample.head.ip, RefCell::new(Some(sample)), OnceCell::new());
        let trace = Rc::new(Trace { ip, raw, named, held: Rc::clone(&self.held) });
        self.all.push_back(Rc::downgrade(&trace));
        if self.all.len() >= 2 * self.alive.max(MANY) {
            self.all.retain(|trace| trace.strong_count() > 0);
            self.alive = self.all.len();
        }
        trace
    }

    /// Keeps within the bound.
    pub(crate) fn make_room(&mut self, namer: &mut impl Namer) {
        while self.held.get() > MAX_BYTES
            && let Some(oldest) = self.all.pop_front()
        {
            if let Some(trace) = oldest.upgrade() {
                trace.named(namer);
            }
        }
    }
}

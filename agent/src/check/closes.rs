//! Closes that hit nothing, and what had been closed there before. Pure, of one process.
//!
//! Not everything that fails is a fault: whoever wants to be sure that nothing is open closes all numbers in turn, and
//! whoever has nothing to close may close -1. So a failed close counts only where the process itself had closed that
//! number before, and not within a sweep.

use std::{collections::HashMap, rc::Rc};

use plumb_common::event::FdChange;

use super::{traces::Trace, tree::Open};

/// So many closes in a row of numbers that go up or down by one are a sweep.
const SWEEP: u32 = 3;
/// Numbers whose last close is remembered, and failed closes.
const MAX_CLOSED: usize = 16_384;
const MAX_BAD: usize = 1024;

/// A successful close.
#[derive(Clone, Debug)]
pub(crate) struct Closed {
    /// Thread that did it.
    pub by: u32,
    pub trace: Option<Rc<Trace>>,
    /// What went; `None` when it was there before the command began.
    pub open: Option<Rc<Open>>,
}

/// A close of a number that had been closed before.
#[derive(Clone, Debug)]
pub(crate) struct BadClose {
    pub fd: u32,
    pub by: u32,
    pub trace: Option<Rc<Trace>>,
    pub before: Closed,
    sweep: u64,
}

impl BadClose {
    /// Whether another thread had closed what this one had opened: its own close then found nothing.
    pub(crate) fn is_of_another(&self) -> bool {
        let opened_by = self.before.open.as_ref().map(|open| open.event.header.tid);
        opened_by == Some(self.by) && self.before.by != self.by
    }
}

/// Closes of one thread, one after the other.
#[derive(Clone, Copy, Debug)]
struct Row {
    last: u32,
    step: i64,
    length: u32,
    /// Which row it is; 0 is none.
    number: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Closes {
    last: HashMap<u32, Closed>,
    rows: HashMap<u32, Row>,
    bad: Vec<BadClose>,
    sweeps: u64,
}

impl Closes {
    pub(crate) fn opened(&mut self, event: &FdChange) {
        // What is closed next at this number is another thing, but the last close of it still says who was there.
        if let Some(row) = self.rows.get_mut(&event.header.tid) {
            row.length = 0;
        }
    }

    pub(crate) fn closed(&mut self, event: &FdChange, open: Option<Rc<Open>>, trace: Option<Rc<Trace>>) {
        self.step(event);
        if self.last.len() < MAX_CLOSED || self.last.contains_key(&event.fd) {
            self.last.insert(event.fd, Closed { by: event.header.tid, trace, open });
        }
    }

    pub(crate) fn failed(&mut self, event: &FdChange, trace: Option<Rc<Trace>>) {
        let sweep = self.step(event);
        let Some(before) = self.last.get(&event.fd).cloned() else { return };
        if self.bad.len() < MAX_BAD {
            self.bad.push(BadClose { fd: event.fd, by: event.header.tid, trace, before, sweep });
        }
    }

    /// Counts one close; returns the row that it belongs to.
    fn step(&mut self, event: &FdChange) -> u64 {
        let next = self.sweeps + 1;
        let row =
            self.rows.entry(event.header.tid).or_insert(Row { last: 0, step: 0, length: 0, number: next });
        let step = i64::from(event.fd) - i64::from(row.last);
        if row.length > 0 && step.abs() == 1 && (row.length == 1 || step == row.step) {
            row.length += 1;
        } else {
            (row.length, row.number) = (1, next);
        }
        (row.last, row.step) = (event.fd, step);
        let (number, is_sweep) = (row.number, row.length >= SWEEP);
        self.sweeps = self.sweeps.max(number);
        if is_sweep {
            self.bad.retain(|bad| bad.sweep != number);
            // Whatever this row brings is no fault.
            return u64::MAX;
        }
        number
    }

    /// Those that count.
    pub(crate) fn into_bad(self) -> Vec<BadClose> {
        self.bad.into_iter().filter(|bad| bad.sweep != u64::MAX).collect()
    }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;

    use super::*;

    fn event(fd: u32, tid: u32) -> FdChange {
        let mut event = FdChange::zeroed();
        (event.fd, event.fd_last, event.header.tid) = (fd, fd, tid);
        event
    }

    fn open(fd: u32, tid: u32) -> Option<Rc<Open>> {
        Some(Rc::new(Open::new(event(fd, tid), None)))
    }

    fn bad(closes: Closes) -> Vec<(u32, bool)> {
        closes.into_bad().iter().map(|bad| (bad.fd, bad.is_of_another())).collect()
    }

    #[test]
    fn a_second_close_counts_and_one_of_what_never_was_does_not() {
        let mut closes = Closes::default();
        closes.closed(&event(5, 1), open(5, 1), None);
        closes.failed(&event(5, 1), None);
        closes.failed(&event(u32::MAX, 1), None);
        closes.failed(&event(9, 1), None);
        assert_eq!(bad(closes), [(5, false)]);
    }

    #[test]
    fn what_another_thread_closed_is_told_apart() {
        let mut closes = Closes::default();
        closes.closed(&event(5, 2), open(5, 1), None);
        closes.failed(&event(5, 1), None);
        assert_eq!(bad(closes), [(5, true)]);
    }

    #[test]
    fn a_sweep_is_no_fault_from_its_first_number_on_in_either_direction() {
        for numbers in [[3, 4, 5, 6, 7], [7, 6, 5, 4, 3]] {
            let mut closes = Closes::default();
            numbers.iter().for_each(|fd| closes.closed(&event(*fd, 1), open(*fd, 1), None));
            closes.opened(&event(3, 1));
            numbers.iter().for_each(|fd| closes.failed(&event(*fd, 1), None));
            assert_eq!(bad(closes), []);
        }
    }

    #[test]
    fn two_threads_do_not_make_one_sweep() {
        let mut closes = Closes::default();
        for (fd, tid) in [(3, 1), (4, 2), (5, 1)] {
            closes.closed(&event(fd, tid), open(fd, tid), None);
            closes.opened(&event(40, tid));
        }
        for (fd, tid) in [(3, 1), (4, 2), (5, 3)] {
            closes.failed(&event(fd, tid), None);
        }
        assert_eq!(bad(closes).len(), 3);
    }
}

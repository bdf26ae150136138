//! Stacks and the events they belong to. A stack is sent before its event, so it may come a batch earlier.

use std::collections::HashMap;

use super::Named;
use crate::decode::Event;

/// How long a stack waits for its event, in nanoseconds: beyond it the event was lost.
const PATIENCE: u64 = 5_000_000_000;

/// Named stacks whose events are still to come.
#[derive(Debug, Default)]
pub(crate) struct Matched {
    waiting: HashMap<(u32, u64), Named>,
}

impl Matched {
    /// Takes a batch of events and the stacks that were read after it; returns those of the batch.
    pub(crate) fn of(&mut self, events: &[Event], stacks: Vec<Named>) -> Vec<Named> {
        self.waiting.extend(stacks.into_iter().map(|named| ((named.made.by, named.made.time), named)));
        let made = events.iter().filter(|event| event.is_made()).map(Event::header);
        let found = made.filter_map(|header| self.waiting.remove(&(header.tid, header.time))).collect();
        if let Some(newest) = events.last().map(|event| event.header().time) {
            self.waiting.retain(|(_, time), _| time.saturating_add(PATIENCE) > newest);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytemuck::Zeroable;
    use plumb_common::{
        event::{FD_CLOSED, FD_OPENED, FdChange},
        task::ProcKey,
    };

    use super::*;
    use crate::stacks::{Made, Stack};

    fn event(change: u32, time: u64) -> Event {
        let mut event = FdChange::zeroed();
        (event.header.tid, event.header.time, event.change) = (8, time, change);
        Event::Fd(event)
    }

    fn stack(time: u64) -> Named {
        let stack = Arc::new(Stack { frames: Vec::new(), origin: None, complete: true });
        Named { process: ProcKey::new(7, 1), made: Made { number: 3, time, by: 8 }, stack }
    }

    fn times(found: &[Named]) -> Vec<u64> {
        found.iter().map(|named| named.made.time).collect()
    }

    #[test]
    fn a_stack_that_comes_before_its_event_waits_for_it() {
        let mut matched = Matched::default();
        let first = matched.of(&[event(FD_OPENED, 1), event(FD_CLOSED, 2)], vec![stack(1), stack(3)]);
        assert_eq!(times(&first), [1]);
        assert_eq!(times(&matched.of(&[], vec![stack(4)])), [0; 0]);
        let both = matched.of(&[event(FD_OPENED, 3), event(FD_OPENED, 4)], Vec::new());
        assert_eq!(times(&both), [3, 4]);
        assert_eq!(times(&matched.of(&[event(FD_OPENED, 3)], Vec::new())), [0; 0]);
    }

    #[test]
    fn it_does_not_wait_for_ever() {
        let mut matched = Matched::default();
        matched.of(&[], vec![stack(1)]);
        matched.of(&[event(FD_CLOSED, 1 + PATIENCE)], Vec::new());
        assert_eq!(times(&matched.of(&[event(FD_OPENED, 1)], Vec::new())), [0; 0]);
    }
}

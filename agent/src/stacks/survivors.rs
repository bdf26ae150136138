//! Which stacks are worth unwinding: of what is still there at the end of the batch of events that told of it. On
//! a busy server that is one in many, and the rest would cost the agent a processor.

use std::collections::{BTreeMap, HashMap};

use plumb_common::{
    event::{CLONE_THREAD, FD_CLOSE_ON_EXEC, FD_CLOSED, FD_UNKNOWN},
    task::ProcKey,
};

use crate::decode::{Event, Sample};

/// Stacks kept for events that have not been read yet: about as many as their ring holds.
const MAX_WAITING: usize = 256;
/// How long such a stack waits, in nanoseconds: beyond it the event was lost.
const PATIENCE: u64 = 5_000_000_000;

/// Stacks whose events are still to come.
#[derive(Debug, Default)]
pub(crate) struct Survivors {
    waiting: HashMap<(u32, u64), Sample>,
    /// Those for which there was no room.
    lost: u64,
}

impl Survivors {
    /// How many found no room since this was asked last.
    pub(crate) fn take_lost(&mut self) -> u64 {
        std::mem::take(&mut self.lost)
    }

    /// With too many waiting, each process keeps its newest, as many as any other: whose events are lost must not
    /// push out others.
    fn make_room(&mut self) {
        if self.waiting.len() <= MAX_WAITING {
            return;
        }
        let mut of: HashMap<ProcKey, Vec<(u64, u32)>> = HashMap::new();
        for ((tid, time), stack) in &self.waiting {
            of.entry(stack.head.header.process).or_default().push((*time, *tid));
        }
        let share = (MAX_WAITING / of.len()).max(1);
        for mut stacks in of.into_values() {
            stacks.sort_unstable();
            let old = stacks.len().saturating_sub(share);
            self.lost += old as u64;
            stacks.drain(..old).for_each(|(time, tid)| drop(self.waiting.remove(&(tid, time))));
        }
    }

    /// Takes a batch of events and the stacks that were sent before them; returns the stacks of what the batch
    /// made and did not end.
    pub(crate) fn of(&mut self, events: &[Event], stacks: Vec<Sample>) -> Vec<Sample> {
        for stack in stacks {
            self.waiting.insert((stack.head.header.tid, stack.head.header.time), stack);
        }
        if self.waiting.is_empty() {
            return Vec::new();
        }
        let mut fds: BTreeMap<(ProcKey, u32), Sample> = BTreeMap::new();
        let mut threads: HashMap<(ProcKey, u32), Sample> = HashMap::new();
        for event in events {
            let header = event.header();
            let process = header.process;
            match event {
                Event::Fd(change) if change.change == FD_CLOSED && change.fd != FD_UNKNOWN => {
                    let within = (process, change.fd)..=(process, change.fd_last.max(change.fd));
                    let gone: Vec<_> = fds.range(within).map(|(at, _)| *at).collect();
                    gone.iter().for_each(|at| drop(fds.remove(at)));
                }
                Event::Fd(change) if change.change == FD_CLOSED || change.change == FD_CLOSE_ON_EXEC => {}
                Event::Fd(change) => {
                    fds.remove(&(process, change.fd));
                    if let Some(stack) = self.waiting.remove(&(header.tid, header.time)) {
                        fds.insert((process, change.fd), stack);
                    }
                }
                Event::Clone(clone) if clone.flags & CLONE_THREAD != 0 => {
                    if let Some(stack) = self.waiting.remove(&(header.tid, header.time)) {
                        threads.insert((process, clone.child_tid), stack);
                    }
                }
                Event::Exit(exit) => drop(threads.remove(&(process, exit.header.tid))),
                _ => {}
            }
        }
        if let Some(newest) = events.last().map(|event| event.header().time) {
            self.waiting.retain(|(_, time), _| time.saturating_add(PATIENCE) > newest);
        }
        self.make_room();
        fds.into_values().chain(threads.into_values()).collect()
    }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;
    use plumb_common::event::{Clone, Exit, FD_OPENED, FdChange, Stack};

    use super::*;

    const PROCESS: ProcKey = ProcKey::new(7, 1);

    fn opened(fd: u32, time: u64) -> (Event, Sample) {
        let (mut event, mut head) = (FdChange::zeroed(), Stack::zeroed());
        (event.header.process, event.header.tid, event.header.time) = (PROCESS, 8, time);
        (event.change, event.fd, event.fd_last) = (FD_OPENED, fd, fd);
        (head.header, head.made) = (event.header, fd);
        (Event::Fd(event), Sample { head, bytes: Vec::new() })
    }

    fn closed(fd: u32, fd_last: u32, time: u64) -> Event {
        let mut event = FdChange::zeroed();
        (event.header.process, event.header.time) = (PROCESS, time);
        (event.change, event.fd, event.fd_last) = (FD_CLOSED, fd, fd_last);
        Event::Fd(event)
    }

    fn made(stacks: &[Sample]) -> Vec<(u32, u64)> {
        stacks.iter().map(|stack| (stack.head.made, stack.head.header.time)).collect()
    }

    #[test]
    fn what_the_batch_closes_again_is_not_unwound() {
        let [(a, stack_a), (b, stack_b), (again, stack_again)] =
            [(3, 1), (4, 2), (3, 5)].map(|(fd, time)| opened(fd, time));
        let events = [a, b, closed(3, 3, 3), closed(5, u32::MAX - 1, 4), again];
        let found = Survivors::default().of(&events, vec![stack_a, stack_b, stack_again]);
        assert_eq!(made(&found), [(3, 5), (4, 2)]);
    }

    #[test]
    fn a_stack_waits_for_its_event_and_not_for_ever() {
        let mut survivors = Survivors::default();
        let ((late, stack), (other, lost)) = (opened(3, 10), opened(4, 11));
        assert_eq!(survivors.of(&[], vec![stack, lost]), []);
        assert_eq!(made(&survivors.of(&[late], Vec::new())), [(3, 10)]);
        assert_eq!(survivors.of(&[closed(9, 9, 11 + PATIENCE)], Vec::new()), []);
        assert_eq!(survivors.of(&[other], Vec::new()), [], "it was given up");
    }

    #[test]
    fn one_whose_events_are_lost_pushes_nobody_out() {
        let mut survivors = Survivors::default();
        let of = |tgid, time| {
            let (event, mut stack) = opened(3, time);
            stack.head.header.process = ProcKey::new(tgid, 1);
            (event, stack)
        };
        let (late, slow) = of(7, 1);
        let storm = (2..2 * MAX_WAITING as u64).map(|time| of(9, time).1);
        assert_eq!(survivors.of(&[], std::iter::once(slow).chain(storm).collect()), []);
        assert_eq!(survivors.take_lost(), 2 * MAX_WAITING as u64 - 2 - MAX_WAITING as u64 / 2);
        assert_eq!(made(&survivors.of(&[late], Vec::new())), [(3, 1)]);
    }

    #[test]
    fn a_thread_that_has_ended_is_not_unwound() {
        let thread = |tid, time| {
            let (mut clone, mut head) = (Clone::zeroed(), Stack::zeroed());
            (clone.header.process, clone.header.tid, clone.header.time) = (PROCESS, 8, time);
            (clone.flags, clone.child_tid) = (CLONE_THREAD, tid);
            (head.header, head.made) = (clone.header, tid);
            (Event::Clone(clone), Sample { head, bytes: Vec::new() })
        };
        let ((stays, stack), (ends, other)) = (thread(20, 1), thread(21, 2));
        let mut exit = Exit::zeroed();
        (exit.header.process, exit.header.tid) = (PROCESS, 21);
        let found = Survivors::default().of(&[stays, ends, Event::Exit(exit)], vec![stack, other]);
        assert_eq!(made(&found), [(20, 1)]);
    }
}

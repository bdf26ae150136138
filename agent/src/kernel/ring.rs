//! The rings of events and of stacks: one reader, no wake-up per record.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use aya::maps::{Map, MapData, RingBuf};
use plumb_common::{
    event::Stack,
    limits::{STACK_BYTES, STACK_RING_BYTES},
};
use rustix::event::{Timespec, epoll};

use crate::decode::{self, Event, Rejected, Sample};

/// More stacks than the ring of the agent holds: bounds what one drain takes.
const MAX_STACKS: usize = (STACK_RING_BYTES as usize) / STACK_BYTES[0];

#[derive(Debug, thiserror::Error)]
pub enum RingError {
    #[error("the ring has its reader already")]
    Taken,
    #[error("the ring cannot be mapped: {0}")]
    Map(#[from] aya::maps::MapError),
    #[error("waiting for the ring: {0}")]
    Wait(#[from] io::Error),
}

/// The reading end of the rings.
pub struct Ring {
    events: RingBuf<MapData>,
    stacks: RingBuf<MapData>,
    wakeups: OwnedFd,
    ledger: Ledger,
    stack_ledger: Ledger,
}

/// What became of the records that the kernel sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    /// Handed on.
    pub consumed: u64,
    /// Lost: `decode` did not understand them.
    pub rejected: u64,
}

impl Ledger {
    fn take<T>(&mut self, decoded: Result<T, Rejected>) -> Option<T> {
        match decoded {
            Ok(record) => {
                self.consumed += 1;
                Some(record)
            }
            Err(error) => {
                self.rejected += 1;
                tracing::debug!(%error, "a record of the ring could not be decoded");
                None
            }
        }
    }
}

impl Ring {
    pub(super) fn new(events: Map, stacks: Map) -> Result<Self, RingError> {
        let (events, stacks) = (RingBuf::try_from(events)?, RingBuf::try_from(stacks)?);
        // Edge-triggered: otherwise a single event that waits for its tick would keep the reader awake.
        let wakeups = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io::Error::from)?;
        let what = epoll::EventFlags::IN | epoll::EventFlags::ET;
        for ring in [events.as_fd(), stacks.as_fd()] {
            epoll::add(&wakeups, ring, epoll::EventData::new_u64(0), what).map_err(io::Error::from)?;
        }
        let (ledger, stack_ledger) = Default::default();
        Ok(Self { events, stacks, wakeups, ledger, stack_ledger })
    }

    /// Lets something else end `wait` too.
    pub(crate) fn wake_for(&mut self, bell: impl AsFd) -> io::Result<()> {
        let what = epoll::EventFlags::IN | epoll::EventFlags::ET;
        Ok(epoll::add(&self.wakeups, bell, epoll::EventData::new_u64(1), what)?)
    }

    /// Sleeps until the kernel asks to be read (an eighth of a ring is full) or the time is over.
    pub fn wait(&self, timeout: Duration) -> Result<(), RingError> {
        let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
        // Without an owner: whatever is ready, all of it is read.
        let mut ready =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
        match epoll::wait(&self.wakeups, &mut ready[..], Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(RingError::Wait(error.into())),
        }
    }

    /// Takes what is there, at most `limit` events, in the order of their reservation.
    pub fn drain(&mut self, limit: usize) -> Vec<Event> {
        let mut batch = Vec::new();
        self.drain_into(&mut batch, limit);
        batch
    }

    /// As `drain`, into a batch that is used again.
    pub fn drain_into(&mut self, batch: &mut Vec<Event>, limit: usize) {
        while batch.len() < limit
            && let Some(item) = self.events.next()
        {
            batch.extend(self.ledger.take(decode::event(&item)));
        }
    }

    /// Takes the stacks that are there. Read after the events, each stack of theirs is among them or was lost: it is
    /// sent first.
    pub fn drain_stacks(&mut self) -> Vec<Sample> {
        let mut stacks = Vec::new();
        // The kernel side goes on filling it.
        while stacks.len() < MAX_STACKS
            && let Some(item) = self.stacks.next()
        {
            stacks.extend(self.stack_ledger.take(decode::sample(&item)));
        }
        stacks
    }

    /// As `drain_stacks`, all of those that are wanted; the others are not copied.
    pub(crate) fn drain_stacks_if(&mut self, wanted: impl Fn(&Stack) -> bool) -> Vec<Sample> {
        let mut stacks = Vec::new();
        while let Some(item) = self.stacks.next() {
            let head = decode::sample_head(&item);
            let sample = head.and_then(|head| wanted(&head).then(|| decode::sample(&item)).transpose());
            stacks.extend(self.stack_ledger.take(sample).flatten());
        }
        stacks
    }

    /// What became of the events so far.
    #[must_use]
    pub fn ledger(&self) -> Ledger {
        self.ledger
    }

    /// And of the stacks.
    #[must_use]
    pub fn stack_ledger(&self) -> Ledger {
        self.stack_ledger
    }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;
    use plumb_common::event::{Exit, KIND_EXIT};

    use super::*;

    #[test]
    fn a_record_is_consumed_or_rejected() {
        let mut exit = Exit::zeroed();
        exit.header.kind = KIND_EXIT;
        let (whole, mut ledger) = (bytemuck::bytes_of(&exit), Ledger::default());
        let mut take = |bytes| ledger.take(decode::event(bytes));
        assert_eq!(take(whole), Some(Event::Exit(exit)));
        assert_eq!(take(&whole[1..]), None);
        assert_eq!(take(&[]), None);
        assert_eq!(ledger, Ledger { consumed: 1, rejected: 2 });
    }
}

//! The event ring: one reader, no wake-up per event.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use aya::maps::{Map, MapData, RingBuf};
use rustix::event::{Timespec, epoll};

use crate::decode::{self, Event};

#[derive(Debug, thiserror::Error)]
pub enum RingError {
    #[error("the ring has its reader already")]
    Taken,
    #[error("the ring cannot be mapped: {0}")]
    Map(#[from] aya::maps::MapError),
    #[error("waiting for the ring: {0}")]
    Wait(#[from] io::Error),
}

/// The reading end of the ring.
pub struct Ring {
    events: RingBuf<MapData>,
    wakeups: OwnedFd,
    ledger: Ledger,
}

/// What became of the events that the kernel sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    /// Handed on.
    pub consumed: u64,
    /// Lost: `decode` did not understand them.
    pub rejected: u64,
}

impl Ledger {
    fn take(&mut self, record: &[u8]) -> Option<Event> {
        match decode::event(record) {
            Ok(event) => {
                self.consumed += 1;
                Some(event)
            }
            Err(error) => {
                self.rejected += 1;
                tracing::debug!(%error, "an event could not be decoded");
                None
            }
        }
    }
}

impl Ring {
    pub(super) fn new(map: Map) -> Result<Self, RingError> {
        let events = RingBuf::try_from(map)?;
        // Edge-triggered: otherwise a single event that waits for its tick would keep the reader awake.
        let wakeups = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io::Error::from)?;
        let what = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&wakeups, events.as_fd(), epoll::EventData::new_u64(0), what).map_err(io::Error::from)?;
        Ok(Self { events, wakeups, ledger: Ledger::default() })
    }

    /// Lets something else end `wait` too.
    pub(crate) fn wake_for(&mut self, bell: impl AsFd) -> io::Result<()> {
        let what = epoll::EventFlags::IN | epoll::EventFlags::ET;
        Ok(epoll::add(&self.wakeups, bell, epoll::EventData::new_u64(1), what)?)
    }

    /// Sleeps until the kernel asks to be read (an eighth of the ring is full) or the time is over.
    pub fn wait(&self, timeout: Duration) -> Result<(), RingError> {
        let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
        // Without an owner: the ring is the only thing that is waited for.
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
            batch.extend(self.ledger.take(&item));
        }
    }

    /// What became of the events so far.
    #[must_use]
    pub fn ledger(&self) -> Ledger {
        self.ledger
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
        assert_eq!(ledger.take(whole), Some(Event::Exit(exit)));
        assert_eq!(ledger.take(&whole[1..]), None);
        assert_eq!(ledger.take(&[]), None);
        assert_eq!(ledger, Ledger { consumed: 1, rejected: 2 });
    }
}

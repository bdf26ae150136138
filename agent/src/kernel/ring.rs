//! The event ring: one reader, no wake-up per event.

use std::{io, os::fd::AsFd, time::Duration};

use aya::maps::{Map, MapData, RingBuf};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

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
    rejected: u64,
}

impl Ring {
    pub(super) fn new(map: Map) -> Result<Self, RingError> {
        Ok(Self { events: RingBuf::try_from(map)?, rejected: 0 })
    }

    /// Sleeps until the kernel asks to be read (an eighth of the ring is full) or the time is over.
    pub fn wait(&self, timeout: Duration) -> Result<(), RingError> {
        let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
        let mut ready = [PollFd::from_borrowed_fd(self.events.as_fd(), PollFlags::IN)];
        match poll(&mut ready, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(RingError::Wait(error.into())),
        }
    }

    /// Takes what is there, at most `limit` events, in the order of their reservation.
    pub fn drain(&mut self, limit: usize) -> Vec<Event> {
        let mut batch = Vec::new();
        while batch.len() < limit
            && let Some(item) = self.events.next()
        {
            match decode::event(&item) {
                Ok(event) => batch.push(event),
                Err(error) => {
                    self.rejected += 1;
                    tracing::debug!(%error, "an event could not be decoded");
                }
            }
        }
        batch
    }

    /// Events so far that `decode` did not understand.
    #[must_use]
    pub fn rejected(&self) -> u64 {
        self.rejected
    }
}

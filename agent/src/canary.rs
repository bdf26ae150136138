//! The proof that fd events arrive: opens and closes an fd of our own and looks for both events.

use std::io;

use plumb_common::event::{FD_CLOSED, FD_OPENED, FdChange, FdControl};
use rustix::{
    event::{EventfdFlags, eventfd},
    fd::AsRawFd,
    thread::gettid,
};

use crate::{
    decode::Event,
    kernel::{Kernel, Ring},
};

/// What is still to be seen of the last round.
#[derive(Debug, Default)]
pub(crate) struct Canary {
    fd: Option<u32>,
    opened: bool,
    closed: bool,
    missed: u32,
}

impl Canary {
    /// Opens and closes an fd. Only the events of this moment and this thread are asked for.
    pub(crate) fn sing(&mut self, kernel: &mut Kernel, all: bool) -> io::Result<()> {
        self.judge();
        *self = Self { missed: self.missed, ..Self::default() };
        let (all, own) = (u32::from(all), gettid().as_raw_nonzero().get().unsigned_abs());
        let asked = kernel.set_fd_control(FdControl { all, canary_tid: own }).and_then(|()| {
            // Without a free fd there is nothing to be seen, and nothing is proven.
            self.fd = eventfd(0, EventfdFlags::CLOEXEC).ok().map(|fd| fd.as_raw_fd().unsigned_abs());
            kernel.set_fd_control(FdControl { all, canary_tid: 0 })
        });
        // Nor when the kernel cannot be told whose events are asked for: then it does not hear us at all.
        self.missed += u32::from(asked.is_err());
        asked
    }

    /// Looks for it among events.
    pub(crate) fn look(&mut self, events: &[Event]) {
        if let Some(fd) = self.fd {
            let own = rustix::process::getpid().as_raw_nonzero().get().unsigned_abs();
            let mut look = |event: &FdChange| {
                self.opened |= event.fd == fd && event.change == FD_OPENED;
                self.closed |= event.fd == fd && event.change == FD_CLOSED;
            };
            for event in events {
                if let Event::Fd(event) = event
                    && event.header.process.tgid == own
                {
                    look(event);
                }
            }
        }
    }

    /// Rounds in a row that were not seen.
    #[must_use]
    pub(crate) fn missed(&self) -> u32 {
        self.missed
    }

    /// Nobody listens any more.
    pub(crate) fn rest(&mut self) {
        *self = Self::default();
    }

    fn judge(&mut self) {
        if self.fd.is_some() {
            self.missed = if self.opened && self.closed { 0 } else { self.missed + 1 };
        }
    }

    /// A few rounds at once, for `plumb doctor`: whether the fd programs, once attached, are heard.
    pub(crate) fn proves(kernel: &mut Kernel, ring: &mut Ring) -> io::Result<bool> {
        // One round may be skipped by a busy kernel.
        for _ in 0..3 {
            let mut canary = Self::default();
            // What others did meanwhile leaves no room in a small ring.
            ring.drain(usize::MAX);
            canary.sing(kernel, false)?;
            canary.look(&ring.drain(usize::MAX));
            canary.judge();
            if canary.fd.is_some() && canary.missed == 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

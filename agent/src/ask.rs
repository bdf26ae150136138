//! What others ask of the observer, and the bell that wakes it for that.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        mpsc::{self, SyncSender},
    },
};

use plumb_common::task::ProcKey;
use rustix::event::{EventfdFlags, eventfd};

use crate::{
    detect::Resource,
    follow::Who,
    left::{Doings, Look},
    sockets::SocketRequest,
    symbolise::RawStack,
};

/// What the observer is asked for.
#[derive(Clone, Debug)]
pub(crate) enum Request {
    /// Somebody listens to these.
    Follow(Who),
    /// And no longer.
    Unfollow(Who),
    /// Remember what a suspect holds.
    Remember(ProcKey, Resource),
    /// Follow the fds or threads of a suspect, with the stacks of who makes them.
    Watch(ProcKey, Resource),
    /// And no longer.
    Unwatch(ProcKey, Resource),
    /// Look up what of it is still held, now that the count has grown beyond this baseline.
    Confirm(ProcKey, Resource, u32),
    /// Look at the threads of a process, and where some of them are.
    Threads(ProcKey, Vec<u32>),
    /// Count the threads that began before this time, nanoseconds since boot, by type.
    Census(ProcKey, u64),
    /// Look at the threads of the process of this number and start (1/100 s since boot), those first that have done
    /// something. Beside it, how many events of what processes begin have been lost since the agent began.
    Left((u32, u64), Box<Doings>, SyncSender<(Option<Look<Option<RawStack>>>, u64)>),
    /// Follow the sockets and signals of services.
    Sockets(SocketRequest),
    /// No longer suspect.
    Forget(ProcKey, Resource),
}

/// The asking end.
#[derive(Clone, Debug)]
pub(crate) struct Asker {
    requests: mpsc::Sender<Request>,
    bell: Bell,
}

impl Asker {
    /// And the end where the requests come out.
    pub(crate) fn new() -> io::Result<(Self, mpsc::Receiver<Request>)> {
        let (requests, receiver) = mpsc::channel();
        let bell = Bell(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?));
        Ok((Self { requests, bell }, receiver))
    }

    pub(crate) fn ask(&self, request: Request) {
        // The receiver outlives the observer, so this fails only when the agent is ending.
        let _ = self.requests.send(request);
        self.bell.ring();
    }

    /// Has the events read that there are, which otherwise happens several times a second.
    pub(crate) fn hurry(&self) {
        self.bell.ring();
    }

    #[must_use]
    pub(crate) fn bell(&self) -> Bell {
        self.bell.clone()
    }
}

/// Wakes the observer.
#[derive(Clone, Debug)]
pub(crate) struct Bell(Arc<OwnedFd>);

impl Bell {
    pub(crate) fn ring(&self) {
        // It would take 2^64 rings to make it full; each write is an edge.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

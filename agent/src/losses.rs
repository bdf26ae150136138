//! What becomes of the requests, listeners and signals of services, as far as the kernel sees it: events in words, and
//! their sums.
//!
//! A request is what came on a connection, and an answer whatever is sent after that was read. So a protocol in which
//! a side sends without being asked (HTTP/2, gRPC, websockets) is not understood.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use plumb_common::sockets::{
    LISTENER_CLOSED, LOST_BACKLOG, LOST_LATE, LOST_UNANSWERED, LOST_UNREAD, MARK_EXITING, MARK_GUESSED,
    MARK_USED, Peer, SIGNAL_DELIVERED, SIGNAL_GENERATED, SIGNAL_NO_MEMORY, Signal, Socket,
};
use serde::{Deserialize, Serialize};

use crate::{decode::Event, drain, text};

/// How a request is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Class {
    /// Its connection was never accepted.
    AcceptQueue,
    /// It came on a connection that had been used, as that was closed, and nobody read it.
    KeepAliveRace,
    /// It was the first of its connection, which was closed before anybody read it.
    Unread,
    /// It was read, and its connection closed before anything was sent.
    Unanswered,
}

impl Class {
    pub(crate) const ALL: [Self; 4] =
        [Self::AcceptQueue, Self::KeepAliveRace, Self::Unread, Self::Unanswered];

    /// The word used in JSON and metrics.
    #[must_use]
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::AcceptQueue => "accept_queue",
            Self::KeepAliveRace => "keep_alive_race",
            Self::Unread => "unread",
            Self::Unanswered => "unanswered",
        }
    }

    /// Of an event; `None` for one that tells of no loss.
    #[must_use]
    pub(crate) fn of(socket: &Socket) -> Option<Self> {
        let is_used = socket.marks & MARK_USED != 0;
        match socket.what {
            LOST_BACKLOG => Some(Self::AcceptQueue),
            LOST_UNREAD | LOST_LATE if is_used => Some(Self::KeepAliveRace),
            LOST_UNREAD | LOST_LATE => Some(Self::Unread),
            LOST_UNANSWERED => Some(Self::Unanswered),
            _ => None,
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(match self {
            Self::AcceptQueue => "reset in the accept queue",
            Self::KeepAliveRace => "on a kept connection as it was closed",
            Self::Unread => "accepted and not read",
            Self::Unanswered => "read and not answered",
        })
    }
}

/// The other end of a connection.
#[must_use]
pub(crate) fn address(peer: &Peer) -> SocketAddr {
    let address = Ipv6Addr::from(peer.address);
    let address = address.to_ipv4_mapped().map_or(IpAddr::V6(address), IpAddr::V4);
    SocketAddr::new(address, peer.port as u16)
}

/// What an event of a socket is called.
#[must_use]
pub(crate) const fn socket_event(socket: &Socket) -> &'static str {
    match socket.what {
        LISTENER_CLOSED => "listener-closed",
        _ => "request-lost",
    }
}

/// An event of a socket, as printed.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct SocketSeen {
    port: u32,
    /// Connections that nobody had accepted; of a listener only.
    #[serde(skip_serializing_if = "Option::is_none")]
    backlog: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    class: Option<Class>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unread_bytes: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unsent_bytes: Option<u32>,
    /// The data came after the connection had been closed.
    late: bool,
    /// The end of the process closed it.
    exiting: bool,
    /// Told from the kernel's clocks: nothing was seen of this connection before.
    guessed: bool,
}

impl SocketSeen {
    #[must_use]
    pub(crate) fn new(socket: &Socket) -> Self {
        let (class, has) = (Class::of(socket), |mark| socket.marks & mark != 0);
        Self {
            port: socket.peer.local_port,
            backlog: (socket.what == LISTENER_CLOSED).then_some(socket.unread),
            class,
            peer: class.map(|_| address(&socket.peer)),
            unread_bytes: class.map(|_| socket.unread),
            unsent_bytes: class.map(|_| socket.unsent),
            late: socket.what == LOST_LATE,
            exiting: has(MARK_EXITING),
            guessed: has(MARK_GUESSED),
        }
    }

    #[must_use]
    pub(crate) fn words(&self) -> String {
        let Some(class) = self.class else {
            return format!("port {}, {} not accepted", self.port, self.backlog.unwrap_or(0));
        };
        let mut words = format!("port {} {class}", self.port);
        if let Some(peer) = self.peer {
            words += &format!(", from {peer}");
        }
        for (bytes, what) in [(self.unread_bytes, "not read"), (self.unsent_bytes, "not sent")] {
            if let Some(bytes @ 1..) = bytes {
                words += &format!(", {bytes} bytes {what}");
            }
        }
        let marks =
            [(self.late, "it came late"), (self.exiting, "the process ended"), (self.guessed, "perhaps")];
        marks.iter().filter(|(is, _)| *is).for_each(|(_, what)| words += &format!(", {what}"));
        words
    }
}

/// What an event of a signal is called.
#[must_use]
pub(crate) const fn signal_event(signal: &Signal) -> &'static str {
    match signal.what {
        SIGNAL_DELIVERED => "signal-delivered",
        SIGNAL_NO_MEMORY => "no-memory",
        _ => "signal",
    }
}

/// An event of a signal, as printed.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct SignalSeen {
    signal: u32,
    name: String,
    target_pid: u32,
    /// `waits`, `ignored`, `already waits` or `lost`; delivered: `handler`, `ignored` or `default`.
    fate: &'static str,
    /// The kernel's own doing, not somebody's kill(2).
    by_kernel: bool,
}

const KILL: u32 = 9;
/// `SI_KERNEL`.
const BY_KERNEL: u32 = 0x80;

impl SignalSeen {
    #[must_use]
    pub(crate) fn new(signal: &Signal) -> Self {
        Self {
            signal: signal.signal,
            name: signal_name(signal.signal),
            target_pid: signal.target.tgid,
            fate: fate(signal),
            by_kernel: signal.code == BY_KERNEL,
        }
    }

    #[must_use]
    pub(crate) fn words(&self) -> String {
        let by = if self.by_kernel { ", by the kernel" } else { "" };
        format!("{} for pid {}: {}{by}", self.name, self.target_pid, self.fate)
    }
}

fn fate(signal: &Signal) -> &'static str {
    match (signal.what, signal.handler, signal.result) {
        (SIGNAL_NO_MEMORY, ..) => "the kernel had no memory for it",
        (SIGNAL_DELIVERED, 0, _) => "default",
        (SIGNAL_DELIVERED, 1, _) => "ignored",
        (SIGNAL_DELIVERED, ..) => "handler",
        (.., 0) => "waits",
        (.., 1) => "ignored",
        (.., 2) => "already waits",
        _ => "lost",
    }
}

/// What takes a signal that was delivered.
#[must_use]
pub(crate) const fn handler(signal: &Signal) -> &'static str {
    match signal.handler {
        0 => "by default",
        1 => "and ignored",
        _ => "by a handler",
    }
}

/// Whether it was told from the kernel's clocks that a request is lost.
#[must_use]
pub(crate) const fn is_guessed(socket: &Socket) -> bool {
    socket.marks & MARK_GUESSED != 0
}

/// `TERM`, or the number of what has no name.
#[must_use]
pub(crate) fn signal_name(signal: u32) -> String {
    let number = i32::try_from(signal).unwrap_or(0);
    drain::signal_name(number)
}

/// Who has sent a KILL; few enough to be a label of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum By {
    /// The kernel, which had no memory left.
    NoMemory,
    /// The kernel, for another reason.
    Kernel,
    /// The first process of the host.
    Init,
    Plumb,
    Itself,
    Other,
}

impl By {
    pub(crate) const ALL: [Self; 6] =
        [Self::NoMemory, Self::Kernel, Self::Init, Self::Plumb, Self::Itself, Self::Other];

    #[must_use]
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::NoMemory => "no_memory",
            Self::Kernel => "kernel",
            Self::Init => "init",
            Self::Plumb => "plumb",
            Self::Itself => "itself",
            Self::Other => "other",
        }
    }
}

/// Who has sent a signal.
#[must_use]
pub(crate) fn by_whom(signal: &Signal) -> By {
    match signal.header.process.tgid {
        _ if signal.code == BY_KERNEL => By::Kernel,
        1 => By::Init,
        own if own == std::process::id() => By::Plumb,
        own if own == signal.target.tgid => By::Itself,
        _ => By::Other,
    }
}

/// The KILLs among events, each with its sender. That there was no memory is told right after the KILL.
pub(crate) fn kills(events: &[Event]) -> impl Iterator<Item = (&Signal, By)> {
    let signals = || {
        events.iter().filter_map(|event| match event {
            Event::Signal(signal) => Some(signal),
            _ => None,
        })
    };
    let victims: HashSet<u32> =
        signals().filter(|signal| signal.what == SIGNAL_NO_MEMORY).map(|signal| signal.target.tgid).collect();
    signals().filter(|signal| signal.what == SIGNAL_GENERATED && signal.signal == KILL).map(move |signal| {
        match by_whom(signal) {
            By::Kernel if victims.contains(&signal.target.tgid) => (signal, By::NoMemory),
            by => (signal, by),
        }
    })
}

/// Who has sent a signal, in words.
#[must_use]
pub(crate) fn sender(signal: &Signal) -> String {
    let by = signal.header.process.tgid;
    let comm = text::terminated(&signal.header.comm);
    match (by_whom(signal), by == signal.target.tgid) {
        (By::Kernel, true) => "the kernel".to_owned(),
        (By::Kernel, false) => format!("the kernel, as pid {by} ({comm}) ran,"),
        (By::Itself, _) => "it".to_owned(),
        _ => format!("pid {by} ({comm})"),
    }
}

/// Connections of one service that are remembered, so that none counts twice.
const MAX_PEERS: usize = 65_536;
/// Lost requests that are told one by one.
pub(crate) const MAX_EXAMPLES: usize = 64;

/// The requests that a service has lost.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    lost: BTreeMap<Class, u64>,
    /// Of these it was told from the kernel's clocks.
    pub guessed: u64,
    peers: HashSet<Peer>,
}

impl Tally {
    /// Counts a request, once per connection: one that comes in several packets is lost several times. Returns its class if
    /// it is new.
    pub(crate) fn take(&mut self, socket: &Socket) -> Option<Class> {
        let class = Class::of(socket)?;
        if self.peers.len() < MAX_PEERS && !self.peers.insert(socket.peer) {
            return None;
        }
        *self.lost.entry(class).or_default() += 1;
        self.guessed += u64::from(is_guessed(socket));
        Some(class)
    }

    #[must_use]
    pub(crate) fn lost(&self) -> &BTreeMap<Class, u64> {
        &self.lost
    }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;
    use plumb_common::task::ProcKey;

    use super::*;

    fn socket(what: u32, marks: u32, port: u32) -> Socket {
        let mut address = [0; 16];
        address[10..].copy_from_slice(&[0xff, 0xff, 127, 0, 0, 1]);
        Socket { what, marks, peer: Peer { address, port, local_port: 80 }, unread: 5, ..Socket::zeroed() }
    }

    #[test]
    fn a_request_is_lost_once_and_of_the_class_of_its_first_event() {
        let mut tally = Tally::default();
        for (what, marks, port, class) in [
            (LOST_BACKLOG, 0, 1, Some(Class::AcceptQueue)),
            (LOST_UNREAD, MARK_USED, 2, Some(Class::KeepAliveRace)),
            (LOST_LATE, MARK_USED, 3, Some(Class::KeepAliveRace)),
            (LOST_LATE, 0, 4, Some(Class::Unread)),
            (LOST_UNANSWERED, MARK_USED | MARK_GUESSED, 5, Some(Class::Unanswered)),
            (LOST_BACKLOG, 0, 5, None),
            (LISTENER_CLOSED, 0, 6, None),
        ] {
            assert_eq!(tally.take(&socket(what, marks, port)), class, "{what} {marks}");
        }
        let counts: Vec<u64> = tally.lost().values().copied().collect();
        assert_eq!((counts, tally.guessed), (vec![1, 2, 1, 1], 1));
    }

    #[test]
    fn whoever_kills_is_known_and_that_there_was_no_memory() {
        let kill = |by: u32, target: u32, code: u32| {
            let mut signal = Signal::zeroed();
            (signal.what, signal.signal, signal.code) = (SIGNAL_GENERATED, KILL, code);
            (signal.header.process, signal.target) = (ProcKey::new(by, 1), ProcKey::new(target, 1));
            signal
        };
        let mut term = kill(5, 6, 0);
        term.signal = 15;
        let mut victim = kill(40, 7, BY_KERNEL);
        victim.what = SIGNAL_NO_MEMORY;
        let signals = [
            kill(40, 7, BY_KERNEL),
            victim,
            kill(40, 8, BY_KERNEL),
            kill(1, 9, 0),
            kill(std::process::id(), 10, 0),
            kill(11, 11, 0),
            kill(12, 13, 0),
            term,
        ];
        let events = signals.map(Event::Signal);
        let found: Vec<By> = kills(&events).map(|(_, by)| by).collect();
        assert_eq!(found, By::ALL);
    }

    #[test]
    fn an_event_is_told_in_words() {
        let lost = SocketSeen::new(&socket(LOST_UNREAD, MARK_USED | MARK_EXITING, 4711));
        assert_eq!(
            lost.words(),
            "port 80 on a kept connection as it was closed, from 127.0.0.1:4711, 5 bytes not read, the process ended"
        );
        assert_eq!(SocketSeen::new(&socket(LISTENER_CLOSED, 0, 0)).words(), "port 80, 5 not accepted");
        let mut signal = Signal::zeroed();
        (signal.signal, signal.target, signal.code) = (15, ProcKey::new(7, 1), 0);
        assert_eq!(SignalSeen::new(&signal).words(), "TERM for pid 7: waits");
        (signal.what, signal.handler) = (SIGNAL_DELIVERED, 0x4000);
        assert_eq!(SignalSeen::new(&signal).words(), "TERM for pid 7: handler");
        (signal.signal, signal.code) = (9, BY_KERNEL);
        assert!(SignalSeen::new(&signal).words().contains("KILL for pid 7: handler, by the kernel"));
    }
}

//! What the kernel side says of the sockets and signals of followed services.

use bytemuck::{Pod, Zeroable};

use crate::{event::Header, task::ProcKey};

/// A signal was made for a process: `signal_generate`, in whoever sent it.
pub const SIGNAL_GENERATED: u32 = 1;
/// A thread of a process takes a signal: `signal_deliver`. Not one that ends the process by default, nor KILL.
pub const SIGNAL_DELIVERED: u32 = 2;
/// The kernel ended a process because there was no memory: `mark_victim`, after its KILL.
pub const SIGNAL_NO_MEMORY: u32 = 3;

/// A signal of a followed process, or a KILL of anybody. The header is who ran: the sender, unless the kernel was at work
/// for somebody else just then (`code` of a timer).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Signal {
    pub header: Header,
    /// Whose signal it is.
    pub target: ProcKey,
    /// `sa_handler` of what takes it: 0 the default, 1 it is ignored, else a function of the process; only delivered.
    pub handler: u64,
    /// `SIGNAL_*`.
    pub what: u32,
    pub signal: u32,
    /// `si_code` (sigaction(2)), an `i32`: 0 kill(2), 128 the kernel.
    pub code: u32,
    /// 0 it waits to be taken, 1 it was ignored, 2 one was waiting already, else it was lost (`TRACE_SIGNAL_*`,
    /// include/trace/events/signal.h); only generated.
    pub result: u32,
}

/// A listener that is followed: its port in a network namespace.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Port {
    /// Inode number of the network namespace.
    pub netns: u32,
    /// In this host's byte order.
    pub port: u32,
}

/// The other end of a connection, and the followed port.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Peer {
    /// IPv6, or IPv4 mapped into it.
    pub address: [u8; 16],
    /// In this host's byte order.
    pub port: u32,
    pub local_port: u32,
}

/// A listener has left LISTEN: nobody can connect any more; `unread` connections were waiting to be accepted.
pub const LISTENER_CLOSED: u32 = 1;
/// A connection was reset before anybody had accepted it, or a request came for one that never was.
pub const LOST_BACKLOG: u32 = 2;
/// A connection was closed with data in it that nobody had read.
pub const LOST_UNREAD: u32 = 3;
/// A connection was closed, and after what was last read from it nothing had been sent.
pub const LOST_UNANSWERED: u32 = 4;
/// Data came for a connection that had been closed.
pub const LOST_LATE: u32 = 5;

/// In `Socket::marks`: something had been sent on this connection before.
pub const MARK_USED: u32 = 1;
/// In `Socket::marks`: whether it was answered is told from the kernel's clocks: nothing was seen of it before.
pub const MARK_GUESSED: u32 = 1 << 1;
/// In `Socket::marks`: closed because its process ended.
pub const MARK_EXITING: u32 = 1 << 2;

/// Something became of a socket of a followed port. The header is who ran: whoever closed, unless a packet came just then.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Socket {
    pub header: Header,
    pub peer: Peer,
    /// Which followed service, as the agent has numbered them.
    pub slot: u32,
    /// `LISTENER_CLOSED` or `LOST_*`.
    pub what: u32,
    /// `MARK_*` bits.
    pub marks: u32,
    /// Bytes that nobody had read.
    pub unread: u32,
    /// Bytes that the other end had not acknowledged.
    pub unsent: u32,
    /// Always 0.
    pub reserved: u32,
}

/// What is known of a connection since it is followed.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Conversation {
    /// `copied_seq` when something was last sent.
    pub answered: u32,
    /// Always 0.
    pub reserved: u32,
}

/// A connection to a followed port, in its network namespace.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Connection {
    pub peer: Peer,
    pub netns: u32,
}

/// What is known of a connection that was closed.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Closed {
    pub marks: u32,
    /// `rcv_nxt` then. Another connection of the same addresses begins elsewhere.
    pub received: u32,
}

/// What is counted of each service, without an event.
pub const COUNTERS: [&str; 7] = [
    "connected",
    "closed_by_service",
    "closed_by_peer",
    "reset_by_peer",
    "refused",
    "aborted",
    "crowded_out",
];
/// Handshakes that were completed.
pub const CONNECTED: u32 = 0;
/// Connections that the service closed first, in order.
pub const CLOSED: u32 = 1;
/// And that the other end closed first.
pub const PEER_CLOSED: u32 = 2;
pub const PEER_RESET: u32 = 3;
/// Attempts to connect where nobody listened any more.
pub const REFUSED: u32 = 4;
/// Connections that the service reset, with nothing lost.
pub const ABORTED: u32 = 5;
/// Connections for which there was no room: whether they are answered is told from the kernel's clocks.
pub const CROWDED_OUT: u32 = 6;

/// Services that can be followed at a time.
pub const SLOTS: u32 = 64;
/// Their ports.
pub const MAX_PORTS: u32 = 1024;
/// Their processes.
pub const MAX_TARGETS: u32 = 4096;
/// Their connections: of more it is told from the kernel's clocks whether they were answered.
pub const MAX_CONVERSATIONS: u32 = 65_536;
/// Connections that were closed lately; the oldest are forgotten.
pub const MAX_CLOSED: u32 = 16_384;

//! What becomes of the TCP sockets of followed ports: of listeners, and of requests that nobody answers.
//!
//! A connection is of a service by its port and network namespace, not by who runs: most of it happens when a packet comes.
//! A request is taken for answered when something is sent after it was read; that is what can be seen without its bytes.
#![allow(clippy::needless_pass_by_value, reason = "the attribute macro passes the context by value")]

use aya_ebpf::{
    macros::{btf_tracepoint, fentry},
    programs::{BtfTracePointContext, FEntryContext},
};
use plumb_common::{
    counts,
    event::KIND_SOCKET,
    offsets,
    sockets::{
        ABORTED, CLOSED, CONNECTED, COUNTERS, CROWDED_OUT, Closed, Connection, Conversation, LISTENER_CLOSED,
        LOST_BACKLOG, LOST_LATE, LOST_UNANSWERED, LOST_UNREAD, MARK_EXITING, MARK_GUESSED, MARK_USED,
        PEER_CLOSED, PEER_RESET, Peer, Port, REFUSED, Socket,
    },
};

use crate::{
    emit,
    kernel::{self, Typed},
    maps,
};

/// include/net/tcp_states.h.
const ESTABLISHED: u32 = 1;
const SYN_RECV: u32 = 3;
const FIN_WAIT1: u32 = 4;
const FIN_WAIT2: u32 = 5;
const TIME_WAIT: u8 = 6;
const CLOSE: u32 = 7;
const CLOSE_WAIT: u32 = 8;
const LISTEN: u32 = 10;

const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
const TCP: u16 = 6;
/// Bit of `sk_flags` (`SOCK_DEAD`, include/net/sock.h): nobody has the socket open any more.
const DEAD: u64 = 1;
/// And `SOCK_DONE`: the other end has closed.
const DONE: u64 = 2;
/// In `CLOSED`, beside `MARK_USED`: that this connection has lost a request is told.
const TOLD: u32 = 1 << 31;
/// So close to the end of a connection its packets begin; the first number of another one of the same addresses grows by
/// this in half a second, and addresses are used again after a second at the earliest (`secure_tcp_seq`,
/// net/core/secure_seq.c; `tcp_twsk_unique`, net/ipv4/tcp_ipv4.c).
const NEAR: u32 = 8 << 20;
/// `PF_EXITING` of include/linux/sched.h.
const EXITING: u32 = 4;
/// Flags of a TCP header, in its byte 13.
const SYN: u8 = 2;
const FIN: u8 = 1;
const RST: u8 = 4;
const ACK: u8 = 16;

/// The slot of a followed socket.
///
/// # Safety
/// `sk` is a typed pointer to a `struct sock`, not null.
#[inline(always)]
unsafe fn slot(sk: Typed) -> Option<(u32, Port)> {
    // SAFETY: as required; a socket's namespace outlives it.
    let (mut port, netns) = unsafe {
        let net = kernel::follow(sk, offsets::SOCK_NET)?;
        (kernel::load::<u16>(sk, offsets::SOCK_NUM)?, kernel::load::<u32>(net, offsets::NET_INUM)?)
    };
    if port == 0 {
        // Given back before the state is changed to CLOSE (`tcp_set_state`, net/ipv4/tcp.c).
        port = u16::from_be(kernel::read_or_zero(sk as u64, offsets::SOCK_SOURCE));
    }
    let port = Port { netns, port: u32::from(port) };
    // SAFETY: the value is read at once.
    unsafe { maps::PORTS.get(port) }.map(|slot| (*slot, port))
}

#[inline(always)]
fn count(slot: u32, counter: u32) {
    if let Some(counters) = maps::SOCKET_COUNTS.get_ptr_mut(slot)
        && (counter as usize) < COUNTERS.len()
    {
        // Per CPU; of two programs, one of which interrupts the other, one may be forgotten.
        // SAFETY: the map's own value.
        unsafe { (*counters)[counter as usize] += 1 };
    }
}

#[inline(always)]
fn peer_of(sk: u64, port: Port) -> Peer {
    let family = kernel::read::<u16>(sk, offsets::SOCK_FAMILY).unwrap_or(0);
    let mut address = [0; 16];
    if family == AF_INET6 {
        address = kernel::read::<[u8; 16]>(sk, offsets::SOCK_REMOTE6).unwrap_or([0; 16]);
    } else if family == AF_INET {
        address = mapped(kernel::read::<[u8; 4]>(sk, offsets::SOCK_REMOTE4).unwrap_or([0; 4]));
    }
    let remote = kernel::read::<u16>(sk, offsets::SOCK_DPORT).unwrap_or(0);
    Peer { address, port: u32::from(u16::from_be(remote)), local_port: port.port }
}

/// An IPv4 address as one of IPv6.
#[inline(always)]
const fn mapped([a, b, c, d]: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

/// The sequence numbers of a connection.
struct Course {
    /// What has come, and what of it was read.
    received: u32,
    copied: u32,
    unsent: u32,
    is_used: bool,
}

#[inline(always)]
fn course(sk: u64) -> Course {
    let read = |index| kernel::read_or_zero::<u32>(sk, index);
    Course {
        received: read(offsets::TCP_RECEIVED),
        copied: read(offsets::TCP_COPIED),
        unsent: read(offsets::TCP_WRITTEN).wrapping_sub(read(offsets::TCP_UNACKED)),
        is_used: kernel::read_or_zero::<u64>(sk, offsets::TCP_BYTES_SENT) != 0,
    }
}

/// Whether something came that nothing was sent for, and `MARK_GUESSED` or 0.
#[inline(always)]
fn is_unanswered(sk: u64, course: &Course) -> (bool, u32) {
    // SAFETY: the value is read at once.
    match unsafe { maps::CONVERSATIONS.get(sk) } {
        Some(known) => (course.received != known.answered, 0),
        None if !course.is_used => (kernel::read_or_zero::<u64>(sk, offsets::TCP_BYTES_RECEIVED) != 0, 0),
        None => (guess(sk, course), MARK_GUESSED),
    }
}

/// Whether something came after what was last sent, as told by what the kernel keeps of each connection: when it last got
/// and sent data, in ticks of 1 to 10 ms. Within one tick it is told by who has acknowledged what. An answer that is not
/// acknowledged was sent later than all that came; one that is was acknowledged by a packet without data, which begins where
/// the last request ends, or by the next request, which begins there too and ends later.
#[inline(always)]
fn guess(sk: u64, course: &Course) -> bool {
    let read = |index| kernel::read_or_zero::<u32>(sk, index);
    if course.received != course.copied {
        return true;
    }
    let later = read(offsets::TCP_LAST_RECEIVED).wrapping_sub(read(offsets::TCP_LAST_SENT)) as i32;
    if later == 0 {
        course.unsent == 0 && read(offsets::TCP_LAST_ACKNOWLEDGING) != course.received
    } else {
        later > 0
    }
}

#[inline(always)]
fn tell(slot: u32, peer: Peer, what: u32, marks: u32, (unread, unsent): (u32, u32)) {
    let header = emit::by_anybody(KIND_SOCKET);
    emit::send(counts::SOCKET, Socket { header, peer, slot, what, marks, unread, unsent, reserved: 0 });
}

#[inline(always)]
const fn used(course: &Course) -> u32 {
    if course.is_used { MARK_USED } else { 0 }
}

/// `MARK_EXITING` if the running task is ending.
#[inline(always)]
fn exiting() -> u32 {
    if kernel::of_current::<u32>(offsets::TASK_FLAGS) & EXITING != 0 { MARK_EXITING } else { 0 }
}

/// `void inet_sock_set_state(const struct sock *sk, const int oldstate, const int newstate)`, since 4.16. Runs before the
/// state changes, in whoever closes or, when a packet came, in anybody.
#[btf_tracepoint(function = "inet_sock_set_state")]
pub(crate) fn inet_sock_set_state(ctx: BtfTracePointContext) -> i32 {
    let (sk, old, new): (Typed, u32, u32) = (ctx.arg(0), ctx.arg(1), ctx.arg(2));
    // SAFETY: the tracepoint's argument is a socket.
    let Some((slot, port)) = (unsafe { slot(sk) }) else { return 0 };
    // SAFETY: as above.
    if unsafe { kernel::load::<u16>(sk, offsets::SOCK_PROTOCOL) } != Some(TCP) {
        return 0;
    }
    let sk = sk as u64;
    match (old, new) {
        (LISTEN, CLOSE) => {
            let waiting = kernel::read_or_zero::<u32>(sk, offsets::SOCK_BACKLOG);
            tell(slot, peer_of(sk, port), LISTENER_CLOSED, exiting(), (waiting, 0));
        }
        (SYN_RECV, ESTABLISHED) => {
            count(slot, CONNECTED);
            let known = Conversation { answered: course(sk).copied, reserved: 0 };
            if maps::CONVERSATIONS.insert(sk, known, 0).is_err() {
                count(slot, CROWDED_OUT);
            }
        }
        // `inet_csk_reqsk_queue_add` (net/ipv4/inet_connection_sock.c): the listener was closed amid the end of the handshake.
        // A second socket for one connection (`inet_ehash_nolisten`, net/ipv4/inet_hashtables.c) still has its port.
        (SYN_RECV, CLOSE) if kernel::read_or_zero::<u32>(sk, offsets::SOCK_ERR) == 0 && is_unbound(sk) => {
            not_accepted(slot, port, peer_of(sk, port), &course(sk));
        }
        (ESTABLISHED, CLOSE_WAIT) => count(slot, PEER_CLOSED),
        (ESTABLISHED, FIN_WAIT1) => closed(sk, slot, port),
        (ESTABLISHED | CLOSE_WAIT, CLOSE) => {
            ended(sk, slot, port, old);
            let _ = maps::CONVERSATIONS.remove(sk);
        }
        (FIN_WAIT1 | FIN_WAIT2, CLOSE) => {
            came_late(sk, slot, port);
            let _ = maps::CONVERSATIONS.remove(sk);
        }
        (_, CLOSE) => {
            let _ = maps::CONVERSATIONS.remove(sk);
        }
        _ => {}
    }
    0
}

/// The service closes first, in order.
#[inline(always)]
fn closed(sk: u64, slot: u32, port: Port) {
    let (course, peer) = (course(sk), peer_of(sk, port));
    if is_nobodys(sk) {
        return not_accepted(slot, port, peer, &course);
    }
    count(slot, CLOSED);
    lose(sk, slot, port, peer, &course);
}

/// Whether no process has got a connection from its listener, nor closed it.
#[inline(always)]
fn is_nobodys(sk: u64) -> bool {
    kernel::read_or_zero::<u64>(sk, offsets::SOCK_SOCKET) == 0
        && kernel::read_or_zero::<u64>(sk, offsets::SOCK_FLAGS) & DEAD == 0
}

/// Whether a socket has given its port back.
#[inline(always)]
fn is_unbound(sk: u64) -> bool {
    kernel::read_or_zero::<u16>(sk, offsets::SOCK_NUM) == 0
}

/// Remembers that a connection is closed.
#[inline(always)]
fn remember(port: Port, peer: Peer, marks: u32, received: u32) {
    let _ = maps::CLOSED.insert(Connection { peer, netns: port.netns }, Closed { marks, received }, 0);
}

/// What had come since the service shut its end down, and nobody read, when it is closed.
#[inline(always)]
fn came_late(sk: u64, slot: u32, port: Port) {
    let flags = kernel::read_or_zero::<u64>(sk, offsets::SOCK_FLAGS);
    if flags & DEAD != 0 || kernel::read_or_zero::<u32>(sk, offsets::SOCK_ERR) != 0 {
        return;
    }
    let (course, peer) = (course(sk), peer_of(sk, port));
    // The FIN of the other end counts as a byte. Whoever reads what came before it cannot answer any more.
    let unread = course.received.wrapping_sub(course.copied).saturating_sub(u32::from(flags & DONE != 0));
    // SAFETY: the value is read at once.
    let is_told = unsafe { maps::CLOSED.get(Connection { peer, netns: port.netns }) }
        .is_some_and(|closed| closed.marks & TOLD != 0);
    if unread > 0 && !is_told {
        remember(port, peer, TOLD, course.received);
        tell(slot, peer, LOST_UNREAD, used(&course) | exiting(), (unread, course.unsent));
    }
}

/// Notes that a connection is closed, and tells of a request that is lost by that; whether there is one.
#[inline(always)]
fn lose(sk: u64, slot: u32, port: Port, peer: Peer, course: &Course) -> bool {
    let unread = course.received.wrapping_sub(course.copied);
    let (is_lost, guessed) = is_unanswered(sk, course);
    if unread == 0 && !is_lost {
        remember(port, peer, used(course), course.received);
        return false;
    }
    remember(port, peer, TOLD, course.received);
    let (what, guessed) = if unread > 0 { (LOST_UNREAD, 0) } else { (LOST_UNANSWERED, guessed) };
    tell(slot, peer, what, used(course) | guessed | exiting(), (unread, course.unsent));
    true
}

/// A connection ends that no process has got from its listener.
#[inline(always)]
fn not_accepted(slot: u32, port: Port, peer: Peer, course: &Course) {
    let unread = course.received.wrapping_sub(course.copied);
    remember(port, peer, TOLD, course.received);
    tell(slot, peer, LOST_BACKLOG, exiting(), (unread, course.unsent));
}

/// A connection ends at once: by a reset of either end, or because the other one is not there any more.
#[inline(always)]
fn ended(sk: u64, slot: u32, port: Port, old: u32) {
    if kernel::read_or_zero::<u32>(sk, offsets::SOCK_ERR) != 0 {
        return count(slot, PEER_RESET);
    }
    let (course, peer) = (course(sk), peer_of(sk, port));
    if is_nobodys(sk) {
        if old == ESTABLISHED {
            not_accepted(slot, port, peer, &course);
        }
        return;
    }
    // Whoever has closed its end waits for nothing.
    if old != ESTABLISHED || !lose(sk, slot, port, peer, &course) {
        count(slot, ABORTED);
    }
}

/// `void sock_send_length(struct sock *sk, int ret, int flags)`, since 6.3. Runs in whoever has sent.
#[btf_tracepoint(function = "sock_send_length")]
pub(crate) fn sock_send_length(ctx: BtfTracePointContext) -> i32 {
    let (sk, sent): (Typed, i32) = (ctx.arg(0), ctx.arg(1));
    if sent > 0 {
        answered(sk);
    }
    0
}

/// `int tcp_sendmsg(struct sock *sk, struct msghdr *msg, size_t size)`, net/ipv4/tcp.c; before 6.3.
#[fentry(function = "tcp_sendmsg")]
pub(crate) fn tcp_sendmsg(ctx: FEntryContext) -> i32 {
    answered(ctx.arg(0));
    0
}

/// `ssize_t do_tcp_sendpages(struct sock *sk, struct page *page, int offset, size_t size, int flags)`, net/ipv4/tcp.c;
/// before 6.5. By it go sendfile(2), splice(2) and TLS in the kernel.
#[fentry(function = "do_tcp_sendpages")]
pub(crate) fn do_tcp_sendpages(ctx: FEntryContext) -> i32 {
    answered(ctx.arg(0));
    0
}

/// What was read is answered now.
#[inline(always)]
fn answered(sk: Typed) {
    if sk.is_null() {
        return;
    }
    // SAFETY: the hook's argument is a socket.
    let is_tcp = unsafe { kernel::load::<u16>(sk, offsets::SOCK_PROTOCOL) } == Some(TCP);
    // SAFETY: as above.
    if is_tcp && unsafe { slot(sk) }.is_some() {
        let sk = sk as u64;
        let known = Conversation { answered: kernel::read_or_zero(sk, offsets::TCP_COPIED), reserved: 0 };
        let _ = maps::CONVERSATIONS.insert(sk, known, 0);
    }
}

/// `void tcp_send_reset(const struct sock *sk, const struct sk_buff *skb, const enum sk_rst_reason reason)`, since 6.10.
/// Before it was not called for a packet that no socket is there for.
#[btf_tracepoint(function = "tcp_send_reset")]
pub(crate) fn tcp_send_reset(ctx: BtfTracePointContext) -> i32 {
    reset(ctx.arg(0), ctx.arg(1));
    0
}

/// `static void tcp_v4_send_reset(const struct sock *sk, struct sk_buff *skb)`, net/ipv4/tcp_ipv4.c; before 6.10.
#[fentry(function = "tcp_v4_send_reset")]
pub(crate) fn tcp_v4_send_reset(ctx: FEntryContext) -> i32 {
    reset(ctx.arg(0), ctx.arg(1));
    0
}

/// As `tcp_v4_send_reset`, net/ipv6/tcp_ipv6.c.
#[fentry(function = "tcp_v6_send_reset")]
pub(crate) fn tcp_v6_send_reset(ctx: FEntryContext) -> i32 {
    reset(ctx.arg(0), ctx.arg(1));
    0
}

/// A packet is answered by a reset. Told by the packet, not by the socket, which may be none, or a small one that only
/// waits; without a packet a service resets its own connection, which is seen by the state of that.
#[inline(always)]
fn reset(sk: Typed, skb: Typed) {
    if skb.is_null() {
        return;
    }
    let (skb, sk) = (skb as u64, if sk.is_null() { 0 } else { sk as u64 });
    let head = kernel::read_or_zero::<u64>(skb, offsets::SKB_HEAD);
    let transport = head + u64::from(kernel::read_or_zero::<u16>(skb, offsets::SKB_TRANSPORT));
    // Source, destination, sequence numbers, length of the header in words, flags: RFC 9293, 3.1.
    let header = kernel::read_at_or_zero::<[u8; 14]>(transport);
    // A packet that has got as far as a socket has no device any more (`tcp_v4_rcv`, net/ipv4/tcp_ipv4.c).
    let net = if sk == 0 {
        let device = kernel::read_or_zero::<u64>(skb, offsets::SKB_DEVICE);
        kernel::read_or_zero::<u64>(device, offsets::DEVICE_NET)
    } else {
        kernel::read_or_zero::<u64>(sk, offsets::SOCK_NET)
    };
    let netns = kernel::read_or_zero::<u32>(net, offsets::NET_INUM);
    let local = u32::from(u16::from_be_bytes([header[2], header[3]]));
    let port = Port { netns, port: local };
    // SAFETY: the value is read at once.
    let Some(slot) = (unsafe { maps::PORTS.get(port) }).copied() else { return };
    if header[13] & RST != 0 {
        return;
    }
    if header[13] & (SYN | ACK) == SYN {
        return count(slot, REFUSED);
    }
    let end = kernel::read_or_zero::<u64>(skb, offsets::SKB_DATA)
        + u64::from(kernel::read_or_zero::<u32>(skb, offsets::SKB_LEN));
    let len = end.wrapping_sub(transport).wrapping_sub(u64::from(header[12] >> 4) * 4) as u32;
    // The last packet of a handshake whose listener is gone has nothing in it, and no socket.
    let is_handshake = len == 0 && sk == 0 && header[13] & (SYN | ACK | FIN) == ACK;
    if (len == 0 && !is_handshake) || len > 1 << 20 {
        return;
    }
    let network = head + u64::from(kernel::read_or_zero::<u16>(skb, offsets::SKB_NETWORK));
    let version = kernel::read_at_or_zero::<u8>(network) >> 4;
    let address = if version == 6 {
        kernel::read_at_or_zero::<[u8; 16]>(network + 8)
    } else {
        mapped(kernel::read_at_or_zero::<[u8; 4]>(network + 12))
    };
    let remote = u32::from(u16::from_be_bytes([header[0], header[1]]));
    let peer = Peer { address, port: remote, local_port: local };
    let sequence = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
    // SAFETY: the value is read at once.
    let closed = (unsafe { maps::CLOSED.get(Connection { peer, netns }) }).copied();
    // A client may have used its port again since, for a connection that nobody has accepted.
    let is_near = |closed: &Closed| (sequence.wrapping_sub(closed.received) as i32).unsigned_abs() < NEAR;
    let marks = closed.filter(is_near).map(|closed| closed.marks);
    // By then the socket is closed at once, or it only waits: its service had closed it in order, before it was followed
    // or too long ago to be remembered.
    let state = kernel::read_or_zero::<u8>(sk, offsets::SOCK_STATE);
    let was_closed = sk != 0 && (state == TIME_WAIT || u32::from(state) == CLOSE);
    let (what, marks) = match marks {
        // It comes again, or in several packets.
        Some(marks) if marks & TOLD != 0 => return,
        Some(_) if is_handshake => return,
        Some(marks) => (LOST_LATE, marks),
        None if was_closed => (LOST_LATE, MARK_USED | MARK_GUESSED),
        None => (LOST_BACKLOG, 0),
    };
    remember(port, peer, TOLD, sequence);
    tell(slot, peer, what, marks, (len, 0));
}

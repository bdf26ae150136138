//! Each way in which a process can send is an answer.
#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "all of them are for one: what the kernel is given is valid until it returns"
)]

use std::{
    fs::File,
    io::{Write, pipe},
    net::TcpStream,
    os::fd::AsRawFd,
    ptr,
};

use super::{Stage, Told, WAYS_IN, hands::*, listen, port_of};
use crate::uring::{Entry, Uring};

type Way = (&'static str, fn(&TcpStream) -> Option<isize>);

const WAYS: [Way; 10] = [
    ("write", |to| Some(unsafe { libc::write(to.as_raw_fd(), ANSWER.as_ptr().cast(), ANSWER.len()) })),
    ("writev", |to| Some(unsafe { libc::writev(to.as_raw_fd(), pieces().as_ptr(), 2) })),
    ("send", |to| Some(unsafe { libc::send(to.as_raw_fd(), ANSWER.as_ptr().cast(), ANSWER.len(), 0) })),
    ("sendto", |to| {
        let (bytes, len) = (ANSWER.as_ptr().cast(), ANSWER.len());
        Some(unsafe { libc::sendto(to.as_raw_fd(), bytes, len, 0, ptr::null(), 0) })
    }),
    ("sendmsg", |to| {
        let mut pieces = pieces();
        Some(unsafe { libc::sendmsg(to.as_raw_fd(), &message(&mut pieces), 0) })
    }),
    ("sendmmsg", |to| {
        let mut one: libc::mmsghdr = unsafe { std::mem::zeroed() };
        let mut pieces = pieces();
        one.msg_hdr = message(&mut pieces);
        let sent = unsafe { libc::sendmmsg(to.as_raw_fd(), &raw mut one, 1, 0) };
        Some(if sent == 1 { one.msg_len as isize } else { -1 })
    }),
    ("sendfile", |to| {
        let file = file();
        Some(unsafe { libc::sendfile(to.as_raw_fd(), file.as_raw_fd(), ptr::null_mut(), ANSWER.len()) })
    }),
    ("splice", |to| {
        let (from, mut into) = pipe().unwrap();
        into.write_all(ANSWER).unwrap();
        let null = ptr::null_mut();
        Some(unsafe { libc::splice(from.as_raw_fd(), null, to.as_raw_fd(), null, ANSWER.len(), 0) })
    }),
    ("io_uring send", |to| uring(OPCODE_SEND, to)),
    ("io_uring write", |to| uring(OPCODE_WRITE, to)),
];

/// The answer in two pieces.
fn pieces() -> [libc::iovec; 2] {
    let (a, b) = ANSWER.split_at(7);
    [a, b].map(|piece| libc::iovec { iov_base: piece.as_ptr().cast_mut().cast(), iov_len: piece.len() })
}

fn message(pieces: &mut [libc::iovec; 2]) -> libc::msghdr {
    // SAFETY: all zero is an empty message.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (pieces.as_mut_ptr(), pieces.len());
    message
}

fn file() -> File {
    let dir = crate::support::TempDir::new();
    let mut file = File::create_new(dir.join("answer")).unwrap();
    file.write_all(ANSWER).unwrap();
    File::open(dir.join("answer")).unwrap()
}

/// `IORING_OP_*` of linux/io_uring.h, since 5.6.
const OPCODE_WRITE: u8 = 23;
const OPCODE_SEND: u8 = 26;

/// One operation through a ring of its own; nothing where the kernel has or allows none.
fn uring(opcode: u8, to: &TcpStream) -> Option<isize> {
    let ring = Uring::new()?;
    let offset = if opcode == OPCODE_WRITE { u64::MAX } else { 0 };
    ring.submit(Entry { opcode, fd: to.as_raw_fd(), offset, bytes: ANSWER }, true);
    ring.result().map(|result| result as isize)
}

#[test]
fn whatever_is_sent_in_whatever_way_is_an_answer() {
    let mut stage = Stage::new();
    for (name, way) in WAYS {
        for (at, from) in WAYS_IN {
            let Some(listener) = listen(at) else { continue };
            let slot = stage.follow(port_of(&listener));
            let (client, server) = pair(&listener, from);
            serve(&client, &server);
            ask(&client);
            read_request(&server);
            let Some(sent) = way(&server) else {
                eprintln!("{name} is not allowed here");
                break;
            };
            assert_eq!(sent, ANSWER.len() as isize, "{name}: {}", std::io::Error::last_os_error());
            read_answer(&client);
            drop(server);
            is_closed(&client);
            stage.expect(slot, name, &Told::counting(&[("connected", 1), ("closed_by_service", 1)]));
        }
    }
    stage.is_complete();
}

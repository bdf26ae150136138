//! Fds that come from another process.

use crate::{
    Path, Result, Stage,
    create::{connected, one},
    path,
    sys::{Helper, dup_above, socketpair, sys},
    table::HIGH,
};

pub(crate) const PATHS: &[Path] = &[
    path(
        "scm-rights-send",
        "sendmsg(2) of an fd, then close(2): it is in flight, open and in no table",
        |stage| {
            let fd = dup_above(0, HIGH)?;
            let [here, _] = socketpair()?;
            stage.begin()?;
            send(here, fd)?;
            sys!(libc::SYS_close, fd)?;
            stage.closed(fd);
            Ok(())
        },
    ),
    path("scm-rights-receive", "recvmsg(2) of an fd", |stage| {
        let [here, there] = socketpair()?;
        send(here, 0)?;
        received(stage, |message| sys!(libc::SYS_recvmsg, there, message, 0))
    }),
    path("scm-rights-receive-many", "recvmmsg(2) of an fd", |stage| {
        let [here, there] = socketpair()?;
        send(here, 0)?;
        received(stage, |message| sys!(libc::SYS_recvmmsg, there, message, 1, 0, 0))
    }),
    path("scm-rights-to-process", "another process receives an fd", |stage| {
        let [here, there] = socketpair()?;
        let child = Helper::start(0, move |_| {
            let mut message = Message::new();
            sys!(libc::SYS_recvmsg, there, message.header(), 0)?;
            Ok(message.control[4])
        })?;
        stage.begin()?;
        send(here, 0)?;
        let fd = child.go()?;
        stage.claim("opened", child.pid, fd);
        Ok(())
    }),
    path("scm-pidfd", "recvmsg(2) of a sender's pidfd (SO_PASSPIDFD)", |stage| {
        const SO_PASSPIDFD: i32 = 76;
        let [here, there] = socketpair()?;
        let on = 1i32;
        sys!(libc::SYS_setsockopt, there, libc::SOL_SOCKET, SO_PASSPIDFD, &raw const on, 4)?;
        sys!(libc::SYS_write, here, &raw const *b"x", 1)?;
        received(stage, |message| sys!(libc::SYS_recvmsg, there, message, 0))
    }),
    path("so-peerpidfd", "getsockopt(2) SO_PEERPIDFD", |stage| {
        const SO_PEERPIDFD: i32 = 77;
        let listener = connected()?;
        let (mut pidfd, mut length) = (-1i32, 4u32);
        let accepted = sys!(libc::SYS_accept, listener, 0, 0)?;
        one(stage, || {
            let (level, to) = (libc::SOL_SOCKET, &raw mut pidfd);
            sys!(libc::SYS_getsockopt, accepted, level, SO_PEERPIDFD, to, &raw mut length)?;
            Ok(pidfd)
        })
    }),
    path("pidfd-getfd", "pidfd_getfd(2): an fd of another process", |stage| {
        let child = Helper::idle(0)?;
        let pidfd = sys!(libc::SYS_pidfd_open, child.pid, 0)?;
        one(stage, || sys!(libc::SYS_pidfd_getfd, pidfd, 0, 0))
    }),
];

/// A message of one byte with room for one fd.
pub(crate) struct Message {
    byte: u8,
    vector: libc::iovec,
    /// `struct cmsghdr` (length in two words, level, type), the fd, padding.
    pub(crate) control: [i32; 6],
    /// Longer than msghdr: recvmmsg writes a length behind it.
    header: [usize; 8],
}

impl Message {
    pub(crate) fn new() -> Box<Self> {
        let vector = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 1 };
        Box::new(Self { byte: b'x', vector, control: [0; 6], header: [0; 8] })
    }

    /// `struct msghdr`: name and its length, vector and its length, control and its length, flags.
    pub(crate) fn header(&mut self) -> *mut usize {
        self.vector.iov_base = (&raw mut self.byte).cast();
        let (vector, control) = (&raw mut self.vector as usize, self.control.as_mut_ptr() as usize);
        self.header = [0, 0, vector, 1, control, size_of_val(&self.control), 0, 0];
        self.header.as_mut_ptr()
    }
}

pub(crate) fn send(socket: i32, fd: i32) -> Result<()> {
    const LENGTH: i32 = 20;
    let mut message = Message::new();
    message.control = [LENGTH, 0, libc::SOL_SOCKET, libc::SCM_RIGHTS, fd, 0];
    sys!(libc::SYS_sendmsg, socket, message.header(), 0).map(drop)
}

pub(crate) fn received(stage: &mut Stage, receive: impl FnOnce(*mut usize) -> Result<i32>) -> Result<()> {
    let mut message = Message::new();
    stage.begin()?;
    receive(message.header())?;
    stage.opened(message.control[4]);
    Ok(())
}

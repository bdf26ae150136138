//! Who is at the other end of a connection to a Unix socket, by the kernel's word.
//!
//! Since 6.5 the kernel says it. Before, whoever asks shows himself: he sends a pidfd of his own with the first bytes of
//! his request, to which the kernel adds his number. Both name the same process only if the pidfd is his: while he
//! sends, nobody else has his number, and a pidfd of somebody who had it before has none any more. To compare with the number
//! of who has connected would not do: he may have ended since, and another process have it.

use std::{
    fs, io,
    mem::{MaybeUninit, size_of},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        raw::c_void,
    },
    pin::Pin,
    ptr,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::UnixStream,
};

use crate::drain::{Caller, NoProcess, Process, Refusal, pid_of};

/// `SO_PEERPIDFD` of include/uapi/asm-generic/socket.h, since 6.5.
const SO_PEERPIDFD: i32 = 77;

/// A user that nobody is, and that owns nothing: whoever is not known may do nothing.
const NOBODY: u32 = u32::MAX;

/// Whoever connected.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub caller: Caller,
    /// Of the process that connected; `None` before 6.5, or when it has ended.
    pidfd: Option<Arc<OwnedFd>>,
    shown: Shown,
}

/// Number and pidfd of a process that has shown itself.
type Shown = Arc<OnceLock<(u32, OwnedFd)>>;

impl Peer {
    /// `is_admin`: only the administrator can open that socket.
    pub(crate) fn of(connection: &Connection, is_admin: bool) -> Self {
        let Connection { stream, shown } = connection;
        let uid = stream.peer_cred().map_or(NOBODY, |credentials| credentials.uid());
        // Root of the host has the other socket; here it may be root of a container only.
        let uid = if uid == 0 && !is_admin { NOBODY } else { uid };
        Self {
            caller: Caller { uid, is_admin },
            pidfd: pidfd(stream).map(Arc::new),
            shown: Arc::clone(shown),
        }
    }

    /// The process itself, to be registered.
    pub(crate) fn process(&self) -> Result<Process, Refusal> {
        let unknown = |why: &str| Refusal::UnknownPeer(why.to_owned());
        let ended = "it has ended, or is of another pid namespace";
        let (pid, pidfd) = match (&self.pidfd, self.shown.get()) {
            (Some(pidfd), _) => (pid_of(pidfd).ok_or_else(|| unknown(ended))?, &**pidfd),
            (None, Some((pid, pidfd))) => (*pid, pidfd),
            (None, None) => {
                return Err(unknown(
                    "this kernel does not say it (SO_PEERPIDFD, since 6.5), and you have not sent a pidfd of yourself",
                ));
            }
        };
        let pidfd = pidfd.try_clone().map_err(|error| unknown(&error.to_string()))?;
        Process::of_pidfd(pid, pidfd).map_err(refusal)
    }
}

/// A process that cannot be taken, for who asked.
pub(crate) fn refusal(why: NoProcess) -> Refusal {
    match why {
        NoProcess::Denied(..) => Refusal::NobodysProcess(why.to_string()),
        why => Refusal::NoSuchProcess(why.to_string()),
    }
}

fn pidfd(stream: &UnixStream) -> Option<OwnedFd> {
    let (mut fd, mut len) = (-1_i32, size_of::<i32>() as libc::socklen_t);
    // SAFETY: both places can be written, and have room for what the kernel writes there.
    let status = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut len,
        )
    };
    // SAFETY: the kernel has made this fd for us.
    (status == 0 && fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A connection on which a client can show who he is.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: UnixStream,
    shown: Shown,
}

impl Connection {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { stream, shown: Shown::default() }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(context))?;
            let fd = self.stream.as_raw_fd();
            // SAFETY: nothing but what the kernel has written there is said to be there.
            let place = unsafe { buffer.unfilled_mut() };
            match self.stream.try_io(Interest::READABLE, || receive(fd, place)) {
                Ok((read, message)) => {
                    // SAFETY: the kernel has written that much.
                    unsafe { buffer.assume_init(read) };
                    buffer.advance(read);
                    if let Some(shown) = message.shown() {
                        // The first one counts.
                        let _ = self.shown.set(shown);
                    }
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// What came beside the bytes. Nobody but the kernel says who has sent them, unless he has all rights over this host.
#[derive(Default)]
struct Message {
    sender: Option<u32>,
    fd: Option<OwnedFd>,
}

impl Message {
    /// The sender, if the fd is a pidfd of him.
    fn shown(self) -> Option<(u32, OwnedFd)> {
        let (sender, fd) = (self.sender?, self.fd?);
        let kind = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()?;
        let kind = kind.to_string_lossy();
        // The second since 6.9.
        let is_pidfd = kind == "anon_inode:[pidfd]" || kind.starts_with("pidfd:[");
        (is_pidfd && pid_of(&fd) == Some(sender)).then_some((sender, fd))
    }
}

const SPACE: u32 = size_of::<libc::ucred>() as u32;

/// Room for the sender and an fd, aligned as a header is; the kernel keeps the fds for which there is none.
#[repr(C, align(8))]
struct Control([MaybeUninit<u8>; CONTROL]);
// SAFETY: it only calculates.
const CONTROL: usize =
    unsafe { libc::CMSG_SPACE(SPACE) + libc::CMSG_SPACE(size_of::<RawFd>() as u32) } as usize;

/// recvmsg(2): bytes from a stream, and who has sent them, if `SO_PASSCRED` is set there. Bytes of two senders, or of two
/// messages with fds, are never read at once (net/unix/af_unix.c, `unix_stream_read_generic`).
fn receive(fd: RawFd, place: &mut [MaybeUninit<u8>]) -> io::Result<(usize, Message)> {
    let mut part = libc::iovec { iov_base: place.as_mut_ptr().cast::<c_void>(), iov_len: place.len() };
    let mut control = Control([MaybeUninit::uninit(); CONTROL]);
    // SAFETY: zeroes are a message without anything.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = CONTROL;
    // SAFETY: the header names the places above, with their sizes.
    let read = unsafe { libc::recvmsg(fd, &raw mut header, libc::MSG_CMSG_CLOEXEC) };
    let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
    let mut message = Message::default();
    // SAFETY: the kernel has set the length of what it has written into the control part.
    let mut at = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    while !at.is_null() {
        // SAFETY: not null, so within what the kernel has written.
        let (kind, data) = unsafe { ((*at).cmsg_type, libc::CMSG_DATA(at)) };
        match kind {
            libc::SCM_CREDENTIALS => {
                // SAFETY: the kernel writes a whole one; the data need not be aligned.
                let sender = unsafe { ptr::read_unaligned(data.cast::<libc::ucred>()) };
                message.sender = u32::try_from(sender.pid).ok().filter(|pid| *pid > 0);
            }
            libc::SCM_RIGHTS => {
                // SAFETY: it calculates the length of a header alone.
                let head = unsafe { libc::CMSG_LEN(0) } as usize;
                // SAFETY: not null, as above.
                let count = unsafe { (*at).cmsg_len }.saturating_sub(head) / size_of::<RawFd>();
                for place in 0..count {
                    // SAFETY: within the data; the kernel has made each for us. All but the last are closed.
                    let fd = unsafe { ptr::read_unaligned(data.cast::<RawFd>().add(place)) };
                    // SAFETY: as above.
                    message.fd = Some(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
            _ => {}
        }
        // SAFETY: as above.
        at = unsafe { libc::CMSG_NXTHDR(&raw const header, at) };
    }
    Ok((read, message))
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;

    use rustix::{
        net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg, sockopt::set_socket_passcred},
        process::{PidfdFlags, getpid, pidfd_open},
    };
    use tokio::io::AsyncReadExt;

    use super::*;

    fn pair() -> (UnixStream, Connection) {
        let (client, agent) = UnixStream::pair().unwrap();
        set_socket_passcred(&agent, true).unwrap();
        (client, Connection::new(agent))
    }

    fn send(client: &UnixStream, fds: &[OwnedFd]) {
        use std::os::fd::AsFd;
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(client, &[IoSlice::new(b"ab")], &mut control, SendFlags::empty()).unwrap();
    }

    fn own() -> OwnedFd {
        pidfd_open(getpid(), PidfdFlags::empty()).unwrap()
    }

    fn another() -> (std::process::Child, OwnedFd) {
        let child = std::process::Command::new("sleep").arg("30").spawn().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        (child, pidfd_open(pid, PidfdFlags::empty()).unwrap())
    }

    #[tokio::test]
    async fn who_sends_a_pidfd_of_himself_is_known() {
        let (client, mut agent) = pair();
        send(&client, &[own()]);
        let (mut bytes, peer) = ([0; 8], Peer::of(&agent, true));
        assert_eq!((agent.read(&mut bytes).await.unwrap(), &bytes[..2]), (2, &b"ab"[..]));
        assert_eq!(peer.shown.get().unwrap().0, std::process::id());
        // It is the agent's own process here, which nobody may register.
        let peer = Peer { pidfd: None, ..peer };
        assert!(matches!(peer.process(), Err(Refusal::NobodysProcess(_))), "{:?}", peer.process());
    }

    #[tokio::test]
    async fn who_sends_anything_else_is_not() {
        let (mut child, others) = another();
        child.kill().unwrap();
        child.wait().unwrap();
        let (mut living, theirs) = another();
        let file = || OwnedFd::from(std::fs::File::open("/proc/self/stat").unwrap());
        for fds in [vec![others], vec![theirs], vec![file()], vec![own(), file()], vec![file(), file()]] {
            let (client, mut agent) = pair();
            send(&client, &fds);
            assert_eq!(agent.read(&mut [0; 8]).await.unwrap(), 2);
            assert!(agent.shown.get().is_none());
        }
        living.kill().unwrap();
        living.wait().unwrap();
        let (client, mut agent) = pair();
        client.try_write(b"ab").unwrap();
        assert_eq!(agent.read(&mut [0; 8]).await.unwrap(), 2);
        let peer = Peer { pidfd: None, ..Peer::of(&agent, true) };
        assert!(peer.process().unwrap_err().to_string().contains("a pidfd of yourself"));
    }

    #[tokio::test]
    async fn fds_that_nobody_asked_for_are_closed() {
        let (client, mut agent) = pair();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        for _ in 0..3 {
            send(&client, &(0..5).map(|_| writer.try_clone().unwrap()).collect::<Vec<_>>());
            assert_eq!(agent.read(&mut [0; 8]).await.unwrap(), 2);
        }
        drop(writer);
        // Readable at its end only when nobody has the other end any more.
        assert_eq!(rustix::io::read(&reader, &mut [0; 1]).unwrap(), 0);
    }
}

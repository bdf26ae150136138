//! Sockets as the scenarios need them.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    ptr,
    thread::sleep,
    time::{Duration, Instant},
};

use super::PATIENCE;

pub(super) const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n";
pub(super) const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

pub(super) fn connect(to: &TcpListener, from: IpAddr) -> TcpStream {
    let address = SocketAddr::new(from, to.local_addr().unwrap().port());
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

pub(super) fn accept(from: &TcpListener) -> TcpStream {
    let (stream, _) = from.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// A client, and its connection as the service has it.
pub(super) fn pair(listener: &TcpListener, from: IpAddr) -> (TcpStream, TcpStream) {
    let client = connect(listener, from);
    (client, accept(listener))
}

/// Sends, and waits until the other end's kernel has it all.
pub(super) fn deliver(mut client: &TcpStream, bytes: &[u8]) {
    client.write_all(bytes).unwrap();
    is_delivered(client);
}

/// Waits until the other end has acknowledged everything.
pub(super) fn is_delivered(client: &TcpStream) {
    let end = Instant::now() + PATIENCE;
    loop {
        let mut left = 0;
        // SAFETY: writes an int there.
        let done = unsafe { libc::ioctl(client.as_raw_fd(), libc::TIOCOUTQ, &raw mut left) };
        assert_eq!(done, 0);
        if left == 0 {
            return;
        }
        assert!(Instant::now() < end, "{left} bytes are not delivered");
        sleep(Duration::from_micros(100));
    }
}

pub(super) fn ask(client: &TcpStream) {
    deliver(client, REQUEST);
}

/// Sends a request; it may not have arrived yet.
pub(super) fn send(mut client: &TcpStream) {
    client.write_all(REQUEST).unwrap();
}

pub(super) fn read_request(server: &TcpStream) {
    read_exactly(server, REQUEST);
}

pub(super) fn read_exactly(mut from: &TcpStream, expected: &[u8]) {
    let mut bytes = vec![0; expected.len()];
    from.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, expected);
}

pub(super) fn answer(mut server: &TcpStream) {
    server.write_all(ANSWER).unwrap();
}

pub(super) fn read_answer(client: &TcpStream) {
    read_exactly(client, ANSWER);
}

/// A request, and its answer, to the end.
pub(super) fn serve(client: &TcpStream, server: &TcpStream) {
    send(client);
    read_request(server);
    answer(server);
    read_answer(client);
}

/// Waits until the other end has closed in order.
pub(super) fn is_closed(mut stream: &TcpStream) {
    assert_eq!(stream.read(&mut [0; 64]).unwrap(), 0);
}

/// Waits until the other end has reset the connection.
pub(super) fn is_reset(mut stream: &TcpStream) {
    let read = stream.read(&mut [0; 64]);
    assert_eq!(read.map_err(|error| error.kind()), Err(io::ErrorKind::ConnectionReset));
}

/// Waits until a connection that the other end had closed is reset.
pub(super) fn is_broken(stream: &TcpStream) {
    let end = Instant::now() + PATIENCE;
    while stream.take_error().unwrap().is_none() {
        assert!(Instant::now() < end);
        sleep(Duration::from_micros(100));
    }
}

pub(super) fn half_close(stream: &TcpStream) {
    stream.shutdown(Shutdown::Write).unwrap();
}

/// Has it probe, each second that nothing comes, whether the other end is there.
pub(super) fn probe(stream: &TcpStream) {
    set(stream, libc::SO_KEEPALIVE, &1_i32);
    for option in [libc::TCP_KEEPIDLE, libc::TCP_KEEPINTVL] {
        set_of(stream, libc::IPPROTO_TCP, option, &1_i32);
    }
}

fn set<T>(stream: &TcpStream, option: i32, value: &T) {
    set_of(stream, libc::SOL_SOCKET, option, value);
}

fn set_of<T>(stream: &impl AsRawFd, level: i32, option: i32, value: &T) {
    // SAFETY: the value is of that size.
    let done = unsafe {
        libc::setsockopt(stream.as_raw_fd(), level, option, ptr::from_ref(value).cast(), len_of(value))
    };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

/// Closes with a reset.
pub(super) fn abort(stream: TcpStream) {
    set(&stream, libc::SO_LINGER, &libc::linger { l_onoff: 1, l_linger: 0 });
    drop(stream);
}

/// Waits until the other end is closed: who forks beside this test holds it for a moment more.
pub(super) fn is_closed_there(stream: &TcpStream) {
    // A listener of IPv6 has those of IPv4 in its own table.
    let plain = |at: SocketAddr| (at.ip().to_canonical(), at.port());
    let [own, other] = [stream.local_addr(), stream.peer_addr()].map(|at| plain(at.unwrap()));
    let tables = || procfs::net::tcp().unwrap().into_iter().chain(procfs::net::tcp6().unwrap_or_default());
    let is_open = |entry: procfs::net::TcpNetEntry| {
        [entry.local_address, entry.remote_address].map(plain) == [other, own] && entry.inode != 0
    };
    let end = Instant::now() + PATIENCE;
    while tables().any(is_open) {
        assert!(Instant::now() < end, "{other:?} is open");
        sleep(Duration::from_millis(1));
    }
}

/// From now on the socket hears nothing: what the other end does is still on its way.
pub(super) fn hear_nothing(stream: &TcpStream) {
    // BPF_RET with 0: of no packet anything is kept.
    let mut nothing = libc::sock_filter { code: 6, jt: 0, jf: 0, k: 0 };
    set(stream, libc::SO_ATTACH_FILTER, &libc::sock_fprog { len: 1, filter: &raw mut nothing });
}

/// A listener that shares its port with others.
pub(super) fn listen_beside(at: SocketAddr) -> TcpListener {
    let socket = bound(at, libc::SO_REUSEPORT);
    // SAFETY: no preconditions.
    assert_eq!(unsafe { libc::listen(socket.as_raw_fd(), 128) }, 0);
    TcpListener::from(socket)
}

/// A client with a port of its choice, which may have been another connection's just before.
pub(super) fn connect_from(own: SocketAddr, to: SocketAddr) -> TcpStream {
    let (socket, address) = (bound(own, libc::SO_REUSEADDR), address(to));
    // SAFETY: the kernel is given an address of that size.
    let done = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len_of(&address)) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
    TcpStream::from(socket)
}

/// Nobody is connected, as the service has it, before he has sent something.
pub(super) fn defer_accept(listener: &TcpListener) {
    set_of(listener, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, &30_i32);
}

/// A socket with an address that others may have, too, as the option says.
fn bound(at: SocketAddr, option: i32) -> OwnedFd {
    // SAFETY: a new fd.
    let socket = unsafe {
        OwnedFd::from_raw_fd(libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0))
    };
    set_of(&socket, libc::SOL_SOCKET, option, &1_i32);
    let address = address(at);
    // SAFETY: the kernel is given an address of that size.
    let done = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len_of(&address)) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
    socket
}

fn address(at: SocketAddr) -> libc::sockaddr_in {
    let SocketAddr::V4(at) = at else { unreachable!() };
    libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: at.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from(*at.ip()).to_be() },
        sin_zero: [0; 8],
    }
}

fn len_of<T>(_: &T) -> libc::socklen_t {
    size_of::<T>() as libc::socklen_t
}

/// A process that has some of this one's fds open and nothing else, until it is ended by a signal.
pub(super) struct Holder(libc::pid_t);

impl Holder {
    pub(super) fn start(fds: &[RawFd]) -> Self {
        // SAFETY: the child calls nothing but the kernel.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: only calls of the kernel, in a process of its own.
            unsafe {
                for fd in 0..4096 {
                    if !fds.contains(&fd) {
                        libc::close(fd);
                    }
                }
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                loop {
                    libc::pause();
                }
            }
        }
        assert!(pid > 0);
        // Until it has closed the rest it would keep other tests' sockets.
        let end = Instant::now() + PATIENCE;
        let open = || std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        while open() > fds.len() {
            assert!(Instant::now() < end);
            sleep(Duration::from_millis(1));
        }
        Self(pid)
    }

    pub(super) fn pid(&self) -> u32 {
        self.0 as u32
    }

    /// It has not been waited for: the number is its own.
    pub(super) fn signal(&self, signal: i32) {
        // SAFETY: no preconditions.
        assert_eq!(unsafe { libc::kill(self.0, signal) }, 0);
    }

    /// Waits until it is gone; by which signal.
    pub(super) fn end(self) -> i32 {
        let mut status = 0;
        // SAFETY: writes an int there.
        assert_eq!(unsafe { libc::waitpid(self.0, &raw mut status, 0) }, self.0);
        std::mem::forget(self);
        libc::WTERMSIG(status)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // SAFETY: as above; it was not waited for.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, ptr::null_mut(), 0);
        }
    }
}

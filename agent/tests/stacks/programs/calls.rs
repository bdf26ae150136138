//! Makes fds and threads through the standard library, each from a function of its own. `MARK name` names the line
//! of the call. With a second argument each round waits for a byte on stdin, and the end of that is its end.
#![allow(clippy::undocumented_unsafe_blocks, clippy::unwrap_used, reason = "as plain as what is leaked")]

use std::{
    fs::File,
    hint::black_box,
    io::Read,
    net::{TcpListener, TcpStream},
    os::fd::{FromRawFd, OwnedFd},
    thread,
};

unsafe extern "C" {
    fn syscall(number: i64, ...) -> i64;
    fn eventfd(value: u32, flags: i32) -> i32;
    fn epoll_create(size: i32) -> i32;
    fn dup(fd: i32) -> i32;
}

/// Tells the tracer what comes next.
fn phase(number: i64) {
    unsafe { syscall(157, 0x706c_756d_i64, number, 0, 0, 0) };
}

fn owned(fd: i32) -> OwnedFd {
    unsafe { OwnedFd::from_raw_fd(black_box(fd)) }
}

#[inline(never)]
fn call_open() -> OwnedFd {
    let file = File::open("/dev/null"); // MARK open
    black_box(file).unwrap().into()
}

#[inline(never)]
fn call_socket() -> OwnedFd {
    let socket = TcpListener::bind("127.0.0.1:0"); // MARK socket
    black_box(socket).unwrap().into()
}

#[inline(never)]
fn call_accept(listener: &TcpListener) -> OwnedFd {
    let accepted = listener.accept(); // MARK accept
    black_box(accepted).unwrap().0.into()
}

#[inline(never)]
fn call_pipe() -> OwnedFd {
    let pipe = std::io::pipe(); // MARK pipe
    black_box(pipe).unwrap().0.into()
}

#[inline(never)]
fn call_dup() -> OwnedFd {
    owned(unsafe { dup(0) }) // MARK dup
}

#[inline(never)]
fn call_eventfd() -> OwnedFd {
    owned(unsafe { eventfd(0, 0) }) // MARK eventfd
}

#[inline(never)]
fn call_epoll_create() -> OwnedFd {
    owned(unsafe { epoll_create(1) }) // MARK epoll_create
}

#[inline(never)]
fn call_thread() {
    let thread = thread::spawn(|| black_box(1)); // MARK pthread_create
    black_box(thread.join()).unwrap();
}

#[inline(never)]
fn once(number: i64, listener: &TcpListener) {
    let client = (number == 2).then(|| TcpStream::connect(listener.local_addr().unwrap())); // MARK client
    phase(number);
    let fd = match number {
        0 => Some(call_open()),
        1 => Some(call_socket()),
        2 => Some(call_accept(listener)),
        3 => Some(call_pipe()),
        4 => Some(call_dup()),
        5 => Some(call_eventfd()),
        6 => Some(call_epoll_create()),
        _ => {
            call_thread();
            None
        }
    };
    phase(-1);
    black_box((fd, client));
}

fn main() {
    let rounds: u32 = std::env::args().nth(1).unwrap().parse().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let is_paced = std::env::args().len() > 2;
    for _ in 0..rounds {
        if is_paced && std::io::stdin().read_exact(&mut [0]).is_err() {
            break;
        }
        for number in 0..8 {
            once(number, &listener);
        }
    }
}

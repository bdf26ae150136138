//! A process that does what the driver of the model tests (tests/kernel/model.rs) tells it: it opens, copies
//! and closes fds, starts threads and processes, and nothing else that anybody could see.
//!
//! Commands come through shared memory, so the fd table holds nothing but what the model put there: 0 is a
//! pipe whose other end the driver holds, 3 and 4 are the mailbox. Usage: puppet FILE SLOT.

mod protocol;
mod sys;

use std::{
    env,
    ffi::CString,
    fs::OpenOptions,
    os::{fd::AsRawFd, unix::ffi::OsStringExt},
    ptr,
    sync::atomic::{AtomicU32, AtomicUsize, Ordering::SeqCst},
};

use protocol::{Command, Shared, THREADS};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const STACK: usize = 64 << 10;
/// What a thread of this process does next.
const WAIT: u32 = 0;
const ACT: u32 = 1;
const END: u32 = 2;

/// The stack is the one of the same number, except for the thread that ran `main`.
struct Thread {
    next: AtomicU32,
    /// 0 when there is no such thread.
    tid: AtomicU32,
}

static THREAD: [Thread; THREADS] =
    [const { Thread { next: AtomicU32::new(WAIT), tid: AtomicU32::new(0) } }; THREADS];
static STACKS: AtomicUsize = AtomicUsize::new(0);
static SHARED: AtomicUsize = AtomicUsize::new(0);
static SLOT: AtomicUsize = AtomicUsize::new(0);
/// Program and file, for exec.
static ARGUMENTS: [AtomicUsize; 2] = [const { AtomicUsize::new(0) }; 2];

fn main() -> Result<()> {
    let mut arguments = env::args_os();
    let (Some(program), Some(file), Some(slot)) = (arguments.next(), arguments.next(), arguments.next())
    else {
        return Err("usage: puppet FILE SLOT".into());
    };
    let slot: usize = slot.to_str().ok_or("SLOT is a number")?.parse()?;
    let shared = OpenOptions::new().read(true).write(true).open(&file)?;
    let map = |length: usize, flags: i32, fd: i32| {
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at =
            unsafe { libc::mmap(ptr::null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
        if at == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(at as usize) }
    };
    SHARED.store(map(size_of::<Shared>(), libc::MAP_SHARED, shared.as_raw_fd())?, SeqCst);
    drop(shared);
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    STACKS.store(map(STACK * THREADS, anonymous, -1)?, SeqCst);
    SLOT.store(slot, SeqCst);
    for (kept, argument) in ARGUMENTS.iter().zip([program, file]) {
        kept.store(CString::new(argument.into_vec())?.into_raw() as usize, SeqCst);
    }
    THREAD[0].tid.store(std::process::id(), SeqCst);

    let done = shared_memory().slots[slot].done.load(SeqCst);
    if slot == protocol::STAGE && done == 0 {
        // SAFETY: no pointers. The driver's thread that started this process waits for it to the end.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1);
            // Nobody waits for a puppet: it goes when it has exited.
            libc::signal(libc::SIGCHLD, libc::SIG_IGN);
        }
        // What the driver's own parents left open.
        sys::plain(libc::SYS_close_range, [3, u32::MAX, 0]);
        finish(None);
    } else {
        // This was an exec.
        sys::plain(libc::SYS_fcntl, [0, libc::F_DUPFD as u32, protocol::STARTED_FD]);
        sys::plain(libc::SYS_close, [protocol::STARTED_FD, 0, 0]);
        finish(Some(&[0]));
    }
    act(0)
}

fn shared_memory() -> &'static Shared {
    // SAFETY: mapped in main, before anything else, for as long as the process lives; all of it is atomic.
    unsafe { &*(SHARED.load(SeqCst) as *const Shared) }
}

fn slot() -> &'static protocol::Slot {
    &shared_memory().slots[SLOT.load(SeqCst)]
}

/// The next command is done; `None` where there was none.
fn finish(reply: Option<&[i32]>) {
    let slot = slot();
    let done = slot.done.load(SeqCst);
    let command = &slot.queue[done as usize % protocol::QUEUE];
    for (to, value) in command.reply.iter().zip(reply.unwrap_or_default()) {
        to.store(*value, SeqCst);
    }
    let wakes = reply.is_none() || command.wakes.load(SeqCst) != 0;
    slot.done.store(done.wrapping_add(1), SeqCst);
    if wakes {
        sys::wake(&slot.done);
    }
}

/// Sleeps until `ready`, and ends with the driver.
fn wait_until(word: &AtomicU32, ready: impl Fn(u32) -> bool) {
    loop {
        let value = word.load(SeqCst);
        // The stage stays: orphans go only when their parent has seen them end.
        let is_stage = SLOT.load(SeqCst) == protocol::STAGE;
        let over = !is_stage && shared_memory().over.load(SeqCst) != 0;
        if ready(value) && !over {
            return;
        }
        if over || is_orphan() {
            exit(0);
        }
        sys::wait(word, value, true);
    }
}

/// Whether nobody holds the other end of stdin any more.
fn is_orphan() -> bool {
    let mut stdin = libc::pollfd { fd: 0, events: 0, revents: 0 };
    // SAFETY: one live pollfd.
    unsafe { sys::call(libc::SYS_poll, [&raw mut stdin as usize, 1, 0, 0, 0, 0]) };
    stdin.revents & libc::POLLHUP != 0
}

fn exit(code: u32) {
    sys::plain(libc::SYS_exit_group, [code, 0, 0]);
}

/// Waits for its turn.
extern "C" fn thread(index: usize) -> ! {
    let next = &THREAD[index].next;
    loop {
        match next.load(SeqCst) {
            WAIT => sys::wait(next, WAIT, false),
            ACT => act(index),
            _ => {
                sys::plain(libc::SYS_exit, [0; 3]);
            }
        }
    }
}

fn tell(index: usize, what: u32) {
    THREAD[index].next.store(what, SeqCst);
    sys::wake(&THREAD[index].next);
}

/// Does the commands as they come.
fn act(index: usize) -> ! {
    loop {
        let slot = slot();
        let done = slot.done.load(SeqCst);
        if slot.filled.load(SeqCst) == done {
            wait_until(&slot.filled, |filled| filled != done);
        }
        let command = &slot.queue[done as usize % protocol::QUEUE];
        if let Some(next) = run(command, index) {
            THREAD[index].next.store(WAIT, SeqCst);
            finish(Some(&[0]));
            tell(next, ACT);
            thread(index);
        }
    }
}

/// Does one command; the number of the thread that goes on, where it is another.
fn run(command: &Command, index: usize) -> Option<usize> {
    let [operation, first, second, third, fourth] = command.words.each_ref().map(|word| word.load(SeqCst));
    let one = |reply: i32| finish(Some(&[reply]));
    match operation {
        protocol::CALL => one(sys::plain(i64::from(first), [second, third, fourth])),
        protocol::OPEN => {
            let path = c"/dev/null".as_ptr() as usize;
            let arguments = [libc::AT_FDCWD as usize, path, first as usize, 0, 0, 0];
            // SAFETY: a live path.
            one(unsafe { sys::call(libc::SYS_openat, arguments) });
        }
        protocol::MEMFD => {
            let name = c"model".as_ptr() as usize;
            // SAFETY: a live name.
            one(unsafe { sys::call(libc::SYS_memfd_create, [name, first as usize, 0, 0, 0, 0]) });
        }
        protocol::PIPE | protocol::SOCKETPAIR => {
            let mut pair = [0i32; 2];
            let to = (&raw mut pair) as usize;
            // SAFETY: room for two fds.
            let result = unsafe {
                if operation == protocol::PIPE {
                    sys::call(libc::SYS_pipe2, [to, first as usize, 0, 0, 0, 0])
                } else {
                    sys::call(libc::SYS_socketpair, [libc::AF_UNIX as usize, first as usize, 0, to, 0, 0])
                }
            };
            finish(Some(&[result, pair[0], pair[1]]));
        }
        protocol::SEND => one(send(first as i32, second as usize)),
        protocol::RECEIVE => finish(Some(&receive(first))),
        protocol::FORK => fork(first as usize, second, index),
        protocol::THREAD => one(start_thread(first as usize, second)),
        protocol::PASS => return Some(first as usize),
        protocol::END => {
            tell(first as usize, END);
            one(0);
        }
        protocol::RENAME => one(rename(first != 0)),
        protocol::EXEC => one(exec()),
        protocol::EXIT => {
            one(0);
            exit(first);
        }
        protocol::KILL => {
            let pid = shared_memory().slots[first as usize].pid.load(SeqCst);
            one(sys::plain(libc::SYS_kill, [pid as u32, libc::SIGKILL as u32, 0]));
        }
        protocol::AWAIT => {
            let behind = |done: u32| done.wrapping_sub(second) as i32 > 0;
            wait_until(&shared_memory().slots[first as usize].done, behind);
            one(0);
        }
        _ => one(-libc::ENOSYS),
    }
    None
}

fn start_thread(index: usize, flags: u32) -> i32 {
    let thread_of = &THREAD[index];
    // The one that was here before has been told to end.
    loop {
        match thread_of.tid.load(SeqCst) {
            0 => break,
            tid => sys::wait(&thread_of.tid, tid, true),
        }
    }
    thread_of.next.store(WAIT, SeqCst);
    let end = STACKS.load(SeqCst) + (index + 1) * STACK;
    // SAFETY: the stack of this number is free, as was just awaited.
    unsafe { sys::start(flags, end, &thread_of.tid, thread, index) }
}

fn fork(child: usize, flags: u32, index: usize) {
    // SAFETY: no stack is given, so the child goes on here on its copy; nothing of libc is used by it.
    match unsafe { sys::call(libc::SYS_clone, [flags as usize, 0, 0, 0, 0, 0]) } {
        0 => {
            for (other, thread) in THREAD.iter().enumerate() {
                thread.next.store(WAIT, SeqCst);
                thread.tid.store(u32::from(other == index), SeqCst);
            }
            SLOT.store(child, SeqCst);
        }
        pid => {
            shared_memory().slots[child].pid.store(pid, SeqCst);
            finish(Some(&[pid]));
        }
    }
}

fn rename(twice: bool) -> i32 {
    let set = |name: *const libc::c_char| {
        let option = libc::PR_SET_NAME as usize;
        // SAFETY: a live string.
        unsafe { sys::call(libc::SYS_prctl, [option, name as usize, 0, 0, 0, 0]) }
    };
    let mut own = [0 as libc::c_char; 16];
    let option = libc::PR_GET_NAME as usize;
    // SAFETY: room for a name.
    unsafe { sys::call(libc::SYS_prctl, [option, (&raw mut own) as usize, 0, 0, 0, 0]) };
    if twice {
        set(c"renamed".as_ptr());
    }
    set(own.as_ptr())
}

/// Returns only when it fails.
fn exec() -> i32 {
    let mut number = [0u8; 3];
    let slot = SLOT.load(SeqCst) as u8;
    (number[0], number[1]) = (b'0' + slot / 10, b'0' + slot % 10);
    let [program, file] = ARGUMENTS.each_ref().map(|argument| argument.load(SeqCst));
    let argv = [program, file, (&raw const number) as usize, 0];
    let envp = [0usize];
    let arguments = [program, (&raw const argv) as usize, (&raw const envp) as usize, 0, 0, 0];
    // SAFETY: live strings and arrays that end with a null.
    unsafe { sys::call(libc::SYS_execve, arguments) }
}

/// Room for one control message of fds, aligned as it must be.
#[repr(C)]
struct Control {
    header: libc::cmsghdr,
    /// Even, so that nothing is left over behind them.
    fds: [i32; protocol::MAX_SENT + 1],
}

fn message<'a>(control: &'a mut Control, length: usize, byte: &'a mut libc::iovec) -> libc::msghdr {
    // SAFETY: zero is a valid value of each field.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut *byte, 1);
    (message.msg_control, message.msg_controllen) = ((&raw mut *control).cast(), length);
    message
}

fn send(first: i32, count: usize) -> i32 {
    let length = size_of::<libc::cmsghdr>() + 4 * count;
    let header =
        libc::cmsghdr { cmsg_len: length, cmsg_level: libc::SOL_SOCKET, cmsg_type: libc::SCM_RIGHTS };
    let mut control = Control { header, fds: [first, first + 1, first + 2, 0] };
    let mut byte = 0u8;
    let mut part = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let message = message(&mut control, length.next_multiple_of(8), &mut part);
    let [to, at] = [protocol::MAIL_OUT as usize, (&raw const message) as usize];
    // SAFETY: the message points to live memory of the right size.
    unsafe { sys::call(libc::SYS_sendmsg, [to, at, libc::MSG_DONTWAIT as usize, 0, 0, 0]) }
}

fn receive(flags: u32) -> [i32; 4] {
    let header = libc::cmsghdr { cmsg_len: 0, cmsg_level: 0, cmsg_type: 0 };
    let mut control = Control { header, fds: [0; 4] };
    let mut byte = 0u8;
    let mut part = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let mut message = message(&mut control, size_of::<Control>(), &mut part);
    let flags = (flags | libc::MSG_DONTWAIT as u32) as usize;
    let [from, at] = [protocol::MAIL_IN as usize, (&raw mut message) as usize];
    // SAFETY: as above.
    let result = unsafe { sys::call(libc::SYS_recvmsg, [from, at, flags, 0, 0, 0]) };
    if result < 0 {
        return [result, 0, 0, 0];
    }
    let count = control.header.cmsg_len.saturating_sub(size_of::<libc::cmsghdr>()) / 4;
    let mut reply = [count as i32, 0, 0, 0];
    reply[1..].copy_from_slice(&control.fds[..protocol::MAX_SENT]);
    for unused in reply.iter_mut().skip(count + 1) {
        *unused = 0;
    }
    reply
}

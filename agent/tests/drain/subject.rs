//! Cheap processes that end by themselves or by whatever signal reaches them, so that none can go astray unseen.

use std::{
    ffi::CStr,
    fs,
    io::{self, Write},
    mem::size_of,
    os::fd::AsRawFd,
    ptr,
};

/// A child of the test. It is a copy of the test itself until it is told to run another program.
pub(crate) struct Subject {
    pub(crate) pid: u32,
    pub(crate) start_ticks: u64,
    /// By which signals it may be ended now.
    pub(crate) may: &'static [i32],
    /// The registration that is, or was, of this process.
    pub(crate) name: Option<String>,
    is_other: bool,
    /// What it is told; its end is the end of the process.
    line: Option<io::PipeWriter>,
}

/// The other program waits for the same end of its input.
const OTHER: &CStr = c"/bin/sh";

impl Subject {
    /// With a number, which nobody has, or any. One that blocks TERM ends when it is told to.
    pub(crate) fn start(number: Option<u32>, blocks: bool) -> io::Result<Self> {
        let (input, line) = io::pipe()?;
        // SAFETY: what the kernel is told is valid until it returns, and the child does nothing that a copy of one
        // thread of many may not do.
        let pid = unsafe {
            let (mut term, mut before) = std::mem::zeroed::<(libc::sigset_t, libc::sigset_t)>();
            libc::sigemptyset(&raw mut term);
            libc::sigaddset(&raw mut term, libc::SIGTERM);
            let how = if blocks { libc::SIG_BLOCK } else { libc::SIG_UNBLOCK };
            // The child has it from its first moment on.
            libc::pthread_sigmask(how, &raw const term, &raw mut before);
            let number = number.map(|number| number as libc::pid_t);
            let mut wish: libc::clone_args = std::mem::zeroed();
            wish.exit_signal = libc::SIGCHLD as u64;
            if let Some(number) = &number {
                (wish.set_tid, wish.set_tid_size) = (ptr::from_ref(number) as u64, 1);
            }
            let pid = libc::syscall(libc::SYS_clone3, &raw const wish, size_of::<libc::clone_args>());
            if pid == 0 {
                live(input.as_raw_fd());
            }
            let error = io::Error::last_os_error();
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut());
            u32::try_from(pid).map_err(|_| error)?
        };
        let stat = fs::read(format!("/proc/{pid}/stat"))?;
        let stat = String::from_utf8_lossy(&stat).into_owned();
        let start_ticks =
            stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap().parse().unwrap();
        Ok(Self { pid, start_ticks, may: &[], name: None, is_other: false, line: Some(line) })
    }

    /// Has it run another program, and waits until it does; it may also have ended.
    pub(crate) fn exec(&mut self) {
        let exe = || fs::read_link(format!("/proc/{}/exe", self.pid)).ok();
        let before = exe();
        if std::mem::replace(&mut self.is_other, true) {
            return;
        }
        if let Some(line) = &mut self.line {
            let _ = line.write_all(b"e");
        }
        while before.is_some() && exe() == before && self.status(libc::WNOWAIT | libc::WNOHANG).is_none() {
            std::thread::yield_now();
        }
    }

    /// Ends it in its own time, unless something else has or does. The status is that of wait(2).
    pub(crate) fn end(&mut self) -> i32 {
        self.line = None;
        self.status(0).unwrap()
    }

    fn status(&self, options: i32) -> Option<i32> {
        // SAFETY: the kernel writes a siginfo_t there, which may be all zeroes.
        let info = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let options = options | libc::WEXITED;
            let waited = libc::waitid(libc::P_PID, self.pid, &raw mut info, options);
            assert_eq!(waited, 0, "{}: {}", self.pid, io::Error::last_os_error());
            info
        };
        // SAFETY: waitid has filled these in.
        let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
        let by_signal = info.si_code != libc::CLD_EXITED;
        (pid != 0).then_some(if by_signal { status } else { status << 8 })
    }
}

/// The life of a child, which has nothing of its parent's open.
///
/// # Safety
/// Only in a process of its own.
unsafe fn live(input: i32) -> ! {
    let arguments = [OTHER.as_ptr(), c"-c".as_ptr(), c"read x".as_ptr(), ptr::null()];
    // SAFETY: system calls on memory of this stack.
    unsafe {
        libc::dup2(input, 0);
        libc::syscall(libc::SYS_close_range, 1, u32::MAX, 0);
        let mut byte = 0_u8;
        if libc::read(0, (&raw mut byte).cast(), 1) == 1 {
            libc::execve(OTHER.as_ptr(), arguments.as_ptr(), arguments[3..].as_ptr());
        }
        libc::_exit(0)
    }
}

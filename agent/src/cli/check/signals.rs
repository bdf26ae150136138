//! Signals to plumb are passed on to the command, but for those that a terminal has sent to both.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use rustix::process::Signal;

/// Those that ask a program for something.
const PASSED_ON: [Signal; 7] =
    [Signal::HUP, Signal::INT, Signal::QUIT, Signal::TERM, Signal::USR1, Signal::USR2, Signal::CONT];

/// Blocked and read from a file (signalfd(2), since 2.6.27).
pub(super) struct Signals(OwnedFd);

impl Signals {
    /// To be called before there are other threads, which would take the signals.
    pub(super) fn block() -> io::Result<Self> {
        // SAFETY: the set is valid after sigemptyset; the calls have no other effect than their own.
        let fd = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in PASSED_ON {
                libc::sigaddset(&raw mut set, signal.as_raw());
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call returned a new fd, which nobody else has.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Those that have come, each with whether a terminal sent it: then the command has it too.
    pub(super) fn take(&self) -> Vec<(Signal, bool)> {
        let mut signals = Vec::new();
        // SAFETY: plain numbers.
        let mut info: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: `info` has room for so many bytes, and any bytes are valid numbers.
        while unsafe { libc::read(self.0.as_raw_fd(), (&raw mut info).cast(), size) } == size as isize {
            let by_terminal = info.ssi_code == libc::SI_KERNEL;
            let signal = i32::try_from(info.ssi_signo).ok().and_then(Signal::from_named_raw);
            signals.extend(signal.map(|signal| (signal, by_terminal)));
        }
        signals
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

//! The command: started stopped, so that it is followed from its first instruction on, with everything as it would be
//! without plumb.

use std::{
    ffi::OsString,
    io::{self, Read, Write},
    os::{
        fd::OwnedFd,
        unix::process::{CommandExt, ExitStatusExt},
    },
    process::{Command, ExitStatus},
    thread::{self, JoinHandle},
};

use rustix::process::{
    Pid, PidfdFlags, Resource, Rlimit, Signal, WaitId, WaitIdOptions, getpriority_process, getrlimit,
    pidfd_open, pidfd_send_signal, setpriority_process, setrlimit, waitid,
};

use crate::failure::{Exit, Failure};

/// What a command gets that plumb changes for itself.
#[derive(Clone, Debug)]
pub(super) struct Before {
    memlock: Rlimit,
    nice: i32,
    signals: libc::sigset_t,
}

impl Before {
    /// To be taken before kernel programs are loaded and signals are blocked.
    pub(super) fn take() -> io::Result<Self> {
        // SAFETY: an empty set is valid as all zero; the call only writes it.
        let signals = unsafe {
            let mut signals: libc::sigset_t = std::mem::zeroed();
            libc::pthread_sigmask(libc::SIG_SETMASK, std::ptr::null(), &raw mut signals);
            signals
        };
        Ok(Self { memlock: getrlimit(Resource::Memlock), nice: getpriority_process(None)?, signals })
    }

    /// In the child, between fork and exec: system calls only.
    pub(super) fn restore(&self) -> io::Result<()> {
        // It was the limit before, so it may be set.
        setrlimit(Resource::Memlock, self.memlock)?;
        setpriority_process(None, self.nice)?;
        // SAFETY: a valid set; nothing is read back.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.signals, std::ptr::null_mut()) };
        Ok(())
    }
}

/// A command that has been forked and waits for the word to go.
pub(super) struct Stopped {
    pub(super) pid: Pid,
    go: io::PipeWriter,
    started: JoinHandle<io::Result<()>>,
    name: String,
}

impl Stopped {
    pub(super) fn start(command: &[OsString], before: &Before) -> Result<Self, Failure> {
        let (mut pids, mut tell) = io::pipe()?;
        let (mut wait, go) = io::pipe()?;
        let (program, arguments) = command.split_first().expect("clap wants one word at least");
        let name = program.to_string_lossy().into_owned();
        let mut child = Command::new(program);
        child.args(arguments);
        let before = before.clone();
        let between = move || {
            before.restore()?;
            tell.write_all(&std::process::id().to_ne_bytes())?;
            // Nothing to read: plumb is gone.
            wait.read_exact(&mut [0])
        };
        // SAFETY: between fork and exec it makes system calls only.
        unsafe { child.pre_exec(between) };
        // It returns when the command has been executed, which waits for this thread.
        let started = thread::spawn(move || child.spawn().map(drop));
        let mut pid = [0; 4];
        match pids.read_exact(&mut pid) {
            Ok(()) => {
                let pid = i32::try_from(u32::from_ne_bytes(pid)).ok().and_then(Pid::from_raw);
                Ok(Self { pid: pid.expect("a child has a pid"), go, started, name })
            }
            // It could not even be forked.
            Err(_) => Err(cannot_run(&name, &ended(started))),
        }
    }

    /// Lets it run. An error means that the program cannot be executed.
    pub(super) fn release(mut self) -> Result<Running, Failure> {
        let pidfd = pidfd_open(self.pid, PidfdFlags::empty()).map_err(io::Error::from)?;
        self.go.write_all(&[1])?;
        match self.started.join() {
            Ok(Ok(())) => Ok(Running { pid: self.pid, pidfd }),
            Ok(Err(error)) => Err(cannot_run(&self.name, &error)),
            Err(_) => Err(cannot_run(&self.name, &io::Error::other("the thread that starts it panicked"))),
        }
    }
}

fn ended(started: JoinHandle<io::Result<()>>) -> io::Error {
    started.join().ok().and_then(Result::err).unwrap_or_else(|| io::Error::other("it did not start"))
}

/// As a shell has it: 127 when there is no such program, 126 when it cannot be executed.
fn cannot_run(name: &str, error: &io::Error) -> Failure {
    let (code, remedy) = match error.kind() {
        io::ErrorKind::NotFound => (127, "check its name and PATH; a shell's own words need `sh -c '…'`"),
        _ => (126, "check that it is a program that may be executed"),
    };
    Failure::new(Exit::Command(code), format!("cannot run {name}: {error}"), remedy)
}

/// The first process of the command.
pub(super) struct Running {
    pub(super) pid: Pid,
    /// Readable once it has ended (since 5.3).
    pub(super) pidfd: OwnedFd,
}

impl Running {
    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(pidfd_send_signal(&self.pidfd, signal)?)
    }

    /// How it ended, if it has; it is waited for.
    pub(super) fn try_wait(&self) -> io::Result<Option<ExitStatus>> {
        Ok(reap(self.pid)?.map(ExitStatus::from_raw))
    }
}

/// Waits for a child that has ended, as wait(2) reports it; `None` when it has not, or is not a child.
pub(super) fn reap(pid: Pid) -> io::Result<Option<i32>> {
    match waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
        Ok(Some(status)) => {
            let signal = status.terminating_signal();
            let code = status.exit_status().unwrap_or(0);
            Ok(Some(signal.map_or(code << 8, |signal| signal)))
        }
        Ok(None) | Err(rustix::io::Errno::CHILD) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

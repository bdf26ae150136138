//! The agent's end of the worker: started when it is needed, killed when it is late, replaced when it is full.

use std::{
    ffi::OsString,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, ftruncate, memfd_create},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

use super::{
    Counters,
    protocol::{self, FromWorker, MAX_ANSWER, ToWorker},
};

/// Files that one worker has mapped at most before another takes its place.
const MAX_MODULES: u32 = 512;
/// Time it has to start.
const START: Duration = Duration::from_secs(5);
/// A killed one is mostly gone within a millisecond. One that the kernel keeps is waited for later.
const DEATH: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// A worker that did not start is not tried again before this.
const PAUSE: Duration = Duration::from_secs(1);

/// What the worker may ask for while it answers.
pub(super) trait Library {
    fn module(&mut self, id: u32) -> Option<Arc<OwnedFd>>;
    fn debug(&mut self, build_id: &[u8], link: &[u8]) -> Option<OwnedFd>;
    fn code(&mut self, address: u64) -> Vec<u8>;
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failed {
    /// There is no worker, or it answers nonsense.
    NoWorker,
    /// It had parsed other files before, or was given no time; with a new worker it may work.
    Stale,
    /// It died of this module.
    Died(Option<u32>),
    /// It was killed when it was late, mostly because of this module.
    Late(Option<u32>),
}

/// A worker, or none at the moment.
pub(super) struct Worker {
    program: OsString,
    running: Option<Running>,
    /// Killed, and not yet waited for.
    dying: Vec<Child>,
    not_before: Option<Instant>,
}

struct Running {
    child: Child,
    pidfd: OwnedFd,
    socket: UnixStream,
    /// Where it says what it parses.
    marks: OwnedFd,
    modules: u32,
}

impl Running {
    /// Processor time of the worker since it began; `None` when that cannot be read.
    fn cpu(&self) -> Option<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).ok()?;
        let (_, fields) = stat.rsplit_once(')')?;
        let mut ticks = fields.split_ascii_whitespace().skip(11).take(2).map(str::parse::<u64>);
        let ticks = ticks.next()?.ok()? + ticks.next()?.ok()?;
        Some(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
    }
}

impl Worker {
    pub(super) fn new(program: impl Into<OsString>) -> Self {
        Self { program: program.into(), running: None, dying: Vec::new(), not_before: None }
    }

    /// Asks the worker; starts one if there is none.
    pub(super) fn ask(
        &mut self,
        request: &ToWorker,
        file: Option<&OwnedFd>,
        time: Duration,
        library: &mut dyn Library,
        counters: &mut Counters,
    ) -> Result<FromWorker, Failed> {
        if self.running.as_ref().is_some_and(|running| running.modules >= MAX_MODULES) {
            self.end();
            counters.recycled += 1;
        }
        if self.running.is_none() {
            self.start(counters)?;
        }
        let Some(running) = &mut self.running else { return Err(Failed::NoWorker) };
        let before = running.modules;
        let until = Instant::now() + time;
        let error = match running.exchange(request, file, until, library) {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        let late = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
        let guilty = running.guilty(late);
        // It was given no processor: that is no file's fault.
        let starved = late && running.cpu().is_some_and(|cpu| cpu < time / 2);
        self.end();
        match error.kind() {
            _ if starved => {
                counters.timeouts += 1;
                Err(Failed::Stale)
            }
            _ if late => {
                counters.timeouts += 1;
                Err(Failed::Late(guilty))
            }
            io::ErrorKind::InvalidData => {
                counters.crashes += 1;
                Err(Failed::NoWorker)
            }
            _ if before > 0 => {
                counters.recycled += 1;
                Err(Failed::Stale)
            }
            _ => {
                counters.crashes += 1;
                Err(Failed::Died(guilty))
            }
        }
    }

    fn start(&mut self, counters: &mut Counters) -> Result<(), Failed> {
        self.dying.retain_mut(|child| !matches!(child.try_wait(), Ok(Some(_))));
        let now = Instant::now();
        if self.not_before.is_some_and(|not_before| now < not_before) {
            return Err(Failed::NoWorker);
        }
        match Running::start(&self.program) {
            Ok(running) => {
                self.running = Some(running);
                Ok(())
            }
            Err(error) => {
                tracing::warn!(%error, "cannot start the worker that names stacks");
                counters.not_started += 1;
                self.not_before = Some(now + PAUSE);
                Err(Failed::NoWorker)
            }
        }
    }

    fn end(&mut self) {
        let Some(mut running) = self.running.take() else { return };
        // It has not been waited for, so the pidfd is its.
        let _ = pidfd_send_signal(&running.pidfd, Signal::KILL);
        let pidfd = &mut [PollFd::new(&running.pidfd, PollFlags::IN)];
        let _ = poll(pidfd, Some(&DEATH));
        if !matches!(running.child.try_wait(), Ok(Some(_))) {
            self.dying.push(running.child);
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.end();
        for mut child in self.dying.drain(..) {
            // It has been killed.
            let _ = child.wait();
        }
    }
}

impl Running {
    fn start(program: &OsString) -> io::Result<Self> {
        let (socket, theirs) = UnixStream::pair()?;
        let marks = memfd_create(c"plumb-symbolise", MemfdFlags::CLOEXEC)?;
        ftruncate(&marks, 4096)?;
        let child = Command::new(program)
            .arg("symbolise-worker")
            .env_clear()
            .current_dir(Path::new("/"))
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        let mut running = Self { child, pidfd, socket, marks, modules: 0 };
        let ready = running.settle();
        if ready.is_err() {
            let _ = pidfd_send_signal(&running.pidfd, Signal::KILL);
            let _ = running.child.wait();
        }
        ready.map(|()| running)
    }

    fn settle(&mut self) -> io::Result<()> {
        self.socket.set_read_timeout(Some(START))?;
        self.socket.set_write_timeout(Some(START))?;
        protocol::send(&self.socket, &ToWorker::Hello, Some(self.marks.as_fd()))?;
        match protocol::receive(&self.socket, MAX_ANSWER)? {
            FromWorker::Ready => Ok(()),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn exchange(
        &mut self,
        request: &ToWorker,
        file: Option<&OwnedFd>,
        until: Instant,
        library: &mut dyn Library,
    ) -> io::Result<FromWorker> {
        self.send(request, file.map(AsFd::as_fd), until)?;
        loop {
            self.socket.set_read_timeout(Some(left(until)?))?;
            match protocol::receive(&self.socket, MAX_ANSWER)? {
                FromWorker::NeedModule(id) => {
                    let file = library.module(id);
                    self.modules += 1;
                    self.send(&ToWorker::File, file.as_ref().map(AsFd::as_fd), until)?;
                }
                FromWorker::NeedDebug { build_id, link } => {
                    let file = library.debug(&build_id, &link);
                    self.send(&ToWorker::File, file.as_ref().map(AsFd::as_fd), until)?;
                }
                FromWorker::NeedCode(address) => {
                    self.send(&ToWorker::Code(library.code(address)), None, until)?;
                }
                answer => return Ok(answer),
            }
        }
    }

    fn send(
        &self,
        message: &ToWorker,
        file: Option<std::os::fd::BorrowedFd<'_>>,
        until: Instant,
    ) -> io::Result<()> {
        self.socket.set_write_timeout(Some(left(until)?))?;
        protocol::send(&self.socket, message, file)
    }

    /// The module that the worker is about, or the one that took more time.
    fn guilty(&self, late: bool) -> Option<u32> {
        let mut bytes = [0; protocol::Marks::SIZE];
        let read = rustix::io::pread(&self.marks, &mut bytes, 0).ok()?;
        let marks = protocol::Marks::from_bytes(bytes.get(..read)?)?;
        if late { marks.slowest(protocol::milliseconds()) } else { marks.current() }
    }
}

fn left(until: Instant) -> io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

//! One check from the first run of the command to the report.

use std::{
    ffi::OsString,
    io::{self, IsTerminal, Write},
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Child, ExitStatus},
    time::{Duration, Instant},
};

use rustix::process::Signal;

use super::{
    command::{Before, Running, Stopped},
    follower::Follower,
    script::{self, Ready},
    signals::Signals,
};
use crate::{
    check::{Cost, Judged, Report, Subjects, Suppressions},
    clock,
    failure::{Exit, Failure},
};

/// Between two looks at the rings when nothing asks for one.
const TICK: Duration = Duration::from_millis(50);
/// A server may settle for so long after a round: connections that were closed are closed on both ends.
const SETTLE: Duration = Duration::from_millis(500);
/// How long a server runs, with its load, before the signal comes.
const BEFORE_STOP: Duration = Duration::from_secs(1);
/// For processes that were killed.
const DEATH: Duration = Duration::from_secs(5);

/// What is done with a server.
pub(super) struct Server<'a> {
    pub(super) ready: Option<(Ready, Duration)>,
    /// Script, rounds before, and rounds that are compared.
    pub(super) steady: Option<(&'a str, u32, u32)>,
    pub(super) stop: Signal,
    pub(super) within: Duration,
    pub(super) load: Option<&'a str>,
}

pub(super) struct Session {
    follower: Follower,
    signals: Signals,
    before: Before,
    grace: Duration,
    /// How long the command ran.
    took: Duration,
    /// Somebody wants all of it to end.
    interrupted: bool,
    /// What plumb had used before.
    loaded: Cost,
}

impl Session {
    pub(super) fn new(
        mut follower: Follower,
        signals: Signals,
        before: Before,
        grace: Duration,
    ) -> Result<Self, Failure> {
        follower.wake_for(&signals)?;
        let loaded = follower.cost()?;
        Ok(Self { follower, signals, before, grace, took: Duration::ZERO, interrupted: false, loaded })
    }

    /// Runs a command again and again. The status is the first that is not 0, or 0.
    pub(super) fn iterate(&mut self, command: &[OsString], count: u32) -> Result<ExitStatus, Failure> {
        let mut first = ExitStatus::default();
        for round in 1..=count {
            if count > 1 {
                progress(&format!("run {round} of {count}"));
            }
            let (running, began) = self.start(command)?;
            let status = self.until_end(&running)?;
            // All it did is in the ring by now.
            self.follower.pump(Duration::ZERO)?;
            self.took += self.since(began);
            self.wait_for_rest(self.grace)?;
            if first.success() {
                first = status;
            }
            if self.interrupted {
                break;
            }
            if round < count {
                self.follower.sites.next_round();
            }
        }
        if count > 1 {
            progress("");
        }
        self.follower.note_orphans()?;
        Ok(first)
    }

    /// Starts a server, drives it as wanted, and stops it. Whatever fails, nothing of it goes on.
    pub(super) fn serve(&mut self, command: &[OsString], server: &Server<'_>) -> Result<ExitStatus, Failure> {
        let (running, began) = self.start(command)?;
        let driven = self.drive(&running, server);
        if driven.is_err() {
            // It was started by plumb, and nobody else will end it. Why it failed is what matters.
            let _ = self.follower.end_unstopped();
        }
        self.took = self.since(began);
        driven
    }

    fn drive(&mut self, running: &Running, server: &Server<'_>) -> Result<ExitStatus, Failure> {
        if server.steady.is_some() {
            self.follower.sites.judge(Judged::ByRounds);
        }
        if let Some((ready, within)) = &server.ready {
            self.until_ready(running, ready, *within)?;
        }
        if let Some((script, warmup, rounds)) = server.steady {
            for round in 1..=warmup + rounds {
                let phase = if round <= warmup { "warm-up, " } else { "" };
                progress(&format!("{phase}round {round} of {}", warmup + rounds));
                self.round(running, script)?;
                if round > warmup {
                    self.follower.end_round()?;
                }
            }
            progress("");
            for site in std::mem::take(&mut self.follower.rounds).into_growing() {
                self.follower.sites.found(site);
            }
        }
        let mut load = server.load.map(|script| script::start(script, &self.before)).transpose()?;
        let end = Instant::now() + BEFORE_STOP;
        let mut done = None;
        // After rounds it has run long enough.
        while (server.steady.is_none() || load.is_some()) && done.is_none() && Instant::now() < end {
            self.pump(running)?;
            done = load.as_mut().map(Child::try_wait).transpose()?.flatten();
            if let Some(status) = running.try_wait()? {
                return Err(ended_early(status, "it was told to stop"));
            }
        }
        if done.is_some() {
            // What it has closed the server closes now.
            self.settle(running)?;
        }
        if let Some(status) = done.filter(|status| !status.success()) {
            let cause = format!("the load failed ({status})");
            return Err(Failure::new(Exit::Error, cause, "try it by hand against the server"));
        }
        if server.steady.is_none() {
            self.follower.sites.judge(Judged::Stopping);
        }
        let status = self.stop(running, server.stop, server.within);
        if let Some(mut load) = load {
            // A load that goes on without its server is of no use.
            script::end(&mut load)?;
        }
        status
    }

    fn stop(&mut self, running: &Running, signal: Signal, within: Duration) -> Result<ExitStatus, Failure> {
        let mut status = None;
        if let Some(status) = running.try_wait()? {
            return Err(ended_early(status, "it was told to stop"));
        }
        running.signal(signal)?;
        let end = Instant::now() + within;
        while (status.is_none() || self.follower.alive() > 0) && Instant::now() < end {
            self.pump(running)?;
            status = match status {
                None => running.try_wait()?,
                known => known,
            };
        }
        self.follower.pump(Duration::ZERO)?;
        if self.follower.alive() > 0 {
            self.follower.end_unstopped()?;
            let end = Instant::now() + DEATH;
            while (status.is_none() || self.follower.alive() > 0) && Instant::now() < end {
                self.follower.pump(TICK)?;
                status = match status {
                    None => running.try_wait()?,
                    known => known,
                };
            }
        }
        // Killed or not, it is gone, or nothing more can be done about it.
        Ok(status.unwrap_or_else(|| ExitStatus::from_raw(Signal::KILL.as_raw())))
    }

    /// The command, and when it began to run, nanoseconds since boot.
    fn start(&mut self, command: &[OsString]) -> Result<(Running, u64), Failure> {
        let stopped = Stopped::start(command, &self.before)?;
        let name = command.first().map(Path::new).and_then(Path::file_name).unwrap_or_default();
        self.follower.follow(stopped.pid, &name.to_string_lossy())?;
        let began = clock::boottime();
        let running = stopped.release()?;
        self.follower.wake_for(&running.pidfd)?;
        Ok((running, began))
    }

    /// How long the command ran, by the kernel's own word of its end.
    fn since(&self, began: u64) -> Duration {
        let end = self.follower.root_ended;
        Duration::from_nanos(if end == 0 { clock::boottime() } else { end }.saturating_sub(began))
    }

    /// Takes in what happens next, and passes signals on.
    fn pump(&mut self, running: &Running) -> Result<(), Failure> {
        self.follower.pump(TICK)?;
        for (signal, by_terminal) in self.signals.take() {
            self.interrupted |= matches!(signal, Signal::INT | Signal::TERM | Signal::HUP | Signal::QUIT);
            if !by_terminal {
                // It may have ended just now.
                let _ = running.signal(signal);
            }
        }
        Ok(())
    }

    fn until_end(&mut self, running: &Running) -> Result<ExitStatus, Failure> {
        loop {
            self.pump(running)?;
            if let Some(status) = running.try_wait()? {
                return Ok(status);
            }
        }
    }

    /// Descendants may go on for a while.
    fn wait_for_rest(&mut self, grace: Duration) -> Result<(), Failure> {
        let end = Instant::now() + grace;
        while self.follower.alive() > 0 && Instant::now() < end {
            self.follower.pump(TICK)?;
        }
        self.follower.settle()
    }

    fn until_ready(&mut self, running: &Running, ready: &Ready, within: Duration) -> Result<(), Failure> {
        let end = Instant::now() + within;
        loop {
            let mut asking = ready.ask(&self.before)?;
            let mut answer = None;
            while answer.is_none() && Instant::now() < end {
                self.pump(running)?;
                answer = asking.answer()?;
            }
            if answer == Some(true) {
                return Ok(());
            }
            if answer.is_none() {
                asking.end()?;
            }
            if let Some(status) = running.try_wait()? {
                return Err(ended_early(status, "it was ready"));
            }
            if Instant::now() >= end {
                let cause = format!("the command was not ready within {within:?}: {}", ready.words());
                return Err(Failure::new(
                    Exit::Error,
                    cause,
                    "check --ready, or give more time with --ready-within",
                ));
            }
        }
    }

    /// One round of a script, and a while to settle.
    fn round(&mut self, running: &Running, script: &str) -> Result<(), Failure> {
        let mut child = script::start(script, &self.before)?;
        let status = self.beside(running, &mut child)?;
        if !status.success() {
            return Err(Failure::new(
                Exit::Error,
                format!("the script of the rounds failed ({status})"),
                "try it by hand against the server",
            ));
        }
        self.settle(running)
    }

    fn settle(&mut self, running: &Running) -> Result<(), Failure> {
        let end = Instant::now() + SETTLE;
        while Instant::now() < end {
            self.pump(running)?;
        }
        Ok(())
    }

    fn beside(&mut self, running: &Running, child: &mut Child) -> Result<ExitStatus, Failure> {
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            self.pump(running)?;
            if let Some(status) = running.try_wait()? {
                script::end(child)?;
                return Err(ended_early(status, "the rounds were over"));
            }
        }
    }

    pub(super) fn report(
        self,
        command: &[OsString],
        (status, told): (ExitStatus, Option<i32>),
        rules: &Suppressions,
    ) -> Result<Report, Failure> {
        let (losses, drift, mut cost) =
            (self.follower.losses()?, self.follower.drift(), self.follower.cost()?);
        cost.plumb_seconds -= self.loaded.plumb_seconds;
        let processes = self.follower.processes;
        let least = self.follower.sites.least();
        let (sites, single) = self.follower.sites.into_findings();
        let words = command.iter().map(|word| word.to_string_lossy().into_owned()).collect();
        let mut report = Report::new(words, Subjects::judge(&sites, rules), (losses, drift, cost));
        (report.exit_code, report.signal, report.told) = (status.code(), status.signal(), told);
        (report.seconds, report.processes, report.single) = (self.took.as_secs_f64(), processes, single);
        report.complete = !losses.may_hide(single, least);
        Ok(report)
    }
}

/// A server that is gone before its time.
fn ended_early(status: ExitStatus, before: &str) -> Failure {
    let cause = format!("the command ended ({status}) before {before}");
    let remedy = if status.success() {
        "if it goes into the background by itself, keep it in the foreground; else look at its own messages"
    } else {
        "look at its own messages"
    };
    Failure::new(Exit::Error, cause, remedy)
}

/// Where a long check is, on a terminal.
fn progress(words: &str) {
    let mut stderr = io::stderr().lock();
    if stderr.is_terminal() {
        // Nobody is left to be told.
        let line = if words.is_empty() { String::new() } else { format!("plumb: {words}") };
        let _ = write!(stderr, "\r\x1b[K{line}");
        let _ = stderr.flush();
    }
}

//! `plumb check`: runs a command, follows it and all its descendants, and says what they left behind.

use std::{
    ffi::OsString,
    os::unix::process::ExitStatusExt,
    process::ExitStatus,
    time::{Duration, Instant},
};

use clap::Args;
use rustix::process::set_child_subreaper;

mod command;
mod follower;
mod signals;

use self::{
    command::{Before, Running, Stopped},
    follower::{Follower, bug},
    signals::Signals,
};
use super::{Outcome, output};
use crate::failure::{Exit, Failure};

/// Between two looks at the rings when nothing asks for one.
const TICK: Duration = Duration::from_millis(50);

#[derive(Args)]
pub(super) struct Arguments {
    /// How many of one origin a process must hold at its end to be called a leak
    #[arg(long, default_value_t = 2, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
    /// How long descendants may go on when the command has ended, before they are called left behind
    #[arg(long, default_value = "1s", value_name = "DURATION", value_parser = humantime::parse_duration)]
    grace: Duration,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

pub(super) fn run(arguments: &Arguments) -> Outcome {
    let before = Before::take();
    let signals = Signals::block()?;
    // Whoever loses its parent is plumb's child then.
    set_child_subreaper(Some(rustix::process::getpid())).map_err(std::io::Error::from)?;
    let (kernel, sites) = Follower::load(arguments.repeats)?;
    let stopped = Stopped::start(&arguments.command, &before)?;
    let mut follower = Follower::follow(kernel, sites, stopped.pid, "")?;
    follower.wake_for(&signals)?;
    let began = Instant::now();
    let running = stopped.release()?;
    follower.wake_for(&running.pidfd)?;
    let status = until_end(&mut follower, &running, &signals)?;
    let took = began.elapsed();
    let end = Instant::now() + arguments.grace;
    while follower.alive() > 0 && Instant::now() < end {
        follower.pump(TICK)?;
    }
    follower.pump(Duration::ZERO)?;
    follower.note_orphans();
    let losses = follower.losses()?;
    let (findings, single) = follower.sites.into_findings();
    output::message(&format!("{losses:?} {single} {took:?}"));
    for finding in &findings {
        output::message(&format!(
            "{:?} {} {} count {} most {} processes {}",
            finding.kind, finding.comm, finding.syscall, finding.count, finding.most, finding.processes
        ));
        for function in finding.stack.iter().flat_map(|stack| stack.functions()) {
            output::message(&format!("    {}", function.words()));
        }
        for (what, stack) in &finding.others {
            output::message(&format!("  {what}"));
            for function in stack.functions() {
                output::message(&format!("    {}", function.words()));
            }
        }
        output::message(&format!("  {:?}", finding.examples));
    }
    Ok(if findings.is_empty() { Exit::Command(code(status)) } else { Exit::Findings })
}

/// As a shell has it.
fn code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}

fn until_end(follower: &mut Follower, running: &Running, signals: &Signals) -> Result<ExitStatus, Failure> {
    loop {
        follower.pump(TICK)?;
        for (signal, by_terminal) in signals.take() {
            if !by_terminal {
                // It may have ended just now.
                let _ = running.signal(signal);
            }
        }
        if let Some(status) = running.try_wait()? {
            // All it did is in the ring by now.
            follower.pump(Duration::ZERO).map_err(|error| bug(&error))?;
            return Ok(status);
        }
    }
}

//! The command line: data on stdout, messages on stderr, one exit code per kind of outcome.

mod agent;
mod audit;
mod check;
mod client;
mod doctor;
mod drain;
mod fds;
mod leak;
mod leaks;
mod output;
mod ps;
mod services;
mod threads;
mod watch;

use std::{fs, io, process::ExitCode, time::Duration};

use clap::{Parser, Subcommand};

use crate::{
    failure::{Exit, Failure},
    symbolise,
};

const EXAMPLES: &str = "\
Examples:
  plumb agent                     follow every process and report leaks, in the foreground
  plumb leaks                     what leaks now
  plumb leaks ID                  from where, since when, and what to do about it
  plumb leaks ack ID              say that a leak is known
  plumb ps                        every process with its fds, limit and threads
  plumb fds --pid 42              what a process has open
  plumb watch --comm nginx        fd, thread and process events as they happen
  plumb watch --origins --pid 42  with the lines of code that make fds and threads
  plumb check -- cargo test       fail when a command leaks, for tests
  plumb services list             what is registered for a drain
  plumb drain --all --dry-run     what a drain would do, and what speaks against it
  plumb audit --pid 42            what a process would do with a stop signal
  plumb doctor                    what this kernel lets plumb see";

const EXIT_CODES: &str = "\
Exit codes:
  0 ok   1 error   2 usage   3 findings   4 missing privilege   5 kernel cannot   6 agent unreachable   124 deadline passed (drain, audit)
  130 interrupted
  plumb check without findings: that of the command, or 1 for 0 when not all of it was seen

Documentation: README.md, ARCHITECTURE.md and docs/ (check, drain, audit) of the source";

/// Finds fd and thread leaks in unmodified processes of a Linux host, and stops its services in order
#[derive(Parser)]
#[command(name = "plumb", version, before_help = EXAMPLES, after_help = EXIT_CODES, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Follow every process of this host, report leaks, serve metrics
    Agent(agent::Arguments),
    /// List every process with its fds, limit, threads and memory
    Ps(ps::Arguments),
    /// List what a process has open
    Fds(fds::Arguments),
    /// List the threads of a process
    Threads(threads::Arguments),
    /// List what the running agent has found
    Leaks(leaks::Arguments),
    /// Print process, thread and fd events as they happen
    Watch(watch::Arguments),
    /// Run a command and say what it leaks: for tests
    Check(check::Arguments),
    /// Stop registered services in order, within a deadline
    Drain(drain::Arguments),
    /// Say what a process would do with a stop signal; or send it, and say what becomes of the process
    Audit(audit::Arguments),
    /// Register services for a drain, and list them
    Services(services::Arguments),
    /// Say what this kernel lets plumb see, and what to do about the rest
    Doctor(doctor::Arguments),
    /// Reads foreign files for the agent, which starts it
    #[command(hide = true)]
    SymboliseWorker,
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Agent(arguments) => agent::run(arguments),
        Command::Ps(arguments) => ps::run(&arguments),
        Command::Fds(arguments) => fds::run(&arguments),
        Command::Threads(arguments) => threads::run(&arguments),
        Command::Leaks(arguments) => leaks::run(&arguments),
        Command::Watch(arguments) => watch::run(&arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Drain(arguments) => drain::run(&arguments),
        Command::Audit(arguments) => audit::run(&arguments),
        Command::Services(arguments) => services::run(&arguments),
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::SymboliseWorker => symbolise_worker(),
    };
    let exit = done.unwrap_or_else(|failure| {
        output::message(&format!("plumb: {failure}"));
        failure.exit
    });
    ExitCode::from(exit.code())
}

fn symbolise_worker() -> Outcome {
    symbolise::child::main().map(|()| Exit::Ok).map_err(|error| {
        Failure::new(Exit::Error, error.to_string(), "the agent starts it by itself; it serves nobody else")
    })
}

/// The outcome of a subcommand.
type Outcome = Result<Exit, Failure>;

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::new(Exit::Error, error.to_string(), "`plumb doctor` may know why")
    }
}

/// How long something is done.
fn some_time(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(Duration::ZERO) => Err("that is no time; such as 10s".to_owned()),
        Ok(time) => Ok(time),
        Err(error) => Err(format!("{error}; such as 10s")),
    }
}

/// The process that the user named is not there, or not for us.
fn no_such_process(pid: u32) -> Failure {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let tgid = status.lines().find_map(|line| line.strip_prefix("Tgid:")).map(str::trim);
    match tgid {
        Some(tgid) if tgid == pid.to_string() => Failure::new(
            Exit::KernelCannot,
            format!("process {pid} is there, but not among those that the kernel's iterators show here"),
            "`plumb doctor` says whether the pid namespace is why; /proc has it",
        ),
        Some(tgid) => Failure::new(
            Exit::Error,
            format!("{pid} is no process, but a thread of process {tgid}"),
            format!("take {tgid}"),
        ),
        None => Failure::new(Exit::Error, format!("there is no process {pid}"), "`plumb ps` lists them all"),
    }
}

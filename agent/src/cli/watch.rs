//! `plumb watch`: process, thread and fd events as they happen. The fd program is attached for as long
//! as somebody listens.

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use clap::Args;
use plumb_common::{
    event::{
        CLONE_THREAD, Clone as CloneEvent, Exit as ExitEvent, FD_CLOSE_ON_EXEC, FD_CLOSED, FD_REPLACED,
        FdChange,
    },
    limits::COMM_LEN,
    syscalls,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::{
    Outcome, no_such_process,
    output::{self, Format, Output},
};
use crate::{
    clock::Calendar,
    decode::Event,
    failure::{Exit, Failure},
    files::OpenFile,
    kernel::{Filter, Kernel, Plan},
    text, view,
};

/// How long an event may wait before it is printed.
const TICK: Duration = Duration::from_millis(100);
const BATCH: usize = 4096;

#[derive(Args)]
#[command(after_help = followed())]
pub(super) struct Arguments {
    /// Only this process; ends with it
    #[arg(long, short)]
    pid: Option<u32>,
    /// Only processes of this name (at most 15 bytes, as in `plumb ps`)
    #[arg(long, short, value_parser = comm, conflicts_with = "pid")]
    comm: Option<[u8; COMM_LEN]>,
    /// End after this time, such as 10s or 5m
    #[arg(long = "for", value_name = "DURATION", value_parser = humantime::parse_duration)]
    duration: Option<Duration>,
    #[command(flatten)]
    output: Output,
}

/// What the stream covers, so that nobody takes silence for absence.
fn followed() -> String {
    let mut names: Vec<&str> = syscalls::TABLE.iter().map(|call| call.name).collect();
    names.dedup();
    format!(
        "Followed fd calls: {}. An fd that comes or goes on another way is in `plumb fds` only.",
        names.join(" ").replace("fcntl fcntl64", "fcntl(F_DUPFD)")
    )
}

fn comm(name: &str) -> Result<[u8; COMM_LEN], String> {
    if name.is_empty() || name.len() >= COMM_LEN {
        return Err(format!("a name has 1 to {} bytes", COMM_LEN - 1));
    }
    let mut comm = [0; COMM_LEN];
    comm[..name.len()].copy_from_slice(name.as_bytes());
    Ok(comm)
}

pub(super) fn run(arguments: &Arguments) -> Outcome {
    let target =
        arguments.pid.map(|pid| Target::open(pid).ok_or_else(|| no_such_process(pid))).transpose()?;
    let stop = interrupted()?;
    let filter = Filter { tgid: arguments.pid, comm: arguments.comm };
    let mut kernel = Kernel::load_all(Plan::watch(filter))?;
    let bug = |error: &dyn std::fmt::Display| {
        Failure::new(Exit::Error, format!("the event stream ended: {error}"), "this is a bug of plumb")
    };
    let mut ring = kernel.ring().map_err(|error| bug(&error))?;
    let calendar = Calendar::now();
    let end = arguments.duration.map(|duration| Instant::now() + duration);
    let mut told = 0;
    output::message("plumb: watching; ctrl-c ends it");
    if arguments.output.format == Format::Table {
        output::data(&format!("{:<24} {:>7} {:>7} {:<15} EVENT\n", "TIME", "PID", "TID", "COMM"))?;
    }
    loop {
        ring.wait(TICK).map_err(|error| bug(&error))?;
        // Whatever was sent before the end was asked for is still printed.
        let ending = stop.is_cancelled() || end.is_some_and(|end| Instant::now() >= end);
        let events = ring.drain(BATCH);
        let more = events.len() == BATCH;
        let mut page = String::new();
        let mut gone = false;
        for event in &events {
            let line = Line::new(event, calendar);
            page +=
                &if arguments.output.format == Format::Table { line.text() } else { output::json(&line)? };
            page.push('\n');
            gone |= arguments.pid.is_some() && matches!(event, Event::Exit(exit) if exit.group_dead != 0);
        }
        // Also when nothing happens, an empty page asks whether somebody still reads.
        let is_read = output::data(&page)? && !output::is_hung_up();
        let losses = view::lost(&kernel.counts()?) + ring.rejected();
        if losses > told {
            output::message(&format!(
                "plumb: {} events were lost: they came faster than they were read",
                losses - told
            ));
            told = losses;
        }
        let is_over = target.as_ref().is_some_and(|target| !target.is_alive()) && events.is_empty();
        if gone || is_over || !is_read || (ending && !more) {
            break;
        }
    }
    Ok(if stop.is_cancelled() { Exit::Interrupted } else { Exit::Ok })
}

/// The process that is watched; its number may be another's after its end, the pidfd is not.
struct Target(OwnedFd);

impl Target {
    /// `None` when there is no such process, or when the number is that of a thread.
    fn open(pid: u32) -> Option<Self> {
        let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
        pidfd_open(pid, PidfdFlags::empty()).ok().map(Self)
    }

    /// A pidfd becomes readable when its process has ended (since 5.3).
    fn is_alive(&self) -> bool {
        let mut ready = [PollFd::new(&self.0, PollFlags::IN)];
        poll(&mut ready, Some(&Timespec::default())).is_ok_and(|ready| ready == 0)
    }
}

/// A token that ctrl-c or SIGTERM cancels.
fn interrupted() -> Result<CancellationToken, Failure> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let token = CancellationToken::new();
    let cancel = token.clone();
    let mut signals = {
        let _inside = runtime.enter();
        [signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?]
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            let [interrupt, terminate] = &mut signals;
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        cancel.cancel();
    })?;
    Ok(token)
}

/// One event, as printed.
#[derive(Serialize)]
struct Line {
    schema: &'static str,
    time: String,
    event: &'static str,
    pid: u32,
    tid: u32,
    comm: String,
    #[serde(flatten)]
    detail: Detail,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Detail {
    Child { child_pid: u32, child_tid: u32 },
    Exit { exit_code: u32, signal: u32, last_thread: bool },
    Opened { syscall: &'static str, fd: u32, kind: String, target: String },
    Closed { syscall: &'static str, fd: u32, fd_last: u32 },
    None {},
}

impl Line {
    fn new(event: &Event, calendar: Calendar) -> Self {
        let header = event.header();
        let (event, detail) = match event {
            Event::Clone(event) => clone(event),
            Event::Exec(_) => ("exec", Detail::None {}),
            Event::Rename(_) => ("rename", Detail::None {}),
            Event::Exit(event) => ("exit", exit(event)),
            Event::Fd(event) => fd(event),
        };
        Self {
            schema: crate::document::SCHEMA,
            time: calendar.format_millis(header.time),
            event,
            pid: header.process.tgid,
            tid: header.tid,
            comm: text::terminated(&header.comm),
            detail,
        }
    }

    fn text(&self) -> String {
        let detail = match &self.detail {
            Detail::Child { child_pid, child_tid } if child_pid == child_tid => format!("pid {child_pid}"),
            Detail::Child { child_tid, .. } => format!("tid {child_tid}"),
            Detail::Exit { signal: 0, exit_code, last_thread } => {
                format!("code {exit_code}{}", if *last_thread { ", last thread" } else { "" })
            }
            Detail::Exit { signal, .. } => format!("killed by signal {signal}"),
            Detail::Opened { syscall, fd, kind, target } => format!("{fd} {kind} {target} ({syscall})"),
            Detail::Closed { fd, fd_last, .. } if fd == fd_last => fd.to_string(),
            Detail::Closed { fd, fd_last: u32::MAX, .. } => format!("{fd} and above"),
            Detail::Closed { fd, fd_last, .. } => format!("{fd} to {fd_last}"),
            Detail::None {} => String::new(),
        };
        let line = format!(
            "{:<24} {:>7} {:>7} {:<15} {} {detail}",
            self.time, self.pid, self.tid, self.comm, self.event
        );
        line.trim_end().to_owned()
    }
}

fn clone(event: &CloneEvent) -> (&'static str, Detail) {
    let name = if event.flags & CLONE_THREAD == 0 { "fork" } else { "thread" };
    (name, Detail::Child { child_pid: event.child.tgid, child_tid: event.child_tid })
}

fn exit(event: &ExitEvent) -> Detail {
    Detail::Exit {
        exit_code: (event.code >> 8) & 0xff,
        signal: event.code & 0x7f,
        last_thread: event.group_dead != 0,
    }
}

fn fd(event: &FdChange) -> (&'static str, Detail) {
    let syscall = syscalls::TABLE.get(event.how as usize).map_or("unknown", |call| call.name);
    let closed = Detail::Closed { syscall, fd: event.fd, fd_last: event.fd_last };
    match event.change {
        FD_CLOSED => return ("close", closed),
        FD_CLOSE_ON_EXEC => return ("close-on-exec", closed),
        _ => {}
    }
    let OpenFile { kind, target, .. } = OpenFile::of_event(event);
    let name = if event.change == FD_REPLACED { "replace" } else { "open" };
    (name, Detail::Opened { syscall, fd: event.fd, kind, target })
}

//! Events in words: one as a line of JSON or for people, many as sums by kind.

use std::{collections::BTreeMap, time::Duration};

use plumb_common::{
    counts::{self, Counts},
    event::{
        CLONE_THREAD, Clone as CloneEvent, Exit as ExitEvent, FD_CLOSE_ON_EXEC, FD_CLOSED, FD_OPENED,
        FD_REPLACED, FD_UNKNOWN, FdChange,
    },
    syscalls,
};
use serde::Serialize;

use crate::{
    clock::Calendar, decode::Event, document::SCHEMA, files::OpenFile, kernel::Seam, losses,
    stacks::Function, text,
};

/// Functions of a stack that are printed for people.
const MAX_FUNCTIONS: usize = 24;

/// One event, as printed.
#[derive(Serialize)]
pub(crate) struct Line {
    schema: &'static str,
    time: String,
    event: &'static str,
    pid: u32,
    tid: u32,
    comm: String,
    #[serde(flatten)]
    detail: Detail,
    /// Of whoever made the fd or thread, innermost function first.
    #[serde(skip_serializing_if = "Option::is_none")]
    stack: Option<Vec<Function>>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Detail {
    Child {
        child_pid: u32,
        child_tid: u32,
    },
    Exit {
        exit_code: u32,
        signal: u32,
        last_thread: bool,
    },
    Opened {
        syscall: &'static str,
        fd: u32,
        kind: String,
        target: String,
    },
    Closed {
        syscall: &'static str,
        fd: u32,
        fd_last: u32,
    },
    /// Of which only the file is known, not the number.
    Dropped {
        syscall: &'static str,
        kind: String,
        target: String,
    },
    Signal(losses::SignalSeen),
    Socket(losses::SocketSeen),
    None {},
}

impl Line {
    #[must_use]
    pub(crate) fn new(event: &Event, calendar: Calendar, stack: Option<Vec<Function>>) -> Self {
        let header = event.header();
        let (event, detail) = match event {
            Event::Clone(event) => clone(event),
            Event::Exec(_) => ("exec", Detail::None {}),
            Event::Rename(_) => ("rename", Detail::None {}),
            Event::Exit(event) => ("exit", exit(event)),
            Event::Fd(event) => fd(event),
            Event::Signal(event) => {
                (losses::signal_event(event), Detail::Signal(losses::SignalSeen::new(event)))
            }
            Event::Socket(event) => {
                (losses::socket_event(event), Detail::Socket(losses::SocketSeen::new(event)))
            }
        };
        Self {
            schema: SCHEMA,
            time: calendar.format_millis(header.time),
            event,
            pid: header.process.tgid,
            tid: header.tid,
            comm: text::terminated(&header.comm),
            detail,
            stack,
        }
    }

    /// One object, without the line's end.
    #[must_use]
    pub(crate) fn json(&self) -> String {
        serde_json::to_string(self).expect("strings and numbers have a JSON form")
    }

    /// For people.
    #[must_use]
    pub(crate) fn text(&self) -> String {
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
            Detail::Dropped { syscall, kind, target } => format!("{kind} {target} ({syscall})"),
            Detail::Signal(seen) => seen.words(),
            Detail::Socket(seen) => seen.words(),
            Detail::None {} => String::new(),
        };
        let line = format!(
            "{:<24} {:>7} {:>7} {:<15} {} {detail}",
            self.time, self.pid, self.tid, self.comm, self.event
        );
        let mut line = line.trim_end().to_owned();
        for function in self.stack.iter().flatten().take(MAX_FUNCTIONS) {
            line += &format!("\n{:>24} {}", "", function.words());
        }
        line
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
    let syscall = syscalls::name(event.how);
    let closed = Detail::Closed { syscall, fd: event.fd, fd_last: event.fd_last };
    let named = || {
        let OpenFile { kind, target, .. } = OpenFile::of_event(event);
        (kind, target)
    };
    match event.change {
        FD_CLOSED if event.fd == FD_UNKNOWN && event.file != 0 => {
            let (kind, target) = named();
            ("close", Detail::Dropped { syscall, kind, target })
        }
        FD_CLOSED => ("close", closed),
        FD_CLOSE_ON_EXEC => ("close-on-exec", closed),
        change => {
            let (kind, target) = named();
            let name = if change == FD_REPLACED { "replace" } else { "open" };
            (name, Detail::Opened { syscall, fd: event.fd, kind, target })
        }
    }
}

/// A line that says how many events are missing: of this stream at this place, because its reader did not keep
/// up, or of anybody, lost on the way from the kernel a moment ago.
#[must_use]
pub(crate) fn gap(lost: u64, by: &str) -> String {
    serde_json::json!({ "schema": SCHEMA, "event": "gap", "lost": lost, "by": by }).to_string()
}

/// How many events there were, by name.
#[derive(Debug, Default)]
pub(crate) struct Counted {
    clones: [u64; 2],
    execs: u64,
    renames: u64,
    exits: u64,
    /// By `FD_*`.
    fds: [u64; 5],
}

impl Counted {
    pub(crate) fn take(&mut self, event: &Event) {
        match event {
            Event::Clone(event) => self.clones[usize::from(event.flags & CLONE_THREAD != 0)] += 1,
            Event::Exec(_) => self.execs += 1,
            Event::Rename(_) => self.renames += 1,
            Event::Exit(_) => self.exits += 1,
            Event::Fd(event) => self.fds[(event.change as usize).min(4)] += 1,
            Event::Signal(_) | Event::Socket(_) => {}
        }
    }

    fn by_name(&self) -> BTreeMap<&'static str, u64> {
        let fd = |change: u32| self.fds[change as usize];
        BTreeMap::from([
            ("fork", self.clones[0]),
            ("thread", self.clones[1]),
            ("exec", self.execs),
            ("rename", self.renames),
            ("exit", self.exits),
            ("open", fd(FD_OPENED)),
            ("replace", fd(FD_REPLACED)),
            ("close", fd(FD_CLOSED)),
            ("close-on-exec", fd(FD_CLOSE_ON_EXEC)),
        ])
    }
}

/// `plumb watch --count`.
#[derive(Debug, Serialize)]
pub(crate) struct EventCounts {
    schema: &'static str,
    seconds: f64,
    /// Processor time of the reader since it began, all its threads.
    cpu_seconds: f64,
    /// How fds were followed.
    via: &'static str,
    /// Received, by event.
    events: BTreeMap<&'static str, u64>,
    /// Not received, by cause.
    lost: BTreeMap<&'static str, u64>,
}

impl EventCounts {
    #[must_use]
    pub(crate) fn new(
        counted: &Counted,
        (ledger, elsewhere): (&Counts, [(&'static str, u64); 2]),
        seam: Option<Seam>,
        took: Duration,
        cpu: Duration,
    ) -> Self {
        let name = |outcome: u32| counts::OUTCOMES[outcome as usize];
        Self {
            schema: SCHEMA,
            seconds: took.as_secs_f64(),
            cpu_seconds: cpu.as_secs_f64(),
            via: seam.map_or("none", Seam::word),
            events: counted.by_name(),
            lost: (counts::LOSSES.into_iter())
                .map(|outcome| (name(outcome), ledger.of_outcome(outcome)))
                .chain(elsewhere)
                .collect(),
        }
    }

    /// For people.
    #[must_use]
    pub(crate) fn text(&self) -> String {
        let rate = |count: u64| count as f64 / self.seconds.max(f64::EPSILON);
        let mut lines: Vec<String> = Vec::new();
        for (name, count) in self.events.iter().filter(|(_, count)| **count > 0) {
            lines.push(format!("{name:<15} {count:>12} {:>12.0}/s", rate(*count)));
        }
        let lost: u64 = self.lost.values().sum();
        let causes = self.lost.iter().filter(|(_, count)| **count > 0);
        let causes: Vec<String> = causes.map(|(cause, count)| format!("{cause} {count}")).collect();
        lines.push(format!("{:<15} {lost:>12} {}", "lost", causes.join(", ")).trim_end().to_owned());
        let percent = self.cpu_seconds / self.seconds.max(f64::EPSILON) * 100.0;
        lines.push(format!("in {:.1} s, with {percent:.1} % of a core", self.seconds));
        lines.join("\n") + "\n"
    }
}

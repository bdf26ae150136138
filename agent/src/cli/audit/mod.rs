//! `plumb audit`: what a process would do with a stop signal, without sending one; and with `--send`, what it does.

mod send;

use std::{ffi::OsStr, fs, os::unix::fs::MetadataExt, path::Path, time::Duration};

use clap::Args;
use plumb_common::task::{ProcKey, TaskRecord};
use serde::Serialize;

use super::{
    Outcome, no_such_process,
    output::{self, Format, Output},
    some_time,
};
use crate::{
    audit::{Fate, supervision},
    census,
    document::SCHEMA,
    drain::{Facts, Listener, NoProcess, Process, Signal, Tcp, facts_of, tcp_of},
    failure::{Exit, Failure},
    kernel::{Kernel, Plan},
    left::{Left, Since},
    stacks::{Names, Stack},
    text,
};

const EXAMPLES: &str = "\
Examples:
  what a process would do with TERM; nothing is sent
    plumb audit --pid 4711
  with another signal
    plumb audit --pid 4711 --signal QUIT
  send it, and say for 10 s what becomes of the process
    plumb audit --pid 4711 --send TERM --for 10s

Exit code: 0 when the process itself takes the signal (by a handler, sigwait or a signalfd), or, with --send, when it has \
ended by itself and no request was seen to be lost; 124 when it is still there after the time; else 1.";

/// Children that are named.
const MAX_CHILDREN: usize = 16;
/// Whose connections are counted: each is held by a pidfd meanwhile.
const MAX_FAMILY: usize = 256;

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Process to look at
    #[arg(long, short)]
    pid: u32,
    /// The signal in question: TERM, INT, QUIT, HUP, USR1, USR2 or WINCH
    #[arg(long, value_parser = signal, default_value = "TERM")]
    signal: Signal,
    /// Send this signal to the process, and follow what happens
    #[arg(long, value_name = "SIGNAL", value_parser = signal, conflicts_with = "signal")]
    send: Option<Signal>,
    /// With --send: how long to follow it
    #[arg(long = "for", value_name = "DURATION", value_parser = some_time, default_value = "10s", requires = "send")]
    duration: Duration,
    #[command(flatten)]
    output: Output,
}

/// What a process would do with a signal.
#[derive(Serialize)]
struct Audit {
    schema: &'static str,
    pid: u32,
    comm: String,
    command: String,
    uid: u32,
    signal: &'static str,
    /// One sentence.
    verdict: String,
    fate: Fate,
    /// The process itself takes the signal.
    handled: bool,
    advice: String,
    /// Stopped by STOP or a debugger: it takes nothing until it is continued.
    is_stopped: bool,
    /// The first of a pid namespace.
    is_init: bool,
    supervisor: String,
    /// Signals that ask to stop, or are used for it, for which it has handlers.
    other_handlers: Vec<&'static str>,
    /// TCP, each with the connections that wait to be accepted; `null` when its fds cannot be read.
    listeners: Option<Vec<Listener>>,
    /// Established TCP connections.
    connections: Option<usize>,
    /// The first 16.
    children: Vec<Child>,
    children_count: usize,
    /// Established TCP connections that the first 256 have open and the process has not, as of workers of a server.
    children_connections: usize,
    /// `null` when they cannot be listed.
    threads: Option<Left>,
    /// What is not known, and why.
    unknown: Vec<String>,
}

#[derive(Serialize)]
struct Child {
    pid: u32,
    comm: String,
}

/// As that of a service, without its advice on KILL, which is for services.
fn signal(text: &str) -> Result<Signal, String> {
    Signal::parse(text).map_err(|why| match text.to_ascii_uppercase().as_str() {
        "KILL" | "SIGKILL" => "KILL asks for nothing: it ends any process at once".to_owned(),
        _ => why,
    })
}

pub(super) fn run(arguments: &Arguments) -> Outcome {
    let pid = arguments.pid;
    let signal = arguments.send.unwrap_or(arguments.signal);
    let open = if arguments.send.is_some() { Process::open } else { Process::look_at };
    let process = open(pid).map_err(|why| refused(pid, &why))?;
    if arguments.send.is_some() && is_plumb(&process) {
        let cause = format!("process {pid} is plumb, which plumb signals for nobody");
        return Err(Failure::new(Exit::Error, cause, "leave out --send to look at it"));
    }
    let plan = if arguments.send.is_some() { Plan::STOP } else { Plan::pass(&["processes", "threads"]) };
    let mut kernel = Kernel::load_required(plan)?;
    let mut names = Names::default();
    let records = kernel.processes()?;
    let audit = Audit::take(&mut kernel, &mut names, (&process, &records), signal)?;
    if arguments.send.is_some() {
        return send::run(arguments, kernel, names, (process, &audit), signal);
    }
    output::data(&if arguments.output.format == Format::Table {
        audit.text(true)
    } else {
        output::json(&audit)? + "\n"
    })?;
    Ok(if audit.handled && !audit.is_stopped { Exit::Ok } else { Exit::Error })
}

fn refused(pid: u32, why: &NoProcess) -> Failure {
    match why {
        NoProcess::Gone(_) => no_such_process(pid),
        NoProcess::Denied(..) => Failure::new(Exit::Error, why.to_string(), "leave out --send to look at it"),
        NoProcess::Unreadable(..) | NoProcess::NoRoom(..) => Failure::new(
            Exit::Error,
            why.to_string(),
            "take another one: it is ending, or plumb may not read its files in /proc (run it with sudo)",
        ),
    }
}

/// Whether a process runs this program, or is an agent of another version.
fn is_plumb(process: &Process) -> bool {
    let own = fs::metadata("/proc/self/exe").map(|own| (own.dev(), own.ino()));
    own.is_ok_and(|own| own == process.identity.exe) || holds_run_folder(process)
}

/// Whether a process has the lock of an agent's run folder.
fn holds_run_folder(process: &Process) -> bool {
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let fds = fs::read_dir(process.folder().join("fd")).into_iter().flatten().filter_map(Result::ok);
    let is_held = |fd: &Path| {
        fs::read_link(fd).is_ok_and(|path| {
            path.file_name() == Some(OsStr::new("agent.lock")) && path.with_file_name("plumb.sock").exists()
        }) && fs::metadata(fd)
            .is_ok_and(|file| locks.lines().any(|line| is_lock(line, (process.identity.pid, file.ino()))))
    };
    fds.map(|fd| fd.path()).any(|fd| is_held(&fd))
}

/// A line of /proc/locks: a lock of this process on this inode.
fn is_lock(line: &str, (pid, inode): (u32, u64)) -> bool {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [_, "FLOCK", _, "WRITE", holder, file, ..] = words[..] else { return false };
    holder.parse() == Ok(pid) && file.rsplit(':').next().and_then(|ino| ino.parse().ok()) == Some(inode)
}

impl Audit {
    fn take(
        kernel: &mut Kernel,
        names: &mut Names,
        (process, records): (&Process, &[TaskRecord]),
        signal: Signal,
    ) -> Result<Self, Failure> {
        let pid = process.identity.pid;
        let facts = facts_of(process, signal.number()).ok_or_else(|| no_such_process(pid))?;
        let mut unknown = Vec::new();
        let threads = look(kernel, names, (pid, process.identity.start_ticks), None)
            .map_err(|why| unknown.push(format!("its threads: {why}")))
            .ok();
        let folder = process.folder();
        let has_fds = match fs::read_dir(folder.join("fd")) {
            Ok(_) => true,
            Err(error) => {
                unknown.push(format!("its listeners and connections: {error}"));
                false
            }
        };
        let children: Vec<&TaskRecord> =
            records.iter().filter(|record| record.ppid == pid && record.key.tgid != pid).collect();
        let named = children.iter().take(MAX_CHILDREN);
        let status = fs::read_to_string(folder.join("status")).unwrap_or_default();
        let fate = Fate::of(&facts, process.is_kernels);
        let other_handlers = caught(&status, signal);
        let Facts { is_init, supervisor, .. } = facts;
        let Tcp { listeners, connections, .. } = tcp_of([process]);
        let counted = children.iter().take(MAX_FAMILY);
        let looked = counted.filter_map(|record| Process::look_at(record.key.tgid).ok());
        let family: Vec<Process> = looked.filter(|child| child.ppid == pid).collect();
        if children.len() > MAX_FAMILY {
            unknown
                .push(format!("connections of children: those of the first {MAX_FAMILY} alone are counted"));
        }
        // The kernel's tables are read again only where there is somebody to look for.
        let all = match &family[..] {
            [] => connections,
            family => tcp_of(family.iter().chain([process])).connections,
        };
        let audit = Self {
            schema: SCHEMA,
            pid,
            comm: process.identity.comm.clone(),
            command: process.command.clone(),
            uid: process.identity.uid,
            signal: signal.name(),
            verdict: fate.verdict(signal.name()),
            fate,
            handled: fate.is_handled(),
            advice: fate.advice(signal.name(), &other_handlers),
            is_stopped: status.lines().any(is_stopped),
            is_init,
            supervisor: supervision(&supervisor),
            other_handlers,
            listeners: has_fds.then_some(listeners),
            connections: has_fds.then_some(connections),
            children: named
                .map(|record| Child { pid: record.key.tgid, comm: text::terminated(&record.comm) })
                .collect(),
            children_count: children.len(),
            children_connections: all.saturating_sub(connections),
            threads,
            unknown,
        };
        // What was read is of this process only if it is there now.
        if process.is_alive() { Ok(audit) } else { Err(no_such_process(pid)) }
    }

    /// For people.
    fn text(&self, with_threads: bool) -> String {
        let mut lines = vec![format!("pid {} ({}): {}", self.pid, self.comm, self.verdict)];
        let mut tell = |line: String| lines.push(format!("  {line}"));
        if self.is_stopped {
            tell("it is stopped (STOP, or a debugger): it takes nothing until it is continued".to_owned());
        }
        tell(self.advice.clone());
        if !self.command.is_empty() {
            tell(format!("command: {}", self.command));
        }
        tell(self.supervisor.clone());
        if let (Some(listeners), Some(connections)) = (&self.listeners, self.connections) {
            for Listener { address, waiting } in listeners.iter().take(MAX_CHILDREN) {
                tell(format!("listens on {address}, {waiting} waiting to be accepted"));
            }
            if listeners.len() > MAX_CHILDREN {
                tell(format!("and on {} more", listeners.len() - MAX_CHILDREN));
            }
            tell(many_connections(connections));
        }
        if self.children_count > 0 {
            let named = self.children.iter().map(|child| format!("{} ({})", child.pid, child.comm));
            let more = if self.children_count > self.children.len() { ", ..." } else { "" };
            let named = named.collect::<Vec<_>>().join(", ");
            let children = match self.children_count {
                1 => "1 child, which gets".to_owned(),
                many => format!("{many} children, which get"),
            };
            tell(format!("{children} no signal by this: {named}{more}"));
            if self.children_connections > 0 {
                tell(format!(
                    "its children have {} of their own",
                    many_connections(self.children_connections)
                ));
            }
        }
        for what in &self.unknown {
            tell(format!("unknown: {what}"));
        }
        if let Some(threads) = self.threads.as_ref().filter(|_| with_threads) {
            lines.extend(threads.lines());
        }
        lines.join("\n") + "\n"
    }
}

fn many_connections(many: usize) -> String {
    match many {
        0 => "no TCP connections".to_owned(),
        1 => "1 TCP connection".to_owned(),
        many => format!("{many} TCP connections"),
    }
}

/// A line of /proc/PID/status.
fn is_stopped(line: &str) -> bool {
    line.strip_prefix("State:")
        .is_some_and(|state| matches!(state.trim().as_bytes().first(), Some(b'T' | b't')))
}

/// Other signals than this one for which a process has handlers, by its status.
fn caught(status: &str, signal: Signal) -> Vec<&'static str> {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    let is_caught = |other: &Signal| *other != signal && mask >> (other.number() - 1) & 1 == 1;
    Signal::all().filter(is_caught).map(Signal::name).collect()
}

/// Looks at the threads of a process, with their stacks in words where that can be.
fn look(
    kernel: &mut Kernel,
    names: &mut Names,
    process: (u32, u64),
    since: Option<Since<'_>>,
) -> Result<Left, String> {
    let doings = since.map(|since| since.doings);
    let look = census::look(kernel, process, doings).map_err(|error| error.to_string())?;
    let look = look.ok_or_else(|| "they are gone".to_owned())?;
    let key: ProcKey = look.process;
    let look = look.map(|census| names.census(key, census));
    Ok(Left::new(&look, since, |stack| stack.as_deref().map(|stack: &Stack| stack)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_that_of_its_process_and_file() {
        let line = "7: FLOCK  ADVISORY  WRITE 4711 00:1a:93 0 EOF";
        assert!(is_lock(line, (4711, 93)));
        assert!(!is_lock(line, (4711, 9)) && !is_lock(line, (47, 93)));
        assert!(!is_lock("7: -> FLOCK  ADVISORY  WRITE 4711 00:1a:93 0 EOF", (4711, 93)), "it waits for it");
        assert!(
            !is_lock("8: POSIX  ADVISORY  WRITE 4711 00:1a:93 0 EOF", (4711, 93)) && !is_lock("", (1, 1))
        );
    }

    #[test]
    fn other_handlers_are_those_of_signals_that_ask_to_stop() {
        // TERM, QUIT and CHLD.
        let status = "State:\tt (tracing stop)\nSigCgt:\t0000000000014004\n";
        assert_eq!(caught(status, Signal::TERM), ["QUIT"]);
        assert_eq!(caught(status, Signal::QUIT), ["TERM"]);
        assert!(caught("", Signal::TERM).is_empty());
        assert!(status.lines().any(is_stopped) && !is_stopped("State:\tS (sleeping)"));
    }
}

//! The JSON that plumb prints and serves. Names here are promises.

use serde::{Deserialize, Serialize};

use crate::{
    census,
    clock::Calendar,
    detect::{Example, Finding, Resource, Rule, State, Why},
    files::OpenFile,
    history::History,
    kernel::Status,
    origins::Group,
    stacks::{self, Function, Stack},
    table::Row,
    text,
};
use plumb_common::task::ThreadRecord;

/// Origins of a finding that are listed.
const MAX_ORIGINS: usize = 20;

/// The promise that every document carries.
pub(crate) const SCHEMA: &str = "plumb/v1";

/// `plumb ps`.
#[derive(Debug, Serialize)]
pub(crate) struct Processes {
    schema: &'static str,
    pub processes: Vec<Process>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Process {
    pub pid: u32,
    pub ppid: u32,
    pub comm: String,
    pub exe: Option<String>,
    pub group: String,
    /// `null` when it could not be counted.
    pub fds: Option<u32>,
    /// `null` is unlimited.
    pub fd_limit: Option<u64>,
    pub threads: u32,
    pub rss_bytes: u64,
    pub start_time: String,
    /// As in /proc/PID/stat.
    pub state: char,
    pub uid: u32,
    pub kernel_thread: bool,
}

impl Processes {
    #[must_use]
    pub(crate) fn new(rows: &[Row], calendar: Calendar) -> Self {
        Self { schema: SCHEMA, processes: rows.iter().map(|row| Process::new(row, calendar)).collect() }
    }
}

impl Process {
    fn new(row: &Row, calendar: Calendar) -> Self {
        Self {
            pid: row.key.tgid,
            ppid: row.ppid,
            comm: row.info.comm.to_string(),
            exe: row.info.exe.as_deref().map(str::to_owned),
            group: row.info.group.to_string(),
            fds: row.fds_exact().then_some(row.fds),
            fd_limit: (row.fd_limit != u64::MAX).then_some(row.fd_limit),
            threads: row.threads,
            rss_bytes: row.rss_bytes,
            start_time: calendar.format(row.key.start_boottime),
            state: state_letter(row.state, if row.exited { EXIT_ZOMBIE } else { 0 }),
            uid: row.uid,
            kernel_thread: row.is_kernel_thread(),
        }
    }
}

const EXIT_DEAD: u32 = 16;
const EXIT_ZOMBIE: u32 = 32;

/// Scheduler and exit state as /proc shows it (include/linux/sched.h, fs/proc/array.c).
#[must_use]
pub(crate) fn state_letter(state: u32, exit_state: u32) -> char {
    match (exit_state, state) {
        (EXIT_ZOMBIE.., _) => 'Z',
        (EXIT_DEAD.., _) => 'X',
        (_, 0) => 'R',
        // TASK_IDLE: uninterruptible without counting as load.
        (_, state) if state & 0x402 == 0x402 => 'I',
        (_, state) if state & 0x1 != 0 => 'S',
        (_, state) if state & 0x2 != 0 => 'D',
        (_, state) if state & 0x4 != 0 => 'T',
        (_, state) if state & 0x8 != 0 => 't',
        (_, state) if state & 0x40 != 0 => 'P',
        _ => 'D',
    }
}

/// `plumb fds`.
#[derive(Debug, Serialize)]
pub(crate) struct Files {
    schema: &'static str,
    pid: u32,
    comm: String,
    pub fds: Vec<File>,
}

#[derive(Debug, Serialize)]
pub(crate) struct File {
    pub fd: u32,
    pub kind: String,
    pub target: String,
}

impl Files {
    #[must_use]
    pub(crate) fn new(pid: u32, comm: String, files: Vec<OpenFile>) -> Self {
        let files = files.into_iter().map(|OpenFile { fd, kind, target }| File { fd, kind, target });
        Self { schema: SCHEMA, pid, comm, fds: files.collect() }
    }
}

/// `plumb threads`.
#[derive(Debug, Serialize)]
pub(crate) struct Threads {
    schema: &'static str,
    pid: u32,
    comm: String,
    pub threads: Vec<Thread>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Thread {
    pub tid: u32,
    pub name: String,
    pub state: char,
    pub start_time: String,
}

impl Threads {
    #[must_use]
    pub(crate) fn new(pid: u32, comm: String, records: &[ThreadRecord], calendar: Calendar) -> Self {
        let thread = |record: &ThreadRecord| Thread {
            tid: record.tid,
            name: text::terminated(&record.comm),
            state: state_letter(record.state, record.exit_state),
            start_time: calendar.format(record.start_boottime),
        };
        Self { schema: SCHEMA, pid, comm, threads: records.iter().map(thread).collect() }
    }
}

/// `plumb leaks`, and GET /v1/leaks of the control socket.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Leaks {
    schema: String,
    pub findings: Vec<Leak>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Leak {
    pub id: String,
    pub state: State,
    pub rule: Rule,
    pub resource: Resource,
    pub pid: u32,
    pub comm: String,
    pub group: String,
    pub live: u32,
    pub baseline: u32,
    pub limit: Option<u64>,
    pub growth_per_minute: f64,
    /// 0 at the limit; `null` when it does not grow or has no limit.
    pub seconds_to_exhaustion: Option<f64>,
    pub first_seen: String,
    /// `null` before it is one.
    pub leaking_since: Option<String>,
    /// `null` as long as it is one.
    pub resolved: Option<Resolved>,
    /// Why a rule of the settings has it ignored; `null` when none does.
    pub ignored: Option<String>,
    pub acknowledged: Option<Acknowledged>,
    pub silenced_until: Option<String>,
    pub examples: Vec<Example>,
    /// The examples are of so many of the newest; `null` when they are of all.
    #[serde(default)]
    pub examples_of_newest: Option<u32>,
    /// How many had come since the baseline and were there when they were listed, and when that was; `null` when they were
    /// not.
    #[serde(default)]
    pub examples_of: Option<u32>,
    #[serde(default)]
    pub examples_listed: Option<String>,
    /// Path of the program; `null` when it is not known.
    pub exe: Option<String>,
    /// The course of the count since it is suspect.
    pub history: Option<Course>,
    /// Of a finding about threads: which there are, and where some of them are now.
    pub threads: Option<LeakThreads>,
    /// What was there before the process was watched; of the rest the origins say where it came from.
    pub before_watching: u32,
    /// Made since then and still there, whatever their origin.
    #[serde(default)]
    pub since_watching: u32,
    /// Of these made in the last seconds: their stacks are still looked up.
    #[serde(default)]
    pub naming: u32,
    /// How many origins there are; the most frequent of them follow.
    #[serde(default)]
    pub places: u32,
    /// Where what has been made since and is still there came from, the most frequent first.
    pub origins: Vec<Origin>,
    /// Where most of it came from as an agent before this one saw it; `null` when none did.
    #[serde(default)]
    pub origin_before_restart: Option<EarlierOrigin>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct EarlierOrigin {
    /// Function and caller.
    pub words: String,
    /// How many came from there.
    pub live: u32,
    /// When the newest of them was made.
    pub newest: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Resolved {
    pub at: String,
    pub why: Why,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Acknowledged {
    pub at: String,
    pub reason: Option<String>,
    /// How many there were.
    pub live: u32,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Origin {
    pub live: u32,
    /// `other` for what came on another way than by a followed call, or unseen.
    pub syscall: String,
    /// The function of the program itself that made them, and the one that called it.
    pub function: Option<Function>,
    pub caller: Option<Function>,
    /// When the oldest and the newest of them were made.
    pub oldest: String,
    pub newest: String,
    /// The newest of them: numbers of fds, ids of threads.
    pub examples: Vec<u32>,
    /// The whole way to the call, innermost first; empty where no stack could be had.
    pub stack: Vec<Function>,
    /// Whether that goes back to where the thread began.
    pub complete: bool,
}

impl Origin {
    pub(crate) fn new(group: &Group, calendar: Calendar) -> Self {
        let stack = group.stack.as_deref();
        let [function, caller] = stack.and_then(Stack::headline).unwrap_or_default();
        Self {
            live: group.live,
            syscall: group.how.to_owned(),
            function,
            caller,
            oldest: calendar.format(group.oldest),
            newest: calendar.format(group.newest),
            examples: group.examples.iter().map(|(_, number)| *number).collect(),
            stack: stack.map(Stack::functions).unwrap_or_default(),
            complete: stack.is_some_and(|stack| stack.complete),
        }
    }

    /// `db_connect (pool.c:118), called by retry (pool.c:90)`; the call where no stack could be had.
    #[must_use]
    pub(crate) fn words(&self) -> String {
        match &self.function {
            Some(function) => stacks::called(function, self.caller.as_ref()),
            None => format!("{} (no stack)", self.syscall),
        }
    }
}

/// A count at even distances.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Course {
    pub since: String,
    pub every_seconds: f64,
    pub live: Vec<u32>,
}

impl Course {
    fn new(history: &History, calendar: Calendar) -> Option<Self> {
        let live = history.points.clone();
        let every_seconds = history.step as f64 / 1e9;
        (!live.is_empty()).then(|| Self { since: calendar.format(history.began), every_seconds, live })
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct LeakThreads {
    /// The most frequent first.
    pub types: Vec<ThreadType>,
    pub blocked: Vec<BlockedThread>,
}

/// Threads with one name but for a number, and when they started.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ThreadType {
    pub name: String,
    pub count: u32,
    pub oldest: String,
    pub median: String,
    pub newest: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct BlockedThread {
    pub tid: u32,
    pub name: String,
    pub start_time: String,
    /// The kernel function in which it waits; empty for one that runs.
    pub wait_channel: String,
    /// Innermost first; empty where it could not be had.
    pub stack: Vec<Function>,
}

impl LeakThreads {
    fn new(threads: &census::Named, calendar: Calendar) -> Self {
        let kind = |kind: &census::ThreadType| {
            let [oldest, median, newest] = kind.started.map(|start| calendar.format(start));
            ThreadType { name: kind.name.clone(), count: kind.count, oldest, median, newest }
        };
        let blocked = threads.blocked.iter().map(|thread| BlockedThread {
            tid: thread.tid,
            name: thread.name.clone(),
            start_time: calendar.format(thread.started),
            wait_channel: thread.wait_channel.clone(),
            stack: thread.stack.as_deref().map(Stack::functions).unwrap_or_default(),
        });
        Self { types: threads.types.iter().map(kind).collect(), blocked: blocked.collect() }
    }
}

/// The end of `plumb watch --origins`: what is left of what was made meanwhile.
#[derive(Debug, Serialize)]
pub(crate) struct WatchedOrigins {
    schema: &'static str,
    pid: u32,
    fds: Vec<Origin>,
    threads: Vec<Origin>,
}

impl WatchedOrigins {
    #[must_use]
    pub(crate) fn new(pid: u32, fds: Vec<Origin>, threads: Vec<Origin>) -> Self {
        Self { schema: SCHEMA, pid, fds, threads }
    }

    /// For people.
    #[must_use]
    pub(crate) fn text(&self) -> String {
        let mut lines = Vec::new();
        for (origins, noun) in [(&self.fds, "fds"), (&self.threads, "threads")] {
            let live: u32 = origins.iter().map(|origin| origin.live).sum();
            lines.push(format!("{live} {noun} are left of what was made while pid {} was watched", self.pid));
            for origin in origins {
                lines.push(format!("{:>7}  {:<10} {}", origin.live, origin.syscall, origin.words()));
            }
        }
        lines.join("\n") + "\n"
    }
}

impl Leaks {
    #[must_use]
    pub(crate) fn new(findings: &[Finding], calendar: Calendar) -> Self {
        let findings = findings.iter().map(|finding| Leak::new(finding, calendar)).collect();
        Self { schema: SCHEMA.to_owned(), findings }
    }
}

impl Leak {
    /// Whether it is at its limit.
    #[must_use]
    pub(crate) fn is_full(&self) -> bool {
        self.seconds_to_exhaustion == Some(0.0)
    }

    /// Where most of it came from, as far as that is known.
    #[must_use]
    pub(crate) fn from(&self) -> Option<String> {
        let first = self.origins.first();
        let named = first.filter(|origin| origin.function.is_some()).map(Origin::words);
        let earlier = || Some(format!("{} (before the restart)", self.origin_before_restart.as_ref()?.words));
        named.or_else(earlier).or_else(|| first.map(Origin::words))
    }

    /// What the examples are of: ` of 263 listed at 01:36:16Z`, or of the newest; empty when that is not known.
    #[must_use]
    pub(crate) fn listed(&self) -> String {
        let of = match (self.examples_of_newest, self.examples_of) {
            (Some(newest), _) => format!(" of the newest {newest}"),
            (None, Some(of)) => format!(" of {of}"),
            (None, None) => return String::new(),
        };
        let time = |at: &String| format!(" listed at {}", at.split('T').next_back().unwrap_or(at));
        of + &self.examples_listed.as_ref().map(time).unwrap_or_default()
    }

    #[must_use]
    pub(crate) fn new(finding: &Finding, calendar: Calendar) -> Self {
        let rounded = |value: f64| (value * 10.0).round() / 10.0;
        Self {
            id: finding.id(),
            state: finding.state,
            rule: finding.rule,
            resource: finding.resource,
            pid: finding.key.tgid,
            comm: finding.info.comm.to_string(),
            group: finding.info.group.to_string(),
            live: finding.live,
            baseline: finding.baseline,
            limit: finding.limit,
            growth_per_minute: rounded(finding.growth_per_minute),
            seconds_to_exhaustion: finding.seconds_to_exhaustion().map(f64::round),
            first_seen: calendar.format(finding.first_seen),
            leaking_since: finding.leaking_since.map(|since| calendar.format(since)),
            resolved: (finding.resolved).map(|end| Resolved { at: calendar.format(end.at), why: end.why }),
            ignored: finding.ignored.as_deref().map(str::to_owned),
            acknowledged: finding.mark.acknowledged.as_ref().map(|known| Acknowledged {
                at: calendar.format(known.at),
                reason: known.reason.clone(),
                live: known.live,
            }),
            // Whole seconds are asked for; the clocks are read one after the other.
            silenced_until: (finding.mark.silenced_until)
                .map(|until| calendar.format(until.saturating_add(500_000_000))),
            examples: finding.examples.clone(),
            examples_of_newest: finding.listed.and_then(|listed| listed.newest),
            examples_of: finding.listed.map(|listed| listed.of),
            examples_listed: finding.listed.map(|listed| calendar.format(listed.at)),
            exe: finding.info.exe.as_deref().map(str::to_owned),
            history: Course::new(&finding.detail.history, calendar),
            threads: finding.detail.threads.as_deref().map(|threads| LeakThreads::new(threads, calendar)),
            before_watching: finding.detail.origins.before,
            since_watching: finding.detail.origins.since_watching(),
            naming: finding.detail.origins.naming,
            places: finding.detail.origins.groups.len() as u32,
            origins: (finding.detail.origins.groups.iter().take(MAX_ORIGINS))
                .map(|group| Origin::new(group, calendar))
                .collect(),
            origin_before_restart: finding.earlier.as_ref().map(|earlier| EarlierOrigin {
                words: earlier.words.clone(),
                live: earlier.live,
                newest: calendar.format(earlier.newest),
            }),
        }
    }
}

/// `plumb doctor`.
#[derive(Debug, Serialize)]
pub(crate) struct Doctor {
    schema: &'static str,
    pub checks: Vec<Check>,
    pub programs: Vec<ProgramStatus>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Check {
    pub name: &'static str,
    pub ok: bool,
    pub detail: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct ProgramStatus {
    pub name: &'static str,
    pub intent: crate::kernel::Intent,
    /// Nothing is missing because of it.
    pub ok: bool,
    pub verdict: &'static str,
    pub detail: String,
    pub gives: &'static str,
}

impl Doctor {
    #[must_use]
    pub(crate) fn new(checks: Vec<Check>, programs: &[Status]) -> Self {
        let status = |status: &Status| ProgramStatus {
            name: status.program.name,
            intent: status.program.intent,
            ok: status.is_fine(),
            verdict: status.verdict.word(),
            detail: status.verdict.explain(),
            gives: status.program.gives,
        };
        Self { schema: SCHEMA, checks, programs: programs.iter().map(status).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_those_of_proc() {
        let letters = [(0, 0), (1, 0), (2, 0), (4, 0), (8, 0), (0x402, 0), (0x1402, 0), (0, 16), (0, 32)];
        let shown: String = letters.iter().map(|(state, exit)| state_letter(*state, *exit)).collect();
        assert_eq!(shown, "RSDTtIIXZ");
    }
}

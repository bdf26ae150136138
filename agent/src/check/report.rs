//! What a check found: one document, and the same for people.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde::Serialize;

use super::{
    sites::{Example, Site},
    suppress::{Kind, RuleId, Subject, Suppressions, generate},
    tree::Drift,
};
use crate::{
    document::SCHEMA,
    stacks::{Function, Stack},
    symbolise::is_runtime_file,
};

/// What is printed for people: functions of a stack, those of the other places that belong to a finding, and rules
/// that matched nothing.
const MAX_FUNCTIONS: usize = 16;
const MAX_OTHER: usize = 4;
const MAX_UNUSED: usize = 3;

/// What was not seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Losses {
    /// Events that were lost: what is told of fds and threads may be wrong.
    pub events: u64,
    /// Stacks that were lost: what they belong to has no origin.
    pub stacks: u64,
    /// Tables of open fds that were lost, at an exec or at the end of a process.
    pub tables: u64,
    /// Mappings that were lost: stacks may have no names.
    pub mappings: u64,
    /// Processes for which there was no room.
    pub processes: u64,
    /// Things left for whose origin there was no room.
    pub sites: u64,
}

impl Losses {
    /// Whether they may hide what would be told, when so many things were left that do not count, and from how many on
    /// they might: without their stacks those from one place are not known to be.
    pub(crate) fn may_hide(self, single: u32, least: u32) -> bool {
        let Self { events, stacks, tables, mappings, processes, sites } = self;
        events + tables + processes + sites > 0 || (stacks + mappings > 0 && single >= least)
    }
}

/// What following the command took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Cost {
    /// In the kernel programs, on the command's own time: without what the tracepoint itself adds to each system call.
    pub kernel_seconds: f64,
    /// Processor time of plumb itself, beside the command.
    pub plumb_seconds: f64,
    pub events: u64,
}

/// A check and what it found.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    schema: &'static str,
    pub command: Vec<String>,
    /// Of the command; `null` when a signal ended it.
    pub exit_code: Option<i32>,
    /// That ended it.
    pub signal: Option<i32>,
    /// The signal that it was told to end by.
    #[serde(skip)]
    pub told: Option<i32>,
    pub seconds: f64,
    pub processes: u64,
    pub findings: Vec<Finding>,
    /// Findings that a rule says are meant.
    pub suppressed: Vec<Suppressed>,
    /// Rules of the user that matched nothing.
    pub unused_rules: Vec<String>,
    /// Fds and threads that were left, but not several of one origin.
    pub single: u32,
    /// Nothing that was lost can have hidden a finding.
    pub complete: bool,
    /// plumb ends with an error: nothing was found, but not all of it was seen.
    #[serde(skip)]
    pub is_unsure: bool,
    pub lost: Losses,
    pub drift: Drift,
    pub cost: Cost,
}

#[derive(Debug, Serialize)]
pub(crate) struct Finding {
    pub kind: Kind,
    /// Name of the process.
    pub comm: String,
    pub count: u32,
    /// The most in one process.
    pub most: u32,
    pub processes: u32,
    pub syscall: &'static str,
    /// Type of the threads.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub thread: String,
    /// The function of the program itself, and its caller.
    pub function: Option<Function>,
    pub caller: Option<Function>,
    pub stack: Vec<Function>,
    /// Ways on which that function was reached; `stack` is one of them.
    pub ways: usize,
    pub others: Vec<Place>,
    /// How many in each run, or after each round.
    pub rounds: Vec<u32>,
    /// There are more after each round.
    pub grows: bool,
    pub examples: Vec<ExampleDocument>,
}

/// Another place that belongs to a finding.
#[derive(Debug, Serialize)]
pub(crate) struct Place {
    pub what: &'static str,
    pub stack: Vec<Function>,
}

#[derive(Debug, Serialize)]
pub(crate) struct ExampleDocument {
    pub pid: u32,
    /// The fd, the id of the thread or that of the process.
    pub number: u32,
    pub resource: String,
    pub target: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct Suppressed {
    pub rule: String,
    pub file: String,
    pub reason: String,
    pub kind: Kind,
    pub count: u32,
}

/// What rules look at, of a finding.
pub(crate) struct Subjects;

impl Finding {
    fn new(site: &Site) -> Self {
        let [function, caller] = site.stack.as_ref().and_then(|stack| stack.headline()).unwrap_or_default();
        let example = |example: &Example| ExampleDocument {
            pid: example.pid,
            number: example.number,
            resource: example.resource.clone(),
            target: example.target.clone(),
        };
        let place = |(what, stack): &(&'static str, Arc<Stack>)| Place { what, stack: stack.functions() };
        Self {
            kind: site.kind,
            comm: site.comm.clone(),
            count: site.count,
            most: site.most,
            processes: site.processes,
            syscall: site.syscall,
            thread: site.thread.clone(),
            function,
            caller,
            stack: site.stack.as_ref().map(|stack| stack.functions()).unwrap_or_default(),
            ways: site.ways.len(),
            others: site.others.iter().map(place).collect(),
            rounds: site.rounds.clone(),
            grows: site.grows,
            examples: site.examples.iter().map(example).collect(),
        }
    }

    fn subject(&self) -> Subject<'_> {
        let example = self.examples.first();
        Subject {
            kind: self.kind,
            comm: &self.comm,
            syscall: self.syscall,
            resource: example.map_or("", |example| &example.resource),
            target: example.map_or("", |example| &example.target),
            thread: &self.thread,
            stack: &self.stack,
        }
    }

    /// How many in each run, or after each round.
    fn course(&self) -> String {
        self.rounds.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
    }

    /// What happened, in one line.
    fn title(&self) -> String {
        let Self { count, comm, syscall, .. } = self;
        let some = |one: &str, many: &str| some(u64::from(*count), one, many);
        if self.grows {
            let what = if self.kind == Kind::Thread { "threads" } else { "fds" };
            return format!("{what} of {comm} grow from round to round: {}", self.course());
        }
        let within =
            if self.processes > 1 { format!(" in {} processes", self.processes) } else { String::new() };
        match self.kind {
            Kind::Fd => format!("{} left open by {comm}{within} ({syscall})", some("fd", "fds")),
            Kind::ExecFd => {
                format!(
                    "{} without close-on-exec reached another program: {comm} ({syscall})",
                    some("fd", "fds")
                )
            }
            Kind::Thread => {
                format!(
                    "{} of {comm} still running at its end{within}: {}",
                    some("thread", "threads"),
                    self.thread
                )
            }
            Kind::DoubleClose => format!("{} of {comm}", some("double close", "double closes")),
            Kind::ForeignClose => {
                format!("{} of {comm} closed by a thread that did not own it", some("fd", "fds"))
            }
            Kind::Zombie => format!("{} of {comm} that nobody waited for", some("child", "children")),
            Kind::Orphan => format!("{} that {comm} started still running", some("process", "processes")),
            Kind::Unstopped => {
                format!("{} of {comm} did not stop in time; it was killed", some("thread", "threads"))
            }
            Kind::InFlight => {
                format!(
                    "{} of {comm} open when it ended",
                    some("accepted connection", "accepted connections")
                )
            }
        }
    }

    /// `is_lossy`: events were lost.
    fn text(&self, number: usize, is_lossy: bool) -> Vec<String> {
        let mut lines = vec![format!("{number:>3}  {}", self.title())];
        if self.rounds.len() > 1 && !self.grows {
            lines.push(format!("     in each run: {}", self.course()));
        }
        let from = [&self.function, &self.caller].map(|function| function.as_ref().map(Function::words));
        match (self.kind, from) {
            (_, [None, _]) => {
                let why = match self.syscall {
                    "other" if is_lossy => ": its event was lost, or it came by a call that is not followed",
                    "other" => ": by a call that is not followed",
                    _ => "",
                };
                lines.push(format!("     from an unknown place{why}"));
            }
            (Kind::Unstopped, [Some(function), _]) => lines.push(format!("     blocked in {function}")),
            (_, [Some(function), Some(caller)]) => {
                let more = match self.ways {
                    0 | 1 => String::new(),
                    ways => format!(", and on {} more", some(ways as u64 - 1, "way", "ways")),
                };
                lines.push(format!("     from {function}, called by {caller}{more}"));
            }
            (_, [Some(function), None]) => lines.push(format!("     from {function}")),
        }
        let stack = without_start(&self.stack);
        let shown = stack.iter().take(MAX_FUNCTIONS);
        lines.extend(shown.map(|function| format!("          {}", function.words())));
        if stack.len() > MAX_FUNCTIONS {
            lines.push(format!("          and {} more", stack.len() - MAX_FUNCTIONS));
        }
        for place in &self.others {
            lines.push(format!("     {}:", place.what));
            let own = own_part(&place.stack).iter().take(MAX_OTHER);
            lines.extend(own.map(|function| format!("          {}", function.words())));
        }
        let example = |example: &ExampleDocument| {
            let ExampleDocument { pid, number, resource, target } = example;
            match self.kind {
                Kind::Thread | Kind::Unstopped => format!("thread {number} {target}"),
                Kind::Zombie | Kind::Orphan => format!("pid {pid} {target}"),
                _ => format!("fd {number} of pid {pid}: {resource} {target}").trim_end().to_owned(),
            }
        };
        lines.extend(self.examples.iter().map(|one| format!("     e.g. {}", example(one))));
        lines
    }
}

/// So many of something, in words.
fn some(count: u64, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

/// Without what calls main, which is the same in each program.
fn without_start(stack: &[Function]) -> &[Function] {
    const START: [&str; 4] =
        ["__libc_start_call_main", "__libc_start_main_impl", "__libc_start_main", "_start"];
    let starts =
        |function: &&Function| function.function.as_deref().is_some_and(|name| START.contains(&name));
    let outer = stack.iter().rev().take_while(starts).count();
    if outer == stack.len() { stack } else { &stack[..stack.len() - outer] }
}

/// From the first function outside of the C library on.
fn own_part(stack: &[Function]) -> &[Function] {
    let is_runtime = |function: &Function| {
        let path = function.module.as_deref().unwrap_or_default();
        is_runtime_file(path.rsplit('/').next().unwrap_or_default())
    };
    let at = stack.iter().position(|function| !is_runtime(function)).unwrap_or(0);
    stack.get(at..).unwrap_or_default()
}

impl Subjects {
    /// Parts sites into findings and what rules say is meant.
    pub(crate) fn judge(
        sites: &[Site],
        rules: &Suppressions,
    ) -> (Vec<Finding>, Vec<Suppressed>, Vec<String>) {
        let mut findings = Vec::new();
        let mut suppressed: BTreeMap<(RuleId, Kind), Suppressed> = BTreeMap::new();
        for finding in sites.iter().map(Finding::new) {
            let Some(rule) = rules.of(&finding.subject()) else {
                findings.push(finding);
                continue;
            };
            let entry = suppressed.entry((rule.id, finding.kind)).or_insert_with(|| Suppressed {
                rule: rule.name.clone(),
                file: rule.file.to_string(),
                reason: rule.reason.clone(),
                kind: finding.kind,
                count: 0,
            });
            entry.count += finding.count;
        }
        let matched: BTreeSet<RuleId> = suppressed.keys().map(|(id, _)| *id).collect();
        let unused = rules.unused(&matched).map(|rule| format!("{}:{} {}", rule.file, rule.line, rule.name));
        (findings, suppressed.into_values().collect(), unused.collect())
    }
}

impl Report {
    pub(crate) fn new(
        command: Vec<String>,
        (findings, suppressed, unused_rules): (Vec<Finding>, Vec<Suppressed>, Vec<String>),
        (lost, drift, cost): (Losses, Drift, Cost),
    ) -> Self {
        Self {
            schema: SCHEMA,
            command,
            exit_code: None,
            signal: None,
            told: None,
            seconds: 0.0,
            processes: 0,
            findings,
            suppressed,
            unused_rules,
            single: 0,
            complete: true,
            is_unsure: false,
            lost,
            drift,
            cost,
        }
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        let mut lines = Vec::new();
        let name = self.command.first().map_or("", String::as_str);
        match self.findings.len() {
            0 if self.complete => lines.push(format!("plumb: {name} is clean")),
            0 => lines.push(format!(
                "plumb: nothing was found in {name}, but not all of it was seen{}",
                if self.is_unsure { ", so the exit code is 1" } else { "" },
            )),
            count => lines.push(format!("plumb: {} in {name}", some(count as u64, "finding", "findings"))),
        }
        for (number, finding) in (1..).zip(&self.findings) {
            lines.push(String::new());
            lines.extend(finding.text(number, self.lost.events > 0));
        }
        if !self.findings.is_empty() {
            lines.push(String::new());
        }
        lines.extend(self.own_end(name));
        if self.single > 0 {
            let what = some(u64::from(self.single), "fd or thread was", "fds or threads were");
            lines.push(format!(
                "plumb: {what} left too, not often enough from one line (--repeats 1 lists them)"
            ));
        }
        for Suppressed { rule, reason, count, kind, .. } in &self.suppressed {
            lines.push(format!("plumb: {count} × {} suppressed by `{rule}`: {reason}", kind.word()));
        }
        let unused = self.unused_rules.iter();
        lines.extend(unused.take(MAX_UNUSED).map(|rule| format!("plumb: the rule {rule} matched nothing")));
        if self.unused_rules.len() > MAX_UNUSED {
            lines.push(format!("plumb: and so did {} more", self.unused_rules.len() - MAX_UNUSED));
        }
        let Losses { events, stacks, tables, mappings, processes, sites } = self.lost;
        if events > 0 {
            lines.push(format!(
                "plumb: {events} events were lost: fds and threads may be missing above, or wrong"
            ));
        }
        if tables > 0 {
            lines.push(format!("plumb: {tables} tables of open fds were lost: their numbers may be wrong"));
        }
        // Nothing that was left is without its origin when there is nothing.
        if stacks + mappings > 0 && !(self.findings.is_empty() && self.complete) {
            lines.push(format!("plumb: {} stacks were lost: some origins are missing", stacks + mappings));
        }
        if processes > 0 {
            lines.push(format!(
                "plumb: {processes} processes could not be followed: there were too many at a time"
            ));
        }
        if sites > 0 {
            lines.push(format!("plumb: {sites} more were left, of too many different origins"));
        }
        lines.extend(self.cost_lines());
        lines.join("\n") + "\n"
    }

    /// How the command itself ended, when that was not well.
    fn own_end(&self, name: &str) -> Option<String> {
        match (self.exit_code, self.signal) {
            (_, Some(signal)) if Some(signal) == self.told => None,
            (_, Some(signal)) => Some(format!("plumb: {name} itself was ended by signal {signal}")),
            (Some(code), _) if code != 0 => Some(format!("plumb: {name} itself ended with exit code {code}")),
            _ => None,
        }
    }

    fn cost_lines(&self) -> [String; 2] {
        let Cost { kernel_seconds, plumb_seconds, events } = self.cost;
        let share = kernel_seconds / self.seconds.max(f64::EPSILON) * 100.0;
        let processes = some(self.processes, "process", "processes");
        [
            format!(
                "plumb: followed {processes} for {:.2} s: {}",
                self.seconds,
                some(events, "event", "events")
            ),
            format!(
                "plumb: that took {:.1} ms in the kernel ({share:.1} %) and {:.0} ms beside the command",
                kernel_seconds * 1000.0,
                plumb_seconds * 1000.0,
            ),
        ]
    }

    /// Blocks that would suppress what was found.
    pub(crate) fn suppressions(&self) -> String {
        self.findings.iter().map(|finding| generate(&finding.subject()) + "\n").collect()
    }
}

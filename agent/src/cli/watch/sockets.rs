//! `plumb watch --sockets`: what becomes of the requests, listeners and signals of a process and its descendants.

use std::{
    collections::{HashMap, HashSet},
    time::Instant,
};

use plumb_common::{
    sockets::{COUNTERS, Port},
    task::{ProcKey, TaskRecord},
};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::{
    super::output::{self, Format},
    Arguments, BATCH, Outcome, TICK, Target,
};
use crate::{
    clock::Calendar,
    decode::Event,
    document::SCHEMA,
    drain,
    failure::{Exit, Failure},
    kernel::{Kernel, Plan},
    line::Line,
    losses::{Class, Tally},
    view,
};

/// The only one.
pub(in crate::cli) const SLOT: u32 = 0;

/// What there was, at the end.
#[derive(Serialize)]
struct Sums {
    schema: &'static str,
    ports: Vec<u32>,
    connections: HashMap<&'static str, u64>,
    lost_requests: HashMap<&'static str, u64>,
    /// Of the lost ones, told from the kernel's clocks.
    guessed: u64,
    lost_events: u64,
}

pub(super) fn run(arguments: &Arguments, target: &Target, stop: &CancellationToken) -> Outcome {
    let mut kernel = Kernel::load_required(Plan::SOCKETS)?;
    for status in kernel.programs().iter().filter(|status| !status.is_fine()) {
        let why = status.verdict.explain();
        output::message(&format!("plumb: this kernel does not show {}: {why}", status.program.gives));
    }
    let bug = |error: &dyn std::fmt::Display| {
        Failure::new(Exit::Error, format!("the event stream ended: {error}"), "this is a bug of plumb")
    };
    let mut ring = kernel.ring().map_err(|error| bug(&error))?;
    let began = Instant::now();
    let end = arguments.duration.map(|duration| began + duration);
    let mut followed = Followed::default();
    followed.look(&mut kernel, arguments.pid.unwrap_or_default()).map_err(|error| bug(&error))?;
    let (calendar, is_table) = (Calendar::now(), arguments.output.format == Format::Table);
    output::message(&format!(
        "plumb: watching {} and port {}; ctrl-c ends it",
        output::count(followed.processes.len(), "process", "processes"),
        followed.port_words()
    ));
    if is_table {
        output::data(&format!("{:<24} {:>7} {:>7} {:<15} EVENT\n", "TIME", "PID", "TID", "COMM"))?;
    }
    let (mut tally, mut next_look) = (Tally::default(), began + super::LEDGER_EVERY);
    loop {
        ring.wait(TICK).map_err(|error| bug(&error))?;
        let now = Instant::now();
        let is_over = !target.is_alive() && !followed.processes.keys().any(|pid| is_there(*pid));
        let ending = is_over || stop.is_cancelled() || end.is_some_and(|end| now >= end);
        let mut page = String::new();
        loop {
            let events = ring.drain(BATCH);
            for event in &events {
                if followed.wants(event, &mut tally) {
                    let line = Line::new(event, calendar, None);
                    page += &if is_table { line.text() } else { line.json() };
                    page.push('\n');
                }
            }
            if events.len() < BATCH {
                break;
            }
        }
        if !output::data(&page)? || output::is_hung_up() || ending {
            break;
        }
        if now >= next_look {
            next_look = now + super::LEDGER_EVERY;
            // A worker that was forked since, and the port that it has opened.
            followed.look(&mut kernel, arguments.pid.unwrap_or_default()).map_err(|error| bug(&error))?;
        }
    }
    let counts = kernel.socket_counts(SLOT)?;
    let sums = Sums {
        schema: SCHEMA,
        ports: followed.sorted_ports(),
        connections: COUNTERS.into_iter().zip(counts).collect(),
        lost_requests: Class::ALL
            .into_iter()
            .map(|class| (class.word(), tally.lost().get(&class).copied().unwrap_or(0)))
            .collect(),
        guessed: tally.guessed,
        lost_events: view::lost(&kernel.counts()?) + ring.ledger().rejected + kernel.not_run(),
    };
    output::data(&if is_table { sums.text() } else { output::json(&sums)? + "\n" })?;
    Ok(if stop.is_cancelled() { Exit::Interrupted } else { Exit::Ok })
}

fn is_there(pid: u32) -> bool {
    drain::start_ticks(pid).is_some()
}

impl Sums {
    /// For people.
    fn text(&self) -> String {
        let mut words: Vec<String> = Vec::new();
        for name in COUNTERS {
            if let Some(many @ 1..) = self.connections.get(name) {
                words.push(format!("{many} {}", name.replace('_', " ")));
            }
        }
        let mut text = format!("connections: {}\n", none_if_empty(&words));
        let lost = Class::ALL.into_iter().filter_map(|class| {
            let many = *self.lost_requests.get(class.word())?;
            (many > 0).then(|| format!("{many} {class}"))
        });
        text += &format!("lost requests: {}\n", none_if_empty(&lost.collect::<Vec<_>>()));
        if self.guessed > 0 {
            text += &format!("  {} of them perhaps: told from the kernel's clocks\n", self.guessed);
        }
        if self.lost_events > 0 {
            text += &format!("{} events were lost: there may be more\n", self.lost_events);
        }
        text
    }
}

fn none_if_empty(words: &[String]) -> String {
    if words.is_empty() { "none".to_owned() } else { words.join(", ") }
}

/// A process and all that have been forked by it, directly or not.
fn with_descendants(records: &[TaskRecord], pid: u32) -> Vec<ProcKey> {
    let mut found: Vec<ProcKey> =
        records.iter().map(|record| record.key).filter(|key| key.tgid == pid).collect();
    let mut at = 0;
    while let Some(parent) = found.get(at).copied() {
        let children = records.iter().filter(|record| record.ppid == parent.tgid && record.key != parent);
        found.extend(children.map(|record| record.key));
        at += 1;
    }
    found
}

/// Whose sockets and signals are followed.
#[derive(Default)]
pub(in crate::cli) struct Followed {
    pub(in crate::cli) processes: HashMap<u32, ProcKey>,
    ports: HashSet<Port>,
}

impl Followed {
    /// Takes up what is there now of a process and its descendants.
    pub(in crate::cli) fn look(&mut self, kernel: &mut Kernel, pid: u32) -> anyhow::Result<()> {
        let records = kernel.processes()?;
        let all = with_descendants(&records, pid);
        let pids: Vec<u32> = all.iter().map(|key| key.tgid).collect();
        for (key, ports) in all.into_iter().zip(drain::ports(&pids)) {
            for port in ports.unwrap_or_default() {
                if self.ports.insert(port) {
                    kernel.follow_port(port, SLOT)?;
                }
            }
            if self.processes.insert(key.tgid, key) != Some(key) {
                kernel.follow_signals(key)?;
            }
        }
        Ok(())
    }

    fn wants(&self, event: &Event, tally: &mut Tally) -> bool {
        // Of whom it kills for want of memory the kernel tells the number alone before 6.9.
        let is_own = |process: &ProcKey| {
            let known = self.processes.get(&process.tgid);
            known.is_some_and(|known| known == process || process.start_boottime == 0)
        };
        match event {
            Event::Socket(socket) => tally.take(socket).is_some() || Class::of(socket).is_none(),
            Event::Signal(signal) => is_own(&signal.target),
            Event::Exit(exit) => exit.group_dead != 0 && is_own(&exit.header.process),
            _ => false,
        }
    }

    pub(in crate::cli) fn sorted_ports(&self) -> Vec<u32> {
        let mut ports: Vec<u32> = self.ports.iter().map(|port| port.port).collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    }

    fn port_words(&self) -> String {
        let ports: Vec<String> = self.sorted_ports().iter().map(u32::to_string).collect();
        if ports.is_empty() { "none: it listens nowhere".to_owned() } else { ports.join(", ") }
    }
}

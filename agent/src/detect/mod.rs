//! Leak verdicts from the table. Pure: it takes what a pass saw and a clock reading, and returns what
//! changed and what it wants to know.
//!
//! ```text
//!              the floor rises in 3 of 4                   it grows like a leak, and what came
//!              windows at some scale                       is still held
//!   quiet  ----------------------------->  suspect  ----------------------------------------->  leaking
//!     ^                                     |    ^                                                 |
//!     |   half is given back, it settles,   |    |  it rises again                  half is given  |
//!     |   what was held is replaced,        |    |                                  back, it rests |
//!     |   the process ends or execs         |    |                                  for 10 min, or |
//!     |<------------------------------------+    |                                  it ends, execs |
//!     |                                          |                                                 v
//!     +------------------------------------------+-------------------------------------------  resolved
//!                      10 min later
//! ```
//!
//! `suspect` never alerts. `floors` finds what rises, among all processes and in little memory; `growth` says
//! whether a rise has the form of a leak, and `cohorts` whether what came is kept.
//!
//! What nobody can decide in time: a fill towards a cap that has hardly slowed down yet, and clients that come
//! steadily to stay for tens of minutes, grow and are held exactly as a leak. From one per second on they are
//! called leaks after two minutes, and resolved when they stop. So is a batch that collects steadily for minutes, such
//! as a checkpoint of a database with many tables, but once: what was called a leak and then given back, all of it, is
//! expected to be given back again until it lasts half as long again, rises half as high again or comes near its limit;
//! an agent that is started anew has to see it once more. `sim` says how often.

mod case;
pub(crate) mod cohorts;
mod finding;
mod floors;
mod growth;
mod marks;
mod news;
mod rules;
mod settings;
mod snapshot;

#[cfg(test)]
use std::sync::Arc;

use foldhash::{HashMap, HashSet};
use plumb_common::task::ProcKey;

use self::{
    case::{Case, SECOND, Step},
    floors::{Count, Floors},
    growth::{Demand, Precedents},
    news::Topic,
    settings::Thresholds,
};
pub(crate) use self::{
    finding::{
        Confirmation, Earlier, Example, Finding, HostLimits, Listed, Mark, Resolution, Resource, Rule, State,
        Why,
    },
    marks::Refused,
    news::{News, What},
    settings::{Detect, Ignore, Settings},
    snapshot::Saved,
};
use crate::table::Row;

/// What is resolved stays visible this long, in nanoseconds; and so many at a time.
const VISIBLE: u64 = 600 * SECOND;
const MAX_RESOLVED: usize = 1_024;
/// Times that a count may be suspected in vain before that does not make it harder any more.
const MAX_WARY: u8 = 3;
/// Examples per finding.
const MAX_EXAMPLES: usize = 5;

/// A change of verdict, with what the detector needs to go on.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Change {
    /// A process became suspect: remember what it holds now.
    Suspect(ProcKey, Resource),
    /// It has grown beyond this baseline: what is still held? Answered by `Detector::confirm`.
    Grown(ProcKey, Resource, u32),
    /// No longer suspect or leaking: forget.
    Quiet(ProcKey, Resource),
}

/// The history of every process, and the verdicts.
#[derive(Debug)]
pub(crate) struct Detector {
    limits: HostLimits,
    passes: u32,
    histories: HashMap<ProcKey, History>,
    cases: HashMap<(ProcKey, Resource), Case>,
    /// What the plain rules have found.
    plain: HashMap<(ProcKey, Resource, Rule), Finding>,
    resolved: Ended,
    /// What people have been told beside leaks, and when it held last.
    warned: HashMap<(ProcKey, Resource, Topic), u64>,
    settings: Settings,
    /// What people said about findings.
    marks: HashMap<(ProcKey, Resource, Rule), Mark>,
    /// What counts were called a leak for and then gave back.
    precedents: HashMap<(ProcKey, Resource), Precedents>,
    /// When threads were last asked for by type.
    census: u64,
    /// What an agent before this one had found, until the first pass.
    pending: HashMap<ProcKey, Vec<Saved>>,
}

#[derive(Debug)]
struct History {
    exec_id: u64,
    /// The last pass with this process.
    pass: u32,
    tracks: [Track; 2],
}

/// What was a leak and is none any more.
#[derive(Debug, Default)]
struct Ended {
    visible: Vec<Finding>,
    /// Those of which people were told that they leak, and not yet that they do not.
    untold: Vec<Finding>,
}

/// One count of one process.
#[derive(Debug, Default)]
struct Track {
    floors: Floors,
    /// There is a case against it.
    is_open: bool,
    /// How often it was suspected in vain.
    wary: u8,
    /// The lowest count since the process has warmed up.
    base: Count,
}

impl Detector {
    #[must_use]
    pub(crate) fn new(limits: HostLimits, settings: Settings) -> Self {
        Self {
            limits,
            passes: 0,
            histories: HashMap::default(),
            cases: HashMap::default(),
            plain: HashMap::default(),
            resolved: Ended::default(),
            warned: HashMap::default(),
            settings,
            marks: HashMap::default(),
            precedents: HashMap::default(),
            census: 0,
            pending: HashMap::default(),
        }
    }

    /// Takes one pass at `now` (nanoseconds since boot) and returns what changed.
    pub(crate) fn observe(&mut self, rows: &[Row], now: u64) -> Vec<Change> {
        let mut changes = Vec::new();
        self.passes = self.passes.wrapping_add(1);
        let pass = self.passes;
        if !self.pending.is_empty() {
            self.take_up(rows, now, &mut changes);
        }
        for row in rows.iter().filter(|row| !row.exited && !row.is_kernel_thread()) {
            let fresh = || History { pass, exec_id: row.exec_id, tracks: Default::default() };
            let history = self.histories.entry(row.key).or_insert_with(fresh);
            if history.exec_id != row.exec_id {
                // Another program now: nothing that was learned holds.
                *history = fresh();
                self.warned.retain(|(key, ..), _| *key != row.key);
                for resource in Resource::ALL {
                    self.precedents.remove(&(row.key, resource));
                    self.marks.retain(|(key, of, _), _| (*key, *of) != (row.key, resource));
                    if let Some(case) = self.cases.remove(&(row.key, resource)) {
                        end(case, Why::Exec, now, &mut self.resolved, &mut changes);
                    }
                }
            }
            history.pass = pass;
            for (resource, track) in Resource::ALL.into_iter().zip(&mut history.tracks) {
                if resource == Resource::Fd && !row.fds_exact() {
                    // No reading is better than a wrong one.
                    continue;
                }
                let (live, limit) = usage(row, resource, self.limits);
                let closed = track.floors.observe((now / SECOND) as u32, live);
                if closed == 0 {
                    if track.is_open
                        && let Some(case) = self.cases.get_mut(&(row.key, resource))
                    {
                        case.finding.live = live;
                    }
                    continue;
                }
                track.settle(closed);
                let thresholds = self.settings.detect.of(&row.info.group);
                rules::apply(&mut self.plain, &self.settings, row, (resource, live, limit), track, now);
                let at = (row.key, resource);
                let case = if track.is_open { self.cases.remove(&at) } else { None };
                let was_open = case.is_some();
                if let Some(precedents) = self.precedents.get_mut(&at) {
                    precedents.reading(live);
                }
                let precedents = || self.precedents.get(&at).cloned().unwrap_or_default();
                let suspect = || Finding::suspect(Rule::Trend, resource, row, (live, limit), now);
                let new = || Case::new(suspect(), precedents(), now);
                let Some(mut case) = track.suspicion(case, closed, limit, new) else { continue };
                let limit = limit.into_iter().chain(case.cgroup_limit).min();
                (case.finding.live, case.finding.limit) = (live, limit);
                let (step, change) = case.windows(closed, &mut track.floors, demand(thresholds, limit), now);
                if !was_open {
                    changes.push(Change::Suspect(row.key, resource));
                }
                changes.extend(change);
                match step {
                    Step::Ends(why) => {
                        track.end(why);
                        if case.is_leaking()
                            && let Some(mark) = self.marks.get_mut(&(row.key, resource, Rule::Trend))
                        {
                            // It was of this leak. A silence is for a time.
                            mark.acknowledged = None;
                        }
                        if let Some((base, rise)) = case.rise().filter(|_| why == Why::GivenBack) {
                            self.precedents.entry(at).or_default().expect(base, rise);
                        }
                        end(case, why, now, &mut self.resolved, &mut changes);
                    }
                    Step::Stays => {
                        track.is_open = true;
                        self.cases.insert(at, case);
                    }
                }
            }
        }
        self.histories.retain(|_, history| history.pass == pass);
        let keys = self.cases.keys().filter(|(key, _)| !self.histories.contains_key(key));
        let gone: Vec<_> = keys.copied().collect();
        for at in gone {
            if let Some(case) = self.cases.remove(&at) {
                end(case, Why::ProcessEnded, now, &mut self.resolved, &mut changes);
            }
        }
        self.plain.retain(|(key, ..), _| self.histories.contains_key(key));
        self.marks.retain(|(key, ..), _| self.histories.contains_key(key));
        self.warned.retain(|(key, ..), _| self.histories.contains_key(key));
        self.precedents.retain(|(key, _), _| self.histories.contains_key(key));
        let is_visible =
            |finding: &Finding| finding.resolved.is_some_and(|end| now.saturating_sub(end.at) < VISIBLE);
        self.resolved.visible.retain(is_visible);
        changes
    }

    /// Makes a case its own that was opened elsewhere.
    fn adopt(&mut self, row: &Row, case: Case) {
        let fresh = || History { pass: self.passes, exec_id: row.exec_id, tracks: Default::default() };
        let history = self.histories.entry(row.key).or_insert_with(fresh);
        history.tracks[case.finding.resource as usize].is_open = true;
        self.cases.insert((row.key, case.finding.resource), case);
    }

    /// Takes the answer to `Change::Grown`, which may make it a leak.
    pub(crate) fn confirm(&mut self, key: ProcKey, resource: Resource, found: Confirmation, now: u64) {
        let Some(case) = self.cases.get_mut(&(key, resource)) else { return };
        case.cgroup_limit = found.room.map(|room| u64::from(case.finding.live).saturating_add(room));
        if !found.examples.is_empty() {
            case.finding.ignored = self.settings.ignored(&case.finding, &found.examples, &found.functions);
            case.finding.listed = Some(Listed { at: now, of: found.of, newest: found.sampled });
            case.finding.examples = found.examples;
            case.finding.examples.truncate(MAX_EXAMPLES);
        }
        let thresholds = self.settings.detect.of(&case.finding.info.group);
        case.look(found.holdings, demand(thresholds, case.finding.limit), now);
        if case.is_leaking() {
            let is_same = |finding: &Finding| finding.key == key && finding.resource == resource;
            self.resolved.visible.retain(|finding| !is_same(finding));
        }
    }

    /// The verdicts that are not quiet: the surest first, then the fastest. Whoever is shown a trend is not shown high use
    /// of the same beside it.
    #[must_use]
    pub(crate) fn findings(&self) -> Vec<Finding> {
        let mut findings = self.all();
        let is_rising =
            |of: &&Finding| of.rule == Rule::Trend && of.state != State::Resolved && of.ignored.is_none();
        let rising: HashSet<_> = findings.iter().filter(is_rising).map(|of| (of.key, of.resource)).collect();
        findings.retain(|of| of.rule != Rule::Utilisation || !rising.contains(&(of.key, of.resource)));
        findings
    }

    /// The same, with what is not shown.
    fn all(&self) -> Vec<Finding> {
        let is_resolved = |case: &&Case| {
            let is_same = |finding: &Finding| {
                (finding.key, finding.resource) == (case.finding.key, case.finding.resource)
            };
            self.resolved.visible.iter().any(is_same)
        };
        let open = self.cases.values().filter(|case| !is_resolved(case)).map(|case| &case.finding);
        let all = open.chain(self.plain.values()).chain(&self.resolved.visible);
        let mut findings: Vec<Finding> = all.cloned().collect();
        for finding in &mut findings {
            let at = (finding.key, finding.resource, finding.rule);
            finding.mark = self.marks.get(&at).cloned().unwrap_or_default();
        }
        findings.sort_by(|a, b| {
            let by_growth = b.growth_per_minute.total_cmp(&a.growth_per_minute);
            b.state.cmp(&a.state).then(by_growth).then(a.key.cmp(&b.key))
        });
        findings
    }
}

impl Track {
    /// The case against it, or a `new` one, with all scales at which the floor has begun to rise.
    fn suspicion(
        &self,
        mut case: Option<Case>,
        closed: usize,
        limit: Option<u64>,
        new: impl Fn() -> Case,
    ) -> Option<Case> {
        if case.as_ref().is_some_and(Case::is_leaking) {
            return case;
        }
        for scale in 0..closed {
            if case.as_ref().is_some_and(|case| case.has(scale)) {
                continue;
            }
            let at_limit = || if scale == 0 { self.floors.full(limit) } else { None };
            if let Some(points) = self.floors.rising(scale, self.wary).or_else(at_limit) {
                case.get_or_insert_with(&new).add(scale, points);
            }
        }
        case
    }

    /// Remembers the lowest floor; the first minute is warm-up.
    fn settle(&mut self, closed: usize) {
        if closed > 1
            && let (Some(last), true) = (self.floors.last(1), self.floors.is_warm())
            && (self.base == Count::NONE || Some(last.1) < self.base.get())
        {
            self.base = Count::new(last.1);
        }
    }

    /// The case against it is over.
    fn end(&mut self, why: Why) {
        self.is_open = false;
        if why == Why::Replaced {
            self.wary = (self.wary + 1).min(MAX_WARY);
        }
    }
}

/// What it takes to be a leak, of a count with this limit.
fn demand(thresholds: &Thresholds, limit: Option<u64>) -> Demand {
    Demand { growth: thresholds.growth, seconds: thresholds.seconds, limit }
}

/// Closes a case: what was a leak stays visible.
fn end(mut case: Case, why: Why, now: u64, resolved: &mut Ended, changes: &mut Vec<Change>) {
    changes.push(Change::Quiet(case.finding.key, case.finding.resource));
    if case.finding.state == State::Leaking && resolved.visible.len() < MAX_RESOLVED {
        case.finding.state = State::Resolved;
        case.finding.resolved = Some(Resolution { at: now, why });
        if case.told && !case.silenced {
            resolved.untold.push(case.finding.clone());
        }
        resolved.visible.push(case.finding);
    }
}

/// How many a process has, and how many it may have.
fn usage(row: &Row, resource: Resource, host: HostLimits) -> (u32, Option<u64>) {
    match resource {
        Resource::Fd => (row.fds, (row.fd_limit != u64::MAX).then_some(row.fd_limit)),
        // The kernel does not apply RLIMIT_NPROC to root.
        Resource::Thread if row.uid == 0 => (row.threads, Some(host.threads)),
        // A limit that one process is beyond, or that leaves it one thread, was set so that it starts nothing, as
        // sandboxes do.
        Resource::Thread => {
            let is_meant = row.nproc_limit >= u64::from(row.threads.max(2));
            let own = if is_meant { row.nproc_limit } else { u64::MAX };
            (row.threads, Some(host.threads.min(own)))
        }
    }
}

#[cfg(test)]
mod sim;
#[cfg(test)]
mod tests;

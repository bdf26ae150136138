//! Leak verdicts from the table. Pure: it takes what a pass saw and a clock reading, and returns what
//! changed.
//!
//! ```text
//!            the floor rises twice            five times, and by 20
//!   quiet ------------------------> suspect ------------------------> leaking
//!     ^   or use above 0.8 of the      |    or twice, with use above     |
//!     |   limit for a whole window     |    0.8 of the limit             |
//!     +--------------------------------+---------------------------------+
//!        half of the growth is given back, or five minutes without a rise,
//!                      or the process ends, or runs a new image
//! ```
//!
//! `suspect` never alerts. See `trend` for what a rise is.

mod trend;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use plumb_common::task::ProcKey;
use serde::{Deserialize, Serialize};

use self::trend::Trend;
use crate::{evidence::Example, procfs::ProcStatic, table::Row};

/// What can leak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Resource {
    Fd,
    Thread,
}

impl Resource {
    pub(crate) const ALL: [Self; 2] = [Self::Fd, Self::Thread];

    /// The word used in metrics, JSON and ids.
    #[must_use]
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Fd => "fd",
            Self::Thread => "thread",
        }
    }
}

/// How sure the verdict is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    #[default]
    Quiet,
    /// Worth a look; never alerts.
    Suspect,
    /// Reported.
    Leaking,
}

impl State {
    /// The word used in metrics and tables.
    #[must_use]
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Quiet => "quiet",
            Self::Suspect => "suspect",
            Self::Leaking => "leaking",
        }
    }
}

/// Limits that hold for the whole host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostLimits {
    /// The smaller of kernel.pid_max and kernel.threads-max.
    pub threads: u64,
}

/// A verdict with its evidence.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Finding {
    pub state: State,
    pub resource: Resource,
    pub key: ProcKey,
    pub info: Arc<ProcStatic>,
    /// How many there are now.
    pub live: u32,
    /// The floor before it began to rise.
    pub baseline: u32,
    /// The limit that will be hit; `None` when there is none.
    pub limit: Option<u64>,
    /// Mean rise of the floor since it began.
    pub growth_per_minute: f64,
    /// Nanoseconds since boot of the first rise, or of the first window above 0.8 of the limit.
    pub first_seen: u64,
    /// What leaks: paths, addresses, names. Empty until they have been looked up.
    pub examples: Vec<Example>,
}

impl Finding {
    /// A name that survives a restart of the agent.
    #[must_use]
    pub(crate) fn id(&self) -> String {
        // The start in units of 10 ms tells one use of a pid from the next.
        let start = (self.key.start_boottime / 10_000_000) & 0xff_ffff;
        format!("{}-{}-{start:x}", self.resource.word(), self.key.tgid)
    }

    /// Seconds until the limit at the present rate; `None` when it is not growing or there is no limit.
    #[must_use]
    pub(crate) fn seconds_to_exhaustion(&self) -> Option<f64> {
        let left = self.limit?.saturating_sub(u64::from(self.live));
        (self.growth_per_minute > 0.0).then(|| left as f64 * 60.0 / self.growth_per_minute)
    }
}

/// A change of verdict.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Change {
    /// A process became suspect: remember what it holds now.
    Suspect(ProcKey, Resource),
    /// It leaks.
    Leaking(ProcKey, Resource),
    /// It does no longer.
    Quiet(ProcKey, Resource),
}

/// The history of every process, and the verdicts.
#[derive(Debug)]
pub(crate) struct Detector {
    limits: HostLimits,
    histories: HashMap<ProcKey, History>,
    findings: HashMap<(ProcKey, Resource), Finding>,
}

#[derive(Debug)]
struct History {
    exec_id: u64,
    trends: [Trend; 2],
}

impl Detector {
    #[must_use]
    pub(crate) fn new(limits: HostLimits) -> Self {
        Self { limits, histories: HashMap::new(), findings: HashMap::new() }
    }

    /// Takes one pass at `now` (nanoseconds since boot) and returns what changed.
    pub(crate) fn observe(&mut self, rows: &[Row], now: u64) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut alive = HashSet::with_capacity(rows.len());
        for row in rows.iter().filter(|row| !row.exited && !row.is_kernel_thread()) {
            alive.insert(row.key);
            let fresh = || History { exec_id: row.exec_id, trends: Default::default() };
            let history = self.histories.entry(row.key).or_insert_with(fresh);
            if history.exec_id != row.exec_id {
                // Another program now: nothing that was learned holds.
                *history = fresh();
                forget(&mut self.findings, row.key, &mut changes);
            }
            for (resource, trend) in Resource::ALL.into_iter().zip(&mut history.trends) {
                let (live, limit) = usage(row, resource, self.limits);
                let state = trend.observe(now, live, limit);
                settle(&mut self.findings, row, resource, trend, (state, live, limit), &mut changes);
            }
        }
        self.histories.retain(|key, _| alive.contains(key));
        let gone: Vec<_> =
            self.findings.keys().map(|(key, _)| *key).filter(|key| !alive.contains(key)).collect();
        gone.into_iter().for_each(|key| forget(&mut self.findings, key, &mut changes));
        changes
    }

    /// Adds what was found to leak to a finding that is still there.
    pub(crate) fn illustrate(
        &mut self,
        key: ProcKey,
        resource: Resource,
        examples: Vec<Example>,
    ) -> Option<&Finding> {
        let finding = self.findings.get_mut(&(key, resource))?;
        finding.examples = examples;
        Some(finding)
    }

    /// The verdicts that are not quiet: the surest first, then the fastest.
    #[must_use]
    pub(crate) fn findings(&self) -> Vec<Finding> {
        let mut findings: Vec<_> = self.findings.values().cloned().collect();
        findings.sort_by(|a, b| {
            let by_growth = b.growth_per_minute.total_cmp(&a.growth_per_minute);
            b.state.cmp(&a.state).then(by_growth).then(a.key.cmp(&b.key))
        });
        findings
    }
}

/// How many a process has, and how many it may have.
fn usage(row: &Row, resource: Resource, host: HostLimits) -> (u32, Option<u64>) {
    match resource {
        Resource::Fd => (row.fds, (row.fd_limit != u64::MAX).then_some(row.fd_limit)),
        // The kernel does not apply RLIMIT_NPROC to root.
        Resource::Thread if row.uid == 0 => (row.threads, Some(host.threads)),
        Resource::Thread => (row.threads, Some(host.threads.min(row.nproc_limit))),
    }
}

fn settle(
    findings: &mut HashMap<(ProcKey, Resource), Finding>,
    row: &Row,
    resource: Resource,
    trend: &Trend,
    (state, live, limit): (State, u32, Option<u64>),
    changes: &mut Vec<Change>,
) {
    let at = (row.key, resource);
    let before = findings.get(&at).map_or(State::Quiet, |finding| finding.state);
    match state {
        State::Quiet if before != State::Quiet => changes.push(Change::Quiet(row.key, resource)),
        State::Suspect if before == State::Quiet => changes.push(Change::Suspect(row.key, resource)),
        State::Leaking if before != State::Leaking => changes.push(Change::Leaking(row.key, resource)),
        _ => {}
    }
    if state == State::Quiet {
        findings.remove(&at);
        return;
    }
    let examples = findings.remove(&at).map(|finding| finding.examples).unwrap_or_default();
    findings.insert(
        at,
        Finding {
            state,
            resource,
            key: row.key,
            info: Arc::clone(&row.info),
            live,
            baseline: trend.baseline(),
            limit,
            growth_per_minute: trend.growth_per_minute(),
            first_seen: trend.since(),
            examples,
        },
    );
}

fn forget(findings: &mut HashMap<(ProcKey, Resource), Finding>, key: ProcKey, changes: &mut Vec<Change>) {
    for resource in Resource::ALL {
        if findings.remove(&(key, resource)).is_some() {
            changes.push(Change::Quiet(key, resource));
        }
    }
}

#[cfg(test)]
mod tests;

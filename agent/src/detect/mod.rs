//! Leak verdicts from the table. Pure: it takes what a pass saw and a clock reading, and returns what
//! changed and what it wants to know.
//!
//! ```text
//!             the floor rises twice                 the floor rises five times and further,
//!   quiet  -------------------------->  suspect  ------------------------------------------->  leaking
//!     ^     or use stays above 0.8 of       |     and half of that was held at suspicion          |
//!     |     the limit for a window          |     and still is; above 0.8 of the limit            |
//!     |                                     |     two rises will do                               |
//!     +-------------------------------------+-----------------------------------------------------+
//!          half of the growth is given back, or five minutes pass without a rise, or what was
//!          held has been replaced, or the process ends or runs a new image
//! ```
//!
//! `suspect` never alerts. See `trend` for what a rise is and how much growth it takes. The second
//! condition tells a leak from load: a server that has more connections than before, but other ones, is
//! busy. Connections that live for minutes and only become more look like a leak, and are called one.

mod trend;

use std::sync::Arc;

use foldhash::HashMap;
use plumb_common::task::ProcKey;
use serde::{Deserialize, Serialize};

use self::trend::{Level, Trend};
use crate::{origins::ByOrigin, procfs::ProcStatic, table::Row};

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
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
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
            Self::Suspect => "suspect",
            Self::Leaking => "leaking",
        }
    }
}

/// One kind of thing that leaks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Example {
    /// Path, addresses, anonymous kind, or thread name.
    pub(crate) what: String,
    /// `file`, `socket`, `eventfd`, …, or `thread`.
    pub(crate) kind: String,
    /// How many of the newest survivors look like this.
    pub(crate) count: u32,
}

/// What speaks for or against a leak.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Confirmation {
    /// How many of those held at suspicion are still held; `None` when nobody could remember them.
    pub(crate) survivors: Option<u32>,
    /// What the newest of them are, the most frequent first.
    pub(crate) examples: Vec<Example>,
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
    /// Where what it has came from; empty for what nobody watches.
    pub origins: ByOrigin,
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

/// A change of verdict, with what the detector needs to go on.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Change {
    /// A process became suspect: remember what it holds now.
    Suspect(ProcKey, Resource),
    /// It has grown beyond this baseline: is what it held then still held? Answered by `Detector::confirm`.
    Grown(ProcKey, Resource, u32),
    /// No longer suspect or leaking: forget.
    Quiet(ProcKey, Resource),
}

/// What was held at suspicion is looked at again no sooner than this, in nanoseconds: to still hold it a
/// moment later proves nothing.
const PROOF: u64 = 29_000_000_000;
/// After this time, in nanoseconds, an answer is not waited for any longer and is asked for again.
const ANSWER: u64 = 30_000_000_000;

/// The history of every process, and the verdicts.
#[derive(Debug)]
pub(crate) struct Detector {
    limits: HostLimits,
    passes: u64,
    histories: HashMap<ProcKey, History>,
    findings: HashMap<(ProcKey, Resource), Finding>,
}

#[derive(Debug)]
struct History {
    /// The last pass with this process.
    pass: u64,
    exec_id: u64,
    tracks: [Track; 2],
}

/// One count of one process.
#[derive(Debug, Default)]
struct Track {
    trend: Trend,
    /// As of the last pass.
    level: Level,
    /// When it became suspect.
    suspected: u64,
    /// When confirmation was last asked for; 0 for never.
    asked: u64,
    /// What was held is still held.
    confirmed: bool,
}

impl Detector {
    #[must_use]
    pub(crate) fn new(limits: HostLimits) -> Self {
        Self { limits, passes: 0, histories: HashMap::default(), findings: HashMap::default() }
    }

    /// Takes one pass at `now` (nanoseconds since boot) and returns what changed.
    pub(crate) fn observe(&mut self, rows: &[Row], now: u64) -> Vec<Change> {
        let mut changes = Vec::new();
        self.passes += 1;
        let pass = self.passes;
        for row in rows.iter().filter(|row| !row.exited && !row.is_kernel_thread()) {
            let fresh = || History { pass, exec_id: row.exec_id, tracks: Default::default() };
            let history = self.histories.entry(row.key).or_insert_with(fresh);
            if history.exec_id != row.exec_id {
                // Another program now: nothing that was learned holds.
                *history = fresh();
                forget(&mut self.findings, row.key, &mut changes);
            }
            history.pass = pass;
            for (resource, track) in Resource::ALL.into_iter().zip(&mut history.tracks) {
                if resource == Resource::Fd && !row.fds_exact() {
                    // No reading is better than a wrong one.
                    continue;
                }
                let (live, limit) = usage(row, resource, self.limits);
                let level = track.trend.observe(now, live, limit);
                if let Some(change) = track.step(row.key, resource, level, now) {
                    changes.push(change);
                }
                let at = (row.key, resource);
                let before = self.findings.remove(&at);
                if let Some(state) = track.state(level) {
                    let examples = before.map(|finding| finding.examples).unwrap_or_default();
                    let finding = Finding {
                        state,
                        resource,
                        key: row.key,
                        info: Arc::clone(&row.info),
                        live,
                        baseline: track.trend.baseline(),
                        limit,
                        growth_per_minute: track.trend.growth_per_minute(),
                        first_seen: track.trend.since(),
                        examples,
                        origins: ByOrigin::default(),
                    };
                    self.findings.insert(at, finding);
                } else if before.is_some() {
                    changes.push(Change::Quiet(row.key, resource));
                }
            }
        }
        self.histories.retain(|_, history| history.pass == pass);
        let keys = self.findings.keys().map(|(key, _)| *key);
        let gone: Vec<_> = keys.filter(|key| !self.histories.contains_key(key)).collect();
        gone.into_iter().for_each(|key| forget(&mut self.findings, key, &mut changes));
        changes
    }

    /// Takes the answer to `Change::Grown`. Returns the finding when it is a leak as of now.
    pub(crate) fn confirm(
        &mut self,
        key: ProcKey,
        resource: Resource,
        found: Confirmation,
    ) -> Option<&Finding> {
        let track = &mut self.histories.get_mut(&key)?.tracks[resource as usize];
        let finding = self.findings.get_mut(&(key, resource))?;
        if track.confirmed || track.asked == 0 {
            return None;
        }
        // Nobody could remember: the trend speaks for itself.
        if found.survivors.is_some_and(|survivors| survivors < track.trend.growth() / 2) {
            track.trend.restart();
            // Whatever makes it suspect again, what it holds then is to be remembered.
            (track.level, track.asked) = (Level::Quiet, 0);
            return None;
        }
        track.confirmed = true;
        finding.state = State::Leaking;
        finding.examples = found.examples;
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

impl Track {
    /// The verdict at a level; `None` is quiet.
    fn state(&self, level: Level) -> Option<State> {
        match level {
            Level::Quiet => None,
            Level::Grown if self.confirmed => Some(State::Leaking),
            Level::Suspect | Level::Grown => Some(State::Suspect),
        }
    }

    /// Keeps book of what the rest of the agent has been asked for, and says what to ask now.
    fn step(&mut self, key: ProcKey, resource: Resource, level: Level, now: u64) -> Option<Change> {
        let was = std::mem::replace(&mut self.level, level);
        match level {
            Level::Quiet => {
                (self.asked, self.confirmed) = (0, false);
                None
            }
            Level::Suspect | Level::Grown if was == Level::Quiet => {
                self.suspected = now;
                Some(Change::Suspect(key, resource))
            }
            Level::Suspect => {
                self.confirmed = false;
                None
            }
            Level::Grown if self.confirmed || now.saturating_sub(self.suspected) < PROOF => None,
            Level::Grown if self.asked != 0 && now.saturating_sub(self.asked) < ANSWER => None,
            Level::Grown => {
                self.asked = now;
                Some(Change::Grown(key, resource, self.trend.baseline()))
            }
        }
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

fn forget(findings: &mut HashMap<(ProcKey, Resource), Finding>, key: ProcKey, changes: &mut Vec<Change>) {
    for resource in Resource::ALL {
        if findings.remove(&(key, resource)).is_some() {
            changes.push(Change::Quiet(key, resource));
        }
    }
}

#[cfg(test)]
mod tests;

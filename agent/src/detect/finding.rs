//! What a verdict consists of.

use std::sync::Arc;

use plumb_common::task::ProcKey;
use serde::{Deserialize, Serialize};

use super::cohorts::Holdings;
use crate::{detail::Detail, procfs::ProcStatic, table::Row};

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
    /// Was a leak and is none any more; stays visible for a while.
    Resolved,
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
            Self::Resolved => "resolved",
            Self::Suspect => "suspect",
            Self::Leaking => "leaking",
        }
    }
}

/// Which rule found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Rule {
    /// It grows like a leak, and what came is still held. The only rule that says `leaking`.
    Trend,
    /// Use above a part of the limit.
    Utilisation,
    /// More threads than at first, by a fixed number.
    ThreadsOverBaseline,
    /// A thread of a type that should not live long does.
    ThreadAge,
}

impl Rule {
    /// The word used in JSON and tables.
    #[must_use]
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Trend => "trend",
            Self::Utilisation => "utilisation",
            Self::ThreadsOverBaseline => "threads-over-baseline",
            Self::ThreadAge => "thread-age",
        }
    }

    /// What tells its findings from those of the trend, in ids.
    fn suffix(self) -> &'static str {
        match self {
            Self::Trend => "",
            Self::Utilisation => "-use",
            Self::ThreadsOverBaseline => "-more",
            Self::ThreadAge => "-old",
        }
    }
}

/// Why something is no leak any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Why {
    /// Half of the growth or more is gone.
    GivenBack,
    /// What is held now is not what was held.
    Replaced,
    /// It has stopped growing.
    Settled,
    ProcessEnded,
    /// The process runs another program.
    Exec,
}

impl Why {
    /// The words used in tables.
    #[must_use]
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::GivenBack => "given back",
            Self::Replaced => "replaced",
            Self::Settled => "settled",
            Self::ProcessEnded => "process ended",
            Self::Exec => "runs another program",
        }
    }
}

/// The end of a leak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Resolution {
    /// Nanoseconds since boot.
    pub at: u64,
    pub why: Why,
}

/// What somebody has said about a finding.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mark {
    pub acknowledged: Option<Acknowledged>,
    /// Not to be told before this time, nanoseconds since boot.
    pub silenced_until: Option<u64>,
}

/// Somebody knows of it. Holds until it has clearly become worse.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Acknowledged {
    /// Nanoseconds since boot.
    pub at: u64,
    pub reason: Option<String>,
    /// How many there were.
    pub live: u32,
}

impl Mark {
    /// Whether it is quiet about a finding with so many, at this time.
    #[must_use]
    pub(crate) fn is_quiet(&self, live: u32, now: u64) -> bool {
        self.silenced_until.is_some_and(|until| now < until) || self.holds(live)
    }

    /// Whether it is acknowledged and has not become twice as large since.
    fn holds(&self, live: u32) -> bool {
        self.acknowledged.as_ref().is_some_and(|known| u64::from(live) < u64::from(known.live.max(1)) * 2)
    }

    /// Forgets what does not hold any more. Whether that was an acknowledgement.
    pub(crate) fn age(&mut self, live: u32, now: u64) -> bool {
        self.silenced_until = self.silenced_until.filter(|until| now < *until);
        let outgrown = self.acknowledged.is_some() && !self.holds(live);
        if outgrown {
            self.acknowledged = None;
        }
        outgrown
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

/// When examples were listed, and of how many they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Listed {
    /// Nanoseconds since boot.
    pub at: u64,
    /// What had come since the baseline and was still held.
    pub of: u32,
    /// Of these only so many of the newest were looked at; `None` when all were.
    pub newest: Option<u32>,
}

/// Where most of it came from, as an agent before this one saw it: what is full makes nothing new that could be seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Earlier {
    /// Function and caller.
    pub words: String,
    /// How many came from there.
    pub live: u32,
    /// When the newest of them was made, nanoseconds since boot.
    pub newest: u64,
}

/// A count that uses all but one part in so many of its limit is full; one that still rises if no more than so many
/// are left as well, for the rest of a large limit may last for hours.
const FULL_PART: u64 = 50;
const FULL_LEFT: u64 = 64;
/// So is a trend that ends so many below its limit, if that is most of it: not every number suits every call (a shell
/// takes those from 10 on).
const STOPPED_LEFT: u64 = 8;
const STOPPED_MOST: f64 = 0.8;
/// What rises by less per minute does not rise: the slowest leaks are four an hour.
const STILL: f64 = 0.05;

/// What speaks for or against a leak: the answer to `Change::Grown`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Confirmation {
    /// What has been held since suspicion, by age; `None` when nobody could remember it.
    pub(crate) holdings: Option<Holdings>,
    /// What the newest survivors are, the most frequent first.
    pub(crate) examples: Vec<Example>,
    /// They are of so many.
    pub(crate) of: u32,
    /// Of these only so many of the newest were looked at; `None` when all were.
    pub(crate) sampled: Option<u32>,
    /// How many more threads the cgroups of the process allow; `None` without a limit.
    pub(crate) room: Option<u64>,
    /// Which functions opened them, as far as somebody knows.
    pub(crate) functions: Vec<(String, u32)>,
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
    pub rule: Rule,
    pub resource: Resource,
    pub key: ProcKey,
    pub info: Arc<ProcStatic>,
    /// How many there are now; of what is resolved, at its end.
    pub live: u32,
    /// The floor before it began to rise; of more threads than at first, how many these were; of the other rules, the
    /// count when it was first seen.
    pub baseline: u32,
    /// The limit that will be hit; `None` when there is none.
    pub limit: Option<u64>,
    /// Slope of the floor.
    pub growth_per_minute: f64,
    /// Nanoseconds since boot of the floor before the first rise, or of the first window that broke a rule; never
    /// before the process began.
    pub first_seen: u64,
    /// Since when it is leaking, nanoseconds since boot.
    pub leaking_since: Option<u64>,
    pub resolved: Option<Resolution>,
    /// Why it is not to be told.
    pub ignored: Option<Arc<str>>,
    pub mark: Mark,
    /// What leaks: paths, addresses, names. Empty until they have been looked up.
    pub examples: Vec<Example>,
    /// When that was, and of how many they are.
    pub listed: Option<Listed>,
    pub earlier: Option<Arc<Earlier>>,
    /// What the rest of the agent knows of it.
    pub detail: Detail,
}

impl Finding {
    /// What is known as soon as something is suspected.
    #[must_use]
    pub(super) fn suspect(
        rule: Rule,
        resource: Resource,
        row: &Row,
        usage: (u32, Option<u64>),
        now: u64,
    ) -> Self {
        Self {
            state: State::Suspect,
            rule,
            resource,
            key: row.key,
            info: Arc::clone(&row.info),
            live: usage.0,
            baseline: usage.0,
            limit: usage.1,
            growth_per_minute: 0.0,
            first_seen: now,
            leaking_since: None,
            resolved: None,
            ignored: None,
            mark: Mark::default(),
            examples: Vec::new(),
            listed: None,
            earlier: None,
            detail: Detail::default(),
        }
    }

    /// A name that survives a restart of the agent.
    #[must_use]
    pub(crate) fn id(&self) -> String {
        // The start in units of 10 ms tells one use of a pid from the next.
        let start = (self.key.start_boottime / 10_000_000) & 0xff_ffff;
        format!("{}-{}-{start:x}{}", self.resource.word(), self.key.tgid, self.rule.suffix())
    }

    /// Whether it is at its limit, as far as whoever needs another one is concerned.
    #[must_use]
    pub(crate) fn is_full(&self) -> bool {
        self.state != State::Resolved && self.is_at_limit()
    }

    /// The same of what is resolved too, at its end.
    #[must_use]
    pub(crate) fn is_at_limit(&self) -> bool {
        let Some(limit) = self.limit else { return false };
        let left = limit.saturating_sub(u64::from(self.live));
        if self.growth_per_minute >= STILL {
            return left <= (limit / FULL_PART).min(FULL_LEFT);
        }
        let is_most = f64::from(self.live) >= limit as f64 * STOPPED_MOST;
        left <= limit / FULL_PART || (self.rule == Rule::Trend && left <= STOPPED_LEFT && is_most)
    }

    /// Whether its limit is below what it has: that was set so that nothing more is opened, as sandboxes do.
    #[must_use]
    pub(crate) fn is_sealed(&self) -> bool {
        self.limit.is_some_and(|limit| u64::from(self.live) > limit)
    }

    /// Seconds until the limit at the present rate, 0 when it is full; `None` when it is not growing or there is no
    /// limit.
    #[must_use]
    pub(crate) fn seconds_to_exhaustion(&self) -> Option<f64> {
        let left = self.limit?.saturating_sub(u64::from(self.live));
        match self.state {
            State::Resolved => None,
            _ if self.is_full() => Some(0.0),
            _ => (self.growth_per_minute > 0.0).then(|| left as f64 * 60.0 / self.growth_per_minute),
        }
    }
}

//! What the detector is told: thresholds, by group where they differ, and what is to be ignored.

use std::{collections::BTreeMap, fmt, sync::Arc};

use globset::{Glob, GlobSet};
use serde::{Deserialize, Deserializer, de};

use super::finding::{Example, Finding};
use crate::thread_type::thread_type;

/// Thresholds, as they hold for one group.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Thresholds {
    /// Least growth of a floor that is a leak.
    pub growth: u32,
    /// Least time that it has grown for, in seconds.
    pub seconds: u32,
    /// Part of the limit above which a count is suspect; 0 is off.
    pub utilisation: f64,
    /// Threads above the baseline that are suspect; 0 is off.
    pub threads_over_baseline: u32,
    /// Age in seconds above which a thread of a tracked type is suspect.
    pub thread_age: u64,
    /// The types that are tracked; see `thread_type`.
    pub thread_types: Vec<String>,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self {
            growth: 30,
            seconds: 105,
            utilisation: 0.8,
            threads_over_baseline: 0,
            thread_age: 600,
            thread_types: Vec::new(),
        }
    }
}

/// The `[detect]` table: thresholds for all, and what differs for a group.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Written {
    growth: Option<u32>,
    seconds: Option<u32>,
    utilisation: Option<f64>,
    threads_over_baseline: Option<u32>,
    thread_age: Option<u64>,
    thread_types: Option<Vec<String>>,
    groups: BTreeMap<String, Self>,
}

impl Written {
    fn over(&self, base: &Thresholds) -> Result<Thresholds, String> {
        let thresholds = Thresholds {
            growth: self.growth.unwrap_or(base.growth),
            seconds: self.seconds.unwrap_or(base.seconds),
            utilisation: self.utilisation.unwrap_or(base.utilisation),
            threads_over_baseline: self.threads_over_baseline.unwrap_or(base.threads_over_baseline),
            thread_age: self.thread_age.unwrap_or(base.thread_age),
            thread_types: self.thread_types.clone().unwrap_or_else(|| base.thread_types.clone()),
        };
        if thresholds.growth < 8 || thresholds.seconds < 30 {
            return Err("growth is 8 or more, and seconds 30 or more: less is noise".to_owned());
        }
        if !(0.0..=1.0).contains(&thresholds.utilisation) {
            return Err("utilisation is a part of the limit, from 0 (off) to 1".to_owned());
        }
        Ok(thresholds)
    }
}

/// Thresholds for all, and for some groups.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Detect {
    all: Thresholds,
    groups: BTreeMap<String, Thresholds>,
}

impl Detect {
    /// What holds for a group.
    #[must_use]
    pub(crate) fn of(&self, group: &str) -> &Thresholds {
        self.groups.get(group).unwrap_or(&self.all)
    }

    /// Whether any threads are tracked by their type.
    #[must_use]
    pub(crate) fn tracks_threads(&self) -> bool {
        let mut all = self.groups.values().chain([&self.all]);
        all.any(|thresholds| !thresholds.thread_types.is_empty())
    }
}

impl<'de> Deserialize<'de> for Detect {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let written = Written::deserialize(from)?;
        let all = written.over(&Thresholds::default()).map_err(de::Error::custom)?;
        let mut groups = BTreeMap::new();
        for (group, differs) in &written.groups {
            if !differs.groups.is_empty() {
                return Err(de::Error::custom("a group has no groups"));
            }
            groups.insert(group.clone(), differs.over(&all).map_err(de::Error::custom)?);
        }
        Ok(Self { all, groups })
    }
}

/// A glob: `*` stands for anything, also `/`; `?` for one letter; `[ab]` and `{one,two}` for a choice.
#[derive(Clone)]
pub(crate) struct Pattern {
    glob: Glob,
    /// A set of one: unlike a matcher of the glob it says so when the glob is too large or too deep.
    set: GlobSet,
}

impl Pattern {
    fn matches(&self, text: &str) -> bool {
        self.set.is_match(text)
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.glob.fmt(f)
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.glob == other.glob
    }
}

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let glob = Glob::new(&text).map_err(de::Error::custom)?;
        let set = GlobSet::builder().add(glob.clone()).build();
        set.map(|set| Self { glob, set }).map_err(|error| {
            let why = error.kind();
            de::Error::custom(format!("a glob is nested too deeply or too large: {why}"))
        })
    }
}

/// An `[[ignore]]` table: what is to be ignored although it may leak, and why. All that is given must match.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "WrittenIgnore")]
pub(crate) struct Ignore {
    pub reason: String,
    group: Option<Pattern>,
    comm: Option<Pattern>,
    kind: Option<Pattern>,
    path: Option<Pattern>,
    thread_type: Option<Pattern>,
    function: Option<Pattern>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenIgnore {
    reason: String,
    group: Option<Pattern>,
    comm: Option<Pattern>,
    kind: Option<Pattern>,
    path: Option<Pattern>,
    thread_type: Option<Pattern>,
    function: Option<Pattern>,
}

impl TryFrom<WrittenIgnore> for Ignore {
    type Error = String;

    fn try_from(written: WrittenIgnore) -> Result<Self, String> {
        let WrittenIgnore { reason, group, comm, kind, path, thread_type, function } = written;
        if reason.trim().is_empty() {
            return Err("the reason of an [[ignore]] is empty: say why it is no leak".to_owned());
        }
        if reason.chars().any(char::is_control) {
            return Err("the reason of an [[ignore]] is one line of plain text".to_owned());
        }
        if [&group, &comm, &kind, &path, &thread_type, &function].iter().all(|given| given.is_none()) {
            return Err("an [[ignore]] without group, comm, kind, path, thread_type or function would ignore everything"
                .to_owned());
        }
        Ok(Self { reason, group, comm, kind, path, thread_type, function })
    }
}

impl Ignore {
    /// Whether it holds for a finding, of which all that could be looked up is `held` and `functions`: half of it
    /// or more must match. What nobody has looked up yet does not.
    #[must_use]
    pub(crate) fn matches(&self, finding: &Finding, held: &[Example], functions: &[(String, u32)]) -> bool {
        let is = |pattern: &Option<Pattern>, text: &str| pattern.as_ref().is_none_or(|it| it.matches(text));
        if !is(&self.group, &finding.info.group) || !is(&self.comm, &finding.info.comm) {
            return false;
        }
        let by_item = [&self.kind, &self.path, &self.thread_type].iter().any(|given| given.is_some());
        let item = |example: &&Example| {
            let is_thread = example.kind == "thread";
            is(&self.kind, &example.kind)
                && (self.path.is_none() || (!is_thread && is(&self.path, &example.what)))
                && (self.thread_type.is_none()
                    || (is_thread && is(&self.thread_type, thread_type(&example.what))))
        };
        (!by_item || half(held.iter().map(|example| (item(&example), example.count))))
            && (self.function.is_none()
                || half(functions.iter().map(|(function, count)| (is(&self.function, function), *count))))
    }
}

/// Whether those that match are half or more of all, and any.
fn half(counts: impl Iterator<Item = (bool, u32)>) -> bool {
    let (matching, all) = counts.fold((0u64, 0u64), |(matching, all), (is, count)| {
        (matching + if is { u64::from(count) } else { 0 }, all + u64::from(count))
    });
    matching > 0 && matching * 2 >= all
}

/// All that the detector is told.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Settings {
    pub detect: Detect,
    pub ignore: Vec<Ignore>,
}

impl Settings {
    /// Why a finding is ignored, of which all that could be looked up is `held` and `functions`.
    #[must_use]
    pub(super) fn ignored(
        &self,
        finding: &Finding,
        held: &[Example],
        functions: &[(String, u32)],
    ) -> Option<Arc<str>> {
        let rule = self.ignore.iter().find(|rule| rule.matches(finding, held, functions))?;
        Some(rule.reason.as_str().into())
    }
}

//! What of the detector outlives a restart of the agent: leaks, suspects, and what people said of them.

use std::sync::Arc;

use foldhash::{HashMap, HashMapExt};
use plumb_common::task::ProcKey;
use serde::{Deserialize, Serialize};

use super::{
    Change, Detector,
    case::{Case, SECOND},
    finding::{Earlier, Example, Finding, Listed, Mark, Resource, Rule, State},
    floors::Point,
    growth::{MAX_POINTS, Precedents},
    news::Topic,
    usage,
};
use crate::{table::Row, text};

/// Entries at most; leaks come first.
const MAX_SAVED: usize = 1_024;
/// Letters of each text at most.
const MAX_TEXT: usize = 256;
/// Examples of each finding at most.
const MAX_EXAMPLES: usize = 5;

/// What is kept of one finding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Saved {
    tgid: u32,
    start_boottime: u64,
    exec_id: u64,
    resource: Resource,
    rule: Rule,
    state: State,
    told: bool,
    /// People have been told that it is full.
    #[serde(default)]
    told_full: bool,
    leaking_since: Option<u64>,
    ignored: Option<String>,
    mark: Mark,
    examples: Vec<Example>,
    #[serde(default)]
    listed: Option<Listed>,
    /// Where most of it came from.
    #[serde(default)]
    earlier: Option<Earlier>,
    /// Of the scale at which it was seen, and its floors.
    window: u32,
    points: Vec<Point>,
}

impl Saved {
    fn key(&self) -> ProcKey {
        ProcKey::new(self.tgid, self.start_boottime)
    }

    /// Whether it can have been written by this program before `now`.
    fn is_sound(&self, now: u64) -> bool {
        let short = |text: &str| text.chars().count() <= MAX_TEXT;
        let (first, last) = (self.points.first().map_or(0, |point| point.0), (now / SECOND) as u32);
        self.points.len() <= MAX_POINTS
            && self.points.windows(2).all(|pair| pair[0].0 < pair[1].0)
            && self.points.last().is_none_or(|point| point.0 <= last)
            && (self.state != State::Leaking || (!self.points.is_empty() && self.rule == Rule::Trend))
            && u64::from(first) * SECOND <= now
            && self.leaking_since.is_none_or(|since| since <= now)
            && (1..=86_400).contains(&self.window)
            && self.examples.len() <= MAX_EXAMPLES
            && self.examples.iter().all(|example| short(&example.what) && short(&example.kind))
            && self.listed.is_none_or(|listed| listed.at <= now)
            && self.earlier.as_ref().is_none_or(|earlier| {
                short(&earlier.words) && !earlier.words.contains(text::is_harmful) && earlier.newest <= now
            })
            && self.ignored.as_deref().is_none_or(short)
            && self.mark.acknowledged.as_ref().is_none_or(|known| known.reason.as_deref().is_none_or(short))
    }
}

#[cfg(test)]
impl Saved {
    pub(crate) fn example() -> Self {
        Self {
            tgid: 1,
            start_boottime: 2,
            exec_id: 3,
            resource: Resource::Fd,
            rule: Rule::Trend,
            state: State::Leaking,
            told: true,
            told_full: false,
            leaking_since: Some(4),
            ignored: None,
            mark: Mark::default(),
            examples: Vec::new(),
            listed: None,
            earlier: None,
            window: 5,
            points: vec![(5, 6)],
        }
    }
}

fn cut(text: &str) -> String {
    text.chars().take(MAX_TEXT).collect()
}

impl Detector {
    /// Everything that matters, bounded; `origin` knows where most of it came from.
    #[must_use]
    pub(crate) fn save(&self, origin: impl Fn(ProcKey, Resource) -> Option<Earlier>) -> Vec<Saved> {
        let cases = self.cases.iter().filter_map(|(&(key, resource), case)| {
            let mut saved = self.saved(&case.finding, Some(case))?;
            // A few that came since a restart are less than what came before.
            let known = origin(key, resource).into_iter().chain(case.finding.earlier.as_deref().cloned());
            saved.earlier = known.max_by_key(|earlier| earlier.live);
            if let Some(earlier) = &mut saved.earlier {
                earlier.words = cut(&earlier.words);
            }
            Some(saved)
        });
        // What the plain rules find is found again; what was said of it and told of it is not.
        let plain = self.plain.values().filter_map(|finding| self.saved(finding, None));
        let plain = plain.filter(|saved| saved.told || saved.told_full || saved.mark != Mark::default());
        let mut saved: Vec<Saved> = cases.chain(plain).collect();
        // What has not been taken up again yet is not lost by a second restart.
        saved.extend(self.pending.values().flatten().cloned());
        saved.sort_by_key(|saved| (std::cmp::Reverse(saved.state), saved.key(), saved.resource, saved.rule));
        saved.truncate(MAX_SAVED);
        saved
    }

    fn saved(&self, finding: &Finding, case: Option<&Case>) -> Option<Saved> {
        let at = (finding.key, finding.resource, finding.rule);
        let was_told = |topic| self.warned.contains_key(&(finding.key, finding.resource, topic));
        let (window, points) = case.map_or((1, Vec::new()), Case::floors);
        let short = |example: &Example| Example {
            what: cut(&example.what),
            kind: cut(&example.kind),
            count: example.count,
        };
        Some(Saved {
            tgid: finding.key.tgid,
            start_boottime: finding.key.start_boottime,
            exec_id: self.histories.get(&finding.key)?.exec_id,
            resource: finding.resource,
            rule: finding.rule,
            state: finding.state,
            told: case.map_or_else(|| was_told(Topic::Rule(finding.rule)), |case| case.told),
            told_full: was_told(Topic::Full),
            leaking_since: finding.leaking_since,
            ignored: finding.ignored.as_deref().map(cut),
            mark: self.marks.get(&at).cloned().unwrap_or_default(),
            examples: finding.examples.iter().take(MAX_EXAMPLES).map(short).collect(),
            listed: finding.listed,
            earlier: None,
            window,
            points,
        })
    }

    /// Takes up what was saved, as soon as the processes are seen again. `false` refuses all of it: this program did
    /// not write it, or not before `now`.
    pub(crate) fn restore(&mut self, saved: Vec<Saved>, now: u64) -> bool {
        if saved.len() > MAX_SAVED || !saved.iter().all(|saved| saved.is_sound(now)) {
            return false;
        }
        self.pending = HashMap::new();
        for saved in saved {
            self.pending.entry(saved.key()).or_default().push(saved);
        }
        true
    }

    /// Opens the cases that were pending for processes that are still the same. To be called before a pass is judged;
    /// what is not in it has ended meanwhile.
    pub(super) fn take_up(&mut self, rows: &[Row], now: u64, changes: &mut Vec<Change>) {
        let mut pending = std::mem::take(&mut self.pending);
        for row in rows.iter().filter(|row| !row.exited) {
            for saved in pending.remove(&row.key).into_iter().flatten() {
                if saved.exec_id == row.exec_id {
                    self.take_up_one(row, saved, now, changes);
                }
            }
        }
    }

    fn take_up_one(&mut self, row: &Row, saved: Saved, now: u64, changes: &mut Vec<Change>) {
        if saved.mark != Mark::default() {
            self.marks.insert((row.key, saved.resource, saved.rule), saved.mark);
        }
        if saved.told_full {
            self.warned.insert((row.key, saved.resource, Topic::Full), now);
        }
        if saved.rule != Rule::Trend {
            if saved.told {
                self.warned.insert((row.key, saved.resource, Topic::Rule(saved.rule)), now);
            }
            return;
        }
        let (live, limit) = usage(row, saved.resource, self.limits);
        let mut finding = Finding::suspect(Rule::Trend, saved.resource, row, (live, limit), now);
        finding.ignored = saved.ignored.map(Into::into);
        (finding.examples, finding.listed) = (saved.examples, saved.listed);
        finding.earlier = saved.earlier.map(Arc::new);
        let mut case = Case::new(finding, Precedents::default(), now);
        if saved.state == State::Leaking {
            case.take_up(saved.window, saved.points, saved.leaking_since.unwrap_or(now));
            case.told = saved.told;
        } else {
            // Nobody saw how it went on: what it is now is where it begins.
            case.add(0, vec![((now / SECOND) as u32, live)]);
        }
        self.adopt(row, case);
        changes.push(Change::Suspect(row.key, saved.resource));
    }
}

//! The plain rules beside the trend: each warns once, none says `leaking`.

use foldhash::HashMap;
use plumb_common::task::ProcKey;

use super::{
    Detector, Track,
    case::SECOND,
    finding::{Example, Finding, Resource, Rule},
    settings::Settings,
};
use crate::table::Row;

/// Between two looks at the types of all threads, in nanoseconds, and processes looked at each time.
const CENSUS: u64 = 60 * SECOND;
const MAX_CENSUS: usize = 256;

type Plain = HashMap<(ProcKey, Resource, Rule), Finding>;

/// Judges a count whose shortest window is complete.
pub(super) fn apply(
    plain: &mut Plain,
    settings: &Settings,
    row: &Row,
    (resource, live, limit): (Resource, u32, Option<u64>),
    track: &Track,
    now: u64,
) {
    let thresholds = settings.detect.of(&row.info.group);
    let floor = track.floors.sustained();
    let part = thresholds.utilisation;
    let high = floor.zip(limit).is_some_and(|(floor, limit)| f64::from(floor) > part * limit as f64);
    let mut set = |rule, holds: bool, baseline: Option<u32>| {
        let at = (row.key, resource, rule);
        if holds {
            let new = || {
                let mut finding = Finding::suspect(rule, resource, row, (live, limit), now);
                finding.ignored = settings.ignored(&finding, &[], &[]);
                finding
            };
            let finding = plain.entry(at).or_insert_with(new);
            (finding.live, finding.limit) = (live, limit);
            finding.baseline = baseline.unwrap_or(finding.baseline);
        } else if !plain.is_empty() {
            plain.remove(&at);
        }
    };
    let base = track.base.get();
    set(Rule::Utilisation, part > 0.0 && high, None);
    if resource == Resource::Thread && thresholds.threads_over_baseline > 0 {
        let more = floor.zip(base).map_or(0, |(floor, base)| floor.saturating_sub(base));
        set(Rule::ThreadsOverBaseline, more > thresholds.threads_over_baseline, base);
    }
}

impl Detector {
    /// Processes whose threads are to be told by type and age now, each with the time before which a thread counts
    /// as old; answered by `census`. Empty when no type is tracked.
    pub(crate) fn wants_census(&mut self, rows: &[Row], now: u64) -> Vec<(ProcKey, u64)> {
        if !self.settings.detect.tracks_threads() || now.saturating_sub(self.census) < CENSUS {
            return Vec::new();
        }
        self.census = now;
        let wanted = rows.iter().filter(|row| row.threads > 1 && !row.exited && !row.is_kernel_thread());
        let wanted = wanted.filter_map(|row| {
            let thresholds = self.settings.detect.of(&row.info.group);
            let age = thresholds.thread_age.saturating_mul(SECOND);
            let old = now.checked_sub(age).filter(|old| row.key.start_boottime <= *old)?;
            (!thresholds.thread_types.is_empty()).then_some((row.key, old))
        });
        let wanted: Vec<_> = wanted.collect();
        // Which of too many is asked differs from minute to minute.
        let skip =
            if wanted.len() > MAX_CENSUS { (now / CENSUS) as usize * MAX_CENSUS % wanted.len() } else { 0 };
        wanted.iter().cycle().skip(skip).take(wanted.len().min(MAX_CENSUS)).copied().collect()
    }

    /// Takes how many old threads of each type a process has.
    pub(crate) fn census(&mut self, row: &Row, old: &[(String, u32)], now: u64) {
        let at = (row.key, Resource::Thread, Rule::ThreadAge);
        let tracked = &self.settings.detect.of(&row.info.group).thread_types;
        let found = old.iter().filter(|(kind, _)| tracked.contains(kind));
        let example = |(kind, count): &(String, u32)| Example {
            what: kind.clone(),
            kind: "thread".to_owned(),
            count: *count,
        };
        let examples: Vec<Example> = found.map(example).collect();
        if examples.is_empty() || !self.histories.contains_key(&row.key) {
            self.plain.remove(&at);
            return;
        }
        let usage = super::usage(row, Resource::Thread, self.limits);
        let new = || Finding::suspect(Rule::ThreadAge, Resource::Thread, row, usage, now);
        let finding = self.plain.entry(at).or_insert_with(new);
        finding.ignored = self.settings.ignored(finding, &examples, &[]);
        (finding.live, finding.examples) = (usage.0, examples);
    }
}

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::{
    cohorts::{Cohorts, identity},
    *,
};
use crate::procfs::ProcStatic;

const LIMITS: HostLimits = HostLimits { threads: 32_768 };
/// Seconds since boot at the first reading; a multiple of most windows.
const BEGIN: u64 = 7_200;

pub(super) fn row(fds: u32, threads: u32) -> Row {
    Row {
        key: ProcKey::new(42, 7),
        exec_id: 1,
        fd_limit: 1024,
        nproc_limit: u64::MAX,
        rss_bytes: 0,
        ppid: 1,
        uid: 0,
        fds,
        threads,
        state: 0,
        flags: 0,
        exited: false,
        info: Arc::new(ProcStatic { comm: "test".into(), exe: None, group: "test".into() }),
    }
}

#[path = "news_tests.rs"]
mod news;
#[path = "rules_tests.rs"]
mod rules;
#[path = "snapshot_tests.rs"]
mod snapshot;

/// A process with its detector and what would be looked up of it.
struct Play {
    detector: Detector,
    cohorts: Cohorts,
    second: u64,
    /// Seconds of the first suspicion and of each verdict.
    suspect: Option<u64>,
    leaking: Vec<u64>,
    /// Whatever was told beside that.
    told: Vec<(u64, What, Rule)>,
    held: BTreeSet<u64>,
    /// What every look finds.
    examples: Vec<Example>,
}

impl Play {
    fn new() -> Self {
        Self {
            detector: Detector::new(LIMITS, Settings::default()),
            cohorts: Cohorts::default(),
            second: 0,
            suspect: None,
            leaking: Vec::new(),
            told: Vec::new(),
            held: BTreeSet::new(),
            examples: Vec::new(),
        }
    }

    /// Each reading is that of a process that never replaces what it holds.
    fn counts(mut self, series: impl IntoIterator<Item = u32>) -> Self {
        series.into_iter().for_each(|fds| self.reading((0..u64::from(fds)).collect(), row(fds, 1)));
        self
    }

    fn reading(&mut self, held: BTreeSet<u64>, row: Row) {
        self.held = held;
        let now = (BEGIN + self.second) * SECOND;
        for change in self.detector.observe(&[row], now) {
            let identities = self.held.iter().map(|id| identity([*id, 0, 0]));
            match change {
                Change::Suspect(..) => {
                    self.suspect = self.suspect.or(Some(self.second));
                    self.cohorts = Cohorts::default();
                    self.cohorts.look(now, identities);
                }
                Change::Grown(key, resource, _) => {
                    let holdings = Some(self.cohorts.look(now, identities));
                    let found =
                        Confirmation { holdings, examples: self.examples.clone(), ..Default::default() };
                    self.detector.confirm(key, resource, found, now);
                }
                Change::Quiet(..) => {}
            }
        }
        for News { what, finding } in self.detector.tell(now) {
            match what {
                What::Leak => self.leaking.push(self.second),
                _ => self.told.push((self.second, what, finding.rule)),
            }
        }
        self.second += 1;
    }

    fn states(&self) -> Vec<State> {
        self.detector.findings().iter().map(|finding| finding.state).collect()
    }

    fn why(&self) -> Option<Why> {
        self.detector.findings().first()?.resolved.map(|end| end.why)
    }
}

fn leak() -> impl Iterator<Item = u32> {
    (0..200).map(|second| 5 + second)
}

#[test]
fn a_leak_of_one_per_second_is_suspect_in_30_s_and_leaking_in_120_s_with_its_rate() {
    for begin in 0..10 {
        let quiet = std::iter::repeat_n(5, begin);
        let play = Play::new().counts(quiet.chain((0..200).map(|second| 5 + second)));
        let begin = begin as u64;
        assert!(play.suspect.is_some_and(|second| second <= begin + 30), "{:?}", play.suspect);
        assert!(play.leaking.len() == 1 && play.leaking[0] <= begin + 120, "{:?}", play.leaking);
        let finding = &play.detector.findings()[0];
        assert_eq!((finding.state, finding.rule, finding.baseline), (State::Leaking, Rule::Trend, 5));
        assert!((55.0..=65.0).contains(&finding.growth_per_minute), "{}", finding.growth_per_minute);
        let seconds = finding.seconds_to_exhaustion().unwrap();
        let exact = f64::from(1024 - finding.live);
        assert!((seconds - exact).abs() < exact * 0.1, "{seconds} s instead of {exact} s");
    }
}

#[test]
fn one_in_ten_seconds_is_leaking_in_360_s_and_200_a_second_also_when_it_ends_at_the_limit() {
    let slow = Play::new().counts((0..400).map(|second| 10 + second / 10));
    assert!(slow.leaking.first().is_some_and(|second| *second <= 360), "{:?}", slow.leaking);
    let fast = Play::new().counts((0..200u32).map(|second| (5 + second * 200).min(1024)));
    assert!(fast.leaking.first().is_some_and(|second| *second <= 120), "{:?}", fast.leaking);
    assert_eq!(fast.detector.findings()[0].seconds_to_exhaustion(), Some(0.0));
}

#[test]
fn what_stops_growing_or_is_given_back_before_is_quiet_again_and_was_never_told() {
    let warm_up = Play::new().counts((0..600).map(|second: u32| 5 + (second * 2).min(50)));
    assert!(warm_up.suspect.is_some() && warm_up.leaking.is_empty() && warm_up.states().is_empty());
    let bursts = Play::new().counts((0..600).map(|second: u32| if second % 60 < 25 { 300 } else { 12 }));
    assert!(bursts.leaking.is_empty());
    let noise =
        Play::new().counts((0..2_000).map(|second: u32| 40 + second.wrapping_mul(2_654_435_761) % 30));
    assert!(noise.leaking.is_empty());
}

#[test]
fn a_batch_that_gave_all_of_it_back_is_called_a_leak_once_and_a_leak_after_it_is_found() {
    // 2 a second for 270 s, then a rest of 30 s.
    let batches = (0..3_000).map(|second: u32| 5 + if second % 300 < 270 { second % 300 * 2 } else { 0 });
    let play = Play::new().counts(batches.clone());
    assert_eq!(play.leaking.len(), 1, "{:?}", play.leaking);
    let play = Play::new().counts(batches.chain((0..600).map(|second| 5 + second)));
    assert_eq!(play.leaking.len(), 2, "{:?}", play.leaking);
    let after = play.leaking[1] - 3_000;
    assert!((270..=270 * 3 / 2 + 60).contains(&after), "{after} s");
}

#[test]
fn what_is_replaced_is_no_leak() {
    let mut play = Play::new();
    for second in 0..600u64 {
        // All live for 40 s, and there are ever more.
        let count = 20 + second / 2;
        let held: BTreeSet<u64> = (0..count).map(|id| id * 1_000 + (second + id) / 40).collect();
        play.reading(held, row(count as u32, 1));
    }
    assert!(play.suspect.is_some() && play.leaking.is_empty(), "{:?}", play.leaking);
}

#[test]
fn a_leak_that_is_given_back_is_resolved_stays_visible_for_ten_minutes_and_then_is_gone() {
    let play = Play::new().counts(leak().chain(std::iter::repeat_n(8, 100)));
    assert_eq!((play.states(), play.why()), (vec![State::Resolved], Some(Why::GivenBack)));
    assert_eq!(play.detector.findings()[0].seconds_to_exhaustion(), None);
    assert!(play.counts(std::iter::repeat_n(8, 600)).states().is_empty());
}

#[test]
fn a_leak_that_rests_goes_on_being_one_and_after_ten_minutes_has_settled() {
    let play = Play::new().counts(leak().chain(std::iter::repeat_n(204, 400)));
    assert_eq!(play.states(), [State::Leaking]);
    let play = play.counts(std::iter::repeat_n(204, 700));
    assert_eq!(play.why(), Some(Why::Settled));
}

#[test]
fn a_leak_that_begins_again_is_told_again_and_listed_once() {
    // For longer than the first, which was given back.
    let again = (0..400).map(|second| 8 + second);
    let play = Play::new().counts(leak().chain(std::iter::repeat_n(8, 100)).chain(again));
    assert_eq!((play.leaking.len(), play.states()), (2, vec![State::Leaking]));
}

#[test]
fn a_new_image_and_an_exit_resolve_a_leak() {
    let mut play = Play::new().counts(leak());
    let now = (BEGIN + play.second) * SECOND;
    let replaced = Row { exec_id: 2, ..row(205, 1) };
    assert_eq!(play.detector.observe(&[replaced], now), [Change::Quiet(row(0, 0).key, Resource::Fd)]);
    assert_eq!(play.why(), Some(Why::Exec));
    let mut play = Play::new().counts(leak());
    assert_eq!(play.detector.observe(&[], now), [Change::Quiet(row(0, 0).key, Resource::Fd)]);
    assert_eq!(play.why(), Some(Why::ProcessEnded));
    assert!(play.detector.histories.is_empty() && play.detector.cases.is_empty());
}

#[test]
fn a_suspect_that_ends_leaves_nothing() {
    let mut play = Play::new().counts((0..40).map(|second| 5 + second));
    assert_eq!(play.states(), [State::Suspect]);
    play.detector.observe(&[], (BEGIN + 40) * SECOND);
    assert!(play.states().is_empty());
}

#[test]
fn without_a_witness_the_trend_speaks_for_itself_later() {
    let mut detector = Detector::new(LIMITS, Settings::default());
    let mut leaking = None;
    for second in 0..600 {
        let now = (BEGIN + second) * SECOND;
        for change in detector.observe(&[row(5, 1 + second as u32)], now) {
            if let Change::Grown(key, resource, _) = change {
                detector.confirm(key, resource, Confirmation::default(), now);
            }
        }
        leaking = leaking.or(detector.tell(now).first().map(|_| second));
    }
    assert!(leaking.is_some_and(|second| (300..=360).contains(&second)), "{leaking:?}");
    let finding = &detector.findings()[0];
    assert_eq!((finding.resource, finding.limit), (Resource::Thread, Some(32_768)));
    let user = Row { uid: 1000, nproc_limit: 500, ..row(5, 5) };
    assert_eq!(usage(&user, Resource::Thread, LIMITS).1, Some(500));
    let full = Row { threads: 500, ..user.clone() };
    assert_eq!(usage(&full, Resource::Thread, LIMITS).1, Some(500), "the kernel refuses the next one");
    for (nproc_limit, threads) in [(0, 1), (1, 1), (4, 5)] {
        let sandbox = Row { uid: 65534, nproc_limit, ..row(5, threads) };
        assert_eq!(usage(&sandbox, Resource::Thread, LIMITS).1, Some(32_768));
    }
}

#[test]
fn an_answer_that_nobody_waits_for_changes_nothing() {
    let mut play = Play::new().counts(std::iter::repeat_n(5, 100));
    let found = Confirmation::default();
    play.detector.confirm(row(0, 0).key, Resource::Fd, found, BEGIN * SECOND);
    assert!(play.states().is_empty() && play.detector.tell(BEGIN * SECOND).is_empty());
}

#[test]
fn the_history_of_a_process_stays_within_its_budget() {
    let bytes = size_of::<(ProcKey, History)>();
    // With the row (128 B) and the slack of two hash tables this stays below 512 B per process.
    assert!(bytes <= 192, "{bytes} bytes");
}

proptest! {
    #[test]
    fn whatever_the_series_a_leak_has_grown(series in proptest::collection::vec(0u32..800, 0..600)) {
        let play = Play::new().counts(series.iter().copied());
        let spread = series.iter().max().zip(series.iter().min()).map_or(0, |(max, min)| max - min);
        prop_assert!(play.suspect.is_none() || spread >= 8, "suspect within {spread}");
        prop_assert!(play.leaking.is_empty() || spread >= 30, "leaking within {spread}");
    }

    #[test]
    fn any_clock_and_any_count_are_taken(readings in proptest::collection::vec((0u64..40_000, any::<u32>()), 0..200)) {
        let mut detector = Detector::new(LIMITS, Settings::default());
        let mut now = 0u64;
        for (later, count) in readings {
            now += later * SECOND / 10;
            for change in detector.observe(&[row(count, count)], now) {
                if let Change::Grown(key, resource, _) = change {
                    detector.confirm(key, resource, Confirmation::default(), now);
                }
            }
            detector.tell(now);
            prop_assert!(detector.cases.len() <= 2 && detector.resolved.visible.len() <= MAX_RESOLVED);
        }
    }
}

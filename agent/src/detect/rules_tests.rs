//! The plain rules, what is ignored, and what people say about findings.

use super::*;

fn settings(text: &str) -> Settings {
    #[derive(serde::Deserialize)]
    struct Tables {
        #[serde(default)]
        detect: Detect,
        #[serde(default)]
        ignore: Vec<Ignore>,
    }
    let Tables { detect, ignore } = toml::from_str(text).unwrap();
    Settings { detect, ignore }
}

fn with(text: &str) -> Play {
    let mut play = Play::new();
    play.detector.settings = settings(text);
    play
}

fn rules(detector: &Detector) -> Vec<(Rule, State)> {
    detector.findings().iter().map(|finding| (finding.rule, finding.state)).collect()
}

#[test]
fn high_use_is_a_warning_for_as_long_as_it_lasts_and_can_be_turned_off() {
    let play = Play::new().counts(std::iter::repeat_n(900, 60));
    assert_eq!(rules(&play.detector), [(Rule::Utilisation, State::Suspect)]);
    assert_eq!(play.detector.findings()[0].id(), "fd-42-0-use");
    assert!(play.leaking.is_empty());
    let play = play.counts(std::iter::repeat_n(100, 20));
    assert!(rules(&play.detector).is_empty());
    let play = with("detect.utilisation = 0.0").counts(std::iter::repeat_n(900, 60));
    assert!(rules(&play.detector).is_empty());
    let play = Play::new().counts((0..150).map(|second| 850 + second));
    assert_eq!(
        rules(&play.detector)[0],
        (Rule::Trend, State::Leaking),
        "with growth it leaks: it breaks at 174 s"
    );
}

#[test]
fn threads_over_the_baseline_are_a_warning_where_that_is_asked_for() {
    let rows = |detector: &mut Detector| {
        for second in 0..300u64 {
            // Warms up to 50, works with 60, and then takes 170.
            let threads = [50, 60, 170][second as usize / 100];
            detector.observe(&[row(5, threads)], (BEGIN + second) * SECOND);
        }
        rules(detector)
    };
    assert!(rows(&mut Detector::new(LIMITS, Settings::default())).is_empty());
    let text = "[detect.groups.test]\nthreads_over_baseline = 100";
    let found = rows(&mut Detector::new(LIMITS, settings(text)));
    assert_eq!(found, [(Rule::ThreadsOverBaseline, State::Suspect)]);
}

#[test]
fn an_old_thread_of_a_tracked_type_is_a_warning() {
    let mut detector = Detector::new(LIMITS, Settings::default());
    let now = (BEGIN + 1) * SECOND;
    let row = row(5, 9);
    detector.observe(std::slice::from_ref(&row), now);
    assert!(detector.wants_census(std::slice::from_ref(&row), now).is_empty(), "none is tracked");
    detector.settings = settings("[detect]\nthread_types = ['job']\nthread_age = 60");
    assert_eq!(detector.wants_census(std::slice::from_ref(&row), now), [(row.key, now - 60 * SECOND)]);
    assert!(detector.wants_census(std::slice::from_ref(&row), now + SECOND).is_empty(), "once a minute");
    detector.census(&row, &[("main".to_owned(), 1), ("job".to_owned(), 3)], now);
    assert_eq!(rules(&detector), [(Rule::ThreadAge, State::Suspect)]);
    assert_eq!((detector.findings()[0].examples.len(), detector.findings()[0].examples[0].count), (1, 3));
    detector.census(&row, &[("main".to_owned(), 1)], now);
    assert!(rules(&detector).is_empty());
}

#[test]
fn a_group_may_ask_for_more() {
    let play = with("[detect.groups.test]\ngrowth = 1000\n").counts(leak());
    assert_eq!(play.states(), [State::Suspect]);
}

#[test]
fn the_limit_of_threads_is_the_least_of_user_host_and_cgroup() {
    let mut detector = Detector::new(LIMITS, Settings::default());
    for second in 0..200u64 {
        let now = (BEGIN + second) * SECOND;
        for change in detector.observe(&[row(5, 5 + second as u32)], now) {
            if let Change::Grown(key, resource, _) = change {
                let found = Confirmation { room: Some(300 - second), ..Confirmation::default() };
                detector.confirm(key, resource, found, now);
            }
        }
    }
    assert_eq!(detector.findings()[0].limit, Some(305));
}

fn example(kind: &str, what: &str, count: u32) -> Example {
    Example { what: what.to_owned(), kind: kind.to_owned(), count }
}

fn ignored(rule: &str, examples: &[Example]) -> Option<String> {
    let mut play = with(&format!("[[ignore]]\nreason = 'known'\n{rule}\n"));
    play.examples = examples.to_vec();
    let play = play.counts(leak());
    assert_eq!(play.states(), [State::Leaking], "it is listed all the same");
    let reason = play.detector.findings()[0].ignored.as_deref().map(str::to_owned);
    assert_eq!(play.leaking.is_empty(), reason.is_some(), "and not told");
    reason
}

#[test]
fn what_matches_a_rule_is_listed_with_its_reason_and_not_told() {
    let files = [example("file", "/var/lib/app/a.sst", 6), example("socket", "tcp 1.2.3.4:1", 5)];
    let known = Some("known".to_owned());
    assert_eq!(ignored("comm = 'te*'", &files), known);
    assert_eq!(ignored("group = 'other'", &files), None);
    assert_eq!(ignored("path = '/var/lib/**/*.sst'", &files), known, "6 of 11 are half or more");
    assert_eq!(ignored("kind = 'socket'", &files), None, "5 of 11 are less than half");
    assert_eq!(ignored("comm = 'test'\nkind = 'file'", &files), known);
    assert_eq!(ignored("comm = 'other'\nkind = 'file'", &files), None);
    assert_eq!(ignored("thread_type = 'job'", &files), None);
    assert_eq!(ignored("thread_type = 'job'", &[example("thread", "job-7", 1)]), known);
    assert_eq!(ignored("function = 'open_*'", &files), None, "nobody knows the functions");
}

#[test]
fn functions_are_matched_where_they_are_known() {
    let rule = settings("[[ignore]]\nreason = 'known'\nfunction = 'rocksdb::*'").ignore.remove(0);
    let finding = Finding::suspect(Rule::Trend, Resource::Fd, &row(9, 1), (9, None), 0);
    let functions = |one, other| [("rocksdb::open".to_owned(), one), ("main".to_owned(), other)];
    assert!(rule.matches(&finding, &[], &functions(5, 5)));
    assert!(!rule.matches(&finding, &[], &functions(4, 5)));
}

#[test]
fn a_glob_that_no_machine_can_be_made_of_is_an_error() {
    let glob = |depth: usize| format!("path = '{}a{}'\nreason = 'x'", "{b,".repeat(depth), "}".repeat(depth));
    let shallow: Ignore = toml::from_str(&glob(3)).unwrap();
    let finding = Finding::suspect(Rule::Trend, Resource::Fd, &row(9, 1), (9, None), 0);
    assert!(shallow.matches(&finding, &[example("file", "a", 1)], &[]));
    assert!(!shallow.matches(&finding, &[example("file", "c", 1)], &[]));
    let error = toml::from_str::<Ignore>(&glob(300)).unwrap_err();
    assert!(error.message().contains("nested too deeply"), "{error}");
}

#[test]
fn an_acknowledged_leak_is_told_again_when_it_has_doubled() {
    let mut play = Play::new().counts(leak());
    assert_eq!(play.leaking.len(), 1);
    let id = play.detector.findings()[0].id();
    play.detector.ack(&id, Some("being fixed".into()), 0).unwrap();
    play.detector.ack(&id, None, 1).unwrap();
    let known = play.detector.findings()[0].mark.acknowledged.clone().unwrap();
    assert_eq!((known.at, known.reason.as_deref()), (1, Some("being fixed")));
    let play = play.counts((200..380).map(|second| 5 + second));
    assert_eq!(play.leaking.len(), 1);
    assert!(play.detector.findings()[0].mark.acknowledged.is_some());
    let play = play.counts((380..450).map(|second| 5 + second));
    assert_eq!(play.leaking.len(), 2, "410 are twice 204");
    assert!(play.detector.findings()[0].mark.acknowledged.is_none());
}

#[test]
fn a_silence_postpones_what_was_not_told_and_repeats_nothing() {
    let suspect = || Play::new().counts((0..60).map(|second| 5 + second));
    let mut play = suspect();
    let id = play.detector.findings()[0].id();
    play.detector.silence(&id, (BEGIN + 200) * SECOND).unwrap();
    let play = play.counts((60..300).map(|second| 5 + second));
    assert_eq!((play.leaking.clone(), play.states()), (vec![200], vec![State::Leaking]));

    let mut play = suspect().counts((60..150).map(|second| 5 + second));
    assert_eq!(play.leaking.len(), 1);
    play.detector.silence(&id, (BEGIN + 200) * SECOND).unwrap();
    let mut play = play.counts((150..300).map(|second| 5 + second));
    assert_eq!(play.leaking.len(), 1);
    play.detector.silence(&id, u64::MAX).unwrap();
    assert!(play.detector.findings()[0].mark.is_quiet(300, u64::MAX - 1));
    play.detector.unsilence(&id, 0).unwrap();
    assert_eq!(play.detector.unsilence(&id, 0), Err(Refused::NotSilenced));
    assert_eq!(play.detector.findings()[0].mark, Mark::default());
    assert_eq!(play.detector.ack("fd-1-2", None, 0), Err(Refused::NoSuchFinding));
}

proptest! {
    #[test]
    fn a_mark_is_quiet_until_it_is_over(live in 0u32..1_000_000, then in any::<u32>(), until in any::<u64>(), now in any::<u64>()) {
        let mut mark = Mark { silenced_until: Some(until), ..Mark::default() };
        prop_assert_eq!(mark.is_quiet(then, now), now < until);
        prop_assert!(!mark.age(then, now), "a silence is no acknowledgement");
        prop_assert_eq!(mark.silenced_until.is_some(), now < until);
        let known = super::super::finding::Acknowledged { at: 0, reason: None, live };
        let mut mark = Mark { acknowledged: Some(known), ..Mark::default() };
        let is_worse = u64::from(then) >= u64::from(live.max(1)) * 2;
        prop_assert_eq!(mark.is_quiet(then, now), !is_worse);
        prop_assert_eq!(mark.age(then, now), is_worse);
        prop_assert!(!mark.age(then, now), "once");
    }
}

//! What people are told, and what is said of a count at its limit.

use super::*;

/// A shell that opens one a second: of 1024 it has no number below 10 for what it keeps.
fn shell() -> Play {
    Play::new().counts((0..1_300).map(|second: u32| (7 + second).min(1_017)))
}

fn trend(play: &Play) -> Finding {
    play.detector.findings().into_iter().find(|finding| finding.rule == Rule::Trend).unwrap()
}

#[test]
fn a_leak_at_its_limit_is_full_and_stays_so_and_the_log_has_a_line_for_each_step() {
    let mut play = Play::new();
    for second in 0..1_300u32 {
        play = play.counts([(7 + second).min(1_017)]);
        if second > 200 {
            let seconds = trend(&play).seconds_to_exhaustion();
            assert!(seconds.is_some_and(|left| left <= f64::from(1_024 - 200)), "{second}: {seconds:?}");
            assert_eq!(trend(&play).is_full(), seconds == Some(0.0));
        }
    }
    assert_eq!((trend(&play).state, trend(&play).is_full()), (State::Leaking, true));
    assert_eq!(play.leaking.len(), 1);
    let told: Vec<_> = play.told.iter().map(|(_, what, rule)| (*what, *rule)).collect();
    assert_eq!(told, [(What::Warning, Rule::Utilisation), (What::Full, Rule::Trend)]);
    let (high, full) = (play.told[0].0, play.told[1].0);
    assert!((812..=830).contains(&high), "80 % at 812 s: {high}");
    assert!((997..=1_017).contains(&full), "98 % at 997 s: {full}");
}

#[test]
fn what_stops_a_few_below_a_small_limit_is_full_and_what_still_rises_far_below_a_large_one_is_not() {
    let mut finding = trend(&shell());
    let mut is_full = |live, limit, growth| {
        (finding.live, finding.limit, finding.growth_per_minute) = (live, Some(limit), growth);
        finding.is_full()
    };
    assert!(is_full(57, 64, 0.0) && !is_full(57, 64, 6.0), "a shell's 57 are all it gets");
    assert!(is_full(1_004, 1_024, 60.0) && !is_full(1_003, 1_024, 60.0));
    assert!(is_full(1_000_000, 1_000_000, 60.0) && !is_full(990_000, 1_000_000, 60.0), "that is 166 min");
    assert!(is_full(990_000, 1_000_000, 0.0));
    assert!(!is_full(3, 10, 0.0), "7 below its limit, and far from it");
    finding.state = State::Resolved;
    assert!(!finding.is_full() && finding.seconds_to_exhaustion().is_none());
    let mut by_use = Finding::suspect(Rule::Utilisation, Resource::Fd, &row(57, 1), (57, Some(64)), 0);
    assert!(!by_use.is_full(), "nobody knows that it has stopped rising there");
    by_use.live = 64;
    assert_eq!(
        (by_use.is_full(), by_use.is_sealed(), by_use.seconds_to_exhaustion()),
        (true, false, Some(0.0))
    );
    by_use.live = 65;
    assert!(by_use.is_sealed());
}

#[test]
fn high_use_is_told_once_and_what_swings_about_the_threshold_is_one_thing() {
    let swings = (0..3_000).map(|second: u32| if second % 60 < 30 { 900 } else { 700 });
    let play = Play::new().counts(swings);
    assert_eq!(play.told.len(), 1, "{:?}", play.told);
    let quiet = std::iter::repeat_n(700, 3_700);
    let play = play.counts(quiet.chain(std::iter::repeat_n(900, 60)));
    assert_eq!(play.told.len(), 2, "after an hour it is another: {:?}", play.told);
    let play = Play::new().counts(std::iter::repeat_n(1_020, 60));
    assert_eq!(play.told.len(), 1, "that it is full is in the warning: {:?}", play.told);
    let play = Play::new().counts(std::iter::repeat_n(900, 60).chain(std::iter::repeat_n(1_020, 60)));
    let whats: Vec<_> = play.told.iter().map(|told| told.1).collect();
    assert_eq!(whats, [What::Warning, What::Full]);
    let play = Play::new().counts(std::iter::repeat_n(2_000, 60));
    assert_eq!(
        (play.told.len(), play.states()),
        (0, vec![State::Suspect]),
        "a limit below what it has is meant"
    );
}

#[test]
fn what_is_silenced_or_acknowledged_is_not_told_and_a_silence_puts_off() {
    let high = || Play::new().counts(std::iter::repeat_n(900, 60));
    let mut play = high();
    let id = play.detector.findings()[0].id();
    play.detector.silence(&id, (BEGIN + 5_000) * SECOND).unwrap();
    let play = play.counts(std::iter::repeat_n(900, 5_100));
    assert_eq!(play.told.len(), 1, "and a silence repeats nothing: {:?}", play.told);

    let mut play = high();
    play.detector.silence(&id, (BEGIN + 200) * SECOND).unwrap();
    let mut play = play.counts(std::iter::repeat_n(1_004, 300));
    assert_eq!(play.told[1..], [(200, What::Full, Rule::Utilisation)], "it is told when the silence is over");
    assert_eq!(play.detector.findings()[0].mark, Mark::default(), "which it is");
    play.detector.ack(&id, None, 0).unwrap();
    assert_eq!(play.counts(std::iter::repeat_n(1_004, 300)).told.len(), 2);
}

#[test]
fn an_acknowledgement_ends_with_its_leak_and_a_silence_with_its_time() {
    let mut play = Play::new().counts(leak());
    let id = trend(&play).id();
    play.detector.ack(&id, None, 0).unwrap();
    let mut play = play.counts(std::iter::repeat_n(8, 100));
    assert_eq!((play.why(), trend(&play).mark), (Some(Why::GivenBack), Mark::default()));
    let until = (BEGIN + 100_000) * SECOND;
    play.detector.silence(&id, until).unwrap();
    play.detector.unsilence(&id, 0).unwrap();
    // Less than twice as many as were acknowledged.
    let mut play = play.counts((0..395).map(|second| 8 + second));
    assert_eq!(play.leaking.len(), 2);
    play.detector.silence(&id, until).unwrap();
    let play = play.counts(std::iter::repeat_n(8, 100));
    assert_eq!((play.why(), trend(&play).mark.silenced_until), (Some(Why::GivenBack), Some(until)));
}

#[test]
fn the_end_of_a_leak_that_was_told_is_told() {
    let play = Play::new().counts(leak().chain(std::iter::repeat_n(8, 100)));
    let whats: Vec<_> = play.told.iter().map(|told| told.1).collect();
    assert_eq!(whats, [What::Resolved]);
    let mut play = Play::new().counts(leak());
    let now = (BEGIN + play.second) * SECOND;
    play.detector.observe(&[], now);
    let news = play.detector.tell(now);
    assert_eq!(news.len(), 1);
    assert_eq!((news[0].what, news[0].finding.resolved.unwrap().why), (What::Resolved, Why::ProcessEnded));
    assert!(play.detector.tell(now).is_empty(), "once");

    let mut play = Play::new().counts((0..60).map(|second| 5 + second));
    let id = play.detector.findings()[0].id();
    play.detector.silence(&id, u64::MAX).unwrap();
    let play = play.counts((60..200).map(|second| 5 + second).chain(std::iter::repeat_n(8, 100)));
    assert_eq!((play.why(), play.told.len()), (Some(Why::GivenBack), 0), "nobody was told that it leaks");
}

#[test]
fn a_baseline_is_never_of_a_time_before_the_process_and_that_of_high_use_is_of_its_time() {
    // The first window begins with BEGIN, the process 1.75 s later.
    let start = BEGIN * SECOND + 1_750_000_000;
    let mut play = Play { second: 2, ..Play::new() };
    for fds in 7..207 {
        let row = Row { key: ProcKey::new(42, start), ..row(fds, 1) };
        play.reading((0..u64::from(fds)).collect(), row);
    }
    let finding = trend(&play);
    assert_eq!((finding.state, finding.baseline, finding.first_seen), (State::Leaking, 7, start));

    let play = shell();
    let finding = &play.detector.plain[&(row(0, 0).key, Resource::Fd, Rule::Utilisation)];
    let second = (finding.first_seen / SECOND - BEGIN) as u32;
    assert_eq!((finding.live, finding.baseline), (1_017, 7 + second));
}

#[test]
fn a_restart_repeats_no_warning() {
    let again = |play: &Play| {
        let saved = serde_json::to_string(&play.detector.save(|_, _| None)).unwrap();
        let mut next = Play { second: play.second, ..Play::new() };
        assert!(next.detector.restore(serde_json::from_str(&saved).unwrap(), (BEGIN + next.second) * SECOND));
        next
    };
    let play = again(&Play::new().counts(std::iter::repeat_n(1_020, 60)));
    let play = play.counts(std::iter::repeat_n(1_020, 60));
    assert_eq!((play.told.len(), play.states()), (0, vec![State::Suspect]), "{:?}", play.told);
    let play = again(&shell()).counts(std::iter::repeat_n(1_017, 60));
    assert!(play.told.is_empty() && play.leaking.is_empty(), "{:?} {:?}", play.told, play.leaking);
}

#[test]
fn a_rule_that_ignores_a_process_ignores_its_warnings() {
    let mut play = Play::new();
    let ignore = toml::from_str("reason = 'known'\ncomm = 'te*'").unwrap();
    play.detector.settings.ignore.push(ignore);
    let play = play.counts(std::iter::repeat_n(900, 60));
    assert_eq!(play.detector.findings()[0].ignored.as_deref(), Some("known"));
    assert!(play.told.is_empty());
}

#[test]
fn high_use_beside_a_trend_is_told_with_its_numbers_and_listed_with_it() {
    let mut detector = Detector::new(LIMITS, Settings::default());
    let mut told = Vec::new();
    for second in 0..900 {
        let now = (BEGIN + second) * SECOND;
        for change in detector.observe(&[row(7 + second as u32, 1)], now) {
            if let Change::Grown(key, resource, _) = change {
                detector.confirm(key, resource, Confirmation::default(), now);
            }
        }
        told.extend(detector.tell(now).into_iter().filter(|news| news.what == What::Warning));
    }
    assert_eq!((told.len(), told[0].finding.rule), (1, Rule::Utilisation));
    let growth = told[0].finding.growth_per_minute;
    assert!((50.0..=70.0).contains(&growth), "{growth}");
    let rules: Vec<_> = detector.findings().iter().map(|finding| finding.rule).collect();
    assert_eq!(rules, [Rule::Trend]);
    detector.ack(&told[0].finding.id(), None, 0).unwrap();

    // Told as a leak when it uses more than that already: one line.
    let play = Play::new().counts((0..150).map(|second| 850 + second));
    let high = play.told.iter().filter(|told| told.0 >= play.leaking[0]).count();
    assert_eq!((play.leaking.len(), high), (1, 0), "{:?}", play.told);

    // What nobody wants to hear of the trend covers it.
    let mut play = Play::new().counts((0..300).map(|second| 7 + second));
    let id = trend(&play).id();
    play.detector.silence(&id, u64::MAX).unwrap();
    assert!(play.counts((300..900).map(|second| 7 + second)).told.is_empty());
}

#[test]
fn what_has_stopped_at_its_limit_goes_on_as_a_leak_that_is_full() {
    let play = shell().counts(std::iter::repeat_n(1_017, 1_300));
    assert!(trend(&play).resolved.is_none() && trend(&play).is_full());
    assert_eq!(play.states(), [State::Leaking], "high use is in it");
    assert_eq!(play.told.iter().filter(|told| told.1 == What::Full).count(), 1, "{:?}", play.told);
}

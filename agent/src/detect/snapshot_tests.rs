//! What a restart of the agent leaves of the verdicts.

use super::*;

/// The same process, seen by an agent that starts anew after `away` seconds.
fn restarted(play: &Play, away: u64) -> Play {
    let saved = play.detector.save(|_, _| None);
    let text = serde_json::to_string(&saved).unwrap();
    let saved = serde_json::from_str(&text).unwrap();
    let mut next = Play { second: play.second + away, ..Play::new() };
    assert!(next.detector.restore(saved, (BEGIN + next.second) * SECOND));
    next
}

#[test]
fn a_leak_goes_on_and_is_not_told_again() {
    let play = Play::new().counts(leak());
    let before = play.detector.findings()[0].clone();
    let play = restarted(&play, 100).counts((300..500).map(|second| 5 + second));
    assert!(play.leaking.is_empty(), "{:?}", play.leaking);
    let after = &play.detector.findings()[0];
    assert_eq!((after.state, after.id()), (State::Leaking, before.id()));
    assert_eq!((after.baseline, after.first_seen), (before.baseline, before.first_seen));
    assert_eq!(after.leaking_since, before.leaking_since);
    assert!((50.0..=70.0).contains(&after.growth_per_minute), "{}", after.growth_per_minute);
    let play = play.counts(std::iter::repeat_n(8, 60));
    assert_eq!(play.why(), Some(Why::GivenBack));
}

#[test]
fn what_grew_while_nobody_looked_is_no_leak() {
    for series in [30, 60, 100] {
        let play = Play::new().counts((0..series).map(|second| 5 + second));
        assert!(play.leaking.is_empty());
        let play = restarted(&play, 600).counts(std::iter::repeat_n(900, 400));
        assert!(play.leaking.is_empty());
        assert!(play.states().iter().all(|state| *state == State::Suspect), "of high use");
    }
    let play = restarted(&Play::new().counts((0..60).map(|second| 5 + second)), 10);
    let play = play.counts((70..300).map(|second| 5 + second));
    assert_eq!(play.leaking.len(), 1, "and what goes on growing is one");
}

#[test]
fn another_image_or_process_is_not_accused_and_what_is_not_taken_up_is_not_lost() {
    let save = || Play::new().counts(leak()).detector.save(|_, _| None);
    let now = (BEGIN + 300) * SECOND;
    for other in [Row { exec_id: 2, ..row(205, 1) }, Row { key: ProcKey::new(42, 8), ..row(205, 1) }] {
        let mut detector = Detector::new(LIMITS, Settings::default());
        assert!(detector.restore(save(), now));
        assert_eq!(detector.save(|_, _| None), save(), "before the first pass");
        assert_eq!(detector.observe(&[other], now), []);
        assert!(detector.findings().is_empty() && detector.save(|_, _| None).is_empty());
    }
}

#[test]
fn what_people_said_stays() {
    let mut play = Play::new().counts(leak());
    let id = play.detector.findings()[0].id();
    play.detector.ack(&id, Some("known".into()), 5).unwrap();
    play.detector.silence(&id, u64::MAX).unwrap();
    let mark = play.detector.findings()[0].mark.clone();
    let play = restarted(&play, 1).counts([206]);
    assert_eq!(play.detector.findings()[0].mark, mark);
}

#[test]
fn where_it_came_from_is_known_after_a_restart_also_after_another_one() {
    let play = Play::new().counts(leak());
    let leak = Earlier { words: "leak (a.c:3), called by main".into(), live: 190, newest: 5 };
    let saved = play.detector.save(|_, _| Some(leak.clone()));
    let mut old = serde_json::to_value(&saved).unwrap();
    let mut next = Play { second: play.second, ..Play::new() };
    assert!(next.detector.restore(saved, (BEGIN + next.second) * SECOND));
    let next = next.counts(std::iter::repeat_n(205, 60));
    assert_eq!(next.detector.findings()[0].earlier.as_deref(), Some(&leak));
    let few = Earlier { words: "other".into(), live: 3, newest: 6 };
    let again = serde_json::to_value(next.detector.save(|_, _| Some(few.clone()))).unwrap();
    assert_eq!(again[0]["earlier"], serde_json::to_value(&leak).unwrap());

    // As an older agent wrote it.
    for name in ["earlier", "listed"] {
        old[0].as_object_mut().unwrap().remove(name).unwrap();
    }
    let old: Vec<Saved> = serde_json::from_value(old).unwrap();
    assert!(Detector::new(LIMITS, Settings::default()).restore(old, (BEGIN + 300) * SECOND));
}

#[test]
fn what_this_program_did_not_write_is_refused() {
    let now = (BEGIN + 300) * SECOND;
    let good = serde_json::to_value(Play::new().counts(leak()).detector.save(|_, _| None)).unwrap();
    let refused = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut saved = good.clone();
        change(&mut saved[0]);
        let saved: Result<Vec<Saved>, _> = serde_json::from_value(saved);
        saved.is_err() || !Detector::new(LIMITS, Settings::default()).restore(saved.unwrap(), now)
    };
    assert!(!refused(&|_| {}));
    assert!(refused(&|saved| saved["points"] = serde_json::json!([])), "a leak without growth");
    assert!(refused(&|saved| saved["points"] = serde_json::json!([[5, 1], [5, 2]])));
    assert!(
        refused(&|saved| saved["points"] = serde_json::json!([[5, 1], [4_000_000_000u32, 2]])),
        "the future"
    );
    assert!(refused(&|saved| saved["window"] = 0.into()));
    assert!(refused(&|saved| saved["rule"] = "utilisation".into()), "only the trend says leaking");
    assert!(refused(&|saved| saved["ignored"] = "x".repeat(300).into()));
    assert!(refused(&|saved| saved["surprise"] = 1.into()));
    let earlier = |words: &str| serde_json::json!({"words": words, "live": 1, "newest": 1});
    assert!(!refused(&|saved| saved["earlier"] = earlier("leak (a.c:3)")));
    assert!(refused(&|saved| saved["earlier"] = earlier("\u{1b}[2J")));
    assert!(refused(&|saved| saved["earlier"] = earlier(&"x".repeat(300))));
    assert!(refused(&|saved| saved["leaking_since"] = u64::MAX.into()));
}

proptest! {
    #[test]
    fn whatever_is_accepted_is_taken_up_without_harm(
        points in proptest::collection::vec((0u32..8_000, any::<u32>()), 0..70),
        window in 0u32..100_000,
        live in 0u32..2_000,
    ) {
        let mut saved = Play::new().counts(leak()).detector.save(|_, _| None);
        let mut value = serde_json::to_value(&saved).unwrap();
        value[0]["points"] = serde_json::to_value(points).unwrap();
        value[0]["window"] = window.into();
        saved = serde_json::from_value(value).unwrap();
        let mut play = Play { second: 900, ..Play::new() };
        play.detector.restore(saved, (BEGIN + 900) * SECOND);
        play = play.counts((0..300).map(|second| live + second % 7));
        prop_assert!(play.leaking.is_empty());
    }

    #[test]
    fn saving_and_restoring_at_any_moment_tells_of_a_leak_once(at in 1usize..400) {
        let series = |from: usize, to: usize| (from..to).map(|second| 5 + second as u32);
        let play = Play::new().counts(series(0, at));
        let told = play.leaking.len();
        let play = restarted(&play, 0).counts(series(at, 600));
        prop_assert_eq!(told + play.leaking.len(), 1);
    }
}

//! Drains that are given up or taken up late, and those of which users have a part.

use super::*;

#[test]
fn a_drain_that_is_given_up_ends_at_once_and_the_next_one_sends_no_signal_again() {
    let slow = Behaviour { late: true, kill: true, deadline: Some(9_000), ..simple(None) };
    let awaits = Behaviour { prestop: Some(5_000), ..simple(Some(100)) };
    let behaviours = vec![slow, awaits, simple(Some(200)), simple(Some(100))];
    let mut world = World::begin(behaviours, vec![vec![3], vec![0, 1], vec![2]], 30_000, Vec::new());
    world.gives_up = Some(world.machine.begun.began + 1_000 * MS);
    world.run();
    let (machine, now) = (&world.machine, world.now);
    assert_eq!((machine.ended, machine.ended), (machine.cancelled, Some(machine.begun.began + 1_000 * MS)));
    let found: Vec<_> = machine.runs.iter().map(|run| verdict(run).unwrap()).collect();
    assert_eq!(found[0], (Verdict::Timeout, "it still ran when it was given up: test".to_owned()));
    assert_eq!(machine.runs[0].notes, ["given up: test"]);
    for at in [1, 2] {
        assert_eq!(found[at], (Verdict::Refused, "cancelled before it was asked to stop: test".to_owned()));
    }
    assert_eq!(found[3].0, Verdict::Clean, "it was gone");
    assert_eq!(world.got.len(), 2, "{:?}", world.got);

    // What the next one finds has its signal.
    let signalled = machine.signalled();
    assert_eq!(signalled, [(Identity::example(0), libc::SIGTERM)]);
    let begun =
        Begun { began: now, deadline: now + 30_000 * MS, stages: vec![vec![0]], ..machine.begun.clone() };
    let (machine, actions) = Machine::begin_after(signalled, begun);
    (world.machine, world.journal, world.got) = (machine, Vec::new(), BTreeMap::new());
    world.perform(actions);
    let run = |world: &mut World| {
        while world.machine.runs[0].phase != Phase::Settled {
            world.now = [world.due.first().map(|(time, _)| *time), world.machine.next()]
                .into_iter()
                .flatten()
                .min()
                .unwrap();
            let input = match world.due.pop_first() {
                Some((time, Due::Dies(service, number))) if time <= world.now => {
                    world.dead.insert((service, number), time);
                    Input::Gone(service, 0)
                }
                other => {
                    world.due.extend(other);
                    Input::Time
                }
            };
            let actions = world.machine.step(world.now, input);
            world.perform(actions);
        }
    };
    run(&mut world);
    let got: Vec<_> = world.got.keys().map(|(_, _, signal)| *signal).collect();
    assert_eq!(got, [libc::SIGINT, libc::SIGKILL], "TERM was sent before");
    assert_eq!(world.machine.runs[0].signals, [libc::SIGTERM, libc::SIGINT, libc::SIGKILL]);
    assert!(world.machine.runs[0].notes[0].contains("TERM was sent by the drain before"));
    assert_eq!(Machine::replay(world.journal).unwrap().runs[0].signals, world.machine.runs[0].signals);
}

/// The time of users is half of the whole drain's, not of what is left at each stage; a dry run says the same.
#[test]
fn what_users_have_registered_does_not_take_the_time_of_the_administrators() {
    let greedy = Behaviour { is_users: true, deadline: Some(3_600_000), ..simple(None) };
    let mut behaviours = vec![greedy; 8];
    behaviours.extend([Behaviour { deadline: Some(5_000), ..simple(None) }, simple(None)]);
    let stages = (0..behaviours.len()).map(|at| vec![at]).collect();
    let mut world = World::begin(behaviours, stages, 30_000, Vec::new());
    world.run();
    let machine = &world.machine;
    let planned = grants::of_all(&machine.begun.wishes(0), Duration::from_secs(30));
    let granted: Vec<_> = machine.runs.iter().map(|run| run.grant).collect();
    let close = |(stage, grant): (&grants::Stage, &Duration)| stage.time.abs_diff(*grant).as_micros() == 0;
    assert!(planned.iter().zip(&granted).all(close), "{planned:?}, {granted:?}");
    assert!(granted[..8].iter().sum::<Duration>() <= Duration::from_secs(15), "{granted:?}");
    assert!(granted[8] == Duration::from_secs(5) && granted[9] >= Duration::from_secs(10), "{granted:?}");
    assert!(machine.runs[0].notes[0].starts_with("shortened from 3600s to"), "{:?}", machine.runs[0].notes);
}

#[test]
fn a_wait_that_is_given_up_is_called_what_it_is() {
    for (ready, called) in [(false, "prestop ended after 15s"), (true, "ready was given up after 15s")] {
        let mut world = World::begin(
            vec![Behaviour { prestop: Some(90_000), ..simple(Some(0)) }],
            vec![vec![0]],
            30_000,
            Vec::new(),
        );
        let service = &mut world.machine.begun.services[0];
        if ready {
            service.ready = service.prestop.take();
        }
        let actions = world.machine.step(world.machine.next().unwrap(), Input::Time);
        assert_eq!(actions[0], Action::EndPrestop(0));
        assert!(world.machine.runs[0].notes[0].starts_with(called), "{:?}", world.machine.runs[0].notes);
    }
}

#[test]
fn who_ends_while_prestop_runs_is_not_taken_for_who_did_not_run() {
    for (status, expected) in [
        (Some(0), Verdict::Clean),
        (Some(libc::SIGTERM), Verdict::Clean),
        (Some(libc::SIGSEGV), Verdict::Lossy),
        (None, Verdict::Lossy),
    ] {
        let behaviours = vec![Behaviour { prestop: Some(100), ..simple(Some(0)) }];
        let mut world = World::begin(behaviours, vec![vec![0]], 30_000, Vec::new());
        if let Some(status) = status {
            let actions = world
                .machine
                .step(world.now, Input::Seen(0, Fact::Exit { member: 0, status, time: world.now }));
            world.perform(actions);
        }
        world.dead.insert((0, 0), world.now);
        world.run();
        let run = &world.machine.runs[0];
        assert_eq!((run.signals.len(), verdict(run).unwrap().0), (0, expected), "{run:#?}");
        assert!(run.looks > 0, "it may have been started again");
        let again = Machine::replay(world.journal).unwrap();
        assert_eq!(verdict(&again.runs[0]).unwrap().0, expected);
    }
}

/// Of two processes one crashes while prestop runs, and the other one ends well when it is asked to.
#[test]
fn a_crash_while_prestop_runs_is_told_though_others_are_left() {
    let behaviours = vec![Behaviour { prestop: Some(100), stops: vec![Some(0), Some(0)], ..simple(None) }];
    let mut world = World::begin(behaviours, vec![vec![0]], 30_000, Vec::new());
    let exit = Fact::Exit { member: 0, status: libc::SIGSEGV, time: world.now };
    let actions = world.machine.step(world.now, Input::Seen(0, exit));
    world.perform(actions);
    world.dead.insert((0, 0), world.now);
    world.run();
    let run = &world.machine.runs[0];
    assert_eq!(verdict(run).unwrap(), (Verdict::Lossy, "it died of SEGV".to_owned()), "{run:#?}");
}

#[test]
fn a_late_signal_for_who_had_just_gone_does_not_count() {
    let late = Behaviour { late: true, deadline: Some(3_000), ..simple(Some(1_999)) };
    let mut world = World::begin(vec![late], vec![vec![0]], 30_000, Vec::new());
    // It ends, and before that is told its late signal is due.
    let time = world.now + 1_999 * MS;
    world.dead.insert((0, 0), time);
    world.now += 2_000 * MS;
    world.due.clear();
    let actions = world.machine.step(world.now, Input::Time);
    world.perform(actions);
    assert_eq!(world.machine.runs[0].signals, [libc::SIGTERM, libc::SIGINT]);
    for input in [Input::Seen(0, Fact::Exit { member: 0, status: 0, time }), Input::Gone(0, 0)] {
        let actions = world.machine.step(world.now, input);
        world.perform(actions);
    }
    world.run();
    let run = &world.machine.runs[0];
    assert_eq!(
        (verdict(run).unwrap().0, run.sent().collect()),
        (Verdict::Clean, vec![libc::SIGTERM]),
        "{run:#?}"
    );
}

#[test]
fn who_says_without_end_how_much_he_works_on_is_heard_at_his_end() {
    let mut world = World::begin(vec![simple(None)], vec![vec![0]], 30_000, Vec::new());
    for requests in (0..3_000).map(|at| at % 2) {
        let actions =
            world.machine.step(world.now, Input::Seen(0, Fact::InFlight { at: world.now, requests }));
        world.perform(actions);
    }
    assert_eq!(world.machine.runs[0].timeline.len(), 1 + MAX_SAID / 2);
    world.machine.runs[0].phase = Phase::Confirming;
    world.machine.step(world.now, Input::Seen(0, Fact::InFlight { at: world.now, requests: 7 }));
    assert_eq!(world.machine.runs[0].seen.in_flight, Some(7));
}

/// An agent that is started again long afterwards, be it only upgraded, stops nobody.
#[test]
fn nobody_is_asked_to_stop_or_killed_for_a_deadline_that_is_long_past() {
    let waits = Behaviour { prestop: Some(5_000), kill: true, deadline: Some(2_000), ..simple(None) };
    let world = World::begin(vec![waits], vec![vec![0]], 30_000, Vec::new());
    let later = |world: &World, after: u64| {
        let mut machine = Machine::replay(world.journal.clone()).unwrap();
        let now = machine.runs[0].deadline() + after;
        let mut actions = machine.step(now, Input::Resume);
        actions.extend(machine.step(now, Input::Time));
        let does = |action: &Action| {
            matches!(action, Action::Send { .. } | Action::Prestop(_) | Action::StopUnit(..))
        };
        (actions.iter().any(does), verdict(&machine.runs[0]))
    };
    let (acts, found) = later(&world, 0);
    assert!(
        !acts && found == Some((Verdict::Timeout, "no time was left to ask it to stop".to_owned())),
        "{found:?}"
    );

    let deaf = Behaviour { kill: true, deadline: Some(2_000), ..simple(None) };
    let world = World::begin(vec![deaf], vec![vec![0]], 30_000, Vec::new());
    assert_eq!(later(&world, 20_000 * MS), (true, None), "KILL, which is due");
    let (acts, found) = later(&world, 40_000 * MS);
    assert!(!acts && found.unwrap().0 == Verdict::Timeout);

    // A unit that was asked to stop may have been started again since.
    let unit = Behaviour { unit: Some(100), deadline: Some(2_000), ..simple(None) };
    let world = World::begin(vec![unit], vec![vec![0]], 30_000, Vec::new());
    let ended = world.machine.runs[0].deadline();
    let actions = |now: u64| Machine::replay(world.journal.clone()).unwrap().step(now, Input::Resume);
    let is_asked = |now: u64| actions(now).iter().any(|action| matches!(action, Action::StopUnit(..)));
    assert_eq!([ended - 1_000 * MS, ended, ended + 1_000 * MS].map(is_asked), [true, false, false]);
    assert!(actions(ended).contains(&Action::FindUnit(0, "a.service".to_owned())));
}

/// Half of what is next to nothing is too little to ask, and to kill for.
#[test]
fn whose_command_has_taken_what_was_left_is_not_asked_any_more() {
    let waits = Behaviour { prestop: Some(5_000), kill: true, ..simple(None) };
    let world = |deadline: u64| {
        let mut world = World::begin(vec![waits.clone()], vec![vec![0]], deadline, Vec::new());
        world.run();
        (world.got.len(), verdict(&world.machine.runs[0]).unwrap().0)
    };
    assert_eq!(world(19), (0, Verdict::Timeout));
    assert_eq!(world(20), (2, Verdict::Killed), "TERM and KILL");
}

#[test]
fn a_journal_that_names_what_is_not_there_is_refused() {
    let behaviours = vec![simple(Some(300))];
    let mut world = World::begin(behaviours, vec![vec![0]], 30_000, Vec::new());
    world.run();
    assert!(Machine::replay(world.journal.clone()).is_some());
    for entry in [
        Entry::Gone { at: 0, service: 0, member: 9 },
        Entry::Late { at: 0, service: 9 },
        Entry::Stage { at: 0, stage: 9, grants: Vec::new() },
        Entry::Stage { at: 0, stage: 0, grants: Vec::new() },
        Entry::Signalling { at: 0, service: 0, members: vec![9], signal: 15 },
    ] {
        let journal = world.journal.iter().cloned().chain([entry.clone()]);
        assert!(Machine::replay(journal).is_none(), "{entry:?}");
    }
    assert!(Machine::replay([]).is_none());
}

#[test]
fn who_ends_before_its_turn_is_not_taken_for_who_did_not_run() {
    let ends = || vec![simple(Some(300)), simple(None), Behaviour { absent: true, ..simple(None) }];
    let mut world = World::begin(ends(), vec![vec![0], vec![1, 2]], 30_000, Vec::new());
    world.dead.insert((1, 0), world.now);
    world.run();
    let verdicts = [0, 1, 2].map(|service| verdict(&world.machine.runs[service]).unwrap());
    assert_eq!(
        [verdicts[0].0, verdicts[1].0, verdicts[2].0],
        [Verdict::Clean, Verdict::Lossy, Verdict::Clean]
    );
    assert!(verdicts[1].1.contains("nobody saw how it ended"), "{verdicts:?}");
    assert_eq!(verdicts[2].1, "it did not run");
}

use plumb_common::task::FLAG_FDS_UNKNOWN;

use super::*;
use crate::table::{
    CLONE_THREAD, Drift,
    testing::{SECOND, clone, exec, exit, record, seeded},
};

fn threads(table: &Table, tgid: u32) -> Option<u32> {
    table.rows().iter().find(|row| row.key.tgid == tgid).map(|row| row.threads)
}

#[test]
fn events_after_a_record_are_applied_on_top_of_it_and_events_before_it_are_in_it() {
    let key = ProcKey::new(7, 1);
    let mut table = seeded(&[record(7, 1, SECOND, 1, 3)]);
    table.reconcile(&Pass {
        began: 10 * SECOND,
        records: vec![record(7, 1, 10 * SECOND + 500, 3, 3)],
        after: vec![
            clone(key, key, 8, 10 * SECOND + 100, CLONE_THREAD),
            clone(key, key, 9, 10 * SECOND + 200, CLONE_THREAD),
            clone(key, key, 10, 10 * SECOND + 900, CLONE_THREAD),
        ]
        .into(),
        ..Pass::default()
    });
    assert_eq!(threads(&table, 7), Some(4));
    assert_eq!(table.drift(), Drift::default());
}

#[test]
fn a_lost_clone_and_a_lost_exit_are_drift_and_are_healed() {
    let mut table = seeded(&[record(7, 1, SECOND, 1, 3), record(8, 2, SECOND, 1, 3)]);
    table.reconcile(&Pass {
        began: 10 * SECOND,
        records: vec![record(7, 1, 10 * SECOND, 5, 3), record(9, 3, 10 * SECOND, 1, 3)],
        ..Pass::default()
    });
    assert_eq!([7, 8, 9].map(|tgid| threads(&table, tgid)), [Some(5), None, Some(1)]);
    assert_eq!(table.drift(), Drift::default(), "their events may still come");
    table.reconcile(&Pass::default());
    assert_eq!(table.drift(), Drift { clones_missed: 1, exits_missed: 1, threads: 4 });
}

#[test]
fn a_process_whose_clone_event_trails_its_record_is_not_missed() {
    let parent = ProcKey::new(7, 1);
    let child = ProcKey::new(8, 10 * SECOND - 5);
    let mut table = seeded(&[record(7, 1, SECOND, 1, 3)]);
    table.reconcile(&Pass {
        began: 10 * SECOND,
        records: vec![record(7, 1, 10 * SECOND, 1, 3), record(8, 10 * SECOND - 5, 10 * SECOND + 1, 1, 3)],
        after: vec![clone(parent, child, 8, 10 * SECOND + 4, 0)].into(),
        ..Pass::default()
    });
    assert_eq!(table.drift(), Drift::default());
    assert_eq!(threads(&table, 8), Some(1));
}

#[test]
fn a_process_born_during_a_pass_that_had_passed_it_is_kept() {
    let parent = ProcKey::new(7, 1);
    let child = ProcKey::new(8, 10 * SECOND + 5);
    let mut table = seeded(&[record(7, 1, SECOND, 1, 3)]);
    table.reconcile(&Pass {
        began: 10 * SECOND,
        records: vec![record(7, 1, 10 * SECOND, 1, 3)],
        after: vec![clone(parent, child, 8, 10 * SECOND + 6, 0)].into(),
        ..Pass::default()
    });
    assert_eq!(threads(&table, 8), Some(1));
    let fds = table.rows().iter().find(|row| row.key == child).map(|row| row.fds);
    assert_eq!(fds, Some(3), "a child begins with its parent's fds");
}

#[test]
fn a_process_started_before_a_pass_and_attached_behind_the_iterator_is_kept() {
    let parent = ProcKey::new(7, 1);
    let child = ProcKey::new(8, 10 * SECOND - 5);
    let mut table = seeded(&[record(7, 1, SECOND, 1, 3)]);
    table.reconcile(&Pass {
        began: 10 * SECOND,
        records: vec![record(7, 1, 10 * SECOND, 1, 3)],
        after: vec![clone(parent, child, 8, 10 * SECOND + 6, 0)].into(),
        ..Pass::default()
    });
    assert_eq!(threads(&table, 8), Some(1));
    table.reconcile(&Pass {
        began: 11 * SECOND,
        records: vec![record(7, 1, 11 * SECOND, 1, 3), record(8, 10 * SECOND - 5, 11 * SECOND, 1, 3)],
        ..Pass::default()
    });
    assert_eq!(threads(&table, 8), Some(1));
    assert_eq!(table.drift(), Drift::default());
}

#[test]
fn a_process_whose_clone_event_comes_after_the_pass_is_not_missed() {
    let parent = ProcKey::new(7, 1);
    let child = ProcKey::new(8, 10 * SECOND - 5);
    let mut table = seeded(&[record(7, 1, SECOND, 1, 3)]);
    table.reconcile(&Pass {
        began: 10 * SECOND,
        records: vec![record(7, 1, 10 * SECOND, 1, 3), record(8, 10 * SECOND - 5, 10 * SECOND + 1, 1, 3)],
        ..Pass::default()
    });
    table.apply(&clone(parent, child, 8, 10 * SECOND + 4, 0));
    assert_eq!(threads(&table, 8), Some(1));
    assert_eq!(table.drift(), Drift::default());
}

#[test]
fn late_events_change_nothing_but_that_a_process_has_exited() {
    let (key, other) = (ProcKey::new(7, 1), ProcKey::new(8, 2));
    let mut table = seeded(&[record(7, 1, 10 * SECOND, 3, 3), record(8, 2, 10 * SECOND, 1, 3)]);
    table.apply(&clone(key, key, 9, 10 * SECOND, CLONE_THREAD));
    table.apply(&exit(key, 9, 9 * SECOND, false));
    assert_eq!(threads(&table, 7), Some(3));
    table.apply(&clone(key, key, 9, 10 * SECOND + 1, CLONE_THREAD));
    assert_eq!(threads(&table, 7), Some(4));
    table.apply(&exit(other, 8, 9 * SECOND, true));
    assert_eq!(table.rows().iter().map(|row| row.exited).collect::<Vec<_>>(), [false, true]);
}

#[test]
fn exec_by_any_thread_leaves_one() {
    let key = ProcKey::new(7, 1);
    let mut table = seeded(&[record(7, 1, SECOND, 3, 3)]);
    // Thread 9 calls exec: thread 8 and the leader are killed.
    table.apply(&exit(key, 8, 5 * SECOND, false));
    table.apply(&exit(key, 7, 5 * SECOND, false));
    table.apply(&exec(key, 9, 5 * SECOND + 1));
    assert_eq!(threads(&table, 7), Some(1));
    table.reconcile(&Pass {
        began: 10 * SECOND,
        records: vec![record(7, 1, 10 * SECOND + 5, 4, 3)],
        after: vec![
            clone(key, key, 10, 10 * SECOND + 1, CLONE_THREAD),
            clone(key, key, 11, 10 * SECOND + 2, CLONE_THREAD),
            clone(key, key, 12, 10 * SECOND + 3, CLONE_THREAD),
            exec(key, 7, 10 * SECOND + 9),
        ]
        .into(),
        ..Pass::default()
    });
    assert_eq!(threads(&table, 7), Some(1), "exec after the record");
    table.apply(&clone(key, key, 13, 10 * SECOND + 10, CLONE_THREAD));
    table.reconcile(&Pass {
        began: 11 * SECOND,
        records: vec![record(7, 1, 11 * SECOND, 2, 3)],
        ..Pass::default()
    });
    table.apply(&exec(key, 7, 11 * SECOND));
    assert_eq!(threads(&table, 7), Some(2), "a late exec is in the record");
    assert_eq!(table.drift(), Drift::default());
}

#[test]
fn fds_that_cannot_be_read_stay_as_they_were() {
    let mut table = seeded(&[record(7, 1, SECOND, 1, 3)]);
    let (mut unread, info) = record(7, 1, 10 * SECOND, 1, 0);
    unread.flags = FLAG_FDS_UNKNOWN;
    table.reconcile(&Pass { began: 10 * SECOND, records: vec![(unread, info)], ..Pass::default() });
    assert_eq!((table.rows()[0].fds, table.rows()[0].fds_exact()), (3, false));
    let records = vec![record(7, 1, 11 * SECOND, 1, 0)];
    table.reconcile(&Pass { began: 11 * SECOND, records, ..Pass::default() });
    assert_eq!((table.rows()[0].fds, table.rows()[0].fds_exact()), (0, true));
}

#[test]
fn the_child_of_an_unknown_parent_has_an_unknown_number_of_fds() {
    let mut table = seeded(&[]);
    table.apply(&clone(ProcKey::new(1, 1), ProcKey::new(7, 5 * SECOND), 7, 5 * SECOND, 0));
    assert!(!table.rows()[0].fds_exact());
}

#[test]
fn events_that_come_after_their_pass_are_no_drift() {
    let (key, other, born) = (ProcKey::new(7, 1), ProcKey::new(8, 2), ProcKey::new(9, 5 * SECOND));
    let mut table = seeded(&[record(7, 1, SECOND, 2, 3), record(8, 2, SECOND, 1, 3)]);
    table.reconcile(&Pass {
        began: 10 * SECOND,
        records: vec![record(7, 1, 10 * SECOND, 3, 3), record(9, 5 * SECOND, 10 * SECOND, 2, 3)],
        ..Pass::default()
    });
    let late = [
        clone(key, key, 20, 4 * SECOND, CLONE_THREAD),
        clone(key, key, 21, 4 * SECOND, CLONE_THREAD),
        exit(key, 20, 4 * SECOND, false),
        exit(other, 8, 5 * SECOND, true),
        clone(key, born, 9, 5 * SECOND, 0),
    ];
    late.iter().for_each(|event| table.apply(event));
    let before = [clone(born, born, 22, 6 * SECOND, CLONE_THREAD)];
    before.iter().for_each(|event| table.apply(event));
    table.reconcile(&Pass { began: 11 * SECOND, ..Pass::default() });
    assert_eq!(table.drift(), Drift::default());
}

#[test]
fn an_event_close_to_a_record_proves_nothing() {
    let key = ProcKey::new(7, 1);
    let mut table = seeded(&[record(7, 1, SECOND, 2, 3)]);
    // The thread is exiting while the record is read, and another is counted already.
    for (at, event) in [
        (10 * SECOND, exit(key, 8, 10 * SECOND - 9, false)),
        (20 * SECOND, clone(key, key, 9, 20 * SECOND + 9, CLONE_THREAD)),
    ] {
        let records = vec![record(7, 1, at, 2, 3)];
        table.reconcile(&Pass { began: at, records, after: vec![event].into(), ..Pass::default() });
        let records = vec![record(7, 1, at + SECOND, if at == 10 * SECOND { 1 } else { 2 }, 3)];
        table.reconcile(&Pass { began: at + SECOND, records, ..Pass::default() });
    }
    table.reconcile(&Pass::default());
    assert_eq!(table.drift(), Drift::default());
}

#[test]
fn a_reused_pid_is_another_process() {
    let mut table = seeded(&[record(7, 1, SECOND, 4, 9)]);
    table.apply(&exit(ProcKey::new(7, 1), 7, 5 * SECOND, true));
    table.reconcile(&Pass {
        began: 10 * SECOND,
        records: vec![record(7, 6 * SECOND, 10 * SECOND, 1, 3)],
        ..Pass::default()
    });
    assert_eq!(table.rows().len(), 1);
    assert_eq!(threads(&table, 7), Some(1));
    table.reconcile(&Pass::default());
    assert_eq!(table.drift(), Drift { clones_missed: 1, ..Drift::default() });
}

#[test]
fn a_leader_that_exits_first_still_counts() {
    let key = ProcKey::new(7, 1);
    let mut table = seeded(&[record(7, 1, SECOND, 2, 3)]);
    table.apply(&exit(key, 7, 5 * SECOND, false));
    let (mut leader, words) = record(7, 1, 10 * SECOND, 2, 3);
    leader.exit_state = 32;
    for _ in 0..2 {
        let records = vec![(leader, Arc::clone(&words))];
        table.reconcile(&Pass { began: 10 * SECOND, records, ..Pass::default() });
        let rows = table.rows();
        assert_eq!((rows[0].threads, rows[0].fds, rows[0].exited), (2, 3, false));
        assert_eq!(table.drift(), Drift::default());
    }
}

#[test]
fn a_process_that_was_ending_when_the_first_pass_saw_it_is_not_missed() {
    // The event comes early in the end of a process; a record read after it still shows it alive.
    let key = ProcKey::new(7, 1);
    for before in [true, false] {
        let mut table = Table::default();
        let end = exit(key, 7, 9 * SECOND, true);
        if before {
            table.apply(&end);
        }
        let after = if before { Vec::new() } else { vec![end] };
        let records = vec![record(7, 1, 10 * SECOND, 1, 3)];
        table.reconcile(&Pass { began: 10 * SECOND, records, after: after.into(), ..Pass::default() });
        for second in [11, 12, 13] {
            table.reconcile(&Pass { began: second * SECOND, ..Pass::default() });
        }
        assert_eq!(table.drift(), Drift::default(), "told before the pass: {before}");
    }
}

use bytemuck::Zeroable;
use plumb_common::event::{Exec, FD_OPENED, FD_REPLACED};

use super::*;

const SECOND: u64 = 1_000_000_000;
const PROCESS: ProcKey = ProcKey::new(7, 1);
const TABLE: u64 = 99;

fn change(change: u32, fd: u32, file: u64, time: u64) -> Event {
    let mut event = FdChange::zeroed();
    (event.header.process, event.header.tid, event.header.time) = (PROCESS, 8, time);
    (event.files, event.change, event.fd, event.fd_last, event.file) = (TABLE, change, fd, fd, file);
    Event::Fd(event)
}

fn listing(began: u64, fds: &[(u32, u64)]) -> Listing {
    Listing { began, files: TABLE, fds: fds.iter().copied().collect(), cut: false }
}

/// Watched and seeded at second 1.
fn watched(fds: &[(u32, u64)]) -> Origins {
    let mut origins = Origins::default();
    origins.watch(PROCESS);
    origins.merge(PROCESS, &listing(SECOND, fds));
    origins
}

fn drift(origins: &Origins) -> [u64; 2] {
    [origins.drift.opens_unseen, origins.drift.closes_unseen]
}

#[test]
fn an_event_makes_an_origin_and_what_was_open_before_has_none() {
    let mut origins = watched(&[(0, 10)]);
    origins.apply(&change(FD_OPENED, 3, 11, 2 * SECOND));
    origins.apply(&change(FD_OPENED, 4, 12, 2 * SECOND));
    origins.apply(&change(FD_CLOSED, 4, 0, 2 * SECOND + 1));
    origins.apply(&change(FD_REPLACED, 0, 13, 2 * SECOND + 2));
    for second in [3, 4] {
        origins.merge(PROCESS, &listing(second * SECOND, &[(0, 13), (3, 11)]));
    }
    assert_eq!(drift(&origins), [0, 0]);
    assert_eq!(origins.of(PROCESS, 3), Some(Origin { file: 11, since: 2 * SECOND, tid: 8, how: 0 }));
    assert_eq!(origins.of(PROCESS, 0).unwrap().file, 13);
    assert_eq!(origins.held(), 2);
    assert_eq!(origins.by_call(PROCESS), BTreeMap::from([("open", 2)]));
}

#[test]
fn what_no_event_told_of_is_mended_at_once_and_counted_when_no_late_event_explains_it() {
    let mut origins = watched(&[(0, 10), (1, 10)]);
    origins.merge(PROCESS, &listing(2 * SECOND, &[(0, 10), (5, 20), (6, 21)]));
    assert_eq!(origins.of(PROCESS, 5).unwrap().file, 20, "mended");
    assert_eq!(origins.of(PROCESS, 1), None, "mended");
    // One of the three was only late.
    origins.apply(&change(FD_OPENED, 6, 21, 2 * SECOND - 1));
    origins.merge(PROCESS, &listing(3 * SECOND, &[(0, 10), (5, 20), (6, 21)]));
    assert_eq!(drift(&origins), [1, 1]);
    assert_eq!(origins.of(PROCESS, 6).unwrap().tid, 8, "a late event still names the origin");
}

#[test]
fn a_close_that_ends_late_does_not_take_the_next_file_with_it() {
    let mut origins = watched(&[(3, 10)]);
    // Another thread has opened 3 again, and its event came first.
    origins.apply(&change(FD_OPENED, 3, 11, 2 * SECOND));
    let Event::Fd(mut close) = change(FD_CLOSED, 3, 11, 2 * SECOND + 1) else { unreachable!() };
    close.reused = 1;
    origins.apply(&Event::Fd(close));
    assert_eq!(origins.of(PROCESS, 3).unwrap().file, 11);
    // Through the functions the file itself is named.
    origins.apply(&change(FD_CLOSED, 3, 10, 2 * SECOND + 2));
    assert_eq!(origins.of(PROCESS, 3).unwrap().file, 11);
}

#[test]
fn a_forged_result_changes_no_origin() {
    let mut origins = watched(&[(3, 10)]);
    origins.apply(&change(FD_OPENED, 4, 11, 2 * SECOND));
    let before = [3, 4].map(|fd| origins.of(PROCESS, fd));
    // "openat returned 3", and "close(4) returned 0": both slots hold what they held.
    origins.apply(&change(FD_OPENED, 3, 10, 2 * SECOND + 1));
    origins.apply(&change(FD_OPENED, 4, 11, 2 * SECOND + 2));
    let Event::Fd(mut close) = change(FD_CLOSED, 4, 11, 2 * SECOND + 3) else { unreachable!() };
    close.reused = 1;
    origins.apply(&Event::Fd(close));
    assert_eq!([3, 4].map(|fd| origins.of(PROCESS, fd)), before);
    for second in [3, 4] {
        origins.merge(PROCESS, &listing(second * SECOND, &[(3, 10), (4, 11)]));
    }
    assert_eq!(drift(&origins), [0, 0]);
}

#[test]
fn a_file_whose_number_is_not_known_goes_when_only_one_number_held_it() {
    let mut origins = watched(&[(3, 10), (4, 11), (5, 11)]);
    origins.apply(&change(FD_CLOSED, FD_UNKNOWN, 10, 2 * SECOND));
    origins.apply(&change(FD_CLOSED, FD_UNKNOWN, 11, 2 * SECOND));
    assert_eq!(origins.of(PROCESS, 3), None);
    for second in [3, 4] {
        origins.merge(PROCESS, &listing(second * SECOND, &[(5, 11)]));
    }
    assert_eq!((origins.held(), drift(&origins)[0]), (1, 0));
}

#[test]
fn an_event_close_to_the_listing_decides_nothing() {
    let mut origins = watched(&[]);
    // Opened a moment before the listing that does not show it yet.
    origins.apply(&change(FD_OPENED, 3, 11, 2 * SECOND - 1000));
    origins.merge(PROCESS, &listing(2 * SECOND, &[]));
    assert!(origins.of(PROCESS, 3).is_some());
    for second in [3, 4] {
        origins.merge(PROCESS, &listing(second * SECOND, &[(3, 11)]));
    }
    assert_eq!(drift(&origins), [0, 0]);
}

#[test]
fn exec_and_another_table_are_no_drift() {
    let mut origins = watched(&[(3, 10), (4, 11)]);
    let mut exec = Exec::zeroed();
    exec.header.process = PROCESS;
    origins.apply(&Event::Exec(exec));
    origins.merge(PROCESS, &listing(2 * SECOND, &[(3, 10)]));
    let other = Listing { files: TABLE + 1, ..listing(3 * SECOND, &[(9, 12)]) };
    origins.merge(PROCESS, &other);
    origins.merge(PROCESS, &Listing { began: 4 * SECOND, ..other });
    assert_eq!((drift(&origins), origins.held()), ([0, 0], 1));
}

#[test]
fn the_number_of_origins_is_bounded_and_a_cut_is_no_drift() {
    let many: Vec<(u32, u64)> = (0..MAX_ORIGINS as u32 + 5).map(|fd| (fd, 1)).collect();
    let mut origins = watched(&many);
    for second in [2, 3] {
        origins.merge(PROCESS, &listing(second * SECOND, &many));
    }
    assert_eq!((origins.held(), drift(&origins)), (MAX_ORIGINS, [0, 0]));
    origins.unwatch(PROCESS);
    assert_eq!(origins.held(), 0);
}

#[test]
fn a_listing_that_was_cut_takes_nothing_away() {
    let mut origins = watched(&[(3, 10), (4, 11)]);
    let cut = Listing { cut: true, ..listing(2 * SECOND, &[(3, 10), (5, 12)]) };
    origins.merge(PROCESS, &cut);
    origins.merge(PROCESS, &Listing { began: 3 * SECOND, ..cut });
    assert_eq!((origins.held(), drift(&origins)), (3, [0, 0]));
}

use bytemuck::Zeroable;
use plumb_common::event::{
    CLONE_THREAD, Exec, FD_CLOSED, FD_OPENED, FD_REPLACED, FD_UNKNOWN, FdChange, MARK_REUSED,
};

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
    Listing { began, files: TABLE, fds: fds.iter().copied().collect(), ..Listing::default() }
}

/// Watched and seeded at second 1.
fn watched(fds: &[(u32, u64)]) -> Origins {
    let mut origins = Origins::default();
    origins.watch(PROCESS, Resource::Fd);
    origins.merge(PROCESS, &listing(SECOND, fds));
    origins
}

/// File, time and thread of an fd's origin.
fn of(origins: &Origins, fd: u32) -> Option<(u64, u64, u32)> {
    origins.processes.get(&PROCESS)?.fds.as_ref()?.of(fd)
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
    assert_eq!(of(&origins, 3), Some((11, 2 * SECOND, 8)));
    assert_eq!(of(&origins, 0).unwrap().0, 13);
    assert_eq!(origins.held(), 2);
    let ByOrigin { before, groups, .. } = origins.by_origin(PROCESS, Resource::Fd, u64::MAX);
    assert_eq!((before, groups.len()), (0, 1), "what was open at 0 has been replaced");
    let newest: Vec<u32> = groups[0].examples.iter().map(|(_, fd)| *fd).collect();
    assert_eq!((groups[0].how, groups[0].live, &newest[..]), ("open", 2, &[0, 3][..]));
}

#[test]
fn what_no_event_told_of_is_mended_at_once_and_counted_when_no_late_event_explains_it() {
    let mut origins = watched(&[(0, 10), (1, 10)]);
    origins.merge(PROCESS, &listing(2 * SECOND, &[(0, 10), (5, 20), (6, 21)]));
    assert_eq!(of(&origins, 5).unwrap().0, 20, "mended");
    assert_eq!(of(&origins, 1), None, "mended");
    // One of the three was only late.
    origins.apply(&change(FD_OPENED, 6, 21, 2 * SECOND - 1));
    origins.merge(PROCESS, &listing(3 * SECOND, &[(0, 10), (5, 20), (6, 21)]));
    assert_eq!(drift(&origins), [1, 1]);
    assert_eq!(of(&origins, 6).unwrap().2, 8, "a late event still names the origin");
}

#[test]
fn a_close_that_ends_late_does_not_take_the_next_file_with_it() {
    let mut origins = watched(&[(3, 10)]);
    // Another thread has opened 3 again, and its event came first.
    origins.apply(&change(FD_OPENED, 3, 11, 2 * SECOND));
    let Event::Fd(mut close) = change(FD_CLOSED, 3, 11, 2 * SECOND + 1) else { unreachable!() };
    close.marks = MARK_REUSED;
    origins.apply(&Event::Fd(close));
    assert_eq!(of(&origins, 3).unwrap().0, 11);
    // Through the functions the file itself is named.
    origins.apply(&change(FD_CLOSED, 3, 10, 2 * SECOND + 2));
    assert_eq!(of(&origins, 3).unwrap().0, 11);
}

#[test]
fn a_forged_result_changes_no_origin() {
    let mut origins = watched(&[(3, 10)]);
    origins.apply(&change(FD_OPENED, 4, 11, 2 * SECOND));
    let before = [3, 4].map(|fd| of(&origins, fd));
    // "openat returned 3", and "close(4) returned 0": both slots hold what they held.
    origins.apply(&change(FD_OPENED, 3, 10, 2 * SECOND + 1));
    origins.apply(&change(FD_OPENED, 4, 11, 2 * SECOND + 2));
    let Event::Fd(mut close) = change(FD_CLOSED, 4, 11, 2 * SECOND + 3) else { unreachable!() };
    close.marks = MARK_REUSED;
    origins.apply(&Event::Fd(close));
    assert_eq!([3, 4].map(|fd| of(&origins, fd)), before);
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
    assert_eq!(of(&origins, 3), None);
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
    assert!(of(&origins, 3).is_some());
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
    origins.unwatch(PROCESS, Resource::Fd);
    assert_eq!(origins.held(), 0);
}

#[test]
fn fds_and_threads_share_what_room_there_is() {
    let mut origins = Origins::default();
    Resource::ALL.into_iter().for_each(|resource| origins.watch(PROCESS, resource));
    let fds: Vec<(u32, u64)> = (0..MAX_ORIGINS as u32 - 2).map(|fd| (fd, 1)).collect();
    let threads = (0..5).map(|tid| (tid, 1)).collect();
    origins.merge(PROCESS, &Listing { threads: Some(threads), ..listing(SECOND, &fds) });
    assert_eq!(origins.held(), MAX_ORIGINS);
    origins.apply(&change(FD_OPENED, MAX_ORIGINS as u32, 11, 2 * SECOND));
    assert_eq!(origins.held(), MAX_ORIGINS);
}

#[test]
fn a_listing_that_was_cut_takes_nothing_away() {
    let mut origins = watched(&[(3, 10), (4, 11)]);
    let cut = Listing { cut: true, ..listing(2 * SECOND, &[(3, 10), (5, 12)]) };
    origins.merge(PROCESS, &cut);
    origins.merge(PROCESS, &Listing { began: 3 * SECOND, ..cut });
    assert_eq!((origins.held(), drift(&origins)), (3, [0, 0]));
}

#[test]
fn a_stack_is_put_to_what_it_made_and_to_nothing_that_came_later() {
    let mut origins = watched(&[(0, 10)]);
    origins.watch(PROCESS, Resource::Thread);
    let stack = |complete| Arc::new(Stack { frames: Vec::new(), origin: None, complete });
    let (first, second) = (stack(true), stack(false));
    origins.apply(&change(FD_OPENED, 3, 11, 2 * SECOND));
    origins.apply(&change(FD_OPENED, 4, 12, 3 * SECOND));
    let made = |number, time| Made { number, time, by: 8 };
    origins.name(PROCESS, &made(3, 2 * SECOND), &first);
    origins.name(PROCESS, &made(4, 2 * SECOND), &second);
    origins.name(PROCESS, &made(0, 0), &second);
    let ByOrigin { before, groups, .. } = origins.by_origin(PROCESS, Resource::Fd, u64::MAX);
    let stacks: Vec<_> = groups.iter().map(|group| (group.live, group.stack.clone())).collect();
    assert_eq!((before, stacks), (1, vec![(1, Some(first)), (1, None)]));
    // The second may still get its stack.
    let soon = origins.by_origin(PROCESS, Resource::Fd, 4 * SECOND);
    assert_eq!((soon.before, soon.naming, soon.groups.len()), (1, 1, 1));
}

#[test]
fn threads_have_origins_from_clone_to_exit_and_listings_correct_them() {
    let mut origins = Origins::default();
    origins.watch(PROCESS, Resource::Thread);
    let threads = |began, ids: &[(u32, u64)]| Listing {
        began,
        threads: Some(ids.iter().copied().collect()),
        ..Listing::default()
    };
    let clone = |tid, time| {
        let mut event = plumb_common::event::Clone::zeroed();
        (event.header.process, event.header.tid, event.header.time) = (PROCESS, 7, time);
        (event.flags, event.child_tid) = (CLONE_THREAD, tid);
        Event::Clone(event)
    };
    let exit = |tid| {
        let mut event = plumb_common::event::Exit::zeroed();
        (event.header.process, event.header.tid) = (PROCESS, tid);
        Event::Exit(event)
    };
    origins.merge(PROCESS, &threads(SECOND, &[(7, 1), (8, 2)]));
    origins.apply(&clone(20, 2 * SECOND));
    origins.apply(&clone(21, 2 * SECOND + 1));
    origins.apply(&exit(21));
    origins.apply(&exit(8));
    // 22 came unseen; 23 is newer than the listing.
    origins.apply(&clone(23, 4 * SECOND - 1));
    origins.merge(PROCESS, &threads(4 * SECOND, &[(7, 1), (20, 2 * SECOND), (22, 3 * SECOND)]));
    let ByOrigin { before, groups, .. } = origins.by_origin(PROCESS, Resource::Thread, u64::MAX);
    assert_eq!((before, groups[0].how, groups[0].live), (1, "clone", 3));
    let newest: Vec<u32> = groups[0].examples.iter().map(|(_, tid)| *tid).collect();
    assert_eq!(newest, [23, 22, 20]);
    assert_eq!(origins.held(), 4);
    origins.unwatch(PROCESS, Resource::Thread);
    assert_eq!(origins.held(), 0);
}

#[test]
fn where_most_came_from_is_told_to_the_next_agent_in_words() {
    use crate::symbolise::{Frame, How, Line};
    let line =
        |function: &str| Line { function: function.to_owned(), file: None, line: None, inlined: false };
    let frame = |function: &str| Frame {
        how: How::Tables,
        module: Some("/srv/app".into()),
        build_id: None,
        offset: 0,
        lines: [line(function)].into(),
    };
    let stack = Stack { frames: vec![frame("leak"), frame("main")], origin: Some((0, 0)), complete: true };
    let (how, live) = ("openat", 5);
    let mut group =
        Group { stack: Some(Arc::new(stack)), how, live, oldest: 1, newest: 2, examples: Vec::new() };
    let words = "leak in app, called by main in app".to_owned();
    assert_eq!(group.earlier(), Some(Earlier { words, live: 5, newest: 2 }));
    group.stack = None;
    assert_eq!(group.earlier(), None);
}

use std::collections::BTreeSet;

use bytemuck::Zeroable;
use plumb_common::{
    event::{
        CLONE_THREAD, Clone as CloneEvent, Exec, Exit, FD_CLOSED, FD_OPENED, FdChange, MARK_CLOEXEC,
        MARK_REUSED, MARK_SAME_CALL,
    },
    syscalls,
    task::ProcKey,
};

use super::*;

const ROOT: ProcKey = ProcKey::new(10, 1);
const CHILD: ProcKey = ProcKey::new(20, 2);

fn tree() -> Tree {
    let mut tree = Tree::default();
    tree.begin(ROOT, "root", [0, 1, 2]);
    tree
}

fn fd(process: ProcKey, change: u32, fd: u32, file: u64, marks: u32) -> Event {
    let mut event = FdChange::zeroed();
    (event.header.process, event.header.tid, event.header.time) =
        (process, process.tgid, 100 + u64::from(fd));
    (event.change, event.fd, event.fd_last, event.file, event.marks) = (change, fd, fd, file, marks);
    Event::Fd(event)
}

fn fork() -> Event {
    let mut event = CloneEvent::zeroed();
    (event.header.process, event.child, event.child_tid) = (ROOT, CHILD, CHILD.tgid);
    Event::Clone(event)
}

fn exec(process: ProcKey) -> Event {
    let mut event = Exec::zeroed();
    event.header.process = process;
    Event::Exec(event)
}

fn end(process: ProcKey) -> Event {
    let mut event = Exit::zeroed();
    (event.header.process, event.header.tid) = (process, process.tgid);
    (event.group_dead, event.group_exit, event.called) = (1, 1, 1);
    Event::Exit(event)
}

fn table(fds: &[u32]) -> Beside {
    Beside { trace: None, table: Some(fds.iter().copied().collect()) }
}

/// Applies events with nothing beside them.
fn apply(tree: &mut Tree, events: &[Event]) {
    for event in events {
        assert!(tree.apply(event, Beside::default()).is_none());
    }
}

/// Numbers of a process, each with how it came there.
fn held(process: &Process) -> Vec<(u32, Through)> {
    process.fds.iter().map(|(fd, slot)| (*fd, slot.through)).collect()
}

#[test]
fn what_is_open_at_the_end_is_what_the_kernel_says() {
    let mut tree = tree();
    apply(
        &mut tree,
        &[fd(ROOT, FD_OPENED, 3, 30, 0), fd(ROOT, FD_OPENED, 4, 40, 0), fd(ROOT, FD_OPENED, 5, 50, 0)],
    );
    apply(&mut tree, &[fd(ROOT, FD_CLOSED, 4, 0, 0)]);
    // 5 went on a way that nobody follows, 9 came on one.
    let ended = tree.apply(&end(ROOT), table(&[0, 1, 2, 3, 9])).unwrap();
    let of_tree: Vec<u32> =
        ended.process.fds.iter().filter(|(_, slot)| slot.open.is_of_tree()).map(|(fd, _)| *fd).collect();
    assert_eq!(of_tree, [3]);
    assert_eq!(ended.unseen, BTreeSet::from([9]));
    assert_eq!(tree.drift(), Drift { opens_unseen: 1, closes_unseen: 1 });
    assert_eq!(tree.processes().count(), 0);
}

#[test]
fn a_child_has_what_its_parent_had_and_an_exec_hands_on_what_stays_open() {
    let mut tree = tree();
    apply(&mut tree, &[fd(ROOT, FD_OPENED, 3, 30, 0), fd(ROOT, FD_OPENED, 4, 40, MARK_CLOEXEC), fork()]);
    apply(&mut tree, &[fd(CHILD, FD_OPENED, 5, 50, 0), fd(ROOT, FD_CLOSED, 3, 0, 0)]);
    let child = tree.get(CHILD).unwrap();
    assert_eq!(held(child)[3..], [(3, Through::Fork), (4, Through::Fork), (5, Through::Own)]);
    assert_eq!(held(tree.get(ROOT).unwrap())[3..], [(4, Through::Own)]);
    tree.apply(&exec(CHILD), table(&[0, 1, 2, 3, 5]));
    assert_eq!(held(tree.get(CHILD).unwrap())[3..], [(3, Through::Exec), (5, Through::Exec)]);
    // Without the kernel's word the mark decides.
    apply(&mut tree, &[exec(ROOT)]);
    assert_eq!(held(tree.get(ROOT).unwrap())[3..], []);
}

#[test]
fn what_an_exec_handed_on_unseen_is_not_of_the_program_that_runs_then() {
    let mut tree = tree();
    apply(&mut tree, &[fd(ROOT, FD_OPENED, 3, 30, 0)]);
    tree.apply(&exec(ROOT), table(&[0, 1, 2, 3, 7]));
    assert_eq!(tree.drift(), Drift { opens_unseen: 1, closes_unseen: 0 });
    let ended = tree.apply(&end(ROOT), table(&[0, 1, 2, 3, 7, 9])).unwrap();
    assert_eq!(held(&ended.process)[3..], [(3, Through::Exec), (7, Through::Exec)]);
    assert!(!ended.process.fds[&7].open.is_of_tree());
    assert_eq!(ended.unseen, BTreeSet::from([9]));
}

#[test]
fn what_the_kernel_lists_is_what_there_is() {
    let mut tree = tree();
    apply(&mut tree, &[fd(ROOT, FD_OPENED, 3, 30, 0), fd(ROOT, FD_OPENED, 4, 40, 0)]);
    tree.get_mut(ROOT).unwrap().correct(&[0, 1, 2, 4, 8].into());
    assert_eq!(held(tree.get(ROOT).unwrap())[3..], [(4, Through::Own), (8, Through::Own)]);
    // Its event comes after all.
    apply(&mut tree, &[fd(ROOT, FD_OPENED, 8, 80, 0)]);
    assert_eq!(tree.get(ROOT).unwrap().fds[&8].open.event.file, 80);
}

#[test]
fn a_close_that_comes_late_does_not_remove_what_was_opened_since() {
    let mut tree = tree();
    apply(&mut tree, &[fd(ROOT, FD_OPENED, 3, 30, 0), fd(ROOT, FD_OPENED, 3, 31, 0)]);
    apply(&mut tree, &[fd(ROOT, FD_CLOSED, 3, 31, MARK_REUSED)]);
    assert_eq!(tree.get(ROOT).unwrap().fds[&3].open.event.file, 31);
    apply(&mut tree, &[fd(ROOT, FD_CLOSED, 3, 0, 0)]);
    assert!(!tree.get(ROOT).unwrap().fds.contains_key(&3));
}

#[test]
fn the_number_of_an_fd_that_is_open_makes_no_other_origin() {
    let mut tree = tree();
    apply(&mut tree, &[fd(ROOT, FD_OPENED, 3, 30, 0)]);
    let mut forged = FdChange::zeroed();
    (forged.header.process, forged.header.time) = (ROOT, 999);
    (forged.change, forged.fd, forged.fd_last, forged.file) = (FD_OPENED, 3, 3, 30);
    apply(&mut tree, &[Event::Fd(forged)]);
    assert_eq!(tree.get(ROOT).unwrap().fds[&3].open.event.header.time, 103);
}

#[test]
fn both_ends_of_a_pipe_are_of_one_call() {
    let mut tree = tree();
    apply(&mut tree, &[fd(ROOT, FD_OPENED, 3, 30, 0), fd(ROOT, FD_OPENED, 4, 40, MARK_SAME_CALL)]);
    apply(&mut tree, &[fd(ROOT, FD_OPENED, 5, 50, 0)]);
    let calls: Vec<u64> = (3..6).map(|fd| tree.get(ROOT).unwrap().fds[&fd].open.call).collect();
    assert_eq!(calls, [103, 103, 105]);
}

#[test]
fn a_thread_that_ends_by_itself_is_not_there_at_the_end_and_one_that_is_ended_was() {
    let mut tree = tree();
    for tid in [11, 12, 13] {
        let mut thread = CloneEvent::zeroed();
        (thread.header.process, thread.child, thread.child_tid, thread.flags) =
            (ROOT, ROOT, tid, CLONE_THREAD);
        apply(&mut tree, &[Event::Clone(thread)]);
    }
    let exit = |tid, group_exit, called| {
        let mut exit = Exit::zeroed();
        (exit.header.process, exit.header.tid, exit.group_exit, exit.called) =
            (ROOT, tid, group_exit, called);
        Event::Exit(exit)
    };
    // 11 returns, 12 calls exit(3), which ends 13.
    apply(&mut tree, &[exit(11, 0, 0), exit(12, 1, 1), exit(13, 1, 0)]);
    let ended = tree.apply(&end(ROOT), Beside::default()).unwrap();
    assert_eq!(ended.process.threads.into_keys().collect::<Vec<_>>(), [13]);
}

#[test]
fn an_fd_is_placed_when_the_program_chose_its_number() {
    let of = |name: &str| {
        let mut event = FdChange::zeroed();
        event.how = syscalls::TABLE.iter().position(|call| call.name == name).unwrap() as u32;
        Open::new(event, None).is_placed()
    };
    assert_eq!(["dup2", "dup3", "fcntl"].map(of), [true; 3]);
    assert_eq!(["open", "dup", "socket"].map(of), [false; 3]);
}

#[test]
fn a_process_without_room_is_counted() {
    let mut tree = tree();
    let mut event = CloneEvent::zeroed();
    (event.header.process, event.child, event.left_out) = (ROOT, CHILD, 1);
    apply(&mut tree, &[Event::Clone(event)]);
    assert_eq!((tree.left_out(), tree.processes().count()), (1, 1));
}

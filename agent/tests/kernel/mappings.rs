//! What the kernel tells of executable mappings is what /proc/PID/maps says, of a program that is followed from its
//! start, of its children, and after an exec.

use std::{
    collections::BTreeMap,
    io,
    process::{Command, Stdio},
    time::Duration,
};

use plumb::kernel::{FollowError, MapEvent, Mappings};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::support::{
    Workload,
    followed::{Space, follow, replay, space},
};

/// What the fds say within the time.
fn readiness(mappings: &Mappings, timeout: Duration) -> PollFlags {
    let mut fds: Vec<_> = mappings.fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
    poll(&mut fds, Some(&Timespec::try_from(timeout).unwrap())).unwrap();
    fds.iter().map(PollFd::revents).fold(PollFlags::empty(), |all, one| all | one)
}

fn take(mappings: &mut Mappings, spaces: &mut BTreeMap<u32, Space>) -> Vec<MapEvent> {
    let events = mappings.drain();
    assert!(events.is_sorted_by_key(MapEvent::time));
    events.iter().for_each(|event| replay(spaces, event.clone()));
    events
}

/// A path of `fd_paths`: the mappings of the program and of the children that it says it has.
fn compare(path: &str) -> usize {
    let mut command = Command::new(Workload::fd_paths());
    let follower = follow(command.arg(path));
    let mut program = Workload::start_command(&mut command).ready();
    let (mut mappings, mut spaces) = (follower.join().unwrap(), BTreeMap::new());
    take(&mut mappings, &mut spaces);
    assert_eq!(spaces[&program.pid()], space(program.pid()), "{path}: at the start");

    let said = program.stage();
    take(&mut mappings, &mut spaces);
    let children = said.iter().filter_map(|line| line.strip_prefix("forked ")?.split_once(' '));
    let pids: Vec<u32> = children.map(|(_, child)| child.parse().unwrap()).chain([program.pid()]).collect();
    for pid in &pids {
        assert_eq!(spaces[pid], space(*pid), "{path}: {said:?}");
    }
    assert_eq!(mappings.lost(), 0);
    program.end();
    pids.len()
}

#[test]
fn mappings_are_told_as_proc_has_them() {
    for path in ["fork", "vfork", "pid-reuse"] {
        assert_eq!(compare(path), 2, "{path}");
    }
    for path in ["exec-cloexec", "exec-thread", "thread"] {
        assert_eq!(compare(path), 1, "{path}");
    }
}

#[test]
fn a_program_that_is_over_was_told_completely() {
    let mut command = Command::new(Workload::fd_paths());
    let follower = follow(command.arg("open"));
    let long = Workload::start_command(&mut command).ready();
    drop(follower.join().unwrap());
    // Each run has other addresses.
    let origins = |space: &Space| {
        let mut origins: Vec<_> = space.values().cloned().collect();
        origins.sort_unstable();
        origins
    };

    let mut command = Command::new(Workload::fd_paths());
    command.arg("--list").stdout(Stdio::null());
    let follower = follow(&mut command);
    let mut short = command.spawn().unwrap();
    let mut mappings = follower.join().unwrap();
    // Of one that is over already the kernel says no more than that (`perf_poll`, kernel/events/core.c); it wakes too.
    let wakes = PollFlags::IN | PollFlags::HUP;
    assert!(readiness(&mappings, Duration::from_secs(10)).intersects(wakes), "at the first record");
    let pid = short.id();
    assert!(short.wait().unwrap().success());
    let mut spaces = BTreeMap::new();
    let events = take(&mut mappings, &mut spaces);
    assert_eq!(origins(&spaces[&pid]), origins(&space(long.pid())));
    let (first, last) = (events.first().unwrap().time(), events.last().unwrap().time());
    println!("{} events in {:?}", events.len(), Duration::from_nanos(last - first));
    assert!(matches!(events[0], MapEvent::Exec { tgid, .. } if tgid == pid), "{:?}", events[0]);
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    assert!(
        Duration::try_from(now).unwrap().saturating_sub(Duration::from_nanos(first))
            < Duration::from_secs(60)
    );

    assert!(readiness(&mappings, Duration::ZERO).contains(PollFlags::HUP), "nobody is left");
    assert_eq!((take(&mut mappings, &mut spaces), mappings.lost()), (vec![], 0));
}

#[test]
fn a_process_that_is_gone_cannot_be_followed() {
    let mut gone = Command::new(Workload::fd_paths()).arg("--list").stdout(Stdio::null()).spawn().unwrap();
    gone.wait().unwrap();
    let error = Mappings::follow(gone.id()).err().unwrap();
    assert!(matches!(&error, FollowError::Open { pid, .. } if *pid == gone.id()), "{error}");
    assert_eq!(
        io::Error::from_raw_os_error(libc::ESRCH).to_string(),
        error.to_string().rsplit_once(": ").unwrap().1
    );
}

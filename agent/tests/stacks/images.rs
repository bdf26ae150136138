//! Programs that nobody could have looked at in /proc in time: their stacks have names by what the kernel told.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::Duration,
};

use plumb::{
    kernel::{MapEvent, Mappings},
    symbolise::{Images, RawStack, Symboliser},
};
use plumb_common::task::ProcKey;

use crate::{
    sampler,
    sources::{CALLS, brief, compile, marked, own, source, symboliser},
    support::{
        Running, TempDir,
        followed::{Origin, Space, follow, replay, space},
    },
};

/// Nanoseconds since boot.
fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(Duration::try_from(now).unwrap().as_nanos()).unwrap()
}

/// What is asked of a stack later: which call it was, when, and what was seen.
struct Seen {
    phase: i64,
    time: u64,
    raw: RawStack,
}

/// Runs a program to its end; `beside` is called after each sample.
fn run(
    command: &mut Command,
    beside: &mut dyn FnMut(&mut Mappings, &ProcKey),
) -> (ProcKey, Mappings, Vec<Seen>) {
    let mut follower = Some(follow(command));
    let (mut mappings, mut process, mut seen) = (None, None, Vec::new());
    sampler::run(command, &mut |key, sample| {
        let mappings = mappings.get_or_insert_with(|| follower.take().unwrap().join().unwrap());
        seen.push(Seen { phase: sample.phase, time: now(), raw: sample.raw });
        process = Some(key);
        beside(mappings, &key);
    });
    (process.unwrap(), mappings.unwrap(), seen)
}

fn assert_named(symboliser: &mut Symboliser, images: &Images, process: ProcKey, seen: &Seen) {
    let image = images.at(process.tgid, seen.time).unwrap();
    let stack = symboliser.unwind(image, std::slice::from_ref(&seen.raw)).remove(0);
    let frames = symboliser.symbolise(&stack);
    let call = CALLS[usize::try_from(seen.phase).unwrap()];
    let expected = [(format!("call_{call}"), call), ("once".into(), "once"), ("main".into(), "main")]
        .map(|(function, mark)| (function, "calls.c".to_owned(), marked("calls.c", mark)));
    assert_eq!(own(&frames, "calls")[..3], expected, "{}", brief(&frames));
    assert!(stack.complete, "{}", brief(&frames));
}

fn calls(dir: &TempDir) -> String {
    let program = dir.join("calls");
    compile("gcc", &["-g", "-O2"], &source("calls.c"), &program);
    program
}

#[test]
fn stacks_have_names_when_nobody_has_looked_before_the_end() {
    let dir = TempDir::new();
    let program = calls(&dir);
    let (process, mut mappings, seen) = run(&mut Command::new(&program), &mut |_, _| {});
    let (mut symboliser, mut images) = (symboliser(), Images::new(process));
    images.take(&mut symboliser, mappings.drain());
    assert_eq!(seen.len(), CALLS.len());
    for seen in &seen {
        assert_named(&mut symboliser, &images, process, seen);
    }
    assert_eq!((mappings.lost(), images.dropped()), (0, 0));
    images.forget(&mut symboliser, process.tgid, now());
    assert_eq!(images.at(process.tgid, seen[0].time), None);
}

#[test]
fn stacks_have_names_after_the_program_is_deleted() {
    let dir = TempDir::new();
    let program = calls(&dir);
    let of_it = RefCell::new(None);
    let (process, _, seen) = run(&mut Command::new(&program), &mut |mappings, process| {
        let mut of_it = of_it.borrow_mut();
        if of_it.is_none() {
            // Deleted first: the mapping itself still leads to it.
            fs::remove_file(&program).unwrap();
        }
        let (symboliser, images) = of_it.get_or_insert_with(|| (symboliser(), Images::new(*process)));
        images.take(symboliser, mappings.drain());
    });
    let (mut symboliser, images) = of_it.into_inner().unwrap();
    for seen in &seen {
        let image = images.at(process.tgid, seen.time).unwrap();
        let stack = symboliser.unwind(image, std::slice::from_ref(&seen.raw)).remove(0);
        let frames = symboliser.symbolise(&stack);
        let call = format!("call_{}", CALLS[usize::try_from(seen.phase).unwrap()]);
        let named = frames.iter().flat_map(|frame| frame.lines.iter()).any(|line| line.function == call);
        assert!(named, "{}", brief(&frames));
    }
}

#[test]
fn another_file_under_the_same_name_is_not_read() {
    let dir = TempDir::new();
    let program = calls(&dir);
    let (process, mut mappings, seen) = run(&mut Command::new(&program), &mut |_, _| {});
    fs::copy(&program, dir.join("other")).unwrap();
    fs::rename(dir.join("other"), &program).unwrap();
    let (mut symboliser, mut images) = (symboliser(), Images::new(process));
    images.take(&mut symboliser, mappings.drain());
    let image = images.at(process.tgid, seen[0].time).unwrap();
    let stack = symboliser.unwind(image, std::slice::from_ref(&seen[0].raw)).remove(0);
    let frames = symboliser.symbolise(&stack);
    assert!(own(&frames, "calls").is_empty(), "{}", brief(&frames));
}

/// Where the pages come from, whatever the addresses.
fn origins(space: &Space) -> Vec<Origin> {
    let mut origins: Vec<_> = space.values().cloned().collect();
    origins.sort_unstable();
    origins
}

/// The mappings of each process at its end or exec, and how long the tree was told about.
fn whole_life(program: &str) -> (Vec<Space>, Duration) {
    let mut command = Command::new(program);
    let follower = follow(&mut command);
    let mut child = command.spawn().unwrap();
    assert!(child.wait().unwrap().success());
    let mut mappings = follower.join().unwrap();
    let events = mappings.drain();
    assert_eq!(mappings.lost(), 0);
    let lived = events.last().unwrap().time() - events[0].time();
    let (mut spaces, mut ended) = (BTreeMap::new(), Vec::new());
    for event in events {
        if let MapEvent::Exec { tgid, .. } = event {
            ended.extend(spaces.remove(&tgid));
        }
        replay(&mut spaces, event);
    }
    ended.extend(spaces.into_values());
    (ended, Duration::from_nanos(lived))
}

#[test]
fn three_images_of_a_few_milliseconds_are_told_completely() {
    let dir = TempDir::new();
    let program = dir.join("brief");
    compile("gcc", &["-O2"], &source("brief.c"), &program);
    let long = Command::new(&program).arg("wait").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut long = Running(long.unwrap());
    let mut line = String::new();
    BufReader::new(long.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let expected = origins(&space(long.pid()));
    for _ in 0..20 {
        let (ended, lived) = whole_life(&program);
        println!("all four in {lived:?}");
        // The parent, both children, and one of these after its exec.
        assert_eq!(ended.len(), 4);
        for space in &ended {
            assert_eq!(origins(space), expected);
        }
    }
}

#[test]
fn what_a_full_ring_loses_is_counted() {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "i=0; while [ $i -lt 600 ]; do /bin/true; i=$((i+1)); done"]);
    let follower = follow(&mut command);
    let mut shell = command.spawn().unwrap();
    let mut mappings = follower.join().unwrap();
    shell.wait().unwrap();
    let events = mappings.drain();
    let told = events.iter().filter(|event| matches!(event, MapEvent::Forked { .. })).count();
    println!("{} events of {told} processes; {} lost", events.len(), mappings.lost());
    // Each of them is a fork, an exec and the mappings of a program, its dynamic linker, a library and the vDSO.
    let missing = 600 - u64::try_from(told).unwrap();
    assert!(missing > 0 && mappings.lost() > 4 * missing, "{missing}");
}

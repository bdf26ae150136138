//! C, with and without what helps an unwinder.

use std::{collections::BTreeMap, process::Command};

use plumb::symbolise::{How, origin_frame};

use crate::{
    sampler::{self, Sample},
    sources::{CALLS, brief, compile, marked, own, plain, source, symboliser},
    support::TempDir,
};

/// Rounds of nine calls: a thousand samples.
const ROUNDS: &str = "112";

/// How many of the samples of each call had exactly the expected stack; the first other one.
#[derive(Default)]
struct Tally {
    right: u32,
    all: u32,
    wrong: Option<String>,
}

/// Samples a program and compares each stack, except for libc's own frames, which are named apart.
fn check(flags: &[&str], has_lines: bool, is_static: bool) {
    let dir = TempDir::new();
    let program = dir.join("calls");
    compile("gcc", flags, &source("calls.c"), &program);
    let mut symboliser = symboliser();
    let mut tally: BTreeMap<&str, Tally> = BTreeMap::new();
    sampler::run(Command::new(&program).arg(ROUNDS), &mut |process, sample: Sample| {
        let call = CALLS[usize::try_from(sample.phase).unwrap()];
        let stack = symboliser.unwind(process, std::slice::from_ref(&sample.raw)).remove(0);
        let frames = symboliser.symbolise(&stack);
        let line = |mark| if has_lines { marked("calls.c", mark) } else { 0 };
        let file = if has_lines { "calls.c" } else { "" };
        let expected = [(format!("call_{call}"), call), ("once".into(), "once"), ("main".into(), "main")]
            .map(|(function, mark)| (function, file.to_owned(), line(mark)));
        let mut found = own(&frames, "calls");
        if is_static {
            // libc is in the program; its frames have no lines.
            found.retain(|(_, file, _)| !file.is_empty());
        } else {
            // What starts every program.
            assert_eq!(found.pop().map(|last| last.0).as_deref(), Some("_start"), "{}", brief(&frames));
        }
        // The function of libc that makes the syscall; without its debug file only exported ones have a name.
        let first = frames[0].lines.last().map(|line| plain(&line.function));
        let first_is_right = match (call, first) {
            (_, None) => matches!(call, "fopen" | "pthread_create"),
            ("fopen", Some(first)) => first == "open",
            ("pthread_create", Some(first)) => first == "clone3",
            (call, Some(first)) => first == call,
        };
        let origin = origin_frame(&frames).map(|index| frames[index].lines[0].function.clone());
        let by_pointer = frames.iter().any(|frame| frame.how == How::FramePointer);
        let one = tally.entry(call).or_default();
        one.all += 1;
        if found == expected
            && first_is_right
            && stack.complete
            && !by_pointer
            && origin.as_deref() == Some(&expected[0].0)
        {
            one.right += 1;
        } else if one.wrong.is_none() {
            one.wrong = Some(format!("expected {expected:?}, origin {origin:?}: {}", brief(&frames)));
        }
    });
    let all: u32 = tally.values().map(|tally| tally.all).sum();
    let right: u32 = tally.values().map(|tally| tally.right).sum();
    println!("{flags:?}: {right} of {all}, {:?}", symboliser.counters());
    assert_eq!(tally.len(), CALLS.len(), "{:?}", tally.keys());
    for (call, tally) in tally {
        let share = f64::from(tally.right) / f64::from(tally.all);
        assert!(
            share >= 0.99,
            "{flags:?}: {call}: {} of {}: {}",
            tally.right,
            tally.all,
            tally.wrong.unwrap_or_default()
        );
    }
    assert_eq!(all, 1008);
    assert_eq!(symboliser.counters(), plumb::symbolise::Counters::default());
}

#[test]
fn c_with_frame_pointers() {
    check(&["-g", "-O0"], true, false);
    check(&["-g", "-O2", "-fno-omit-frame-pointer"], true, false);
}

#[test]
fn c_without_frame_pointers() {
    check(&["-g", "-O2", "-fomit-frame-pointer"], true, false);
    check(&["-g", "-O0", "-fomit-frame-pointer"], true, false);
}

#[test]
fn c_without_debug_information() {
    check(&["-O2"], false, false);
}

#[test]
fn static_c() {
    check(&["-g", "-O2", "-static"], true, true);
}

//! C, with and without what helps an unwinder, C++ and Rust.

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
        // The function of libc that makes the syscall; only exported ones have a name.
        let first = frames[0].lines.last().map(|line| plain(&line.function));
        let first_is_right = match (call, first) {
            (_, None) => matches!(call, "fopen" | "pthread_create"),
            ("fopen", Some(first)) => first == "open",
            ("pthread_create", Some(first)) => first == "clone3",
            (call, Some(first)) => first == call,
        };
        let origin = origin_frame(&frames).map(|(frame, line)| frames[frame].lines[line].function.clone());
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
    // What a stalled host loses is in the hundredth part.
    let counters = symboliser.counters();
    assert_eq!(counters, plumb::symbolise::Counters { timeouts: counters.timeouts, ..Default::default() });
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

/// What was found of one call: how often it was right, of how many, and what else it was.
type Found = BTreeMap<i64, (u32, u32, String)>;

fn assert_named(found: &Found, phases: usize, samples: u32) {
    assert_eq!(found.len(), phases);
    assert_eq!(found.values().map(|(_, all, _)| all).sum::<u32>(), samples);
    for (phase, (right, all, wrong)) in found {
        assert!(right * 100 >= all * 99, "{phase}: {right} of {all}: {wrong}");
    }
}

#[test]
fn cpp_through_a_shared_library() {
    let dir = TempDir::new();
    let (library, program) = (dir.join("libpool.so"), dir.join("pool"));
    compile("g++", &["-g", "-O2", "-shared", "-fPIC"], &source("pool.cpp"), &library);
    let search = format!("-Wl,-rpath,{}", dir.0.display());
    let main = source("pool_main.cpp");
    let output = Command::new("g++")
        .args(["-g", "-O2"])
        .arg(&main)
        .args([&library, &search, "-o", &program])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let mut symboliser = symboliser();
    let mut found = Found::new();
    sampler::run(Command::new(&program).arg("500"), &mut |process, sample| {
        let stack = symboliser.unwind(process, std::slice::from_ref(&sample.raw)).remove(0);
        let frames = symboliser.symbolise(&stack);
        let place =
            |function: &str, file: &str, mark| (function.to_owned(), file.to_owned(), marked(file, mark));
        let in_library = match sample.phase {
            0 => vec![
                place("pool::Pool<int>::acquire(char const*)", "pool.cpp", "acquire"),
                place("get(char const*)", "pool.cpp", "get"),
            ],
            _ => vec![place("stream(char const*)", "pool.cpp", "stream")],
        };
        let in_main = place(
            "main",
            "pool_main.cpp",
            ["call get", "call stream"][usize::try_from(sample.phase).unwrap()],
        );
        let mut of_library = own(&frames, "libpool.so");
        // What libstdc++ has in its headers was inlined.
        of_library.retain(|(_, file, _)| file == "pool.cpp");
        let origin = origin_frame(&frames).map(|(frame, line)| frames[frame].lines[line].function.clone());
        let is_right = of_library == in_library
            && own(&frames, "pool").contains(&in_main)
            && origin.as_ref() == Some(&in_library[0].0)
            && stack.complete;
        count(&mut found, sample.phase, is_right, || format!("{in_library:?} {origin:?} {}", brief(&frames)));
    });
    assert_named(&found, 2, 1000);
}

#[test]
fn rust() {
    const ORDER: [&str; 8] =
        ["open", "socket", "accept", "pipe", "dup", "eventfd", "epoll_create", "pthread_create"];
    let dir = TempDir::new();
    let program = dir.join("calls");
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    compile(
        &rustc,
        &["--edition", "2024", "-O", "-C", "debuginfo=line-tables-only"],
        &source("calls.rs"),
        &program,
    );
    let mut symboliser = symboliser();
    let mut found = Found::new();
    sampler::run(Command::new(&program).arg("125"), &mut |process, sample| {
        let stack = symboliser.unwind(process, std::slice::from_ref(&sample.raw)).remove(0);
        let frames = symboliser.symbolise(&stack);
        let call = ORDER[usize::try_from(sample.phase).unwrap()];
        let function = if call == "pthread_create" {
            "calls::call_thread".into()
        } else {
            format!("calls::call_{call}")
        };
        let expected = (function, "calls.rs".to_owned(), marked("calls.rs", call));
        let mut of_program = own(&frames, "calls");
        of_program.retain(|(_, file, _)| file == "calls.rs");
        let names: Vec<_> = of_program.iter().map(|(function, ..)| function.as_str()).collect();
        let origin = origin_frame(&frames);
        let is_right = of_program.first() == Some(&expected)
            && names[1..] == ["calls::once", "calls::main"]
            && origin.is_some_and(|(frame, line)| frames[frame].lines[line].function == expected.0)
            && stack.complete;
        count(&mut found, sample.phase, is_right, || format!("{expected:?} {origin:?} {}", brief(&frames)));
    });
    assert_named(&found, ORDER.len(), 1000);
}

fn count(found: &mut Found, phase: i64, is_right: bool, wrong: impl FnOnce() -> String) {
    let (right, all, first) = found.entry(phase).or_default();
    *all += 1;
    *right += u32::from(is_right);
    if !is_right && first.is_empty() {
        *first = wrong();
    }
}

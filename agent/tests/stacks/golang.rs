//! Go, also stripped, position-independent, and linked with C.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use plumb::symbolise::{How, origin_frame};

use crate::{
    sampler,
    sources::{brief, marked, source, symboliser},
    support::TempDir,
};

const CALLS: [(&str, &str); 7] = [
    ("open", "main.callOpen"),
    ("socket", "main.callSocket"),
    ("accept", "main.callAccept"),
    ("pipe", "main.callPipe"),
    ("dup", "main.callDup"),
    ("eventfd", "main.callEventfd"),
    ("epoll_create", "main.callEpollCreate"),
];

/// Where `cargo xtask test` has put the compiler.
fn go() -> PathBuf {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools");
    let mut found = fs::read_dir(&tools).unwrap().map(|entry| entry.unwrap().path().join("go/bin/go"));
    found.find(|go| go.exists()).expect("`cargo xtask test` fetches Go into target/tools")
}

pub(crate) fn build(dir: &TempDir, files: &[&str], cgo: bool, arguments: &[&str]) -> String {
    for file in files {
        fs::copy(source(file), dir.0.join(file)).unwrap();
    }
    fs::write(dir.0.join("go.mod"), "module example.org/calls\n\ngo 1.20\n").unwrap();
    let cache = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/go-cache");
    let output = Command::new(go())
        .current_dir(&dir.0)
        .env("GOCACHE", cache)
        .env("GOTOOLCHAIN", "local")
        .env("GOFLAGS", "-buildvcs=false")
        .env("GOPROXY", "off")
        .env("CGO_ENABLED", if cgo { "1" } else { "0" })
        .args(["build", "-o", "program"])
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    dir.join("program")
}

fn check(program: &str) {
    let mut symboliser = symboliser();
    let (mut right, mut all, mut wrong) = (0, 0, String::new());
    sampler::run(Command::new(program).arg("143"), &mut |process, sample| {
        let stack = symboliser.unwind(process, std::slice::from_ref(&sample.raw)).remove(0);
        let frames = symboliser.symbolise(&stack);
        let (call, function) = CALLS[usize::try_from(sample.phase).unwrap()];
        let mut expected =
            vec![(function, marked("calls.go", call)), ("main.once", marked("calls.go", "once"))];
        expected.push(("main.main", marked("calls.go", "main")));
        if call == "dup" {
            expected.insert(0, ("main.inlined", marked("calls.go", "inlined")));
        }
        let lines = frames.iter().flat_map(|frame| frame.lines.iter());
        let found: Vec<_> = lines
            .filter(|line| line.file.as_deref().is_some_and(|file| file.ends_with("/calls.go")))
            .map(|line| (line.function.as_str(), line.line.unwrap()))
            .collect();
        let names = frames.iter().map(|frame| frame.lines.last().map(|line| line.function.as_str()));
        let outermost: Vec<_> = names.rev().take(2).collect();
        let origin = origin_frame(&frames).map(|(frame, line)| frames[frame].lines[line].function.as_str());
        all += 1;
        if found == expected
            && outermost == [Some("runtime.goexit"), Some("runtime.main")]
            && origin == Some(expected[0].0)
            && frames[1..].iter().all(|frame| frame.how == How::Go)
            && stack.complete
        {
            right += 1;
        } else if wrong.is_empty() {
            wrong = format!("expected {expected:?}, origin {origin:?} {}", brief(&frames));
        }
    });
    println!("{program}: {right} of {all}");
    assert_eq!(all, 1001);
    assert!(right * 100 >= all * 99, "{right} of {all}: {wrong}");
}

#[test]
fn go_plain_and_stripped() {
    let dir = TempDir::new();
    check(&build(&dir, &["calls.go"], false, &[]));
    check(&build(&dir, &["calls.go"], false, &["-ldflags=-s -w"]));
}

#[test]
fn go_without_the_names_of_sections() {
    let dir = TempDir::new();
    let program = build(&dir, &["calls.go"], false, &["-ldflags=-s -w"]);
    let mut bytes = fs::read(&program).unwrap();
    // No section headers at all.
    bytes[0x28..0x30].fill(0);
    bytes[0x3c..0x40].fill(0);
    fs::write(&program, bytes).unwrap();
    check(&program);
}

#[test]
fn go_position_independent() {
    let dir = TempDir::new();
    check(&build(&dir, &["calls.go"], false, &["-buildmode=pie", "-ldflags=-s -w"]));
}

#[test]
fn go_linked_with_c() {
    let dir = TempDir::new();
    check(&build(&dir, &["calls.go", "cgo.go"], true, &["-ldflags=-linkmode=external"]));
}

/// The scheduler makes a thread on a stack of its own, so no function of the program is in it.
#[test]
fn go_starts_a_thread() {
    let dir = TempDir::new();
    let program = build(&dir, &["threads.go"], false, &[]);
    let mut symboliser = symboliser();
    let (mut right, mut all, mut wrong) = (0, 0, String::new());
    sampler::run(Command::new(program).arg("50"), &mut |process, sample| {
        let stack = symboliser.unwind(process, std::slice::from_ref(&sample.raw)).remove(0);
        let frames = symboliser.symbolise(&stack);
        let mut names = frames.iter().flat_map(|frame| frame.lines.iter()).map(|line| line.function.as_str());
        if names.next() != Some("runtime.clone") {
            return;
        }
        all += 1;
        if ["runtime.newosproc", "runtime.newm1"].iter().all(|name| names.any(|it| it == *name)) {
            right += 1;
        } else if wrong.is_empty() {
            wrong = brief(&frames);
        }
    });
    println!("{right} of {all}");
    assert!(all >= 20 && right == all, "{right} of {all}: {wrong}");
}

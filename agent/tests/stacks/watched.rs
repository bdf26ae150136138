//! The programs that need more than a C compiler, below `plumb watch --origins`. C and Rust are among the kernel
//! tests.

#[path = "../support/watched.rs"]
mod run;

use std::process::Command;

use self::run::{Made, Own, WAYS, check, made, marked, round_of_c};
use crate::{golang, sources::source, support::TempDir};

fn watch(what: &str, command: impl Fn() -> Command, round: &[Made], own: Own<'_>) {
    assert!(WAYS.map(|via| check(what, &mut command(), via, round, own))[1]);
}

#[test]
fn the_line_of_each_call_in_cpp_through_a_shared_library() {
    let dir = TempDir::new();
    let (library, program) = (dir.join("libcalls.so"), dir.join("program"));
    let library_flags = ["-g", "-O2", "-shared", "-fPIC", "-Dmain=calls_main", "-x", "c++"];
    crate::sources::compile("g++", &library_flags, &source("calls.c"), &library);
    let search = format!("-Wl,-rpath,{}", dir.0.display());
    let mut compiler = Command::new("g++");
    compiler.args(["-g", "-O2"]).arg(source("calls_main.cpp")).args([&library, &search, "-o", &program]);
    let output = compiler.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let start = || {
        let mut command = Command::new(&program);
        command.args(["1000000", "paced"]);
        command
    };
    watch("C++", start, &round_of_c("calls_main"), Own::Source("calls.c"));
}

fn watch_go(what: &str, flags: &[&str]) {
    const SOURCE: &str = include_str!("programs/calls.go");
    let line = |mark| marked(SOURCE, mark);
    let outer = [("main.once", line("once")), ("main.main", line("main"))];
    let by = |call, event, function| made(call, event, &[&[(function, line(call))][..], &outer].concat());
    let dup = [("main.inlined", line("inlined")), ("main.callDup", line("dup"))];
    let round = [
        by("open", "open", "main.callOpen"),
        made("dup of open", "dup", &[&[("main.callOpen", None)][..], &outer].concat()),
        by("socket", "socket", "main.callSocket"),
        made("client", "socket", &[("main.once", None), outer[1]]),
        by("accept", "accept", "main.callAccept"),
        by("pipe", "pipe", "main.callPipe"),
        by("pipe", "pipe", "main.callPipe"),
        made("dup", "dup", &[&dup[..], &outer].concat()),
        by("eventfd", "eventfd", "main.callEventfd"),
        by("epoll_create", "epoll_create", "main.callEpollCreate"),
    ];
    let dir = TempDir::new();
    let program = golang::build(&dir, &["calls.go"], false, flags);
    let start = || {
        let mut command = Command::new(&program);
        command.args(["1000000", "paced"]);
        command
    };
    watch(what, start, &round, Own::Source("calls.go"));
}

#[test]
fn the_line_of_each_call_in_go() {
    watch_go("Go", &[]);
}

#[test]
fn the_line_of_each_call_in_stripped_go() {
    watch_go("stripped Go", &["-ldflags=-s -w"]);
}

/// The interpreter without a perf map: a function of libc below those of CPython.
#[test]
fn the_call_in_python() {
    let by = |call, event, functions: &[&'static str]| {
        let all = functions.iter().chain(&["PyEval_EvalFrameDefault", "Py_RunMain"]);
        made(call, event, &all.map(|function| (*function, None)).collect::<Vec<_>>())
    };
    let round = [
        by("open", "open", &["open"]),
        by("socket", "socket", &["socket"]),
        by("client", "socket", &["socket"]),
        by("accept", "accept", &["accept4"]),
        by("pipe", "pipe", &["pipe2"]),
        by("pipe", "pipe", &["pipe2"]),
        by("dup", "fcntl", &["fcntl"]),
        by("eventfd", "eventfd", &["eventfd"]),
        by("epoll_create", "epoll_create", &["epoll_create1"]),
        by("pthread_create", "thread", &["pthread_create", "PyThread_start_new_thread"]),
    ];
    let start = || {
        let mut command = Command::new("/usr/bin/python3");
        command.arg("-B").arg(source("calls.py"));
        command
    };
    watch("Python", start, &round, Own::Any);
}

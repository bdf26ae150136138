//! The programs that no virtual machine takes along, below `plumb watch --origins`. The others are among the kernel
//! tests.

#[path = "../support/watched.rs"]
mod run;

use std::process::Command;

use self::run::{Made, Own, WAYS, check, made, marked, round_of_c};
use crate::{golang, sources::source, support::TempDir};

fn watch(what: &str, command: impl Fn() -> Command, round: &[Made], own: Own<'_>) {
    assert!(WAYS.map(|via| check(what, &mut command(), via, round, own))[1]);
}

fn watch_c(flags: &[&str], own: Own<'_>) {
    let dir = TempDir::new();
    let program = dir.join("program");
    crate::sources::compile("gcc", flags, &source("calls.c"), &program);
    watch(&flags.join(" "), || paced(&program), &round_of_c("main"), own);
}

/// It waits for its orders.
fn paced(program: &str) -> Command {
    let mut command = Command::new(program);
    command.args(["1000000", "paced"]);
    command
}

#[test]
fn the_line_of_each_call_in_c_with_frame_pointers() {
    watch_c(&["-g", "-O2", "-fno-omit-frame-pointer"], Own::Source("calls.c"));
}

#[test]
fn the_function_of_each_call_in_c_without_debug_information() {
    watch_c(&["-O2"], Own::Program("program"));
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
    watch("C++", || paced(&program), &round_of_c("calls_main"), Own::Source("calls.c"));
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
    watch(what, || paced(&program), &round, Own::Source("calls.go"));
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

//! The line of code that made each fd and thread, from the kernel programs to the words of `plumb watch --origins`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

#[path = "../support/watched.rs"]
mod watched;

use self::watched::{Made, Own, WAYS, check, made, marked, round_of_c};
use crate::{
    support::{TempDir, Workload},
    variants,
};

/// A program that was built for this: on the host by the test itself.
fn c_program(name: &str, dir: &TempDir) -> PathBuf {
    if std::env::var_os("PLUMB_WORKLOAD").is_some() {
        return Workload::example(name);
    }
    let flags = variants::C_PROGRAMS.iter().find(|(known, _)| *known == name).unwrap().1;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stacks/programs/calls.c");
    let program = dir.0.join(name);
    let output = Command::new("gcc").args(flags).arg(source).arg("-o").arg(&program).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    program
}

/// Both ways; there is a sys_exit everywhere.
fn watch(name: &str, program: &Path, round: &[Made], own: Own<'_>) {
    let run = |via| check(name, Command::new(program).args(["1000000", "paced"]), via, round, own);
    assert!(WAYS.map(run)[1]);
}

fn watch_c(name: &str) {
    let dir = TempDir::new();
    watch(name, &c_program(name, &dir), &round_of_c("main"), Own::Source("calls.c"));
}

#[test]
fn the_line_of_each_call_in_c_without_frame_pointers() {
    watch_c("calls-omit");
}

#[test]
fn the_line_of_each_call_in_static_c() {
    watch_c("calls-static");
}

#[test]
fn the_line_of_each_call_in_rust() {
    const SOURCE: &str = include_str!("../stacks/programs/calls.rs");
    let line = |mark| marked(SOURCE, mark);
    let outer = |first| [first, ("calls::once", None), ("calls::main", None)];
    let by = |call, event, function| made(call, event, &outer((function, line(call))));
    let round = [
        by("open", "open", "calls::call_open"),
        by("socket", "socket", "calls::call_socket"),
        made("client", "socket", &outer(("{closure#0}", line("client")))),
        by("accept", "accept", "calls::call_accept"),
        by("pipe", "pipe", "calls::call_pipe"),
        by("pipe", "pipe", "calls::call_pipe"),
        by("dup", "dup", "calls::call_dup"),
        by("eventfd", "eventfd", "calls::call_eventfd"),
        by("epoll_create", "epoll_create", "calls::call_epoll_create"),
        by("pthread_create", "thread", "calls::call_thread"),
    ];
    watch("calls", &Workload::example("calls"), &round, Own::Source("calls.rs"));
}

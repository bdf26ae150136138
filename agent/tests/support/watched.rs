//! Programs that make fds and threads below `plumb watch --origins`: what each event's stack says, against the
//! sources. Which call an event is of is told by the order of the calls, never by its stack.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    process::{Command, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant},
};

use serde::Deserialize;
use serde_json::Value;

pub(crate) use crate::support::marked;
use crate::support::{Running, plumb};

/// How often each call is made.
const ROUNDS: usize = 100;
/// Rounds at a time: the ring has room for the stacks of about so many.
const BATCH: usize = 4;
const PATIENCE: Duration = Duration::from_secs(30);
/// Every way of attaching.
pub(crate) const WAYS: [&str; 2] = ["functions", "sys_exit"];

/// A fd or a thread that each round makes.
#[derive(Clone, Debug)]
pub(crate) struct Made {
    pub(crate) call: &'static str,
    /// How the name of the system call begins, or `thread`.
    event: &'static str,
    /// Functions, the innermost first, and their lines as far as the source has a mark.
    stack: Vec<(&'static str, Option<u32>)>,
}

pub(crate) fn made(call: &'static str, event: &'static str, stack: &[(&'static str, Option<u32>)]) -> Made {
    Made { call, event, stack: stack.to_vec() }
}

/// Which functions of a stack are compared.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Own<'a> {
    /// Those in this source file, each by name and line: the innermost of them are the expected ones.
    Source(&'a str),
    /// Those in this program, by name.
    Program(&'a str),
    /// All, and between the expected ones there are others.
    Any,
}

#[derive(Debug, Deserialize)]
struct Function {
    function: Option<String>,
    file: Option<String>,
    line: Option<u32>,
    module: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Event {
    event: String,
    #[serde(default)]
    syscall: String,
    #[serde(default)]
    stack: Vec<Function>,
}

#[derive(Debug, Default)]
struct Tally {
    right: usize,
    all: usize,
    wrong: Option<String>,
}

fn base(path: Option<&str>) -> &str {
    path.and_then(|path| path.rsplit('/').next()).unwrap_or_default()
}

impl Function {
    fn is_own(&self, own: Own<'_>) -> bool {
        match own {
            Own::Source(file) => base(self.file.as_deref()) == file,
            Own::Program(program) => base(self.module.as_deref()) == program,
            Own::Any => true,
        }
    }

    /// Names come with arguments in C++, with a crate or package in Rust and Go, and of libc with its prefixes.
    fn is(&self, (name, line): (&str, Option<u32>)) -> bool {
        let found = self.function.as_deref().unwrap_or_default();
        let plain = found.split('(').next().unwrap_or_default().trim_start_matches('_');
        let plain = plain.strip_suffix("64").unwrap_or(plain);
        let is_qualified = plain.strip_suffix(name).is_some_and(|outer| outer.ends_with("::"));
        (found == name || plain == name || is_qualified) && (line.is_none() || self.line == line)
    }
}

fn is_right(stack: &[Function], expected: &Made, own: Own<'_>) -> bool {
    let mut of_program = stack.iter().filter(|function| function.is_own(own));
    match own {
        Own::Any => expected.stack.iter().all(|wanted| of_program.any(|function| function.is(*wanted))),
        Own::Program(_) => expected
            .stack
            .iter()
            .all(|(name, _)| of_program.next().is_some_and(|function| function.is((name, None)))),
        Own::Source(_) => {
            expected.stack.iter().all(|wanted| of_program.next().is_some_and(|function| function.is(*wanted)))
        }
    }
}

/// Watches rounds of a program that waits for a byte on stdin before each. `via` is a way of attaching. False where
/// that is not to be had, which is no fault of the host's functions.
pub(crate) fn check(what: &str, program: &mut Command, via: &str, round: &[Made], own: Own<'_>) -> bool {
    let mut child = Running(program.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap());
    wait_until_it_reads(child.pid());
    let mut watch = plumb();
    watch.args(["watch", "--origins", "-o", "jsonl", "--via", via, "--pid", &child.pid().to_string()]);
    let mut watch = Running(watch.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    let mut said = BufReader::new(watch.0.stderr.take().unwrap());
    let mut first = String::new();
    said.read_line(&mut first).unwrap();
    if first != "plumb: watching; ctrl-c ends it\n" {
        let is_known = via == "functions" && std::env::var_os("PLUMB_OWN_KERNEL").is_none();
        assert!(is_known, "{via}: {first}");
        return false;
    }
    let lines = lines_of(BufReader::new(watch.0.stdout.take().unwrap()));
    let mut orders = child.0.stdin.take().unwrap();
    let mut tally: BTreeMap<&str, Tally> = BTreeMap::new();
    for _ in 0..ROUNDS / BATCH {
        orders.write_all(&[b'\n'; BATCH]).unwrap();
        for expected in (0..BATCH).flat_map(|_| round) {
            let event = next_made(&lines, round);
            let event = event.unwrap_or_else(|| panic!("{what} via {via}: no event of {}", expected.call));
            let name = if event.event == "thread" { "thread" } else { &event.syscall };
            assert!(name.starts_with(expected.event), "{what} via {via}: {name} instead of {expected:?}");
            let tally = tally.entry(expected.call).or_default();
            tally.all += 1;
            if is_right(&event.stack, expected, own) {
                tally.right += 1;
            } else {
                tally.wrong.get_or_insert_with(|| format!("{expected:?}: {}", brief(&event.stack)));
            }
        }
    }
    drop(orders);
    assert!(child.0.wait().unwrap().success());
    let last: Value = serde_json::from_str(&lines.iter().last().unwrap()).unwrap();
    let mut losses = String::new();
    said.read_to_string(&mut losses).unwrap();
    let counts: Vec<String> =
        tally.iter().map(|(call, tally)| format!("{call} {}/{}", tally.right, tally.all)).collect();
    println!("{what} via {via}: {}", counts.join(", "));
    for (call, Tally { right, all, wrong }) in tally {
        let wrong = wrong.unwrap_or_default();
        assert!(right * 100 >= all * 99, "{what} via {via}: {call}: {right} of {all}: {wrong} {losses}");
    }
    assert_eq!(
        (&last["fds"], &last["threads"]),
        (&Value::from([0; 0]), &Value::from([0; 0])),
        "nothing is left"
    );
    true
}

/// Whether one of its threads waits in read(0).
fn wait_until_it_reads(pid: u32) {
    let end = Instant::now() + PATIENCE;
    let reads = || {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
        let calls = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("syscall")).ok());
        calls.into_iter().find(|call| call.starts_with("0 0x0 "))
    };
    while reads().is_none() {
        assert!(Instant::now() < end, "{pid} does not wait for orders");
        thread::sleep(Duration::from_millis(10));
    }
}

fn lines_of(stdout: impl BufRead + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || stdout.lines().try_for_each(|line| sender.send(line.unwrap())));
    receiver
}

/// The next fd or, where threads matter, thread that was made; `None` when none comes.
fn next_made(lines: &Receiver<String>, round: &[Made]) -> Option<Event> {
    let has_threads = round.iter().any(|made| made.event == "thread");
    loop {
        let line = lines.recv_timeout(PATIENCE).ok()?;
        let event: Event = serde_json::from_str(&line).ok()?;
        match event.event.as_str() {
            "open" | "replace" => return Some(event),
            "thread" if has_threads => return Some(event),
            _ => {}
        }
    }
}

fn brief(stack: &[Function]) -> String {
    let words = |function: &Function| {
        let name = function.function.as_deref().unwrap_or("?");
        let file = base(function.file.as_deref().or(function.module.as_deref()));
        format!("\n  {name} ({file}:{})", function.line.unwrap_or(0))
    };
    stack.iter().map(words).collect()
}

/// What a round of calls.c makes, whose functions are called by `main`.
pub(crate) fn round_of_c(main: &'static str) -> Vec<Made> {
    const SOURCE: &str = include_str!("../stacks/programs/calls.c");
    let line = |mark| marked(SOURCE, mark);
    let outer = |first| vec![first, ("once", line("once")), (main, line("main"))];
    let by = |call: &'static str, event, function: &'static str| Made {
        call,
        event,
        stack: outer((function, line(call))),
    };
    vec![
        by("open", "open", "call_open"),
        by("fopen", "open", "call_fopen"),
        made("dup of fopen", "dup", &outer(("call_fopen", None))),
        by("socket", "socket", "call_socket"),
        made("client", "socket", &[("once", None), (main, line("main"))]),
        by("accept", "accept", "call_accept"),
        by("pipe", "pipe", "call_pipe"),
        by("pipe", "pipe", "call_pipe"),
        by("dup", "dup", "call_dup"),
        by("eventfd", "eventfd", "call_eventfd"),
        by("epoll_create", "epoll_create", "call_epoll_create"),
        by("pthread_create", "thread", "call_pthread_create"),
    ]
}

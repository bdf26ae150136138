//! The event stream against a program that says what it does.

use std::{
    io::{BufRead, BufReader, Read},
    process::Stdio,
    time::Duration,
};

use serde_json::Value;

use crate::support::{Running, TempDir, Workload, plumb};

/// A running `plumb watch`, listening.
struct Watch {
    child: Running,
}

impl Watch {
    fn start(arguments: &[&str]) -> Self {
        let mut child = plumb()
            .args(["watch", "-o", "jsonl"])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "plumb: watching; ctrl-c ends it\n");
        Self { child: Running(child) }
    }

    /// What it printed until it ended, and its exit code.
    fn end(mut self) -> (Vec<Value>, Option<i32>) {
        let mut text = String::new();
        self.child.0.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        let code = self.child.0.wait().unwrap().code();
        (text.lines().map(|line| serde_json::from_str(line).unwrap()).collect(), code)
    }
}

#[test]
fn origins_of_a_process_that_makes_nothing_have_a_summary() {
    let dir = TempDir::new();
    let idle = Workload::start_program(&Workload::copy(&dir, "idle"), &["hold-threads", "1"]).ready();
    let pid = idle.pid().to_string();
    let output = plumb().args(["watch", "--origins", "--pid", &pid, "--for", "1s"]).output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    for noun in ["fds", "threads"] {
        let line = format!("0 {noun} are left of what was made while pid {pid} was watched");
        assert!(stdout.lines().any(|found| found == line), "{stdout}");
    }
}

/// An fd event in the words of the workload.
fn words(event: &Value) -> Option<String> {
    let (name, syscall, fd) = (event["event"].as_str()?, event["syscall"].as_str()?, event["fd"].as_u64()?);
    let range = match event["fd_last"].as_u64() {
        Some(last) if last != fd => format!("{fd}-{last}"),
        _ => fd.to_string(),
    };
    Some(format!("{name} {syscall} {range}"))
}

#[test]
fn every_followed_call_is_seen_once_and_nothing_else() {
    let by_functions = the_calls_through("functions");
    let by_sys_exit = the_calls_through("sys_exit");
    assert!(by_functions || by_sys_exit, "no way of following fds");
    assert!(by_sys_exit, "there is a sys_exit everywhere");
}

/// Whether that way can be attached here.
fn the_calls_through(via: &str) -> bool {
    let dir = TempDir::new();
    let mut workload = Workload::start_ready(&["fd-calls", &dir.join("")]);
    let arguments = ["--pid", &workload.pid().to_string(), "--via", via];
    if plumb().arg("watch").args(arguments).args(["--for", "0s"]).output().unwrap().status.code() != Some(0) {
        assert!(via == "functions" && std::env::var_os("PLUMB_OWN_KERNEL").is_none());
        return false;
    }
    let watch = Watch::start(&arguments);
    let mut expected = workload.stage();
    assert!(expected.len() > 20, "{expected:?}");
    // A path can be looked up only while the process lives; the stream is at most a moment behind.
    std::thread::sleep(Duration::from_secs(3));
    workload.end();
    let (events, code) = watch.end();
    assert_eq!(code, Some(0), "it ends with the process");
    if via == "functions" {
        // They see what is closed, one by one, and of a range or a replaced fd the file and not the number.
        expected.retain(|line| !line.contains("close_range"));
        let files = |call: &str| {
            let of_call = |event: &&Value| event["event"] == "close" && event["syscall"] == call;
            events.iter().filter(of_call).map(|event| event["target"].as_str().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(files("close_range"), ["fd-calls"; 2]);
        assert_eq!([files("dup2"), files("dup3")], [["fd-calls"], ["fd-calls"]]);
    }
    let seen: Vec<String> = events.iter().filter_map(words).collect();
    assert_eq!(seen, expected, "{via}");
    let exit = events.last().unwrap();
    assert_eq!((&exit["event"], &exit["last_thread"]), (&Value::from("exit"), &Value::from(true)), "{exit}");
    assert!(events.iter().any(|event| event["target"] == dir.join("fd-calls")), "a path is named in full");
    true
}

#[test]
fn threads_processes_and_names_are_seen() {
    let watch = Watch::start(&[]);
    let script = "printf renamed > /proc/self/comm; (exit 7) & wait; sh -c 'kill -9 $$'; exit 3";
    let mut shell = std::process::Command::new("/bin/sh").args(["-c", script]).spawn().unwrap();
    let pid = shell.id();
    assert_eq!(shell.wait().unwrap().code(), Some(3));
    let threads = Workload::start_ready(&["hold-threads", "2"]);
    watch.child.signal(rustix::process::Signal::INT);
    let (events, code) = watch.end();
    assert_eq!(code, Some(130));
    let of = |pid: u32, name: &str| -> Vec<&Value> {
        events.iter().filter(|event| event["pid"] == pid && event["event"] == name).collect()
    };
    assert_eq!(of(pid, "exec").len(), 1);
    assert!(of(pid, "rename").iter().any(|event| event["comm"] == "renamed"), "{:?}", of(pid, "rename"));
    assert_eq!(of(pid, "exit")[0]["exit_code"], 3);
    let children: Vec<u32> =
        of(pid, "fork").iter().map(|event| event["child_pid"].as_u64().unwrap() as u32).collect();
    assert_eq!(children.len(), 2);
    assert_eq!(of(children[0], "exit")[0]["exit_code"], 7);
    assert_eq!(of(children[1], "exit")[0]["signal"], 9);
    assert_eq!(of(threads.pid(), "thread").len(), 2);
}

#[test]
fn it_ends_when_it_was_told_to() {
    assert_eq!(Watch::start(&["--for", "300ms"]).end().1, Some(0));
}

#[test]
fn a_filter_by_name_keeps_others_out() {
    let watch = Watch::start(&["--comm", "workload"]);
    let held = Workload::start_ready(&["hold-threads", "1"]);
    drop(std::fs::File::open("/proc/self/stat").unwrap());
    watch.child.signal(rustix::process::Signal::INT);
    let (events, code) = watch.end();
    assert_eq!(code, Some(130));
    assert!(events.iter().any(|event| event["pid"] == held.pid()));
    assert!(!events.iter().any(|event| event["pid"] == std::process::id()), "{events:?}");
}

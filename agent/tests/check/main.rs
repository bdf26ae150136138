//! `plumb check` of a server: what grows under equal load, and what does not stop when it is told to. The server does
//! what its arguments say (programs/server.c); its source marks the lines that are to blame.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::{
    fs,
    path::Path,
    process::Command,
    sync::LazyLock,
    time::{Duration, Instant},
};

use serde_json::Value;

#[path = "../support/mod.rs"]
mod support;

use support::{TempDir, free_port, marked, plumb};

const SOURCE: &str = include_str!("programs/server.c");

/// The server, built once.
static SERVER: LazyLock<(TempDir, String)> = LazyLock::new(|| {
    let dir = TempDir::new();
    let program = dir.join("server");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/check/programs/server.c");
    let output =
        Command::new("gcc").args(["-g", "-O2", "-pthread", "-o", &program]).arg(source).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (dir, program)
});

/// Runs the server below plumb; PORT in the options is its port. Returns the exit code and the report.
fn check(behaviour: &str, options: &[&str]) -> (i32, Value) {
    let dir = TempDir::new();
    let (path, port) = (dir.join("report.json"), free_port().to_string());
    let options: Vec<String> = options.iter().map(|option| option.replace("PORT", &port)).collect();
    let output = plumb()
        .args(["check", "--ready", &port, "-o", "json", "--report", &path])
        .args(&options)
        .args(["--", &SERVER.1, &port, behaviour])
        .output()
        .unwrap();
    let text = fs::read_to_string(&path);
    let text = text.unwrap_or_else(|_| panic!("{behaviour}: {}", String::from_utf8_lossy(&output.stderr)));
    (output.status.code().unwrap(), serde_json::from_str(&text).unwrap())
}

/// Eight requests.
const REQUESTS: &str = "exec bash -c 'for i in 1 2 3 4 5 6 7 8; do exec 3<>/dev/tcp/127.0.0.1/PORT; \
                        echo x >&3; read -r answer <&3; exec 3>&-; done'";
/// A client that has connected and says nothing.
const HOLD: &str = "exec bash -c 'exec 3<>/dev/tcp/127.0.0.1/PORT; sleep 20'";

fn steady(behaviour: &str) -> (i32, Value) {
    check(behaviour, &["--steady", REQUESTS])
}

fn stop(behaviour: &str) -> (i32, Value) {
    check(behaviour, &["--stop", "TERM", "--within", "2s"])
}

/// Kind, and line of the function.
fn findings(document: &Value) -> Vec<(&str, u64)> {
    let finding = |finding: &'_ Value| -> u64 { finding["function"]["line"].as_u64().unwrap_or(0) };
    let all = document["findings"].as_array().unwrap();
    all.iter().map(|one| (one["kind"].as_str().unwrap(), finding(one))).collect()
}

fn line(mark: &str) -> u64 {
    u64::from(marked(SOURCE, mark).unwrap())
}

#[test]
fn what_each_request_leaks_grows_from_round_to_round() {
    for (behaviour, kind, mark) in [("leak-fd", "fd", "leak_fd"), ("leak-thread", "thread", "leak_thread")] {
        let (code, document) = steady(behaviour);
        assert_eq!((code, findings(&document)), (3, vec![(kind, line(mark))]), "{document}");
        // Eight a round, after two rounds that are not compared.
        assert_eq!(document["findings"][0]["rounds"], Value::from([24, 32, 40, 48, 56]), "{document}");
        assert_eq!(document["findings"][0]["grows"], true);
    }
}

#[test]
fn a_server_that_gives_everything_back_and_one_whose_pool_fills_are_clean() {
    for behaviour in ["good", "warm"] {
        let (code, document) = steady(behaviour);
        assert_eq!((code, findings(&document)), (0, vec![]), "{behaviour}: {document}");
    }
}

#[test]
fn a_server_that_stops_in_time_is_clean_whether_at_once_or_later() {
    for behaviour in ["good", "slow"] {
        let (code, document) = check(behaviour, &["--stop", "TERM", "--within", "20s"]);
        assert_eq!((code, findings(&document)), (0, vec![]), "{behaviour}: {document}");
    }
}

#[test]
fn what_does_not_stop_is_told_with_where_it_is_blocked_and_is_ended() {
    let began = Instant::now();
    let (code, document) = stop("stuck-thread");
    let mut found = findings(&document);
    found.sort_unstable();
    let expected = [("unstopped", line("stuck_worker")), ("unstopped", line("join_worker"))];
    assert_eq!(
        (code, &found[..]),
        (
            3,
            &{
                let mut all = expected;
                all.sort_unstable();
                all
            }[..]
        ),
        "{document}"
    );
    assert!(began.elapsed() < Duration::from_secs(60), "it waits for nothing else");
    let pid = document["findings"][0]["examples"][0]["pid"].as_u64().unwrap();
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "it has been ended");
    let (code, document) = stop("deaf");
    assert_eq!((code, findings(&document)[0].0), (3, "unstopped"), "{document}");
    // Without a word when it is ready it has a second to get there.
    let port = free_port().to_string();
    let stop = ["check", "--stop", "TERM", "--within", "1s", "--", &SERVER.1, &port, "deaf"];
    let output = plumb().args(stop).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(3) && text.contains("did not stop in time"), "{text}");
}

#[test]
fn children_that_outlive_their_server_are_told() {
    let (code, document) = stop("children");
    assert_eq!((code, findings(&document).len()), (3, 1), "{document}");
    assert_eq!(
        (&document["findings"][0]["kind"], &document["findings"][0]["count"]),
        (&Value::from("unstopped"), &Value::from(2))
    );
}

#[test]
fn a_server_that_leaves_its_connections_had_work() {
    let (code, document) = check("keep", &["--stop", "TERM", "--within", "5s", "--load", HOLD]);
    assert_eq!((code, findings(&document)), (3, vec![("in-flight", line("accept"))]), "{document}");
    let (code, document) = check("good", &["--stop", "TERM", "--within", "5s", "--load", HOLD]);
    assert_eq!((code, findings(&document)), (0, vec![]), "{document}");
}

/// Whether there is a process with this argument, but for one that has ended.
fn is_running(argument: &str) -> bool {
    let processes = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let lines = processes.filter_map(|process| fs::read(process.path().join("cmdline")).ok());
    lines.into_iter().any(|line| line.split(|byte| *byte == 0).any(|word| word == argument.as_bytes()))
}

#[test]
fn a_server_that_is_never_ready_or_ends_by_itself_is_an_error_and_not_clean() {
    let refused = |arguments: &[&str]| {
        let output = plumb().arg("check").args(arguments).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let port = free_port().to_string();
    let stop = ["--stop", "TERM", "--ready", &port, "--ready-within", "500ms", "--"];
    let (code, message) = refused(&[&stop[..], &["sleep", "30"]].concat());
    assert!(code == 1 && message.contains("not ready"), "{code} {message}");
    let (code, message) = refused(&[&stop[..], &["true"]].concat());
    assert!(code == 1 && message.contains("before it was ready"), "{code} {message}");
    // A question that gets no answer does not keep anybody waiting either, and nothing goes on.
    let mark = format!("31.{}", std::process::id());
    let hangs =
        ["--stop", "TERM", "--ready", "exec sleep 32", "--ready-within", "500ms", "--", "sleep", &mark];
    let began = Instant::now();
    let (code, message) = refused(&hangs);
    assert!(code == 1 && message.contains("not ready"), "{code} {message}");
    assert!(began.elapsed() < Duration::from_secs(25), "it waited for the script");
    assert!(!is_running(&mark), "the command goes on");
    let (code, message) = refused(&["--steady", "false", "--", "sleep", "30"]);
    assert!(code == 1 && message.contains("the script of the rounds failed"), "{code} {message}");
}

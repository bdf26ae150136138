//! The agent as a whole: from a leak in a program it has never seen to the finding.

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::Value;

use crate::support::{Agent, Running, TempDir, Workload, plumb};

/// From the first leaked fd or thread to the finding.
const VERDICT: Duration = Duration::from_secs(150);

/// How often the kernel did not run a program, since it had interrupted it on the same CPU.
const NOT_RUN: &str = r#"plumb_events_lost_total{source="any",cause="not_run"}"#;

/// An emulated processor may take longer for debug information than the worker has: then there are symbols, and a function
/// has the name of the one it was inlined into.
fn may_be_without_lines() -> bool {
    std::env::var_os("PLUMB_OWN_KERNEL").is_some()
}

/// That an origin is the function of the workload and the line with these words.
fn assert_made_in(origin: &Value, function: &str, words: &str) {
    let source = include_str!("../../examples/workload.rs");
    let line = 1 + source.lines().position(|line| line.contains(words)).unwrap();
    let found = &origin["function"];
    let name = found["function"].as_str().unwrap_or_else(|| panic!("no function: {origin}"));
    if may_be_without_lines() && found["file"].is_null() {
        assert!(name.ends_with(function) || name.ends_with("workload::main"), "{origin}");
        return;
    }
    assert!(name.ends_with(function) && found["file"].as_str().unwrap().ends_with("workload.rs"), "{origin}");
    assert_eq!(found["line"], line, "{origin}");
}

#[test]
fn a_leak_of_fds_and_one_of_threads_are_found_named_and_exported() {
    let agent = Agent::start(&["--log-format", "json"]);
    let dir = TempDir::new();
    let path = dir.join("leaked.log");
    fs::write(&path, "x").unwrap();
    let program = Workload::copy(&dir, "leaky-app");
    let files = Workload::start_program(&program, &["leak-fds", &path]);
    let threads = Workload::start_program(&program, &["leak-threads"]);
    let began = Instant::now();

    let finding = agent.wait_leaking(files.pid(), "fd", VERDICT);
    let growth = finding["growth_per_minute"].as_f64().unwrap();
    assert!((50.0..=66.0).contains(&growth), "{finding}");
    assert_eq!((&finding["comm"], &finding["group"]), (&"leaky-app".into(), &"leaky-app".into()));
    assert_eq!(finding["examples"][0]["what"], path.as_str(), "{finding}");
    assert!(finding["live"].as_u64() > finding["baseline"].as_u64(), "{finding}");
    // Since it is suspect each new fd has an origin.
    let origin = &finding["origins"][0];
    assert_eq!(origin["syscall"], "openat", "{finding}");
    assert!((10..150).contains(&origin["live"].as_u64().unwrap()), "{finding}");
    assert_made_in(origin, "leak_fds", "let _leaked = File::open(path)");
    // Each has a stack, but for those whose event a preemptible kernel has skipped: a listing found them.
    let others = &finding["origins"].as_array().unwrap()[1..];
    assert!(others.iter().all(|origin| origin["syscall"] == "other"), "{finding}");
    let others: u64 = others.iter().map(|origin| origin["live"].as_u64().unwrap()).sum();
    assert!(others as f64 <= agent.metric(NOT_RUN), "{finding}");
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap();
    let exact = (limit - finding["live"].as_u64().unwrap()) as f64;
    let seconds = finding["seconds_to_exhaustion"].as_f64().unwrap();
    assert!((seconds - exact).abs() < exact * 0.2, "{finding}: {exact} s left at one per second");

    let finding = agent.wait_leaking(threads.pid(), "thread", VERDICT.saturating_sub(began.elapsed()));
    let growth = finding["growth_per_minute"].as_f64().unwrap();
    assert!((50.0..=66.0).contains(&growth), "{finding}");
    assert_eq!(finding["examples"][0]["what"], "leaky", "{finding}");
    assert_made_in(&finding["origins"][0], "leak_threads", r#".name("leaky""#);

    // Told once each.
    let log: Vec<Value> = agent.log().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let ours = |line: &&Value| line["message"] == "leaking" && line["comm"] == "leaky-app";
    let mut told: Vec<u64> = log.iter().filter(ours).map(|line| line["pid"].as_u64().unwrap()).collect();
    told.sort_unstable();
    let mut expected = [u64::from(files.pid()), u64::from(threads.pid())];
    expected.sort_unstable();
    assert_eq!(told, expected, "{}", agent.log());
    let counted = |line: &Value| line["examples"].as_str().is_some_and(|text| text.ends_with("x)"));
    assert!(log.iter().filter(ours).all(counted), "{}", agent.log());
    let page = agent.get("/metrics").unwrap().1;
    for resource in ["fd", "thread"] {
        let series = format!(
            "plumb_leak_findings{{group=\"leaky-app\",resource=\"{resource}\",state=\"leaking\"}} 1\n"
        );
        assert!(page.contains(&series), "{series} is not in\n{page}");
    }

    // What somebody says about a finding is shown at once.
    let id = finding["id"].as_str().unwrap();
    let say = |arguments: &[&str]| {
        let mut command = plumb();
        command.args(["leaks"]).args(arguments).args(["--run-dir", &agent.run_dir()]);
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let shown = || agent.leaks().into_iter().find(|finding| finding["id"] == id).unwrap();
    let (status, line) = say(&["ack", id, "--reason", "being fixed"]);
    assert!(status == Some(0) && line.starts_with(&format!("plumb: {id} is acknowledged")), "{line}");
    assert_eq!(shown()["acknowledged"]["reason"], "being fixed");
    let (status, line) = say(&["silence", id, "--for", "2h"]);
    assert!(status == Some(0) && line.starts_with(&format!("plumb: {id} is not told before 2")), "{line}");
    assert!(shown()["silenced_until"].is_string());
    assert_eq!(say(&["unsilence", id]), (Some(0), format!("plumb: the silence of {id} has ended\n")));
    let not_silenced = format!("plumb: {id} is not silenced; there is nothing to end\n");
    assert_eq!(say(&["unsilence", id]), (Some(1), not_silenced));
    assert!(shown()["silenced_until"].is_null());
    let unknown = "plumb: no finding has the id fd-1-2; `plumb leaks` lists the ids\n";
    assert_eq!(say(&["ack", "fd-1-2"]), (Some(1), unknown.to_owned()));

    // A process that is gone leaves no series, and for a while two findings that say so.
    drop((files, threads));
    let end = Instant::now() + Duration::from_secs(60);
    while agent.get("/metrics").unwrap().1.contains("leaky-app") {
        assert!(Instant::now() < end, "{}", agent.get("/metrics").unwrap().1);
        thread::sleep(Duration::from_millis(200));
    }
    let left = agent.leaks().into_iter().filter(|finding| finding["comm"] == "leaky-app");
    let why: Vec<Value> = left.map(|finding| finding["resolved"]["why"].clone()).collect();
    assert_eq!(why, ["process-ended", "process-ended"]);
}

#[test]
fn a_leak_outlives_the_agent_that_found_it() {
    let mut agent = Agent::start(&[]);
    let dir = TempDir::new();
    let path = dir.join("leaked.log");
    fs::write(&path, "x").unwrap();
    let leaky = Workload::start_program(&Workload::copy(&dir, "long-leak"), &["leak-fds", &path]);
    let mut found = agent.wait_leaking(leaky.pid(), "fd", VERDICT);
    // An emulated machine takes its time to name a stack.
    let deadline = Instant::now() + Duration::from_secs(60);
    let is_named = |found: &Value| {
        let origins = found["origins"].to_string();
        origins.contains("leak_fds") || may_be_without_lines() && origins.contains("workload::main")
    };
    while !is_named(&found) {
        assert!(Instant::now() < deadline, "{found}");
        thread::sleep(Duration::from_millis(500));
        found = agent.wait_leaking(leaky.pid(), "fd", VERDICT);
    }
    agent.child.signal(Signal::TERM);
    assert_eq!(agent.child.0.wait().unwrap().code(), Some(0), "{}", agent.log());

    let log = fs::File::create(dir.join("log")).unwrap();
    let (run_dir, state_dir) = (agent.run_dir(), agent.dir.join("state"));
    let arguments = ["agent", "--listen", "127.0.0.1:0", "--run-dir", &run_dir, "--state-dir", &state_dir];
    let _next = Running(plumb().args(arguments).stderr(log).spawn().unwrap());
    let deadline = Instant::now() + Duration::from_secs(60);
    while agent.get_control("/v1/leaks").is_none_or(|(_, body)| !body.contains("long-leak")) {
        assert!(Instant::now() < deadline, "{}", fs::read_to_string(dir.join("log")).unwrap());
        thread::sleep(Duration::from_millis(100));
    }
    let again = agent.wait_leaking(leaky.pid(), "fd", Duration::from_secs(60));
    for same in ["id", "baseline"] {
        assert_eq!(again[same], found[same], "{same}");
    }
    let earlier = &again["origin_before_restart"]["words"];
    assert!(earlier.as_str().is_some_and(|words| words.contains("workload")), "{again}");
    let log = fs::read_to_string(dir.join("log")).unwrap();
    assert!(!log.contains("leaks fds"), "it was told already: {log}");
}

#[test]
fn the_table_follows_events_without_drift() {
    let agent = Agent::start(&[]);
    let dir = TempDir::new();
    let program = Workload::copy(&dir, "holder");
    let start = |_| Workload::start_program(&program, &["hold-threads", "20"]).ready();
    let mut held: Vec<Workload> = (0..10).map(start).collect();
    thread::sleep(Duration::from_millis(2500));
    held.truncate(5);
    // On a slow machine there are up to 4 s between passes, which make the page.
    agent.wait_metric("plumb_group_processes{group=\"holder\"}", |processes| processes == 5.0);
    agent.wait_metric("plumb_group_threads{group=\"holder\"}", |threads| threads == 105.0);
    let page = agent.get("/metrics").unwrap().1;
    for line in [
        "plumb_events_lost_total{source=\"clone\",cause=\"ring_full\"} 0",
        "plumb_worker_state{worker=\"observer\",state=\"running\"} 1",
    ] {
        assert!(page.lines().any(|found| found == line), "{line} is not in\n{page}");
    }
    let number = |name: &str| -> u64 {
        let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} is not in\n{page}")).parse().unwrap()
    };
    assert!(number("plumb_events_seen_total{source=\"clone\"}") >= 210, "{page}");
    // What a preemptible kernel has skipped a pass finds.
    let skipped = number(NOT_RUN);
    let drift = ["clone_missed", "exit_missed", "threads"];
    let drift = drift.map(|cause| number(&format!("plumb_drift_total{{cause=\"{cause}\"}}")));
    assert!(drift.iter().sum::<u64>() <= skipped, "{page}");
}

#[test]
fn it_ends_cleanly_on_either_signal_and_leaves_nothing_attached() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut agent = Agent::start(&[]);
        assert_eq!(agent.get_control("/v1/leaks").unwrap().0, 200);
        let programs = bpf_programs(agent.child.pid());
        assert!(!programs.is_empty() && programs.is_subset(&loaded_programs()), "{programs:?}");
        agent.child.signal(signal);
        assert_eq!(agent.child.0.wait().unwrap().code(), Some(0), "{}", agent.log());
        assert!(!fs::exists(agent.dir.0.join("run/plumb.sock")).unwrap());
        assert!(agent.log().contains("stops"), "{}", agent.log());
        // The kernel frees a program somewhat later than the last fd that holds it.
        let deadline = Instant::now() + Duration::from_secs(10);
        while !programs.is_disjoint(&loaded_programs()) {
            assert!(Instant::now() < deadline, "of {programs:?} some are still loaded");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Ids of the BPF programs that a process holds, by themselves or through a link.
fn bpf_programs(pid: u32) -> BTreeSet<u32> {
    let infos = fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
    // Other fds come and go meanwhile.
    let infos = infos.filter_map(|info| fs::read_to_string(info.unwrap().path()).ok());
    infos
        .filter_map(|info| info.lines().find_map(|line| line.strip_prefix("prog_id:")?.trim().parse().ok()))
        .collect()
}

/// Ids of all programs in the kernel but those that end just now.
fn loaded_programs() -> BTreeSet<u32> {
    aya::programs::loaded_programs().filter_map(Result::ok).map(|program| program.id()).collect()
}

/// A client that never ends the head of its request.
fn half_sent(agent: &Agent) -> TcpStream {
    let mut client = TcpStream::connect(&agent.address).unwrap();
    client.write_all(b"GET /metrics HTTP/1.1\r\nHost: plumb\r\nX-Slow: ").unwrap();
    client
}

#[test]
fn idle_clients_neither_take_its_fds_nor_keep_others_out() {
    let agent = Agent::start(&[]);
    let fds = || fs::read_dir(format!("/proc/{}/fd", agent.child.pid())).unwrap().count();
    let before = fds();
    let began = Instant::now();
    let _slow = half_sent(&agent);
    let _idle: Vec<_> = (0..100).map(|_| TcpStream::connect(&agent.address).unwrap()).collect();
    // The control socket has places of its own.
    assert_eq!(agent.get_control("/v1/leaks").unwrap().0, 200);
    let taken = fds();
    // 64 places, and a few files that it reads for a moment.
    assert!(taken <= before + 64 + 6, "{before} fds, then {taken}");
    assert_eq!(agent.get("/metrics").unwrap().0, 200);
    let waited = began.elapsed();
    assert!(waited < Duration::from_secs(30), "{waited:?}: 5 s are granted for the head of a request");
}

#[test]
fn a_half_sent_request_does_not_spoil_a_clean_end() {
    let mut agent = Agent::start(&[]);
    let _slow = half_sent(&agent);
    thread::sleep(Duration::from_millis(300));
    agent.child.signal(Signal::TERM);
    assert_eq!(agent.child.0.wait().unwrap().code(), Some(0), "{}", agent.log());
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let mut agent = Agent::start(&[]);
    // A request that never ends holds the graceful stop up for a second.
    let _slow = half_sent(&agent);
    thread::sleep(Duration::from_millis(300));
    // Two different ones: of two equal ones the kernel may deliver one.
    agent.child.signal(Signal::TERM);
    agent.child.signal(Signal::INT);
    assert_eq!(agent.child.0.wait().unwrap().code(), Some(130), "{}", agent.log());
}

#[test]
fn a_state_folder_is_of_one_agent() {
    let agent = Agent::start(&[]);
    let (dir, state_dir) = (TempDir::new(), agent.dir.join("state"));
    let arguments =
        ["agent", "--listen", "127.0.0.1:0", "--run-dir", &dir.join("run"), "--state-dir", &state_dir];
    let second = plumb().args(arguments).output().unwrap();
    let expected = format!(
        "plumb: another agent (pid {}) keeps its findings in {state_dir}; name another folder with --state-dir, or stop \
         it first\n",
        agent.child.pid()
    );
    let stderr = String::from_utf8(second.stderr).unwrap();
    assert_eq!((second.status.code(), stderr.ends_with(&expected)), (Some(1), true), "{stderr}");
    assert!(!fs::exists(dir.join("run/plumb.sock")).unwrap());
    assert_eq!(agent.get_control("/v1/leaks").unwrap().0, 200);
}

#[test]
fn a_second_agent_is_refused_and_the_first_goes_on() {
    let mut agent = Agent::start(&[]);
    let second =
        plumb().args(["agent", "--listen", "127.0.0.1:0", "--run-dir", &agent.run_dir()]).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    let expected = format!(
        "plumb: another agent is running (pid {}); use that one, stop it first, or name another folder \
         with --run-dir\n",
        agent.child.pid()
    );
    assert_eq!(String::from_utf8(second.stderr).unwrap(), expected);
    assert_eq!(agent.get_control("/v1/leaks").unwrap().0, 200);
    // One that was killed leaves its lock to the next, which answers in its place.
    let run_dir = agent.run_dir();
    agent.child.signal(Signal::KILL);
    let state_dir = agent.dir.join("state");
    let arguments = ["agent", "--listen", "127.0.0.1:0", "--run-dir", &run_dir, "--state-dir", &state_dir];
    let child = plumb().args(arguments).spawn().unwrap();
    agent.child.0.wait().unwrap();
    let mut next = Running(child);
    let deadline = Instant::now() + Duration::from_secs(120);
    while agent.get_control("/v1/leaks").is_none_or(|(status, _)| status != 200) {
        let ended = next.0.try_wait().unwrap();
        assert!(ended.is_none() && Instant::now() < deadline, "no answer: {ended:?}");
        thread::sleep(Duration::from_millis(50));
    }
}

//! Bad input and bad surroundings: one line with cause and remedy, the right exit code, nothing left
//! behind. As root, on the host's kernel.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "../support/mod.rs"]
mod support;

use std::{
    fs,
    net::TcpListener,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use support::{Agent, Running, TempDir, copy_program, plumb, plumb_ok};

/// Asserts the exit code and that stderr is the one expected line.
fn assert_failure(output: &Output, code: i32, line: &str) {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!((output.status.code(), stderr.as_str()), (Some(code), format!("{line}\n").as_str()));
    assert!(output.stdout.is_empty());
}

/// `plumb agent` with a run folder and port of its own.
fn agent(dir: &TempDir, arguments: &[&str]) -> Command {
    let mut command = plumb();
    command.args(["agent", "--listen", "127.0.0.1:0", "--run-dir", &dir.join("run")]);
    command.args(["--state-dir", &dir.join("state")]).args(arguments);
    command
}

const NO_PRIVILEGE: &str = "plumb: missing capability: plumb needs CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN; \
                            run it with sudo, or give the service AmbientCapabilities=CAP_BPF CAP_PERFMON";

#[test]
fn without_root_nothing_is_touched() {
    let dir = TempDir::new();
    let binary = dir.0.join("plumb");
    copy_program(plumb().get_program(), &binary);
    fs::set_permissions(&dir.0, fs::Permissions::from_mode(0o777)).unwrap();
    let run_dir = dir.join("run");
    let agent = ["agent", "--run-dir", &run_dir];
    for arguments in [&["ps"][..], &agent, &["watch"], &["fds", "--pid", "1"], &["threads", "--pid", "1"]] {
        let output = Command::new(&binary).args(arguments).uid(65_534).gid(65_534).output().unwrap();
        assert_failure(&output, 4, NO_PRIVILEGE);
    }
    let output = Command::new(&binary).arg("doctor").uid(65_534).gid(65_534).output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(4));
    assert!(stdout.contains("NO capabilities: missing capability"), "{stdout}");
    assert!(!fs::exists(run_dir).unwrap());
}

#[test]
fn root_without_its_capabilities_is_told_so() {
    let drop_all = ["--bounding-set", "-all", "--inh-caps", "-all", "--"];
    let output =
        Command::new("setpriv").args(drop_all).arg(plumb().get_program()).arg("ps").output().unwrap();
    assert_failure(&output, 4, NO_PRIVILEGE);
}

#[test]
fn two_capabilities_are_enough() {
    let keep = "-all,+bpf,+perfmon";
    let mut setpriv = Command::new("setpriv");
    setpriv.args(["--bounding-set", keep, "--inh-caps", "-all", "--"]).arg(plumb().get_program()).arg("ps");
    let output = setpriv.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_kernel_without_types_is_told_so() {
    let script = "mount -t tmpfs none /sys/kernel/btf && exec \"$0\" \"$@\"";
    let run = |arguments: &[&str]| {
        let program = plumb().get_program().to_owned();
        Command::new("unshare")
            .args(["-m", "sh", "-c", script])
            .arg(program)
            .args(arguments)
            .output()
            .unwrap()
    };
    let line = "plumb: this kernel publishes no types: /sys/kernel/btf/vmlinux: No such file or directory \
                (os error 2); use a kernel from 5.10 on that is built with CONFIG_DEBUG_INFO_BTF=y";
    assert_failure(&run(&["ps"]), 5, line);
    let dir = TempDir::new();
    assert_failure(&run(&["agent", "--listen", "127.0.0.1:0", "--run-dir", &dir.join("run")]), 5, line);
    assert!(!fs::exists(dir.0.join("run/plumb.sock")).unwrap());
    let doctor = run(&["doctor"]);
    let stdout = String::from_utf8(doctor.stdout).unwrap();
    assert_eq!(doctor.status.code(), Some(5), "{stdout}");
    assert!(stdout.contains("NO kernel types (BTF)"), "{stdout}");
}

#[test]
fn a_port_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let dir = TempDir::new();
    let output = plumb()
        .args(["agent", "--listen", &address.to_string(), "--run-dir", &dir.join("run")])
        .args(["--state-dir", &dir.join("state")])
        .output()
        .unwrap();
    let line = format!(
        "plumb: cannot listen on {address}: Address already in use (os error 98); stop what listens there, or \
         choose another address with --listen"
    );
    assert_failure(&output, 1, &line);
    assert!(!fs::exists(dir.0.join("run/plumb.sock")).unwrap());
}

#[test]
fn settings_that_cannot_be_read_or_are_not_known_are_named() {
    let dir = TempDir::new();
    let missing = dir.join("missing.toml");
    let line = format!(
        "plumb: cannot read settings from {missing}: No such file or directory (os error 2); create it, or leave \
         out --config to use the defaults"
    );
    assert_failure(&agent(&dir, &["--config", &missing]).output().unwrap(), 1, &line);

    let folder = dir.join("");
    let output = agent(&dir, &["--config", &folder]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));

    let wrong = dir.join("wrong.toml");
    fs::write(&wrong, "# settings\nlistten = '127.0.0.1:1'\n").unwrap();
    let line = format!(
        "plumb: {wrong}:2: unknown field `listten`, expected one of `listen`, `run_dir`, `state_dir`, `fd_events`, \
         `max_processes`, `log_format`, `drain_on_sigterm`, `detect`, `ignore`, `drain`, `service`; known keys are listen, \
         run_dir, state_dir, fd_events, max_processes, log_format and drain_on_sigterm, and the tables [detect], [[ignore]], \
         [drain] and [[service]], whose keys README.md and docs/drain.md list"
    );
    assert_failure(&agent(&dir, &["--config", &wrong]).output().unwrap(), 1, &line);
    assert!(!fs::exists(dir.0.join("run")).unwrap(), "nothing was created");
}

#[test]
fn a_run_folder_that_cannot_be_made_is_named() {
    let dir = TempDir::new();
    fs::write(dir.0.join("file"), "").unwrap();
    let run_dir = dir.join("file/run");
    let output = plumb().args(["agent", "--listen", "127.0.0.1:0", "--run-dir", &run_dir]).output().unwrap();
    let line = format!(
        "plumb: cannot use the run folder {run_dir}: Not a directory (os error 20); name a writable folder with \
         --run-dir"
    );
    assert_failure(&output, 1, &line);
}

#[test]
fn a_run_folder_that_others_can_write_is_refused() {
    let dir = TempDir::new();
    let run_dir = dir.join("run");
    fs::create_dir(&run_dir).unwrap();
    fs::set_permissions(&run_dir, fs::Permissions::from_mode(0o777)).unwrap();
    let line = format!(
        "plumb: the run folder {run_dir} can be written by others; take that away with chmod, or name another with \
         --run-dir"
    );
    assert_failure(&agent(&dir, &[]).output().unwrap(), 1, &line);
    fs::set_permissions(&run_dir, fs::Permissions::from_mode(0o700)).unwrap();
    std::os::unix::fs::symlink("/etc/hostname", dir.0.join("run/agent.lock")).unwrap();
    let output = agent(&dir, &[]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("Too many levels of symbolic links"));
}

#[test]
fn without_an_agent_leaks_says_how_to_start_one() {
    let dir = TempDir::new();
    let output = plumb().args(["leaks", "--run-dir", &dir.join("run")]).output().unwrap();
    let line = format!(
        "plumb: no agent answers on {}: No such file or directory (os error 2); start one with `plumb agent`, or \
         name its folder with --run-dir",
        dir.join("run/plumb.sock")
    );
    assert_failure(&output, 6, &line);
}

#[test]
fn what_cannot_be_an_id_is_not_asked_for() {
    let output = plumb().args(["leaks", "ack", "fd/../1"]).output().unwrap();
    let line = "plumb: \"fd/../1\" is not an id of a finding; `plumb leaks` lists the ids";
    assert_failure(&output, 1, line);
}

#[test]
fn wrong_usage_is_exit_code_2() {
    for arguments in [
        &["fds"][..],
        &["nonsense"],
        &["ps", "-o", "yaml"],
        &["watch", "--comm", "sixteen-bytes-xx"],
        &["watch", "--sockets", "--comm", "sh"],
        &["watch", "--origins", "--comm", "sh"],
        &["audit", "--pid", "2", "--send", "TERM", "--for", "0s"],
        &["drain", "a b"],
        &["drain", "--last", "--deadline", "5s"],
        &["services", "rm", "a/b"],
        &["services", "add", "a", "--signal", "TERM", "--after", "a b"],
        &["drain", "--all", "--deadline", "5"],
        &["drain", "--all", "--deadline", "0s"],
        &["drain", "--all", "--deadline", "2h"],
        &["services", "add", "a", "--signal", "TERM", "--deadline", "2h"],
        &["leaks", "ack"],
        &["leaks", "silence", "fd-1-2"],
        &["leaks", "silence", "fd-1-2", "--for", "soon"],
        &["leaks", "silence", "fd-1-2", "--for", "0s"],
        &["leaks", "silence", "fd-1-2", "--for", "366days"],
        &["leaks", "silence", "fd-1-2", "--until", "2001-01-31T12:00:00Z"],
        &["leaks", "ack", "fd-1-2", "--reason", " "],
        &["leaks", "silence", "fd-1-2", "--for", "1h", "--until", "2030-01-31T12:00:00Z"],
    ] {
        assert_eq!(plumb().args(arguments).output().unwrap().status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn no_signal_is_sent_to_an_agent_whoever_has_started_it() {
    let agent = Agent::start(&[]);
    let pid = agent.child.0.id().to_string();
    let another = TempDir::new();
    let copy = another.join("plumb");
    copy_program(plumb().get_program(), &copy);
    for program in [plumb().get_program().to_owned(), copy.into()] {
        let output = Command::new(program).args(["audit", "--send", "TERM", "--pid", &pid]).output().unwrap();
        let line = format!(
            "plumb: process {pid} is plumb, which plumb signals for nobody; leave out --send to look at it"
        );
        assert_failure(&output, 1, &line);
    }
}

#[test]
fn help_begins_with_examples_and_every_command_has_one() {
    let help = String::from_utf8(plumb_ok(&["--help"]).stdout).unwrap();
    assert!(help.starts_with("Examples:\n  plumb agent"), "{help}");
    for command in ["agent", "ps", "fds", "threads", "leaks", "watch", "doctor"] {
        assert!(
            help.contains(&format!("plumb {command}")) || help.contains(&format!("\n  {command} ")),
            "{help}"
        );
        plumb_ok(&[command, "--help"]);
    }
}

#[test]
fn flags_come_before_the_environment_and_that_before_the_file() {
    let dir = TempDir::new();
    let file = dir.join("plumb.toml");
    let run_dir = dir.join("from-file");
    fs::write(&file, format!("run_dir = '{run_dir}'\nlisten = 'nonsense'\n")).unwrap();
    let output = plumb().args(["agent", "--config", &file]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains(":2: invalid socket address syntax"));

    fs::write(&file, format!("run_dir = '{run_dir}'\nlisten = '127.0.0.1:1'\nlog_format = 'json'\n"))
        .unwrap();
    let agent = Agent::start(&["--config", &file]);
    // Whoever answers may not have written yet.
    let end = Instant::now() + Duration::from_secs(20);
    while agent.log().is_empty() && Instant::now() < end {
        thread::sleep(Duration::from_millis(20));
    }
    assert!(agent.log().starts_with('{'), "log_format is from the file: {}", agent.log());
    assert!(!fs::exists(run_dir).unwrap(), "run_dir is from the flag");
}

#[test]
fn every_line_of_jsonl_is_a_document_of_its_own() {
    let output = plumb_ok(&["ps", "-o", "jsonl"]);
    let lines = String::from_utf8(output.stdout).unwrap();
    assert!(lines.lines().count() > 3);
    for line in lines.lines() {
        let document: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(document["schema"], "plumb/v1");
        assert!(document["pid"].is_u64() && document["fds"].is_u64(), "{document}");
    }
}

#[test]
fn an_agent_whose_log_nobody_reads_goes_on_and_ends_cleanly() {
    let dir = TempDir::new();
    let mut agent = Running(agent(&dir, &[]).stderr(Stdio::piped()).spawn().unwrap());
    drop(agent.0.stderr.take());
    let run_dir = dir.join("run");
    let is_there = || plumb().args(["leaks", "--run-dir", &run_dir]).output().unwrap().status.success();
    let end = Instant::now() + Duration::from_secs(120);
    while !is_there() {
        let ended = agent.0.try_wait().unwrap();
        assert!(ended.is_none() && Instant::now() < end, "{ended:?}");
        thread::sleep(Duration::from_millis(100));
    }
    // It tells of its first pass meanwhile.
    thread::sleep(Duration::from_secs(3));
    assert!(is_there());
    agent.signal(Signal::TERM);
    assert_eq!(agent.0.wait().unwrap().code(), Some(0));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let script = format!(
        "{} ps | head -n 1 >/dev/null; echo ${{PIPESTATUS[0]}}",
        plumb().get_program().to_string_lossy()
    );
    let output = Command::new("bash").args(["-c", &script]).output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "0\n");
    assert!(output.stderr.is_empty());
}

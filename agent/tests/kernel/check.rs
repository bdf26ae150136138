//! `plumb check` against a program that leaks in each way there is: the right kind, as many as there are, the line that
//! its source marks, and nothing of the form that gives everything back.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread::sleep,
    time::Duration,
};

use rustix::process::Signal;
use serde_json::Value;

use crate::{
    support::{Running, TempDir, Workload, marked, plumb},
    variants,
};

const SOURCE: &str = include_str!("../check/programs/leaks.c");
/// On an emulated machine each takes seconds: one of each kind, and what is most likely to differ between kernels.
const EMULATED: [&str; 18] = [
    "open",
    "dup2",
    "dupfd",
    "accept",
    "socketpair",
    "scm_rights",
    "scm_rights_mmsg",
    "eventfd",
    "exec_child",
    "exec_deliberate",
    "double_close",
    "foreign_close",
    "thread_unjoined",
    "zombie",
    "vfork_zombie",
    "orphan",
    "sweep",
    "short",
];
/// How often a run is made again whose events were not all seen.
const RUNS: usize = 3;
/// What each leak leaves.
const REPEATS: u64 = 3;

fn is_emulated() -> bool {
    std::env::var_os("PLUMB_OWN_KERNEL").is_some()
}

/// The program that leaks: on the host built by the test itself.
fn leaks(dir: &TempDir) -> PathBuf {
    if std::env::var_os("PLUMB_WORKLOAD").is_some() {
        return Workload::example(variants::LEAKS.0);
    }
    let program = dir.0.join(variants::LEAKS.0);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(variants::LEAKS_SOURCE);
    let output =
        Command::new("gcc").args(variants::LEAKS.1).arg(source).arg("-o").arg(&program).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    program
}

/// Runs a command below plumb; its exit code and the report. Preemptible kernels skip a kernel program that is already
/// running, on an emulated machine more than once in an hour, and plumb counts it: such a run says nothing of the
/// command and is made again.
fn check(dir: &TempDir, options: &[&str], command: &[&str]) -> (i32, Value, Output) {
    let mut checked = check_once(dir, options, command);
    for _ in 0..RUNS {
        if !is_emulated() || checked.1["lost"]["events"] == 0 {
            break;
        }
        checked = check_once(dir, options, command);
    }
    checked
}

fn check_once(dir: &TempDir, options: &[&str], command: &[&str]) -> (i32, Value, Output) {
    let path = dir.join("report.json");
    let _ = fs::remove_file(&path);
    let report = ["-o", "json", "--report", &path];
    let output = plumb().arg("check").args(options).args(report).arg("--").args(command).output().unwrap();
    let text = fs::read_to_string(&path);
    let text = text.unwrap_or_else(|_| panic!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)));
    let document: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(document["schema"], "plumb/v1");
    (output.status.code().unwrap(), document, output)
}

/// Kind, count, function and line of each finding.
fn findings(document: &Value) -> Vec<(String, u64, String, u64)> {
    let finding = |finding: &Value| {
        let function = &finding["function"];
        (
            finding["kind"].as_str().unwrap().to_owned(),
            finding["count"].as_u64().unwrap(),
            function["function"].as_str().unwrap_or_default().to_owned(),
            function["line"].as_u64().unwrap_or(0),
        )
    };
    document["findings"].as_array().unwrap().iter().map(finding).collect()
}

/// The mark of the line that is to blame, and the kind in the report's words.
fn expected(case: &str, kind: &str) -> Option<(String, u64)> {
    let mark = if case == "foreign_close" { "foreign_close_culprit" } else { case };
    let kind = match kind {
        // What a thread that has ended leaves is memory, of which the kernel knows nothing.
        "clean" | "finished_thread" => return None,
        kind => kind.replace('_', "-"),
    };
    Some((kind, u64::from(marked(SOURCE, mark).unwrap())))
}

#[test]
fn each_leak_is_found_at_its_line_and_its_fixed_form_is_clean() {
    let dir = TempDir::new();
    let program = leaks(&dir);
    let program = program.to_str().unwrap();
    let list = Command::new(program).arg("list").output().unwrap();
    let mut seen = 0;
    for line in String::from_utf8(list.stdout).unwrap().lines() {
        let [case, has_fixed, kind] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
        if is_emulated() && !EMULATED.contains(&case) {
            continue;
        }
        seen += 1;
        let (code, document, _) = check(&dir, &[], &[program, case]);
        let found = findings(&document);
        match expected(case, kind) {
            None => assert_eq!((code, &found[..]), (0, &[][..]), "{case}: {document}"),
            Some((kind, line)) => {
                let [(found_kind, count, function, found_line)] = &found[..] else {
                    panic!("{case}: {document}")
                };
                assert_eq!((found_kind, *found_line, *count), (&kind, line, REPEATS), "{case}: {document}");
                assert!(function.starts_with("leak_"), "{case}: {document}");
                assert_eq!(code, 3, "{case}");
            }
        }
        if has_fixed == "1" {
            let (code, document, _) = check(&dir, &[], &[program, case, "fixed"]);
            assert_eq!((code, findings(&document)), (0, Vec::new()), "{case} fixed: {document}");
        }
        assert_eq!(document["lost"]["events"], 0, "{case}: {document}");
    }
    assert!(seen > 45 || (is_emulated() && seen == EMULATED.len()), "{seen} cases");
}

#[test]
fn a_stricter_check_tells_of_what_is_left_once() {
    let dir = TempDir::new();
    let program = leaks(&dir);
    let (code, document, _) = check(&dir, &["--repeats", "1"], &[program.to_str().unwrap(), "once"]);
    let mut found: Vec<_> = findings(&document).into_iter().map(|(kind, _, _, line)| (kind, line)).collect();
    found.sort();
    let line = |mark| u64::from(marked(SOURCE, mark).unwrap());
    assert_eq!(found, [("fd".to_owned(), line("once")), ("thread".to_owned(), line("once_thread"))]);
    assert_eq!(code, 3);
}

#[test]
fn the_command_has_its_own_output_exit_code_and_signals() {
    let dir = TempDir::new();
    let shell = |script: &str| check(&dir, &[], &["/bin/sh", "-c", script]);
    let (code, document, output) = shell("echo out; echo err >&2; exit 7");
    assert_eq!((code, &document["exit_code"]), (7, &Value::from(7)));
    assert_eq!((&output.stdout[..], &output.stderr[..]), (&b"out\n"[..], &b"err\n"[..]));
    let (code, document, _) = shell("kill -9 $$");
    assert_eq!((code, &document["signal"]), (137, &Value::from(9)));
    // plumb reads before anybody else runs; the command has its turn as it would have.
    let nice = |stat: &str| stat.rsplit(')').next().unwrap().split(' ').nth(17).map(str::to_owned);
    let (_, _, output) = shell("read -r stat < /proc/$$/stat; echo \"$stat\"");
    let own = fs::read_to_string("/proc/thread-self/stat").unwrap();
    assert_eq!(nice(&String::from_utf8_lossy(&output.stdout)), nice(&own));
    // A signal to plumb reaches the command.
    let ready = dir.join("ready");
    let script = format!("trap 'exit 5' TERM; : > {ready}; while :; do :; done");
    let child =
        plumb().args(["check", "--report", &dir.join("report"), "--", "/bin/sh", "-c", &script]).spawn();
    let mut child = Running(child.unwrap());
    while !Path::new(&ready).exists() {
        sleep(Duration::from_millis(20));
    }
    child.signal(Signal::TERM);
    assert_eq!(child.0.wait().unwrap().code(), Some(5));
}

/// Runs the crowd of `leaks.c` while plumb does not read: more than the rings hold. The exit code and the report.
fn check_unread(options: &[&str], form: &[&str]) -> (i32, Value) {
    let dir = TempDir::new();
    let (program, report) = (leaks(&dir), dir.join("report.json"));
    let mut check = plumb();
    check
        .args(["check", "-o", "json", "--report", &report])
        .args(options)
        .arg("--")
        .arg(program)
        .arg("crowd");
    check.args(form).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = Running(check.spawn().unwrap());
    let mut pid = String::new();
    BufReader::new(child.0.stdout.take().unwrap()).read_line(&mut pid).unwrap();
    child.signal(Signal::STOP);
    child.0.stdin.take().unwrap().write_all(b"\n").unwrap();
    let has_ended = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap();
        stat.rsplit(')').next().unwrap().trim_start().starts_with('Z')
    };
    while !has_ended() {
        sleep(Duration::from_millis(20));
    }
    child.signal(Signal::CONT);
    let code = child.0.wait().unwrap().code().unwrap();
    let document: Value = serde_json::from_str(&fs::read_to_string(&report).unwrap()).unwrap();
    let lost = |what: &str| document["lost"][what].as_u64().unwrap();
    assert!(lost("events") > 0 && lost("tables") == 0, "{document}");
    assert_eq!(document["complete"], false, "{document}");
    (code, document)
}

#[test]
fn what_is_open_at_the_end_is_told_however_much_was_lost() {
    if is_emulated() {
        // So many calls take minutes there.
        return;
    }
    let (code, document) = check_unread(&["--repeats", "1"], &[]);
    let found = findings(&document);
    let line = u64::from(marked(SOURCE, "crowd").unwrap());
    assert!(found.iter().all(|(kind, _, _, at)| kind == "fd" && [0, line].contains(at)), "{document}");
    assert_eq!(found.iter().map(|(_, count, ..)| count).sum::<u64>(), 80, "{document}");
    assert_eq!(code, 3);
}

#[test]
fn a_run_that_was_not_all_seen_is_no_success() {
    if is_emulated() {
        return;
    }
    let (code, document) = check_unread(&[], &["fixed"]);
    assert_eq!((code, findings(&document)), (1, Vec::new()), "{document}");
    assert_eq!(document["exit_code"], 0);
}

#[test]
fn what_a_rule_says_is_meant_is_no_finding_and_rules_are_written_for_the_rest() {
    let dir = TempDir::new();
    let program = leaks(&dir);
    let program = program.to_str().unwrap();
    let rules = dir.join("rules.supp");
    let (code, ..) = check(&dir, &["--gen-suppressions", &rules], &[program, "open"]);
    assert_eq!(code, 3);
    let written = fs::read_to_string(&rules).unwrap();
    let without_reason =
        plumb().args(["check", "--suppressions", &rules, "--", program, "open"]).output().unwrap();
    let message = String::from_utf8_lossy(&without_reason.stderr).into_owned();
    assert_eq!(without_reason.status.code(), Some(2), "{message}");
    assert!(message.contains("rules.supp:3"), "{message}");
    let reason = written.lines().find(|line| line.trim_start().starts_with("reason:")).unwrap();
    fs::write(&rules, written.replace(reason, "   reason: a test wants it")).unwrap();
    let (code, document, _) = check(&dir, &["--suppressions", &rules], &[program, "open"]);
    assert_eq!((code, findings(&document)), (0, Vec::new()), "{document}");
    assert_eq!(document["suppressed"][0]["reason"], "a test wants it");
    assert_eq!(document["suppressed"][0]["count"], REPEATS);
    let both = ["--suppressions", &rules, "--gen-suppressions", &rules];
    let (code, document, _) = check(&dir, &both, &[program, "socket4"]);
    assert_eq!(code, 3, "another leak is told");
    assert_eq!(document["unused_rules"].as_array().unwrap().len(), 1);
    let longer = fs::read_to_string(&rules).unwrap();
    assert!(longer.contains("a test wants it") && longer.contains("leak_socket4"), "{longer}");
    // Where nothing is found nothing is left, nor taken.
    let none = dir.join("none.supp");
    assert_eq!(check(&dir, &["--gen-suppressions", &none], &[program, "open", "fixed"]).0, 0);
    assert!(!Path::new(&none).exists());
}

#[test]
fn runs_are_counted_one_by_one() {
    let dir = TempDir::new();
    let program = leaks(&dir);
    let (code, document, _) = check(&dir, &["--iterations", "3"], &[program.to_str().unwrap(), "open"]);
    assert_eq!((code, &document["findings"][0]["rounds"]), (3, &Value::from([3, 3, 3])), "{document}");
    assert_eq!(document["processes"], 3);
}

#[test]
fn a_signal_ends_all_runs() {
    let dir = TempDir::new();
    let (ready, report) = (dir.join("ready"), dir.join("report"));
    let script = format!("echo run >> {ready}; while :; do :; done");
    let check = ["check", "--iterations", "3", "--report", &report, "--", "/bin/sh", "-c", &script];
    let mut child = Running(plumb().args(check).spawn().unwrap());
    // The shell makes the file before it writes.
    while fs::read_to_string(&ready).map_or(true, |runs| runs.is_empty()) {
        sleep(Duration::from_millis(20));
    }
    child.signal(Signal::TERM);
    assert_eq!(child.0.wait().unwrap().code(), Some(128 + 15));
    assert_eq!(fs::read_to_string(&ready).unwrap(), "run\n");
}

#[test]
fn what_cannot_be_run_is_told_as_a_shell_tells_it() {
    let refused = |arguments: &[&str]| {
        let output = plumb().arg("check").args(arguments).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, message) = refused(&["--", "/nonexistent/program"]);
    assert_eq!(code, 127, "{message}");
    assert!(message.contains("/nonexistent/program") && message.lines().count() == 1, "{message}");
    let dir = TempDir::new();
    let no_program = dir.join("text");
    fs::write(&no_program, "text").unwrap();
    assert_eq!(refused(&["--", &no_program]).0, 126);
    assert_eq!(refused(&[]).0, 2);
    assert_eq!(refused(&["--stop", "NONSENSE", "--", "true"]).0, 2);
    assert_eq!(refused(&["--ready", "80", "--", "true"]).0, 2);
    assert_eq!(refused(&["--suppressions", "/nonexistent", "--", "true"]).0, 2);
    assert_eq!(refused(&["--repeats", "0", "--", "true"]).0, 2);
    // A report that cannot be written is told before the command runs.
    let ran = dir.join("ran");
    let script = format!(": > {ran}");
    for option in ["--report", "--gen-suppressions"] {
        let (code, message) = refused(&[option, "/nonexistent/file", "--", "/bin/sh", "-c", &script]);
        assert_eq!(code, 2, "{message}");
    }
    assert!(!Path::new(&ran).exists());
    // An older one stays when there is nothing new.
    let report = dir.join("old");
    fs::write(&report, "old").unwrap();
    assert_eq!(refused(&["--report", &report, "--", "/nonexistent/program"]).0, 127);
    assert_eq!(fs::read_to_string(&report).unwrap(), "old");
    for ready in ["99999", "no such host:80"] {
        let (code, message) =
            refused(&["--stop", "TERM", "--ready", ready, "--", "/bin/sh", "-c", "while :; do :; done"]);
        assert!(matches!(code, 1 | 2) && message.lines().count() < 6, "{ready}: {code} {message}");
    }
}

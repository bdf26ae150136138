//! The agent is killed at each step of a drain: another one goes on, tells the truth, and signals nobody twice.

use std::{
    collections::BTreeSet,
    fs,
    process::{Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    thread::{scope, sleep},
    time::Duration,
};

use rustix::process::Signal;
use serde_json::Value;

use super::{
    Host, alone, pid,
    support::{Running, TempDir, copy_program, plumb},
};

/// Agents at a time: they mostly wait.
const SIDE_BY_SIDE: usize = 8;

impl Host {
    /// A process that notes each TERM, and goes 2 to 3 s after the first: later than another agent can be there. Before it
    /// serves it runs `before`.
    fn patient(&self, shell: &str, name: &str, before: &str, ends: bool) -> Running {
        let (events, ready) = (self.dir.join("events"), self.dir.join(name));
        let ends = if ends { "[ $n -gt 100 ] && exit 0" } else { ":" };
        let script = format!(
            "{before} t=0; n=0; trap 'echo {name} TERM >> {events}; t=1' TERM; : > {ready}; \
             while :; do sleep 0.02; n=$((n+t)); {ends}; done"
        );
        let server = Running(Command::new(shell).args(["-c", &script, name]).spawn().unwrap());
        self.until("a server is ready", || fs::exists(&ready).unwrap());
        server
    }

    /// The words of the entries that are in the journal; `None` without one.
    fn journal(&self) -> Option<Vec<String>> {
        let text = fs::read_to_string(self.dir.0.join("run/drain.journal")).ok()?;
        let word = |line: &str| line.split('"').nth(1).unwrap_or_default().to_owned();
        Some(text.split_inclusive('\n').filter(|line| line.ends_with('\n')).map(word).collect())
    }
}

/// Kills the agent when so many entries are in the journal, and a moment later; returns the last of them, or `None` when
/// the drain was over before.
fn kill_at(entries: usize, later: Duration) -> Option<String> {
    let shared = TempDir::new();
    let (exe, prestops) = (shared.join("first"), shared.join("prestops"));
    copy_program("/bin/sh", &exe);
    let settings = format!(
        "[[service]]\nname = 'first'\nexe = '{exe}'\nsignal = 'TERM'\n\
         prestop = 'echo prestop >> {prestops}; sleep 0.2'\n"
    );
    let mut host = Host::new(&settings);
    // A child that goes a while after it: one is gone, and not yet all.
    let child = "(trap '' TERM; while [ -e /proc/$$/exe ]; do sleep 0.3; done) &";
    let _first = host.patient(&exe, "first", child, true);
    let (second, deaf) =
        (host.patient("/bin/sh", "second", "", true), host.patient("/bin/sh", "deaf", "", false));
    // Those of the settings wait for what is registered later: here they go first.
    for (name, server, more) in
        [("second", &second, &[][..]), ("deaf", &deaf, &["--kill", "--deadline", "2s"])]
    {
        let add = ["services", "add", name, "--pid", &pid(server), "--signal", "TERM", "--after", "first"];
        let output = host.plumb(&[&add, more].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let mut drain = plumb();
    // Time for an agent to start on a machine that has other things to do, too.
    drain.args(["drain", "--all", "--deadline", "60s"]).env("PLUMB_RUN_DIR", host.run_dir());
    let mut drain = Running(drain.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    let mut was_there = false;
    loop {
        let journal = host.journal();
        if was_there && journal.is_none() {
            drain.0.wait().unwrap();
            return None;
        }
        was_there |= journal.is_some();
        if journal.is_some_and(|journal| journal.len() >= entries) {
            break;
        }
        sleep(Duration::from_micros(100));
    }
    sleep(later);
    let mut agent = host.agent.take().unwrap();
    agent.signal(Signal::KILL);
    agent.0.wait().unwrap();
    drain.0.wait().unwrap();
    let last = match &host.journal()?[..] {
        // Who is there as it begins is written with it.
        [.., step, found] if step == "prestop" && found == "found" => step.clone(),
        [.., last] => last.clone(),
        [] => "none".to_owned(),
    };
    host.start();
    if last == "none" {
        // The folder was made, and nothing has begun.
        assert!(host.events().is_empty(), "{:?}", host.events());
        return Some(last);
    }
    let report = || host.json(&["drain", "--last"]);
    host.until("the drain is over", || report()["state"] == "finished");
    check(&host, &report(), &last, &fs::read_to_string(&prestops).unwrap_or_default());
    Some(last)
}

fn check(host: &Host, report: &Value, last: &str, prestops: &str) {
    let context = || format!("after {last}: {:?}\n{report:#}\n{}", host.events(), host.log());
    let is_over = last == "finished";
    assert_eq!(report["resumed"], i32::from(!is_over), "{}", context());
    for service in report["services"].as_array().unwrap() {
        let name = service["name"].as_str().unwrap();
        let times = host.events().iter().filter(|event| **event == format!("{name} TERM")).count() as u32;
        let notes = service["notes"].to_string();
        let is_unsure = notes.contains("may not have been sent");
        // Its time may have passed while there was no agent: then it gets no signal at all.
        let is_too_late = notes.contains("no time was left");
        let expected = if is_too_late { 0..=0 } else { u32::from(!is_unsure)..=1 };
        assert!(expected.contains(&times), "{name} got {times}: {}", context());
        // Clean only if somebody saw it.
        let is_told = match (service["verdict"].as_str().unwrap(), &service["exit_code"]) {
            ("clean", code) => code == 0,
            ("lossy", code) => {
                // How it ended, or what became of its ports, which the agent had not looked at.
                let why = if code.is_null() { "nobody saw how" } else { "that nobody saw" };
                service["why"].to_string().contains(why)
            }
            ("killed", _) => name == "deaf",
            ("timeout", _) => is_unsure || is_too_late,
            _ => false,
        };
        assert!(is_told, "{name}: {}", context());
    }
    let prestops = prestops.lines().count();
    assert!((1..=2).contains(&prestops), "{prestops}: {}", context());
}

/// Kills an agent at each entry, and returns which were the last.
fn sweep(sweep: u64) -> BTreeSet<String> {
    let (next, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let killed = Mutex::new(BTreeSet::new());
    scope(|scope| {
        for _ in 0..SIDE_BY_SIDE {
            scope.spawn(|| {
                while !is_over.load(Relaxed) {
                    let entries = next.fetch_add(1, Relaxed);
                    // Somewhere before the next step, or in it.
                    let later = Duration::from_micros((entries as u64 * 7919 + sweep * 1009) % 3000);
                    match kill_at(entries, later) {
                        Some(last) => drop(killed.lock().unwrap().insert(last)),
                        None => is_over.store(true, Relaxed),
                    }
                }
            });
        }
    });
    killed.into_inner().unwrap()
}

#[test]
fn an_agent_that_is_killed_at_any_step_is_followed_by_one_that_goes_on_and_signals_nobody_twice() {
    let _alone = alone();
    let mut killed = BTreeSet::new();
    let missing = |killed: &BTreeSet<String>| {
        let steps = ["stage", "prestop", "signalled", "gone", "all-gone", "ended"];
        steps.into_iter().filter(|step| !killed.contains(*step)).collect::<Vec<_>>()
    };
    // Some are the last for less than a millisecond, which a busy machine may miss.
    for round in 0..4 {
        killed.extend(sweep(round));
        if missing(&killed).is_empty() {
            break;
        }
    }
    println!("killed after {killed:?}");
    assert!(missing(&killed).is_empty(), "{:?} were not hit: {killed:?}", missing(&killed));
}

#[test]
fn a_drain_whose_journal_is_lost_with_the_host_is_told_of_as_far_as_it_was() {
    let mut host = Host::new("");
    let (second, deaf) = (host.server("second", "0"), host.patient("/bin/sh", "deaf", "", false));
    for (name, server) in [("second", &second), ("deaf", &deaf)] {
        host.register(name, server.0.id());
    }
    let mut drain = plumb();
    drain.args(["drain", "--all", "--deadline", "60s"]).env("PLUMB_RUN_DIR", host.run_dir());
    let mut drain = Running(drain.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    // What is on the disk, but not what is in memory on most hosts.
    let kept = || {
        let mut reports = fs::read_dir(host.dir.0.join("state/drains")).ok()?;
        let text = fs::read(reports.next()?.unwrap().path()).ok()?;
        serde_json::from_slice::<Value>(&text).ok()
    };
    host.until("that it was asked to stop is on the disk", || {
        kept().is_some_and(|kept| kept["services"][1]["signals"][0] == "TERM")
    });
    assert_eq!(kept().unwrap()["state"], "running");
    let mut agent = host.agent.take().unwrap();
    agent.signal(Signal::KILL);
    agent.0.wait().unwrap();
    assert_eq!(drain.0.wait().unwrap().code(), Some(6));
    fs::remove_file(host.dir.0.join("run/drain.journal")).unwrap();
    host.start();

    let report = host.json(&["drain", "--last"]);
    assert_eq!(report["state"], "finished");
    for (at, name, asked) in [(0, "second", 0), (1, "deaf", 1)] {
        let service = &report["services"][at];
        assert_eq!((&service["name"], &service["verdict"]), (&name.into(), &"lossy".into()), "{service:#}");
        assert_eq!(service["signals"].as_array().unwrap().len(), asked);
        let why = service["why"].as_str().unwrap();
        assert!(why.starts_with("nobody saw what became of it"), "{why}");
        assert_eq!(why.contains("had not been asked to stop"), asked == 0, "{why}");
    }
    assert_eq!(host.plumb(&["drain", "--last"]).status.code(), Some(1));
    assert_eq!(host.events(), ["deaf TERM"], "nobody goes on with it");
}

#[test]
fn a_registration_outlives_an_agent_although_whom_it_waits_for_does_not() {
    let mut host = Host::new("");
    let (first, second) = (host.server("first", "0"), host.server("second", "0"));
    host.register("first", first.0.id());
    let add = ["services", "add", "second", "--pid", &pid(&second), "--signal", "TERM", "--after", "first"];
    assert!(host.plumb(&add).status.success());
    let mut agent = host.agent.take().unwrap();
    agent.signal(Signal::KILL);
    agent.0.wait().unwrap();
    drop(first);
    host.start();
    let listed = host.json(&["services", "list"]);
    let names: Vec<&Value> =
        listed["services"].as_array().unwrap().iter().map(|service| &service["name"]).collect();
    assert_eq!(names, ["second"], "{listed:#}\n{}", host.log());
}

//! With a real systemd as the first process, in a machine that may be switched off: the agent is a unit of it, as it is
//! shipped, and what it drains are others.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::support::{Running, free_port, plumb};

const AGENT: &str = include_str!("../../../deploy/systemd/plumb.service");
const FOLDER: &str = "/run/drained";
const STATE: &str = "/var/lib/plumb";
/// Of systemd, for units of a boot.
const UNITS: &str = "/run/systemd/system";
const EVENTS: &str = "/run/drained/events";
/// As long as a service could be started again by somebody who is slow.
const STAYS: Duration = Duration::from_secs(6);
const SOON: Duration = Duration::from_secs(60);

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{}", text(output.stderr), log());
    text(output.stdout)
}

fn systemctl(arguments: &[&str]) -> String {
    run("systemctl", arguments)
}

/// What the agent has said.
fn log() -> String {
    let mut journal = Command::new("journalctl");
    journal.args(["-u", "plumb.service", "-o", "cat", "--no-pager", "-n", "60"]);
    journal.output().map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}

fn until(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < end, "not in time: {what}\n{:?}\n{}", events(), log());
        sleep(Duration::from_millis(50));
    }
}

/// Properties of a unit.
fn show(unit: &str) -> BTreeMap<String, String> {
    let names = "--property=ActiveState,SubState,MainPID,NRestarts,Result";
    let text = systemctl(&["show", unit, names]);
    text.lines().filter_map(|line| line.split_once('=')).map(|(a, b)| (a.to_owned(), b.to_owned())).collect()
}

fn state() -> String {
    let output = Command::new("systemctl").arg("is-system-running").output().unwrap();
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn events() -> Vec<String> {
    fs::read_to_string(EVENTS).unwrap_or_default().lines().map(str::to_owned).collect()
}

/// Each with its signal and its end, one after the other.
fn in_order(names: &[&str]) -> Vec<String> {
    names.iter().flat_map(|name| [format!("{name} TERM"), format!("{name} gone")]).collect()
}

/// A program that notes each TERM, and ends some seconds after the first; `beside` is done before.
fn script(name: &str, stops: &str, code: u8, beside: &str) -> String {
    format!(
        "sub note {{ open(F, '>>', '{EVENTS}'); print F \"{name} $_[0]\\n\"; close F }}\n\
         $SIG{{TERM}} = sub {{ note('TERM'); select(undef, undef, undef, {stops}); note('gone'); exit {code} }};\n\
         {beside}\nopen(R, '>', '{FOLDER}/{name}.ready'); close R;\nsleep 1 while 1;\n"
    )
}

/// A program that systemd starts again whatever ends it; `more` are lines of its unit.
fn start_unit(name: &str, stops: &str, code: u8, (beside, more): (&str, &str)) {
    let program = format!("{FOLDER}/{name}.pl");
    fs::write(&program, script(name, stops, code, beside)).unwrap();
    start(name, &format!("ExecStart=/usr/bin/perl {program}\n{more}"));
    until("a unit is ready", || Path::new(&format!("{FOLDER}/{name}.ready")).exists());
}

fn start(name: &str, lines: &str) {
    let text = format!(
        "[Unit]\nStartLimitIntervalSec=0\n[Service]\nType=exec\nRestart=always\nRestartSec=100ms\n{lines}"
    );
    fs::write(format!("{UNITS}/drained-{name}.service"), text).unwrap();
    systemctl(&["daemon-reload"]);
    systemctl(&["start", "--no-block", &format!("drained-{name}.service")]);
}

/// A process that is no unit of its own.
fn start_process(name: &str, stops: &str) -> Running {
    let text = script(name, stops, 0, "");
    let child = Running(Command::new("/usr/bin/perl").args(["-e", &text]).spawn().unwrap());
    until("a process is ready", || Path::new(&format!("{FOLDER}/{name}.ready")).exists());
    child
}

/// The agent, as a unit. Ends with its services, and leaves nothing to the next.
struct Host;

impl Host {
    fn start(settings: &str) -> Self {
        let host = Self;
        host.clear();
        fs::create_dir_all(FOLDER).unwrap();
        fs::create_dir_all(format!("{UNITS}/plumb.service.d")).unwrap();
        let program = plumb().get_program().to_str().unwrap().to_owned();
        let config = format!("{FOLDER}/plumb.toml");
        fs::write(&config, format!("listen = '127.0.0.1:{}'\n{settings}", free_port())).unwrap();
        fs::write(format!("{UNITS}/plumb.service"), AGENT).unwrap();
        let own =
            format!("[Service]\nRestartSec=200ms\nExecStart=\nExecStart={program} agent --config {config}\n");
        fs::write(format!("{UNITS}/plumb.service.d/test.conf"), own).unwrap();
        systemctl(&["daemon-reload"]);
        host
    }

    /// Once its services are there: those of the settings are looked for only when it drains.
    fn agent(&self) {
        systemctl(&["restart", "plumb.service"]);
        self.answers();
    }

    fn answers(&self) {
        until("the agent answers", || plumb().args(["services", "list"]).output().unwrap().status.success());
    }

    fn clear(&self) {
        let quiet = |arguments: &[&str]| {
            let _ = Command::new("systemctl").args(arguments).stderr(Stdio::null()).status();
        };
        quiet(&["kill", "--signal=KILL", "drained-*.service"]);
        quiet(&["stop", "plumb.service", "drained-*.service"]);
        quiet(&["reset-failed"]);
        for folder in [FOLDER, STATE] {
            let _ = fs::remove_dir_all(folder);
        }
    }

    fn register(&self, name: &str, pid: &str) {
        let output =
            plumb().args(["services", "add", name, "--pid", pid, "--signal", "TERM"]).output().unwrap();
        assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stderr), log());
    }

    fn drain(&self, deadline: &str) -> Child {
        let mut drain = plumb();
        drain.args(["drain", "--all", "--deadline", deadline, "-o", "json"]);
        drain.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// The report of a drain, and the exit code of the command.
    fn drained(&self, deadline: &str) -> (Value, Option<i32>) {
        let output = self.drain(deadline).wait_with_output().unwrap();
        let report = serde_json::from_slice(&output.stdout);
        (report.unwrap_or_else(|error| panic!("{error}\n{}", log())), output.status.code())
    }

    fn last(&self) -> Value {
        let output = plumb().args(["drain", "--last", "-o", "json"]).output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    fn listed(&self) -> String {
        String::from_utf8(plumb().args(["services", "list"]).output().unwrap().stdout).unwrap()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if state() != "stopping" {
            self.clear();
        }
    }
}

fn of<'a>(report: &'a Value, name: &str) -> &'a Value {
    report["services"].as_array().unwrap().iter().find(|one| one["name"] == name).unwrap()
}

fn main_pid(name: &str) -> String {
    show(&format!("drained-{name}.service"))["MainPID"].clone()
}

#[test]
#[ignore = "needs systemd as the first process: cargo xtask test"]
fn units_stop_through_systemd_in_order_and_stay_stopped() {
    let port = free_port();
    let app = format!("{FOLDER}/app");
    let host = Host::start(&format!(
        "[[service]]\nname = 'by-pidfile'\npidfile = '{FOLDER}/pid'\nsignal = 'TERM'\n\
         [[service]]\nname = 'by-unit'\nunit = 'drained-by-unit.service'\n\
         [[service]]\nname = 'by-port'\nport = {port}\nsignal = 'TERM'\n\
         [[service]]\nname = 'by-exe'\nexe = '{app}'\nsignal = 'TERM'\n"
    ));
    let pidfile = format!("open(P, '>', '{FOLDER}/pid'); print P \"$$\\n\"; close P;");
    let listens = format!(
        "use IO::Socket::INET; my $s = IO::Socket::INET->new(LocalAddr => '127.0.0.1:{port}', Listen => 5) or die;"
    );
    start_unit("by-pidfile", "0.2", 0, (&pidfile, ""));
    start_unit("by-unit", "0.3", 0, ("", ""));
    start_unit("by-port", "0.2", 0, (&listens, ""));
    start_unit("registered", "0.2", 0, ("", ""));
    fs::copy("/usr/bin/sleep", &app).unwrap();
    start("by-exe", &format!("ExecStart={app} 4711\n"));
    until("the unit runs", || main_pid("by-exe") != "0");
    host.agent();
    host.register("registered", &main_pid("registered"));
    let names = ["registered", "by-exe", "by-port", "by-unit", "by-pidfile"];
    let pids = names.map(main_pid);

    let (report, code) = host.drained("30s");
    assert_eq!(
        events(),
        in_order(&["registered", "by-port", "by-unit", "by-pidfile"]),
        "{report}\n{}",
        log()
    );
    for (name, pid) in names.iter().zip(&pids) {
        let (service, unit) = (of(&report, name), format!("drained-{name}.service"));
        let expected = if *name == "by-exe" { 128 + libc_term() } else { 0 };
        assert_eq!(service["verdict"], "clean", "{report}");
        assert_eq!((&service["unit"], &service["exit_code"]), (&Value::from(unit), &Value::from(expected)));
        assert_eq!(service["pids"][0].to_string(), *pid);
    }
    assert_eq!(code, Some(0));
    sleep(STAYS);
    for name in names {
        let unit = show(&format!("drained-{name}.service"));
        let has = |key: &str| unit[key].as_str();
        assert_eq!((has("ActiveState"), has("MainPID"), has("NRestarts")), ("inactive", "0", "0"), "{name}");
    }
}

fn libc_term() -> i32 {
    rustix::process::Signal::TERM.as_raw()
}

#[test]
#[ignore = "needs systemd as the first process: cargo xtask test"]
fn what_a_unit_came_to_is_told_as_systemd_has_it() {
    let service = |name: &str, more: &str| {
        format!("[[service]]\nname = '{name}'\nunit = 'drained-{name}.service'\nafter = []\n{more}")
    };
    let host = Host::start(
        &[
            service("fails", ""),
            service("short", ""),
            service("long", "deadline = '3s'\n"),
            service("between", ""),
            service("post", ""),
            service("next", "").replace("after = []", "after = ['post']"),
        ]
        .concat(),
    );
    let deaf = "$SIG{TERM} = sub { note('TERM') };";
    start_unit("fails", "0.1", 3, ("", ""));
    start_unit("short", "0", 0, (deaf, "TimeoutStopSec=1\n"));
    start_unit("long", "0", 0, (deaf, "TimeoutStopSec=60\n"));
    let post = format!("ExecStopPost=/bin/sh -c 'sleep 1; echo post after >> {EVENTS}'\n");
    start_unit("post", "0.1", 0, ("", &post));
    start_unit("next", "0.1", 0, ("", ""));
    start("between", "ExecStart=/bin/false\nRestartSec=1h\n");
    until("it waits to be started again", || show("drained-between.service")["SubState"] == "auto-restart");
    host.agent();

    let (report, code) = host.drained("30s");
    let verdict = |name: &str| of(&report, name)["verdict"].as_str().unwrap().to_owned();
    let why = |name: &str| of(&report, name)["why"].as_str().unwrap().to_owned();
    let state = |name: &str| show(&format!("drained-{name}.service"))["ActiveState"].clone();
    assert_eq!((verdict("fails"), &of(&report, "fails")["exit_code"]), ("clean".to_owned(), &Value::from(3)));
    assert!(why("fails").contains("exit code 3"), "{report}");
    assert!(of(&report, "fails")["timeline"].to_string().contains("failed (exit-code)"), "{report}");
    assert_eq!(state("fails"), "failed");
    assert_eq!((verdict("short"), state("short")), ("killed".to_owned(), "failed".to_owned()), "{report}");
    assert!(why("short").contains("TimeoutStopSec"), "{report}");
    assert_eq!(
        (verdict("long"), state("long")),
        ("timeout".to_owned(), "deactivating".to_owned()),
        "{report}"
    );
    assert_eq!(verdict("between"), "clean", "{report}");
    assert_ne!(show("drained-between.service")["SubState"], "auto-restart");
    assert_eq!((verdict("post"), verdict("next")), ("clean".to_owned(), "clean".to_owned()), "{report}");
    let place = |event: &str| events().iter().position(|one| one == event);
    assert!(place("post after").unwrap() < place("next TERM").unwrap(), "{:?}", events());
    for name in ["fails", "short", "long", "post", "next"] {
        let times = events().iter().filter(|event| **event == format!("{name} TERM")).count();
        assert_eq!(times, 1, "{name}: {:?}", events());
    }
    assert_eq!(code, Some(124));
}

#[test]
#[ignore = "needs systemd as the first process: cargo xtask test"]
fn the_agent_that_is_started_again_drains_nothing_and_one_that_is_killed_goes_on() {
    let host = Host::start("[[service]]\nname = 'unit'\nunit = 'drained-unit.service'\n");
    start_unit("unit", "2", 0, ("", ""));
    start_unit("registered", "2", 0, ("", ""));
    let process = start_process("process", "2");
    host.agent();
    host.register("registered", &main_pid("registered"));
    host.register("process", &process.pid().to_string());
    systemctl(&["restart", "plumb.service"]);
    host.answers();
    let listed = host.listed();
    assert!(["unit", "registered", "process"].iter().all(|name| listed.contains(name)), "{listed}");
    assert!(events().is_empty(), "nobody got a signal: {:?}", events());
    assert_eq!(host.last(), Value::Null);

    let order = ["process", "registered", "unit"];
    // It ends with the first agent.
    let mut drain = Running(host.drain("60s"));
    for (at, name) in order.iter().enumerate() {
        until("the next has its signal", || events().len() > at * 2);
        assert_eq!(events()[at * 2], format!("{name} TERM"));
        systemctl(&["kill", "--signal=KILL", "plumb.service"]);
        if at == 0 {
            drain.0.wait().unwrap();
        }
        host.answers();
    }
    until("the drain is over", || host.last()["state"] == "finished");
    let report = host.last();
    assert_eq!(events(), in_order(&order), "{report}\n{}", log());
    assert_eq!(report["resumed"], 3, "{report}");
    for name in order {
        // Nobody saw how one ended while there was no agent.
        let verdict = of(&report, name)["verdict"].as_str().unwrap();
        assert!(["clean", "lossy"].contains(&verdict), "{report}");
    }
    assert_eq!(show("drained-unit.service")["NRestarts"], "0");
    assert_eq!(show("drained-registered.service")["ActiveState"], "inactive");
}

fn holds_inhibitor() -> bool {
    let list =
        Command::new("systemd-inhibit").args(["--list", "--no-pager", "--no-legend"]).output().unwrap();
    String::from_utf8_lossy(&list.stdout)
        .lines()
        .any(|line| line.starts_with("plumb ") && line.contains("shutdown"))
}

#[test]
#[ignore = "needs systemd as the first process: cargo xtask test"]
fn a_logind_or_a_bus_that_was_started_again_is_held_back_again() {
    let host = Host::start("");
    host.agent();
    until("the shutdown is held back", holds_inhibitor);
    let taken = || log().matches("is held back for").count();
    for (times, service) in
        [(1, "systemd-logind.service"), (2, "dbus.service"), (3, "systemd-logind.service")]
    {
        until("it is said", || taken() >= times);
        systemctl(&["restart", service]);
        until("it is taken anew", || taken() > times);
        until("the shutdown is held back again", holds_inhibitor);
    }
}

/// Waits for the report of a drain, which is on the disk before systemd stops anything if it is held back.
fn report_on_disk(is_held_back: bool) -> Value {
    let reports = || fs::read_dir(format!("{STATE}/drains")).into_iter().flatten().filter_map(Result::ok);
    // One under way is there, too.
    let is_over = |report: fs::DirEntry| {
        let text = fs::read(report.path()).unwrap_or_default();
        serde_json::from_slice::<Value>(&text).is_ok_and(|report| report["state"] == "finished")
    };
    let is_there = || reports().any(is_over);
    until("the report is on the disk", || {
        // In this order: it may come in between.
        let is_stopping = state() == "stopping";
        assert!(is_there() || !is_held_back || !is_stopping, "{:?}\n{}", events(), log());
        is_there()
    });
    until("the agent is stopped", || show("plumb.service")["ActiveState"] == "inactive");
    assert_eq!(reports().count(), 1, "and has drained once");
    let report: Value = serde_json::from_slice(&fs::read(reports().next().unwrap().path()).unwrap()).unwrap();
    assert_eq!((&report["trigger"], &report["state"]), (&"shutdown of the host".into(), &"finished".into()));
    report
}

/// A unit whose stop takes until there is a file, which is returned: when all are stopped systemd ends whoever is left, the
/// test as well.
fn hold_the_end() -> String {
    let over = "/run/drained-over";
    let lines = format!(
        "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\nTimeoutStopSec=60\n\
         ExecStop=/bin/sh -c 'until [ -e {over} ]; do sleep 0.1; done'\n"
    );
    fs::write(format!("{UNITS}/drained-end.service"), lines).unwrap();
    systemctl(&["daemon-reload"]);
    systemctl(&["start", "drained-end.service"]);
    over.to_owned()
}

/// The machine goes down: it runs alone, and last.
#[test]
#[ignore = "switches the machine off: cargo xtask test"]
fn a_shutdown_waits_until_all_services_are_drained_in_order() {
    let host = Host::start("[[service]]\nname = 'first'\nunit = 'drained-first.service'\n");
    // An emulated machine is slow.
    fs::create_dir_all("/run/systemd/logind.conf.d").unwrap();
    fs::write("/run/systemd/logind.conf.d/drained.conf", "[Login]\nInhibitDelayMaxSec=30s\n").unwrap();
    systemctl(&["restart", "systemd-logind.service"]);
    start_unit("first", "0.4", 0, ("", ""));
    start_unit("second", "0.4", 0, ("", ""));
    let third = start_process("third", "0.4");
    host.agent();
    host.register("second", &main_pid("second"));
    host.register("third", &third.pid().to_string());
    until("the shutdown is held back", holds_inhibitor);
    let over = hold_the_end();
    systemctl(&["poweroff"]);
    let report = report_on_disk(true);
    assert_eq!(events(), in_order(&["third", "second", "first"]), "{report}");
    for name in ["first", "second", "third"] {
        assert_eq!(
            (&of(&report, name)["verdict"], &of(&report, name)["exit_code"]),
            (&"clean".into(), &0.into())
        );
    }
    assert_eq!(report["deadline_seconds"].as_f64().unwrap().round(), 29.0, "{report}");
    assert!(report["slack_seconds"].as_f64().unwrap() > 0.0, "{report}");
    fs::write(over, "").unwrap();
}

/// The machine goes down: it runs alone, and last.
#[test]
#[ignore = "switches the machine off: cargo xtask test"]
fn without_logind_the_agent_drains_when_systemd_stops_the_host() {
    let host = Host::start("[[service]]\nname = 'unit'\nunit = 'drained-unit.service'\n");
    systemctl(&["mask", "--runtime", "--now", "systemd-logind.service"]);
    start_unit("unit", "0.4", 0, ("", ""));
    let (second, first) = (start_process("second", "0.4"), start_process("first", "0.4"));
    host.agent();
    host.register("second", &second.pid().to_string());
    host.register("first", &first.pid().to_string());
    // What poweroff.target does without its end: this is to be reported.
    let down = "[Unit]\nDefaultDependencies=no\nRequires=shutdown.target\nAfter=shutdown.target\n";
    fs::write(format!("{UNITS}/drained-down.target"), down).unwrap();
    systemctl(&["daemon-reload"]);
    systemctl(&["start", "--no-block", "drained-down.target"]);
    let report = report_on_disk(false);
    let processes: Vec<_> = events().into_iter().filter(|event| !event.starts_with("unit")).collect();
    assert_eq!(processes, in_order(&["first", "second"]), "{report}");
    for name in ["first", "second"] {
        assert_eq!(of(&report, name)["verdict"], "clean", "{report}");
    }
}

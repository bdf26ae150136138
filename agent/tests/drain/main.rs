//! `plumb drain` against real processes: in order, once, and only those that were meant; also when the agent is killed
//! in between. Needs root.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output},
    sync::{Mutex, MutexGuard, PoisonError},
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::Value;

mod audit;
mod client;
mod course;
mod family;
mod faults;
mod killed;
mod ledger;
mod storm;
mod subject;
#[path = "../support/mod.rs"]
mod support;
mod tiers;
mod unseen;

mod booted;

use support::{Running, TempDir, copy_program, free_port, plumb};

/// For tests that use all processors there are: one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An agent with folders of its own, which stay when it is killed.
struct Host {
    dir: TempDir,
    agent: Option<Running>,
}

impl Host {
    fn new(settings: &str) -> Self {
        let dir = TempDir::new();
        fs::set_permissions(&dir.0, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(dir.0.join("plumb.toml"), settings).unwrap();
        let mut host = Self { dir, agent: None };
        host.start();
        host
    }

    fn start(&mut self) {
        let log = fs::File::options().create(true).append(true).open(self.dir.0.join("log")).unwrap();
        let agent = plumb()
            .args(["agent", "--config", &self.dir.join("plumb.toml"), "--run-dir", &self.run_dir()])
            .args(["--state-dir", &self.dir.join("state"), "--listen", &format!("127.0.0.1:{}", free_port())])
            .stderr(log)
            .spawn()
            .unwrap();
        self.agent = Some(Running(agent));
        self.until("the agent answers", || self.plumb(&["services", "list"]).status.success());
    }

    fn run_dir(&self) -> String {
        self.dir.join("run")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.0.join("log")).unwrap_or_default()
    }

    fn until(&self, what: &str, done: impl Fn() -> bool) {
        let end = Instant::now() + Duration::from_secs(60);
        while !done() {
            assert!(Instant::now() < end, "not in time: {what}\n{}", self.log());
            sleep(Duration::from_millis(20));
        }
    }

    fn plumb(&self, arguments: &[&str]) -> Output {
        plumb().args(arguments).env("PLUMB_RUN_DIR", self.run_dir()).output().unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.plumb(&[arguments, &["-o", "json"]].concat());
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| {
            panic!("{arguments:?}: {}\n{}", String::from_utf8_lossy(&output.stderr), self.log())
        })
    }

    /// A process that notes each TERM, and goes `stops` seconds after the first.
    fn server(&self, name: &str, stops: &str) -> Running {
        let (events, ready) = (self.dir.join("events"), self.dir.join(name));
        let script = format!(
            "trap 'echo {name} TERM >> {events}; sleep {stops}; echo {name} gone >> {events}; exit 0' TERM; \
             : > {ready}; while :; do sleep 0.02; done"
        );
        let server = Running(Command::new("/bin/sh").args(["-c", &script, name]).spawn().unwrap());
        self.until("a server is ready", || Path::new(&ready).exists());
        server
    }

    fn register(&self, name: &str, pid: u32) {
        let output = self.plumb(&["services", "add", name, "--pid", &pid.to_string(), "--signal", "TERM"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn events(&self) -> Vec<String> {
        let events = fs::read_to_string(self.dir.0.join("events")).unwrap_or_default();
        events.lines().map(str::to_owned).collect()
    }

    fn refused(&self, arguments: &[&str]) -> String {
        let output = self.plumb(arguments);
        assert!(!output.status.success(), "{arguments:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }
}

fn pid(server: &Running) -> String {
    server.0.id().to_string()
}

#[test]
fn services_of_the_settings_and_registered_ones_stop_in_order() {
    let dir = TempDir::new();
    let (pidfile, port) = (dir.join("pid"), free_port());
    let settings = format!(
        "[[service]]\nname = 'by-pidfile'\npidfile = '{pidfile}'\nsignal = 'TERM'\n\
         [[service]]\nname = 'by-port'\nport = {port}\nsignal = 'TERM'\n\
         [[service]]\nname = 'by-exe'\nexe = '{}'\nargs = ['-c', 'by-exe']\nsignal = 'TERM'\n",
        fs::canonicalize("/bin/sh").unwrap().display()
    );
    let host = Host::new(&settings);
    let (a, b, c) = (host.server("a", "0.1"), host.server("b", "0.3"), host.server("c", "0.1"));
    let by_pidfile = host.server("by-pidfile", "0.2");
    fs::write(&pidfile, pid(&by_pidfile)).unwrap();
    let listener = format!(
        "use IO::Socket::INET;\n\
         sub note {{ open(F, '>>', '{}'); print F \"by-port $_[0]\\n\"; close F }}\n\
         $SIG{{TERM}} = sub {{ note('TERM'); select(undef, undef, undef, 0.2); note('gone'); exit 0 }};\n\
         my $s = IO::Socket::INET->new(LocalAddr => '127.0.0.1:{port}', Listen => 5) or die;\n\
         sleep 1 while 1;\n",
        host.dir.join("events")
    );
    let _by_port = Running(Command::new("/usr/bin/perl").args(["-e", &listener]).spawn().unwrap());
    host.until("it listens", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
    for (name, server) in [("a", &a), ("b", &b), ("c", &c)] {
        host.register(name, server.0.id());
    }

    let plan = host.json(&["drain", "--all", "--dry-run"]);
    let names = |stage: &Value| stage["services"][0]["name"].as_str().unwrap().to_owned();
    let order: Vec<String> = plan["stages"].as_array().unwrap().iter().map(names).collect();
    assert_eq!(order, ["c", "b", "a", "by-exe", "by-port", "by-pidfile"], "{plan}");
    assert!(host.events().is_empty(), "nothing happens in a dry run");

    let report = host.json(&["drain", "--all", "--deadline", "60s"]);
    let expected = ["c", "b", "a", "by-port", "by-pidfile"];
    let expected: Vec<String> =
        expected.iter().flat_map(|name| [format!("{name} TERM"), format!("{name} gone")]).collect();
    assert_eq!(host.events(), expected, "each after the one before is gone: {report}");
    for service in report["services"].as_array().unwrap() {
        assert_eq!(service["verdict"], "clean", "{service}");
    }
    assert_eq!(report["journal"], "kept");
    assert!(!host.dir.0.join("run/drain.journal").exists());
    let metric = "plumb_drains_total{outcome=\"clean\",service=\"b\"} 1";
    assert!(host.json(&["drain", "--last"])["id"] == report["id"], "{metric}");
}

#[test]
fn what_may_not_be_is_refused_with_its_reason() {
    let host = Host::new("[[service]]\nname = 'config'\nport = 1\nsignal = 'TERM'\n");
    let (server, other) = (host.server("server", "0"), host.server("other", "0"));
    host.register("server", server.0.id());
    let add = |arguments: &[&str]| host.refused(&[&["services", "add"], arguments].concat());
    assert!(add(&["other", "--pid", &pid(&other)]).contains("does not guess"));
    assert!(add(&["other", "--pid", &pid(&other), "--preset", "iis"]).contains("no preset"));
    assert!(
        add(&["other", "--pid", "1", "--signal", "TERM"])
            .contains("first process of the host, which plumb signals for nobody")
    );
    let agent = host.agent.as_ref().unwrap().0.id().to_string();
    assert!(add(&["other", "--pid", &agent, "--signal", "TERM"]).contains("plumb itself"));
    assert!(add(&["server", "--pid", &pid(&other), "--signal", "TERM"]).contains("duplicate"));
    assert!(add(&["config", "--pid", &pid(&other), "--signal", "TERM"]).contains("duplicate"));
    assert!(
        add(&["other", "--pid", &pid(&other), "--signal", "TERM", "--after", "nobody"])
            .contains("unknown-after")
    );
    assert!(
        add(&["server", "--pid", &pid(&server), "--signal", "TERM", "--after", "server"]).contains("cycle")
    );
    assert!(host.refused(&["drain", "nobody"]).contains("unknown-service"));
    assert!(host.refused(&["drain", "--cancel"]).contains("not-under-way"));

    // Who is not the administrator has his own processes, and no others.
    let program = host.dir.join("plumb");
    copy_program(plumb().get_program(), &program);
    let as_nobody = |script: &str| {
        let script = script.replace("plumb ", &format!("{program} "));
        let output = Command::new("setpriv")
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "/bin/sh", "-c", &script])
            .env("PLUMB_RUN_DIR", host.run_dir())
            .current_dir("/")
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout)
    };
    let mine = as_nobody("plumb services add mine --signal TERM; plumb services list; :");
    assert!(mine.contains("mine is registered") && !mine.contains("config"), "{mine}");
    let theirs = as_nobody(&format!("plumb services add theirs --signal TERM --pid {}; :", pid(&other)));
    assert!(theirs.contains("not-your-process"), "{theirs}");
    for what in ["drain server", "services rm server", "drain config"] {
        let refused = as_nobody(&format!("plumb {what}; :"));
        assert!(refused.contains("not-yours"), "{refused}");
    }
    let body = format!("{{\"pid\": {}}}", pid(&other));
    let request = format!(
        r#"use IO::Socket::UNIX;
        my $s = IO::Socket::UNIX->new("{}/services.sock") or die $!;
        print $s join("\r\n", "PUT /v1/services/x HTTP/1.1", "Host: plumb", "Content-Type: application/json",
            "Content-Length: {}", "Connection: close", "", '{body}');
        $s->flush;
        print <$s>;"#,
        host.run_dir(),
        body.len()
    );
    fs::write(host.dir.0.join("bare.pl"), request).unwrap();
    let bare = as_nobody(&format!("/usr/bin/perl {}; :", host.dir.join("bare.pl")));
    assert!(bare.contains("bare-pid"), "{bare}");
    // His registration ended with his shell.
    host.until("it is gone", || {
        !String::from_utf8_lossy(&host.plumb(&["services", "list"]).stdout).contains("mine")
    });
    assert!(host.events().is_empty(), "nobody got a signal: {:?}", host.events());
    for (name, is_told) in [("config", true), ("server", false)] {
        let said = host.plumb(&["services", "rm", name]);
        let said = String::from_utf8_lossy(&said.stderr);
        assert!(
            said.contains("not registered any more") && said.contains("in the settings") == is_told,
            "{said}"
        );
    }
    assert!(host.log().contains("was refused"), "refusals are in the log");
}

#[test]
fn what_runs_another_program_or_does_not_stop_is_told() {
    let host = Host::new("");
    let ready = host.dir.join("go");
    let script = format!("while [ ! -e {ready} ]; do sleep 0.02; done; exec sleep 60");
    let changes = Running(Command::new("/bin/sh").args(["-c", &script]).spawn().unwrap());
    host.register("changes", changes.0.id());
    fs::write(&ready, "").unwrap();
    let listed = || String::from_utf8_lossy(&host.plumb(&["services", "list"]).stdout).into_owned();
    host.until("the registration has ended", || !listed().contains("changes"));
    let is_told = |line: &str| line.contains("WARN") && line.contains("runs another program now");
    assert!(host.log().lines().any(is_told), "{}", host.log());

    let is_deaf = host.dir.join("deaf");
    let deaf = Running(
        Command::new("/bin/sh")
            .args(["-c", &format!("trap '' TERM; : > {is_deaf}; while :; do sleep 0.1; done")])
            .spawn()
            .unwrap(),
    );
    let slow = host.server("slow", "30");
    host.until("it ignores the signal", || fs::exists(&is_deaf).unwrap());
    host.register("deaf", deaf.0.id());
    let add = [
        "services",
        "add",
        "slow",
        "--pid",
        &pid(&slow),
        "--signal",
        "TERM",
        "--kill",
        "--deadline",
        "500ms",
    ];
    assert!(host.plumb(&add).status.success());
    let output = host.plumb(&["drain", "--all", "--deadline", "5s", "-o", "json"]);
    assert_eq!(output.status.code(), Some(124));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let verdict = |name: &str| {
        let services = report["services"].as_array().unwrap();
        services.iter().find(|one| one["name"] == name).unwrap()["verdict"].as_str().unwrap().to_owned()
    };
    assert_eq!((verdict("deaf"), verdict("slow")), ("refused".to_owned(), "killed".to_owned()), "{report}");
    assert!(Path::new(&format!("/proc/{}", deaf.0.id())).exists(), "it was not signalled");
    let said = |verdict: &str| host.log().lines().any(|line| line.contains("WARN") && line.contains(verdict));
    assert!(said("refused: process") && said("killed: "), "{}", host.log());
    assert!(Path::new(&format!("/proc/{}", changes.0.id())).exists());
}

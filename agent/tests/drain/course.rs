//! The course of a drain beyond the order: side by side, with too little time, cancelled, joined, with a prestop command,
//! below a supervisor.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    process::{Command, Stdio},
};

use rustix::process::Signal;
use serde_json::{Value, json};

use super::{
    Host,
    client::Client,
    pid,
    support::{Running, copy_program, plumb},
};

impl Host {
    fn admin(&self) -> Client {
        Client::connect(&self.run_dir())
    }

    /// Registers a process as the API does, with what else is wished.
    pub(super) fn add(&self, name: &str, pid: u32, wish: Value) {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let ticks = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap();
        let mut wish = wish;
        wish["process"] = json!({ "pid": pid, "start_ticks": ticks.parse::<u64>().unwrap() });
        wish["signal"] = json!("TERM");
        let (status, answer) = self.admin().ask("PUT", &format!("/v1/services/{name}"), Some(&wish));
        assert_eq!(status, 200, "{answer}");
    }
}

fn service<'a>(report: &'a Value, name: &str) -> &'a Value {
    report["services"].as_array().unwrap().iter().find(|one| one["name"] == name).unwrap()
}

#[test]
fn what_a_supervisor_starts_again_is_called_restarted() {
    let host = Host::new("");
    let number = host.dir.join("number");
    // It is there again before anybody can look.
    let server = format!(
        "trap 'exit 0' TERM; echo $$ > {number}.new; mv {number}.new {number}; \
                          while :; do sleep 0.02; done"
    );
    let script = format!("while :; do /bin/sh -c \"{}\" server; done", server.replace('$', "\\$"));
    let _supervisor = Running(Command::new("/bin/sh").args(["-c", &script]).spawn().unwrap());
    let running = || fs::read_to_string(&number).unwrap_or_default().trim().parse::<u32>().ok();
    host.until("it runs", || running().is_some());
    let first = running().unwrap();
    host.register("server", first);
    let report = host.json(&["drain", "--all", "--deadline", "20s"]);
    let again = running().unwrap();
    assert_ne!(first, again);
    let server = service(&report, "server");
    assert_eq!(server["verdict"], "restarted", "{report:#}");
    assert!(server["why"].as_str().unwrap().contains(&again.to_string()), "{report:#}");
    // The last of its kind: the supervisor is gone before it.
    drop(_supervisor);
    let last = rustix::process::Pid::from_raw(i32::try_from(again).unwrap()).unwrap();
    let last = rustix::process::pidfd_open(last, rustix::process::PidfdFlags::empty()).unwrap();
    rustix::process::pidfd_send_signal(last, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn what_another_one_of_its_kind_starts_does_not_run_in_its_place() {
    let host = Host::new("");
    // A fork of a shell has its arguments, too.
    let script = format!(
        "trap 'exit 0' TERM; trap '(sleep 6; :) & echo >> {0}' USR1; echo >> {0}; while :; do sleep 0.02; done",
        host.dir.join("lines")
    );
    let start = || Running(Command::new("/bin/sh").args(["-c", &script, "kind"]).spawn().unwrap());
    let lines = || fs::read_to_string(host.dir.join("lines")).unwrap_or_default().lines().count();
    let (mut server, other) = (start(), start());
    host.until("both are ready", || lines() == 2);
    host.register("server", server.0.id());
    let mut drain = plumb();
    drain.args(["drain", "--all"]).env("PLUMB_RUN_DIR", host.run_dir()).stdout(Stdio::null());
    let mut drain = Running(drain.spawn().unwrap());
    server.0.wait().unwrap();
    other.signal(Signal::USR1);
    host.until("the other one has started another", || lines() == 3);
    assert_eq!(drain.0.wait().unwrap().code(), Some(0));
    assert_eq!(service(&host.json(&["drain", "--last"]), "server")["verdict"], "clean");
}

#[test]
fn who_kills_a_registered_process_is_in_the_log_also_without_a_drain() {
    let host = Host::new("");
    let server = host.server("server", "0");
    host.register("server", server.0.id());
    server.signal(Signal::KILL);
    host.until("it is in the log", || host.log().contains("sends KILL to a service"));
    assert!(host.log().contains(&format!("pid {} (", std::process::id())), "{}", host.log());
}

#[test]
fn what_does_not_run_is_left_no_time() {
    let absent = ["a", "b", "c"].map(|name| {
        format!("[[service]]\nname = '{name}'\npidfile = '/run/nobody-{name}.pid'\nsignal = 'TERM'\n")
    });
    let host = Host::new(&absent.concat());
    let server = host.server("server", "0");
    host.register("server", server.0.id());
    let plan = host.json(&["drain", "--all", "--deadline", "20s", "--dry-run"]);
    let seconds = |stage: usize| plan["stages"][stage]["services"][0]["seconds"].as_f64().unwrap();
    assert_eq!([0, 1, 2, 3].map(seconds), [20.0, 0.0, 0.0, 0.0], "{plan:#}");
    let report = host.json(&["drain", "--all", "--deadline", "20s"]);
    assert!(service(&report, "server")["granted_seconds"].as_f64() > Some(19.0), "{report:#}");
    assert_eq!(service(&report, "a")["verdict"], "clean");
}

#[test]
fn services_that_wait_for_nobody_stop_side_by_side() {
    let host = Host::new("");
    let (a, b) = (host.server("a", "3"), host.server("b", "3"));
    host.add("a", a.pid(), json!({ "after": [] }));
    host.add("b", b.pid(), json!({ "after": [] }));
    let report = host.json(&["drain", "--all", "--deadline", "20s"]);
    let events = host.events();
    let (asked, gone) = events.split_at(2);
    assert!(asked.iter().all(|event| event.ends_with("TERM")), "{events:?}");
    assert!(gone.iter().all(|event| event.ends_with("gone")), "{events:?}");
    assert_eq!(report["stages"].as_array().unwrap().len(), 1, "{report:#}");
}

#[test]
fn too_little_time_in_all_shortens_everybody_and_is_said() {
    let host = Host::new("");
    let (first, second) = (host.server("first", "0"), host.server("second", "30"));
    host.add("second", second.pid(), json!({ "deadline": "8s" }));
    host.add("first", first.pid(), json!({ "deadline": "24s" }));
    let output = host.plumb(&["drain", "--all", "--deadline", "4s", "-o", "json"]);
    assert_eq!(output.status.code(), Some(124));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let note = |name: &str| service(&report, name)["notes"].to_string();
    assert!(note("first").contains("shortened from 24s to 2s"), "{report:#}");
    // The first has left it most of its time.
    assert!(note("second").contains("shortened from 8s to "), "{report:#}");
    assert_eq!(service(&report, "second")["verdict"], "timeout", "{report:#}");
    assert_eq!(host.events(), ["first TERM", "first gone", "second TERM"], "it was not ended by force");
}

#[test]
fn a_drain_that_is_cancelled_begins_no_other_stage_and_another_one_joins_it_before() {
    let host = Host::new("");
    let (first, second) = (host.server("first", "15"), host.server("second", "0"));
    host.add("second", second.pid(), json!({}));
    host.add("first", first.pid(), json!({}));
    let mut admin = host.admin();
    let (status, begun) = admin.ask("POST", "/v1/drain", Some(&json!({ "all": true, "deadline": "60s" })));
    assert_eq!(status, 202, "{begun}");
    // Whoever asks for what is under way is told of that.
    for services in [json!({ "all": true }), json!({ "services": ["second"] })] {
        let (status, joined) = admin.ask("POST", "/v1/drain", Some(&services));
        assert_eq!((status, &joined["id"]), (202, &begun["id"]), "{joined}");
        assert_eq!((&begun["joined"], &joined["joined"]), (&json!(false), &json!(true)));
    }
    let other = host.server("other", "0");
    host.add("other", other.pid(), json!({}));
    let (status, refused) = admin.ask("POST", "/v1/drain", Some(&json!({ "all": true })));
    assert_eq!((status, &refused["code"]), (409, &json!("under-way")), "{refused}");

    assert!(host.plumb(&["drain", "--cancel"]).status.success());
    let report = admin.drain_when(|drain| drain["state"] == "finished");
    assert_eq!((&report["id"], &report["cancelled"]), (&begun["id"], &json!(true)), "{report:#}");
    assert_eq!(service(&report, "first")["verdict"], "clean", "{report:#}");
    assert_eq!(service(&report, "second")["verdict"], "refused", "{report:#}");
    assert!(service(&report, "second")["why"].to_string().contains("cancelled"), "{report:#}");
    assert_eq!(host.events(), ["first TERM", "first gone"]);
}

/// A shell of a user who is not the administrator.
fn as_nobody(host: &Host, script: &str) -> Running {
    let program = host.dir.join("plumb");
    if !fs::exists(&program).unwrap() {
        copy_program(plumb().get_program(), &program);
    }
    let script = script.replace("plumb ", &format!("{program} "));
    let mut shell = Command::new("setpriv");
    shell.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "/bin/sh", "-c", &script]);
    shell.env("PLUMB_RUN_DIR", host.run_dir()).current_dir("/");
    Running(shell.stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap())
}

#[test]
fn a_user_does_not_hold_up_the_administrator() {
    let host = Host::new("");
    let events = host.dir.join("events");
    fs::write(&events, "").unwrap();
    fs::set_permissions(&events, fs::Permissions::from_mode(0o666)).unwrap();
    let script = format!(
        "trap 'echo hog TERM >> {events}' TERM; plumb services add hog --signal TERM --deadline 1h; \
         while :; do sleep 0.05; done"
    );
    let _hog = as_nobody(&host, &script);
    let listed = || String::from_utf8_lossy(&host.plumb(&["services", "list"]).stdout).into_owned();
    host.until("it is registered", || listed().contains("hog"));
    let web = host.server("web", "0.1");
    host.register("web", web.pid());
    let asked = || host.events().iter().filter(|event| *event == "hog TERM").count();
    let told = host.dir.join("told");
    fs::write(&told, "").unwrap();
    fs::set_permissions(&told, fs::Permissions::from_mode(0o666)).unwrap();
    let drains = |times: usize| {
        let drain = as_nobody(&host, &format!("plumb drain hog --deadline 1h > {told}; echo $? >> {told}"));
        host.until("it is asked to stop", || asked() == times);
        drain
    };

    let _first = drains(1);
    let report = host.json(&["drain", "web", "--deadline", "20s"]);
    assert_eq!(service(&report, "web")["verdict"], "clean", "{report:#}");
    let kept = || -> Vec<Value> {
        let files = fs::read_dir(host.dir.0.join("state/drains")).unwrap();
        let users = files.map(|file| file.unwrap().path());
        let users = users.filter(|path| path.to_string_lossy().ends_with(".user.json"));
        users.map(|path| serde_json::from_slice(&fs::read(path).unwrap()).unwrap()).collect()
    };
    let [given_up] = &kept()[..] else { panic!("{:#?}", kept()) };
    assert_eq!(given_up["given_up"], "the administrator drains", "{given_up:#}");
    let hog = service(given_up, "hog");
    assert_eq!((&hog["verdict"], &hog["phase"]), (&json!("timeout"), &json!("late")), "{given_up:#}");
    assert!(hog["notes"].to_string().contains("given up: the administrator drains"), "{given_up:#}");

    // And he is told, although another drain has begun by then.
    let text = || fs::read_to_string(&told).unwrap();
    host.until("he is told", || text().ends_with("124\n"));
    assert!(text().contains("given up: the administrator drains"), "{}", text());

    let _second = drains(2);
    let said = host.plumb(&["drain", "--cancel"]);
    assert!(String::from_utf8_lossy(&said.stderr).contains("it is given up"), "{said:?}");
    assert_eq!(kept().len(), 2);

    // One of the same service that would take an hour; nobody gets its signal twice.
    let _third = drains(3);
    let output = host.plumb(&["drain", "--all", "--deadline", "2s", "-o", "json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let hog = service(&report, "hog");
    assert_eq!((&hog["verdict"], &hog["signals"]), (&json!("timeout"), &json!(["TERM"])), "{report:#}");
    assert!(hog["notes"].to_string().contains("TERM was sent by the drain before"), "{report:#}");
    assert!(hog["notes"].to_string().contains("shortened from 3600s to 2s"), "{report:#}");
    assert_eq!((asked(), kept().len()), (3, 3));

    // The administrator asks by USR1, too.
    let _fourth = drains(4);
    host.agent.as_ref().unwrap().signal(rustix::process::Signal::USR1);
    host.until("it is given up", || kept().len() == 4);
    host.admin().drain_when(|drain| drain["trigger"] == "USR1");
    assert_eq!(asked(), 4);
}

#[test]
fn a_drain_is_clean_when_it_is_over_and_not_before() {
    let host = Host::new("");
    let web = host.server("web", "0.1");
    host.register("web", web.pid());
    let mut admin = host.admin();
    let (status, begun) = admin.ask("POST", "/v1/drain", Some(&json!({ "all": true, "deadline": "20s" })));
    assert_eq!(status, 202, "{begun}");
    for state in ["ended", "finished"] {
        admin.drain_when(|drain| drain["state"] == state);
        let last = host.plumb(&["drain", "--last", "-o", "json"]);
        // On a slow machine it is over by now.
        let report: Value = serde_json::from_slice(&last.stdout).unwrap();
        let is_over = report["state"] == "finished";
        assert_eq!(last.status.code(), Some(i32::from(!is_over)), "{report:#}");
    }
}

#[test]
fn a_user_does_not_end_the_watch_over_what_the_administrator_has_drained() {
    let host = Host::new("");
    // There are five seconds for it later.
    drop(as_nobody(&host, "true"));
    let web = host.server("web", "0.1");
    host.register("web", web.pid());
    let mut admin = host.admin();
    let (status, begun) = admin.ask("POST", "/v1/drain", Some(&json!({ "all": true, "deadline": "20s" })));
    assert_eq!(status, 202, "{begun}");
    let told = host.dir.join("told");
    let drains = || {
        fs::write(&told, "").unwrap();
        fs::set_permissions(&told, fs::Permissions::from_mode(0o666)).unwrap();
        let _shell =
            as_nobody(&host, &format!("plumb drain --all > {told} 2>&1; echo $? >> {told}; sleep 60"));
        let text = || fs::read_to_string(&told).unwrap();
        host.until("he is told", || text().ends_with("0\n") || text().ends_with("1\n"));
        text()
    };
    admin.drain_when(|drain| drain["state"] == "ended");
    // Within the five seconds.
    let refused = drains();
    assert!(refused.contains("under-way") && refused.ends_with("1\n"), "{refused}");
    let report = admin.drain_when(|drain| drain["state"] == "finished");
    let notes = service(&report, "web")["notes"].to_string();
    assert!(!notes.contains("not watched"), "{report:#}");

    // Nothing of his is there to be drained, and nobody looks back at that.
    assert!(drains().ends_with("0\n"));
    let last = host.plumb(&["drain", "--last", "-o", "json"]);
    let last: Value = serde_json::from_slice(&last.stdout).unwrap();
    assert_eq!((&last["id"], &last["services"][0]["name"]), (&begun["id"], &json!("web")));
}

#[test]
fn prestop_runs_before_the_signal_and_what_it_says_is_told() {
    let dir = super::support::TempDir::new();
    let (pidfile, events) = (dir.join("pid"), dir.join("events"));
    let settings = format!(
        "[[service]]\nname = 'web'\npidfile = '{pidfile}'\nsignal = 'TERM'\n\
         prestop = 'echo prestop >> {events}; sleep 0.3; exit 3'\n"
    );
    let host = Host::new(&settings);
    fs::remove_file(&events).unwrap_or_default();
    std::os::unix::fs::symlink(&events, host.dir.0.join("events")).unwrap();
    let web = host.server("web", "0.1");
    fs::write(&pidfile, pid(&web)).unwrap();
    let plan = host.json(&["drain", "web", "--dry-run"]);
    let notes = plan["stages"][0]["services"][0]["notes"].to_string();
    assert!(notes.contains("prestop runs before: echo prestop"), "{plan:#}");
    let report = host.json(&["drain", "web", "--deadline", "20s"]);
    assert_eq!(host.events(), ["prestop", "web TERM", "web gone"], "{report:#}");
    let web = service(&report, "web");
    assert_eq!(web["verdict"], "clean", "{report:#}");
    assert!(web["notes"].to_string().contains("prestop failed (exit status: 3)"), "{report:#}");
}

#[test]
fn what_a_service_says_of_its_requests_counts() {
    let host = Host::new("");
    let (busy, idle) = (host.server("busy", "0.1"), host.server("idle", "0.1"));
    let says = |name: &str, requests: i64| {
        let path = format!("/v1/services/{name}/in-flight");
        host.admin().ask("PUT", &path, Some(&json!({ "requests": requests }))).0
    };
    assert_eq!(says("busy", 3), 404);
    for (name, server) in [("busy", &busy), ("idle", &idle)] {
        host.register(name, server.pid());
        assert_eq!(says(name, 3), 204);
    }
    assert_eq!((says("idle", 0), says("idle", -1)), (204, 400));
    let report = host.json(&["drain", "--all", "--deadline", "20s"]);
    for (name, verdict, requests) in [("busy", "lossy", 3), ("idle", "clean", 0)] {
        let service = service(&report, name);
        assert_eq!(
            (&service["verdict"], &service["in_flight"]),
            (&json!(verdict), &json!(requests)),
            "{report}"
        );
    }
}

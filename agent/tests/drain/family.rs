//! What the processes of a service have started belongs to it: it is waited for, what it loses is told, and it gets no
//! signal.

use std::{
    io::{Read, Write},
    net::TcpStream,
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    thread::sleep,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;

use super::{
    Host,
    support::{TempDir, free_port},
};

/// A program whose process group ends with it.
struct Group(std::process::Child);

impl Group {
    /// Returns when it has printed a line.
    fn python(script: &str) -> Self {
        let mut python = Command::new("/usr/bin/python3");
        let python = python.args(["-c", script]).process_group(0).stdout(Stdio::piped());
        let mut group = Self(python.spawn().unwrap());
        group.0.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        group
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let group = Pid::from_raw(self.0.id().cast_signed()).unwrap();
        let _ = kill_process_group(group, Signal::KILL);
        let _ = self.0.wait();
    }
}

/// A parent whose child accepts, reads and takes its time; `parent` is what it does then.
fn wrapped(port: u16, parent: &str) -> Group {
    Group::python(&format!(
        "import os, signal, socket, sys, time, threading\n\
         child = os.fork()\n\
         if child == 0:\n\
         \x20   s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n\
         \x20   s.bind(('127.0.0.1', {port})); s.listen(); print(flush=True)\n\
         \x20   def serve(c):\n\
         \x20       c.recv(99); time.sleep(60)\n\
         \x20   while True: threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()\n\
         {parent}\n\
         while True: time.sleep(60)\n"
    ))
}

fn service<'a>(report: &'a Value, name: &str) -> &'a Value {
    report["services"].as_array().unwrap().iter().find(|service| service["name"] == name).unwrap()
}

fn is_alive(pid: u64) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z")
}

#[test]
fn what_the_child_of_a_service_loses_the_service_loses() {
    let (host, port) = (Host::new(""), free_port());
    let forwards = "def stop(*_): os.kill(child, signal.SIGTERM); os.wait(); sys.exit(0)\n\
                    signal.signal(signal.SIGTERM, stop)";
    let server = wrapped(port, forwards);
    host.register("web", server.pid());
    let plan = host.json(&["drain", "web", "--dry-run"]);
    assert!(plan.to_string().contains("1 process that it has started is waited for"), "{plan}");
    assert!(plan.to_string().contains(&format!("listens on 127.0.0.1:{port}")), "{plan}");
    let clients: Vec<TcpStream> = (0..4)
        .map(|_| {
            let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
            client.write_all(b"request").unwrap();
            client
        })
        .collect();
    sleep(Duration::from_secs(2));
    let report = host.json(&["drain", "web", "--deadline", "30s"]);
    let web = service(&report, "web");
    assert_eq!(web["verdict"], "lossy", "{web:#}");
    assert_eq!(web["lost_requests"], serde_json::json!({ "unanswered": 4 }), "{web:#}");
    drop(clients);
}

#[test]
fn a_service_whose_child_serves_on_has_not_stopped_and_the_child_gets_no_signal() {
    for kill in [&[][..], &["--kill"]] {
        let (host, port) = (Host::new(""), free_port());
        let server = wrapped(port, "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))");
        let pid = server.pid().to_string();
        let add = ["services", "add", "web", "--pid", &pid, "--signal", "TERM", "--deadline", "1s"];
        assert!(host.plumb(&[&add[..], kill].concat()).status.success());
        let report = host.json(&["drain", "web", "--deadline", "30s"]);
        let web = service(&report, "web");
        assert_eq!(web["verdict"], "timeout", "{web:#}");
        assert_eq!((&web["left"], &web["signals"]), (&1.into(), &serde_json::json!(["TERM"])), "{web:#}");
        let child = web["pids"][1].as_u64().unwrap();
        assert!(is_alive(child) && TcpStream::connect(("127.0.0.1", port)).is_ok());
    }
}

#[test]
fn what_a_service_starts_when_it_is_asked_to_stop_is_waited_for() {
    let host = Host::new("");
    let script = "import os, signal, sys, time\n\
                  def stop(*_):\n\
                  \x20   if os.fork() == 0: time.sleep(1)\n\
                  \x20   os._exit(0)\n\
                  signal.signal(signal.SIGTERM, stop); print(flush=True)\n\
                  while True: time.sleep(60)";
    let server = Group::python(script);
    host.register("job", server.pid());
    let report = host.json(&["drain", "job", "--deadline", "30s"]);
    let job = service(&report, "job");
    assert_eq!(job["verdict"], "clean", "{job:#}");
    assert_eq!(job["pids"].as_array().unwrap().len(), 2, "{job:#}");
    assert!(job["seconds"].as_f64().unwrap() >= 0.9, "{job:#}");
}

#[test]
fn a_crash_of_what_a_service_starts_when_it_is_asked_to_stop_is_told() {
    let host = Host::new("");
    let script = "import os, signal, time\n\
                  def stop(*_):\n\
                  \x20   if os.fork() == 0: os.kill(os.getpid(), signal.SIGSEGV)\n\
                  \x20   os.wait(); os._exit(0)\n\
                  signal.signal(signal.SIGTERM, stop); print(flush=True)\n\
                  while True: time.sleep(60)";
    let server = Group::python(script);
    host.register("job", server.pid());
    let report = host.json(&["drain", "job", "--deadline", "30s"]);
    let job = service(&report, "job");
    let why = "a process that it had started died of SEGV";
    assert_eq!((&job["verdict"], &job["why"]), (&"lossy".into(), &why.into()), "{job:#}");
}

/// A deploy has begun before the old one is gone.
#[test]
fn who_takes_the_place_of_a_service_meanwhile_is_told_and_gets_no_signal() {
    let dir = TempDir::new();
    let pidfile = dir.join("pid");
    let settings = format!(
        "[[service]]\nname = 'web'\npidfile = '{pidfile}'\nsignal = 'TERM'\ndeadline = '3s'\non_deadline = 'kill'\n"
    );
    let host = Host::new(&settings);
    let old = host.server("old", "1");
    std::fs::write(&pidfile, old.0.id().to_string()).unwrap();
    let drain = || host.json(&["drain", "web", "--deadline", "20s"]);
    let (report, new) = std::thread::scope(|scope| {
        let report = scope.spawn(drain);
        host.until("the old one is asked to stop", || host.events() == ["old TERM"]);
        let new = host.server("new", "0");
        std::fs::write(&pidfile, new.0.id().to_string()).unwrap();
        (report.join().unwrap(), new)
    });
    let web = service(&report, "web");
    assert_eq!(web["verdict"], "restarted", "{web:#}");
    assert!(web["why"].to_string().contains(&format!("pid {}", new.0.id())), "{web:#}");
    assert_eq!(host.events(), ["old TERM", "old gone"]);
    assert!(is_alive(new.0.id().into()));
}

#[test]
fn a_process_that_two_services_name_gets_one_signal_and_what_one_has_started_may_be_another() {
    let host = Host::new("");
    let (a, b) = (host.server("a", "0.1"), host.server("b", "0.1"));
    host.register("a", a.0.id());
    host.register("again", a.0.id());
    host.register("b", b.0.id());
    let report = host.json(&["drain", "--all", "--deadline", "30s"]);
    assert_eq!(service(&report, "a")["verdict"], "clean", "{report:#}");
    let again = service(&report, "again");
    assert_eq!(again["verdict"], "refused", "{again:#}");
    assert!(again["why"].as_str().unwrap().contains("is that of a, too"), "{again:#}");
    assert_eq!(host.events().iter().filter(|event| *event == "a TERM").count(), 1);

    // The child is a service that stops after its parent.
    let script = "import os, signal, sys, time\n\
                  signal.signal(signal.SIGTERM, lambda *_: os._exit(0))\n\
                  child = os.fork()\n\
                  if child: print(child, flush=True)\n\
                  while True: time.sleep(60)";
    let mut python = Command::new("/usr/bin/python3");
    let mut parent =
        Group(python.args(["-c", script]).process_group(0).stdout(Stdio::piped()).spawn().unwrap());
    let mut child = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(parent.0.stdout.as_mut().unwrap()), &mut child)
        .unwrap();
    host.register("child", child.trim().parse().unwrap());
    host.register("parent", parent.pid());
    let report = host.json(&["drain", "parent", "child", "--deadline", "20s"]);
    for name in ["parent", "child"] {
        let service = service(&report, name);
        assert_eq!(service["verdict"], "clean", "{service:#}");
        assert_eq!(service["pids"].as_array().unwrap().len(), 1, "{service:#}");
        assert!(service["seconds"].as_f64().unwrap() < 5.0, "{service:#}");
    }
}

//! `plumb audit` and what a drain tells of what it gives up: real processes that handle a signal, ignore it, block it, or go
//! on as if there had been none.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    thread,
    time::Duration,
};

use serde_json::Value;

use super::{
    Host, pid,
    support::{Running, plumb, plumb_json},
};

/// A server with threads of three types: one accepts, some wait at different places, and `deaf` ones open files. It says its
/// port when all of that is so.
const SERVER: &str = r#"
import ctypes, os, select, signal, socket, subprocess, sys, threading, time
kind, term = sys.argv[1], signal.SIGTERM
def signalfd(mask):
    signal.pthread_sigmask(signal.SIG_BLOCK, [term])
    ctypes.CDLL(None).signalfd(-1, (ctypes.c_ulong * 16)(mask), 0)
def stop(*_):
    listener.close()
    time.sleep(0.2)
    sys.exit(0)
{
    'handler': lambda: signal.signal(term, stop),
    'deaf': lambda: signal.signal(term, lambda *_: None),
    'ignored': lambda: signal.signal(term, signal.SIG_IGN),
    'default': lambda: None,
    'blocked': lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [term]),
    'signalfd': lambda: signalfd(1 << 14),
    'other-signalfd': lambda: signalfd(1 << 9),
    'awaited': lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [term]),
}[kind]()
listener = socket.create_server(('127.0.0.1', 0))
reads, writes = os.pipe()
lock = threading.Lock()
lock.acquire()
ready = threading.Semaphore(0)
def named(name, work):
    def run():
        ctypes.CDLL(None).prctl(15, name.encode(), 0, 0, 0)
        ready.release()
        work()
    threading.Thread(target=run, daemon=True).start()
def accepts():
    while True:
        listener.accept()[0].close()
def opens():
    while True:
        open('/dev/null').close()
        time.sleep(0.01)
waits = [lambda: lock.acquire(), lambda: os.read(reads, 1), lambda: select.select([reads], [], [])]
works = [('waits-%d' % at, waits[at % 3]) for at in range(9)]
if kind == 'deaf':
    works += [('accepts', accepts), ('opens', opens)]
for name, work in works:
    named(name, work)
child = subprocess.Popen(['sleep', '60'], preexec_fn=lambda: ctypes.CDLL(None).prctl(1, 9)) if kind == 'default' else None
for _ in works:
    ready.acquire()
print(listener.getsockname()[1], flush=True)
if kind == 'awaited':
    signal.sigwait([term])
    sys.exit(0)
while True:
    time.sleep(1)
"#;

/// And its port.
fn server(kind: &str) -> (Running, u16) {
    // Each has arguments of its own: by these a process is known that was started again.
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Relaxed));
    let mut server = Command::new("/usr/bin/python3");
    server.args(["-", kind, &number]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut server = Running(server.spawn().unwrap());
    server.0.stdin.take().unwrap().write_all(SERVER.as_bytes()).unwrap();
    let mut line = String::new();
    BufReader::new(server.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    (server, line.trim().parse().unwrap_or_else(|_| panic!("{kind} has not started: {line:?}")))
}

fn audit(server: &Running, more: &[&str]) -> Output {
    plumb().args(["audit", "--pid", &pid(server)]).args(more).output().unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)))
}

/// Connects again and again while something is done.
fn with_clients<T>(port: u16, work: impl FnOnce() -> T) -> T {
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Relaxed);
        }
    }
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Relaxed) {
                let _ = TcpStream::connect(("127.0.0.1", port));
                thread::sleep(Duration::from_millis(20));
            }
        });
        let _over = Over(&over);
        work()
    })
}

fn there(server: &mut Running) -> bool {
    server.0.try_wait().unwrap().is_none()
}

#[test]
fn an_audit_says_what_a_signal_would_do_and_sends_none() {
    for (kind, fate, code) in [
        ("handler", "handler", 0),
        ("awaited", "awaited", 0),
        ("ignored", "ignored", 1),
        ("default", "ends", 1),
        ("blocked", "blocked", 1),
        ("signalfd", "signalfd", 0),
        // It reads another signal.
        ("other-signalfd", "blocked", 1),
    ] {
        let (mut server, port) = server(kind);
        let _client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let output = audit(&server, &["-o", "json"]);
        let audit = json(&output);
        assert_eq!((&audit["fate"], output.status.code()), (&Value::from(fate), Some(code)), "{audit:#}");
        assert_eq!(audit["handled"], code == 0, "{audit:#}");
        assert!(audit["verdict"].as_str().unwrap().contains("TERM"), "{audit:#}");
        let listener = &audit["listeners"][0];
        assert_eq!(listener["address"], format!("127.0.0.1:{port}"), "{audit:#}");
        assert_eq!(listener["waiting"], 1, "nobody accepts: {audit:#}");
        let threads = &audit["threads"];
        assert_eq!(threads["count"], 10, "{audit:#}");
        assert_eq!(threads["types"][0]["name"], "waits", "{audit:#}");
        assert_eq!(threads["types"][0]["count"], 9, "{audit:#}");
        let threads = threads["threads"].as_array().unwrap();
        let waits = threads.iter().filter(|thread| thread["type"] == "waits");
        let places: BTreeSet<&str> = waits.filter_map(|thread| thread["wait_channel"].as_str()).collect();
        assert_eq!(places.len(), 3, "a lock, a pipe and select: {audit:#}");
        assert_eq!(audit["children_count"], u32::from(kind == "default"), "{audit:#}");
        // Whatever is sent would have come by the next look.
        assert!(there(&mut server), "{kind} was only looked at");
        let status = fs::read_to_string(format!("/proc/{}/status", pid(&server))).unwrap();
        let pending =
            status.lines().filter(|line| line.starts_with("SigPnd:") || line.starts_with("ShdPnd:"));
        assert!(pending.into_iter().all(|line| line.ends_with("0000000000000000")), "{kind}: {status}");
    }
}

#[test]
fn connections_of_workers_are_told_beside_those_of_their_master() {
    const MASTER: &str = r"import os, signal, socket
listener = socket.create_server(('127.0.0.1', 0))
print(listener.getsockname()[1], flush=True)
both = listener.accept()[0]
for _ in range(2):
    if os.fork() == 0:
        import ctypes
        ctypes.CDLL(None).prctl(1, 9)
        own = listener.accept()[0]
        os.write(1, b'ready\n')
        signal.pause()
signal.pause()";
    let mut master = Command::new("/usr/bin/python3");
    let mut master = Running(master.args(["-c", MASTER]).stdout(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(master.0.stdout.take().unwrap()).lines().map(Result::unwrap);
    let port: u16 = lines.next().unwrap().parse().unwrap();
    let _clients = [(); 3].map(|()| TcpStream::connect(("127.0.0.1", port)).unwrap());
    assert_eq!(lines.by_ref().take(2).collect::<Vec<_>>(), ["ready", "ready"]);
    let audit = json(&audit(&master, &["-o", "json"]));
    assert_eq!((&audit["connections"], &audit["children_connections"]), (&1.into(), &2.into()), "{audit:#}");
    let text = String::from_utf8(self::audit(&master, &[]).stdout).unwrap();
    assert!(text.contains("its children have 2 TCP connections of their own"), "{text}");
}

#[test]
fn another_signal_than_the_one_that_is_handled_is_judged_by_itself() {
    let (server, _) = server("handler");
    let output = audit(&server, &["--signal", "USR1", "-o", "json"]);
    let document = json(&output);
    assert_eq!((&document["fate"], output.status.code()), (&Value::from("ends"), Some(1)), "{document:#}");
    assert!(document["other_handlers"].as_array().unwrap().contains(&Value::from("TERM")), "{document:#}");
    // WINCH does nothing by default.
    assert_eq!(json(&audit(&server, &["--signal", "WINCH", "-o", "json"]))["fate"], "ignored");
    let text = String::from_utf8(audit(&server, &[]).stdout).unwrap();
    assert!(text.contains("a handler takes TERM") && text.contains("9 x waits"), "{text}");
    let command = plumb_json(&["audit", "--pid", &pid(&server)])["command"].as_str().unwrap().to_owned();
    assert!(command.len() < 1024, "it is cut: {command}");
}

#[test]
fn who_may_not_be_signalled_is_not_and_what_is_not_there_is_said() {
    let refused = |arguments: &[&str]| {
        let output = plumb().arg("audit").args(arguments).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    // The parent of that plumb.
    let own = std::process::id().to_string();
    for (number, why) in [("1", "first process of the host"), (own.as_str(), "has started plumb")] {
        let (code, said) = refused(&["--pid", number, "--send", "TERM"]);
        assert!(code == Some(1) && said.contains(why), "{said}");
    }
    let (mut server, _) = server("default");
    for send in ["KILL", "STOP", "15"] {
        assert_eq!(refused(&["--pid", &pid(&server), "--send", send]).0, Some(2), "{send}");
    }
    assert_eq!(refused(&["--pid", &pid(&server), "--for", "1s"]).0, Some(2), "nothing is followed");
    let (code, said) = refused(&["--pid", "4194305"]);
    assert!(code == Some(1) && said.contains("there is no process"), "{said}");
    let thread = fs::read_dir(format!("/proc/{}/task", pid(&server))).unwrap().last().unwrap().unwrap();
    let thread = thread.file_name().into_string().unwrap();
    let (code, said) = refused(&["--pid", &thread]);
    assert!(code == Some(1) && said.contains("is no process, but a thread"), "{said}");
    assert!(there(&mut server));
}

#[test]
fn what_stops_by_its_handler_is_followed_to_its_end() {
    let (mut server, port) = server("handler");
    let output = audit(&server, &["--send", "TERM", "--for", "60s", "-o", "json"]);
    let document = json(&output);
    let stop = &document["stop"];
    assert_eq!((output.status.code(), &stop["exit_code"]), (Some(0), &Value::from(0)), "{document:#}");
    assert_eq!(stop["is_there"], false);
    let told = stop["timeline"].to_string();
    for what in ["TERM is sent", "by a handler", &format!("port {port} is closed"), "is gone, exit code 0"] {
        assert!(told.contains(what), "{what}: {document:#}");
    }
    assert_eq!(server.0.wait().unwrap().code(), Some(0));
}

#[test]
fn what_a_signal_ends_at_once_does_not_count_as_stopped() {
    let (mut server, _) = server("default");
    let output = audit(&server, &["--send", "TERM", "-o", "json"]);
    let document = json(&output);
    let stop = &document["stop"];
    assert_eq!((output.status.code(), &stop["exit_signal"]), (Some(1), &Value::from(15)), "{document:#}");
    assert!(stop["outcome"].as_str().unwrap().contains("ended by TERM"), "{document:#}");
    server.0.wait().unwrap();
}

#[test]
fn what_goes_on_accepting_and_opening_has_ignored_the_stop_and_its_other_threads_have_not() {
    let (mut server, port) = server("deaf");
    let (output, text) = with_clients(port, || {
        let output = audit(&server, &["--send", "TERM", "--for", "3s", "-o", "json"]);
        (output, audit(&server, &["--send", "TERM", "--for", "3s"]))
    });
    let document = json(&output);
    let stop = &document["stop"];
    assert_eq!(output.status.code(), Some(124), "{document:#}");
    assert_eq!((&stop["is_there"], &stop["ignored_the_stop"]), (&true.into(), &true.into()), "{document:#}");
    let left = &stop["left"][0];
    assert_eq!(left["count"], 12, "{document:#}");
    assert!(left["since_signal"]["accepted"].as_u64().unwrap() > 0, "{document:#}");
    for thread in left["threads"].as_array().unwrap() {
        let (kind, acts) = (thread["type"].as_str().unwrap(), &thread["since_signal"]);
        match kind {
            "accepts" => assert!(acts["accepted"].as_u64().unwrap() > 0, "{document:#}"),
            "opens" => assert!(acts["opened"].as_u64().unwrap() > 0, "{document:#}"),
            _ => assert_eq!(thread["ignored_the_stop"], false, "{document:#}"),
        }
        assert_eq!(thread["ignored_the_stop"], matches!(kind, "accepts" | "opens"), "{document:#}");
    }
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("it ignored the stop") && text.contains("1 x accepts"), "{text}");
    assert!(there(&mut server), "it was asked, and not ended");
}

#[test]
fn a_drain_tells_what_was_left_of_what_it_gives_up() {
    let host = Host::new("");
    let ((reported, port), (killed, _), (stops, _)) = (server("deaf"), server("deaf"), server("handler"));
    let add = |name: &str, server: &Running, more: &[&str]| {
        let mut arguments = vec!["services", "add", name, "--signal", "TERM"];
        let pid = pid(server);
        arguments.extend(["--pid", &pid]);
        arguments.extend(more);
        let output = host.plumb(&arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    add("reported", &reported, &["--deadline", "2s"]);
    add("killed", &killed, &["--deadline", "2s", "--kill"]);
    add("stops", &stops, &["--deadline", "20s"]);
    let output = with_clients(port, || host.plumb(&["drain", "--all", "--deadline", "60s", "-o", "json"]));
    assert_eq!(output.status.code(), Some(124));
    let report = json(&output);
    let service = |name: &str| {
        let services = report["services"].as_array().unwrap();
        services.iter().find(|one| one["name"] == name).unwrap()
    };
    assert_eq!(service("stops")["left_threads"].as_array().unwrap().len(), 0, "{report:#}");
    for (name, verdict) in [("reported", "timeout"), ("killed", "killed")] {
        let one = service(name);
        assert_eq!(one["verdict"], verdict, "{report:#}");
        assert!(one["why"].as_str().unwrap().contains("it ignored the stop"), "{report:#}");
        let left = &one["left_threads"][0];
        assert_eq!((&left["count"], &left["types"][0]["name"]), (&12.into(), &"waits".into()), "{report:#}");
        assert_eq!((&left["types"][0]["count"], &left["ignored_the_stop"]), (&9.into(), &true.into()));
        let threads = left["threads"].as_array().unwrap();
        let opens = threads.iter().find(|thread| thread["type"] == "opens").unwrap();
        assert!(opens["since_signal"]["opened"].as_u64().unwrap() > 0, "{report:#}");
        let waits = threads.iter().filter(|thread| thread["type"] == "waits");
        assert!(waits.clone().all(|thread| thread["ignored_the_stop"] == false), "{report:#}");
        let places: BTreeSet<&str> = waits.filter_map(|thread| thread["wait_channel"].as_str()).collect();
        assert_eq!(places.len(), 3, "{report:#}");
    }
    let text = String::from_utf8(host.plumb(&["drain", "--last"]).stdout).unwrap();
    for what in ["left just before it was given up", "9 x waits", "ignored the stop: opened"] {
        assert!(text.contains(what), "{what}: {text}");
    }
}

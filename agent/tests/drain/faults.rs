//! What goes wrong in a drain, on purpose: each fault is named in the report, each time.

use std::{
    env, fs,
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    os::fd::AsRawFd,
    path::PathBuf,
    process::{ChildStdout, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{Host, client::Client, support::Running};

/// How often each fault is played, unless `PLUMB_DRAIN_RUNS` says otherwise.
const RUNS: usize = 3;
const PATIENCE: Duration = Duration::from_secs(60);
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\n\r\n";

/// A server that does wrong what its first argument says.
const SERVER: &str = r#"
import signal, socket, sys, time
fault, clients = sys.argv[1], int(sys.argv[2])
listener = socket.create_server(("127.0.0.1", 0), backlog=3)
open_now = []

def wait(*_):
    while True: time.sleep(1)

def close_listener(*_):
    listener.close()
    sys.exit(0)

def close_all(*_):
    listener.close()
    for one in open_now: one.close()
    sys.exit(0)

def nothing(*_):
    pass

def take_memory(*_):
    taken = []
    while True: taken.append(b"x" * 1000000)

handlers = {"finishes never": wait, "closes the queue": close_listener, "does not read": close_all,
            "ignores the stop": nothing, "takes memory": take_memory}
if fault in handlers:
    signal.signal(signal.SIGTERM, handlers[fault])
print(listener.getsockname()[1], flush=True)
for _ in range(clients):
    one, _ = listener.accept()
    open_now.append(one)
    if fault != "does not read":
        one.recv(100)
print("ready", flush=True)
while True: time.sleep(1)
"#;

struct Server {
    process: Running,
    output: BufReader<ChildStdout>,
    port: u16,
}

impl Server {
    /// Of a name of its own: by its arguments one is known when it runs again.
    fn start(name: &str, host: &Host, fault: &str, accepts: usize) -> Self {
        let program = host.dir.join("server.py");
        fs::write(&program, SERVER).unwrap();
        let mut command = Command::new("python3");
        command.args([&program, fault, &accepts.to_string(), name]).stdout(Stdio::piped());
        let mut process = Running(command.spawn().unwrap());
        let mut output = BufReader::new(process.0.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        Self { process, output, port: line.trim().parse().unwrap() }
    }

    /// Has so many clients send a request each, until its kernel has all of them.
    fn asked(&self, clients: usize) -> Vec<TcpStream> {
        let clients = (0..clients).map(|_| {
            let mut client = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
            client.write_all(REQUEST).unwrap();
            is_delivered(&client);
            client
        });
        clients.collect()
    }

    fn is_ready(&mut self) {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
    }
}

fn is_delivered(client: &TcpStream) {
    let end = Instant::now() + PATIENCE;
    let mut left = 1;
    while left > 0 {
        // SAFETY: writes an int there.
        assert_eq!(unsafe { libc::ioctl(client.as_raw_fd(), libc::TIOCOUTQ, &raw mut left) }, 0);
        assert!(Instant::now() < end);
    }
}

/// Plays a fault some times with one agent: what the report says of the service must be this, each time.
fn play(fault: &str, [asks, accepts]: [usize; 2], expected: &Value, during: impl Fn(&Server, &Host)) {
    play_below(fault, [asks, accepts], expected, None, during);
}

/// As `play`, below a limit of memory.
fn play_below(
    fault: &str,
    [asks, accepts]: [usize; 2],
    expected: &Value,
    cgroup: Option<&Cgroup>,
    during: impl Fn(&Server, &Host),
) {
    let host = Host::new("");
    let runs = env::var("PLUMB_DRAIN_RUNS").map_or(RUNS, |runs| runs.parse().unwrap());
    for run in 0..runs {
        let name = format!("run{run}");
        let mut server = Server::start(&name, &host, fault, accepts);
        let _clients = server.asked(asks);
        server.is_ready();
        if let Some(cgroup) = cgroup {
            cgroup.take(server.process.pid());
        }
        host.register(&name, server.process.pid());
        let report = std::thread::scope(|scope| {
            let deadline = if expected["verdict"] == "timeout" { "3s" } else { "20s" };
            let drain = scope.spawn(|| host.json(&["drain", &name, "--deadline", deadline]));
            during(&server, &host);
            drain.join().unwrap()
        });
        let service = &report["services"][0];
        for (what, value) in expected.as_object().unwrap() {
            assert_eq!(&service[what], value, "{fault}, run {run}, {what}: {report:#}");
        }
        let listeners = service["listeners"].as_array().unwrap();
        assert!(listeners.iter().all(|one| one["port"] == server.port), "{report:#}");
        assert_eq!(service["unseen"], json!([]), "{report:#}");
    }
    eprintln!("{fault}: {runs} of {runs}");
}

fn nothing(_: &Server, _: &Host) {}

/// Waits until the server of a drain has its signal.
fn is_asked(host: &Host) {
    let asked = |drain: &Value| drain["services"][0]["signals"] != json!([]) && drain["state"] == "running";
    Client::connect(&host.run_dir()).drain_when(asked);
}

#[test]
fn a_server_that_its_signal_ends_at_once_loses_what_it_was_doing() {
    let expected = json!({
        "verdict": "lossy",
        "why": "3 requests lost: 3 read and not answered",
        "lost_requests": { "unanswered": 3 },
        "guessed": 0,
        "exit_code": 128 + libc::SIGTERM,
        "killed_by": null,
    });
    play("has no handler", [3, 3], &expected, nothing);
}

#[test]
fn a_handler_that_does_not_stop_is_late() {
    let expected = json!({
        "verdict": "timeout",
        "why": "it still ran at its deadline",
        "lost_requests": {},
        "signals": ["TERM"],
        "left": 1,
        "killed_by": null,
    });
    play("ignores the stop", [0, 0], &expected, nothing);
}

#[test]
fn a_listener_that_is_closed_with_a_full_queue_loses_it() {
    let expected = json!({
        "verdict": "lossy",
        "why": "4 requests lost: 4 reset in the accept queue",
        "lost_requests": { "accept_queue": 4 },
        "exit_code": 0,
    });
    play("closes the queue", [4, 0], &expected, nothing);
}

#[test]
fn what_was_accepted_and_not_read_is_lost() {
    let expected = json!({
        "verdict": "lossy",
        "why": "2 requests lost: 2 accepted and not read",
        "lost_requests": { "unread": 2 },
        "exit_code": 0,
    });
    play("does not read", [2, 2], &expected, nothing);
}

#[test]
fn who_kills_it_in_the_middle_is_named() {
    let expected = json!({
        "verdict": "killed",
        "lost_requests": { "unanswered": 1 },
        "signals": ["TERM"],
        "exit_code": 128 + libc::SIGKILL,
    });
    play("finishes never", [1, 1], &expected, |server, host| {
        is_asked(host);
        let script = format!("kill -9 {}", server.process.pid());
        let mut shell = Running(Command::new("/bin/sh").args(["-c", &script]).spawn().unwrap());
        assert!(shell.0.wait().unwrap().success());
        let over = |drain: &Value| drain["services"][0]["verdict"] == "killed";
        let drain = Client::connect(&host.run_dir()).drain_when(over);
        let by = format!("pid {} (sh)", shell.pid());
        assert_eq!(drain["services"][0]["killed_by"], json!(by), "{drain:#}");
        let why = format!("{by} sent KILL; 1 request lost: 1 read and not answered");
        assert_eq!(drain["services"][0]["why"], json!(why), "{drain:#}");
    });
}

#[test]
fn who_the_kernel_kills_for_want_of_memory_is_told() {
    let Some(cgroup) = Cgroup::new(64 << 20) else {
        eprintln!("no cgroups with memory here: not tried");
        return;
    };
    let expected = json!({
        "verdict": "killed",
        "why": "the kernel for want of memory sent KILL; 1 request lost: 1 read and not answered",
        "killed_by": "the kernel for want of memory",
        "lost_requests": { "unanswered": 1 },
        "exit_code": 128 + libc::SIGKILL,
    });
    play_below("takes memory", [1, 1], &expected, Some(&cgroup), nothing);
}

/// A cgroup whose memory is limited; nothing where this host has no such controller.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(bytes: u64) -> Option<Self> {
        let (v1, v2) = (PathBuf::from("/sys/fs/cgroup/memory"), PathBuf::from("/sys/fs/cgroup"));
        let (root, limit) = if v1.join("memory.limit_in_bytes").exists() {
            (v1, "memory.limit_in_bytes")
        } else {
            fs::write(v2.join("cgroup.subtree_control"), "+memory").ok()?;
            (v2, "memory.max")
        };
        let cgroup = Self(root.join(format!("plumb-faults-{}", std::process::id())));
        fs::create_dir(&cgroup.0).ok()?;
        fs::write(cgroup.0.join(limit), bytes.to_string()).ok()?;
        Some(cgroup)
    }

    fn take(&self, pid: u32) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let end = Instant::now() + PATIENCE;
        while fs::remove_dir(&self.0).is_err() && Instant::now() < end {
            sleep(Duration::from_millis(10));
        }
    }
}

//! What looks clean to who looks only at the end: it ended before it was asked, its listener was closed before, another one
//! has its port, too.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    process::{ChildStdout, Command, Stdio},
    thread::sleep,
    time::Duration,
};

use serde_json::{Value, json};

use super::{
    Host,
    support::{Running, TempDir, free_port},
};

/// A server that reads one request and answers none. TERM ends it; one that `stays` closes its listener by the first TERM
/// only, as any does by USR1.
const SERVER: &str = r#"
import signal, socket, sys, time
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
listener.bind(("127.0.0.1", int(sys.argv[1])))
listener.listen(5)
is_asked = False

def close(*_):
    listener.close()

def stop(*_):
    global is_asked
    if sys.argv[2] == "stays" and not is_asked:
        is_asked = True
        return close()
    sys.exit(0)

signal.signal(signal.SIGUSR1, close)
signal.signal(signal.SIGTERM, stop)
print("listens", flush=True)
try:
    one, _ = listener.accept()
    one.recv(100)
    print("has read", flush=True)
except OSError:
    pass
while True: time.sleep(1)
"#;

struct Server {
    process: Running,
    output: BufReader<ChildStdout>,
}

impl Server {
    fn start(host: &Host, port: u16, name: &str) -> Self {
        let program = host.dir.join("server.py");
        fs::write(&program, SERVER).unwrap();
        let mut command = Command::new("python3");
        command.args([&program, &port.to_string(), name]).stdout(Stdio::piped());
        let mut process = Running(command.spawn().unwrap());
        let output = BufReader::new(process.0.stdout.take().unwrap());
        let mut server = Self { process, output };
        server.says("listens");
        server
    }

    fn says(&mut self, expected: &str) {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert_eq!(line.trim_end(), expected);
    }

    /// A client whose request it has read.
    fn asked(&mut self, port: u16) -> TcpStream {
        let client = ask(port);
        self.says("has read");
        client
    }
}

fn ask(port: u16) -> TcpStream {
    let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    client.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    client
}

/// Of a report's first service.
fn is(report: &Value, verdict: &str, why: &str) {
    let service = &report["services"][0];
    let is_it =
        service["verdict"] == verdict && service["why"].as_str().is_some_and(|text| text.contains(why));
    assert!(is_it, "not {verdict}, {why}: {report:#}");
}

#[test]
fn who_ends_while_prestop_runs_is_told_from_who_does_not_run() {
    for (signal, verdict, why) in [
        ("TERM", "clean", "it ended before it was asked to stop"),
        ("SEGV", "lossy", "it died of SEGV"),
        ("KILL", "killed", "(sh) sent KILL"),
    ] {
        let dir = TempDir::new();
        let pidfile = dir.join("pid");
        let host = Host::new(&format!(
            "[[service]]\nname = 'web'\npidfile = '{pidfile}'\nsignal = 'TERM'\n\
             prestop = 'kill -{signal} $(cat {pidfile}); sleep 3'\n"
        ));
        let web = host.server("web", "0");
        fs::write(&pidfile, web.pid().to_string()).unwrap();
        let report = host.json(&["drain", "web", "--deadline", "20s"]);
        is(&report, verdict, why);
        assert_eq!(report["services"][0]["signals"], json!([]), "{report:#}");
        assert_eq!(report["services"][0]["pids"][0], json!(web.pid()), "{report:#}");
    }
}

#[test]
fn who_closes_its_listener_while_prestop_runs_is_asked_to_stop_and_its_requests_are_followed() {
    let (dir, port) = (TempDir::new(), free_port());
    let pid = dir.join("pid");
    let host = Host::new(&format!(
        "[[service]]\nname = 'web'\nport = {port}\nsignal = 'TERM'\n\
         prestop = 'kill -USR1 $(cat {pid}); sleep 0.5'\n"
    ));
    let mut web = Server::start(&host, port, "web");
    fs::write(&pid, web.process.pid().to_string()).unwrap();
    let _client = web.asked(port);
    let report = host.json(&["drain", "web", "--deadline", "20s"]);
    is(&report, "lossy", "1 request lost: 1 read and not answered");
    assert_eq!(report["services"][0]["signals"], json!(["TERM"]), "{report:#}");
    assert_eq!(report["services"][0]["listeners"][0]["port"], json!(port), "{report:#}");
}

#[test]
fn who_has_lost_its_pidfile_when_the_agent_is_killed_while_prestop_runs_gets_its_signal_all_the_same() {
    let dir = TempDir::new();
    let pidfile = dir.join("pid");
    let mut host = Host::new(&format!(
        "[[service]]\nname = 'web'\npidfile = '{pidfile}'\nsignal = 'TERM'\nprestop = 'rm -f {pidfile}; sleep 5'\n"
    ));
    let web = host.server("web", "0");
    fs::write(&pidfile, web.pid().to_string()).unwrap();
    let mut admin = super::client::Client::connect(&host.run_dir());
    let wish = json!({ "services": ["web"], "deadline": "30s" });
    assert_eq!(admin.ask("POST", "/v1/drain", Some(&wish)).0, 202);
    host.until("prestop runs", || !fs::exists(&pidfile).unwrap());
    let mut agent = host.agent.take().unwrap();
    agent.signal(rustix::process::Signal::KILL);
    agent.0.wait().unwrap();
    host.start();
    host.until("the drain is over", || host.json(&["drain", "--last"])["state"] == "finished");
    let report = host.json(&["drain", "--last"]);
    assert_eq!(host.events(), ["web TERM", "web gone"], "{report:#}");
    is(&report, "clean", "it ended in time");
    assert_eq!(report["resumed"], 1, "{report:#}");
}

#[test]
fn a_second_drain_knows_the_port_whose_listener_the_first_one_has_closed() {
    let (port, other) = (free_port(), free_port());
    let host =
        Host::new(&format!("[[service]]\nname = 'by-port'\nport = {port}\nsignal = 'TERM'\nafter = []\n"));
    let mut servers = [(port, "by-port"), (other, "registered")]
        .map(|(port, _)| (Server::start(&host, port, "stays"), port));
    let _clients: Vec<TcpStream> = servers.iter_mut().map(|(server, port)| server.asked(*port)).collect();
    host.register("registered", servers[1].0.process.pid());
    for name in ["by-port", "registered"] {
        let output = host.plumb(&["drain", name, "--deadline", "1s", "-o", "json"]);
        assert_eq!(output.status.code(), Some(124), "{output:?}");
        let report = host.json(&["drain", name, "--deadline", "20s"]);
        match name {
            "by-port" => is(&report, "refused", &format!("nobody listens on port {port} any more")),
            _ => is(&report, "lossy", "1 request lost: 1 read and not answered"),
        }
    }
}

#[test]
fn what_is_lost_on_a_port_that_two_services_have_is_lost_for_both() {
    let (host, port) = (Host::new(""), free_port());
    let servers = ["a", "b"].map(|name| (name, Server::start(&host, port, name)));
    let _client = ask(port);
    // Whichever of them has it.
    sleep(Duration::from_secs(2));
    for (name, server) in &servers {
        host.add(name, server.process.pid(), json!({ "after": [] }));
    }
    let report = host.json(&["drain", "--all", "--deadline", "20s"]);
    for service in report["services"].as_array().unwrap() {
        assert_eq!(service["verdict"], "lossy", "{report:#}");
        assert_eq!(service["lost_requests"], json!({ "unanswered": 1 }), "{report:#}");
    }
}

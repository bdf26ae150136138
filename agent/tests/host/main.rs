//! What needs this host: real servers, a busy compiler, thousands of processes. As root.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "../support/mod.rs"]
mod support;

use std::{
    collections::VecDeque,
    fs,
    io::Write,
    net::TcpStream,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use support::{Agent, Running, TempDir, Workload, assert_ps_is_proc, free_port};

#[test]
fn ps_is_proc_on_a_host_with_two_thousand_processes() {
    let _many = Workload::start_ready(&["hold-processes", "2000"]);
    let _threads = Workload::start_ready(&["hold-threads", "2000"]);
    let _fds = Workload::start_ready(&["hold-fds", "0"]);
    let compared = assert_ps_is_proc();
    assert!(compared > 2000, "{compared}");
}

#[test]
fn promtool_accepts_the_metrics_page() {
    let agent = Agent::start(&[]);
    let (status, page) = agent.get("/metrics").unwrap();
    assert_eq!(status, 200);
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    promtool.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(agent.get("/healthz").unwrap(), (200, "ok\n".to_owned()));
    // On a host that stalls it is not for a while.
    let end = Instant::now() + Duration::from_secs(30);
    while agent.get("/readyz").unwrap() != (200, "ready\n".to_owned()) {
        assert!(Instant::now() < end, "{:?}", agent.get("/readyz"));
        thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(agent.get("/v1/leaks").unwrap().0, 404, "what concerns single processes is not on TCP");
}

/// Servers under load and a compiler at work open and close much and leak nothing.
#[test]
fn redis_nginx_and_a_compile_job_raise_nothing() {
    const WATCHED: Duration = Duration::from_secs(100);
    let agent = Agent::start(&[]);
    let dir = TempDir::new();
    let (redis_port, nginx_port) = (free_port(), free_port());
    let port = redis_port.to_string();
    let _redis = server(
        Command::new("redis-server")
            .args(["--bind", "127.0.0.1", "--port", &port, "--save", "", "--dir"])
            .arg(&dir.0),
        redis_port,
    );
    let config = format!(
        "daemon off; pid {0}/nginx.pid; error_log stderr crit; worker_processes 2;\n\
         events {{ worker_connections 512; }}\n\
         http {{ access_log {0}/access.log; root {0}; client_body_temp_path {0}/b; proxy_temp_path {0}/p;\n\
         fastcgi_temp_path {0}/f; uwsgi_temp_path {0}/u; scgi_temp_path {0}/s;\n\
         server {{ listen 127.0.0.1:{nginx_port}; }} }}\n",
        dir.0.display()
    );
    fs::write(dir.0.join("nginx.conf"), config).unwrap();
    fs::write(dir.0.join("index.html"), "hello").unwrap();
    let _nginx =
        server(Command::new("nginx").args(["-c", &dir.join("nginx.conf")]).arg("-p").arg(&dir.0), nginx_port);
    fs::write(dir.0.join("job.c"), "#include <stdio.h>\nint main(void) { return puts(\"x\") < 0; }\n")
        .unwrap();

    let end = Instant::now() + WATCHED;
    // Two kinds of clients beside the load: a pool that breathes, and connections that live for a while
    // and are then replaced, so that the servers' counts wander.
    let mut pool: Vec<TcpStream> = Vec::new();
    let mut wandering: VecDeque<TcpStream> = VecDeque::new();
    let mut rounds = 0u32;
    while Instant::now() < end {
        rounds += 1;
        if rounds.is_multiple_of(40) {
            pool.clear();
        }
        for port in [redis_port, nginx_port] {
            if rounds % 40 < 30 {
                pool.push(TcpStream::connect(("127.0.0.1", port)).unwrap());
            }
            wandering.push_back(TcpStream::connect(("127.0.0.1", port)).unwrap());
        }
        while wandering.len() > 60 + (rounds.wrapping_mul(2_654_435_761) >> 27) as usize {
            wandering.pop_front();
        }
        let quick = ["20", "redis-benchmark", "-p", &port, "-n", "2000", "-c", "20", "-q", "-t", "set,get"];
        assert!(Command::new("timeout").args(quick).stdout(Stdio::null()).status().unwrap().success());
        let job = ["-O2", "-o", &dir.join("job"), &dir.join("job.c")];
        assert!(Command::new("cc").args(job).status().unwrap().success());
        thread::sleep(Duration::from_millis(100));
    }
    // Only what this test has started: whatever else runs here may leak.
    let ours = ["redis-server", "redis-benchmark", "nginx", "cc", "cc1", "as", "collect2", "ld"];
    let log = agent.log();
    for name in ours {
        assert!(!log.contains(&format!(" {name} (pid ")), "after {rounds} rounds: {log}");
    }
    let is_ours = |finding: &&Value| ours.iter().any(|name| finding["comm"] == *name);
    let findings = agent.leaks();
    let leaking = findings.iter().filter(is_ours).find(|finding| finding["state"] == "leaking");
    assert_eq!(leaking, None);
}

/// A server that is told to stop, so that a master takes its workers along.
struct Server(Running);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.signal(rustix::process::Signal::TERM);
        let _ = self.0.0.wait();
    }
}

/// Starts a server and waits until it listens.
fn server(command: &mut Command, port: u16) -> Server {
    let mut server = Server(Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()));
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(server.0.0.try_wait().unwrap().is_none(), "{command:?} has ended");
        thread::sleep(Duration::from_millis(50));
    }
    server
}

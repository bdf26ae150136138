//! What needs this host: real servers, a busy compiler, thousands of processes. As root.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "../support/mod.rs"]
mod support;

use std::{
    fs,
    io::Write,
    net::TcpStream,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

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
    assert_eq!(agent.get("/readyz").unwrap(), (200, "ready\n".to_owned()));
    assert_eq!(agent.get("/v1/leaks").unwrap().0, 404, "what concerns single processes is not on TCP");
}

/// Servers under load and a compiler at work open and close much and leak nothing.
#[test]
fn redis_nginx_and_a_compile_job_raise_nothing() {
    const WATCHED: Duration = Duration::from_secs(100);
    let agent = Agent::start(&[]);
    let dir = TempDir::new();
    let (redis_port, nginx_port) = (free_port().to_string(), free_port());
    let _redis =
        server(Command::new("redis-server").args(["--port", &redis_port, "--save", "", "--dir"]).arg(&dir.0));
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
    let _nginx = server(Command::new("nginx").args(["-c", &dir.join("nginx.conf")]).arg("-p").arg(&dir.0));

    fs::write(dir.0.join("job.c"), "#include <stdio.h>\nint main(void) { return puts(\"x\") < 0; }\n")
        .unwrap();
    let end = Instant::now() + WATCHED;
    let mut clients: Vec<TcpStream> = Vec::new();
    let mut round = 0u32;
    while Instant::now() < end {
        round += 1;
        // A pool that breathes: up to 60 connections, then none.
        if round.is_multiple_of(40) {
            clients.clear();
        }
        if round % 40 < 30 {
            for port in [redis_port.parse().unwrap(), nginx_port] {
                if let Ok(client) = TcpStream::connect(("127.0.0.1", port)) {
                    clients.push(client);
                }
            }
        }
        let quick = ["-p", &redis_port, "-n", "2000", "-c", "20", "-q", "-t", "set,get"];
        Command::new("redis-benchmark")
            .args(quick)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        let job = ["-O2", "-o", &dir.join("job"), &dir.join("job.c")];
        assert!(Command::new("cc").args(job).status().unwrap().success());
        thread::sleep(Duration::from_millis(100));
    }
    assert!(round > 40, "{round} rounds");
    assert!(!agent.log().contains("leaks"), "{}", agent.log());
    let ours = agent.leaks();
    assert!(!ours.iter().any(|finding| finding["state"] == "leaking"), "{ours:?}");
}

/// A server that is told to stop, so that a master takes its workers along.
struct Server(Running);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.signal(rustix::process::Signal::TERM);
        let _ = self.0.0.wait();
    }
}

fn server(command: &mut Command) -> Server {
    Server(Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()))
}

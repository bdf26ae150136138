//! A host full of processes and threads that wait.

use std::{
    env, fs,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::usage::die_with_parent;

const PID_MAX: &str = "/proc/sys/kernel/pid_max";
/// Until the processes of a crowd are gone.
const PATIENCE: Duration = Duration::from_secs(20);
/// The most there can be on 64 bits.
const PIDS: &str = "4194304";

/// They are gone when it is dropped.
pub(crate) struct Crowd {
    child: Child,
    threads: usize,
    _room: Option<Room>,
}

impl Crowd {
    /// Processes with a few fds and `threads` threads each.
    pub(crate) fn start(processes: usize, threads: usize) -> Result<Self> {
        let room = Room::make(processes * threads)?;
        let program = env::current_exe()?.parent().context("a folder")?.join("../examples/workload");
        let mut command = Command::new(program);
        command.args(["hold-crowd", &processes.to_string(), &threads.to_string()]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = die_with_parent(&mut command)
            .spawn()
            .context("the example `workload` is not built: cargo build --release --examples")?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("stdout")?).read_line(&mut line)?;
        let crowd = Self { child, threads: processes * threads, _room: room };
        ensure!(line == "ready\n", "there is no room for {processes} processes of {threads} threads");
        Ok(crowd)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        // Its processes end with it, a moment later.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let end = Instant::now() + PATIENCE;
        while threads_now() * 2 > self.threads && Instant::now() < end {
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Threads of this host.
pub(crate) fn threads_now() -> usize {
    // 0.00 0.01 0.05 running/threads last-pid
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split(['/', ' ']).nth(4).and_then(|threads| threads.parse().ok()).unwrap_or(0)
}

/// More pids than the kernel's default of 32,768, until it is dropped.
struct Room(String);

impl Room {
    fn make(threads: usize) -> Result<Option<Self>> {
        let before = fs::read_to_string(PID_MAX)?;
        if before.trim().parse::<usize>()? > threads * 2 {
            return Ok(None);
        }
        fs::write(PID_MAX, PIDS)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = fs::write(PID_MAX, &self.0);
    }
}

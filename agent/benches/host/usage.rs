//! What processes use: CPU time and memory, from /proc. And how the benchmark's own are started.

use std::{
    fs, io,
    os::unix::process::CommandExt,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

/// CPU time of all threads that a process has now, to the nanosecond (`utime` counts in 10 ms).
pub(crate) fn cpu_time(pid: u32) -> Result<Duration> {
    let mut sum = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task")).context("the process has ended")? {
        // A thread may end meanwhile.
        let Ok(line) = fs::read_to_string(thread?.path().join("schedstat")) else { continue };
        sum += line.split(' ').next().context("schedstat")?.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(sum))
}

/// Resident bytes.
pub(crate) fn resident(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("the process has ended")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes << 10)
}

/// CPU use of some processes between two looks.
pub(crate) struct Meter {
    since: Instant,
    before: Duration,
    pids: Vec<u32>,
}

impl Meter {
    pub(crate) fn start(pids: Vec<u32>) -> Result<Self> {
        Ok(Self { before: total(&pids)?, since: Instant::now(), pids })
    }

    /// Per cent of one core since the start.
    pub(crate) fn percent(&self) -> Result<f64> {
        let used = total(&self.pids)?.saturating_sub(self.before);
        Ok(used.as_secs_f64() / self.since.elapsed().as_secs_f64() * 100.0)
    }
}

fn total(pids: &[u32]) -> Result<Duration> {
    pids.iter().map(|pid| cpu_time(*pid)).sum()
}

/// Ends the child when this thread does, however that happens.
pub(crate) fn die_with_parent(command: &mut Command) -> &mut Command {
    // SAFETY: prctl may be called between fork and exec; it touches no memory.
    unsafe {
        command.pre_exec(|| {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        })
    }
}

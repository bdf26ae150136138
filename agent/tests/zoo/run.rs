//! Runs all programs under one agent and records, each second, what /proc counts and what plumb says.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::Path,
    process::{Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{
    Resource as Limit, Rlimit, Signal, getrlimit, set_parent_process_death_signal, setrlimit,
};
use serde::Deserialize;

use crate::{
    build::Words,
    manifest::{Case, Resource},
    origins::Origin,
    support::{Agent, Running, TempDir},
};

const TICK: Duration = Duration::from_secs(1);
/// How far a program may miss the time at which it is to end, in seconds: before it, and after it on a busy host.
const EARLY: f64 = 5.0;
const LATE: f64 = 30.0;
/// The limit of open files that Debian gives a program, and the one to which it may raise it if the host does not
/// forbid that.
const FILES: u64 = 1024;
const MOST_FILES: u64 = 65_536;

/// What plumb says of one count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verdict {
    Quiet,
    Suspect,
    Leaking,
}

/// What was seen of a program. Times are seconds since it was started.
#[derive(Debug, Default)]
pub(crate) struct Record {
    /// The count that its label is about, by /proc.
    pub(crate) counts: Vec<(f64, u32)>,
    /// On the same count, by plumb.
    pub(crate) verdicts: Vec<(f64, Verdict)>,
    /// Where it came from, when it was last called leaking.
    pub(crate) origins: Vec<Origin>,
    /// When its other count was first called leaking.
    pub(crate) other: Option<f64>,
    /// How and when it ended; `None` when it had to be killed.
    pub(crate) ended: Option<(f64, ExitStatus)>,
    /// What it said, when it ended in another way than by itself in time.
    pub(crate) said: String,
}

struct Program<'a> {
    case: &'a Case,
    child: Running,
    began: Instant,
    record: Record,
}

/// In the order of the cases.
pub(crate) fn all(cases: &[Case], programs: &[Words]) -> Vec<Record> {
    inherit_nothing();
    let dir = TempDir::new();
    let agent = Agent::start(&[]);
    let start = |(case, words)| start(case, words, &dir.0.join(Case::name(case)));
    let mut running: Vec<Program> = cases.iter().zip(programs).map(start).collect();
    let began = Instant::now();
    let mut ticks = 0;
    while running.iter().any(Program::is_awaited) {
        ticks += 1;
        thread::sleep((began + TICK * ticks).saturating_duration_since(Instant::now()));
        let findings = findings(&agent);
        for program in &mut running {
            program.look(&findings);
        }
    }
    println!("{}", missing_stacks(&agent));
    running.into_iter().map(|program| program.finish(&dir.0)).collect()
}

/// What the agent counts of stacks that it could not have, as in /metrics.
fn missing_stacks(agent: &Agent) -> String {
    let page = agent.get("/metrics").unwrap().1;
    let is_it = |line: &&str| line.starts_with("plumb_stacks_") || line.starts_with("plumb_symboliser_");
    let lines = page.lines().filter(is_it).filter(|line| !line.ends_with(" 0"));
    lines.collect::<Vec<_>>().join("\n")
}

/// Whoever started this may have left files open, such as the pipe of make's job server. The programs get none of
/// them; on Linux 5.10, which does not know the flag, they do, and have a few more fds.
fn inherit_nothing() {
    // SAFETY: takes three numbers, and closes nothing here.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
}

fn start<'a>(case: &'a Case, words: &Words, folder: &Path) -> Program<'a> {
    fs::create_dir(folder).unwrap();
    let output = File::create(folder.join("output")).unwrap();
    let mut command = Command::new(&words[0]);
    command
        .args(&words[1..])
        .arg(case.seconds.to_string())
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(output.try_clone().unwrap())
        .stderr(output);
    let most = getrlimit(Limit::Nofile).maximum.map_or(MOST_FILES, |most| most.min(MOST_FILES));
    let files = Rlimit { current: Some(FILES), maximum: Some(most) };
    let prepare = move || -> io::Result<()> {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        Ok(setrlimit(Limit::Nofile, files)?)
    };
    // SAFETY: between fork and exec only plain system calls are made.
    unsafe { command.pre_exec(prepare) };
    let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    Program { case, child: Running(child), began: Instant::now(), record: Record::default() }
}

/// GET /v1/leaks.
#[derive(Deserialize)]
struct Leaks {
    findings: Vec<Finding>,
}

#[derive(Deserialize)]
struct Finding {
    pid: u32,
    resource: Resource,
    state: String,
    origins: Vec<Origin>,
}

/// By pid and count; those that are not quiet.
type Findings = BTreeMap<(u32, Resource), (Verdict, Vec<Origin>)>;

fn findings(agent: &Agent) -> Findings {
    let (status, body) = agent.get_control("/v1/leaks").unwrap();
    assert_eq!(status, 200, "{body}");
    let document: Leaks = serde_json::from_str(&body).unwrap();
    let found = |finding: Finding| {
        let verdict = if finding.state == "leaking" { Verdict::Leaking } else { Verdict::Suspect };
        ((finding.pid, finding.resource), (verdict, finding.origins))
    };
    document.findings.into_iter().map(found).collect()
}

impl Program<'_> {
    /// It has not ended and may still run.
    fn is_awaited(&self) -> bool {
        self.record.ended.is_none() && self.began.elapsed().as_secs_f64() < self.case.seconds + LATE
    }

    fn look(&mut self, findings: &Findings) {
        if self.record.ended.is_some() {
            return;
        }
        let now = self.began.elapsed().as_secs_f64();
        if let Some(status) = self.child.0.try_wait().unwrap() {
            self.record.ended = Some((now, status));
            return;
        }
        let of = |resource| findings.get(&(self.child.pid(), resource));
        let verdict = |resource| of(resource).map_or(Verdict::Quiet, |(verdict, _)| *verdict);
        let (own, other) = match self.case.resource {
            Resource::Fd => (Resource::Fd, Resource::Thread),
            Resource::Thread => (Resource::Thread, Resource::Fd),
        };
        self.record.verdicts.push((now, verdict(own)));
        if let Some((Verdict::Leaking, origins)) = of(own) {
            self.record.origins.clone_from(origins);
        }
        if verdict(other) == Verdict::Leaking {
            self.record.other.get_or_insert(now);
        }
        // While it ends, /proc still shows it, with less and less.
        let is_ending = now > self.case.seconds - TICK.as_secs_f64();
        if !is_ending && let Some(count) = count(self.child.pid(), own) {
            self.record.counts.push((now, count));
        }
    }

    fn finish(mut self, dir: &Path) -> Record {
        if !self.record.has_ended_in_time(self.case.seconds) {
            let output = fs::read(dir.join(self.case.name()).join("output")).unwrap();
            let text = String::from_utf8_lossy(&output).into_owned();
            let last = text.lines().rev().take(5).collect::<Vec<_>>();
            self.record.said = last.into_iter().rev().collect::<Vec<_>>().join(" | ");
        }
        self.record
    }
}

impl Record {
    /// By itself, after so many seconds.
    pub(crate) fn has_ended_in_time(&self, seconds: f64) -> bool {
        self.ended.is_some_and(|(at, status)| {
            let by_itself = status.success() || status.signal() == Some(Signal::ALARM.as_raw());
            by_itself && (-EARLY..=LATE).contains(&(at - seconds))
        })
    }
}

/// `None` when there is no such process, or no longer.
fn count(pid: u32, resource: Resource) -> Option<u32> {
    match resource {
        Resource::Fd => Some(u32::try_from(fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count()).unwrap()),
        Resource::Thread => {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            status.lines().find_map(|line| line.strip_prefix("Threads:")?.trim().parse().ok())
        }
    }
}

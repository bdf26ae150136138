//! A storm over drains: processes that are registered end, run another program, are moved to another cgroup and leave
//! their number to others of the same program, cgroup and user, all while they are drained and the agent is killed. Who
//! may get a signal is known at each moment, and every process is accounted for.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    hint::black_box,
    path::PathBuf,
    thread::sleep,
    time::{Duration, Instant, SystemTime},
};

use rustix::process::Signal;
use serde_json::{Value, json};

use super::{Host, alone, client::Client, subject::Subject, support::kernel_is_before};

/// Operations without PLUMB_DRAIN_OPERATIONS.
const OPERATIONS: u64 = 4000;
/// After so many operations it is told that they were.
const PROGRESS: u64 = 1000;
/// What is counted of numbers that are used again.
const TWIN: &str = "  of them in the same 10 ms";
const TWIN_IN_DRAIN: &str = "  and the service is in the drain";
/// What plumb has ended at its deadline.
const KILLED: &str = "  of them by plumb, at their deadline";
const TERM: &[i32] = &[libc::SIGTERM];
const TERM_AND_KILL: &[i32] = &[libc::SIGTERM, libc::SIGKILL];

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

/// Since the host was started.
fn now() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    fn one_in(&mut self, many: u64) -> bool {
        self.below(many) == 0
    }
}

/// A cgroup to be moved to and fro.
struct Elsewhere(PathBuf);

impl Elsewhere {
    fn new() -> Option<Self> {
        let roots = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(PathBuf::from);
        let root = roots.into_iter().find(|root| root.join("cgroup.procs").exists())?;
        let folder = root.join(format!("plumb-storm-{}", std::process::id()));
        fs::create_dir(&folder).ok()?;
        Some(Self(folder))
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// How far a wave is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Moment {
    Before,
    /// The drain waits for the gate.
    Gated,
    /// Likewise, and there is no agent.
    Alone,
    /// It goes on.
    Open,
}

struct Storm {
    host: Host,
    admin: Client,
    random: Random,
    elsewhere: Option<Elsewhere>,
    counts: BTreeMap<&'static str, u64>,
    operations: u64,
    /// Of this wave.
    history: String,
    began: Instant,
    wave: u64,
    subjects: Vec<Subject>,
    /// In which another agent takes the drain up: before 6.9 it tells processes of one number apart by 10 ms only.
    is_restarted: bool,
}

impl Storm {
    fn new(seed: u64) -> Self {
        let host = Host::new("");
        Self {
            admin: Client::connect(&host.run_dir()),
            host,
            random: Random(seed),
            elsewhere: Elsewhere::new(),
            counts: BTreeMap::new(),
            operations: 0,
            history: String::new(),
            began: Instant::now(),
            wave: 0,
            subjects: Vec::new(),
            is_restarted: false,
        }
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn operation(&mut self, what: &'static str, pid: u32) {
        self.count(what);
        self.operations += 1;
        let _ = writeln!(self.history, "{:9.3} ms  {what} {pid}", self.began.elapsed().as_secs_f64() * 1e3);
    }

    fn start(&mut self, what: &'static str, blocks: bool) -> Subject {
        let subject = Subject::start(None, blocks).unwrap();
        self.operation(what, subject.pid);
        subject
    }

    /// The end of a process: of itself, or by a signal that it might get.
    fn account(&mut self, subject: &mut Subject) {
        let status = subject.end();
        let (signal, name) = (status & 0x7f, subject.name.clone().unwrap_or_default());
        let _ = writeln!(self.history, "    {} {name} ended with {status:#x}", subject.pid);
        match signal {
            0 => self.count("end by themselves"),
            signal => {
                assert!(
                    subject.may.contains(&signal),
                    "signal {signal} has hit {} {name}, which may get {:?}\n{}\n{}",
                    subject.pid,
                    subject.may,
                    self.history,
                    self.host.log()
                );
                self.count(if signal == libc::SIGKILL { "end by KILL" } else { "end by TERM" });
                if signal == libc::SIGKILL && name.contains("-kill") {
                    self.count(KILLED);
                }
            }
        }
    }

    fn register(&mut self, subject: &mut Subject, name: &str, wish: Value) -> u16 {
        let mut wish = wish;
        wish["signal"] = json!("TERM");
        wish["process"] = json!({ "pid": subject.pid, "start_ticks": subject.start_ticks });
        let name = format!("w{}-{name}", self.wave);
        let (status, answer) = self.admin.ask("PUT", &format!("/v1/services/{name}"), Some(&wish));
        let _ = writeln!(self.history, "    {name} for {}: {status} {answer}", subject.pid);
        self.operation("register", subject.pid);
        subject.name = (status == 200).then_some(name);
        status
    }

    /// Another process with the number of one that has ended: the same program, cgroup and user.
    fn succeed(&mut self, pid: u32, start_ticks: u64) -> Option<Subject> {
        if self.is_restarted && kernel_is_before((6, 9)) {
            sleep(Duration::from_millis(11));
        }
        let subject = match Subject::start(Some(pid), false) {
            Ok(subject) => subject,
            // Somebody was quicker.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => return None,
            Err(error) => panic!("{pid}: {error}"),
        };
        if subject.start_ticks == start_ticks {
            self.count(TWIN);
        }
        Some(subject)
    }

    /// Does something to one of them.
    fn disturb(&mut self, at: usize, moment: Moment) {
        let mut subject = self.subjects.swap_remove(at);
        // What began before it might get the signal; what has happened before the drain looks at it, not.
        let is_past = |subject: &Subject| match moment {
            Moment::Before => true,
            Moment::Gated | Moment::Alone => {
                subject.name.as_ref().is_some_and(|name| name.ends_with("-late"))
            }
            Moment::Open => false,
        };
        match self.random.below(8) {
            0 => {
                self.operation("end", subject.pid);
                return self.account(&mut subject);
            }
            1..=3 => {
                self.operation("end, and the number is another's", subject.pid);
                self.account(&mut subject);
                let heir = self.succeed(subject.pid, subject.start_ticks);
                return self.subjects.extend(heir);
            }
            4 => {
                self.operation("exec", subject.pid);
                subject.exec();
                if is_past(&subject) {
                    (subject.may, subject.name) = (&[], None);
                }
            }
            5 => {
                if let Some(Elsewhere(folder)) = &self.elsewhere
                    && fs::write(folder.join("cgroup.procs"), subject.pid.to_string()).is_ok()
                {
                    self.operation("move to another cgroup", subject.pid);
                    if is_past(&subject) {
                        (subject.may, subject.name) = (&[], None);
                    }
                }
            }
            6 => {
                self.operation("end, and a supervisor starts it again", subject.pid);
                self.account(&mut subject);
                subject = self.start("start", false);
            }
            _ if moment == Moment::Alone => {}
            _ => {
                // What is registered while a drain is under way is not part of it.
                let mut fresh = self.start("start", false);
                let name = if moment == Moment::Before { "early" } else { "fresh" };
                let name = format!("{name}{}", self.operations);
                self.register(&mut fresh, &name, json!({ "after": [] }));
                self.subjects.push(fresh);
            }
        }
        self.subjects.push(subject);
    }

    /// A moment of that many microseconds at most, of which nobody knows where the agent is after it.
    fn pause(&mut self, most: u64) {
        let end = Instant::now() + Duration::from_micros(self.random.below(most));
        while Instant::now() < end {
            black_box(());
        }
    }

    fn disturb_some(&mut self, many: u64, moment: Moment) {
        for _ in 0..self.random.below(many + 1) {
            if !self.subjects.is_empty() {
                let at = self.random.below(self.subjects.len() as u64) as usize;
                self.disturb(at, moment);
            }
            self.pause(600);
        }
    }

    /// Registers some processes, drains them, and does to them whatever can be done meanwhile.
    fn wave(&mut self) {
        (self.wave, self.began) = (self.wave + 1, Instant::now());
        self.history.clear();
        self.is_restarted = self.random.one_in(48);
        let mut gate = self.start("start", true);
        assert_eq!(self.register(&mut gate, "gate", json!({ "after": [] })), 200, "{}", self.history);
        gate.may = TERM_AND_KILL;
        let gate_name = gate.name.clone().unwrap();
        // One with few to look at takes less than the 10 ms by which /proc tells when a process was started.
        let is_quick = self.random.one_in(2);
        if is_quick {
            let tick = Duration::from_millis(10).as_nanos();
            while now().as_nanos() % tick > tick / 16 {
                black_box(());
            }
        } else {
            for at in 0..2 + self.random.below(14) {
                self.populate(at, &gate_name);
            }
            if self.random.one_in(2) {
                self.disturb_some(4, Moment::Before);
            }
        }
        let mut last = self.start("start", false);
        self.register(&mut last, "last-late", json!({ "after": [gate_name] }));
        self.subjects.push(last);
        self.ask_to_drain(&gate);
        let is_twin = is_quick && self.replace_last();
        let (status, answer) = self.admin.answer();
        assert_eq!(status, 202, "{answer}\n{}", self.history);
        self.disturb_some(8, Moment::Gated);
        if self.is_restarted {
            self.restart();
            self.disturb_some(2, Moment::Gated);
        }
        self.operation("end", gate.pid);
        self.account(&mut gate);
        self.disturb_some(12, Moment::Open);
        let drain = self.over();
        let is_last = |service: &Value| service["name"].as_str().unwrap().ends_with("last-late");
        if is_twin && drain["services"].as_array().unwrap().iter().any(is_last) {
            self.count(TWIN_IN_DRAIN);
        }
    }

    /// The last one ends somewhere in the beginning of a drain, and another process has its number. Returns whether that is
    /// in the 10 ms in which it was started.
    fn replace_last(&mut self) -> bool {
        self.pause(4000);
        let mut last = self.subjects.pop().unwrap();
        self.operation("end, and the number is another's", last.pid);
        self.account(&mut last);
        let heir = self.succeed(last.pid, last.start_ticks);
        let is_twin = heir.as_ref().is_some_and(|heir| heir.start_ticks == last.start_ticks);
        self.subjects.extend(heir);
        is_twin
    }

    /// A process, most times a registered one.
    fn populate(&mut self, at: u64, gate: &str) {
        let is_killed = self.random.one_in(4);
        let mut subject = self.start("start", is_killed);
        let mut wish = json!({ "after": [] });
        let mut name = at.to_string();
        if self.random.below(4) > 0 {
            wish["after"] = json!([gate]);
            name += "-late";
        }
        if is_killed {
            wish["on_deadline"] = json!("kill");
            wish["deadline"] = json!("100ms");
        }
        match self.random.below(10) {
            0 => {}
            1 => {
                // What was meant has ended by the time it is registered.
                self.operation("end, and the number is another's", subject.pid);
                let (pid, start_ticks) = (subject.pid, subject.start_ticks);
                self.account(&mut subject);
                let Some(mut heir) = self.succeed(pid, start_ticks) else { return };
                let own = std::mem::replace(&mut heir.start_ticks, start_ticks);
                if own != start_ticks {
                    let status = self.register(&mut heir, &name, wish);
                    assert_ne!(status, 200, "{}", self.history);
                    self.count("refused registrations of another process");
                }
                heir.start_ticks = own;
                subject = heir;
            }
            _ => {
                self.register(&mut subject, &name, wish);
            }
        }
        if is_killed && subject.name.is_some() {
            subject.name =
                subject.name.map(|name| name + "-kill").map(|name| name.replace("-late-kill", "-kill-late"));
        }
        self.subjects.push(subject);
    }

    /// Begins a drain of all that is registered, of which the answer is to be read next.
    fn ask_to_drain(&mut self, gate: &Subject) {
        for subject in &mut self.subjects {
            let name = subject.name.clone().unwrap_or_default();
            if !name.is_empty() && !name.contains("fresh") {
                subject.may = if name.contains("-kill") { TERM_AND_KILL } else { TERM };
            }
        }
        let wish = json!({ "all": true, "deadline": "60s" });
        self.admin.send("POST", "/v1/drain", Some(&wish));
        self.operation("drain", gate.pid);
    }

    /// Kills the agent, and starts another one.
    fn restart(&mut self) {
        self.pause(600);
        let mut agent = self.host.agent.take().unwrap();
        self.operation("kill the agent", agent.pid());
        agent.signal(Signal::KILL);
        agent.0.wait().unwrap();
        self.disturb_some(3, Moment::Alone);
        self.host.start();
        self.admin = Client::connect(&self.host.run_dir());
    }

    /// Waits for the end of the drain, and accounts for everybody.
    fn over(&mut self) -> Value {
        let drain = self.admin.drain_when(|drain| !drain.is_null() && drain["state"] != "running");
        for service in drain["services"].as_array().unwrap() {
            let verdict = match service["verdict"].as_str().unwrap_or("clean or lossy, by an event to come") {
                "clean" => "verdict clean",
                "lossy" => "verdict lossy",
                "timeout" => "verdict timeout",
                "killed" => "verdict killed",
                "restarted" => "verdict restarted",
                "refused" => "verdict refused",
                _ => "verdict clean or lossy",
            };
            self.count(verdict);
            *self.counts.entry("signals sent").or_default() +=
                service["signals"].as_array().unwrap().len() as u64;
        }
        for mut subject in std::mem::take(&mut self.subjects) {
            self.account(&mut subject);
        }
        drain
    }
}

#[test]
fn in_a_storm_of_ends_execs_and_numbers_used_again_nobody_gets_a_signal_that_was_not_meant_for_him() {
    let _alone = alone();
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    let seed = number("PLUMB_DRAIN_SEED").unwrap_or(now);
    let operations = number("PLUMB_DRAIN_OPERATIONS").unwrap_or(OPERATIONS);
    println!("PLUMB_DRAIN_SEED={seed} PLUMB_DRAIN_OPERATIONS={operations}");
    let mut storm = Storm::new(seed);
    let began = Instant::now();
    while storm.operations < operations {
        let before = storm.operations / PROGRESS;
        storm.wave();
        if storm.operations / PROGRESS > before {
            println!("{} operations in {:.1?}, and nobody was hit", storm.operations, began.elapsed());
        }
    }
    println!("{} operations in {:.1?}: {:#?}", storm.operations, began.elapsed(), storm.counts);
    let many = |what| storm.counts.get(what).copied().unwrap_or(0);
    assert!(many(KILLED) > 0, "nobody was killed at his deadline");
    // On a machine that is quick enough for it.
    let is_played = many(TWIN) < 100 || many(TWIN_IN_DRAIN) > 0;
    assert!(is_played, "no service in a drain has left its number to another of the same 10 ms");
}

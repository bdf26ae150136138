//! Every path of the example `fd_paths`: what is seen of it, by event and by pass, and that a pass is exact.
//!
//! With `PLUMB_FD_PATHS=measure` each result is printed, for `cargo xtask test` to compare with
//! docs/fd-paths.md. Without it, on a kernel that is not pinned, a result must be that of the newest pinned
//! kernel that has the path, and what this kernel lacks is printed.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    io::{self, Write},
    process::Command,
    thread,
    time::Duration,
};

use plumb::{
    decode::Event,
    kernel::{Fds, Filter, Kernel, LoadError, Plan, Ring, Seam, Sockets},
};
use plumb_common::{
    counts,
    event::{CLONE_THREAD, FD_CLOSE_ON_EXEC, FD_CLOSED, FD_OPENED, FD_REPLACED, FD_UNKNOWN, FdChange},
    limits::{COMM_LEN, RING_BYTES},
    task::{FLAG_FDS_TRUNCATED, FLAG_FDS_UNKNOWN, TaskRecord},
};

use crate::support::Workload;

const SEAMS: [Seam; 2] = [Seam::Functions, Seam::SysExit];
const PROGRAMS: &[&str] = &["task_newtask", "sched_process_exec", "sched_process_exit", "processes", "files"];

#[test]
fn every_path_is_counted_and_seen_as_documented() {
    let listing = Command::new(Workload::fd_paths()).arg("--list").output().unwrap().stdout;
    let listing = String::from_utf8(listing).unwrap();
    let names: Vec<&str> = listing.lines().map(|line| line.split('\t').next().unwrap()).collect();
    assert!(names.len() > 100, "{names:?}");
    let measures = env::var("PLUMB_FD_PATHS").is_ok_and(|value| value == "measure");
    let mut wrong = Vec::new();
    for seam in SEAMS {
        let mut watcher = match Watcher::new(seam) {
            Ok(watcher) => watcher,
            // On a kernel that is not pinned, and never silently.
            Err(error) if seam == Seam::Functions && !measures => {
                io::stdout().write_all(format!("{} not tried: {error}\n", seam.word()).as_bytes()).unwrap();
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        for name in &names {
            let outcome = watcher.take_seen(name);
            let is_unsupported = outcome.result.starts_with("unsupported");
            if measures || is_unsupported {
                // Not println, which the test harness keeps to itself.
                let line = format!("path-result {} {name} {}\n", seam.word(), outcome.result);
                io::stdout().write_all(line.as_bytes()).unwrap();
            }
            if !measures
                && !is_unsupported
                && let Some(expected) = documented(seam.word(), name)
                && outcome.result != expected
            {
                wrong.push(format!("{name}: {}, documented is {expected}", outcome.result));
            }
            wrong.extend(outcome.wrong.into_iter().map(|what| format!("{name}: {what}")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What the newest pinned kernel that has the path says. Panics where the table lacks the path.
fn documented(seam: &str, name: &str) -> Option<String> {
    let table = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/fd-paths.md")).unwrap();
    let cells =
        |line: &str| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    let mut rows = table.lines().filter(|line| line.starts_with('|')).map(cells);
    let head = rows.next().unwrap();
    let row = rows.find(|row| row[0] == format!("`{name}`"));
    let row = row.unwrap_or_else(|| panic!("{name} is not in docs/fd-paths.md: cargo xtask test --bless"));
    let mut known = head.iter().zip(row).filter(|(column, _)| column.ends_with(seam)).map(|(_, cell)| cell);
    known.rfind(|cell| !cell.starts_with("unsupported"))
}

/// One claim of the program.
#[derive(Debug)]
struct Claim {
    verb: String,
    pid: u32,
    number: i64,
}

impl Claim {
    fn parse(line: &str) -> Self {
        let words: Vec<&str> = line.split(' ').collect();
        let [verb, pid, number] = words[..] else { panic!("not a claim: {line}") };
        Self { verb: verb.to_owned(), pid: pid.parse().unwrap(), number: number.parse().unwrap() }
    }

    fn is_of(&self, change: &FdChange) -> bool {
        let hit = (i64::from(change.fd)..=i64::from(change.fd_last)).contains(&self.number);
        change.header.process.tgid == self.pid
            && match self.verb.as_str() {
                // dup2 to a free number.
                "opened" => hit && [FD_OPENED, FD_REPLACED].contains(&change.change),
                "replaced" => hit && change.change == FD_REPLACED,
                "closed" => change.change == FD_CLOSED && (hit || change.fd == FD_UNKNOWN),
                "cloexec" => hit && change.change == FD_CLOSE_ON_EXEC,
                _ => false,
            }
    }

    fn is_in(&self, events: &[Event]) -> bool {
        let any = |is_it: &dyn Fn(&Event) -> bool| {
            events.iter().any(|event| event.header().process.tgid == self.pid && is_it(event))
        };
        match self.verb.as_str() {
            "forked" => any(
                &|event| matches!(event, Event::Clone(clone) if i64::from(clone.child.tgid) == self.number),
            ),
            "exec" => any(&|event| matches!(event, Event::Exec(_))),
            "exited" => any(&|event| matches!(event, Event::Exit(exit) if exit.group_dead != 0)),
            "threads" => {
                let change = |event: &Event| match event {
                    Event::Clone(clone) if clone.flags & CLONE_THREAD != 0 => 1,
                    Event::Exit(exit) if exit.group_dead == 0 => -1,
                    _ => 0,
                };
                let own = events.iter().filter(|event| event.header().process.tgid == self.pid);
                own.map(change).sum::<i64>() == self.number
            }
            _ => any(&|event| matches!(event, Event::Fd(change) if self.is_of(change))),
        }
    }

    /// Whether the difference of two passes shows it.
    fn is_between(&self, before: &Pass, after: &Pass) -> bool {
        let (was, is) = (before.get(&self.pid), after.get(&self.pid));
        let slot = |process: Option<&Process>| {
            process.and_then(|process| process.files.get(&u32::try_from(self.number).ok()?).copied())
        };
        let key = |pass: &Pass, pid: u32| pass.get(&pid).map(|process| process.record.key);
        match self.verb.as_str() {
            "opened" => slot(was).is_none() && slot(is).is_some(),
            "closed" => slot(was).is_some() && slot(is).is_none(),
            "replaced" => slot(is).is_some() && slot(was).is_some_and(|file| Some(file) != slot(is)),
            "forked" => {
                let child = u32::try_from(self.number).unwrap();
                key(after, child).is_some() && key(after, child) != key(before, child)
            }
            "exited" => {
                key(after, self.pid) != key(before, self.pid)
                    || is.is_some_and(|process| process.record.exit_state != 0)
            }
            "exec" => was.map(|process| process.record.exec_id) != is.map(|process| process.record.exec_id),
            "threads" => {
                let threads = |process: Option<&Process>| i64::from(process.unwrap().record.threads);
                threads(is) - threads(was) == self.number
            }
            "cloexec" => false,
            verb => panic!("unknown claim {verb}"),
        }
    }
}

/// What came out for one path.
struct Outcome {
    result: String,
    /// What must not be on any kernel.
    wrong: Vec<String>,
}

/// A process as a pass shows it.
struct Process {
    record: TaskRecord,
    /// Address of the file by fd.
    files: BTreeMap<u32, u64>,
}

type Pass = BTreeMap<u32, Process>;

/// The programs of a seam, attached.
struct Watcher {
    kernel: Kernel,
    ring: Ring,
    seam: Seam,
}

impl Watcher {
    fn new(seam: Seam) -> Result<Self, LoadError> {
        let mut comm = [0; COMM_LEN];
        comm[.."fd_paths".len()].copy_from_slice(b"fd_paths");
        let filter = Filter { tgid: None, comm: Some(comm) };
        let plan = Plan {
            programs: Some(PROGRAMS),
            fds: Fds::All(Some(seam)),
            filter,
            ring_bytes: RING_BYTES,
            stacks: false,
            sockets: Sockets::Never,
            connections: 1,
            kills: false,
        };
        let mut kernel = Kernel::load_all(plan)?;
        let ring = kernel.ring().unwrap();
        Ok(Self { kernel, ring, seam })
    }

    /// Takes the path while the kernel runs every program: an event that nobody could see is not missing.
    fn take_seen(&mut self, name: &str) -> Outcome {
        for _ in 0..10 {
            let before = self.kernel.not_run();
            let outcome = self.take(name);
            let now = self.kernel.not_run() - before;
            if now == 0 {
                return outcome;
            }
            println!("{name}: the kernel skipped {now} runs of a program");
        }
        panic!("{name}: the kernel skips programs each time");
    }

    fn take(&mut self, name: &str) -> Outcome {
        let mut program = Workload::start_program(&Workload::fd_paths(), &[name]).ready();
        let mut wrong = Vec::new();
        let before = self.exact_pass(program.pid(), &mut wrong);
        let forged_before = self.counted(counts::FORGED);
        self.ring.drain(usize::MAX);
        let lines = program.stage();
        let events = self.ring.drain(usize::MAX);
        let forged = self.counted(counts::FORGED) - forged_before;
        let after = self.exact_pass(program.pid(), &mut wrong);
        program.end();
        if let [line] = &lines[..]
            && line.starts_with("unsupported ")
        {
            return Outcome { result: line.clone(), wrong };
        }
        let mut claims: Vec<Claim> = lines.iter().map(|line| Claim::parse(line)).collect();
        let expected: i64 =
            claims.extract_if(.., |claim| claim.verb == "forged").map(|claim| claim.number).sum();
        // Only who believes what a call returns can be lied to.
        if self.seam == Seam::SysExit && i64::try_from(forged).unwrap() != expected {
            wrong.push(format!("{forged} results were found to be forged, not {expected}"));
        }
        let mut words = Vec::new();
        if !unclaimed(&claims, &events).is_empty() {
            words.push("false event");
        }
        let part = |seen: usize, all: &'static str, some: &'static str| match seen {
            0 => None,
            seen if seen == claims.len() => Some(all),
            _ => Some(some),
        };
        let seen = claims.iter().filter(|claim| claim.is_in(&events)).count();
        words.extend(part(seen, "event", "some events"));
        let seen = claims.iter().filter(|claim| claim.is_between(&before, &after)).count();
        words.extend(part(seen, "reconcile", "some by reconcile"));
        if words.is_empty() {
            words.push(if claims.is_empty() { "none" } else { "unseen" });
        }
        Outcome { result: words.join(" + "), wrong }
    }

    fn counted(&self, outcome: u32) -> u64 {
        self.kernel.counts().unwrap().of(counts::FD, outcome)
    }

    /// A pass over the program and its descendants, which must be what /proc says.
    fn exact_pass(&mut self, root: u32, wrong: &mut Vec<String>) -> Pass {
        for _ in 0..200 {
            let family = family(&self.kernel.processes().unwrap(), root);
            let truth: Vec<_> = family.keys().map(|pid| truth(*pid)).collect();
            let records = self::family(&self.kernel.processes().unwrap(), root);
            let mut pass = Pass::new();
            for (pid, record) in records {
                let mut files = BTreeMap::new();
                self.kernel
                    .files(record.key, |file| {
                        files.insert(file.fd, file.file);
                    })
                    .unwrap();
                pass.insert(pid, Process { record, files });
            }
            if !family.keys().eq(pass.keys())
                || truth != family.keys().map(|pid| self::truth(*pid)).collect::<Vec<_>>()
            {
                // Something is still on its way, such as the end of a thread.
                thread::sleep(Duration::from_millis(10));
                continue;
            }
            for ((pid, process), truth) in pass.iter().zip(truth) {
                let Process { record, files } = process;
                let counted = (record.fds as usize, record.threads);
                let is_whole = record.flags & (FLAG_FDS_TRUNCATED | FLAG_FDS_UNKNOWN) == 0;
                let fds: BTreeSet<u32> = files.keys().copied().collect();
                let Some(truth) = truth else {
                    wrong.push(format!("process {pid} is not in /proc"));
                    continue;
                };
                if !is_whole || counted != (truth.fds.len(), truth.threads) || fds != truth.fds {
                    wrong.push(format!("process {pid}: {counted:?} fds and threads {fds:?}, not {truth:?}"));
                }
            }
            return pass;
        }
        panic!("the processes of {root} do not come to rest");
    }
}

/// A process and its descendants, by pid.
fn family(records: &[TaskRecord], root: u32) -> BTreeMap<u32, TaskRecord> {
    let mut family = BTreeMap::new();
    let mut found = BTreeSet::from([root]);
    loop {
        let is_new = |record: &&TaskRecord| {
            found.contains(&record.key.tgid) || (found.contains(&record.ppid) && record.ppid != 0)
        };
        let members: BTreeMap<_, _> = records.iter().filter(is_new).map(|r| (r.key.tgid, *r)).collect();
        if members.len() == family.len() {
            return members;
        }
        found.extend(members.keys());
        family = members;
    }
}

#[derive(Debug, PartialEq)]
struct Truth {
    fds: BTreeSet<u32>,
    threads: u32,
}

/// What /proc says of a process. Where the leader has gone, another thread shows the table.
fn truth(pid: u32) -> Option<Truth> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let threads = field("Threads:")?.parse().ok()?;
    let mut folder = format!("/proc/{pid}/fd");
    if field("State:")?.starts_with('Z') && threads > 1 {
        let heir = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
        let mut heir = heir.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
        folder = format!("/proc/{pid}/task/{}/fd", heir.find(|tid| *tid != pid)?);
    }
    let fds = fs::read_dir(folder).ok()?;
    let fds = fds.map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect::<Option<_>>()?;
    Some(Truth { fds, threads })
}

/// Fd events for which nothing has happened. What was opened and closed again in passing, as the start of a
/// program does, has happened; so has the end of every file of a process that ended or ran another program.
fn unclaimed(claims: &[Claim], events: &[Event]) -> Vec<FdChange> {
    let mut left: Vec<FdChange> = Vec::new();
    for event in events {
        let Event::Fd(change) = event else { continue };
        let pid = change.header.process.tgid;
        if claims.iter().any(|claim| claim.is_of(change)) {
            continue;
        }
        let open = left.iter().position(|earlier| {
            earlier.change == FD_OPENED
                && change.change == FD_CLOSED
                && earlier.header.process.tgid == pid
                && (earlier.fd == change.fd || (change.fd == FD_UNKNOWN && earlier.file == change.file))
        });
        let is_cleanup = change.change == FD_CLOSED
            && change.fd == FD_UNKNOWN
            && claims.iter().any(|claim| {
                claim.pid == pid && ["exited", "exec", "replaced"].contains(&claim.verb.as_str())
            });
        match open {
            Some(open) => drop(left.remove(open)),
            None if is_cleanup => {}
            None => left.push(*change),
        }
    }
    left
}

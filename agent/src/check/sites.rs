//! From what was left to findings: what has the same origin is one site, and a site counts when one process held
//! several of it at its end. One file that a program keeps until it ends is no leak; three from one line are.

use std::{collections::HashMap, rc::Rc, sync::Arc};

use plumb_common::task::ProcKey;

use super::{
    Kind,
    closes::BadClose,
    traces::{Namer, Trace},
    tree::{Ended, Open, Slot, Thread, Through},
};
use crate::{files::OpenFile, stacks::Stack, thread_type::thread_type};

/// Examples of one site.
const MAX_EXAMPLES: usize = 3;
/// Sites that are told apart; what comes beyond is counted.
const MAX_SITES: usize = 4096;
/// Bits of an exit code, as wait(2) has it, that name the signal that killed.
const KILLED: u32 = 0x7f;
/// Programs that run others' code from one place of their own: there the line of code is not in the stack.
const INTERPRETERS: &[&str] =
    &["python", "libpython", "bash", "dash", "sh", "zsh", "perl", "ruby", "libruby", "php", "lua"];

/// What makes two things one site.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    kind: Kind,
    /// Equal stacks are one in memory.
    stack: Option<usize>,
    /// Of the second place that matters.
    other: Option<usize>,
    syscall: &'static str,
    /// Type of a thread, or what it is where the stack does not tell enough.
    what: String,
    comm: String,
}

/// Something left, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Example {
    pub pid: u32,
    /// The fd, the id of the thread or that of the process.
    pub number: u32,
    /// Kind of file, or the state of a process.
    pub resource: String,
    pub target: String,
}

/// Everything left from one place.
#[derive(Clone, Debug)]
pub(crate) struct Site {
    pub kind: Kind,
    /// Name of the process.
    pub comm: String,
    pub syscall: &'static str,
    /// Type of the threads.
    pub thread: String,
    pub stack: Option<Arc<Stack>>,
    /// Other places that belong to it, each with what happened there.
    pub others: Vec<(&'static str, Arc<Stack>)>,
    /// How many there were in all.
    pub count: u32,
    /// The most that one process held.
    pub most: u32,
    pub processes: u32,
    /// How many there were in each round.
    pub rounds: Vec<u32>,
    pub examples: Vec<Example>,
}

/// A process that its parent left.
#[derive(Clone, Debug)]
pub(crate) struct Child {
    pub key: ProcKey,
    pub trace: Option<Rc<Trace>>,
    pub parent_comm: String,
    /// What it is.
    pub words: String,
}

/// Something that a process left.
#[derive(Debug)]
struct Left {
    key: Key,
    stack: Option<Arc<Stack>>,
    others: Vec<(&'static str, Arc<Stack>)>,
    example: Example,
}

/// Collects what processes left.
#[derive(Debug)]
pub(crate) struct Sites {
    /// How many of one origin count.
    repeats: u32,
    sites: HashMap<Key, Site>,
    round: usize,
    /// What was left, but once from its place.
    pub single: u32,
    /// Things whose sites were not kept.
    pub too_many: u32,
}

impl Sites {
    pub(crate) fn new(repeats: u32) -> Self {
        Self { repeats: repeats.max(1), sites: HashMap::new(), round: 0, single: 0, too_many: 0 }
    }

    /// What comes from now on belongs to the next round.
    pub(crate) fn next_round(&mut self) {
        self.round += 1;
    }

    /// Takes what a process left when it ended.
    pub(crate) fn ended(&mut self, ended: &Ended, namer: &mut impl Namer) {
        let process = (ended.process.key, ended.process.comm.as_str());
        let fds = || ended.process.fds.iter().filter(|(fd, _)| **fd > 2);
        let own = fds().filter(|(_, slot)| slot.through == Through::Own);
        let own = self.repeated(own.map(|(fd, slot)| (*fd, &slot.open)).collect());
        let left = own.into_iter().map(|(fd, open)| fd_left(Kind::Fd, fd, open, process, namer));
        self.of_one_process(left.collect());
        let unseen = ended.unseen.iter().filter(|fd| **fd > 2).map(|fd| unseen_left(*fd, process));
        self.of_one_process(unseen.collect());
        let stray = fds().filter(|(_, slot)| is_stray(slot));
        let left = stray.map(|(fd, slot)| fd_left(Kind::ExecFd, *fd, &slot.open, process, namer));
        self.add_each(left.collect());
        // Whoever is killed had no chance to join anybody.
        if ended.code & KILLED == 0 {
            let left = ended.process.threads.iter().filter(|(_, thread)| !is_kernels(thread));
            let left = left.map(|(tid, thread)| thread_left(*tid, thread, process, namer));
            self.of_one_process(left.collect());
        }
        self.add_each(ended.bad_closes.iter().map(|bad| bad_close(bad, process, namer)).collect());
    }

    /// Takes a process that nobody waited for, or that goes on when the command has ended.
    pub(crate) fn process(&mut self, kind: Kind, child: &Child, namer: &mut impl Namer) {
        let stack = child.trace.as_ref().and_then(|trace| trace.named(namer));
        let key = Key::new(kind, stack.as_ref(), "clone", String::new(), &child.parent_comm);
        let example = Example {
            pid: child.key.tgid,
            number: child.key.tgid,
            resource: "process".to_owned(),
            target: child.words.clone(),
        };
        self.add_each(vec![Left { key, stack, others: Vec::new(), example }]);
    }

    /// Without names, those that may have an origin in common with so many others that it counts.
    fn repeated<'a>(&mut self, fds: Vec<(u32, &'a Rc<Open>)>) -> Vec<(u32, &'a Rc<Open>)> {
        let place = |open: &Open| (open.event.how, open.trace.as_ref().map_or(0, |trace| trace.ip));
        let mut counts: HashMap<(u32, u64), u32> = HashMap::new();
        fds.iter().for_each(|(_, open)| *counts.entry(place(open)).or_default() += 1);
        let all = fds.len();
        let repeated: Vec<_> =
            fds.into_iter().filter(|(_, open)| counts[&place(open)] >= self.repeats).collect();
        self.single += (all - repeated.len()) as u32;
        repeated
    }

    /// Adds what one process left; only what repeats in it counts.
    fn of_one_process(&mut self, left: Vec<Left>) {
        let mut groups: HashMap<Key, Vec<Left>> = HashMap::new();
        left.into_iter().for_each(|one| groups.entry(one.key.clone()).or_default().push(one));
        for (key, group) in groups {
            if (group.len() as u32) < self.repeats {
                self.single += group.len() as u32;
            } else {
                self.add(key, group);
            }
        }
    }

    /// Adds what counts together with that of other processes.
    fn add_each(&mut self, left: Vec<Left>) {
        left.into_iter().for_each(|one| self.add(one.key.clone(), vec![one]));
    }

    /// What counts, the most frequent first.
    pub(crate) fn into_findings(mut self) -> (Vec<Site>, u32) {
        let mut findings = Vec::new();
        for (_, site) in self.sites {
            let is_enough = match site.kind {
                Kind::ExecFd | Kind::Zombie => site.count >= self.repeats,
                _ => true,
            };
            if is_enough {
                findings.push(site);
            } else {
                self.single += site.count;
            }
        }
        findings.sort_by(|a, b| (a.kind, b.count, &a.comm).cmp(&(b.kind, a.count, &b.comm)));
        (findings, self.single)
    }

    fn add(&mut self, key: Key, group: Vec<Left>) {
        if self.sites.len() >= MAX_SITES && !self.sites.contains_key(&key) {
            self.too_many += group.len() as u32;
            return;
        }
        let round = self.round;
        let site = self.sites.entry(key).or_insert_with_key(|key| Site {
            kind: key.kind,
            comm: key.comm.clone(),
            syscall: key.syscall,
            thread: if key.kind == Kind::Thread { key.what.clone() } else { String::new() },
            stack: None,
            others: Vec::new(),
            count: 0,
            most: 0,
            processes: 0,
            rounds: Vec::new(),
            examples: Vec::new(),
        });
        site.count += group.len() as u32;
        site.most = site.most.max(group.len() as u32);
        site.processes += 1;
        site.rounds.resize(site.rounds.len().max(round + 1), 0);
        site.rounds[round] += group.len() as u32;
        for left in group {
            if site.stack.is_none() {
                (site.stack, site.others) = (left.stack, left.others);
            }
            if site.examples.len() < MAX_EXAMPLES {
                site.examples.push(left.example);
            }
        }
    }
}

impl Key {
    fn new(kind: Kind, stack: Option<&Arc<Stack>>, syscall: &'static str, what: String, comm: &str) -> Self {
        Self { kind, stack: stack.map(address), other: None, syscall, what, comm: comm.to_owned() }
    }
}

/// Equal stacks are one in memory for as long as somebody holds it, and a site does.
fn address(stack: &Arc<Stack>) -> usize {
    Arc::as_ptr(stack) as usize
}

/// Whether an fd reached another program by mistake: it was made without close-on-exec, and its number was nobody's
/// choice.
fn is_stray(slot: &Slot) -> bool {
    slot.through == Through::Exec
        && slot.open.is_of_tree()
        && !slot.open.has_cloexec()
        && !slot.open.is_placed()
}

/// Threads that the kernel makes for an io_uring (`create_io_thread`, since 5.12).
fn is_kernels(thread: &Thread) -> bool {
    thread.comm.starts_with("iou-wrk-") || thread.comm.starts_with("iou-sqp-")
}

fn fd_left(
    kind: Kind,
    fd: u32,
    open: &Open,
    (process, comm): (ProcKey, &str),
    namer: &mut impl Namer,
) -> Left {
    let stack = open.trace.as_ref().and_then(|trace| trace.named(namer));
    let (resource, target) = open.words();
    let what = if stack.as_ref().is_none_or(|stack| is_in_interpreter(stack)) {
        let is_numbered = target.contains(":[");
        format!("{resource} {}", if is_numbered { "" } else { &target })
    } else {
        String::new()
    };
    let key = Key::new(kind, stack.as_ref(), open.syscall(), what, comm);
    let example = Example { pid: process.tgid, number: fd, resource, target };
    Left { key, stack, others: Vec::new(), example }
}

/// An fd that no event told of.
fn unseen_left(fd: u32, (process, comm): (ProcKey, &str)) -> Left {
    let key = Key::new(Kind::Fd, None, "other", String::new(), comm);
    let example =
        Example { pid: process.tgid, number: fd, resource: "unknown".to_owned(), target: String::new() };
    Left { key, stack: None, others: Vec::new(), example }
}

fn thread_left(tid: u32, thread: &Thread, (process, comm): (ProcKey, &str), namer: &mut impl Namer) -> Left {
    let stack = thread.trace.as_ref().and_then(|trace| trace.named(namer));
    let kind = thread_type(&thread.comm).to_owned();
    let key = Key::new(Kind::Thread, stack.as_ref(), "clone", kind, comm);
    let target = thread.comm.clone();
    let example = Example { pid: process.tgid, number: tid, resource: "thread".to_owned(), target };
    Left { key, stack, others: Vec::new(), example }
}

fn bad_close(bad: &BadClose, (process, comm): (ProcKey, &str), namer: &mut impl Namer) -> Left {
    let named =
        |trace: &Option<Rc<Trace>>, namer: &mut _| trace.as_ref().and_then(|trace| trace.named(namer));
    let failed = named(&bad.trace, namer);
    let before = named(&bad.before.trace, namer);
    let opened = bad.before.open.as_ref().and_then(|open| named(&open.trace, namer));
    let (resource, target) =
        bad.before.open.as_ref().map_or_else(|| ("fd".to_owned(), String::new()), |open| open.words());
    let mut others = Vec::new();
    let (kind, stack) = if bad.is_of_another() {
        // Whose close found nothing did nothing wrong.
        others.extend(failed.clone().map(|stack| ("its owner's close then failed", stack)));
        (Kind::ForeignClose, before.clone())
    } else {
        others.extend(before.clone().map(|stack| ("closed before", stack)));
        (Kind::DoubleClose, failed.clone())
    };
    others.extend(opened.map(|stack| ("opened", stack)));
    let mut key = Key::new(kind, stack.as_ref(), "close", String::new(), comm);
    key.other = if kind == Kind::DoubleClose { before } else { failed }.as_ref().map(address);
    let example = Example { pid: process.tgid, number: bad.fd, resource, target };
    Left { key, stack, others, example }
}

/// Whether a stack ends in a program that runs others' code, and does not say which.
fn is_in_interpreter(stack: &Stack) -> bool {
    let Some(at) = stack.origin else { return true };
    let module = stack.frames.get(at.0).and_then(|frame| frame.module.as_deref()).unwrap_or_default();
    let file = module.rsplit('/').next().unwrap_or_default();
    let is_script = stack.frames[at.0].lines.first().is_some_and(|line| line.function.starts_with("py::"));
    let is_one =
        |name: &str| file.strip_prefix(name).is_some_and(|rest| !rest.starts_with(char::is_alphabetic));
    !is_script && INTERPRETERS.iter().any(|name| is_one(name))
}

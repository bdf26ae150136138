//! From what was left to findings: what has the same origin is one site, and a site counts when one process held
//! several of it at its end. One file that a program keeps until it ends is no leak; three from one line are.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    hash::{DefaultHasher, Hash, Hasher},
    rc::Rc,
    sync::Arc,
};

use plumb_common::task::ProcKey;

use super::{
    closes::BadClose,
    interpreter::is_interpreter,
    suppress::Kind,
    traces::{Namer, Trace},
    tree::{Ended, Open, Slot, Thread, Through},
};
use crate::{
    stacks::{Function, Stack},
    thread_type::thread_type,
};

/// Examples of one site.
const MAX_EXAMPLES: usize = 3;
/// Sites that are told apart; what comes beyond is counted.
const MAX_SITES: usize = 4096;
/// Bits of an exit code, as wait(2) has it, that name the signal that killed.
const KILLED: u32 = 0x7f;
/// What makes two things one site.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    kind: Kind,
    /// Of the line that it is put down to, whoever called that: two calls in one line are one place.
    place: Option<u64>,
    /// Of the second place that matters.
    other: Option<u64>,
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
    /// Ways on which that line was reached.
    pub ways: HashSet<u64>,
    /// Other places that belong to it, each with what happened there.
    pub others: Vec<(&'static str, Arc<Stack>)>,
    /// How many there were in all.
    pub count: u32,
    /// The most that one process held.
    pub most: u32,
    pub processes: u32,
    /// How many there were in each run of the command, or after each round.
    pub rounds: Vec<u32>,
    /// There are more after each round.
    pub grows: bool,
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
pub(super) struct Left {
    pub(super) key: Key,
    stack: Option<Arc<Stack>>,
    others: Vec<(&'static str, Arc<Stack>)>,
    /// What was made by one call has it in common.
    call: u64,
    /// Of the whole stack.
    way: u64,
    /// Of what it is, but for numbers.
    like: u64,
    pub(super) example: Example,
}

/// What counts at the end of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Judged {
    /// Whatever it left.
    AtEnd,
    /// Only what is wrong at any time, such as double closes: what it keeps is compared between rounds.
    ByRounds,
    /// As `AtEnd`, and the connections that it had accepted: it has been told to stop.
    Stopping,
}

/// Collects what processes left.
#[derive(Debug)]
pub(crate) struct Sites {
    /// How many of one origin count.
    repeats: u32,
    /// What counts at the end of a process.
    judged: Judged,
    sites: HashMap<Key, Site>,
    /// Found otherwise.
    found: Vec<Site>,
    round: usize,
    /// What was left, but once from its place.
    pub single: u32,
    /// Things whose sites were not kept.
    pub too_many: u32,
}

impl Sites {
    pub(crate) fn new(repeats: u32) -> Self {
        let judged = Judged::AtEnd;
        Self {
            repeats: repeats.max(1),
            judged,
            sites: HashMap::new(),
            found: Vec::new(),
            round: 0,
            single: 0,
            too_many: 0,
        }
    }

    /// From now on.
    pub(crate) fn judge(&mut self, judged: Judged) {
        self.judged = judged;
    }

    /// From so many left things on there may be something among them that counts, had their stacks not been lost.
    pub(crate) fn least(&self) -> u32 {
        // What grows is not among what is left.
        if self.judged == Judged::ByRounds { 0 } else { self.repeats }
    }

    /// What comes from now on belongs to the next round.
    pub(crate) fn next_round(&mut self) {
        self.round += 1;
    }

    /// Takes what a process left when it ended.
    pub(crate) fn ended(&mut self, ended: &Ended, namer: &mut impl Namer) {
        let process = (ended.process.key, ended.process.comm.as_str());
        self.add_each(ended.bad_closes.iter().map(|bad| bad_close(bad, process, namer)).collect());
        if self.judged == Judged::ByRounds {
            return;
        }
        if self.judged == Judged::Stopping {
            let accepted = ended.process.fds.iter().filter(|(_, slot)| slot.open.is_accepted());
            let left = accepted.map(|(fd, slot)| fd_left(Kind::InFlight, *fd, &slot.open, process, namer));
            self.add_each(left.collect());
        }
        let fds = || ended.process.fds.iter().filter(|(fd, _)| **fd > 2);
        // The connections of whoever is killed or told to stop are no leak.
        let is_ended = self.judged != Judged::AtEnd || ended.code & KILLED != 0;
        let is_judged = |slot: &Slot| !is_ended || !slot.open.is_accepted();
        let own = fds().filter(|(_, slot)| slot.through == Through::Own && is_judged(slot));
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
    }

    /// Takes a thread that did not stop, with where it is.
    pub(crate) fn unstopped(
        &mut self,
        comm: &str,
        thread: String,
        stack: Option<Arc<Stack>>,
        example: Example,
    ) {
        let key = Key::new(Kind::Unstopped, stack.as_ref(), "", thread, comm);
        let call = u64::from(example.number);
        self.add_each(vec![Left::new(key, stack, call, example)]);
    }

    /// Takes a site that was found otherwise.
    pub(crate) fn found(&mut self, site: Site) {
        self.found.push(site);
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
        self.add_each(vec![Left::new(key, stack, child.key.start_boottime, example)]);
    }

    /// Without names, those that may have an origin in common with so many others that it counts.
    fn repeated<'a>(&mut self, fds: Vec<(u32, &'a Rc<Open>)>) -> Vec<(u32, &'a Rc<Open>)> {
        let place = |open: &Open| (open.event.how, open.trace.as_ref().map_or(0, |trace| trace.ip));
        let mut calls: HashMap<(u32, u64), HashSet<u64>> = HashMap::new();
        fds.iter().for_each(|(_, open)| _ = calls.entry(place(open)).or_default().insert(open.call));
        let all = fds.len();
        let is_enough = |open: &Open| calls[&place(open)].len() >= self.repeats as usize;
        let repeated: Vec<_> = fds.into_iter().filter(|(_, open)| is_enough(open)).collect();
        self.single += (all - repeated.len()) as u32;
        repeated
    }

    /// Adds what one process left; only what repeats in it counts. From one line that is reached on different ways, as
    /// a function that opens whatever it is told, it does so when it is of one kind.
    fn of_one_process(&mut self, left: Vec<Left>) {
        let mut groups: HashMap<Key, Vec<Left>> = HashMap::new();
        left.into_iter().for_each(|one| groups.entry(one.key.clone()).or_default().push(one));
        for (key, group) in groups {
            // Both ends of a pipe come from one call.
            let (mut ways, mut likes): (HashMap<_, HashSet<u64>>, HashMap<_, HashSet<u64>>) =
                Default::default();
            for left in &group {
                ways.entry(left.way).or_default().insert(left.call);
                likes.entry(left.like).or_default().insert(left.call);
            }
            let is_enough = |calls: &HashSet<u64>| calls.len() >= self.repeats as usize;
            let repeats = |left: &Left| is_enough(&ways[&left.way]) || is_enough(&likes[&left.like]);
            let (repeated, single): (Vec<_>, Vec<_>) = group.into_iter().partition(repeats);
            self.single += single.len() as u32;
            if !repeated.is_empty() {
                self.add(key, repeated);
            }
        }
    }

    /// Adds what counts together with that of other processes.
    fn add_each(&mut self, left: Vec<Left>) {
        left.into_iter().for_each(|one| self.add(one.key.clone(), vec![one]));
    }

    /// What counts, the most frequent first.
    pub(crate) fn into_findings(mut self) -> (Vec<Site>, u32) {
        let mut findings = self.found;
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
        let of_process = group.len() as u32;
        let ways: Vec<u64> = group.iter().map(|left| left.way).collect();
        let mut group = group.into_iter();
        let site = match self.sites.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(free) => match group.next() {
                Some(left) => free.insert(left.into_site()),
                None => return,
            },
        };
        site.ways.extend(ways);
        site.count += of_process;
        site.most = site.most.max(of_process);
        site.processes += 1;
        site.rounds.resize(site.rounds.len().max(round + 1), 0);
        site.rounds[round] += of_process;
        let room = MAX_EXAMPLES.saturating_sub(site.examples.len());
        site.examples.extend(group.take(room).map(|left| left.example));
    }
}

impl Left {
    fn new(key: Key, stack: Option<Arc<Stack>>, call: u64, example: Example) -> Self {
        let way = stack.as_ref().map_or(0, |stack| hash_of(&stack.functions()));
        let mut hasher = DefaultHasher::new();
        example.resource.hash(&mut hasher);
        // Addresses and numbers differ each time.
        let is_path = example.target.contains('/') || example.resource == "file";
        example.target.split(|char: char| char.is_ascii_digit()).for_each(|part| {
            if is_path {
                part.hash(&mut hasher);
            }
        });
        let like = hasher.finish();
        Self { key, stack, others: Vec::new(), call, way, like, example }
    }

    /// The site of it.
    pub(super) fn into_site(self) -> Site {
        let Self { key, stack, others, example, way, .. } = self;
        let thread =
            if matches!(key.kind, Kind::Thread | Kind::Unstopped) { key.what } else { String::new() };
        Site {
            kind: key.kind,
            comm: key.comm,
            syscall: key.syscall,
            thread,
            stack,
            ways: [way].into(),
            others,
            count: 0,
            most: 0,
            processes: 0,
            rounds: Vec::new(),
            grows: false,
            examples: vec![example],
        }
    }
}

impl Key {
    fn new(kind: Kind, stack: Option<&Arc<Stack>>, syscall: &'static str, what: String, comm: &str) -> Self {
        Self { kind, place: stack.map(place_of), other: None, syscall, what, comm: comm.to_owned() }
    }
}

/// Equal for stacks that are put down to the same line; without one, for stacks with the same functions and lines.
fn place_of(stack: &Arc<Stack>) -> u64 {
    match stack.headline() {
        Some([Some(function), _]) => hash_of(&[function]),
        _ => hash_of(&stack.functions()),
    }
}

fn hash_of(functions: &[Function]) -> u64 {
    let mut hasher = DefaultHasher::new();
    for function in functions {
        function.words().hash(&mut hasher);
        if function.line.is_none() {
            function.offset.hash(&mut hasher);
        }
    }
    hasher.finish()
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
pub(super) fn is_kernels(thread: &Thread) -> bool {
    thread.comm.starts_with("iou-wrk-") || thread.comm.starts_with("iou-sqp-")
}

pub(super) fn fd_left(
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
    Left::new(key, stack, open.call, example)
}

/// An fd that no event told of.
fn unseen_left(fd: u32, (process, comm): (ProcKey, &str)) -> Left {
    let key = Key::new(Kind::Fd, None, "other", String::new(), comm);
    let example =
        Example { pid: process.tgid, number: fd, resource: "unknown".to_owned(), target: String::new() };
    Left::new(key, None, u64::from(fd), example)
}

pub(super) fn thread_left(
    tid: u32,
    thread: &Thread,
    (process, comm): (ProcKey, &str),
    namer: &mut impl Namer,
) -> Left {
    let stack = thread.trace.as_ref().and_then(|trace| trace.named(namer));
    let kind = thread_type(&thread.comm).to_owned();
    let key = Key::new(Kind::Thread, stack.as_ref(), "clone", kind, comm);
    let target = thread.comm.clone();
    let example = Example { pid: process.tgid, number: tid, resource: "thread".to_owned(), target };
    Left::new(key, stack, thread.since, example)
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
    key.other = if kind == Kind::DoubleClose { before } else { failed }.as_ref().map(place_of);
    let example = Example { pid: process.tgid, number: bad.fd, resource, target };
    Left { others, ..Left::new(key, stack, 0, example) }
}

/// Whether a stack ends in a program that runs others' code, and does not say which.
fn is_in_interpreter(stack: &Stack) -> bool {
    let Some(at) = stack.origin else { return true };
    let module = stack.frames.get(at.0).and_then(|frame| frame.module.as_deref()).unwrap_or_default();
    let is_script = stack.frames[at.0].lines.first().is_some_and(|line| line.function.starts_with("py::"));
    !is_script && is_interpreter(module)
}

//! Follows a command: reads what the kernel programs tell of it, and keeps the books.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    io,
    os::fd::AsFd,
    rc::{Rc, Weak},
    sync::Arc,
    time::{Duration, Instant},
};

use plumb_common::{counts, event::KIND_TABLE, file::FdRecord, task::ProcKey};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal, setpriority_process};

use super::command::reap;
use crate::{
    census::{Copied, MAX_BLOCKED},
    check::{
        Beside, Child, Cost, Drift, Example, Kind, Losses, Namer, Open, Rounds, Sites, Traces, Tree, Wanted,
    },
    clock,
    decode::{Event, Sample},
    failure::{Exit, Failure},
    files::OpenFile,
    kernel::{Kernel, MapEvent, Mappings, Plan, Ring},
    stacks::{Names, Stack},
    symbolise::Images,
    text,
    thread_type::thread_type,
    view,
};

/// More events than the ring holds.
const BATCH: usize = 65_536;
/// A stack whose event has not come after this time, in nanoseconds, belongs to one that was lost.
const PATIENCE: u64 = 5_000_000_000;
/// Nice value of the thread that reads.
const FIRST: i32 = -20;
/// Children of ended processes are asked for so often before they are somebody else's.
const TRIES: u32 = 20;

/// For children whose parents have ended, after the end of the command.
const SETTLE: Duration = Duration::from_millis(100);
/// Ended children that are remembered of one process: `make` has thousands, and waits for each.
const MAX_CHILDREN: usize = 4096;
/// Between two looks at new sockets.
const SOCKETS_EVERY: Duration = Duration::from_millis(500);

/// Gives stacks names by what the kernel told of the files of each process.
#[derive(Default)]
struct Stacks {
    names: Names,
    /// Of each run of the command.
    images: Vec<Images>,
}

impl Stacks {
    /// What a process ran at a time.
    fn image(&self, tgid: u32, time: u64) -> Option<ProcKey> {
        // A number may be another's in a later run.
        self.images.iter().rev().find_map(|images| images.at(tgid, time))
    }

    /// Takes what the kernel told of the last run.
    fn map(&mut self, events: Vec<MapEvent>) {
        if let Some(images) = self.images.last_mut() {
            images.take(self.names.symboliser(), events);
        }
    }

    /// Nothing more will be asked about a process that ended at that time.
    fn forget(&mut self, tgid: u32, time: u64) {
        for images in &mut self.images {
            images.forget(self.names.symboliser(), tgid, time);
        }
    }

    fn dropped(&self) -> u64 {
        self.images.iter().map(Images::dropped).sum()
    }
}

impl Namer for Stacks {
    fn name(&mut self, mut sample: Sample) -> Option<Arc<Stack>> {
        let header = &mut sample.head.header;
        header.process = self.image(header.process.tgid, header.time)?;
        self.names.of(vec![sample]).pop().map(|named| named.stack)
    }
}

/// A process whose parent ended before somebody waited for it.
struct Left {
    child: Child,
    /// It had ended before its parent did.
    is_zombie: bool,
    tries: u32,
}

pub(super) struct Follower {
    kernel: Kernel,
    ring: Ring,
    /// Those of the last run of the command.
    mappings: Option<Mappings>,
    /// Of the runs before.
    mappings_lost: u64,
    tree: Tree,
    traces: Traces,
    stacks: Stacks,
    pub(super) sites: Sites,
    pub(super) rounds: Rounds,
    /// Ended children of processes that have not ended.
    ended: HashMap<ProcKey, VecDeque<Child>>,
    left: Vec<Left>,
    /// First processes of the runs of the command.
    roots: HashSet<ProcKey>,
    /// Sockets of which only the name is known: what they are the events do not tell.
    sockets: Vec<Weak<Open>>,
    look_at_sockets: Instant,
    pub(super) processes: u64,
    /// Execs and ends of processes without the table that belongs to them.
    tables_lost: u64,
    /// Read last.
    batch: Vec<Event>,
    /// When the first process of the last run ended, nanoseconds since boot; 0 until then.
    pub(super) root_ended: u64,
}

impl Follower {
    pub(super) fn load(repeats: u32) -> Result<Self, Failure> {
        let mut kernel = Kernel::load_all(Plan::TREE)?;
        // Of more threads than there are processors the one that reads would get its share and no more, and what they do
        // meanwhile fills the rings. Where it is not allowed the losses are told.
        let _ = setpriority_process(None, FIRST);
        let ring = kernel.ring().map_err(|error| bug(&error))?;
        Ok(Self {
            kernel,
            ring,
            mappings: None,
            mappings_lost: 0,
            tree: Tree::default(),
            traces: Traces::default(),
            stacks: Stacks::default(),
            sites: Sites::new(repeats),
            rounds: Rounds::default(),
            ended: HashMap::new(),
            left: Vec::new(),
            roots: HashSet::new(),
            sockets: Vec::new(),
            look_at_sockets: Instant::now(),
            processes: 0,
            tables_lost: 0,
            batch: Vec::new(),
            root_ended: 0,
        })
    }

    /// Follows a process that has run nothing yet, and all that it will fork.
    pub(super) fn follow(&mut self, pid: Pid, comm: &str) -> Result<(), Failure> {
        let tgid = pid.as_raw_nonzero().get().unsigned_abs();
        let key = key_of(&mut self.kernel, tgid)?;
        self.kernel.watch(key, true).map_err(|error| bug(&error))?;
        self.mappings_lost += self.mappings.as_ref().map_or(0, Mappings::lost);
        let mappings = Mappings::follow(tgid).map_err(|error| bug(&error))?;
        for fd in mappings.fds() {
            self.ring.wake_for(fd)?;
        }
        self.mappings = Some(mappings);
        if self.alive() == 0 {
            // Nobody is left of the runs before.
            self.stacks.images.clear();
        }
        self.stacks.images.push(Images::new(key));
        self.tree.begin(key, comm, handed(tgid));
        self.roots.insert(key);
        self.root_ended = 0;
        self.processes += 1;
        Ok(())
    }

    pub(super) fn wake_for(&mut self, fd: impl AsFd) -> io::Result<()> {
        self.ring.wake_for(fd)
    }

    /// Waits for something to happen, or for the time to pass, and takes it in.
    pub(super) fn pump(&mut self, timeout: Duration) -> Result<(), Failure> {
        self.ring.wait(timeout).map_err(|error| bug(&error))?;
        // Used again: memory for so many costs more than they do.
        let mut events = std::mem::take(&mut self.batch);
        events.clear();
        self.ring.drain_into(&mut events, BATCH);
        let wanted = Wanted::of(&events);
        self.traces.add(self.ring.drain_stacks_if(|head| wanted.takes(head)));
        // Whatever those stacks run through was mapped before.
        self.stacks.map(self.mappings.as_mut().map(Mappings::drain).unwrap_or_default());
        for event in &events {
            self.apply(event);
        }
        for open in self.tree.take_fresh() {
            open.describe(OpenFile::of_event(&open.event));
            if open.is_socket() {
                self.sockets.push(Rc::downgrade(&open));
            }
        }
        if Instant::now() >= self.look_at_sockets {
            self.describe_sockets()?;
            self.look_at_sockets = Instant::now() + SOCKETS_EVERY;
        }
        self.traces.make_room(&mut self.stacks);
        if let Some(newest) = events.last() {
            self.traces.forget_before(newest.header().time.saturating_sub(PATIENCE));
        }
        self.batch = events;
        self.adopt();
        Ok(())
    }

    fn apply(&mut self, event: &Event) {
        let mut beside = Beside::default();
        let sample = self.traces.beside(event);
        let has_table = match event {
            Event::Exec(_) => true,
            Event::Exit(exit) => exit.group_dead != 0,
            _ => false,
        };
        if has_table && sample.is_none() && self.tree.get(event.header().process).is_some() {
            self.tables_lost += 1;
        }
        if let Some(sample) = sample {
            if sample.head.header.kind == KIND_TABLE {
                beside.table = open_fds(&sample);
            } else {
                beside.trace = Some(self.traces.trace(sample));
            }
        }
        if let Event::Clone(clone) = event {
            self.processes += u64::from(clone.child != clone.header.process);
        }
        let Some(ended) = self.tree.apply(event, beside) else { return };
        self.sites.ended(&ended, &mut self.stacks);
        let key = ended.process.key;
        if self.roots.contains(&key) {
            self.root_ended = event.header().time;
        }
        let children = self.ended.remove(&key).unwrap_or_default();
        // Its files are closed soon: what others have of it gets its names now.
        let of_children = children.iter().filter_map(|child| child.trace.clone());
        for trace in self.tree.traces_of(key).into_iter().chain(of_children) {
            trace.named(&mut self.stacks);
        }
        self.stacks.forget(key.tgid, event.header().time);
        // Those of its children that have ended and that it did not wait for are plumb's now.
        self.left.extend(children.into_iter().map(|child| Left { child, is_zombie: true, tries: 0 }));
        let Some(parent) = ended.process.parent else { return };
        let parent_comm = self.tree.get(parent).map(|parent| parent.comm.clone());
        let child = Child {
            key,
            trace: ended.process.trace.clone(),
            parent_comm: parent_comm.clone().unwrap_or_else(|| ended.process.comm.clone()),
            words: ended.process.comm.clone(),
        };
        if parent_comm.is_some() {
            let of_parent = self.ended.entry(parent).or_default();
            // The newest are the ones that nobody can have waited for yet.
            if of_parent.len() >= MAX_CHILDREN {
                of_parent.pop_front();
            }
            of_parent.push_back(child);
        } else {
            self.left.push(Left { child, is_zombie: false, tries: 0 });
        }
    }

    /// Asks the kernel what the sockets are that have been there for a while.
    fn describe_sockets(&mut self) -> Result<(), Failure> {
        let mut processes: HashMap<ProcKey, HashMap<u64, Rc<Open>>> = HashMap::new();
        for open in self.sockets.drain(..).filter_map(|open| open.upgrade()) {
            processes.entry(open.event.header.process).or_default().insert(open.event.file, open);
        }
        for (process, opens) in processes {
            let done = self.kernel.files(process, |record| {
                if let Some(open) = opens.get(&record.file) {
                    open.describe(OpenFile::describe(record));
                }
            });
            unless_gone(done)?;
        }
        Ok(())
    }

    /// Takes what all processes have after a round, as the kernel lists it.
    pub(super) fn end_round(&mut self) -> Result<(), Failure> {
        let keys: Vec<ProcKey> = self.tree.processes().map(|process| process.key).collect();
        for key in keys {
            let mut open = HashSet::new();
            unless_gone(self.kernel.files(key, |record| _ = open.insert(record.fd)))?;
            let running: HashSet<u32> =
                unless_gone(self.kernel.threads(key))?.iter().map(|thread| thread.tid).collect();
            if let Some(process) = self.tree.get_mut(key) {
                process.correct(&open);
                process.threads.retain(|tid, _| running.contains(tid));
            }
        }
        self.describe_sockets()?;
        self.rounds.add(self.tree.processes(), &mut self.stacks);
        Ok(())
    }

    /// Notes where the processes are that did not stop in time, and ends them.
    pub(super) fn end_unstopped(&mut self) -> Result<(), Failure> {
        let keys: Vec<(ProcKey, String)> =
            self.tree.processes().map(|process| (process.key, process.comm.clone())).collect();
        for (key, comm) in &keys {
            let threads = unless_gone(self.kernel.threads(*key))?;
            let there = threads.iter().filter(|thread| thread.exit_state == 0);
            let wanted: Vec<u32> = there.map(|thread| thread.tid).take(MAX_BLOCKED).collect();
            let census = Copied::take(*key, &threads, &wanted);
            let image = self.stacks.image(key.tgid, clock::boottime());
            let census = match image {
                Some(image) => self.stacks.names.census(image, census),
                None => census.map(|stacks| stacks.into_iter().map(|_| None).collect()),
            };
            let mut connections = 0;
            unless_gone(self.kernel.files(*key, |record| connections += u32::from(is_connected(record))))?;
            for blocked in census.blocked {
                let at = if blocked.wait_channel.is_empty() { "running" } else { &blocked.wait_channel };
                let target = format!(
                    "{} of pid {}, in {at}; the process has {connections} connections",
                    blocked.name, key.tgid
                );
                let example =
                    Example { pid: key.tgid, number: blocked.tid, resource: "thread".to_owned(), target };
                let thread = thread_type(&blocked.name).to_owned();
                self.sites.unstopped(comm, thread, blocked.stack, example);
            }
        }
        for (key, _) in keys {
            self.end(key)?;
        }
        Ok(())
    }

    /// Ends a process of the tree, and no other that may have its number by now.
    fn end(&mut self, key: ProcKey) -> Result<(), Failure> {
        let pid = i32::try_from(key.tgid).ok().and_then(Pid::from_raw);
        let Some(pidfd) = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) else {
            return Ok(());
        };
        // Looked at after it has been opened: from now on it cannot become another.
        if self.kernel.processes()?.iter().any(|record| record.key == key) {
            // It may have ended meanwhile.
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        }
        Ok(())
    }

    /// Waits for children that came to plumb when their parents ended.
    fn adopt(&mut self) {
        let mut zombies = Vec::new();
        self.left.retain_mut(|left| {
            left.tries += 1;
            let pid = i32::try_from(left.child.key.tgid).ok().and_then(Pid::from_raw);
            let is_reaped = pid.is_none_or(|pid| reap(pid).is_ok_and(|status| status.is_some()));
            if is_reaped && left.is_zombie {
                zombies.push(left.child.clone());
            }
            !is_reaped && left.tries < TRIES
        });
        for child in zombies {
            self.sites.process(Kind::Zombie, &child, &mut self.stacks);
        }
    }

    /// Waits until children whose parents have ended are told apart.
    pub(super) fn settle(&mut self) -> Result<(), Failure> {
        let end = Instant::now() + SETTLE;
        self.pump(Duration::ZERO)?;
        while !self.left.is_empty() && Instant::now() < end {
            self.pump(Duration::from_millis(5))?;
        }
        self.left.clear();
        Ok(())
    }

    /// Processes that run now.
    pub(super) fn alive(&self) -> usize {
        self.tree.processes().count()
    }

    /// Notes those that still run, by the word of the kernel: the command has ended.
    pub(super) fn note_orphans(&mut self) -> Result<(), Failure> {
        let records = self.kernel.processes()?;
        let running: HashSet<ProcKey> =
            records.iter().filter(|record| record.exit_state == 0).map(|record| record.key).collect();
        let orphans: Vec<Child> = (self.tree.processes())
            .filter(|process| !self.roots.contains(&process.key) && running.contains(&process.key))
            .map(|process| {
                let parent = process.parent.and_then(|parent| self.tree.get(parent));
                Child {
                    key: process.key,
                    trace: process.trace.clone(),
                    parent_comm: parent.map_or_else(|| process.comm.clone(), |parent| parent.comm.clone()),
                    words: command_line(process.key.tgid).unwrap_or_else(|| process.comm.clone()),
                }
            })
            .collect();
        for orphan in orphans {
            self.sites.process(Kind::Orphan, &orphan, &mut self.stacks);
        }
        Ok(())
    }

    /// What was not seen.
    pub(super) fn losses(&self) -> Result<Losses, Failure> {
        let counts = self.kernel.counts()?;
        let of_stacks: u64 = counts.lost(counts::STACK);
        Ok(Losses {
            events: view::lost(&counts) + self.ring.ledger().rejected + self.kernel.not_run(),
            stacks: of_stacks.saturating_sub(self.tables_lost) + self.ring.stack_ledger().rejected,
            tables: self.tables_lost,
            mappings: self.mappings_lost
                + self.mappings.as_ref().map_or(0, Mappings::lost)
                + self.stacks.dropped(),
            processes: self.tree.left_out(),
            sites: u64::from(self.sites.too_many),
        })
    }

    /// How far the events were from the truth.
    pub(super) fn drift(&self) -> Drift {
        self.tree.drift()
    }

    /// What it took so far.
    pub(super) fn cost(&self) -> Result<Cost, Failure> {
        let counts = self.kernel.counts()?;
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Ok(Cost {
            kernel_seconds: Duration::from_nanos(counts.spent()).as_secs_f64(),
            plumb_seconds: time.tv_sec as f64 + time.tv_nsec as f64 / 1e9,
            events: counts.of_outcome(counts::SENT),
        })
    }
}

fn key_of(kernel: &mut Kernel, tgid: u32) -> Result<ProcKey, Failure> {
    let found = kernel.processes()?.into_iter().find(|record| record.key.tgid == tgid);
    found.map(|record| record.key).ok_or_else(|| {
        Failure::new(
            Exit::Error,
            "the kernel does not show the command",
            "in a container plumb needs the host's pid namespace; `plumb doctor` tells",
        )
    })
}

/// A process that has ended has nothing.
fn unless_gone<T: Default>(listed: io::Result<T>) -> io::Result<T> {
    match listed {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(T::default()),
        listed => listed,
    }
}

/// Whether it is a TCP connection (include/net/tcp_states.h: all but CLOSE and LISTEN).
fn is_connected(record: &FdRecord) -> bool {
    const CLOSE: u32 = 7;
    const LISTEN: u32 = 10;
    let socket = &record.socket;
    let is_tcp = record.is_socket != 0 && socket.kind == 1 && matches!(socket.family, 2 | 10);
    is_tcp && !matches!(socket.state, 0 | CLOSE | LISTEN)
}

/// The fds that a process has.
fn handed(tgid: u32) -> Vec<u32> {
    let entries = std::fs::read_dir(format!("/proc/{tgid}/fd"));
    let number = |entry: io::Result<std::fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
    entries.map(|entries| entries.filter_map(number).collect()).unwrap_or_default()
}

/// The numbers that are taken in a table.
fn open_fds(sample: &Sample) -> Option<BTreeSet<u32>> {
    // A table that could not be read, or not all of it, says nothing.
    if sample.bytes.len() * 8 != sample.head.made as usize {
        return None;
    }
    let bits = (0..).zip(&sample.bytes).filter(|(_, byte)| **byte != 0);
    Some(
        bits.flat_map(|(at, byte)| {
            (0..8).filter(move |bit| byte >> bit & 1 == 1).map(move |bit| at * 8 + bit)
        })
        .collect(),
    )
}

/// The arguments of a process, in one line.
fn command_line(tgid: u32) -> Option<String> {
    let bytes = std::fs::read(format!("/proc/{tgid}/cmdline")).ok().filter(|bytes| !bytes.is_empty())?;
    let words: Vec<String> =
        bytes.split(|byte| *byte == 0).filter(|word| !word.is_empty()).map(text::printable).collect();
    let line: String = words.join(" ").chars().take(200).collect();
    Some(line)
}

pub(super) fn bug(error: &dyn std::fmt::Display) -> Failure {
    Failure::new(
        Exit::Error,
        format!("the command cannot be followed: {error}"),
        "`plumb doctor` may know why",
    )
}

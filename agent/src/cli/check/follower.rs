//! Follows a command: reads what the kernel programs tell of it, and keeps the books.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    os::fd::AsFd,
    time::Duration,
};

use plumb_common::{counts, event::KIND_TABLE, task::ProcKey};
use rustix::process::Pid;

use super::command::reap;
use crate::{
    check::{Beside, Child, Kind, Namer, Sites, Traces, Tree, Wanted},
    decode::{Event, Sample},
    failure::{Exit, Failure},
    files::OpenFile,
    kernel::{Kernel, Mappings, Plan, Ring},
    stacks::{Names, Stack},
    symbolise::Images,
    text, view,
};

/// More events than the ring holds.
const BATCH: usize = 65_536;
/// A stack whose event has not come after this time, in nanoseconds, belongs to one that was lost.
const PATIENCE: u64 = 5_000_000_000;
/// Children of ended processes are asked for so often before they are somebody else's.
const TRIES: u32 = 20;

/// Gives stacks names by what the kernel told of the files of each process.
#[derive(Default)]
struct Stacks {
    names: Names,
    images: Images,
}

impl Namer for Stacks {
    fn name(&mut self, mut sample: Sample) -> Option<std::sync::Arc<Stack>> {
        let header = &mut sample.head.header;
        header.process = self.images.at(header.process.tgid, header.time)?;
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
    mappings: Mappings,
    tree: Tree,
    traces: Traces,
    stacks: Stacks,
    pub(super) sites: Sites,
    /// Ended children of processes that have not ended.
    ended: HashMap<ProcKey, Vec<Child>>,
    left: Vec<Left>,
    pub(super) processes: u64,
}

impl Follower {
    pub(super) fn load(repeats: u32) -> Result<(Kernel, Sites), Failure> {
        let kernel = Kernel::load_all(Plan::TREE)?;
        Ok((kernel, Sites::new(repeats)))
    }

    /// Follows a process that has run nothing yet.
    pub(super) fn follow(mut kernel: Kernel, sites: Sites, pid: Pid, comm: &str) -> Result<Self, Failure> {
        let tgid = pid.as_raw_nonzero().get().unsigned_abs();
        let ring = kernel.ring().map_err(|error| bug(&error))?;
        let key = key_of(&mut kernel, tgid)?;
        kernel.watch(key, true).map_err(|error| bug(&error))?;
        let mappings = Mappings::follow(tgid).map_err(|error| bug(&error))?;
        let mut follower = Self {
            kernel,
            ring,
            mappings,
            tree: Tree::default(),
            traces: Traces::default(),
            stacks: Stacks::default(),
            sites,
            ended: HashMap::new(),
            left: Vec::new(),
            processes: 1,
        };
        for fd in follower.mappings.fds() {
            follower.ring.wake_for(fd)?;
        }
        follower.tree.begin(key, comm, handed(tgid));
        Ok(follower)
    }

    pub(super) fn wake_for(&mut self, fd: impl AsFd) -> io::Result<()> {
        self.ring.wake_for(fd)
    }

    /// Waits for something to happen, or for the time to pass, and takes it in.
    pub(super) fn pump(&mut self, timeout: Duration) -> Result<(), Failure> {
        self.ring.wait(timeout).map_err(|error| bug(&error))?;
        let events = self.ring.drain(BATCH);
        let wanted = Wanted::of(&events);
        self.traces.add(self.ring.drain_stacks_if(|head| wanted.takes(head)));
        // Whatever those stacks run through was mapped before.
        self.stacks.images.take(self.stacks.names.symboliser(), self.mappings.drain());
        for event in &events {
            self.apply(event);
        }
        for open in self.tree.take_fresh() {
            open.describe(OpenFile::of_event);
        }
        self.traces.make_room(&mut self.stacks);
        if let Some(newest) = events.last() {
            self.traces.forget_before(newest.header().time.saturating_sub(PATIENCE));
        }
        self.adopt();
        Ok(())
    }

    fn apply(&mut self, event: &Event) {
        let mut beside = Beside::default();
        if let Some(sample) = self.traces.beside(event) {
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
        // Those of its children that have ended and that it did not wait for are plumb's now.
        let children = self.ended.remove(&key).unwrap_or_default();
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
            self.ended.entry(parent).or_default().push(child);
        } else {
            self.left.push(Left { child, is_zombie: false, tries: 0 });
        }
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

    /// Processes that run now.
    pub(super) fn alive(&self) -> usize {
        self.tree.processes().count()
    }

    /// Notes those that still run: the command has ended.
    pub(super) fn note_orphans(&mut self) {
        let root = self.tree.processes().find(|process| process.parent.is_none()).map(|process| process.key);
        let orphans: Vec<Child> = (self.tree.processes())
            .filter(|process| Some(process.key) != root)
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
    }

    /// What was not seen.
    pub(super) fn losses(&self) -> Result<Losses, Failure> {
        let counts = self.kernel.counts()?;
        let of_stacks = counts::LOSSES.map(|outcome| counts.of(counts::STACK, outcome));
        Ok(Losses {
            events: view::lost(&counts) + self.ring.ledger().rejected + self.kernel.not_run(),
            stacks: of_stacks.iter().sum::<u64>() + self.ring.stack_ledger().rejected,
            left_out: self.tree.drift().left_out,
            seen: counts.of_outcome(counts::SENT),
        })
    }
}

/// What was not seen, in numbers.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Losses {
    pub(super) events: u64,
    pub(super) stacks: u64,
    /// Processes for which there was no room.
    pub(super) left_out: u64,
    /// Events that were received.
    pub(super) seen: u64,
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

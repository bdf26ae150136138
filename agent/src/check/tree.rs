//! The processes of a command: what each has open and which threads it has, from the first instruction to the last.
//! Pure: takes events with what came beside them, and returns what was left when a process ended.
//!
//! ```text
//!  forked ----------> runs <----+
//!  (its parent's fds)  |  |     | exec: what stays open was handed on,
//!                      |  +-----+       threads and closes begin anew
//!                      v
//!                    ended: the kernel's own table says what was open
//! ```

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    rc::{Rc, Weak},
};

use bytemuck::Zeroable;
use plumb_common::{
    event::{
        CLONE_THREAD, Clone as CloneEvent, Exit, FD_BAD_CLOSE, FD_CLOSE_ON_EXEC, FD_CLOSED, FdChange, Header,
        MARK_CLOEXEC, MARK_REUSED, MARK_SAME_CALL,
    },
    syscalls,
    task::ProcKey,
};

use serde::Serialize;

use super::{
    closes::{BadClose, Closes},
    traces::Trace,
};
use crate::{decode::Event, files::OpenFile, text};

/// An fd that a process of the tree made.
#[derive(Debug)]
pub(crate) struct Open {
    pub event: FdChange,
    pub trace: Option<Rc<Trace>>,
    /// When the first fd of its call was made: equal for both ends of a pipe.
    pub call: u64,
    /// What it is, as found while it was open.
    described: RefCell<Option<OpenFile>>,
}

impl Open {
    pub(crate) fn new(event: FdChange, trace: Option<Rc<Trace>>) -> Self {
        let call = event.header.time;
        Self { event, trace, call, described: RefCell::new(None) }
    }

    /// Says what it is.
    pub(crate) fn describe(&self, found: OpenFile) {
        self.described.replace(Some(found));
    }

    /// Kind and target.
    pub(crate) fn words(&self) -> (String, String) {
        match &*self.described.borrow() {
            Some(file) => (file.kind.clone(), file.target.clone()),
            None => {
                let file = OpenFile::of_name(&self.event);
                (file.kind, file.target)
            }
        }
    }

    /// One of which only the number is known: it was there when the command began, or no event told of it.
    pub(crate) fn unseen(process: ProcKey, fd: u32) -> Self {
        let mut event = FdChange::zeroed();
        (event.header.process, event.fd, event.fd_last, event.how) = (process, fd, fd, syscalls::OTHER);
        Self::new(event, None)
    }

    /// Whether a process of the tree made it.
    pub(crate) fn is_of_tree(&self) -> bool {
        self.event.header.time != 0
    }

    /// Name of the call.
    pub(crate) fn syscall(&self) -> &'static str {
        syscalls::name(self.event.how)
    }

    /// Whether the number was chosen by the program: such an fd is meant for whoever runs next.
    pub(crate) fn is_placed(&self) -> bool {
        matches!(self.syscall(), "dup2" | "dup3" | "fcntl" | "fcntl64")
    }

    /// Whether it is a connection that somebody else began.
    pub(crate) fn is_accepted(&self) -> bool {
        matches!(self.syscall(), "accept" | "accept4")
    }

    pub(crate) fn is_socket(&self) -> bool {
        self.event.mode & 0o170_000 == 0o140_000
    }

    pub(crate) fn has_cloexec(&self) -> bool {
        self.event.marks & MARK_CLOEXEC != 0
    }
}

/// How an fd came into a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Through {
    /// It made the fd itself.
    Own,
    /// Its parent had it.
    Fork,
    /// An earlier program had it.
    Exec,
}

#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub open: Rc<Open>,
    pub through: Through,
}

#[derive(Clone, Debug)]
pub(crate) struct Thread {
    pub since: u64,
    pub comm: String,
    pub trace: Option<Rc<Trace>>,
}

/// One process that has not ended.
#[derive(Debug)]
pub(crate) struct Process {
    pub key: ProcKey,
    pub parent: Option<ProcKey>,
    pub comm: String,
    /// Whoever forked it.
    pub trace: Option<Rc<Trace>>,
    pub fds: BTreeMap<u32, Slot>,
    /// Those beside the first one.
    pub threads: HashMap<u32, Thread>,
    /// The last call of each thread that made an fd.
    calls: HashMap<u32, u64>,
    closes: Closes,
}

/// A process at its end.
#[derive(Debug)]
pub(crate) struct Ended {
    pub process: Process,
    /// As wait(2) reports it.
    pub code: u32,
    /// Fds that were open though no event had told of them; of these only the number is known.
    pub unseen: BTreeSet<u32>,
    pub bad_closes: Vec<BadClose>,
}

/// What came beside an event.
#[derive(Debug, Default)]
pub(crate) struct Beside {
    /// The stack of whoever did it.
    pub trace: Option<Rc<Trace>>,
    /// The open fds.
    pub table: Option<BTreeSet<u32>>,
}

/// How far the events were from the kernel's own tables, at the ends of processes. Mended, and told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Drift {
    /// Fds that were open, by a call that is not followed.
    pub opens_unseen: u64,
    /// Fds that were not open any more.
    pub closes_unseen: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Tree {
    processes: HashMap<ProcKey, Process>,
    /// What was opened since this was asked for.
    fresh: Vec<Weak<Open>>,
    drift: Drift,
    /// Processes for which there was no room.
    left_out: u64,
}

impl Tree {
    /// Adds a process that has run nothing yet, with what was handed to it.
    pub(crate) fn begin(&mut self, root: ProcKey, comm: &str, handed: impl IntoIterator<Item = u32>) {
        let mut process = Process::new(root, None, comm.to_owned(), None);
        let slot = |fd| (fd, Slot { open: Rc::new(Open::unseen(root, fd)), through: Through::Exec });
        process.fds = handed.into_iter().map(slot).collect();
        self.processes.insert(root, process);
    }

    pub(crate) fn drift(&self) -> Drift {
        self.drift
    }

    /// Processes for which there was no room.
    pub(crate) fn left_out(&self) -> u64 {
        self.left_out
    }

    /// What was opened since this was asked last and is still there.
    pub(crate) fn take_fresh(&mut self) -> Vec<Rc<Open>> {
        self.fresh.drain(..).filter_map(|open| open.upgrade()).collect()
    }

    /// Stacks of a process that belong to others: of whoever it forked, and of fds that these may hand on.
    pub(crate) fn traces_of(&self, process: ProcKey) -> Vec<Rc<Trace>> {
        let mut traces = Vec::new();
        for other in self.processes.values().filter(|other| other.key != process) {
            let is_parent = other.parent == Some(process);
            traces.extend(other.trace.iter().filter(|_| is_parent).cloned());
            let handed = other.fds.values().filter(|slot| {
                slot.open.event.header.process == process
                    && !slot.open.has_cloexec()
                    && !slot.open.is_placed()
            });
            traces.extend(handed.filter_map(|slot| slot.open.trace.clone()));
        }
        traces
    }

    pub(crate) fn processes(&self) -> impl Iterator<Item = &Process> {
        self.processes.values()
    }

    pub(crate) fn get_mut(&mut self, key: ProcKey) -> Option<&mut Process> {
        self.processes.get_mut(&key)
    }

    pub(crate) fn get(&self, key: ProcKey) -> Option<&Process> {
        self.processes.get(&key)
    }

    /// Applies one event. A process that ends is returned.
    pub(crate) fn apply(&mut self, event: &Event, beside: Beside) -> Option<Ended> {
        match event {
            Event::Clone(clone) if clone.flags & CLONE_THREAD != 0 => {
                let process = self.of(&clone.header)?;
                let thread = Thread {
                    since: clone.header.time,
                    comm: text::terminated(&clone.header.comm),
                    trace: beside.trace,
                };
                process.threads.insert(clone.child_tid, thread);
            }
            Event::Clone(clone) => self.forked(clone, beside.trace),
            Event::Exec(exec) => {
                let process = self.processes.get_mut(&exec.header.process)?;
                process.comm = text::terminated(&exec.header.comm);
                self.drift.opens_unseen += process.run(beside.table.as_ref());
            }
            Event::Rename(rename) => {
                let name = text::terminated(&rename.header.comm);
                let process = self.of(&rename.header)?;
                match process.threads.get_mut(&rename.header.tid) {
                    Some(thread) => thread.comm = name,
                    None => process.comm = name,
                }
            }
            Event::Fd(change) => {
                let opened = self.of(&change.header)?.change(change, beside.trace);
                self.fresh.extend(opened.as_ref().map(Rc::downgrade));
            }
            Event::Exit(exit) if exit.group_dead != 0 => return self.ended(exit, beside.table),
            Event::Exit(exit) => self.of(&exit.header)?.thread_ended(exit),
            Event::Signal(_) | Event::Socket(_) => {}
        }
        None
    }

    fn of(&mut self, header: &Header) -> Option<&mut Process> {
        self.processes.get_mut(&header.process)
    }

    fn forked(&mut self, clone: &CloneEvent, trace: Option<Rc<Trace>>) {
        if clone.left_out != 0 {
            self.left_out += 1;
            return;
        }
        let parent = self.processes.get(&clone.header.process);
        let comm = parent.map_or_else(|| text::terminated(&clone.header.comm), |parent| parent.comm.clone());
        let mut child = Process::new(clone.child, Some(clone.header.process), comm, trace);
        if let Some(parent) = parent {
            let handed = |slot: &Slot| {
                let through = if slot.through == Through::Exec { Through::Exec } else { Through::Fork };
                Slot { open: Rc::clone(&slot.open), through }
            };
            child.fds = parent.fds.iter().map(|(fd, slot)| (*fd, handed(slot))).collect();
        }
        self.processes.insert(clone.child, child);
    }

    fn ended(&mut self, exit: &Exit, table: Option<BTreeSet<u32>>) -> Option<Ended> {
        let mut process = self.processes.remove(&exit.header.process)?;
        process.thread_ended(exit);
        let mut unseen = BTreeSet::new();
        if let Some(table) = table {
            let seen = process.fds.len();
            process.fds.retain(|fd, _| table.contains(fd));
            self.drift.closes_unseen += (seen - process.fds.len()) as u64;
            unseen = table.into_iter().filter(|fd| !process.fds.contains_key(fd)).collect();
            self.drift.opens_unseen += unseen.len() as u64;
        }
        let bad_closes = std::mem::take(&mut process.closes).into_bad();
        Some(Ended { process, code: exit.code, unseen, bad_closes })
    }
}

impl Process {
    fn new(key: ProcKey, parent: Option<ProcKey>, comm: String, trace: Option<Rc<Trace>>) -> Self {
        let (fds, threads, calls, closes) = Default::default();
        Self { key, parent, comm, trace, fds, threads, calls, closes }
    }

    /// It runs another program. Returns how many fds it has been handed of which no event had told.
    fn run(&mut self, table: Option<&BTreeSet<u32>>) -> u64 {
        let stays = |fd: &u32, slot: &Slot| match table {
            Some(table) => table.contains(fd),
            None => !slot.open.has_cloexec(),
        };
        self.fds.retain(|fd, slot| stays(fd, slot));
        self.fds.values_mut().for_each(|slot| slot.through = Through::Exec);
        self.threads.clear();
        self.closes = Closes::default();
        // They are not this program's.
        let known = self.fds.len();
        let unseen = |fd| Slot { open: Rc::new(Open::unseen(self.key, fd)), through: Through::Exec };
        table.into_iter().flatten().for_each(|fd| _ = self.fds.entry(*fd).or_insert_with(|| unseen(*fd)));
        (self.fds.len() - known) as u64
    }

    /// Takes which fds the kernel lists: no event may have told that one is there, or has gone.
    pub(crate) fn correct(&mut self, open: &HashSet<u32>) {
        self.fds.retain(|fd, _| open.contains(fd));
        let unseen = |fd| Slot { open: Rc::new(Open::unseen(self.key, fd)), through: Through::Own };
        open.iter().for_each(|fd| _ = self.fds.entry(*fd).or_insert_with(|| unseen(*fd)));
    }

    fn thread_ended(&mut self, exit: &Exit) {
        // A thread that ends with its whole process was still there at the end, but for the one that wanted it.
        self.calls.remove(&exit.header.tid);
        if exit.group_exit == 0 || exit.called != 0 {
            self.threads.remove(&exit.header.tid);
        }
    }

    /// Returns what was opened.
    fn change(&mut self, event: &FdChange, trace: Option<Rc<Trace>>) -> Option<Rc<Open>> {
        match event.change {
            FD_CLOSE_ON_EXEC => {}
            FD_BAD_CLOSE => self.closes.failed(event, trace),
            FD_CLOSED if event.fd == event.fd_last => {
                // The event of an fd that was put into the slot since may have come first.
                let is_reused = event.marks & MARK_REUSED != 0;
                let goes = |slot: &Slot| !is_reused || slot.open.event.file != event.file;
                let gone = self.fds.get(&event.fd).is_some_and(goes).then(|| self.fds.remove(&event.fd));
                self.closes.closed(event, gone.flatten().map(|slot| slot.open), trace);
            }
            FD_CLOSED => {
                let gone: Vec<u32> = self.fds.range(event.fd..=event.fd_last).map(|(fd, _)| *fd).collect();
                gone.iter().for_each(|fd| drop(self.fds.remove(fd)));
            }
            _ => {
                let known = self.fds.get(&event.fd).map(|slot| slot.open.event.file);
                // The number of an fd that is open anyway: a forged result.
                if known != Some(event.file) || event.file == 0 {
                    let mut open = Open::new(*event, trace);
                    let of_thread = self.calls.entry(event.header.tid).or_default();
                    if event.marks & MARK_SAME_CALL != 0 {
                        open.call = *of_thread;
                    }
                    *of_thread = open.call;
                    let open = Rc::new(open);
                    self.closes.opened(event);
                    self.fds.insert(event.fd, Slot { open: Rc::clone(&open), through: Through::Own });
                    return Some(open);
                }
            }
        }
        None
    }
}

#[cfg(test)]
#[path = "tree_tests.rs"]
mod tests;

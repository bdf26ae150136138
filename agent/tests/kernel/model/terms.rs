//! The words of the model: what it holds, what it tells the puppets, and what it expects.

use std::collections::BTreeMap;

/// A thread, for as long as the run takes; a process has the name of its first leader.
pub(crate) type Task = u32;
/// A `files_struct`.
pub(crate) type TableId = u32;
/// An open file description.
pub(crate) type FileId = u32;

/// What a kernel can do, and what the self-tests make the model believe.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// `CLOSE_RANGE_CLOEXEC`, since 5.11.
    pub(crate) mark_range: bool,
    /// The target of dup2 and dup3 is closed first. True on Linux.
    pub(crate) dup2_closes: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Held {
    pub(crate) file: FileId,
    pub(super) cloexec: bool,
}

pub(crate) type Table = BTreeMap<u32, Held>;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Thread {
    pub(crate) task: Task,
    pub(crate) table: TableId,
    /// The leader has ended; its number and its place in the count stay until the process is over.
    pub(crate) gone: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Process {
    pub(crate) id: Task,
    pub(super) parent: Task,
    pub(crate) threads: BTreeMap<usize, Thread>,
    pub(crate) leader: usize,
    pub(super) actor: usize,
}

impl Process {
    pub(crate) fn leader(&self) -> Thread {
        self.threads[&self.leader]
    }

    pub(super) fn actor(&self) -> Thread {
        self.threads[&self.actor]
    }

    pub(crate) fn alive(&self) -> impl Iterator<Item = &Thread> {
        self.threads.values().filter(|thread| !thread.gone)
    }
}

/// Commands that use the same thing in different puppets must keep their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Touch {
    Puppet(usize),
    Table(TableId),
    Mailbox,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Reply {
    Is([i32; 4]),
    /// The id of this new task.
    Task(Task),
}

/// One command for one puppet.
#[derive(Debug)]
pub(crate) struct Step {
    pub(crate) slot: usize,
    pub(crate) words: [u32; 5],
    pub(crate) touches: Vec<Touch>,
    pub(crate) reply: Reply,
}

/// One event that must come.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Expect {
    /// By a call that installs or removes fds; `file` where one was installed.
    Fd {
        by: Task,
        call: u32,
        change: u32,
        fd: u32,
        fd_last: u32,
        table: TableId,
        file: Option<FileId>,
    },
    Clone {
        by: Task,
        child: Task,
        thread: bool,
    },
    Rename {
        by: Task,
    },
    Exec {
        by: Task,
        old: Task,
    },
    /// The runtime of a new image opens files one after the other, each at this fd.
    Start {
        by: Task,
        fd: u32,
    },
    /// In no order with others.
    Exit {
        by: Task,
        code: Option<u32>,
    },
}

/// The process whose event it is.
pub(crate) type Expected = (Task, Expect);

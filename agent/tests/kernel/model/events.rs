//! The events: each that the model expects comes once and in its process's order, no other comes, and the
//! ledger agrees. The only place that knows what a way of attaching reports.

use std::collections::{BTreeMap, HashMap, VecDeque};

use plumb::{
    decode::Event,
    kernel::{Kernel, Ring, Seam},
};
use plumb_common::{
    counts::{self, Counts, OUTCOMES, SENT},
    event::{CLONE_THREAD, Exit, FD_CLOSE_ON_EXEC, FD_CLOSED, FD_OPENED, FD_UNKNOWN, FdChange, Header},
    syscalls,
    task::ProcKey,
};

use super::{
    Mismatch,
    check::Addresses,
    protocol::STARTED_FD,
    terms::{Expect, Task},
    world::World,
};

/// Whether this way of attaching tells of what the model expects.
fn reports(seam: Seam, expect: &Expect) -> bool {
    match (seam, expect) {
        (Seam::SysExit, Expect::Fd { call, .. }) => syscalls::TABLE.iter().any(|known| known.nr == *call),
        // The functions see each fd that goes, of a range too, but not its number.
        (Seam::Functions, Expect::Fd { call, change, .. }) => {
            *change != FD_CLOSE_ON_EXEC && (*change != FD_CLOSED || i64::from(*call) == libc::SYS_close)
        }
        _ => true,
    }
}

/// Whether an event says which fd it is about.
fn is_numbered(event: &Event) -> bool {
    !matches!(event, Event::Fd(change) if change.fd == FD_UNKNOWN)
}

pub(crate) struct Watch {
    ring: Ring,
    seam: Seam,
    keys: HashMap<ProcKey, Task>,
    ledger: Counts,
    pub(crate) seen: u64,
}

/// What is still due of one process.
#[derive(Default)]
struct Due {
    in_order: VecDeque<Expect>,
    /// By thread id, with the code where it is known.
    exits: Vec<(u32, Option<u32>)>,
    /// An exit said that it was the last.
    dead: bool,
    /// A file of a new image is open.
    starting: bool,
}

impl Watch {
    pub(crate) fn new(ring: Ring, seam: Seam) -> Self {
        Self { ring, seam, keys: HashMap::new(), ledger: Counts::default(), seen: 0 }
    }

    /// Forgets everything up to now; the stage alone is there.
    pub(crate) fn reset(&mut self, kernel: &mut Kernel, stage: u32) {
        self.ring.drain(usize::MAX);
        self.ledger = kernel.counts().unwrap();
        let mut records = kernel.processes().unwrap().into_iter();
        let record = records.find(|record| record.key.tgid == stage).unwrap();
        self.keys = HashMap::from([(record.key, 0)]);
    }

    /// Compares what came with what the model expects since the last time.
    pub(crate) fn check(
        &mut self,
        world: &World,
        tids: &BTreeMap<Task, u32>,
        kernel: &Kernel,
        known: &mut Addresses,
    ) -> Result<(), Mismatch> {
        let mut due: HashMap<Task, Due> = HashMap::new();
        for (process, expect) in &world.expected {
            let due = due.entry(*process).or_default();
            match expect {
                Expect::Exit { by, code } => due.exits.push((tids[by], *code)),
                expect if !reports(self.seam, expect) => {}
                _ => due.in_order.push_back(*expect),
            }
        }
        let events = self.ring.drain(usize::MAX);
        self.seen += events.len() as u64;
        self.balance(kernel, events.len() as u64)?;
        for event in events.iter().filter(|event| is_numbered(event)) {
            let Some(process) = self.keys.get(&event.header().process) else {
                return Err(Mismatch(format!("an event of a process that nobody started: {event:?}")));
            };
            let due = due.entry(*process).or_default();
            let child = one(event, due, tids, known).map_err(|why| {
                Mismatch(format!("process {}: {why}; the event is {event:?}", tids[process]))
            })?;
            if let Some((key, task)) = child {
                self.keys.insert(key, task);
            }
        }
        for (process, due) in due {
            let pid = tids[&process];
            if let Some(missing) = due.in_order.front() {
                return Err(Mismatch(format!("process {pid}: no event for {missing:?}")));
            }
            if let Some((tid, _)) = due.exits.first() {
                return Err(Mismatch(format!("process {pid}: no exit of thread {tid}")));
            }
            if due.dead != world.ended.contains(&process) {
                return Err(Mismatch(format!("process {pid}: an exit was the last: {}", due.dead)));
            }
        }
        if world.processes.len() == 1 {
            self.keys.retain(|_, task| *task == 0);
        }
        Ok(())
    }

    /// The processes of a pass, of whom an event may have been missed.
    pub(crate) fn learn(&mut self, keys: &BTreeMap<Task, ProcKey>) {
        self.keys.extend(keys.iter().map(|(task, key)| (*key, *task)));
    }

    /// Nothing was lost, refused or left in the ring.
    fn balance(&mut self, kernel: &Kernel, received: u64) -> Result<(), Mismatch> {
        let before = std::mem::replace(&mut self.ledger, kernel.counts().unwrap());
        let of = |outcome| self.ledger.of_outcome(outcome) - before.of_outcome(outcome);
        let unwanted =
            (0..OUTCOMES.len() as u32).filter(|outcome| *outcome != SENT && *outcome != counts::FILTERED);
        for outcome in unwanted {
            if of(outcome) != 0 {
                return Err(Mismatch(format!("{} events are {}", of(outcome), OUTCOMES[outcome as usize])));
            }
        }
        if of(SENT) != received || self.ring.ledger().rejected != 0 {
            let rejected = self.ring.ledger().rejected;
            return Err(Mismatch(format!(
                "{} events were sent, {received} received, {rejected} not understood",
                of(SENT)
            )));
        }
        Ok(())
    }
}

/// Compares one event with what is due. A new process is returned with its key.
fn one(
    event: &Event,
    due: &mut Due,
    tids: &BTreeMap<Task, u32>,
    known: &mut Addresses,
) -> Result<Option<(ProcKey, Task)>, String> {
    if let Event::Exit(exit) = event {
        exited(exit, due)?;
        return Ok(None);
    }
    let expect = *due.in_order.front().ok_or("no event is due")?;
    let by = |header: &Header, task: Task| {
        if header.tid == tids[&task] { Ok(()) } else { Err(format!("thread {} is due", tids[&task])) }
    };
    let mut child = None;
    match (event, expect) {
        (Event::Fd(change), Expect::Start { by: task, fd }) => {
            by(&change.header, task)?;
            if !started(change, fd, &mut due.starting)? {
                return Ok(None);
            }
        }
        (Event::Fd(found), Expect::Fd { by: task, call, change, fd, fd_last, table, file }) => {
            by(&found.header, task)?;
            if (found.change, found.fd, found.fd_last) != (change, fd, fd_last) {
                return Err(format!("{expect:?} is due"));
            }
            let how = syscalls::TABLE.get(found.how as usize);
            if how.is_some_and(|known| known.nr != call) {
                return Err(format!("call {call} is due"));
            }
            known.table(table, found.files).map_err(|why| why.0)?;
            if let Some(file) = file {
                known.file(file, found.file).map_err(|why| why.0)?;
            }
        }
        (Event::Clone(clone), Expect::Clone { by: task, child: made, thread }) => {
            by(&clone.header, task)?;
            let is_thread = clone.flags & CLONE_THREAD != 0;
            let same_process = clone.child == clone.header.process;
            if clone.child_tid != tids[&made] || is_thread != thread || same_process != thread {
                return Err(format!("{expect:?} with id {} is due", tids[&made]));
            }
            child = (!thread).then_some((clone.child, made));
        }
        (Event::Rename(rename), Expect::Rename { by: task }) => by(&rename.header, task)?,
        (Event::Exec(exec), Expect::Exec { by: task, old }) => {
            by(&exec.header, task)?;
            if exec.old_tid != tids[&old] {
                return Err(format!("exec by thread {} is due", tids[&old]));
            }
        }
        _ => return Err(format!("{expect:?} is due")),
    }
    due.in_order.pop_front();
    Ok(child)
}

fn exited(exit: &Exit, due: &mut Due) -> Result<(), String> {
    let at = due.exits.iter().position(|(tid, _)| *tid == exit.header.tid).ok_or("no such exit is due")?;
    // In order: a thread that execs takes the id of a leader that has exited.
    let (_, code) = due.exits.remove(at);
    due.dead |= exit.group_dead != 0;
    if code.is_none_or(|code| code == exit.code) { Ok(()) } else { Err(format!("code {code:?} is due")) }
}

/// Whether a new image has started. Until then it opens and closes one fd after the other.
fn started(change: &FdChange, fd: u32, is_open: &mut bool) -> Result<bool, String> {
    if change.fd == STARTED_FD {
        return Ok(change.change == FD_CLOSED);
    }
    let wanted = if *is_open { FD_CLOSED } else { FD_OPENED };
    *is_open = !*is_open;
    if (change.change, change.fd) == (wanted, fd) {
        return Ok(false);
    }
    Err(format!("a new image should open and close fd {fd}"))
}

//! A small host on which anything happens, seen through passes and events that come early, late, in another
//! order or never.

use std::sync::Arc;

use plumb_common::task::{ProcKey, TaskRecord};
use proptest::{collection::vec, prelude::*, sample::Index};

use super::{
    CLONE_THREAD, Drift, Pass, Table,
    testing::{SECOND, clone, exec, exit, record, seeded},
};
use crate::{decode::Event, procfs::ProcStatic};

/// Thread ids of all threads but leaders; the table does not tell them apart.
const WORKER: u32 = 1000;
/// `exit_state` of a leader that has exited.
const EXIT_ZOMBIE: u32 = 32;
const FIRST: ProcKey = ProcKey::new(1, 1);
/// Few numbers, so that they are reused.
const TGIDS: u32 = 7;

#[derive(Clone, Copy, Debug)]
enum Op {
    /// The start is taken some time before the child is attached.
    Fork {
        parent: Index,
        lag: u64,
    },
    Thread(Index),
    ThreadExit(Index),
    LeaderExit(Index),
    /// Threads that exit at once may all say that they are the last.
    ProcessExit {
        process: Index,
        all_say_so: bool,
    },
    Reap(Index),
    Exec {
        process: Index,
        by_leader: bool,
    },
    /// The ring was full.
    Lose(Index),
    /// Two processors wrote to the ring at once.
    Swap(Index),
}

/// A step of the host, or of the agent that watches it.
#[derive(Clone, Debug)]
enum Step {
    Op(u64, Op),
    /// The first events of the ring arrive between passes.
    Deliver(usize),
    Pass(PassPlan),
}

/// How many events arrive before a pass and with it, and what happens meanwhile.
#[derive(Clone, Debug)]
struct PassPlan {
    before: usize,
    after: usize,
    nothing_late: bool,
    /// For each process, the number of moments that its record waits for.
    reads: Vec<usize>,
    during: Vec<(u64, Op)>,
}

#[derive(Clone, Debug)]
struct Process {
    key: ProcKey,
    /// As the kernel counts them: a leader that has exited is one of them.
    threads: u32,
    leader: bool,
    zombie: bool,
}

/// A record that is still to be read in a pass under way.
struct Read {
    tgid: u32,
    moments: usize,
}

struct Host {
    now: u64,
    started: u64,
    processes: Vec<Process>,
    /// Events that have not arrived yet.
    ring: Vec<Event>,
    /// How many of them should have arrived with the last pass.
    late: usize,
    reads: Vec<Read>,
    records: Vec<(TaskRecord, Arc<ProcStatic>)>,
    /// Every process that was there at some time since the last pass began.
    seen: Vec<ProcKey>,
    /// An event was lost that no complete pass has made up for.
    dirty: bool,
    lost_any: bool,
    table: Table,
}

impl Host {
    fn new() -> Self {
        Self {
            now: SECOND,
            started: SECOND,
            processes: vec![Process { key: FIRST, threads: 1, leader: true, zombie: false }],
            ring: Vec::new(),
            late: 0,
            reads: Vec::new(),
            records: Vec::new(),
            seen: Vec::new(),
            dirty: false,
            lost_any: false,
            table: seeded(&[record(FIRST.tgid, FIRST.start_boottime, SECOND, 1, 3)]),
        }
    }

    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// A moment at which the iterator may read records.
    fn moment(&mut self) {
        for mut read in std::mem::take(&mut self.reads) {
            if read.moments == 0 {
                self.read(read.tgid);
            } else {
                read.moments -= 1;
                self.reads.push(read);
            }
        }
    }

    fn read(&mut self, tgid: u32) {
        let Some(process) = self.processes.iter().find(|process| process.key.tgid == tgid).cloned() else {
            return;
        };
        let (start, threads) = (process.key.start_boottime, process.threads);
        let (mut record, words) = record(tgid, start, self.tick(), threads, 3);
        if !process.leader || process.zombie {
            record.exit_state = EXIT_ZOMBIE;
        }
        if process.zombie {
            (record.files, record.fds) = (0, 0);
        }
        self.records.push((record, words));
    }

    /// A process that is not dead yet.
    fn alive(&mut self, index: Index) -> &mut Process {
        let alive: Vec<_> = self.processes.iter_mut().filter(|process| !process.zombie).collect();
        let at = index.index(alive.len());
        alive.into_iter().nth(at).unwrap()
    }

    fn exited(&mut self, key: ProcKey, tid: u32, group_dead: bool) {
        let time = self.tick();
        self.ring.push(exit(key, tid, time, group_dead));
    }

    fn op(&mut self, gap: u64, op: Op) {
        self.now += gap;
        self.moment();
        match op {
            Op::Fork { parent, lag } => self.fork(parent, lag),
            Op::Thread(process) => {
                let process = self.alive(process);
                process.threads += 1;
                let key = process.key;
                let time = self.tick();
                self.ring.push(clone(key, key, WORKER, time, CLONE_THREAD));
            }
            Op::ThreadExit(process) => {
                let process = self.alive(process);
                if process.threads > 1 {
                    process.threads -= 1;
                    let last = !process.leader && process.threads == 1;
                    // The first process stays: there is always somebody to act.
                    if last && process.key == FIRST {
                        process.threads += 1;
                        return;
                    }
                    process.zombie = last;
                    let key = process.key;
                    self.exited(key, WORKER, last);
                }
            }
            Op::LeaderExit(process) => {
                let process = self.alive(process);
                if process.leader && process.threads > 1 {
                    process.leader = false;
                    let key = process.key;
                    self.exited(key, key.tgid, false);
                }
            }
            Op::ProcessExit { process, all_say_so } => self.process_exit(process, all_say_so),
            Op::Reap(index) => {
                let at = index.index(self.processes.len());
                if self.processes[at].zombie {
                    self.processes.remove(at);
                }
            }
            Op::Exec { process, by_leader } => self.exec(process, by_leader),
            Op::Lose(index) => {
                if self.late < self.ring.len() {
                    self.ring.remove(self.late + index.index(self.ring.len() - self.late));
                    (self.dirty, self.lost_any) = (true, true);
                }
            }
            Op::Swap(index) => {
                if self.late + 1 < self.ring.len() {
                    let at = self.late + index.index(self.ring.len() - self.late - 1);
                    if subject(&self.ring[at]) != subject(&self.ring[at + 1]) {
                        self.ring.swap(at, at + 1);
                    }
                }
            }
        }
        self.moment();
    }

    fn fork(&mut self, parent: Index, lag: u64) {
        let parent = self.alive(parent).key;
        let free = |tgid: &u32| !self.processes.iter().any(|process| process.key.tgid == *tgid);
        let Some(tgid) = (1..=TGIDS).find(free) else { return };
        self.started = (self.now.saturating_sub(lag)).max(self.started + 1);
        self.now = self.now.max(self.started);
        let key = ProcKey::new(tgid, self.started);
        self.seen.push(key);
        self.processes.push(Process { key, threads: 1, leader: true, zombie: false });
        // It can be seen before its event says so, but does not run.
        self.moment();
        let time = self.tick();
        self.ring.push(clone(parent, key, tgid, time, 0));
    }

    fn process_exit(&mut self, process: Index, all_say_so: bool) {
        let process = self.alive(process);
        if process.key == FIRST {
            return;
        }
        let (key, others) = (process.key, process.threads - 1);
        let leader = std::mem::replace(&mut process.leader, true);
        (process.threads, process.zombie) = (1, true);
        for left in (0..others).rev() {
            self.exited(key, WORKER, all_say_so || (!leader && left == 0));
        }
        if leader {
            self.exited(key, key.tgid, true);
        }
    }

    fn exec(&mut self, process: Index, by_leader: bool) {
        let process = self.alive(process);
        let by_leader = process.leader && (by_leader || process.threads == 1);
        let (key, leader) = (process.key, process.leader);
        let workers = process.threads - 1;
        (process.threads, process.leader) = (1, true);
        for _ in 0..if by_leader { workers } else { workers - 1 } {
            self.exited(key, WORKER, false);
        }
        if leader && !by_leader {
            self.exited(key, key.tgid, false);
        }
        // The other threads are gone a moment before the event.
        self.moment();
        let time = self.tick();
        self.ring.push(exec(key, if by_leader { key.tgid } else { WORKER }, time));
    }

    /// The first events of the ring: at least `least`, and some `more`, modulo what is there.
    fn arrive(&mut self, least: usize, more: usize) -> Vec<Event> {
        let count = least + more % (self.ring.len() - least + 1);
        self.late = self.late.saturating_sub(count);
        self.ring.drain(..count).collect()
    }

    fn step(&mut self, step: Step) -> Result<(), TestCaseError> {
        match step {
            Step::Op(gap, op) => self.op(gap, op),
            Step::Deliver(more) => self.arrive(0, more).iter().for_each(|event| self.table.apply(event)),
            Step::Pass(plan) => self.pass(plan)?,
        }
        self.check()
    }

    fn pass(&mut self, plan: PassPlan) -> Result<(), TestCaseError> {
        let before = self.arrive(self.late, plan.before);
        let began = self.tick();
        self.seen = self.processes.iter().map(|process| process.key).collect();
        let dirty_before = std::mem::take(&mut self.dirty);
        self.reads = (1..=TGIDS).zip(plan.reads).map(|(tgid, moments)| Read { tgid, moments }).collect();
        for (gap, op) in plan.during {
            self.op(gap, op);
        }
        for read in std::mem::take(&mut self.reads) {
            self.read(read.tgid);
        }
        let least = if plan.nothing_late { self.ring.len() } else { 0 };
        let after = self.arrive(least, plan.after);
        self.late = self.ring.len();
        let records = std::mem::take(&mut self.records);
        before.iter().for_each(|event| self.table.apply(event));
        self.table.reconcile(&Pass { began, records, after: after.into(), ..Pass::default() });
        if self.late == 0 && !self.dirty {
            for row in self.table.rows() {
                prop_assert!(self.seen.contains(&row.key), "{:?} ended before the pass", row.key);
            }
        } else {
            self.dirty |= dirty_before;
        }
        Ok(())
    }

    /// With every event arrived and none lost the table equals the host.
    fn check(&self) -> Result<(), TestCaseError> {
        if self.ring.is_empty() && !self.dirty {
            let alive = self.processes.iter().filter(|process| !process.zombie);
            let mut expected: Vec<_> = alive.map(|process| (process.key, process.threads)).collect();
            expected.sort_unstable();
            let rows = self.table.rows();
            let alive = rows.iter().filter(|row| !row.exited);
            let found: Vec<_> = alive.map(|row| (row.key, row.threads)).collect();
            prop_assert_eq!(found, expected);
        }
        if !self.lost_any {
            prop_assert_eq!(self.table.drift(), Drift::default());
        }
        Ok(())
    }
}

/// The process that an event is about: its events keep their order.
fn subject(event: &Event) -> ProcKey {
    match event {
        Event::Clone(event) => event.child,
        _ => event.header().process,
    }
}

/// Nanoseconds before an operation: as fast as the kernel, near the limit of what is close to a record, or
/// far beyond it.
fn gap() -> impl Strategy<Value = u64> {
    prop_oneof![3 => 1..3000u64, 1 => 40_000_000..60_000_000u64, 2 => SECOND..3 * SECOND]
}

fn op() -> impl Strategy<Value = Op> {
    let index = any::<Index>;
    prop_oneof![
        4 => (index(), 0..6000u64).prop_map(|(parent, lag)| Op::Fork { parent, lag }),
        4 => index().prop_map(Op::Thread),
        2 => index().prop_map(Op::ThreadExit),
        1 => index().prop_map(Op::LeaderExit),
        2 => (index(), any::<bool>())
            .prop_map(|(process, all_say_so)| Op::ProcessExit { process, all_say_so }),
        2 => index().prop_map(Op::Reap),
        2 => (index(), any::<bool>()).prop_map(|(process, by_leader)| Op::Exec { process, by_leader }),
        1 => index().prop_map(Op::Swap),
    ]
}

fn ops(lossy: bool) -> BoxedStrategy<Op> {
    if lossy { prop_oneof![8 => op(), 1 => any::<Index>().prop_map(Op::Lose)].boxed() } else { op().boxed() }
}

fn pass(lossy: bool) -> impl Strategy<Value = PassPlan> {
    let counts = (any::<usize>(), any::<usize>());
    let reads = vec(0usize..24, TGIDS as usize);
    (counts, any::<bool>(), reads, vec((gap(), ops(lossy)), 0..10)).prop_map(
        |((before, after), nothing_late, reads, during)| PassPlan {
            before,
            after,
            nothing_late,
            reads,
            during,
        },
    )
}

fn steps(lossy: bool) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (gap(), ops(lossy)).prop_map(|(gap, op)| Step::Op(gap, op)),
        1 => any::<usize>().prop_map(Step::Deliver),
        2 => pass(lossy).prop_map(Step::Pass),
    ];
    vec(step, 1..60)
}

/// Nothing happens, and every event arrives.
fn quiet_pass() -> Step {
    Step::Pass(PassPlan {
        before: 0,
        after: 0,
        nothing_late: true,
        reads: vec![0; TGIDS as usize],
        during: Vec::new(),
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whenever the events have arrived, however late, the table equals the host, and there is no drift.
    #[test]
    fn with_every_event_the_table_is_the_truth_and_there_is_no_drift(steps in steps(false)) {
        let mut host = Host::new();
        for step in steps.into_iter().chain([quiet_pass(), quiet_pass()]) {
            host.step(step)?;
        }
        prop_assert!(!host.dirty && host.ring.is_empty());
    }

    /// Whatever was lost, the table equals the host after a pass that lost nothing and left nothing behind.
    #[test]
    fn a_complete_pass_heals_whatever_was_lost(steps in steps(true)) {
        let mut host = Host::new();
        for step in steps.into_iter().chain([quiet_pass()]) {
            host.step(step)?;
        }
        prop_assert!(!host.dirty && host.ring.is_empty());
    }
}

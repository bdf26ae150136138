//! The one thread that talks to the kernel: drains the ring, takes a pass every second, looks up what
//! leaks. Everything it learns goes to the table's owner, in order.

use std::{
    sync::{Arc, mpsc::Receiver},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use plumb_common::{counts::Counts, task::ProcKey};
use tokio::sync::mpsc::Sender;
use tokio_util::sync::CancellationToken;

use crate::{
    admission::Admission,
    ask::{Bell, Request},
    census, clock,
    decode::{Event, Sample},
    detect::{Confirmation, Resource},
    evidence::Evidence,
    follow::{FdEvents, Follow, Following, Wanted},
    kernel::{Kernel, Ledger, Ring, Status},
    procfs::Describer,
    say::Saying,
    sockets::{self, Sockets},
    stacks::{Losses, Named, Queue, Survivors},
    table::Pass,
};

/// Between two passes.
const PASS_EVERY: Duration = Duration::from_secs(1);
/// One that takes longer than a 50th of that, which is 2 % of a core, is made less often: the kernel walks
/// every thread, at 0.6 us each. But so often that the view never counts as stale.
const PASS_SHARE: u32 = 50;
const PASS_AT_LAST: Duration = Duration::from_secs(4);
/// How long an event may wait while somebody listens. Without a listener it waits for the next pass: a busy ring
/// wakes the reader by itself, and whoever reads the table sees events no sooner.
const TICK: Duration = Duration::from_millis(100);
/// Events per batch at most: bounds memory and the time between two looks at the clock.
const BATCH: usize = 4_096;

/// Batches drained before a pass at most: more than the ring holds. In a flood there are always more.
const BATCHES_BEFORE: usize = 16;

/// What the table's owner is told.
#[derive(Debug)]
pub(crate) enum Input {
    /// Events between two passes.
    Events(Arc<Vec<Event>>),
    /// A pass over all processes.
    Pass(Box<Observation>),
    /// The answer to `Request::Confirm`.
    Confirmed(ProcKey, Resource, Box<Confirmation>),
    /// Stacks of what watched processes made.
    Named(Vec<Named>),
    /// The answer to `Request::Threads`.
    Threads(ProcKey, Box<census::Named>),
    /// Somebody says something about a finding.
    Say(Saying),
    /// The answer to `Request::Census`: how many old threads there are of each type.
    Census(ProcKey, Vec<(String, u32)>),
}

/// A pass and what it took.
#[derive(Debug)]
pub(crate) struct Observation {
    pub pass: Pass,
    /// The kernel's ledger, by `counts::index`.
    pub counts: Counts,
    /// What became of the events that were sent.
    pub ledger: Ledger,
    /// What became of the stacks that were sent, and of those that were read.
    pub stack_ledger: Ledger,
    pub stack_losses: Losses,
    /// How often a program was not run because it was running on that CPU already.
    pub not_run: u64,
    pub following: Following,
    /// Passes that failed so far.
    pub failed: u64,
    /// Each kernel program with its verdict.
    pub programs: Arc<[Status]>,
}

/// Passes in a row that may fail before the observer is started anew.
const MAX_FAILED: u64 = 10;

/// What the settings say of the observer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub fd_events: FdEvents,
    pub max_processes: usize,
}

/// What outlives an observer that fails and is started anew.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    wanted: Wanted,
    evidence: Evidence,
}

/// Everything the observer works with.
struct Observer {
    kernel: Kernel,
    ring: Ring,
    describer: Describer,
    evidence: Evidence,
    follow: Follow,
    sockets: Sockets,
    admission: Admission,
    survivors: Survivors,
    /// Stacks of what has been drained and not handed on.
    survived: Vec<Sample>,
    /// Suspects that run another program since.
    execs: Vec<ProcKey>,
    stacks: Queue,
    /// What the kernel's part of the last pass took.
    pass_cpu: Duration,
    failed: u64,
    failed_in_a_row: u64,
}

/// Runs until it is stopped; an error means that nothing is seen any more.
pub(crate) fn run(
    mut kernel: Kernel,
    limits: &Limits,
    kept: &mut Kept,
    (requests, bell): (&Receiver<Request>, &Bell),
    (inputs, stacks): (&Sender<Input>, &Queue),
    stop: &CancellationToken,
) -> Result<()> {
    let ring = kernel.ring()?;
    let Kept { wanted, evidence } = std::mem::take(kept);
    let (describer, follow) = (Describer::new("/proc"), Follow::new(limits.fd_events, wanted));
    let admission = Admission::new(limits.max_processes);
    let mut observer = Observer {
        admission,
        kernel,
        ring,
        describer,
        evidence,
        follow,
        sockets: Sockets::default(),
        survivors: Survivors::default(),
        survived: Vec::new(),
        execs: Vec::new(),
        stacks: stacks.clone(),
        pass_cpu: Duration::ZERO,
        failed: 0,
        failed_in_a_row: 0,
    };
    let done = observer.work((requests, bell), inputs, stop);
    // Whoever asked for these sees that they are not followed any more.
    observer.sockets.end(&mut observer.kernel, &mut observer.follow);
    *kept = Kept { wanted: observer.follow.into_wanted(), evidence: observer.evidence };
    done
}

/// How long after a pass that took this CPU time the next one is due.
fn next_after(pass: Duration) -> Duration {
    (pass * PASS_SHARE).clamp(PASS_EVERY, PASS_AT_LAST)
}

impl Observer {
    fn work(
        &mut self,
        (requests, bell): (&Receiver<Request>, &Bell),
        inputs: &Sender<Input>,
        stop: &CancellationToken,
    ) -> Result<()> {
        self.ring.wake_for(bell)?;
        let send = |input| inputs.blocking_send(input).is_ok();
        let mut next_pass = Instant::now();
        let (mut more, mut asked, mut is_heard) = (false, false, true);
        while !stop.is_cancelled() && is_heard {
            if !more && !asked {
                let until_pass = next_pass.saturating_duration_since(Instant::now());
                let is_urgent = self.follow.is_listened_to() || self.kernel.follows_sockets();
                let rest = if is_urgent { until_pass.min(TICK) } else { until_pass };
                self.ring.wait(rest)?;
            }
            // A full queue holds the reader up, the ring fills, and the kernel counts what it cannot keep:
            // there is one place where events are lost.
            if Instant::now() >= next_pass {
                let began = Instant::now();
                // Whatever is in the ring is older than the pass, and must be known before.
                for _ in 0..BATCHES_BEFORE {
                    (more, is_heard) = self.hand_on(send);
                    if !more || !is_heard {
                        break;
                    }
                }
                if let Some(observation) = self.observation()? {
                    more |= observation.pass.after.len() == BATCH;
                    is_heard = is_heard && send(Input::Pass(Box::new(observation)));
                    self.name_stacks();
                }
                next_pass = began + next_after(self.pass_cpu);
            } else {
                (more, is_heard) = self.hand_on(send);
            }
            let request = requests.try_recv().ok();
            asked = request.is_some();
            if let Some(answer) = request.and_then(|request| self.answer(request)) {
                is_heard = is_heard && send(answer);
            }
        }
        Ok(())
    }

    fn drain(&mut self) -> Vec<Event> {
        let events = self.ring.drain(BATCH);
        let stacks = self.ring.drain_stacks();
        self.survived.extend(self.survivors.of(&events, stacks));
        self.stacks.lost(self.survivors.take_lost());
        let execs = events.iter().filter(|event| matches!(event, Event::Exec(_)));
        let execs = execs.map(|event| event.header().process).filter(|key| self.follow.is_suspect(*key));
        self.execs.extend(execs);
        self.follow.look(&events);
        events
    }

    /// Drains one batch and hands it on. Whether there is more, and whether somebody took it.
    fn hand_on(&mut self, send: impl Fn(Input) -> bool) -> (bool, bool) {
        let events = self.drain();
        let more = events.len() == BATCH;
        let is_heard = events.is_empty() || send(Input::Events(Arc::new(events)));
        self.name_stacks();
        (more, is_heard)
    }

    /// Has the stacks named of what events made that have been handed on: before that nobody knows what they are of.
    fn name_stacks(&mut self) {
        self.stacks.unwind(std::mem::take(&mut self.survived));
        // What came before an exec belongs to the files of then.
        self.execs.drain(..).for_each(|process| self.stacks.watch(process));
    }

    /// A pass with what goes with it; `None` for one that failed, which is counted and tried again.
    fn observation(&mut self) -> Result<Option<Observation>> {
        self.follow.tend(&mut self.kernel);
        let pass = self.pass();
        match pass {
            Ok(pass) => {
                self.failed_in_a_row = 0;
                Ok(Some(Observation {
                    pass,
                    counts: self.kernel.counts().context("the ledger cannot be read")?,
                    ledger: self.ring.ledger(),
                    stack_ledger: self.ring.stack_ledger(),
                    stack_losses: self.stacks.losses(),
                    not_run: self.kernel.not_run(),
                    following: self.follow.state(&self.kernel),
                    failed: self.failed,
                    programs: self.kernel.programs().into(),
                }))
            }
            Err(error) => {
                self.failed += 1;
                self.failed_in_a_row += 1;
                if self.failed_in_a_row >= MAX_FAILED {
                    return Err(error);
                }
                tracing::warn!("{error:#}; it is tried again");
                Ok(None)
            }
        }
    }

    /// One pass with the events around it, the fds of watched processes, and when it ended.
    fn pass(&mut self) -> Result<Pass> {
        let began = clock::boottime();
        let used = clock::thread_cpu();
        let mut records = self.kernel.processes().context("the pass over all processes failed")?;
        self.pass_cpu = clock::thread_cpu().saturating_sub(used);
        let ended = clock::boottime();
        let untracked = self.admission.admit(&mut records);
        let listings = self.follow.list(&mut self.kernel, &records);
        let after = self.drain();
        let words = self.describer.describe(&records);
        let records = records.into_iter().zip(words).collect();
        Ok(Pass { began, ended, records, after: Arc::new(after), untracked, listings })
    }

    /// Answers one request: looking through fds takes time, and the ring and the passes must not wait for a
    /// host full of suspects.
    fn answer(&mut self, request: Request) -> Option<Input> {
        let rejected = self.ring.ledger().rejected;
        let Self { kernel, evidence, follow, stacks, sockets, .. } = self;
        match request {
            Request::Follow(who) => follow.add(kernel, who),
            Request::Unfollow(who) => follow.remove(kernel, who),
            Request::Watch(key, resource) => {
                stacks.watch(key);
                follow.suspect(kernel, (key, resource), true);
            }
            Request::Unwatch(key, resource) => {
                follow.suspect(kernel, (key, resource), false);
                if !follow.is_suspect(key) {
                    stacks.forget(key);
                }
            }
            Request::Remember(key, resource) => {
                if let Err(error) = evidence.remember(kernel, key, resource) {
                    tracing::warn!(pid = key.tgid, %error, "what a suspect holds cannot be listed");
                }
            }
            Request::Forget(key, resource) => evidence.forget(key, resource),
            Request::Threads(key, wanted) => match kernel.threads(key) {
                Ok(threads) => stacks.census(key, census::Copied::take(key, &threads, &wanted)),
                Err(error) => tracing::warn!(pid = key.tgid, %error, "threads cannot be listed"),
            },
            Request::Census(key, old) => {
                // A process that has ended meanwhile has no threads.
                let threads = kernel.threads(key).unwrap_or_default();
                return Some(Input::Census(key, census::older_than(old, &threads)));
            }
            Request::Sockets(request) => sockets.answer(kernel, follow, rejected, request),
            Request::Left(process, doings, reply) => {
                let look = census::look(kernel, process, Some(&doings)).unwrap_or_else(|error| {
                    tracing::warn!(pid = process.0, %error, "threads cannot be listed");
                    None
                });
                // Whoever asked may not wait any more.
                let _ = reply.send((look, sockets::lost_acts(kernel, rejected)));
            }
            Request::Confirm(key, resource, baseline) => {
                // Without a list the trend has to speak for itself.
                let found = evidence.confirm(kernel, (key, resource), baseline).unwrap_or_else(|error| {
                    tracing::warn!(pid = key.tgid, %error, "what leaks cannot be listed");
                    Confirmation::default()
                });
                return Some(Input::Confirmed(key, resource, Box::new(found)));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_takes_a_fiftieth_of_the_time_and_is_neither_hurried_nor_forgotten() {
        let millis = Duration::from_millis;
        assert_eq!(next_after(millis(1)), PASS_EVERY);
        assert_eq!(next_after(millis(60)), millis(3_000));
        assert_eq!(next_after(millis(500)), PASS_AT_LAST);
    }
}

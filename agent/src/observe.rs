//! The one thread that talks to the kernel: drains the ring, takes a pass every second, looks up what
//! leaks. Everything it learns goes to the table's owner, in order.

use std::{
    sync::{Arc, mpsc::Receiver},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use plumb_common::{counts, task::ProcKey};
use tokio::sync::mpsc::Sender;
use tokio_util::sync::CancellationToken;

use crate::{
    clock,
    decode::Event,
    detect::{Confirmation, Resource},
    evidence::Evidence,
    kernel::{Kernel, Ring, Status},
    procfs::Describer,
    table::Pass,
};

/// Between two passes.
const PASS_EVERY: Duration = Duration::from_secs(1);
/// One that takes longer than a 50th of that, which is 2 % of a core, is made less often: the kernel walks
/// every thread, at 0.6 us each. But so often that the view never counts as stale.
const PASS_SHARE: u32 = 50;
const PASS_AT_LAST: Duration = Duration::from_secs(4);
/// What the table's owner asks for after a pass is answered when this time has gone by. A busy ring wakes the
/// reader by itself, and whoever reads the table sees events no sooner than the next pass.
const TICK: Duration = Duration::from_millis(100);
/// Events per batch at most: bounds memory and the time between two looks at the clock.
const BATCH: usize = 16_384;

/// What the table's owner is told.
#[derive(Debug)]
pub(crate) enum Input {
    /// Events between two passes.
    Events(Vec<Event>),
    /// A pass over all processes.
    Pass(Box<Observation>),
    /// The answer to `Request::Confirm`.
    Confirmed(ProcKey, Resource, Confirmation),
}

/// A pass and what it took.
#[derive(Debug)]
pub(crate) struct Observation {
    pub pass: Pass,
    /// When it ended, nanoseconds since boot.
    pub ended: u64,
    /// The kernel's ledger, by `counts::index`.
    pub counts: [u64; counts::LEN as usize],
    /// Events the decoder rejected so far.
    pub rejected: u64,
    /// Each kernel program with its verdict.
    pub programs: Arc<[Status]>,
}

/// What the table's owner asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Request {
    /// Remember what a suspect holds.
    Remember(ProcKey, Resource),
    /// Look up what of it is still held, now that the count has grown beyond this baseline.
    Confirm(ProcKey, Resource, u32),
    /// No longer suspect.
    Forget(ProcKey, Resource),
}

/// Runs until it is stopped; an error means that nothing is seen any more.
pub(crate) fn run(
    mut kernel: Kernel,
    requests: &Receiver<Request>,
    inputs: &Sender<Input>,
    stop: &CancellationToken,
) -> Result<()> {
    let mut ring = kernel.ring()?;
    let programs: Arc<[Status]> = kernel.programs().into();
    let mut describer = Describer::new("/proc");
    let mut evidence = Evidence::default();
    let mut next_pass = Instant::now();
    let mut rest = Duration::ZERO;
    while !stop.is_cancelled() {
        let until_pass = next_pass.saturating_duration_since(Instant::now());
        ring.wait(until_pass.min(rest))?;
        rest = PASS_AT_LAST;
        let events = ring.drain(BATCH);
        let input = if Instant::now() >= next_pass {
            rest = TICK;
            let (began, used) = (Instant::now(), clock::thread_cpu());
            let (pass, ended) = pass(&mut kernel, &mut ring, &mut describer, events)?;
            next_pass = began + next_after(clock::thread_cpu().saturating_sub(used));
            let counts = kernel.counts().context("the ledger cannot be read")?;
            let programs = Arc::clone(&programs);
            Some(Input::Pass(Box::new(Observation {
                pass,
                ended,
                counts,
                rejected: ring.rejected(),
                programs,
            })))
        } else {
            (!events.is_empty()).then_some(Input::Events(events))
        };
        // A full queue holds the reader up, the ring fills, and the kernel counts what it cannot keep:
        // there is one place where events are lost.
        let request = requests.try_recv().ok();
        if request.is_some() {
            rest = Duration::ZERO;
        }
        let answer = request.and_then(|request| answer(&mut kernel, &mut evidence, request));
        for input in input.into_iter().chain(answer) {
            if inputs.blocking_send(input).is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// How long after a pass that took this CPU time the next one is due.
fn next_after(pass: Duration) -> Duration {
    (pass * PASS_SHARE).clamp(PASS_EVERY, PASS_AT_LAST)
}

/// One pass with the events around it, and when it ended.
fn pass(
    kernel: &mut Kernel,
    ring: &mut Ring,
    describer: &mut Describer,
    before: Vec<Event>,
) -> Result<(Pass, u64)> {
    let began = clock::boottime();
    let records = kernel.processes().context("the pass over all processes failed")?;
    let ended = clock::boottime();
    let after = ring.drain(BATCH);
    let words = describer.describe(&records);
    Ok((Pass { began, before, records: records.into_iter().zip(words).collect(), after }, ended))
}

/// Answers one request: looking through fds takes time, and the ring and the passes must not wait for a
/// host full of suspects.
fn answer(kernel: &mut Kernel, evidence: &mut Evidence, request: Request) -> Option<Input> {
    match request {
        Request::Remember(key, resource) => {
            if let Err(error) = evidence.remember(kernel, key, resource) {
                tracing::warn!(pid = key.tgid, %error, "what a suspect holds cannot be listed");
            }
            None
        }
        Request::Forget(key, resource) => {
            evidence.forget(key, resource);
            None
        }
        Request::Confirm(key, resource, baseline) => {
            // Without a list the trend has to speak for itself.
            let found = evidence.confirm(kernel, (key, resource), baseline).unwrap_or_else(|error| {
                tracing::warn!(pid = key.tgid, %error, "what leaks cannot be listed");
                Confirmation::default()
            });
            Some(Input::Confirmed(key, resource, found))
        }
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

//! Runs the agent's workers: named, restarted when they fail, awaited at the end.

use std::{
    collections::BTreeMap,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};
use futures_util::FutureExt;
use tokio::{sync::oneshot, task::JoinHandle, time};
use tokio_util::sync::CancellationToken;

/// First and longest wait before a failed worker is started again; doubled in between.
const BACK_OFF: Duration = Duration::from_millis(100);
const MAX_BACK_OFF: Duration = Duration::from_secs(10);
/// A worker that ran this long has recovered: its next failure waits `BACK_OFF` again.
const HEALTHY: Duration = Duration::from_secs(60);

/// What a worker is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Running,
    /// Failed, and waiting to be started again.
    BackingOff,
    Stopped,
}

impl State {
    pub(crate) const ALL: [Self; 3] = [Self::Running, Self::BackingOff, Self::Stopped];

    /// The word used in metrics.
    #[must_use]
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::BackingOff => "backing_off",
            Self::Stopped => "stopped",
        }
    }
}

/// A worker as others see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Worker {
    pub state: State,
    /// Times it was started again.
    pub restarts: u64,
}

/// The states of all workers, for metrics and health.
#[derive(Clone, Debug, Default)]
pub(crate) struct Workers(Arc<Mutex<BTreeMap<&'static str, Worker>>>);

impl Workers {
    /// All workers, by name.
    #[must_use]
    pub(crate) fn list(&self) -> Vec<(&'static str, Worker)> {
        let workers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        workers.iter().map(|(name, worker)| (*name, *worker)).collect()
    }

    fn set(&self, name: &'static str, state: State, restarts: u64) {
        let mut workers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        workers.insert(name, Worker { state, restarts });
    }
}

/// Starts workers and brings them to an end.
#[derive(Debug, Default)]
pub(crate) struct Supervisor {
    stop: CancellationToken,
    workers: Workers,
    tasks: Vec<(&'static str, JoinHandle<()>)>,
}

impl Supervisor {
    /// Starts a worker. `work` is called for each start; it ends well only after it was told to stop.
    pub(crate) fn spawn<W, F>(&mut self, name: &'static str, mut work: W)
    where
        W: FnMut(CancellationToken) -> F + Send + 'static,
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let (stop, workers) = (self.stop.clone(), self.workers.clone());
        workers.set(name, State::Running, 0);
        let task = tokio::spawn(async move {
            let mut restarts = 0;
            let mut back_off = BACK_OFF;
            loop {
                let started = Instant::now();
                // The worker owns what it touches; after a panic it is built anew.
                let ended = AssertUnwindSafe(work(stop.child_token())).catch_unwind().await;
                if stop.is_cancelled() {
                    break;
                }
                if started.elapsed() >= HEALTHY {
                    back_off = BACK_OFF;
                }
                let why = match ended {
                    Ok(Ok(())) => "it ended by itself".to_owned(),
                    Ok(Err(error)) => format!("{error:#}"),
                    Err(_) => "it panicked".to_owned(),
                };
                tracing::error!(worker = name, %why, restart_in = ?back_off, "a worker failed");
                workers.set(name, State::BackingOff, restarts);
                if stop.run_until_cancelled(time::sleep(back_off)).await.is_none() {
                    break;
                }
                back_off = (back_off * 2).min(MAX_BACK_OFF);
                restarts += 1;
                workers.set(name, State::Running, restarts);
            }
            workers.set(name, State::Stopped, restarts);
        });
        self.tasks.push((name, task));
    }

    #[must_use]
    pub(crate) fn workers(&self) -> Workers {
        self.workers.clone()
    }

    /// Tells all workers to stop and waits; returns those that had not stopped at the deadline.
    pub(crate) async fn stop(self, deadline: Duration) -> Vec<&'static str> {
        self.stop.cancel();
        let deadline = time::Instant::now() + deadline;
        let mut late = Vec::new();
        for (name, task) in self.tasks {
            if time::timeout_at(deadline, task).await.is_err() {
                late.push(name);
            }
        }
        late
    }
}

/// Runs blocking work on a thread of its own and waits for it without blocking.
pub(crate) async fn on_thread(name: &str, work: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
    let (done, wait) = oneshot::channel();
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        // Nobody waits any more after the deadline of a stop.
        let _ = done.send(work());
    })?;
    wait.await.map_err(|_| anyhow!("its thread panicked"))?
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_fails_or_panics_is_started_again_later_and_later() {
        let mut supervisor = Supervisor::default();
        let starts = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&starts);
        supervisor.spawn("flaky", move |stop| {
            let start = counter.fetch_add(1, Ordering::Relaxed);
            async move {
                match start {
                    0 => Err(anyhow!("cannot")),
                    1 => panic!("worse"),
                    2 => Ok(()),
                    _ => {
                        stop.cancelled().await;
                        Ok(())
                    }
                }
            }
        });
        let workers = supervisor.workers();
        time::sleep(Duration::from_millis(750)).await;
        assert_eq!(starts.load(Ordering::Relaxed), 4, "started at 0, 100, 300 and 700 ms");
        assert_eq!(workers.list(), [("flaky", Worker { state: State::Running, restarts: 3 })]);
        assert!(supervisor.stop(Duration::from_secs(1)).await.is_empty());
        assert_eq!(workers.list()[0].1.state, State::Stopped);
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_does_not_stop_is_named_at_the_deadline() {
        let mut supervisor = Supervisor::default();
        supervisor.spawn("deaf", |_| std::future::pending());
        supervisor.spawn("polite", |stop| async move {
            stop.cancelled().await;
            Ok(())
        });
        assert_eq!(supervisor.stop(Duration::from_secs(5)).await, ["deaf"]);
    }

    #[tokio::test]
    async fn a_panic_on_a_thread_is_an_error() {
        assert!(on_thread("doomed", || panic!("by design")).await.is_err());
        assert!(on_thread("fine", || Ok(())).await.is_ok());
    }
}

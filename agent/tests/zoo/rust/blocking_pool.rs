//! A pool for work that blocks: another thread whenever none is idle, at most 32; those that are idle for five
//! seconds end.

mod common;

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::Duration,
};

use common::{Random, Result, end_after_argument};

const MOST: usize = 32;
const KEEP_ALIVE: Duration = Duration::from_secs(5);
const PER_SECOND: f64 = 8.0;

fn main() -> Result<()> {
    end_after_argument()?;
    let mut random = Random(1);
    let pool = Arc::new(Pool::default());
    loop {
        let task = Duration::from_secs_f64(0.2 + 1.8 * random.uniform());
        pool.run(task)?;
        thread::sleep(random.until_next(PER_SECOND));
    }
}

#[derive(Default)]
struct Pool {
    state: Mutex<State>,
    added: Condvar,
}

/// The tasks that wait, as how long each takes.
#[derive(Default)]
struct State {
    tasks: VecDeque<Duration>,
    idle: usize,
    threads: usize,
}

impl Pool {
    fn run(self: &Arc<Self>, task: Duration) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.tasks.push_back(task);
        if state.tasks.len() > state.idle && state.threads < MOST {
            state.threads += 1;
            let pool = Arc::clone(self);
            thread::Builder::new().name("blocking".to_owned()).spawn(move || pool.work())?;
        }
        drop(state);
        self.added.notify_one();
        Ok(())
    }

    fn work(&self) {
        while let Some(task) = self.next() {
            thread::sleep(task);
        }
    }

    /// Waits for a task; `None` when there was none for so long that the thread is to end.
    fn next(&self) -> Option<Duration> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.idle += 1;
        let waited = self.added.wait_timeout_while(state, KEEP_ALIVE, |state| state.tasks.is_empty());
        state = waited.unwrap_or_else(PoisonError::into_inner).0;
        state.idle -= 1;
        let task = state.tasks.pop_front();
        if task.is_none() {
            state.threads -= 1;
        }
        task
    }
}

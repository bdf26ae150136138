//! Several machines, two at a time at most, while something else runs on this kernel.

use std::{
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use anyhow::{Result, anyhow, ensure};

use super::{Guest, Kernel, boot, run, second};

/// A virtual machine, and what runs in it.
pub(crate) struct Machine {
    pub(crate) kernel: Kernel,
    pub(crate) guest: Guest,
    /// Whether a command in which no test runs is a failure: a name that nothing has any more is a success for the test
    /// harness.
    pub(crate) each_has_tests: bool,
}

/// What a machine printed, and which tests passed only in the second try.
struct Done {
    lines: Vec<String>,
    second: Vec<String>,
}

impl Machine {
    fn run(&self) -> Result<Done> {
        let Self { kernel, guest, .. } = self;
        let end = boot(kernel, guest)?;
        let (mut second, mut lines) = (Vec::new(), end.lines.clone());
        if let Some((alone, failed)) = second::try_of(guest, &end) {
            let names = failed.join(", ");
            eprintln!("xtask: kernel {}: failed, and is tried once more, alone: {names}", kernel.series);
            lines.extend(run(kernel, &alone)?);
            second.push(format!("kernel {}: passed only in the second try, alone: {names}", kernel.series));
        } else {
            end.judge(kernel, guest)?;
        }
        let has_tests = lines.iter().filter(|line| {
            let passed = line.strip_prefix("test result: ok. ").and_then(|rest| rest.split(' ').next());
            passed.is_some_and(|passed| passed != "0")
        });
        let is_complete = !self.each_has_tests || has_tests.count() == self.guest.commands.len();
        ensure!(is_complete, "a test is not there any more");
        Ok(Done { lines, second })
    }
}

/// The machines, which of them are left, and of which series some run.
struct Queue {
    machines: Vec<Machine>,
    plan: Mutex<(Vec<usize>, Vec<String>)>,
}

impl Queue {
    fn next(&self) -> Option<usize> {
        let (left, running) = &mut *self.plan.lock().unwrap_or_else(PoisonError::into_inner);
        let is_free = |at: &usize| !running.contains(&self.machines[*at].kernel.series);
        // All that are left may be of the series that runs: whoever runs it has them then.
        let at = left.remove(left.iter().position(is_free)?);
        running.push(self.machines[at].kernel.series.clone());
        Some(at)
    }

    fn work(&self) -> Vec<(usize, Result<Done>)> {
        let mut done = Vec::new();
        while let Some(at) = self.next() {
            done.push((at, self.machines[at].run()));
            let (_, running) = &mut *self.plan.lock().unwrap_or_else(PoisonError::into_inner);
            running.retain(|series| *series != self.machines[at].kernel.series);
        }
        done
    }
}

/// What each machine printed. One runs beside what is to be done `here`, which mostly waits, then two; never two of one
/// series. A failure of one keeps no other from being tried; one here ends this process, and the machines with it.
pub(crate) fn run_all(machines: Vec<Machine>, here: impl FnOnce() -> Result<()>) -> Result<Vec<Vec<String>>> {
    let plan = Mutex::new(((0..machines.len()).collect(), Vec::new()));
    let queue = Arc::new(Queue { machines, plan });
    let own = Arc::clone(&queue);
    let beside = thread::spawn(move || own.work());
    here()?;
    let mut done = queue.work();
    done.extend(beside.join().map_err(|_| anyhow!("a machine's thread panicked"))?);
    done.sort_by_key(|(at, _)| *at);
    let (mut printed, mut failed) = (Vec::new(), Vec::new());
    for (_, result) in done {
        match result {
            Ok(Done { lines, second }) => {
                printed.push(lines);
                for tests in second {
                    eprintln!("xtask: {tests}");
                }
            }
            Err(error) => failed.push(format!("{error:#}")),
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(printed)
}

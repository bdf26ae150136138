//! `cargo xtask soak`: the model tests for as long as wanted, on this kernel with a restless neighbour, or
//! on another in a virtual machine.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use clap::Args;
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::{cmd::run, setup, test, workspace};

/// An emulated kernel does between 500 and 2,000 operations a second.
const SLOWEST: u64 = 200;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Stop after so many minutes
    #[arg(long)]
    minutes: Option<u64>,
    /// Stop after so many operations
    #[arg(long, required_unless_present_any = ["minutes", "script"])]
    ops: Option<u64>,
    /// Begin with this seed [default: another each time]
    #[arg(long)]
    seed: Option<u64>,
    /// Play this script, as a failure printed it, once
    #[arg(long, value_name = "FILE", conflicts_with_all = ["minutes", "ops", "seed"])]
    script: Option<PathBuf>,
    /// Not on this kernel but on a series of xtask/kernels.lock, such as 6.1; can be repeated
    #[arg(long, value_name = "SERIES")]
    kernel: Vec<String>,
}

impl Arguments {
    pub(crate) fn run(self) -> Result<()> {
        setup::require_root("loading kernel programs")?;
        setup::for_build()?;
        let needs = if self.kernel.is_empty() { setup::for_soak } else { setup::for_test };
        needs()?;
        let tests = test::build_kernel_tests()?;
        if self.kernel.is_empty() {
            let _neighbour = if self.script.is_none() { Some(Neighbour::start()?) } else { None };
            return run(Command::new(&tests).args(self.words()).envs(self.env()).current_dir(workspace()));
        }
        self.on_kernels(&tests)
    }

    /// For `duration` on this kernel, as a part of all tests.
    pub(crate) fn short(tests: &Path, duration: Duration) -> Result<()> {
        let _neighbour = Neighbour::start()?;
        let mut soak = Command::new(tests);
        soak.args(words("soak")).env("PLUMB_SOAK_SECONDS", duration.as_secs().to_string());
        run(soak.current_dir(workspace()))
    }

    fn words(&self) -> [&'static str; 4] {
        words(if self.script.is_some() { "replay" } else { "soak" })
    }

    fn env(&self) -> Vec<(String, String)> {
        let seconds = self.minutes.map(|minutes| minutes * 60);
        let numbers =
            [("PLUMB_SOAK_SECONDS", seconds), ("PLUMB_MODEL_OPS", self.ops), ("PLUMB_MODEL_SEED", self.seed)];
        let mut env: Vec<_> = numbers
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), value?.to_string())))
            .collect();
        if let Some(script) = &self.script {
            let path = std::path::absolute(script).unwrap_or_else(|_| script.clone());
            env.push(("PLUMB_MODEL_SCRIPT".to_owned(), path.display().to_string()));
        }
        env
    }

    fn on_kernels(&self, tests: &Path) -> Result<()> {
        let mut guest = test::guest(tests);
        guest.commands = vec![[&["/bin/tests"], &self.words()[..]].concat()]
            .into_iter()
            .map(|command| command.into_iter().map(ToOwned::to_owned).collect())
            .collect();
        // How much is what the arguments say.
        guest.env.retain(|(name, _)| name != "PLUMB_MODEL_OPS");
        let mut env = self.env();
        if let Some(script) = &self.script {
            guest.files.push((script.clone(), PathBuf::from("/script")));
            env.retain(|(name, _)| name != "PLUMB_MODEL_SCRIPT");
            env.push(("PLUMB_MODEL_SCRIPT".to_owned(), "/script".to_owned()));
        }
        guest.env.extend(env);
        let work = self.minutes.map(|minutes| minutes * 60).or(self.ops.map(|ops| ops / SLOWEST));
        guest.deadline = Duration::from_secs(900 + work.unwrap_or(0));
        test::on_kernels(&self.kernel, &guest).map(drop)
    }
}

/// Names the ignored test and lets it speak.
fn words(test: &'static str) -> [&'static str; 4] {
    // Whole names: `soak` alone would be any test with these letters.
    let test = if test == "soak" { "model::soak" } else { "model::replay" };
    ["--ignored", "--exact", "--nocapture", test]
}

/// stress-ng, which opens files and forks beside the puppets. Ended when dropped.
struct Neighbour(Child);

impl Neighbour {
    fn start() -> Result<Self> {
        let mut command = Command::new("setpriv");
        // It yields at once to whoever wakes up, keeps off one processor, and holds so few fds that a pass
        // stays short.
        command
            .args(["--pdeathsig", "TERM", "chrt", "--idle", "0", "stress-ng", "--quiet", "--taskset", "0"])
            .args(["--open", "1", "--open-max", "500", "--fork", "1"])
            .current_dir(std::env::temp_dir())
            .stdin(Stdio::null());
        Ok(Self(command.spawn().context("cannot start stress-ng")?))
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        // TERM, so that it ends its own children; KILL where that does not help.
        let pid = rustix::process::Pid::from_child(&self.0);
        if let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) {
            let _ = pidfd_send_signal(pidfd, Signal::TERM);
        }
        for _ in 0..50 {
            if !matches!(self.0.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(100));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

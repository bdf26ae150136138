//! `cargo xtask test`: every test there is, on this kernel and on the pinned ones.

use std::{
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::Value;

use crate::{
    cargo,
    cmd::{self, run},
    setup, soak,
    vm::{self, Guest},
    workspace,
};

/// The test binary that needs nothing but a kernel, and what it runs.
const KERNEL_TESTS: &str = "kernel";
const STORM: &str = "fds_up_to_the_hard_limit";
const MODEL: &str = "model::";
const EXAMPLES: [&str; 2] = ["workload", "puppet"];
/// Operations of the model test on an emulated kernel: half a minute.
const EMULATED_OPS: u32 = 10_000;
const SOAK: Duration = Duration::from_secs(30);
/// A Debian kernel under emulation takes 3 to 5 minutes for the tests.
const DEADLINE: Duration = Duration::from_secs(1200);
/// The tests hold 900,000 fds at 8 bytes a slot and 232 a file, beside the image.
const MEMORY_MB: u32 = 3072;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Leave out the other kernels
    #[arg(long)]
    no_vm: bool,
    /// Only this series of xtask/kernels.lock, such as 6.1; may be repeated
    #[arg(long, value_name = "SERIES", conflicts_with = "no_vm")]
    kernel: Vec<String>,
}

impl Arguments {
    pub(crate) fn run(self) -> Result<()> {
        setup::require_root("testing on this kernel")?;
        setup::for_build()?;
        setup::for_test()?;
        if self.kernel.is_empty() {
            setup::for_soak()?;
        }
        let tests = build_kernel_tests()?;
        if self.kernel.is_empty() {
            run(cargo("test").arg("--release"))?;
            soak::Arguments::short(&tests, SOAK)?;
        }
        if self.no_vm {
            eprintln!("xtask: the other kernels were left out");
            return Ok(());
        }
        on_kernels(&self.kernel, &guest(&tests))
    }
}

/// Builds the test binary for every kernel and what it needs. The release profile, so that what is tested is
/// what is shipped.
pub(crate) fn build_kernel_tests() -> Result<PathBuf> {
    run(cargo("build").args(["--release", "--examples"]))?;
    let built = cmd::output(cargo("test").args([
        "--release",
        "--package",
        "plumb",
        "--test",
        KERNEL_TESTS,
        "--no-run",
        "--message-format",
        "json",
    ]))?;
    executable(&built)
}

/// The path of the test binary in cargo's messages.
fn executable(messages: &str) -> Result<PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let path = messages
        .filter(|message| message["target"]["name"] == KERNEL_TESTS)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from));
    path.context("cargo built no kernel tests")
}

pub(crate) fn guest(tests: &Path) -> Guest {
    let release = workspace().join("target/release");
    let file = |host: PathBuf, guest: &str| (host, PathBuf::from(guest));
    let examples = EXAMPLES.map(|name| file(release.join("examples").join(name), &format!("/bin/{name}")));
    let mut files = vec![
        file(tests.to_owned(), "/bin/tests"),
        file(release.join("plumb"), "/bin/plumb"),
        file(PathBuf::from("/bin/sh"), "/bin/sh"),
    ];
    files.extend(examples);
    Guest {
        files,
        env: vec![
            ("PLUMB_BIN".to_owned(), "/bin/plumb".to_owned()),
            ("PLUMB_WORKLOAD".to_owned(), "/bin/workload".to_owned()),
            ("PLUMB_PUPPET".to_owned(), "/bin/puppet".to_owned()),
            ("PLUMB_MODEL_OPS".to_owned(), EMULATED_OPS.to_string()),
        ],
        // The test that holds 900,000 fds and the models run alone: to the others they would be a storm.
        commands: [
            &["/bin/tests", "--test-threads", "4", "--skip", STORM, "--skip", MODEL][..],
            &["/bin/tests", "--test-threads", "1", MODEL],
            &["/bin/tests", STORM],
        ]
        .map(|command| command.iter().map(|word| (*word).to_owned()).collect())
        .to_vec(),
        memory_mb: MEMORY_MB,
        deadline: DEADLINE,
    }
}

/// Two machines at a time: the tests mostly wait.
pub(crate) fn on_kernels(series: &[String], guest: &Guest) -> Result<()> {
    let kernels = vm::select(series)?;
    let mut failed = Vec::new();
    for pair in kernels.chunks(2) {
        thread::scope(|scope| {
            let machines: Vec<_> = pair.iter().map(|kernel| scope.spawn(|| vm::run(kernel, guest))).collect();
            for machine in machines {
                match machine.join() {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => failed.push(format!("{error:#}")),
                    Err(_) => failed.push("a machine's thread panicked".to_owned()),
                }
            }
        });
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}

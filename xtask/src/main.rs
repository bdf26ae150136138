//! `cargo xtask`: the development loop.

mod bench;
mod bpf_toolchain;
mod cmd;
mod paths;
mod setup;
mod soak;
mod test;
#[cfg(test)]
mod tidy;
mod vm;
mod zoo;

use std::{
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use crate::cmd::run;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The development loop of plumb")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build the release binary, kernel programs inside, at target/release/plumb
    Build,
    /// Build, then run the agent in the foreground (as root)
    Run {
        /// Arguments for `plumb agent`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Run every test, on this kernel and in virtual machines on others (as root)
    Test(test::Arguments),
    /// Run the model tests for long, with stress-ng beside them (as root)
    Soak(soak::Arguments),
    /// Run the leak zoo: programs that leak and programs that do not, all at once (as root)
    Zoo(zoo::Arguments),
    /// Check format and lints
    Lint,
    /// Measure what plumb costs, against nothing, the floor, /proc and its peers (as root)
    Bench(bench::Arguments),
    /// Run a program on other kernels, each in a virtual machine
    Vm(vm::Arguments),
    /// Pin the newest kernel of each series in xtask/kernels.lock
    Kernels,
}

fn main() -> ExitCode {
    if vm::init::is_init() {
        vm::init::main();
        return ExitCode::FAILURE;
    }
    let done = Cli::parse().task.run();
    setup::give_back();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

impl Task {
    fn run(self) -> Result<()> {
        match self {
            Self::Build => build(),
            Self::Run { arguments } => {
                setup::require_root("loading kernel programs")?;
                build()?;
                setup::give_back();
                // In the place of this process: its exit code and the terminal's signals are the agent's.
                let error = Command::new(workspace().join("target/release/plumb"))
                    .arg("agent")
                    .args(arguments)
                    .exec();
                Err(error).context("cannot start target/release/plumb")
            }
            Self::Test(arguments) => arguments.run(),
            Self::Soak(arguments) => arguments.run(),
            Self::Zoo(arguments) => arguments.run(),
            Self::Lint => lint(),
            Self::Bench(arguments) => arguments.run(),
            Self::Vm(arguments) => arguments.run(),
            Self::Kernels => vm::refresh(),
        }
    }
}

fn build() -> Result<()> {
    setup::for_build()?;
    run(cargo("build").args(["--release", "--package", "plumb"]))
}

fn lint() -> Result<()> {
    setup::for_build()?;
    run(cargo("fmt").args(["--all", "--check"]))?;
    // The kernel programs too, as if for the host: the compiler for BPF has no lints.
    run(cargo("clippy").args(["--workspace", "--all-targets", "--", "--deny", "warnings"]))
}

/// Cargo, in the workspace and with its lock file.
fn cargo(subcommand: &str) -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(workspace()).arg(subcommand);
    if subcommand != "fmt" {
        cargo.arg("--locked");
    }
    cargo
}

/// The folder that holds agent/, common/, ebpf/ and xtask/.
fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask/ lies in the workspace")
}

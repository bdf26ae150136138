//! `cargo xtask bench`: what plumb costs, measured on this machine, and how often its verdicts are right.

use anyhow::Result;
use clap::{Args, ValueEnum};

use crate::{cargo, cmd::run, setup};

#[derive(Args)]
pub(crate) struct Arguments {
    /// Only these parts
    parts: Vec<Part>,
    /// In a comparison only the subjects whose names contain this, and the control
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Measure too little to be quoted, to see that everything runs
    #[arg(long)]
    quick: bool,
}

/// A part of the benchmark, as agent/benches/host/main.rs names it.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// A pass over all processes, against reading /proc
    Snapshot,
    /// What each mode of plumb adds to operations, and the floor of any program on the same hooks
    Overhead,
    /// The same for tools of Debian
    Peers,
    /// The most fd events that two cores can make, and how many arrive
    Rate,
    /// The agent's CPU time and memory on an idle host
    Agent,
    /// How long a drain takes beyond what its services take, and what the agent does while it waits
    Drain,
    /// What it costs a service, and others, that the sockets of a port are followed
    Sockets,
    /// What `plumb check` adds to commands, and Valgrind
    Check,
    /// The detector over 10,000 made-up processes; without root, and only by its name
    Detect,
}

impl Arguments {
    pub(crate) fn run(self) -> Result<()> {
        if self.parts.contains(&Part::Detect) {
            detect(self.quick)?;
            if self.parts == [Part::Detect] {
                return Ok(());
            }
        }
        setup::require_root("loading kernel programs")?;
        setup::for_build()?;
        if self.parts.is_empty() || self.parts.iter().any(|part| matches!(part, Part::Peers | Part::Check)) {
            setup::for_bench()?;
        }
        let parts =
            self.parts.iter().filter(|part| **part != Part::Detect).filter_map(ValueEnum::to_possible_value);
        let parts: Vec<String> = parts.map(|part| part.get_name().to_owned()).collect();
        run(cargo("build").args(["--release", "--examples"]))?;
        let mut bench = cargo("bench");
        bench.args(["--package", "plumb", "--bench", "host", "--"]).args(parts);
        bench.args(self.only.map(|only| format!("--only={only}")));
        if self.quick {
            bench.arg("--quick");
        }
        run(&mut bench)
    }
}

/// The simulator is a test of the detector, since nobody else needs either.
fn detect(quick: bool) -> Result<()> {
    let name = if quick { "detect::sim::report::quick" } else { "detect::sim::report::bench" };
    setup::for_build()?;
    let mut test = cargo("test");
    test.args(["--release", "--package", "plumb", "--lib", "--", "--exact", name]);
    run(test.args(["--include-ignored", "--nocapture", "--quiet"]))
}

//! `cargo xtask bench`: what plumb costs, measured on this machine.

use anyhow::Result;
use clap::{Args, ValueEnum};

use crate::{cargo, cmd::run, setup};

#[derive(Args)]
pub(crate) struct Arguments {
    /// Only these parts
    parts: Vec<Part>,
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
}

impl Arguments {
    pub(crate) fn run(self) -> Result<()> {
        setup::require_root("loading kernel programs")?;
        setup::for_build()?;
        if self.parts.is_empty() || self.parts.contains(&Part::Peers) {
            setup::for_bench()?;
        }
        let parts = self.parts.iter().filter_map(ValueEnum::to_possible_value);
        let parts: Vec<String> = parts.map(|part| part.get_name().to_owned()).collect();
        run(cargo("build").args(["--release", "--examples"]))?;
        let mut bench = cargo("bench");
        bench.args(["--package", "plumb", "--bench", "host", "--"]).args(parts);
        if self.quick {
            bench.arg("--quick");
        }
        run(&mut bench)
    }
}

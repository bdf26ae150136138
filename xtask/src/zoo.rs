//! `cargo xtask zoo`: programs that leak and programs that do not, all under one agent.

use anyhow::Result;
use clap::Args;

use crate::{cargo, cmd::run, setup};

#[derive(Args)]
pub(crate) struct Arguments {
    /// Only these programs of agent/tests/zoo/manifest.toml
    #[arg(value_name = "PROGRAM")]
    only: Vec<String>,
}

impl Arguments {
    pub(crate) fn run(self) -> Result<()> {
        setup::require_root("loading kernel programs")?;
        setup::for_build()?;
        run(cargo("build").args(["--release", "--examples"]))?;
        visit(&self.only)
    }
}

/// Every program, as a part of all tests: 370 s, most of which they sleep. No more than an emulated machine may
/// run beside them, since their deadlines are in seconds.
pub(crate) fn all() -> Result<()> {
    visit(&[])
}

fn visit(only: &[String]) -> Result<()> {
    let go = setup::for_zoo()?;
    let mut zoo = cargo("test");
    zoo.args(["--release", "--package", "plumb", "--test", "zoo", "--", "--ignored", "--nocapture"]);
    run(zoo.env("PLUMB_GO", go).env("PLUMB_ZOO", only.join(" ")))
}

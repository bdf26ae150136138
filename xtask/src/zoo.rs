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

fn visit(only: &[String]) -> Result<()> {
    let go = setup::for_zoo()?;
    let mut zoo = cargo("test");
    zoo.args(["--release", "--package", "plumb", "--test", "zoo", "--", "--ignored", "--nocapture"]);
    run(zoo.env("PLUMB_GO", go).env("PLUMB_ZOO", only.join(" ")))
}

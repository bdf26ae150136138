//! `cargo xtask vm`: one program on the command line instead of a [`Guest`] in code.

use std::{
    path::{Path, PathBuf, absolute},
    time::Duration,
};

use anyhow::{Context, Result};
use clap::Args;

use super::{Guest, run_on, select};
use crate::setup;

#[derive(Args)]
pub(crate) struct Arguments {
    /// A series of xtask/kernels.lock, such as 6.1; can be repeated [default: all]
    #[arg(long, value_name = "SERIES")]
    kernel: Vec<String>,
    /// With a whole Debian 12 whose first process is systemd; the program is run by a service of it
    #[arg(long)]
    systemd: bool,
    /// Memory of the machine in MB
    #[arg(long, value_name = "MB", default_value_t = 2048)]
    memory: u32,
    /// Seconds after which a machine that still runs has failed
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    deadline: u64,
    /// Another file to take along, at the same absolute path; can be repeated
    #[arg(long, value_name = "PATH")]
    file: Vec<PathBuf>,
    /// The program, which is taken along with its libraries, and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "PROGRAM")]
    command: Vec<String>,
}

impl Arguments {
    pub(crate) fn run(mut self) -> Result<()> {
        setup::for_test()?;
        let take = |path: &Path| anyhow::Ok((path.to_owned(), absolute(path)?));
        let (host, guest) = take(self.command[0].as_ref())?;
        self.command[0] = guest.to_str().context("the path of the program is not UTF-8")?.to_owned();
        let mut files = vec![(host, guest)];
        for file in &self.file {
            files.push(take(file)?);
        }
        let guest = Guest {
            files,
            commands: vec![self.command],
            systemd: self.systemd,
            memory_mb: self.memory,
            deadline: Duration::from_secs(self.deadline),
            ..Guest::default()
        };
        run_on(&select(&self.kernel)?, &guest)
    }
}

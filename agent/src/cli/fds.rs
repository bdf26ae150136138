//! `plumb fds`: what a process has open.

use clap::Args;

use super::{Outcome, no_such_process, output::Output, ps};
use crate::{
    document::Files,
    failure::Exit,
    files::OpenFile,
    kernel::{Kernel, Plan},
};

#[derive(Args)]
pub(super) struct Arguments {
    /// Process to look at
    #[arg(long, short)]
    pid: u32,
    #[command(flatten)]
    output: Output,
}

pub(super) fn run(arguments: &Arguments) -> Outcome {
    let mut kernel = Kernel::load_all(Plan::pass(&["processes", "files"]))?;
    let rows = ps::snapshot(&mut kernel)?;
    let process = rows.iter().find(|row| row.key.tgid == arguments.pid);
    let process = process.ok_or_else(|| no_such_process(arguments.pid))?;
    let mut files = Vec::new();
    kernel.files(process.key, |record| files.push(OpenFile::describe(record)))?;
    let document = Files::new(arguments.pid, process.info.comm.to_string(), files);
    let columns = [("FD", true), ("KIND", false), ("TARGET", false)];
    arguments.output.print(&document, &document.fds, &columns, |file| {
        vec![file.fd.to_string(), file.kind.clone(), file.target.clone()]
    })?;
    Ok(Exit::Ok)
}

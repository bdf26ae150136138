//! `plumb threads`: the threads of a process by name, state and start.

use clap::Args;
use plumb_common::task::ProcKey;

use super::{Outcome, no_such_process, output::Output};
use crate::{
    clock::Calendar,
    document::Threads,
    failure::Exit,
    kernel::{Kernel, Plan},
    text,
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
    let mut kernel = Kernel::load_all(Plan::pass(&["threads"]))?;
    let records = kernel.threads(ProcKey::new(arguments.pid, 0))?;
    let leader = records.iter().find(|record| record.tid == record.tgid).or(records.first());
    let comm = text::terminated(&leader.ok_or_else(|| no_such_process(arguments.pid))?.comm);
    let document = Threads::new(arguments.pid, comm, &records, Calendar::now());
    let columns = [("TID", true), ("STATE", false), ("STARTED", false), ("NAME", false)];
    arguments.output.print(&document, &document.threads, &columns, |thread| {
        vec![thread.tid.to_string(), thread.state.to_string(), thread.start_time.clone(), thread.name.clone()]
    })?;
    Ok(Exit::Ok)
}

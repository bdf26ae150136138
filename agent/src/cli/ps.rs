//! `plumb ps`: one pass over all processes.

use clap::Args;
use plumb_common::task::TaskRecord;

use super::{
    Outcome,
    output::{self, Output},
};
use crate::{
    clock::Calendar,
    document::Processes,
    failure::Exit,
    kernel::{Kernel, Plan},
    procfs::Describer,
    table::{Pass, Row, Table},
};

#[derive(Args)]
pub(super) struct Arguments {
    /// List kernel threads in the table too; JSON always has them
    #[arg(long)]
    kernel_threads: bool,
    #[command(flatten)]
    output: Output,
}

pub(super) fn run(arguments: &Arguments) -> Outcome {
    let rows = snapshot(&mut Kernel::load_required(Plan::pass(&["processes"]))?)?;
    let mut document = Processes::new(&rows, Calendar::now());
    if arguments.output.format == output::Format::Table {
        document.processes.retain(|process| arguments.kernel_threads || !process.kernel_thread);
        document.processes.sort_by_key(|process| std::cmp::Reverse((process.fds, process.threads)));
    }
    let columns = [
        ("PID", true),
        ("FDS", true),
        ("LIMIT", true),
        ("THREADS", true),
        ("RSS", true),
        ("STATE", false),
        ("GROUP", false),
        ("COMM", false),
    ];
    arguments.output.print(&document, &document.processes, &columns, |process| {
        vec![
            process.pid.to_string(),
            process.fds.map_or_else(|| "?".to_owned(), |fds| fds.to_string()),
            process.fd_limit.map_or_else(|| "none".to_owned(), |limit| limit.to_string()),
            process.threads.to_string(),
            output::bytes(process.rss_bytes),
            process.state.to_string(),
            process.group.clone(),
            process.comm.clone(),
        ]
    })?;
    Ok(Exit::Ok)
}

/// All processes as one pass finds them.
pub(super) fn snapshot(kernel: &mut Kernel) -> std::io::Result<Vec<Row>> {
    let records: Vec<TaskRecord> = kernel.processes()?;
    let words = Describer::new("/proc").describe(&records);
    let mut table = Table::default();
    table.reconcile(&Pass { records: records.into_iter().zip(words).collect(), ..Pass::default() });
    Ok(table.rows())
}

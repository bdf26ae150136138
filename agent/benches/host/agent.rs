//! What the agent uses on a host where nothing happens, by the number of processes and threads.

use std::{ffi::OsStr, fs, thread, time::Duration};

use anyhow::Result;

use crate::{
    Effort,
    attach::Running,
    crowd::{Crowd, threads_now},
    stats::Median,
    subjects::IDLE_AGENT,
    worker::Worker,
};

/// Processes of the host where they have one thread, else those beside its own; threads of each; and the CPU time that is meant to be enough, in per cent of a core.
const CROWDS: [(usize, usize, f64); 3] = [(200, 1, 0.1), (10_000, 1, 3.0), (1_000, 100, 3.0)];
/// Every process has been described by then, and the detector has seen each twice.
const WARM_UP: Duration = Duration::from_secs(5);

pub(crate) fn run(effort: Effort) -> Result<()> {
    println!(
        "\nThe agent on an idle host: CPU time is the median of {} readings of {} s (lowest to highest).\n",
        effort.readings,
        effort.reading.as_secs()
    );
    println!(
        "| processes | threads | agent CPU, % of a core | meant to be at most, % | agent resident memory, MB |"
    );
    println!("|---|---|---|---|---|");
    for (processes, threads, bound) in CROWDS {
        eprintln!("bench: agent, {processes} processes of {threads} threads");
        if let Err(error) = beside(processes, threads, bound, effort) {
            println!("| {processes} | {} | cannot run here: {error:#} | | |", processes * threads);
        }
    }
    Ok(())
}

fn beside(processes: usize, threads: usize, bound: f64, effort: Effort) -> Result<()> {
    let there = if threads == 1 { census()?.0 } else { 0 };
    let _crowd = Crowd::start(processes.saturating_sub(there).max(1), threads)?;
    let mut nobody = Worker::start(0)?;
    let mut running = Running::start(IDLE_AGENT, &mut nobody, None)?;
    thread::sleep(WARM_UP);
    let mut percents = Vec::new();
    for _ in 0..effort.readings {
        let meter = running.meter()?;
        thread::sleep(effort.reading);
        percents.push(meter.percent()?);
    }
    let (all_processes, all_threads) = census()?;
    let low = percents.iter().copied().fold(f64::INFINITY, f64::min);
    let high = percents.iter().copied().fold(0.0, f64::max);
    println!(
        "| {all_processes} | {all_threads} | {:.3} ({low:.3} to {high:.3}) | {bound} | {:.1} |",
        Median::of(percents).median,
        running.resident()? as f64 / 1e6
    );
    running.end()
}

/// Processes and threads of this host.
fn census() -> Result<(usize, usize)> {
    let is_process = |name: &OsStr| name.as_encoded_bytes()[0].is_ascii_digit();
    let mut processes = 0;
    for entry in fs::read_dir("/proc")? {
        processes += usize::from(is_process(&entry?.file_name()));
    }
    Ok((processes, threads_now()))
}

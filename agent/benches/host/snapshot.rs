//! One pass over all processes by the iterator, against reading the same from /proc.

use std::{fs, io::Read, time::Instant};

use anyhow::{Result, ensure};
use plumb::kernel::{Kernel, Plan};

use crate::{Effort, crowd::Crowd, stats::Median};

const PROCESSES: [usize; 2] = [1_000, 4_000];

pub(crate) fn run(effort: Effort) -> Result<()> {
    println!(
        "\n| processes | one pass over all, ms | the same fields from /proc, ms | times faster: median of {} pairs (95 % interval) |",
        effort.pairs
    );
    println!("|---|---|---|---|");
    for wanted in PROCESSES {
        eprintln!("bench: snapshots of {wanted} processes");
        let _crowd = Crowd::start(wanted, 1)?;
        pairs(effort.pairs)?;
    }
    Ok(())
}

fn pairs(count: usize) -> Result<()> {
    let mut kernel = Kernel::load_required(Plan::pass(&["processes"]))?;
    let (mut by_iterator, mut by_proc) = (Vec::new(), Vec::new());
    let mut found = (0_usize, 0_usize);
    for _ in 0..count {
        let start = Instant::now();
        found.0 = kernel.processes()?.len();
        by_iterator.push(start.elapsed().as_secs_f64() * 1e3);
        let start = Instant::now();
        found.1 = from_proc()?;
        by_proc.push(start.elapsed().as_secs_f64() * 1e3);
    }
    ensure!(found.0.abs_diff(found.1) < 10, "the two ways found different hosts: {found:?}");
    let ratios = by_proc.iter().zip(&by_iterator).map(|(proc, iterator)| proc / iterator).collect();
    let Median { low, median, high } = Median::of(ratios);
    println!(
        "| {} | {:.2} | {:.1} | {median:.1} ({low:.1} to {high:.1}) |",
        found.0,
        Median::of(by_iterator).median,
        Median::of(by_proc).median,
    );
    Ok(())
}

/// What a careful reader of /proc does for fds, limit, threads, memory, parent and start of all processes.
fn from_proc() -> Result<usize> {
    let mut found = 0;
    let mut text = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        if !path.file_name().is_some_and(|name| name.as_encoded_bytes()[0].is_ascii_digit()) {
            continue;
        }
        let mut read = |name: &str| -> Option<usize> {
            text.clear();
            fs::File::open(path.join(name)).ok()?.read_to_end(&mut text).ok()
        };
        if read("stat").is_none() || read("status").is_none() || read("limits").is_none() {
            continue;
        }
        let Ok(fds) = fs::read_dir(path.join("fd")) else { continue };
        std::hint::black_box(fds.count());
        found += 1;
    }
    Ok(found)
}

//! What attached programs add to operations: pairs of batches without and with them, taken in turn.

use std::time::Duration;

use anyhow::{Result, bail};

use crate::{
    Effort,
    attach::{Running, Toggle},
    stats::{Median, Pair, added, ratio},
    subjects::{Subject, What},
    worker::{BURST, Operation, Worker},
};

/// The CPU of the operations; what is measured may run on any.
const CPU: usize = 0;
/// What a side of a pair is measured in: the shorter, the fewer are disturbed.
const SLICE: Duration = Duration::from_micros(500);
const OPERATIONS: [Operation; Operation::ALL.len()] = Operation::ALL;

/// The pairs of each operation, or why there are none.
struct Row {
    subject: &'static Subject,
    pairs: Result<[Vec<Pair>; OPERATIONS.len()]>,
    load: Result<Option<Load>>,
}

/// What a subject did while one CPU opened and closed as fast as it could.
struct Load {
    pairs_per_second: f64,
    /// Those it told of, and those there were.
    events: Option<(u64, u64)>,
    cpu_percent: f64,
    resident: u64,
}

/// `only` chooses among the subjects by a part of the name; the control stays.
pub(crate) fn run(subjects: &'static [Subject], effort: Effort, only: Option<&str>) -> Result<()> {
    let mut worker = Worker::start(CPU)?;
    let sizes = slice_sizes(&mut worker)?;
    let mut rows = Vec::new();
    let is_chosen = |subject: &&Subject| {
        matches!(subject.what, What::Nothing) || only.is_none_or(|only| subject.name.contains(only))
    };
    if let Some(only) = only
        && !subjects.iter().any(|subject| subject.name.contains(only))
    {
        let names: Vec<&str> = subjects.iter().map(|subject| subject.name).collect();
        bail!("no subject contains {only:?}: {}", names.join("; "));
    }
    for subject in subjects.iter().filter(is_chosen) {
        eprintln!("bench: {}", subject.name);
        let pairs = pairs(subject, &mut worker, sizes, effort);
        let load = if pairs.is_ok() { load(subject, &mut worker, effort.load) } else { Ok(None) };
        rows.push(Row { subject, pairs, load });
    }
    print(&rows);
    Ok(())
}

/// How many of each operation fit into a slice.
fn slice_sizes(worker: &mut Worker) -> Result<[u64; OPERATIONS.len()]> {
    let mut sizes = [0; OPERATIONS.len()];
    for (size, operation) in sizes.iter_mut().zip(OPERATIONS) {
        worker.begin(operation, SLICE * 100)?;
        let (done, took) = worker.finish()?;
        *size = match operation {
            Operation::OpenCloseInBursts => BURST as u64,
            _ => ((done as f64 * SLICE.as_secs_f64() / took.as_secs_f64()) as u64).max(1),
        };
    }
    Ok(sizes)
}

/// Without and with, with and without, and so on: a machine that becomes slower or faster meanwhile does so
/// for both, and each pair costs one attaching or detaching.
fn pairs(
    subject: &'static Subject,
    worker: &mut Worker,
    sizes: [u64; OPERATIONS.len()],
    effort: Effort,
) -> Result<[Vec<Pair>; OPERATIONS.len()]> {
    let mut toggle = Toggle::new(subject)?;
    let mut pairs = OPERATIONS.map(|_| Vec::new());
    let slices = (effort.side.as_nanos() / SLICE.as_nanos()) as usize;
    for index in 0..effort.pairs {
        let mut sides = [[0.0; OPERATIONS.len()]; 2];
        for with in if index % 2 == 0 { [false, true] } else { [true, false] } {
            toggle.set(with, worker)?;
            for (side, (operation, size)) in
                sides[usize::from(with)].iter_mut().zip(OPERATIONS.into_iter().zip(sizes))
            {
                // Pauses take most of the time of bursts.
                let wanted = if operation == Operation::OpenCloseInBursts { slices / 4 } else { slices };
                *side = worker.calmest(operation, size, wanted)?;
            }
        }
        let [without, with] = sides;
        for (pairs, (without, with)) in pairs.iter_mut().zip(without.into_iter().zip(with)) {
            pairs.push(Pair { without, with });
        }
    }
    toggle.set(false, worker)?;
    Ok(pairs)
}

fn load(subject: &'static Subject, another: &mut Worker, time: Duration) -> Result<Option<Load>> {
    let What::Programs(programs) = subject.what else { return Ok(None) };
    let mut worker = Worker::start(CPU)?;
    let mut running = Running::start(programs, &mut worker, Some(another))?;
    running.wait_until_quiet();
    let before = running.told(worker.pid())?;
    let meter = running.meter()?;
    worker.begin(Operation::OpenClose, time)?;
    let (done, took) = worker.finish()?;
    let cpu_percent = meter.percent()?;
    let resident = running.resident()?;
    running.wait_until_quiet();
    running.end()?;
    let events = match running.events_of_a_pair() {
        Some(each) => Some((running.told(worker.pid())? - before, done * each)),
        None => None,
    };
    Ok(Some(Load { pairs_per_second: done as f64 / took.as_secs_f64(), events, cpu_percent, resident }))
}

fn print(rows: &[Row]) {
    let names = OPERATIONS.map(Operation::name).join(" | ");
    let dashes = "---|".repeat(OPERATIONS.len() + 2);
    println!(
        "\nTimes of an operation with it attached to without: median of the ratios of pairs (95 % interval).\n"
    );
    println!("| attached | pairs | {names} |\n|{dashes}");
    cells(rows, |pairs| {
        let Median { low, median, high } = ratio(pairs);
        format!("{median:.3} ({low:.3} to {high:.3})")
    });
    println!("\nAdded by it, ns per operation: median of the differences of pairs (95 % interval).\n");
    println!("| attached | pairs | {names} |\n|{dashes}");
    if let Some(Row { pairs: Ok(control), .. }) = rows.first() {
        let without = control.each_ref().map(|pairs| {
            let median = Median::of(pairs.iter().map(|pair| pair.without).collect()).median;
            format!("{median:.0}")
        });
        println!("| (the operation itself, ns) | {} | {} |", control[0].len(), without.join(" | "));
    }
    cells(rows, |pairs| {
        let Median { low, median, high } = added(pairs);
        format!("{median:+.0} ({low:+.0} to {high:+.0})")
    });
    println!("\nWhile one CPU opens and closes as fast as it can:\n");
    println!(
        "| attached | open+close, thousands per second | events | told of | lost, % | its CPU, % of a core | its resident memory, MB |"
    );
    println!("|{}", "---|".repeat(7));
    for row in rows {
        match &row.load {
            Ok(None) => {}
            Err(error) => println!("| {} | cannot run here: {error:#} | | | | | |", row.subject.name),
            Ok(Some(load)) => {
                let events = load.events.map_or_else(
                    || "- | - | -".to_owned(),
                    |(told, made)| {
                        let lost = made.saturating_sub(told) as f64 / made as f64 * 100.0;
                        format!("{made} | {told} | {lost:.2}")
                    },
                );
                println!(
                    "| {} | {:.0} | {events} | {:.2} | {:.1} |",
                    row.subject.name,
                    load.pairs_per_second / 1e3,
                    load.cpu_percent,
                    load.resident as f64 / 1e6
                );
            }
        }
    }
}

fn cells(rows: &[Row], cell: impl Fn(&[Pair]) -> String) {
    for row in rows {
        match &row.pairs {
            Ok(pairs) => {
                let cells = pairs.each_ref().map(|pairs| cell(pairs)).join(" | ");
                println!("| {} | {} | {cells} |", row.subject.name, pairs[0].len());
            }
            Err(error) => {
                let none = " |".repeat(OPERATIONS.len());
                println!("| {} | 0 | cannot run here: {error:#}{none}", row.subject.name);
            }
        }
    }
}

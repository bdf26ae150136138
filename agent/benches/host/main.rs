//! What plumb costs, in one run: against /proc, against nothing, against the floor that any program on the
//! same hooks costs, and against its peers. Prints Markdown; progress goes to stderr.
//!
//! Arguments: the parts to run (all without any), --quick for a look at the instrument itself, and --only=TEXT for
//! those subjects of a comparison whose names contain it.

mod agent;
mod attach;
mod calm;
mod check;
mod crowd;
mod drain;
mod overhead;
mod rate;
mod snapshot;
mod sockets;
mod stats;
mod subjects;
mod usage;
mod worker;

use std::{
    env, fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

/// How much is measured.
#[derive(Clone, Copy, Debug)]
struct Effort {
    /// Of each comparison.
    pairs: usize,
    /// How much of one side of a pair is measured, when nothing disturbs it.
    side: Duration,
    /// How long the load lasts in which events and CPU time are counted.
    load: Duration,
    /// How long the highest rate is held.
    rate: Duration,
    /// Of an idle agent.
    readings: usize,
    reading: Duration,
}

const FULL: Effort = Effort {
    pairs: 30,
    side: Duration::from_millis(50),
    load: Duration::from_secs(5),
    rate: Duration::from_secs(60),
    readings: 3,
    reading: Duration::from_secs(10),
};

const QUICK: Effort = Effort {
    pairs: 6,
    side: Duration::from_millis(10),
    load: Duration::from_secs(1),
    rate: Duration::from_secs(5),
    readings: 3,
    reading: Duration::from_secs(2),
};

/// A part, and roughly how many seconds it takes in full and quick.
struct Part {
    name: &'static str,
    seconds: [u64; 2],
    run: fn(Effort, Option<&str>) -> Result<()>,
}

static PARTS: [Part; 8] = [
    Part { name: "snapshot", seconds: [20, 5], run: |effort, _| snapshot::run(effort) },
    Part {
        name: "overhead",
        seconds: [600, 60],
        run: |effort, only| overhead::run(&subjects::OWN, effort, only),
    },
    Part {
        name: "peers",
        seconds: [900, 90],
        run: |effort, only| {
            mount_tracefs()?;
            overhead::run(&subjects::PEERS, effort, only)
        },
    },
    Part { name: "rate", seconds: [125, 15], run: |effort, _| rate::run(effort) },
    Part { name: "agent", seconds: [120, 60], run: |effort, _| agent::run(effort) },
    Part { name: "drain", seconds: [270, 90], run: |effort, _| drain::run(effort) },
    Part { name: "sockets", seconds: [60, 15], run: |effort, _| sockets::run(effort) },
    Part { name: "check", seconds: [1200, 240], run: check::run },
];

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match &arguments[..] {
        [role, cpu] if role == worker::ROLE => return worker::run(cpu),
        [role, address] if role == "scrape" => return attach::scrape(address),
        [role, takes] if role == drain::ROLE => return drain::serve(takes),
        [role, file, words @ ..] if role == check::ROLE => return check::timed(file, words),
        _ => {}
    }
    let mut quick = false;
    let mut chosen = Vec::new();
    let mut only = None;
    for argument in &arguments {
        match argument.as_str() {
            // From cargo.
            "--bench" => {}
            "--quick" => quick = true,
            text if text.starts_with("--only=") => only = text.strip_prefix("--only="),
            name => match PARTS.iter().find(|part| part.name == name) {
                Some(part) => chosen.push(part),
                None => bail!("no part {name}: {}", PARTS.each_ref().map(|part| part.name).join(", ")),
            },
        }
    }
    if chosen.is_empty() {
        chosen.extend(&PARTS);
    }
    let seconds: u64 = chosen.iter().map(|part| part.seconds[usize::from(quick)]).sum();
    eprintln!("bench: about {} minutes; the machine should have nothing else to do", seconds.div_ceil(60));
    // Peers lock what they map. Where the limit cannot be raised they say whether it matters.
    let unlimited = rustix::process::Rlimit { current: None, maximum: None };
    let _ = rustix::process::setrlimit(rustix::process::Resource::Memlock, unlimited);
    let machine = rustix::system::uname();
    println!(
        "Linux {}, {} CPUs{}",
        machine.release().to_string_lossy(),
        std::thread::available_parallelism()?,
        if quick { "; --quick: too little to be quoted" } else { "" }
    );
    for part in chosen {
        println!("\n## {}", part.name);
        let start = Instant::now();
        (part.run)(if quick { QUICK } else { FULL }, only)?;
        eprintln!("bench: {} took {} s", part.name, start.elapsed().as_secs());
    }
    Ok(())
}

/// bpftrace and perf read tracefs. Where it is not mounted, it is for this process and its children only.
fn mount_tracefs() -> Result<()> {
    let mounts = [("tracefs", "/sys/kernel/tracing"), ("debugfs", "/sys/kernel/debug")];
    let is_empty = |path: &str| fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
    if !mounts.iter().any(|(_, path)| is_empty(path)) {
        return Ok(());
    }
    // SAFETY: gives this thread, the only one, a mount table of its own; nothing else is shared anew.
    ensure!(unsafe { libc::unshare(libc::CLONE_NEWNS) } == 0, "unshare: {}", std::io::Error::last_os_error());
    mount(&["--make-rprivate", "/"])?;
    for (kind, path) in mounts {
        if Path::new(path).is_dir() && is_empty(path) {
            mount(&["-t", kind, kind, path])?;
        }
    }
    Ok(())
}

fn mount(arguments: &[&str]) -> Result<()> {
    let status = Command::new("mount").args(arguments).status().context("mount")?;
    ensure!(status.success(), "mount {}: {status}", arguments.join(" "));
    Ok(())
}

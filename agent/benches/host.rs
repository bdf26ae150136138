//! What plumb costs, measured against reading the same from /proc, in one run: pairs taken in turn, the
//! median of their ratios, and the agent's own use of the machine. Prints Markdown.

use std::{
    env, fs,
    io::{BufRead, BufReader, Read},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use plumb::kernel::{Kernel, Plan};

const PAIRS: usize = 31;
const PROCESSES: [usize; 2] = [1_000, 4_000];
/// How long the agent is watched.
const WATCHED: Duration = Duration::from_secs(20);
/// Linux reports processor time in units of 10 ms to user space (`USER_HZ`).
const TICK: Duration = Duration::from_millis(10);

fn main() -> Result<()> {
    // Cargo passes --bench; there is nothing to choose.
    println!(
        "| processes | snapshot by iterator, ms | the same from /proc, ms | times faster (median, quartiles) |"
    );
    println!("|---|---|---|---|");
    let mut agents = Vec::new();
    for wanted in PROCESSES {
        let _many = Many::start(wanted)?;
        snapshots()?;
        agents.push((wanted, agent()?));
    }
    println!("\n| processes | agent CPU, % of a core | agent RSS, MB |\n|---|---|---|");
    for (processes, (cpu, rss)) in agents {
        println!("| {processes} | {cpu:.2} | {:.1} |", rss as f64 / 1e6);
    }
    Ok(())
}

/// Processes that wait, each with a few fds.
struct Many(Child);

impl Many {
    fn start(processes: usize) -> Result<Self> {
        let program = env::current_exe()?.parent().context("a folder")?.join("../examples/workload");
        let mut child = Command::new(program)
            .args(["hold-processes", &processes.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("the example `workload` is not built: cargo build --release --examples")?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("stdout")?).read_line(&mut line)?;
        ensure!(line == "ready\n", "the workload is not ready");
        Ok(Self(child))
    }
}

impl Drop for Many {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn snapshots() -> Result<()> {
    let mut kernel = Kernel::load_required(Plan::pass(&["processes"]))?;
    let (mut by_iterator, mut by_proc, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let mut found = (0_usize, 0_usize);
    for _ in 0..PAIRS {
        let start = Instant::now();
        found.0 = kernel.processes()?.len();
        let iterator = start.elapsed();
        let start = Instant::now();
        found.1 = from_proc()?;
        let proc = start.elapsed();
        by_iterator.push(iterator.as_secs_f64() * 1e3);
        by_proc.push(proc.as_secs_f64() * 1e3);
        ratios.push(proc.as_secs_f64() / iterator.as_secs_f64());
    }
    ensure!(found.0.abs_diff(found.1) < 10, "the two ways found different hosts: {found:?}");
    let [low, median, high] = quartiles(&mut ratios);
    println!(
        "| {} | {:.2} | {:.1} | {median:.0} ({low:.0} to {high:.0}) |",
        found.0,
        quartiles(&mut by_iterator)[1],
        quartiles(&mut by_proc)[1],
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

/// CPU in per cent of a core and resident bytes of an agent at work.
fn agent() -> Result<(f64, u64)> {
    let dir = env::temp_dir().join(format!("plumb-bench-{}", std::process::id()));
    let child = Command::new(env!("CARGO_BIN_EXE_plumb"))
        .args(["agent", "--listen", "127.0.0.1:0", "--run-dir"])
        .arg(&dir)
        .stderr(Stdio::null())
        .spawn()?;
    let agent = Many(child);
    // Loading and describing every process once is over by then.
    thread::sleep(Duration::from_secs(5));
    let before = ticks(agent.0.id())?;
    thread::sleep(WATCHED);
    let used = TICK * u32::try_from(ticks(agent.0.id())? - before)?;
    let statm = fs::read_to_string(format!("/proc/{}/statm", agent.0.id()))?;
    let pages: u64 = statm.split(' ').nth(1).context("statm")?.parse()?;
    drop(agent);
    let _ = fs::remove_dir_all(dir);
    Ok((used.as_secs_f64() / WATCHED.as_secs_f64() * 100.0, pages * 4096))
}

fn ticks(pid: u32) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit_once(')').context("stat")?.1.split_ascii_whitespace().collect();
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}

/// First quartile, median, third quartile.
fn quartiles(values: &mut [f64]) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [1, 2, 3].map(|quarter| values[values.len() * quarter / 4])
}

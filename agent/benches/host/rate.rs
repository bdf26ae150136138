//! How many fd events two cores can make, and how many of them reach a subscriber that counts.

use std::{
    fs::{self, File},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::{
    Effort,
    usage::{Meter, die_with_parent},
    worker::{Operation, Worker},
};

const PLUMB: &str = env!("CARGO_BIN_EXE_plumb");
const CPUS: [usize; 2] = [0, 1];
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn run(effort: Effort) -> Result<()> {
    println!(
        "\nEvents of two CPUs that do nothing else for {} s, read by `plumb watch --count`:\n",
        effort.rate.as_secs()
    );
    println!(
        "| operation | events | thousands per second | received | lost | lost, % | reader CPU, % of a core |"
    );
    println!("|{}", "---|".repeat(7));
    for operation in [Operation::OpenClose, Operation::DupClose] {
        eprintln!("bench: rate of {}", operation.name());
        one(operation, effort.rate)?;
    }
    Ok(())
}

fn one(operation: Operation, time: Duration) -> Result<()> {
    let mut workers = CPUS.iter().map(|cpu| Worker::start(*cpu)).collect::<Result<Vec<_>>>()?;
    // Only the workers have this name, so what they make is what there is to receive.
    let name = fs::read_to_string(format!("/proc/{}/comm", workers[0].pid()))?;
    let subscriber = Subscriber::start(name.trim_end())?;
    let meter = Meter::start(vec![subscriber.child.id()])?;
    for worker in &mut workers {
        worker.begin(operation, time)?;
    }
    let mut made = 0;
    let mut per_second = 0.0;
    for worker in &mut workers {
        let (pairs, took) = worker.finish()?;
        made += pairs * 2;
        per_second += (pairs * 2) as f64 / took.as_secs_f64();
    }
    let cpu = meter.percent()?;
    // The reader looks every 100 ms at the latest.
    thread::sleep(Duration::from_secs(1));
    let (received, lost) = subscriber.end()?;
    println!(
        "| {} | {made} | {:.0} | {received} | {lost} | {:.3} | {cpu:.1} |",
        operation.name(),
        per_second / 1e3,
        lost as f64 / made as f64 * 100.0,
    );
    Ok(())
}

/// `plumb watch --count`, and what it says in the end.
struct Subscriber {
    child: Child,
    folder: std::path::PathBuf,
}

impl Subscriber {
    fn start(comm: &str) -> Result<Self> {
        let folder = std::path::Path::new("/dev/shm").join(format!("plumb-rate-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let mut command = Command::new(PLUMB);
        command.args(["watch", "--count", "-o", "json", "--comm", comm]);
        let (out, err) = (File::create(folder.join("out"))?, File::create(folder.join("err"))?);
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        let child = die_with_parent(&mut command).spawn()?;
        let started = Self { child, folder };
        let end = Instant::now() + PATIENCE;
        while !started.said()?.contains("plumb: watching") {
            ensure!(Instant::now() < end, "plumb watch does not start: {}", started.said()?);
            thread::sleep(Duration::from_millis(50));
        }
        Ok(started)
    }

    fn said(&self) -> Result<String> {
        Ok(fs::read_to_string(self.folder.join("err"))?)
    }

    /// Events received and lost.
    fn end(mut self) -> Result<(u64, u64)> {
        // The child was not waited for, so the number is still its own.
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
        self.child.wait()?;
        let summary: Value = serde_json::from_str(&fs::read_to_string(self.folder.join("out"))?)?;
        Ok((sum(&summary["events"]), sum(&summary["lost"])))
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// A number, or all numbers of an object.
fn sum(value: &Value) -> u64 {
    value
        .as_u64()
        .unwrap_or_else(|| value.as_object().into_iter().flat_map(|object| object.values()).map(sum).sum())
}

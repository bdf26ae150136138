//! How long a drain takes beyond what its services take, and what the agent does while it only waits.

use std::{
    env,
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    path::PathBuf,
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use self::client::Client;
use crate::{
    Effort,
    stats::Median,
    usage::{cpu_time, die_with_parent},
};

#[allow(clippy::unwrap_used, clippy::panic, dead_code, reason = "shared with the tests")]
#[path = "../../tests/drain/client.rs"]
mod client;

/// The first argument of `serve`.
pub(crate) const ROLE: &str = "service";
/// Chains of two services: the second stops when the first has.
const CHAINS: usize = 3;
/// Least and most that a service takes to end.
const TAKES: (u64, u64) = (50, 500);

/// Since the host was started, in ms.
fn now() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec as f64 * 1e3 + now.tv_nsec as f64 / 1e6
}

/// A service: waits for TERM, takes so many ms, and says when it got the signal and when it was done.
pub(crate) fn serve(takes: &str) -> Result<()> {
    let takes = Duration::from_millis(takes.parse()?);
    // SAFETY: a set that is filled before it is read.
    let term = unsafe {
        let mut term: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut term);
        libc::sigaddset(&raw mut term, libc::SIGTERM);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const term, std::ptr::null_mut());
        term
    };
    println!("ready");
    let mut signal = 0;
    // SAFETY: both places are valid.
    unsafe { libc::sigwait(&raw const term, &raw mut signal) };
    let got = now();
    thread::sleep(takes);
    println!("{got} {}", now());
    Ok(())
}

/// Whatever is left of it when the benchmark ends is ended.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Served {
    process: Running,
    output: BufReader<ChildStdout>,
    takes: u64,
}

impl Served {
    fn start(takes: u64) -> Result<Self> {
        let mut command = Command::new(env::current_exe()?);
        command.args([ROLE, &takes.to_string()]).stdout(Stdio::piped());
        let mut process = Running(die_with_parent(&mut command).spawn()?);
        let mut output = BufReader::new(process.0.stdout.take().context("stdout")?);
        output.read_line(&mut String::new())?;
        Ok(Self { process, output, takes })
    }

    fn register(&self, admin: &mut Client, name: &str, after: &[&str]) -> Result<()> {
        let pid = self.process.0.id();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let ticks = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(19));
        let ticks: u64 = ticks.context("start")?.parse()?;
        let process = json!({ "pid": pid, "start_ticks": ticks });
        let wish = json!({ "signal": "TERM", "after": after, "process": process });
        let (status, answer) = admin.ask("PUT", &format!("/v1/services/{name}"), Some(&wish));
        ensure!(status == 200, "{answer}");
        Ok(())
    }

    /// When it got its signal, and when it was done.
    fn said(&mut self) -> Result<(f64, f64)> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        let (got, done) = line.trim().split_once(' ').context("it did not stop by itself")?;
        self.process.0.wait()?;
        Ok((got.parse()?, done.parse()?))
    }
}

struct Agent {
    process: Running,
    dir: PathBuf,
}

impl Agent {
    fn start() -> Result<Self> {
        let dir = env::temp_dir().join(format!("plumb-bench-drain-{}", std::process::id()));
        fs::create_dir_all(&dir)?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_plumb"));
        command.args(["agent", "--listen", "127.0.0.1:0", "--run-dir"]).arg(dir.join("run"));
        command.arg("--state-dir").arg(dir.join("state")).stderr(File::create(dir.join("log"))?);
        let process = Running(die_with_parent(&mut command).spawn()?);
        let end = Instant::now() + Duration::from_secs(20);
        while !dir.join("run/plumb.sock").exists() {
            ensure!(Instant::now() < end, "{}", fs::read_to_string(dir.join("log"))?);
            thread::sleep(Duration::from_millis(50));
        }
        // The first passes and the description of all processes are over by then.
        thread::sleep(Duration::from_secs(5));
        Ok(Self { process, dir })
    }

    fn admin(&self) -> Result<Client> {
        Ok(Client::connect(self.dir.join("run").to_str().context("the folder")?))
    }

    /// CPU time in ms, and how often its threads have gone to sleep.
    fn used(&self) -> Result<(f64, u64)> {
        let pid = self.process.0.id();
        let mut switches = 0;
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            let Ok(status) = fs::read_to_string(thread?.path().join("status")) else { continue };
            let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            switches += line.context("switches")?.trim().parse::<u64>()?;
        }
        Ok((cpu_time(pid)?.as_secs_f64() * 1e3, switches))
    }

    /// The same, of one second.
    fn per_second(&self, time: Duration) -> Result<(f64, f64)> {
        let before = self.used()?;
        thread::sleep(time);
        let after = self.used()?;
        let seconds = time.as_secs_f64();
        Ok(((after.0 - before.0) / seconds, (after.1 - before.1) as f64 / seconds))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// What a drain took, in ms.
struct Taken {
    /// Until the last service was done, and until the client was told of the end.
    all: f64,
    told: f64,
    /// What the services take: the slowest of each stage, and the slowest chain.
    stages: f64,
    chain: f64,
    /// From the request to the signals of the first stage.
    signals: Vec<f64>,
}

pub(crate) fn run(effort: Effort) -> Result<()> {
    let agent = Agent::start()?;
    let mut admin = agent.admin()?;
    let mut random = Random(0x706c_756d_6220_6472);
    let mut taken = Vec::new();
    for round in 0..effort.pairs {
        eprint!("\rbench: drain {} of {}", round + 1, effort.pairs);
        taken.push(once(&mut admin, round, &mut random)?);
    }
    eprintln!();
    println!(
        "\n{} drains of {CHAINS} chains of two services, each of which takes {} to {} ms to end; ms.\n",
        taken.len(),
        TAKES.0,
        TAKES.1
    );
    println!("| | median | 95 % interval of it | most |\n|---|---|---|---|");
    let row = |what: &str, values: Vec<f64>| {
        let most = values.iter().copied().fold(0.0, f64::max);
        let median = Median::of(values);
        println!("| {what} | {:.1} | {:.1} to {:.1} | {most:.1} |", median.median, median.low, median.high);
    };
    let each = |value: fn(&Taken) -> f64| taken.iter().map(value).collect::<Vec<_>>();
    row(
        "from the request to a signal of the first stage",
        taken.iter().flat_map(|one| one.signals.clone()).collect(),
    );
    row("the end, later than the slowest service of each stage", each(|one| one.told - one.stages));
    row("of that, until the agent tells of it", each(|one| one.told - one.all));
    row("the end, later than the slowest chain", each(|one| one.told - one.chain));
    waiting(&agent, effort)
}

fn once(admin: &mut Client, round: usize, random: &mut Random) -> Result<Taken> {
    let mut services = Vec::new();
    for place in 0..2 {
        for chain in 0..CHAINS {
            let service = Served::start(TAKES.0 + random.below(TAKES.1 - TAKES.0 + 1))?;
            let (first, name) = (format!("r{round}-{chain}-0"), format!("r{round}-{chain}-{place}"));
            let after: &[&str] = if place == 0 { &[] } else { &[&first] };
            service.register(admin, &name, after)?;
            services.push(service);
        }
    }
    let began = now();
    begin(admin)?;
    admin.drain_when(|drain| drain["state"] == "ended" || drain["state"] == "finished");
    let told = now() - began;
    // The next one would first look once more for what this one has stopped.
    admin.drain_when(|drain| drain["state"] == "finished");
    let said = services.iter_mut().map(Served::said).collect::<Result<Vec<_>>>()?;
    let slowest = |stage: &[Served]| stage.iter().map(|one| one.takes).max().unwrap_or(0) as f64;
    let (first, second) = services.split_at(CHAINS);
    let chains = first.iter().zip(second).map(|(one, other)| one.takes + other.takes);
    Ok(Taken {
        all: said.iter().map(|(_, done)| done - began).fold(0.0, f64::max),
        told,
        stages: slowest(first) + slowest(second),
        chain: chains.max().unwrap_or(0) as f64,
        signals: said[..CHAINS].iter().map(|(got, _)| got - began).collect(),
    })
}

fn begin(admin: &mut Client) -> Result<Value> {
    let (status, begun) = admin.ask("POST", "/v1/drain", Some(&json!({ "all": true, "deadline": "5m" })));
    ensure!(status == 202, "{begun}");
    Ok(begun)
}

/// What the agent does while services take their time, beside what it does anyway.
fn waiting(agent: &Agent, effort: Effort) -> Result<()> {
    let settle = Duration::from_secs(6);
    let mut rows = [(Vec::new(), Vec::new()), (Vec::new(), Vec::new())];
    for reading in 0..effort.readings {
        eprintln!("bench: drain, the agent waits: {} of {}", reading + 1, effort.readings);
        thread::sleep(settle);
        let takes = effort.reading + Duration::from_secs(2);
        let takes = u64::try_from(takes.as_millis())?;
        let mut services = (0..6).map(|_| Served::start(takes)).collect::<Result<Vec<_>>>()?;
        for (at, service) in services.iter().enumerate() {
            service.register(&mut agent.admin()?, &format!("wait{reading}-{at}"), &[])?;
        }
        thread::sleep(Duration::from_secs(1));
        let idle = agent.per_second(effort.reading)?;
        begin(&mut agent.admin()?)?;
        thread::sleep(Duration::from_secs(1));
        let waits = agent.per_second(effort.reading)?;
        for (row, (cpu, switches)) in rows.iter_mut().zip([idle, waits]) {
            row.0.push(cpu);
            row.1.push(switches);
        }
        for service in &mut services {
            service.said()?;
        }
    }
    println!("\nThe agent, {} readings of {} s each, medians.\n", effort.readings, effort.reading.as_secs());
    println!("| | CPU time, ms per s | its threads go to sleep, times per s |\n|---|---|---|");
    for (what, (cpu, switches)) in ["nothing is drained", "a drain of six services waits"].iter().zip(rows) {
        println!("| {what} | {:.2} | {:.1} |", Median::of(cpu).median, Median::of(switches).median);
    }
    std::io::stdout().flush()?;
    Ok(())
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

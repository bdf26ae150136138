//! What `plumb check` and Valgrind's --track-fds add to whole commands: rounds, in each of which a command runs alone,
//! below the one and below the other.

use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::{Effort, stats::Median, usage::die_with_parent};

/// A command. In its words `{dir}` is a folder of this run, `{root}` that of the project.
struct Subject {
    name: &'static str,
    words: &'static [&'static str],
    /// What it ends with.
    code: i32,
    /// Run before each time.
    before: &'static [&'static str],
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Short,
    /// Valgrind, which starts anew for each process, would take minutes.
    ManyProcesses,
    /// As that, and measured less often.
    Long,
}

const fn subject(name: &'static str, words: &'static [&'static str]) -> Subject {
    Subject { name, words, code: 0, before: &[], kind: Kind::Short }
}

static SUBJECTS: [Subject; 10] = [
    subject("`ls -R /usr`", &["ls", "-R", "/usr"]),
    subject("`find /usr -name '*.h'`", &["find", "/usr", "-name", "*.h"]),
    Subject { code: 1, ..subject("`grep -r` in /usr/include", &["grep", "-r", NOWHERE, "/usr/include"]) },
    // Into a pipe: of what goes to /dev/null tar reads nothing.
    subject("`tar c /usr/include`", &["sh", "-c", "tar cf - /usr/include | cat"]),
    subject("`git status`", &["git", "-c", "safe.directory=*", "-C", "{root}", "status"]),
    Subject {
        code: 1,
        ..subject("`git grep`", &["git", "-c", "safe.directory=*", "-C", "{root}", "grep", NOWHERE])
    },
    subject("200,000 times open and close", &["{dir}/leaks", "open_storm", "fixed"]),
    subject(
        "`gcc -O2 -c`",
        &["gcc", "-O2", "-c", "{root}/agent/tests/check/programs/leaks.c", "-o", "{dir}/leaks.o"],
    ),
    Subject {
        kind: Kind::ManyProcesses,
        ..subject("300 times /bin/true in `sh`", &["sh", "-c", "for i in $(seq 300); do /bin/true; done"])
    },
    Subject {
        before: &[
            "{cargo}",
            "clean",
            "--manifest-path",
            "{dir}/build/Cargo.toml",
            "--target-dir",
            "{dir}/target",
        ],
        kind: Kind::Long,
        ..subject(
            "`cargo build`, 16 crates",
            &[
                "{cargo}",
                "build",
                "--offline",
                "--manifest-path",
                "{dir}/build/Cargo.toml",
                "--target-dir",
                "{dir}/target",
            ],
        )
    },
];

/// What a program costs that does nothing.
static NOTHING: Subject = subject("`true`", &["/bin/true"]);

/// In two pieces, so that git does not find it here.
const NOWHERE: &str = concat!("nothing-like", "-this");

/// The project that is built: its dependencies are some of plumb's own, so that they are there.
const MANIFEST: &str = r#"
[package]
name = "subject"
edition = "2024"

[dependencies]
postcard = { version = "1", features = ["use-std"] }
serde = { version = "1", features = ["derive"] }
serde_json = "1"
thiserror = "2"

[workspace]
"#;

const PROGRAM: &str = r#"
#[derive(Debug, serde::Serialize, serde::Deserialize, thiserror::Error)]
#[error("{number}")]
struct Given {
    number: u32,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let given: Given = serde_json::from_str("{\"number\":1}")?;
    println!("{given} {:?}", postcard::to_stdvec(&given)?);
    Ok(())
}
"#;

/// Below what a command runs.
#[derive(Clone, Copy)]
enum Below {
    Nothing,
    Plumb,
    Valgrind,
}

/// What a run took.
struct Time {
    /// From the moment on in which the command had been executed.
    own: Duration,
    /// With whatever comes before and after.
    whole: Duration,
}

/// What is read of the report.
#[derive(Deserialize)]
struct Report {
    exit_code: Option<i32>,
    seconds: f64,
    lost: Lost,
    cost: Cost,
}

#[derive(Deserialize)]
struct Lost {
    events: u64,
    stacks: u64,
    mappings: u64,
    processes: u64,
}

#[derive(Deserialize)]
struct Cost {
    events: u64,
}

/// All runs of a subject, by round.
#[derive(Default)]
struct Rounds {
    alone: Vec<Time>,
    plumb: Vec<Time>,
    valgrind: Vec<Time>,
    events: Vec<f64>,
    lost: u64,
}

pub(crate) fn run(effort: Effort, only: Option<&str>) -> Result<()> {
    let is_chosen = |subject: &&Subject| only.is_none_or(|only| subject.name.contains(only));
    if !SUBJECTS.iter().any(|subject| is_chosen(&subject)) {
        let names: Vec<&str> = SUBJECTS.iter().map(|subject| subject.name).collect();
        bail!("no command contains {only:?}: {}", names.join("; "));
    }
    let folder = Folder::new()?;
    let mut rows = Vec::new();
    for subject in SUBJECTS.iter().filter(is_chosen) {
        eprintln!("bench: {}", subject.name);
        rows.push((subject, folder.rounds(subject, effort.pairs)));
    }
    print(&rows);
    let nothing = folder.rounds(&NOTHING, effort.pairs)?;
    let whole = |times: &[Time]| milliseconds(times.iter().map(|time| time.whole));
    println!(
        "\nA program that does nothing takes {} ms alone, {} below plumb check and {} below Valgrind.",
        whole(&nothing.alone),
        whole(&nothing.plumb),
        whole(&nothing.valgrind)
    );
    Ok(())
}

/// Where everything is that the commands need.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self> {
        let folder =
            Self(Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("check-{}", std::process::id())));
        fs::create_dir_all(folder.0.join("build/src"))?;
        fs::write(folder.0.join("build/Cargo.toml"), MANIFEST)?;
        fs::write(folder.0.join("build/src/main.rs"), PROGRAM)?;
        fs::copy(root().join("Cargo.lock"), folder.0.join("build/Cargo.lock"))?;
        folder.prepare(&["{cargo}", "fetch", "--quiet", "--manifest-path", "{dir}/build/Cargo.toml"])?;
        let source = "{root}/agent/tests/check/programs/leaks.c";
        folder.prepare(&["gcc", "-O1", "-g", "-pthread", source, "-o", "{dir}/leaks"])?;
        Ok(folder)
    }

    fn fill(&self, word: &str) -> Result<String> {
        let cargo = env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
        Ok(word
            .replace("{dir}", self.0.to_str().context("the folder")?)
            .replace("{root}", root().to_str().context("the project")?)
            .replace("{cargo}", &cargo))
    }

    /// A command whose output goes nowhere, and its errors into a file.
    fn command(&self, words: &[&str]) -> Result<Command> {
        let words = words.iter().map(|word| self.fill(word)).collect::<Result<Vec<_>>>()?;
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(self.0.join("errors"))?);
        Ok(command)
    }

    fn last_words(&self) -> String {
        let said = fs::read_to_string(self.0.join("errors")).unwrap_or_default();
        said.lines().last().unwrap_or("it said nothing").to_owned()
    }

    fn prepare(&self, words: &[&str]) -> Result<()> {
        let status =
            die_with_parent(&mut self.command(words)?).status().with_context(|| words[0].to_owned())?;
        ensure!(status.success(), "{}: {status}: {}", words.join(" "), self.last_words());
        Ok(())
    }

    /// Each round begins with another of the three: what changes with time meets all of them.
    fn rounds(&self, subject: &Subject, count: usize) -> Result<Rounds> {
        let count = if subject.kind == Kind::Long { count.div_ceil(3) } else { count };
        let all: &[Below] = match subject.kind {
            Kind::Short => &[Below::Nothing, Below::Plumb, Below::Valgrind],
            _ => &[Below::Nothing, Below::Plumb],
        };
        let mut rounds = Rounds::default();
        // Once for the caches.
        self.time(subject, Below::Nothing)?;
        for round in 0..count {
            for index in 0..all.len() {
                let below = all[(round + index) % all.len()];
                let (time, report) = self.time(subject, below)?;
                match below {
                    Below::Nothing => rounds.alone.push(time),
                    Below::Plumb => rounds.plumb.push(time),
                    Below::Valgrind => rounds.valgrind.push(time),
                }
                if let Some(Report { lost, cost, .. }) = report {
                    rounds.events.push(cost.events as f64);
                    rounds.lost += lost.events + lost.stacks + lost.mappings + lost.processes;
                }
            }
        }
        Ok(rounds)
    }

    fn time(&self, subject: &Subject, below: Below) -> Result<(Time, Option<Report>)> {
        if !subject.before.is_empty() {
            self.prepare(subject.before)?;
        }
        let plumb = env!("CARGO_BIN_EXE_plumb");
        let before: &[&str] = match below {
            Below::Nothing => &[],
            Below::Plumb => &[plumb, "check", "-o", "json", "--report", "{dir}/report.json", "--"],
            // Whatever the command starts is followed too.
            Below::Valgrind => &[
                "valgrind",
                "-q",
                "--tool=none",
                "--track-fds=yes",
                "--trace-children=yes",
                "--log-file=/dev/null",
            ],
        };
        let mut command = self.command(&[before, subject.words].concat())?;
        let start = Instant::now();
        // It returns when the program has been executed, which is where plumb's own clock begins.
        let mut child = command.spawn().with_context(|| subject.name.to_owned())?;
        let executed = Instant::now();
        let status = child.wait()?;
        let (mut own, whole) = (executed.elapsed(), start.elapsed());
        let (mut code, mut report) = (status.code(), None);
        if let Below::Plumb = below {
            let path = self.0.join("report.json");
            let text = fs::read(&path).with_context(|| self.last_words())?;
            fs::remove_file(path)?;
            let told: Report = serde_json::from_slice(&text)?;
            (own, code) = (Duration::from_secs_f64(told.seconds), told.exit_code);
            report = Some(told);
        }
        ensure!(code == Some(subject.code), "{}: {status}: {}", subject.name, self.last_words());
        Ok((Time { own, whole }, report))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is in the workspace")
}

fn print(rows: &[(&Subject, Result<Rounds>)]) {
    println!(
        "\nTimes of a command below plumb check or Valgrind to alone: median of the ratios of rounds (95 % interval). Its own \
         time is that from its execution to its end; the whole one has the set-up and the report.\n"
    );
    println!(
        "| command | alone, ms | rounds | events | lost | own time below plumb | whole time below plumb | whole time below Valgrind |"
    );
    println!("|{}", "---|".repeat(8));
    let mut around = Vec::new();
    for (subject, rounds) in rows {
        let rounds = match rounds {
            Ok(rounds) => rounds,
            Err(error) => {
                println!("| {} | cannot run here: {error:#}{}", subject.name, " |".repeat(7));
                continue;
            }
        };
        around.extend(rounds.plumb.iter().map(|time| time.whole.saturating_sub(time.own)));
        let valgrind = match subject.kind {
            Kind::Short => ratio(&rounds.valgrind, &rounds.alone, |time| time.whole),
            _ => "not measured: minutes".to_owned(),
        };
        println!(
            "| {} | {} | {} | {} | {} | {} | {} | {valgrind} |",
            subject.name,
            milliseconds(rounds.alone.iter().map(|time| time.own)),
            rounds.alone.len(),
            Median::of(rounds.events.clone()).median,
            rounds.lost,
            ratio(&rounds.plumb, &rounds.alone, |time| time.own),
            ratio(&rounds.plumb, &rounds.alone, |time| time.whole),
        );
    }
    if !around.is_empty() {
        println!("\nSet-up and report of plumb check: {} ms.", milliseconds(around.into_iter()));
    }
}

fn ratio(with: &[Time], without: &[Time], of: impl Fn(&Time) -> Duration) -> String {
    let ratio = |(with, without)| of(with).as_secs_f64() / of(without).as_secs_f64();
    let Median { low, median, high } = Median::of(with.iter().zip(without).map(ratio).collect());
    format!("{median:.2} ({low:.2} to {high:.2})")
}

fn milliseconds(times: impl Iterator<Item = Duration>) -> String {
    let median = Median::of(times.map(|time| time.as_secs_f64() * 1e3).collect()).median;
    if median < 10.0 { format!("{median:.1}") } else { format!("{median:.0}") }
}

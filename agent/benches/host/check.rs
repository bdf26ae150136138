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
            "`cargo build`, 25 crates",
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

/// What is left of this is set-up and report.
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

/// Whatever the command starts is followed too.
const VALGRIND: &[&str] =
    &["valgrind", "-q", "--tool=none", "--track-fds=yes", "--trace-children=yes", "--log-file=/dev/null"];

/// What is measured of a command.
#[derive(Clone, Copy)]
enum What {
    /// From the fork to the end, without anything.
    Alone,
    /// The same of the command itself below plumb check.
    Own,
    /// Of plumb check, with its set-up and its report.
    Plumb,
    /// Of Valgrind.
    Valgrind,
}

/// The first argument of `timed`.
pub(crate) const ROLE: &str = "timed";

/// Runs a command and writes down how long it took and how it ended. Below plumb check this tells what the command itself
/// takes: whatever plumb does before it starts and after it has ended is not in it.
pub(crate) fn timed(file: &str, words: &[String]) -> Result<()> {
    let (program, arguments) = words.split_first().context("no command")?;
    let start = Instant::now();
    let status = Command::new(program).args(arguments).status().with_context(|| program.clone())?;
    let took = start.elapsed().as_nanos();
    Ok(fs::write(file, format!("{took} {}", status.code().context("a signal ended it")?))?)
}

/// What is read of the report.
#[derive(Deserialize)]
struct Report {
    exit_code: Option<i32>,
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

/// Seconds of all runs of a command, by round.
#[derive(Default)]
struct Rounds {
    times: [Vec<f64>; 4],
    events: Vec<f64>,
    lost: u64,
}

impl Rounds {
    fn of(&self, what: What) -> &[f64] {
        &self.times[what as usize]
    }

    /// To the command alone.
    fn ratio(&self, what: What) -> String {
        let ratios = self.of(what).iter().zip(self.of(What::Alone)).map(|(with, without)| with / without);
        let Median { low, median, high } = Median::of(ratios.collect());
        format!("{median:.2} ({low:.2} to {high:.2})")
    }
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
    eprintln!("bench: {}", NOTHING.name);
    let nothing = folder.rounds(&NOTHING, effort.pairs)?;
    println!(
        "\nA program that does nothing takes {} ms alone, {} below plumb check and {} below Valgrind.",
        milliseconds(nothing.of(What::Alone).iter().copied()),
        milliseconds(nothing.of(What::Plumb).iter().copied()),
        milliseconds(nothing.of(What::Valgrind).iter().copied())
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
            .replace("{self}", env::current_exe()?.to_str().context("the path of the benchmark")?)
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

    /// Each round begins with another of them: what changes with time meets all.
    fn rounds(&self, subject: &Subject, count: usize) -> Result<Rounds> {
        let count = if subject.kind == Kind::Long { count.div_ceil(2) } else { count };
        let all: &[What] = match subject.kind {
            Kind::Short => &[What::Alone, What::Own, What::Plumb, What::Valgrind],
            _ => &[What::Alone, What::Own, What::Plumb],
        };
        let mut rounds = Rounds::default();
        // Once for the caches.
        self.time(subject, What::Alone)?;
        for round in 0..count {
            for index in 0..all.len() {
                let what = all[(round + index) % all.len()];
                let (time, report) = self.time(subject, what)?;
                rounds.times[what as usize].push(time.as_secs_f64());
                if let Some(Report { lost, cost, .. }) = report {
                    rounds.events.push(cost.events as f64);
                    rounds.lost += lost.events + lost.stacks + lost.mappings + lost.processes;
                }
            }
        }
        Ok(rounds)
    }

    fn time(&self, subject: &Subject, what: What) -> Result<(Duration, Option<Report>)> {
        if !subject.before.is_empty() {
            self.prepare(subject.before)?;
        }
        let plumb =
            [env!("CARGO_BIN_EXE_plumb"), "check", "-o", "json", "--report", "{dir}/report.json", "--"];
        let before = match what {
            What::Alone => Vec::new(),
            What::Own => [&plumb[..], &["{self}", ROLE, "{dir}/time"]].concat(),
            What::Plumb => plumb.to_vec(),
            What::Valgrind => VALGRIND.to_vec(),
        };
        let mut command = self.command(&[&before[..], subject.words].concat())?;
        let start = Instant::now();
        let status = command.status().with_context(|| subject.name.to_owned())?;
        let (mut took, mut code) = (start.elapsed(), status.code());
        let report: Option<Report> = match what {
            What::Own | What::Plumb => Some(serde_json::from_str(&self.take("report.json")?)?),
            What::Alone | What::Valgrind => None,
        };
        code = report.as_ref().map_or(code, |report| report.exit_code);
        if let What::Own = what {
            let text = self.take("time")?;
            let (nanos, ended) = text.split_once(' ').context("the time of a command")?;
            (took, code) = (Duration::from_nanos(nanos.parse()?), Some(ended.parse()?));
        }
        ensure!(code == Some(subject.code), "it ended with {code:?}: {}", self.last_words());
        Ok((took, report))
    }

    /// What a run has written: what is there next time is of that run.
    fn take(&self, name: &str) -> Result<String> {
        let path = self.0.join(name);
        let text = fs::read_to_string(&path).with_context(|| self.last_words())?;
        fs::remove_file(path)?;
        Ok(text)
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
         time is that from its fork to its end; the whole one has the set-up and the report.\n"
    );
    println!(
        "| command | alone, ms | rounds | events | lost | own time below plumb | whole time below plumb | whole time below Valgrind |"
    );
    println!("|{}", "---|".repeat(8));
    for (subject, rounds) in rows {
        let rounds = match rounds {
            Ok(rounds) => rounds,
            Err(error) => {
                println!("| {} | cannot run here: {error:#}{}", subject.name, " |".repeat(7));
                continue;
            }
        };
        let valgrind = match subject.kind {
            Kind::Short => rounds.ratio(What::Valgrind),
            _ => "not measured: minutes".to_owned(),
        };
        println!(
            "| {} | {} | {} | {:.0} | {} | {} | {} | {valgrind} |",
            subject.name,
            milliseconds(rounds.of(What::Alone).iter().copied()),
            rounds.of(What::Alone).len(),
            Median::of(rounds.events.clone()).median,
            rounds.lost,
            rounds.ratio(What::Own),
            rounds.ratio(What::Plumb),
        );
    }
}

/// The median of so many seconds.
fn milliseconds(seconds: impl Iterator<Item = f64>) -> String {
    let median = Median::of(seconds.map(|seconds| seconds * 1e3).collect()).median;
    if median < 10.0 { format!("{median:.1}") } else { format!("{median:.0}") }
}

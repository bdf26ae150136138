//! `cargo xtask test`: every test there is, on this kernel and on the pinned ones.

use std::{
    iter,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::Value;

#[path = "../../agent/tests/support/variants.rs"]
mod variants;

use self::variants::{C_PROGRAMS, LEAKS, LEAKS_SOURCE};
use crate::{
    cargo,
    cmd::{self, run},
    paths, setup, soak,
    vm::{self, Guest, Kernel, Machine},
    workspace, zoo,
};

/// The test binary that needs nothing but a kernel, and what it runs.
const KERNEL_TESTS: &str = "kernel";
/// Tests of drains.
const DRAIN_TESTS: &str = "drain";
/// Of them the storm needs only a kernel and a shell, and how many operations are played on an emulated
/// one: a quarter of a minute.
const STORM: &str = "storm::";
const EMULATED_STORM: u32 = 600;
/// Tests that run alone: they start a program per path or play random scripts (preemptible kernels skip a kernel
/// program that is already running), hold 900,000 fds, count what kernel programs run, or take almost all pids.
const ALONE: [&str; 9] = [
    SOCKETS,
    AGENT_LEAKS,
    ORIGINS,
    CHECK,
    PATHS,
    MODEL,
    "fds_up_to_the_hard_limit",
    "the_functions_cost_other_syscalls_nothing",
    "an_agent_that_starts_in_a_fork_storm_knows_every_process_that_stays",
];
/// The test whose results are in docs/fd-paths.md, and the program that it starts.
const PATHS: &str = "every_path";
const FD_PATHS: &str = "fd_paths";
const MODEL: &str = "model::";
/// Beside others an emulated machine is too slow to name a stack in the time that it may take.
const ORIGINS: &str = "origins::";
/// Likewise. They wait for most of the time, so that they may be beside each other.
const AGENT_LEAKS: &str = "agent::a_leak";
const CHECK: &str = "check::";
/// Another test that forks would hold their sockets open for a moment.
const SOCKETS: &str = "sockets::";
/// Unit tests that need a real systemd: those with `#[ignore]`, in a virtual machine that has one.
const SYSTEMD_TESTS: &str = "drain::systemd::tests::booted";
/// Of them the one that shuts the machine down, which is the last.
const SHUTDOWN_TEST: &str = "drain::systemd::tests::booted::a_shutdown_is_told_and_waits_for_the_inhibitor";
/// The series of the Debian that systemd comes from.
const SYSTEMD_KERNEL: &str = "6.1";
/// Of the tests of drains those that need systemd, all with `#[ignore]`.
const BOOTED: &str = "booted::";
/// Those that have many agents or processes at a time, or little time: an emulated machine takes too long for them; and
/// those whose servers it does not have.
const DRAIN_LEFT_OUT: [&str; 8] = [
    "killed::",
    "storm::",
    "course::too_little_time",
    "ledger::",
    "family::",
    "faults::",
    "audit::",
    "unseen::",
];
/// Where those run that need no systemd: there the kernel says least.
const DRAIN_OLDEST: &str = "5.10";
/// What shuts a machine down, by the series on which it does: the last of each machine.
const DRAIN_SHUTDOWNS: [(&str, &str); 3] = [
    ("5.10", "booted::a_shutdown_waits_until_all_services_are_drained_in_order"),
    (SYSTEMD_KERNEL, "booted::a_shutdown_waits_until_all_services_are_drained_in_order"),
    ("6.12", "booted::without_logind_the_agent_drains_when_systemd_stops_the_host"),
];
const EXAMPLES: [&str; 4] = ["workload", FD_PATHS, "puppet", "calls"];
/// Operations of the model test on an emulated kernel: half a minute.
const EMULATED_OPS: u32 = 10_000;
const SOAK: Duration = Duration::from_secs(30);
/// A Debian kernel under emulation takes 3 to 10 minutes for the tests.
const DEADLINE: Duration = Duration::from_secs(1800);
/// The tests hold 900,000 fds at 8 bytes a slot and 232 a file, beside the image.
const MEMORY_MB: u32 = 3072;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Leave out the other kernels
    #[arg(long)]
    no_vm: bool,
    /// Only this series of xtask/kernels.lock, such as 6.1; may be repeated
    #[arg(long, value_name = "SERIES", conflicts_with = "no_vm")]
    kernel: Vec<String>,
    /// Write docs/fd-paths.md anew from what the pinned kernels show; no other test is run
    #[arg(long, conflicts_with = "no_vm")]
    bless: bool,
}

impl Arguments {
    pub(crate) fn run(self) -> Result<()> {
        setup::require_root("testing on this kernel")?;
        setup::for_build()?;
        setup::for_test()?;
        if self.kernel.is_empty() && !self.bless {
            setup::for_soak()?;
        }
        let tests = build_kernel_tests()?;
        let is_here = self.kernel.is_empty() && !self.bless;
        if is_here {
            here(&tests)?;
        }
        if self.no_vm {
            eprintln!("xtask: the other kernels are left out");
            return zoo::all();
        }
        let drain = build_drain_tests()?;
        let below_systemd = if self.bless { Vec::new() } else { below_systemd(&drain, &self.kernel)? };
        let mut guest = guest(&tests);
        guest.files.push((drain, PathBuf::from("/bin/drain-tests")));
        guest.env.push(("PLUMB_DRAIN_OPERATIONS".to_owned(), EMULATED_STORM.to_string()));
        guest.commands.push(vec!["/bin/drain-tests".to_owned(), STORM.to_owned()]);
        if self.bless {
            guest.commands = vec![vec!["/bin/tests".to_owned(), PATHS.to_owned()]];
        }
        let listing = cmd::output(Command::new(example(FD_PATHS)).arg("--list"))?;
        let zoo = || if is_here { zoo::all() } else { Ok(()) };
        paths::settle(&listing, &beside(below_systemd, &self.kernel, &guest, zoo)?, self.bless)
    }
}

/// Everything that is tested on this kernel but the zoo, whose programs sleep for most of the time: a machine runs beside
/// them.
fn here(tests: &Path) -> Result<()> {
    let mut all = cargo("test");
    if !setup::is_on_path("cargo-nextest") {
        eprintln!("xtask: cargo-nextest is not there: its recipe is left out");
        all.env("PLUMB_NO_NEXTEST", "1");
    }
    run(all.arg("--release"))?;
    soak::Arguments::short(tests, SOAK)
}

/// Builds the test binary for every kernel and what it needs. The release profile, so that what is tested is
/// what is shipped.
pub(crate) fn build_kernel_tests() -> Result<PathBuf> {
    run(cargo("build").args(["--release", "--examples"]))?;
    let calls = C_PROGRAMS.map(|program| (program, "tests/stacks/programs/calls.c"));
    for ((name, flags), source) in calls.into_iter().chain([(LEAKS, LEAKS_SOURCE)]) {
        let source = workspace().join("agent").join(source);
        run(Command::new("gcc").args(flags).arg(source).arg("-o").arg(example(name)))?;
    }
    build_tests(&["--test", KERNEL_TESTS], KERNEL_TESTS)
}

/// Builds the tests of drains for other kernels. They drain copies of themselves, and the agent reads the lines of whoever
/// does not stop in time: of a whole test binary, that is most of what an emulated machine would do.
fn build_drain_tests() -> Result<PathBuf> {
    let lean = workspace().join("target/release/drain-tests");
    let built = build_tests(&["--test", DRAIN_TESTS], DRAIN_TESTS)?;
    run(Command::new("strip").arg("--strip-debug").arg(built).arg("-o").arg(&lean))?;
    Ok(lean)
}

/// Builds the tests of one target of plumb, and returns their executable.
fn build_tests(selection: &[&str], target: &str) -> Result<PathBuf> {
    let mut cargo = cargo("test");
    cargo.args(["--release", "--package", "plumb", "--no-run", "--message-format", "json"]).args(selection);
    executable(&cmd::output(&mut cargo)?, target)
}

/// What needs systemd as the first process, on those of its series that are asked for.
fn below_systemd(drain: &Path, asked: &[String]) -> Result<Vec<Machine>> {
    let is_asked = |series: &str| asked.is_empty() || asked.iter().any(|one| one == series);
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let mut machines = Vec::new();
    for (series, shutdown) in DRAIN_SHUTDOWNS.into_iter().filter(|(series, _)| is_asked(series)) {
        let (tests, file) = ("/usr/bin/drain-tests", PathBuf::from("/usr/bin/drain-tests"));
        let plumb = PathBuf::from("/usr/local/bin/plumb");
        let skip = DRAIN_SHUTDOWNS.iter().flat_map(|(_, last)| ["--skip", last]);
        let skipped: Vec<_> = DRAIN_LEFT_OUT.iter().flat_map(|test| ["--skip", test]).collect();
        let together = [tests, "--ignored", "--test-threads", "1", BOOTED].into_iter().chain(skip);
        let mut commands = vec![words(&[tests, "--ignored", "--exact", shutdown])];
        if shutdown == DRAIN_SHUTDOWNS[0].1 {
            commands.insert(0, words(&together.collect::<Vec<_>>()));
        }
        if series == DRAIN_OLDEST {
            commands.insert(0, words(&[&[tests, "--test-threads", "2"][..], &skipped].concat()));
        }
        let guest = Guest {
            files: vec![(drain.to_owned(), file), (workspace().join("target/release/plumb"), plumb)],
            env: vec![("PLUMB_BIN".to_owned(), "/usr/local/bin/plumb".to_owned())],
            commands,
            systemd: true,
            deadline: DEADLINE,
            ..Guest::default()
        };
        machines.push(Machine { kernel: kernel(series)?, guest, each_has_tests: true });
    }
    if is_asked(SYSTEMD_KERNEL) {
        let tests = ["/usr/bin/unit-tests", "--ignored", "--test-threads", "1"];
        let run = |selection: &[&str]| words(&[&tests, selection].concat());
        let guest = Guest {
            files: vec![(build_tests(&["--lib"], "plumb")?, PathBuf::from(tests[0]))],
            commands: vec![run(&[SYSTEMD_TESTS, "--skip", SHUTDOWN_TEST]), run(&["--exact", SHUTDOWN_TEST])],
            systemd: true,
            deadline: DEADLINE,
            ..Guest::default()
        };
        machines.push(Machine { kernel: kernel(SYSTEMD_KERNEL)?, guest, each_has_tests: true });
    }
    Ok(machines)
}

fn kernel(series: &str) -> Result<Kernel> {
    vm::select(&[series.to_owned()])?.pop().context("one kernel of each series is pinned")
}

/// The path of a program that tests start.
fn example(name: &str) -> PathBuf {
    workspace().join("target/release/examples").join(name)
}

/// The path of the test binary in cargo's messages.
fn executable(messages: &str, target: &str) -> Result<PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let path = messages
        .filter(|message| message["target"]["name"] == target)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from));
    path.with_context(|| format!("cargo built no tests of {target}"))
}

pub(crate) fn guest(tests: &Path) -> Guest {
    let release = workspace().join("target/release");
    let skip = ALONE.iter().flat_map(|test| ["--skip", *test]);
    let together = ["/bin/tests", "--test-threads", "4"].into_iter().chain(skip).collect();
    let file = |host: PathBuf, guest: &str| (host, PathBuf::from(guest));
    let names = EXAMPLES.into_iter().chain(C_PROGRAMS.map(|(name, _)| name)).chain([LEAKS.0]);
    let examples = names.map(|name| file(example(name), &format!("/bin/{name}")));
    let mut files = vec![
        file(tests.to_owned(), "/bin/tests"),
        file(release.join("plumb"), "/bin/plumb"),
        file(PathBuf::from("/bin/sh"), "/bin/sh"),
    ];
    files.extend(examples);
    Guest {
        files,
        env: vec![
            ("PLUMB_BIN".to_owned(), "/bin/plumb".to_owned()),
            ("PLUMB_WORKLOAD".to_owned(), "/bin/workload".to_owned()),
            ("PLUMB_PUPPET".to_owned(), "/bin/puppet".to_owned()),
            // What concerns everybody, such as pid_max, may be changed.
            ("PLUMB_OWN_KERNEL".to_owned(), "1".to_owned()),
            ("PLUMB_FD_PATHS".to_owned(), "measure".to_owned()),
            ("PLUMB_MODEL_OPS".to_owned(), EMULATED_OPS.to_string()),
        ],
        commands: iter::once(together)
            .chain(ALONE.map(|test| {
                vec!["/bin/tests", "--test-threads", if test == AGENT_LEAKS { "2" } else { "1" }, test]
            }))
            .map(|command| command.into_iter().map(str::to_owned).collect())
            .collect(),
        memory_mb: MEMORY_MB,
        deadline: DEADLINE,
        ..Guest::default()
    }
}

/// What was printed on each series.
pub(crate) fn on_kernels(series: &[String], guest: &Guest) -> Result<Vec<(String, Vec<String>)>> {
    beside(Vec::new(), series, guest, || Ok(()))
}

/// What was printed by one guest on each series, while other machines and this kernel are busy: those machines first, as
/// they take longer.
fn beside(
    mut others: Vec<Machine>,
    series: &[String],
    guest: &Guest,
    here: impl FnOnce() -> Result<()>,
) -> Result<Vec<(String, Vec<String>)>> {
    let kernels = vm::select(series)?;
    let first = others.len();
    let machine =
        |kernel: &Kernel| Machine { kernel: kernel.clone(), guest: guest.clone(), each_has_tests: false };
    others.extend(kernels.iter().map(machine));
    let printed = vm::run_all(others, here)?.into_iter().skip(first);
    Ok(kernels.into_iter().map(|kernel| kernel.series).zip(printed).collect())
}

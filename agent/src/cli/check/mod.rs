//! `plumb check`: runs a command, follows it and all its descendants, and says what they left behind.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::ExitStatus,
    time::Duration,
};

use clap::Args;
use rustix::process::{Signal, getpid, set_child_subreaper};

mod command;
mod follower;
mod script;
mod session;
mod signals;

use self::{
    command::Before,
    follower::Follower,
    script::Ready,
    session::{Server, Session},
    signals::Signals,
};
use super::{
    Outcome,
    output::{self, Format},
};
use crate::{
    check::{MAX_FILE, Report, Suppressions},
    failure::{Exit, Failure},
};

const EXAMPLES: &str = "\
Examples:
  what the tests leave: fds, threads, children
    plumb check -- cargo test
  five runs, and what each leaves
    plumb check --iterations 5 -- ./import --all
  what grows from round to round under equal load
    plumb check --steady 'wrk -d2 http://127.0.0.1:8080/' --ready 8080 -- ./server
  whether it stops when it is told to, and where it hangs
    plumb check --stop TERM --within 10s --ready 8080 -- ./server
  write down what is known, give the reasons, and go on without it
    plumb check --gen-suppressions known.supp -- ./import
    plumb check --suppressions known.supp -- ./import

Exit code: 3 with findings; else that of the command, 128 and the number of the signal that ended it, or 0 when that was \
the signal of --stop; but 1 instead of 0 when events were lost that may hide a finding. 126 and 127 when it could not be run.

What is a leak: fds and threads that are there at the end of a process, several from one line of code; fds that reach \
another program without anybody's intention; children that nobody waited for, or that go on; closing twice. One file \
that is kept until the end is none. docs/check.md has more.";

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// How many of one origin a process must hold at its end to be called a leak
    #[arg(long, default_value_t = 3, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
    /// How long descendants may go on when the command has ended, before they are called left behind
    #[arg(long, default_value = "1s", value_name = "DURATION", value_parser = humantime::parse_duration)]
    grace: Duration,
    /// Run the command so many times
    #[arg(long, default_value_t = 1, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    iterations: u32,
    /// The command is a server: run this script in equal rounds, and compare what there is after each
    #[arg(long, value_name = "SCRIPT", conflicts_with = "iterations")]
    steady: Option<String>,
    /// Rounds that are compared
    #[arg(long, default_value_t = 5, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(3..=1000))]
    rounds: u32,
    /// Rounds before those: pools and caches fill
    #[arg(long, default_value_t = 2, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(0..=1000))]
    warmup: u32,
    /// The command is a server: stop it with this signal, and say what did not stop [default with --steady: TERM]
    #[arg(long, value_name = "SIGNAL", value_parser = signal, conflicts_with = "iterations")]
    stop: Option<Signal>,
    /// Time that it has to stop; what still runs then is killed [default: 10s]
    #[arg(long, value_name = "DURATION", value_parser = within)]
    within: Option<Duration>,
    /// When the server is ready: a port, an address, a URL that it answers, or a script that ends with 0
    #[arg(long, value_name = "PORT|URL|SCRIPT")]
    ready: Option<Ready>,
    /// Time that it has to become ready
    #[arg(long, default_value = "30s", value_name = "DURATION", value_parser = humantime::parse_duration)]
    ready_within: Duration,
    /// With --stop: a script that runs beside the server; the signal comes a second after it began, or at its end
    #[arg(long, value_name = "SCRIPT", requires = "stop")]
    load: Option<String>,
    /// Rules for what is meant, each with its reason; may be repeated
    #[arg(long, value_name = "FILE")]
    suppressions: Vec<PathBuf>,
    /// Leave out the rules that come with plumb, for threads that runtimes keep
    #[arg(long)]
    no_builtin_suppressions: bool,
    /// Add a rule for each finding to this file, for you to give the reasons
    #[arg(long, value_name = "FILE")]
    gen_suppressions: Option<PathBuf>,
    /// Write the report there instead of to stderr
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Form of the report; json and jsonl are the same
    #[arg(short = 'o', long = "output", value_enum, default_value_t, value_name = "FORMAT")]
    format: Format,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Time that a server has to stop.
const WITHIN: Duration = Duration::from_secs(10);

fn within(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| format!("{error}; such as 10s"))?;
    if time.is_zero() { Err("nothing stops in no time: such as 10s".to_owned()) } else { Ok(time) }
}

fn signal(name: &str) -> Result<Signal, String> {
    const NAMES: [(&str, Signal); 9] = [
        ("TERM", Signal::TERM),
        ("INT", Signal::INT),
        ("QUIT", Signal::QUIT),
        ("HUP", Signal::HUP),
        ("USR1", Signal::USR1),
        ("USR2", Signal::USR2),
        ("WINCH", Signal::WINCH),
        ("ABRT", Signal::ABORT),
        ("KILL", Signal::KILL),
    ];
    let wanted = name.to_uppercase();
    let wanted = wanted.strip_prefix("SIG").unwrap_or(&wanted);
    let known = NAMES.iter().find(|(name, signal)| *name == wanted || wanted == signal.as_raw().to_string());
    let names = || NAMES.map(|(name, _)| name).join(", ");
    known.map(|(_, signal)| *signal).ok_or_else(|| format!("it is one of {}", names()))
}

pub(super) fn run(arguments: &Arguments) -> Outcome {
    let is_server = arguments.stop.is_some() || arguments.steady.is_some();
    let of_server = [("--ready", arguments.ready.is_some()), ("--within", arguments.within.is_some())];
    if let Some((option, _)) = of_server.iter().find(|(_, given)| *given && !is_server) {
        let cause = format!("{option} needs --stop or --steady");
        return Err(Failure::new(Exit::Usage, cause, "say what is to be done then"));
    }
    let rules = rules(arguments)?;
    let files = Files::open(arguments)?;
    let before = Before::take()?;
    let signals = Signals::block()?;
    // Whoever loses its parent is plumb's child then.
    set_child_subreaper(Some(getpid())).map_err(std::io::Error::from)?;
    let follower = Follower::load(arguments.repeats)?;
    let mut session = Session::new(follower, signals, before, arguments.grace)?;
    let server = Server {
        ready: arguments.ready.clone().map(|ready| (ready, arguments.ready_within)),
        steady: arguments.steady.as_ref().map(|script| (script.as_str(), arguments.warmup, arguments.rounds)),
        stop: arguments.stop.unwrap_or(Signal::TERM),
        within: arguments.within.unwrap_or(WITHIN),
        load: arguments.load.as_deref(),
    };
    let status = if is_server {
        session.serve(&arguments.command, &server)?
    } else {
        session.iterate(&arguments.command, arguments.iterations)?
    };
    let told = is_server.then_some(server.stop);
    let mut report = session.report(&arguments.command, (status, told.map(Signal::as_raw)), &rules)?;
    let code = code(status, told);
    let has_found = !report.findings.is_empty();
    // A command that failed has its own word for it.
    report.is_unsure = !has_found && !report.complete && code == 0;
    let written = files.write(arguments.format, &report);
    if has_found {
        // That there are findings matters more.
        written.unwrap_or_else(|failure| output::message(&format!("plumb: {failure}")));
        return Ok(Exit::Findings);
    }
    written?;
    Ok(if report.is_unsure { Exit::Error } else { Exit::Command(code) })
}

fn rules(arguments: &Arguments) -> Result<Suppressions, Failure> {
    let mut rules =
        if arguments.no_builtin_suppressions { Suppressions::none() } else { Suppressions::builtin() };
    for path in &arguments.suppressions {
        let shown = path.display();
        let size = fs::metadata(path).map(|metadata| metadata.len());
        let text = size.and_then(|size| {
            if size > MAX_FILE as u64 {
                return Err(std::io::Error::other(format!("larger than {MAX_FILE} bytes")));
            }
            fs::read_to_string(path)
        });
        let text = text.map_err(|error| {
            Failure::new(
                Exit::Usage,
                format!("cannot read {shown}: {error}"),
                "give a file of rules, see docs/suppressions.md",
            )
        })?;
        rules.add(&text, &shown.to_string()).map_err(|error| {
            Failure::new(Exit::Usage, format!("{}:{}: {}", error.file, error.line, error.cause), error.remedy)
        })?;
    }
    Ok(rules)
}

/// The files that were asked for. Opened before the command runs: after it a wrong name would cost its report. What is in
/// them stays until there is something new.
struct Files<'a> {
    report: Option<(&'a Path, File)>,
    rules: Option<(&'a Path, File)>,
}

impl<'a> Files<'a> {
    fn open(arguments: &'a Arguments) -> Result<Self, Failure> {
        let open = |path: &'a Option<PathBuf>, options: &mut OpenOptions| {
            let Some(path) = path else { return Ok(None) };
            match options.create(true).open(path) {
                Ok(file) => Ok(Some((path.as_path(), file))),
                Err(error) => {
                    let cause = format!("cannot write {}: {error}", path.display());
                    Err(Failure::new(Exit::Usage, cause, "name a file in a folder that exists"))
                }
            }
        };
        Ok(Self {
            report: open(&arguments.report, File::options().write(true).truncate(false))?,
            rules: open(&arguments.gen_suppressions, File::options().append(true))?,
        })
    }

    /// Writes what was found. An error is told, and takes nothing from the outcome.
    fn write(self, format: Format, report: &Report) -> Result<(), Failure> {
        let text = match format {
            Format::Table => report.text(),
            Format::Json | Format::Jsonl => output::json(report)? + "\n",
        };
        let mut failed = Vec::new();
        let mut is_saved = false;
        if let Some((path, mut file)) = self.report {
            // A pipe or a terminal has no length.
            let cut =
                if file.metadata().is_ok_and(|found| found.is_file()) { file.set_len(0) } else { Ok(()) };
            let saved = cut.and_then(|()| file.write_all(text.as_bytes()));
            is_saved = saved.is_ok();
            failed.extend(saved.err().map(|error| (path, error)));
        }
        if !is_saved {
            output::message(text.trim_end());
        }
        if let Some((path, mut file)) = self.rules {
            let done = file.write_all(report.suppressions().as_bytes());
            failed.extend(done.err().map(|error| (path, error)));
            if file.metadata().is_ok_and(|found| found.is_file() && found.len() == 0) {
                // Nothing was found, and nothing was there.
                let _ = fs::remove_file(path);
            }
        }
        match failed.first() {
            None => Ok(()),
            Some((path, error)) => {
                let cause = format!("cannot write {}: {error}", path.display());
                Err(Failure::new(Exit::Error, cause, "the report is on stderr"))
            }
        }
    }
}

/// As a shell has it; what ended by the signal that it was to end by has done as it was told.
fn code(status: ExitStatus, stop: Option<Signal>) -> u8 {
    if stop.is_some() && status.signal() == stop.map(Signal::as_raw) {
        return 0;
    }
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}

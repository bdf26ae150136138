//! `plumb services`: what is registered for a drain.

use std::{fs, time::Duration};

use clap::{Args, Subcommand};
use hyper::Method;

use super::{
    Outcome,
    client::Agent,
    output::{self, Output},
};
use crate::{
    drain::{NO_NAME, Name, OnDeadline, PRESETS, Signal, deadline, start_ticks},
    failure::{Exit, Failure},
    services::{ServiceList, ServiceRow, Which, Wish},
};

#[derive(Args)]
#[command(after_help = presets())]
pub(super) struct Arguments {
    #[command(subcommand)]
    what: What,
}

fn presets() -> String {
    let mut text = "\
Examples:
  in the script that starts a server
    gunicorn app:app & plumb services add web --preset gunicorn --pid $!
  a server that says it of itself, in python, with no shell in between (docs/drain.md: over the socket)
    subprocess.run(['plumb', 'services', 'add', 'web', '--signal', 'TERM'])
  a server that runs
    plumb services add db --pid 4711 --preset postgresql --after web --deadline 20s
  what is registered, and whether it runs
    plumb services list

Without --pid it is the process that runs this command. In a script that is its shell, and not the server that it starts; \
and what then runs `exec` is not registered any more, as it runs another program.

Presets:
"
    .to_owned();
    for preset in &PRESETS {
        let late = preset.late.map_or_else(String::new, |late| format!(", late {}", late.name()));
        text += &format!("  {:<12}{}{late}: {}\n", preset.name, preset.signal.name(), preset.why);
    }
    text
}

#[derive(Subcommand)]
enum What {
    /// Register a process for a drain, until it ends, runs another program or moves to another cgroup
    Add(Add),
    /// End a registration
    Rm {
        #[command(flatten)]
        agent: Agent,
        name: String,
    },
    /// List what is registered
    List {
        #[command(flatten)]
        agent: Agent,
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Args)]
struct Add {
    #[command(flatten)]
    agent: Agent,
    /// What it is called: 1 to 64 letters, digits, '_', '-', '.' and '@'
    name: String,
    /// The process [default: the one that runs this command, in a script its shell]
    #[arg(long)]
    pid: Option<u32>,
    /// The signal that asks it to finish its work and end: TERM, INT, QUIT, HUP, USR1, USR2 or WINCH
    #[arg(long, value_parser = signal, conflicts_with = "preset")]
    signal: Option<String>,
    /// The signal of a known server; `plumb services --help` lists them
    #[arg(long)]
    preset: Option<String>,
    /// A service that must be gone before this one is asked to stop; may be repeated [default: all that are registered later]
    #[arg(long, value_name = "NAME")]
    after: Vec<String>,
    /// Wait for nobody
    #[arg(long, conflicts_with = "after")]
    first: bool,
    /// Time that it has to stop, such as 30s [default: its share of the drain's]
    #[arg(long, value_name = "DURATION", value_parser = deadline)]
    deadline: Option<Duration>,
    /// Kill it at its deadline; else it goes on, and the report says so
    #[arg(long)]
    kill: bool,
}

fn signal(text: &str) -> Result<String, String> {
    Signal::parse(text).map(|signal| signal.name().to_owned())
}

pub(super) fn run(arguments: &Arguments) -> Outcome {
    match &arguments.what {
        What::Add(add) => register(add),
        What::Rm { agent, name } => {
            let removed: serde_json::Value = agent.document(Method::DELETE, &path(name)?, String::new())?;
            let until = if removed["in_settings"] == true {
                ", until the agent starts again: it is in the settings"
            } else {
                ""
            };
            output::message(&format!("plumb: {name} is not registered any more{until}"));
            Ok(Exit::Ok)
        }
        What::List { agent, output } => list(agent, output),
    }
}

/// Checked here: what is no name could not even be asked for.
pub(super) fn name(text: &str) -> Result<Name, Failure> {
    let bad = || Failure::new(Exit::Usage, format!("{text:?} {NO_NAME}"), "take another name");
    Name::new(text).ok_or_else(bad)
}

fn path(text: &str) -> Result<String, Failure> {
    Ok(format!("/v1/services/{}", name(text)?))
}

fn register(add: &Add) -> Outcome {
    add.after.iter().try_for_each(|other| name(other).map(drop))?;
    let pid = add.pid.map_or_else(parent, Ok)?;
    let start_ticks = Some(start_ticks(pid).ok_or_else(|| super::no_such_process(pid))?);
    let after =
        if add.first { Some(Vec::new()) } else { Some(add.after.clone()).filter(|names| !names.is_empty()) };
    let wish = Wish {
        signal: add.signal.clone(),
        preset: add.preset.clone(),
        after,
        deadline: add.deadline.map(|time| humantime::format_duration(time).to_string()),
        on_deadline: add.kill.then_some(OnDeadline::Kill),
        process: Some(Which { pid, start_ticks }),
        pid: None,
    };
    let row: ServiceRow = add.agent.document(Method::PUT, &path(&add.name)?, output::json(&wish)?)?;
    output::message(&format!(
        "plumb: {} is registered: {}, to be stopped by {}",
        row.name, row.target, row.signal
    ));
    Ok(Exit::Ok)
}

/// Whoever runs this command; not what only changes the user for it.
fn parent() -> Result<u32, Failure> {
    let pid = std::os::unix::process::parent_id();
    let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    if matches!(comm.trim(), "sudo" | "doas" | "su" | "setpriv" | "runuser") {
        let cause = format!("this command was run by {}, which is no service", comm.trim());
        return Err(Failure::new(Exit::Usage, cause, "name the process with --pid"));
    }
    Ok(pid)
}

fn list(agent: &Agent, output: &Output) -> Outcome {
    let document: ServiceList = agent.document(Method::GET, "/v1/services", String::new())?;
    let columns = [
        ("NAME", false),
        ("TARGET", false),
        ("PIDS", false),
        ("SIGNAL", false),
        ("AFTER", false),
        ("DEADLINE", true),
        ("ON_DEADLINE", false),
        ("UID", true),
    ];
    let notes = ["PROBLEM"];
    output.print_with_notes(&document, &document.services, &columns, &notes, |row| {
        vec![
            row.name.clone(),
            row.target.clone(),
            pids(&row.pids),
            row.signal.clone(),
            match row.after.as_deref() {
                None => "later ones".to_owned(),
                Some([]) => "nobody".to_owned(),
                Some(after) => after.join(", "),
            },
            row.deadline_seconds.map_or_else(|| "-".to_owned(), |seconds| format!("{seconds}s")),
            if row.on_deadline == OnDeadline::Kill { "kill" } else { "report" }.to_owned(),
            row.uid.to_string(),
            row.problem.clone().unwrap_or_else(|| "-".to_owned()),
        ]
    })?;
    Ok(Exit::Ok)
}

/// The first few, and how many there are.
pub(super) fn pids(pids: &[u32]) -> String {
    const SHOWN: usize = 3;
    let first: Vec<String> = pids.iter().take(SHOWN).map(u32::to_string).collect();
    match pids.len() {
        0 => "none".to_owned(),
        many if many > SHOWN => format!("{} and {} more", first.join(" "), many - SHOWN),
        _ => first.join(" "),
    }
}

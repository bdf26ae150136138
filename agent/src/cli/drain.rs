//! `plumb drain`: asks the agent to stop services in order, and shows how that goes.

mod live;

use std::time::Duration;

use clap::Args;
use hyper::Method;

use self::live::Shown;
use super::{
    Outcome,
    client::Agent,
    output::{self, Format, Output},
    services::{name, pids},
    watch::interrupted,
};
use crate::{
    drain::{Document, OnDeadline, State, Verdict, deadline},
    failure::{Exit, Failure},
    left::Left,
    services::{self, DrainWish, PlanDocument, PlannedService, Progress},
};

const EXAMPLES: &str = "\
Examples:
  what would happen, and what speaks against it
    plumb drain --all --dry-run
  stop all services that are registered, in order
    plumb drain --all --deadline 30s
  two of them
    plumb drain web worker
  what came of the last one
    plumb drain --last

Exit code: 0 when all ended well, 124 when a deadline passed, else 1, also by --last of one that is under way. Interrupting this command does not end the drain: \
`plumb drain --cancel` does, before its next stage, and at once if the administrator says so of a user's.";

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    #[command(flatten)]
    agent: Agent,
    #[command(flatten)]
    output: Output,
    /// Services to stop
    #[arg(value_name = "NAME", conflicts_with_all = ["all", "cancel", "last"])]
    names: Vec<String>,
    /// All services, or all of your own
    #[arg(long, conflicts_with_all = ["cancel", "last"])]
    all: bool,
    /// Of the whole drain [default: that of the settings, 30s]
    #[arg(long, value_name = "DURATION", value_parser = deadline, conflicts_with_all = ["cancel", "last"])]
    deadline: Option<Duration>,
    /// Say what would happen, and do nothing
    #[arg(long, conflicts_with_all = ["cancel", "last"])]
    dry_run: bool,
    /// Begin no other stage of the drain under way; if a user has begun it, give that up for the administrator
    #[arg(long)]
    cancel: bool,
    /// The report of the drain under way or the last one
    #[arg(long, conflicts_with = "cancel")]
    last: bool,
}

pub(super) fn run(arguments: &Arguments) -> Outcome {
    let Arguments { agent, names, .. } = arguments;
    if arguments.cancel {
        agent.ask(Method::DELETE, "/v1/drain", String::new())?;
        let progress: Progress = agent.document(Method::GET, "/v1/drain", String::new())?;
        let is_given_up = progress.drain.is_some_and(|drain| drain.given_up.is_some());
        let what = if is_given_up { "it is given up" } else { "no other stage begins" };
        output::message(&format!("plumb: {what}; `plumb drain --last` tells what came of it"));
        return Ok(Exit::Ok);
    }
    if arguments.last {
        let progress: Progress = agent.document(Method::GET, "/v1/drain", String::new())?;
        let nothing = || Failure::new(Exit::Error, "nothing has been drained", "`plumb drain --all` does it");
        return report(&progress.drain.ok_or_else(nothing)?, arguments.output.format);
    }
    if names.is_empty() && !arguments.all {
        return Err(Failure::new(Exit::Usage, "no service is named", "name some, or say --all"));
    }
    names.iter().try_for_each(|text| name(text).map(drop))?;
    let wish = DrainWish {
        services: (!names.is_empty()).then(|| names.clone()),
        all: arguments.all,
        deadline: arguments.deadline.map(|time| humantime::format_duration(time).to_string()),
        dry_run: arguments.dry_run,
    };
    if arguments.dry_run {
        let plan: PlanDocument = agent.document(Method::POST, "/v1/drain", output::json(&wish)?)?;
        let text = if arguments.output.format == Format::Table {
            plan_text(&plan)
        } else {
            output::json(&plan)? + "\n"
        };
        output::data(&text)?;
        return Ok(Exit::Ok);
    }
    let begun: serde_json::Value = agent.document(Method::POST, "/v1/drain", output::json(&wish)?)?;
    let id = begun["id"].as_str().unwrap_or_default().to_owned();
    if begun["joined"] == true {
        output::message(&format!("plumb: joins the drain {id}, which is under way: its deadline holds"));
    }
    let drain = follow(agent, &id)?;
    report(&drain, arguments.output.format)
}

/// Waits for the end of a drain, and shows on a terminal how far it is.
fn follow(agent: &Agent, id: &str) -> Result<Document, Failure> {
    let stop = interrupted()?;
    let mut shown = Shown::default();
    let (mut path, mut journal) = (format!("/v1/drain?id={id}"), "kept".to_owned());
    loop {
        let progress: Progress = agent.document_unless(&stop, &path).map_err(|failure| match failure.exit {
            Exit::AgentUnreachable => gone(id, &journal, &failure),
            Exit::Interrupted => Failure::new(
                Exit::Interrupted,
                format!("interrupted; the drain {id} goes on"),
                "`plumb drain --cancel` begins no other stage of it, `plumb drain --last` tells how far it is",
            ),
            _ => failure,
        })?;
        path = format!("/v1/drain?id={id}&since={}", progress.generation);
        match progress.drain {
            Some(drain) if drain.id == id => {
                if drain.state == State::Finished {
                    shown.clear();
                    return Ok(drain);
                }
                shown.show(&drain);
                journal = drain.journal;
            }
            _ => {
                let cause = format!("the agent knows nothing of the drain {id} any more");
                return Err(Failure::new(Exit::Error, cause, "look at its log"));
            }
        }
    }
}

/// The agent has ended before the drain.
fn gone(id: &str, journal: &str, failure: &Failure) -> Failure {
    let cause = format!("the agent has gone in the middle of the drain {id} ({})", failure.cause);
    let remedy = if journal == "kept" {
        "the drain is in the journal, and the next agent goes on with it: start one with `plumb agent`; then \
         `plumb drain --last` tells what comes of it"
            .to_owned()
    } else {
        format!("there is no journal ({journal}), so no agent goes on with it")
    };
    Failure::new(Exit::AgentUnreachable, cause, remedy)
}

fn report(drain: &Document, format: Format) -> Outcome {
    let text = if format == Format::Table { report_text(drain) } else { output::json(drain)? + "\n" };
    output::data(&text)?;
    Ok(match (drain.state, drain.is_clean(), drain.is_late()) {
        (State::Finished, true, _) => Exit::Ok,
        (State::Finished, false, true) => Exit::Command(124),
        // Of one that is not over it is not known that all end well.
        (State::Finished, false, false) | (State::Running | State::Ended, ..) => Exit::Error,
    })
}

fn report_text(drain: &Document) -> String {
    let mut lines = vec![drain.headline()];
    let mut services: Vec<_> = drain.services.iter().collect();
    services.sort_by_key(|one| one.stage);
    for one in services {
        let verdict = one.verdict.map_or("under way", Verdict::word);
        let time =
            one.seconds.map_or_else(String::new, |seconds| format!(" in {}", output::seconds(seconds)));
        let slack = one.slack_seconds.map_or_else(String::new, slack);
        lines.push(String::new());
        lines.push(format!(
            "  {:<20} {verdict}: {}",
            one.name,
            if one.why.is_empty() { one.progress() } else { one.why.clone() }
        ));
        lines.push(format!(
            "      stage {}, {}; pids {}{time}{slack}",
            one.stage,
            one.target,
            pids(&one.pids)
        ));
        lines
            .extend(services::distinct(one.notes.iter().cloned()).iter().map(|note| format!("      {note}")));
        lines.extend(
            one.timeline.iter().map(|moment| format!("      {:>8.3} s  {}", moment.seconds, moment.what)),
        );
        if one.left_unknown.is_some() || !one.left_threads.is_empty() {
            lines.push("      left just before it was given up".to_owned());
            let left = one.left_threads.iter().flat_map(Left::lines);
            lines.extend(left.map(|line| format!("        {line}")));
            lines.extend(one.left_unknown.iter().map(|what| format!("        unknown: {what}")));
        }
    }
    if drain.services.iter().any(|one| !one.lost_requests.is_empty()) {
        lines.push(String::new());
        lines.push(
            "each lost request is in `plumb drain --last -o json`; docs/drain.md says what the classes mean"
                .to_owned(),
        );
    }
    if drain.journal != "kept" {
        lines
            .push(format!("there is no journal: {}; no agent would have taken this drain up", drain.journal));
    }
    lines.join("\n") + "\n"
}

/// `, 2.0 s before its deadline`
fn slack(seconds: f64) -> String {
    let (time, side) = (seconds.abs(), if seconds < 0.0 { "after" } else { "before" });
    if time < 0.05 {
        ", at its deadline".to_owned()
    } else {
        format!(", {} {side} its deadline", output::seconds(time))
    }
}

fn plan_text(plan: &PlanDocument) -> String {
    let mut lines = vec![format!(
        "{} within {}",
        output::count(plan.stages.len(), "stage", "stages"),
        output::seconds(plan.deadline_seconds)
    )];
    for (number, stage) in (1..).zip(&plan.stages) {
        lines.push(format!("stage {number}, {} at most", output::seconds(stage.seconds)));
        for one in &stage.services {
            let PlannedService { name, target, signal, seconds, .. } = one;
            let end = if one.on_deadline == OnDeadline::Kill { "then KILL" } else { "then it goes on" };
            let seconds = output::seconds(*seconds);
            lines.push(format!("  {name:<20} {signal} to {target}; {seconds}, {end}"));
            lines.push(format!("      pids {}", pids(&one.pids)));
            if !one.waits_for.is_empty() {
                lines.push(format!("      waits for {}", one.waits_for.join(", ")));
            }
            lines.extend(one.refused.iter().map(|why| format!("      WILL NOT BE STOPPED: {why}")));
            lines.extend(one.notes.iter().map(|note| format!("      {note}")));
        }
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_is_before_or_after() {
        for (seconds, said) in [
            (2.0, ", 2.0 s before its deadline"),
            (-0.5, ", 0.5 s after its deadline"),
            (-0.01, ", at its deadline"),
            (0.04, ", at its deadline"),
        ] {
            assert_eq!(slack(seconds), said);
        }
    }
}

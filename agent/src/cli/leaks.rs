//! `plumb leaks`: asks the running agent what it has found, and tells it what somebody says about that.

use std::time::{Duration, SystemTime};

use anyhow::{Context, anyhow};
use clap::{Args, Subcommand};
use hyper::{Method, StatusCode};
use serde_json::json;

use super::{
    Outcome,
    client::{Agent, exchange, unreachable},
    leak,
    output::{self, Format, Output},
};
use crate::{
    config,
    document::{Leak, Leaks},
    failure::{Exit, Failure},
    report,
};

const COLUMNS: &str = "\
LIVE is how many there are, LIMIT how many there may be, PER MIN how fast they grow, FULL IN when the limit is hit.
STATE is suspect (looks like a leak, never alerts), leaking (reported), resolved (none any more, gone after 10 min), acked,
  silenced, or ignored by the settings. An ID that ends with -use, -more or -old is a warning of high use, of more threads
  than at first, or of old threads; `plumb leaks ID` has the rest.";

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true, after_help = COLUMNS)]
pub(super) struct Arguments {
    #[command(flatten)]
    agent: Agent,
    #[command(flatten)]
    output: Output,
    /// All that is known of one finding, by the id that the list shows
    #[arg(value_name = "ID")]
    id: Option<String>,
    #[command(subcommand)]
    say: Option<Say>,
}

#[derive(Subcommand)]
enum Say {
    /// Say that a finding is known: it is told again only when it has doubled
    Ack {
        #[command(flatten)]
        agent: Agent,
        /// As `plumb leaks` lists it
        id: String,
        /// Why it may stay
        #[arg(long, value_parser = reason)]
        reason: Option<String>,
    },
    /// Have a finding not told before some time
    Silence {
        #[command(flatten)]
        agent: Agent,
        /// As `plumb leaks` lists it
        id: String,
        #[command(flatten)]
        end: End,
    },
    /// End a silence
    Unsilence {
        #[command(flatten)]
        agent: Agent,
        /// As `plumb leaks` lists it
        id: String,
    },
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct End {
    /// For how long, 365days at most: 30m, 2h, 7days
    #[arg(long = "for", value_name = "DURATION", value_parser = length)]
    length: Option<Duration>,
    /// Until when, in UTC: 2030-01-31T12:00:00Z
    #[arg(long, value_name = "TIME", value_parser = until)]
    until: Option<SystemTime>,
}

impl End {
    fn time(&self) -> SystemTime {
        self.until.unwrap_or_else(|| SystemTime::now() + self.length.unwrap_or_default())
    }
}

/// A longer silence is asked for by its end: whoever mistypes a unit sees it then.
const MAX_LENGTH: Duration = Duration::from_hours(365 * 24);

fn length(text: &str) -> Result<Duration, String> {
    let length =
        humantime::parse_duration(text).map_err(|error| format!("{error}; such as 30m, 2h or 7days"))?;
    match length {
        _ if length < Duration::from_secs(1) => Err("that is no time at all: 30m, 2h, 7days".to_owned()),
        _ if length > MAX_LENGTH => {
            Err("that is more than 365 days: name its end with --until, or `plumb leaks ack` it".to_owned())
        }
        _ => Ok(length),
    }
}

fn until(text: &str) -> Result<SystemTime, String> {
    let until = humantime::parse_rfc3339_weak(text)
        .map_err(|error| format!("{error}; such as 2030-01-31T12:00:00Z"))?;
    let now = SystemTime::now();
    if until <= now {
        let now = humantime::format_rfc3339_seconds(now);
        return Err(format!("that is in the past, it is {now} now: name a time to come"));
    }
    Ok(until)
}

fn reason(text: &str) -> Result<String, String> {
    if text.trim().is_empty() {
        return Err("it is empty: say why it may stay, or leave --reason out".to_owned());
    }
    Ok(text.to_owned())
}

pub(super) fn run(arguments: &Arguments) -> Outcome {
    match &arguments.say {
        None => list(arguments),
        Some(Say::Ack { agent, id, reason }) => {
            say(agent, id, "ack", &json!({ "reason": reason }))?;
            done(&format!("{id} is acknowledged: it is told again only when it has doubled"))
        }
        Some(Say::Unsilence { agent, id }) => {
            say(agent, id, "unsilence", &json!({}))?;
            done(&format!("the silence of {id} has ended"))
        }
        Some(Say::Silence { agent, id, end }) => {
            let until = humantime::format_rfc3339_seconds(end.time()).to_string();
            say(agent, id, "silence", &json!({ "until": until }))?;
            done(&format!("{id} is not told before {until}"))
        }
    }
}

fn done(line: &str) -> Outcome {
    output::message(&format!("plumb: {line}"));
    Ok(Exit::Ok)
}

fn say(agent: &Agent, id: &str, what: &str, words: &serde_json::Value) -> Result<(), Failure> {
    let is_plain = |letter: char| letter.is_ascii_alphanumeric() || letter == '-';
    let unknown = |cause: String| Failure::new(Exit::Error, cause, "`plumb leaks` lists the ids");
    if id.is_empty() || !id.chars().all(is_plain) {
        return Err(unknown(format!("{id:?} is not an id of a finding")));
    }
    let socket = config::socket(&agent.run_dir);
    let path = format!("/v1/leaks/{id}/{what}");
    let (status, body) = exchange(&socket, Method::POST, &path, words.to_string())?;
    match status {
        StatusCode::NO_CONTENT => Ok(()),
        StatusCode::NOT_FOUND => Err(unknown(String::from_utf8_lossy(&body).trim().to_owned())),
        StatusCode::CONFLICT => {
            let cause = String::from_utf8_lossy(&body).trim().to_owned();
            Err(Failure::new(Exit::Error, cause, "there is nothing to end"))
        }
        _ => {
            let cause = format!("the agent answers {status}: {}", String::from_utf8_lossy(&body).trim());
            Err(Failure::new(Exit::Error, cause, "try again"))
        }
    }
}

fn list(arguments: &Arguments) -> Outcome {
    let socket = config::socket(&arguments.agent.run_dir);
    let (status, body) = exchange(&socket, Method::GET, "/v1/leaks", String::new())?;
    let document = match status {
        StatusCode::OK => serde_json::from_slice(&body).context("the answer is not understood"),
        _ => Err(anyhow!("the agent answers {status}")),
    };
    let document: Leaks = document.map_err(|error| unreachable(&socket, &error))?;
    if let Some(id) = &arguments.id {
        return one(&document, id, arguments.output.format);
    }
    let columns = [
        ("ID", false),
        ("STATE", false),
        ("LIVE", true),
        ("LIMIT", true),
        ("PER MIN", true),
        ("FULL IN", true),
        ("GROUP", false),
    ];
    let notes = ["MOSTLY", "FROM"];
    arguments.output.print_with_notes(&document, &document.findings, &columns, &notes, |leak| {
        vec![
            leak.id.clone(),
            state(leak),
            leak.live.to_string(),
            leak.limit.map_or_else(|| "none".to_owned(), |limit| limit.to_string()),
            format!("{:+.1}", leak.growth_per_minute),
            match leak.seconds_to_exhaustion {
                _ if leak.is_full() => "full".to_owned(),
                Some(seconds) => report::rough(seconds),
                None => "-".to_owned(),
            },
            leak.group.clone(),
            if leak.examples.is_empty() {
                "-".to_owned()
            } else {
                report::list(&leak.examples, &leak.listed(), output::room_for_note())
            },
            leak.from().unwrap_or_else(|| "-".to_owned()),
        ]
    })?;
    Ok(Exit::Ok)
}

fn one(document: &Leaks, id: &str, format: Format) -> Outcome {
    let find = |id: &str| document.findings.iter().find(|leak| leak.id == id);
    // High use beside a leak is in the leak's.
    let Some(leak) = find(id).or_else(|| find(id.strip_suffix("-use")?)) else {
        let remedy = "`plumb leaks` lists the ids; what is resolved goes after ten minutes";
        return Err(Failure::new(Exit::Error, format!("there is no finding {id}"), remedy));
    };
    let text = if format == Format::Table { leak::page(leak) } else { output::json(leak)? + "\n" };
    output::data(&text)?;
    Ok(Exit::Ok)
}

/// The state in a word or two; the page of the finding has the rest.
fn state(leak: &Leak) -> String {
    match (&leak.resolved, &leak.ignored, &leak.acknowledged, &leak.silenced_until) {
        (None, Some(_), ..) => "ignored".to_owned(),
        (None, None, Some(_), _) => "acked".to_owned(),
        (None, None, None, Some(until)) => {
            let until = humantime::parse_rfc3339_weak(until).unwrap_or(SystemTime::UNIX_EPOCH);
            format!("silenced {}", about(until.duration_since(SystemTime::now()).unwrap_or_default()))
        }
        _ => leak.state.word().to_owned(),
    }
}

/// In its largest unit.
fn about(left: Duration) -> String {
    let minutes = left.as_secs_f64() / 60.0;
    match minutes {
        ..90.0 => format!("{minutes:.0}m"),
        ..2_880.0 => format!("{:.0}h", minutes / 60.0),
        _ => format!("{:.0}d", minutes / 1_440.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silence_is_neither_empty_nor_endless_and_ends_in_the_future() {
        for text in ["0s", "999ms", "366days", "99999years", "soon", ""] {
            assert!(length(text).is_err(), "{text}");
        }
        assert_eq!(length("365days"), Ok(MAX_LENGTH));
        assert!(until("2001-01-31T12:00:00Z").unwrap_err().contains("in the past"));
        assert!(until("9999-12-31T23:59:59Z").is_ok() && until("tomorrow").is_err());
        assert!(reason("\t").is_err() && reason("known").is_ok());
        assert!(length("banana").unwrap_err().contains("such as 30m, 2h or 7days"));
    }

    #[test]
    fn what_is_left_of_a_silence_is_short() {
        let about = |seconds| about(Duration::from_secs(seconds));
        assert_eq!([30, 1_800, 7_199, 172_800, 31_536_000].map(about), ["0m", "30m", "2h", "2d", "365d"]);
    }
}

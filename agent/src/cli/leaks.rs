//! `plumb leaks`: asks the running agent what it has found.

use std::{io, path::PathBuf, time::Duration};

use anyhow::{Context, anyhow};
use clap::Args;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode, body::Bytes};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use super::{
    Outcome, leak,
    output::{self, Format, Output},
};
use crate::{
    config,
    detect::Rule,
    document::{Leak, Leaks, Origin},
    failure::{Exit, Failure},
    report,
};

/// Time for the agent to answer.
const DEADLINE: Duration = Duration::from_secs(10);
/// An answer is this long at most, in bytes.
const LIMIT: usize = 64 << 20;

#[derive(Args)]
pub(super) struct Arguments {
    /// All that is known of one finding, by the id that the list shows
    #[arg(value_name = "ID")]
    id: Option<String>,
    /// Folder with the agent's control socket
    #[arg(long, env = "PLUMB_RUN_DIR", value_name = "FOLDER", default_value = config::DEFAULT_RUN_DIR)]
    run_dir: PathBuf,
    #[command(flatten)]
    output: Output,
}

pub(super) fn run(arguments: &Arguments) -> Outcome {
    let socket = config::socket(&arguments.run_dir);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answer = runtime.block_on(async {
        tokio::time::timeout(DEADLINE, ask(&socket))
            .await
            .unwrap_or_else(|_| Err(anyhow!("no answer in time")))
    });
    let document = answer.map_err(|error| unreachable(&socket, &error))?;
    if let Some(id) = &arguments.id {
        return one(&document, id, arguments.output.format);
    }
    let columns = [
        ("ID", false),
        ("STATE", false),
        ("RESOURCE", false),
        ("PID", true),
        ("LIVE", true),
        ("LIMIT", true),
        ("PER MIN", true),
        ("FULL IN", true),
        ("GROUP", false),
        ("MOSTLY", false),
        ("FROM", false),
    ];
    arguments.output.print(&document, &document.findings, &columns, |leak| {
        vec![
            leak.id.clone(),
            state(leak),
            leak.resource.word().to_owned(),
            leak.pid.to_string(),
            leak.live.to_string(),
            leak.limit.map_or_else(|| "none".to_owned(), |limit| limit.to_string()),
            format!("{:+.1}", leak.growth_per_minute),
            leak.seconds_to_exhaustion.map_or_else(|| "-".to_owned(), report::rough),
            leak.group.clone(),
            if leak.examples.is_empty() { "-".to_owned() } else { report::list(&leak.examples) },
            leak.origins.first().map_or_else(|| "-".to_owned(), Origin::words),
        ]
    })?;
    Ok(Exit::Ok)
}

fn one(document: &Leaks, id: &str, format: Format) -> Outcome {
    let Some(leak) = document.findings.iter().find(|leak| leak.id == id) else {
        let remedy = "`plumb leaks` lists the ids; what is resolved goes after ten minutes";
        return Err(Failure::new(Exit::Error, format!("there is no finding {id}"), remedy).into());
    };
    let text = if format == Format::Table { leak::page(leak) } else { output::json(leak)? + "\n" };
    output::data(&text)?;
    Ok(Exit::Ok)
}

/// The state in words, with what qualifies it.
fn state(leak: &Leak) -> String {
    let state = leak.state.word();
    match (&leak.resolved, &leak.ignored, &leak.acknowledged, &leak.silenced_until) {
        (Some(end), ..) => format!("resolved: {}", end.why.words()),
        (_, Some(reason), ..) => format!("ignored: {reason}"),
        (_, _, Some(_), _) => format!("{state}, acknowledged"),
        (.., Some(until)) => format!("{state}, silenced until {until}"),
        _ if leak.rule == Rule::Trend => state.to_owned(),
        _ => format!("{state}: {}", leak.rule.word()),
    }
}

async fn ask(socket: &PathBuf) -> anyhow::Result<Leaks> {
    let stream = UnixStream::connect(socket).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::get("/v1/leaks").header("host", "plumb").body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    if response.status() != StatusCode::OK {
        return Err(anyhow!("the agent answers {}", response.status()));
    }
    let body = Limited::new(response.into_body(), LIMIT).collect().await;
    let body = body.map_err(|error| anyhow!("{error}"))?.to_bytes();
    serde_json::from_slice(&body).context("the answer is not understood")
}

fn unreachable(socket: &std::path::Path, error: &anyhow::Error) -> Failure {
    let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
    let (exit, remedy) = match kind {
        Some(io::ErrorKind::PermissionDenied) => (Exit::MissingPrivilege, "run it with sudo"),
        Some(io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            (Exit::AgentUnreachable, "start one with `plumb agent`, or name its folder with --run-dir")
        }
        _ => (Exit::AgentUnreachable, "look at the log of the agent"),
    };
    Failure::new(exit, format!("no agent answers on {}: {error}", socket.display()), remedy)
}

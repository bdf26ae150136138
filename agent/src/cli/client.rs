//! Asks the running agent over one of its sockets.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::anyhow;
use clap::Args;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, body::Bytes};
use hyper_util::rt::TokioIo;
use rustix::{
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
    process::{PidfdFlags, getpid, pidfd_open},
};
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use crate::{
    config,
    failure::{Exit, Failure},
    services::RefusalDocument,
};

/// Time for the agent to answer.
const DEADLINE: Duration = Duration::from_secs(10);
/// Beyond how long it keeps who waits for a change.
const LONG_DEADLINE: Duration = Duration::from_secs(40);
/// An answer is this long at most, in bytes.
const LIMIT: usize = 64 << 20;

/// Where the agent is.
#[derive(Args, Clone)]
pub(super) struct Agent {
    /// Folder with the agent's control socket
    #[arg(long, env = "PLUMB_RUN_DIR", value_name = "FOLDER", default_value = config::DEFAULT_RUN_DIR)]
    pub(super) run_dir: PathBuf,
}

impl Agent {
    /// The administrator's socket if it can be opened, else everybody's.
    fn socket(&self) -> PathBuf {
        let control = config::socket(&self.run_dir);
        let open = config::open_socket(&self.run_dir);
        let is_admin = rustix::fs::access(&control, rustix::fs::Access::WRITE_OK).is_ok();
        if !is_admin && open.exists() { open } else { control }
    }

    /// Asks about services and drains; a refusal is a failure with its remedy.
    pub(super) fn ask(&self, method: Method, path: &str, body: String) -> Result<Bytes, Failure> {
        self.ask_unless(&CancellationToken::new(), method, path, body)
    }

    fn ask_unless(
        &self,
        stop: &CancellationToken,
        method: Method,
        path: &str,
        body: String,
    ) -> Result<Bytes, Failure> {
        let socket = self.socket();
        let answer = exchange_within(&socket, method, path, body, (LONG_DEADLINE, stop));
        let (status, body) = answer?;
        if status.is_success() {
            return Ok(body);
        }
        match serde_json::from_slice::<RefusalDocument>(&body) {
            Ok(refusal) => {
                let cause = format!("refused ({}): {}", refusal.code, refusal.error);
                Err(Failure::new(Exit::Error, cause, refusal.remedy))
            }
            Err(_) => {
                let cause = format!("the agent answers {status}: {}", String::from_utf8_lossy(&body).trim());
                Err(Failure::new(Exit::Error, cause, "is the agent of the same version?"))
            }
        }
    }

    /// As `ask`, for a document.
    pub(super) fn document<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: String,
    ) -> Result<T, Failure> {
        understood(&self.ask(method, path, body)?)
    }

    /// A document, unless the wait for it is ended.
    pub(super) fn document_unless<T: DeserializeOwned>(
        &self,
        stop: &CancellationToken,
        path: &str,
    ) -> Result<T, Failure> {
        understood(&self.ask_unless(stop, Method::GET, path, String::new())?)
    }
}

fn understood<T: DeserializeOwned>(answer: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(answer).map_err(|error| {
        let cause = format!("the answer of the agent is not understood: {error}");
        Failure::new(Exit::Error, cause, "is the agent of the same version?")
    })
}

/// Asks the agent, and waits for its answer.
pub(super) fn exchange(
    socket: &Path,
    method: Method,
    path: &str,
    body: String,
) -> Result<(StatusCode, Bytes), Failure> {
    exchange_within(socket, method, path, body, (DEADLINE, &CancellationToken::new()))
}

fn exchange_within(
    socket: &Path,
    method: Method,
    path: &str,
    body: String,
    (within, stop): (Duration, &CancellationToken),
) -> Result<(StatusCode, Bytes), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answer = runtime.block_on(async {
        stop.run_until_cancelled(tokio::time::timeout(within, ask(socket, method, path, body))).await
    });
    let Some(answer) = answer else {
        return Err(Failure::new(Exit::Interrupted, "interrupted", "nothing is known of the answer"));
    };
    answer.unwrap_or_else(|_| Err(anyhow!("no answer in time"))).map_err(|error| unreachable(socket, &error))
}

async fn ask(socket: &Path, method: Method, path: &str, body: String) -> anyhow::Result<(StatusCode, Bytes)> {
    let stream = UnixStream::connect(socket).await?;
    show_who_asks(&stream)?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::builder().method(method).uri(path).header("host", "plumb");
    let request = request.header("content-type", "application/json").body(Full::new(Bytes::from(body)))?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), LIMIT).collect().await;
    Ok((status, body.map_err(|error| anyhow!("{error}"))?.to_bytes()))
}

/// Sends a pidfd of this process, for an agent whose kernel does not say who has connected: with an empty line, which may
/// stand before a request (RFC 9112, 2.2).
fn show_who_asks(stream: &UnixStream) -> io::Result<()> {
    // Where that is forbidden one can still ask about others.
    let Ok(own) = pidfd_open(getpid(), PidfdFlags::empty()) else { return Ok(()) };
    let (own, mut space) = ([own.as_fd()], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&own));
    sendmsg(stream, &[IoSlice::new(b"\r\n")], &mut control, SendFlags::empty())?;
    Ok(())
}

pub(super) fn unreachable(socket: &Path, error: &anyhow::Error) -> Failure {
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

//! What people say about findings over the control socket, on its way to the table's owner.

use axum::{
    Json, Router,
    extract::{Path, State, rejection::JsonRejection},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use serde::Deserialize;
use tokio::sync::{mpsc, oneshot};

use crate::{clock::Calendar, detect::NoSuchFinding, observe::Input, text};

/// What somebody says about a finding, by its id.
#[derive(Debug)]
pub(crate) struct Saying {
    pub id: String,
    pub what: Said,
    /// Whether there is such a finding.
    pub answer: oneshot::Sender<Result<(), NoSuchFinding>>,
}

#[derive(Debug)]
pub(crate) enum Said {
    /// Known, for this reason.
    Ack(Option<String>),
    /// Nothing more before this time, nanoseconds since boot.
    Silence(u64),
    Unsilence,
}

/// POST /v1/leaks/ID/ack, silence, and unsilence.
pub(crate) fn router(inputs: mpsc::Sender<Input>) -> Router {
    Router::new().route("/v1/leaks/{id}/{what}", post(say)).with_state(inputs)
}

/// What is said about a finding, beside its id.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Words {
    reason: Option<String>,
    /// RFC 3339.
    until: Option<String>,
}

/// A reason is cut to so many characters.
const MAX_REASON: usize = 200;

/// `ack`, `silence` or `unsilence` a finding.
async fn say(
    State(inputs): State<mpsc::Sender<Input>>,
    Path((id, what)): Path<(String, String)>,
    words: Result<Json<Words>, JsonRejection>,
) -> Response {
    let refuse = |status: StatusCode, text: String| (status, text + "\n").into_response();
    let words = match words {
        Ok(Json(words)) => words,
        Err(error) => return refuse(StatusCode::BAD_REQUEST, format!("{error}; send a JSON object")),
    };
    let what = match what.as_str() {
        "ack" => {
            let cut = |reason: String| text::printable(reason.as_bytes()).chars().take(MAX_REASON).collect();
            Said::Ack(words.reason.map(cut))
        }
        "unsilence" => Said::Unsilence,
        "silence" => match words.until.as_deref().map(humantime::parse_rfc3339_weak) {
            Some(Ok(until)) => Said::Silence(Calendar::now().since_boot(until)),
            _ => {
                let why = "until when? send {\"until\": \"2030-01-31T12:00:00Z\"}".to_owned();
                return refuse(StatusCode::BAD_REQUEST, why);
            }
        },
        _ => return refuse(StatusCode::NOT_FOUND, format!("{what} is none of ack, silence and unsilence")),
    };
    let (answer, answered) = oneshot::channel();
    let asked = inputs.send(Input::Say(Saying { id: id.clone(), what, answer })).await;
    match (asked, answered.await) {
        (Ok(()), Ok(Ok(()))) => StatusCode::NO_CONTENT.into_response(),
        (Ok(()), Ok(Err(NoSuchFinding))) => {
            refuse(StatusCode::NOT_FOUND, format!("no finding has the id {id}"))
        }
        _ => refuse(StatusCode::SERVICE_UNAVAILABLE, "the agent is ending, or starting anew".to_owned()),
    }
}

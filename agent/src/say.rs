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

use crate::{
    clock::{self, Calendar},
    detect::Refused,
    observe::Input,
    text,
};

/// What somebody says about a finding, by its id.
#[derive(Debug)]
pub(crate) struct Saying {
    pub id: String,
    pub what: Said,
    pub answer: oneshot::Sender<Result<(), Refused>>,
}

#[derive(Debug, PartialEq, Eq)]
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

/// What is meant, or why it is refused.
fn meant(what: &str, words: Words, calendar: Calendar, now: u64) -> Result<Said, (StatusCode, String)> {
    let refuse = |why: &str| Err((StatusCode::BAD_REQUEST, why.to_owned()));
    match what {
        "ack" if words.reason.as_deref().is_some_and(|reason| reason.trim().is_empty()) => {
            refuse("the reason is empty: say why it may stay, or give none")
        }
        "ack" => {
            let cut = |reason: String| text::printable(reason.as_bytes()).chars().take(MAX_REASON).collect();
            Ok(Said::Ack(words.reason.map(cut)))
        }
        "unsilence" => Ok(Said::Unsilence),
        "silence" => match words.until.as_deref().map(humantime::parse_rfc3339_weak) {
            Some(Ok(until)) => {
                let until = calendar.since_boot(until);
                if until > now {
                    Ok(Said::Silence(until))
                } else {
                    refuse("until is in the past: name a time to come")
                }
            }
            _ => refuse("until when? send {\"until\": \"2030-01-31T12:00:00Z\"}"),
        },
        _ => Err((StatusCode::NOT_FOUND, format!("{what} is none of ack, silence and unsilence"))),
    }
}

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
    let what = match meant(&what, words, Calendar::now(), clock::boottime()) {
        Ok(what) => what,
        Err((status, why)) => return refuse(status, why),
    };
    let (answer, answered) = oneshot::channel();
    let asked = inputs.send(Input::Say(Saying { id: id.clone(), what, answer })).await;
    match (asked, answered.await) {
        (Ok(()), Ok(Ok(()))) => StatusCode::NO_CONTENT.into_response(),
        (Ok(()), Ok(Err(Refused::NoSuchFinding))) => {
            refuse(StatusCode::NOT_FOUND, format!("no finding has the id {id}"))
        }
        (Ok(()), Ok(Err(Refused::NotSilenced))) => {
            refuse(StatusCode::CONFLICT, format!("{id} is not silenced"))
        }
        _ => refuse(StatusCode::SERVICE_UNAVAILABLE, "the agent is ending, or starting anew".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silence_ends_in_the_future_and_a_reason_is_not_empty() {
        let (calendar, now) = (Calendar::now(), clock::boottime());
        let meant = |what: &str, words: &str| {
            meant(what, serde_json::from_str(words).unwrap(), calendar, now).map_err(|(status, _)| status)
        };
        let refused = Err(StatusCode::BAD_REQUEST);
        assert_eq!(meant("silence", r#"{"until": "2001-01-31T12:00:00Z"}"#), refused);
        assert_eq!(meant("silence", "{}"), refused);
        let later = r#"{"until": "9999-01-31T12:00:00Z"}"#;
        assert!(matches!(meant("silence", later), Ok(Said::Silence(until)) if until > now));
        assert_eq!(meant("ack", r#"{"reason": " "}"#), refused);
        assert_eq!(meant("ack", r#"{"reason": null}"#), Ok(Said::Ack(None)));
        assert_eq!(meant("ack", r#"{"reason": "known"}"#), Ok(Said::Ack(Some("known".to_owned()))));
        assert_eq!(meant("unsilence", "{}"), Ok(Said::Unsilence));
        assert_eq!(meant("praise", "{}"), Err(StatusCode::NOT_FOUND));
    }
}

//! Services and drains over the Unix sockets: who registers what, and what a drain would do, does and did.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use axum::{
    Extension, Json, Router,
    extract::{
        Path, Query, State,
        rejection::{JsonRejection, QueryRejection},
    },
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, put},
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time,
};

use crate::{
    document::SCHEMA,
    drain::{
        Asked, Command, Document, Grants, Listed, Name, OnDeadline, Plan, Preflight, Process, Refusal,
        Registration, Service, Signal, Stop, Target, View, deadline,
    },
    peer::{Peer, refusal},
    text,
};

/// How long a client may wait for a change.
const POLL: Duration = Duration::from_secs(25);

/// The way to the driver.
#[derive(Clone, Debug)]
pub(crate) struct Services {
    pub commands: mpsc::Sender<Command>,
    pub views: watch::Receiver<View>,
}

/// For both sockets; each connection has its `Peer`.
pub(crate) fn router(services: Services) -> Router {
    Router::new()
        .route("/v1/services", get(list))
        .route("/v1/services/{name}", put(register).delete(remove))
        .route("/v1/services/{name}/in-flight", put(in_flight))
        .route("/v1/drain", get(progress).post(drain).delete(cancel))
        .with_state(services)
}

/// What is sent to register a service.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Wish {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<Vec<String>>,
    /// Such as `10s`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_deadline: Option<OnDeadline>,
    /// Another process than the one that asks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process: Option<Which>,
    /// Refused: it may be another process by the time it is read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<serde_json::Value>,
}

/// A process that cannot be mistaken.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Which {
    pub pid: u32,
    /// Field 22 of /proc/PID/stat.
    pub start_ticks: Option<u64>,
}

/// What is sent to drain.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct DrainWish {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub services: Option<Vec<String>>,
    pub all: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline: Option<String>,
    pub dry_run: bool,
}

/// A registered service.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ServiceRow {
    pub name: String,
    pub target: String,
    pub pids: Vec<u32>,
    pub signal: String,
    pub preset: Option<String>,
    /// `null`: what was registered later.
    pub after: Option<Vec<String>>,
    pub deadline_seconds: Option<f64>,
    pub on_deadline: OnDeadline,
    pub uid: u32,
    /// Why it could not be drained now.
    pub problem: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ServiceList {
    pub schema: String,
    pub services: Vec<ServiceRow>,
}

/// What a drain would do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PlanDocument {
    pub schema: String,
    pub deadline_seconds: f64,
    pub stages: Vec<StageDocument>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct StageDocument {
    /// If the stages before use all of theirs.
    pub seconds: f64,
    pub services: Vec<PlannedService>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PlannedService {
    pub name: String,
    pub target: String,
    pub waits_for: Vec<String>,
    pub signal: String,
    pub seconds: f64,
    pub on_deadline: OnDeadline,
    pub pids: Vec<u32>,
    /// Why it would not be asked to stop.
    pub refused: Option<String>,
    pub notes: Vec<String>,
}

/// The drain under way or the last one; `generation` grows with each change.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Progress {
    pub schema: String,
    pub generation: u64,
    pub drain: Option<Document>,
}

/// What is said to who is refused.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RefusalDocument {
    pub code: String,
    pub error: String,
    pub remedy: String,
}

struct Refused(Refusal);

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        Self(refusal)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let status = match &self.0 {
            Refusal::BadName(_) | Refusal::BadRequest(_) | Refusal::BarePid => StatusCode::BAD_REQUEST,
            Refusal::Unknown(_) | Refusal::NotUnderWay => StatusCode::NOT_FOUND,
            Refusal::NotYours(_)
            | Refusal::NotYourProcess(..)
            | Refusal::NobodysProcess(_)
            | Refusal::UnknownPeer(_) => StatusCode::FORBIDDEN,
            Refusal::TooManyOfUser(_) | Refusal::TooMany => StatusCode::TOO_MANY_REQUESTS,
            _ => StatusCode::CONFLICT,
        };
        let document = RefusalDocument {
            code: self.0.code().to_owned(),
            error: self.0.to_string(),
            remedy: self.0.remedy().to_owned(),
        };
        (status, Json(document)).into_response()
    }
}

/// Tells the log who was refused what, and why.
fn logged(peer: &Peer, what: &str, refusal: Refusal) -> Refused {
    let code = refusal.code();
    tracing::warn!(
        uid = peer.caller.uid,
        admin = peer.caller.is_admin,
        code,
        "{what} was refused: {refusal}"
    );
    Refused(refusal)
}

fn name(text: &str) -> Result<Name, Refusal> {
    Name::new(text).ok_or_else(|| Refusal::BadName(text.chars().take(80).collect()))
}

fn seconds(text: &str) -> Result<Duration, Refusal> {
    deadline(text).map_err(Refusal::BadRequest)
}

impl Services {
    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Refusal> {
        let (reply, answer) = oneshot::channel();
        let gone = || Refusal::BadRequest("the agent is ending, or starting anew".to_owned());
        self.commands.send(command(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }
}

async fn list(
    State(services): State<Services>,
    Extension(peer): Extension<Peer>,
) -> Result<Json<ServiceList>, Refused> {
    let listed = services.ask(|reply| Command::List(peer.caller, reply)).await?;
    Ok(Json(ServiceList { schema: SCHEMA.to_owned(), services: listed.iter().map(row).collect() }))
}

fn signal(service: &Service) -> String {
    match (&service.stop, &service.target) {
        (Some(Stop { signal, late: Some(late), .. }), _) => {
            format!("{}, late {}", signal.name(), late.name())
        }
        (Some(Stop { signal, .. }), _) => signal.name().to_owned(),
        (None, Target::Unit(_)) => "by systemd".to_owned(),
        (None, _) => "none".to_owned(),
    }
}

fn row(Listed { service, pids, problem }: &Listed) -> ServiceRow {
    let names = |names: &BTreeSet<Name>| names.iter().map(Name::to_string).collect();
    ServiceRow {
        name: service.name.to_string(),
        target: service.target.words(),
        pids: pids.clone(),
        signal: signal(service),
        preset: service.stop.as_ref().and_then(|stop| stop.preset.clone()),
        after: service.after.as_ref().map(names),
        deadline_seconds: service.deadline.map(|deadline| deadline.as_secs_f64()),
        on_deadline: service.on_deadline,
        uid: service.uid,
        problem: problem.clone(),
    }
}

async fn register(
    State(services): State<Services>,
    Extension(peer): Extension<Peer>,
    Path(text): Path<String>,
    wish: Result<Json<Wish>, JsonRejection>,
) -> Result<Response, Refused> {
    let what = format!("to register {:?}", text.chars().take(80).collect::<String>());
    let refuse = |refusal| logged(&peer, &what, refusal);
    let registration = registration(&peer, &text, wish).map_err(refuse)?;
    let added = services.ask(|reply| Command::Add(Box::new(registration), reply)).await.map_err(refuse)?;
    let service = added.map_err(refuse)?;
    let pids = if let Target::Process(identity) = &service.target { vec![identity.pid] } else { Vec::new() };
    Ok(Json(row(&Listed { service, pids, problem: None })).into_response())
}

fn registration(
    peer: &Peer,
    text: &str,
    wish: Result<Json<Wish>, JsonRejection>,
) -> Result<Registration, Refusal> {
    let Json(wish) = wish.map_err(|error| Refusal::BadRequest(error.body_text()))?;
    let name = name(text)?;
    if wish.pid.is_some() {
        return Err(Refusal::BarePid);
    }
    let process = match wish.process {
        None => peer.process()?,
        Some(which) => named(peer, which)?,
    };
    let signal = wish.signal.as_deref().map(Signal::parse).transpose().map_err(Refusal::BadRequest)?;
    let stop = Stop::of(signal, wish.preset.as_deref()).map_err(Refusal::BadRequest)?;
    let after = wish.after.map(|names| names.iter().map(|text| self::name(text)).collect()).transpose()?;
    let service = Service {
        name,
        target: Target::Process(process.identity.clone()),
        after,
        stop: Some(stop),
        deadline: wish.deadline.as_deref().map(seconds).transpose()?,
        on_deadline: wish.on_deadline.unwrap_or_default(),
        prestop: None,
        ready: None,
        uid: peer.caller.uid,
    };
    Ok(Registration { service, process, caller: peer.caller })
}

/// Another process than the one that asks. Who is not the administrator may name those below his own cgroup only.
fn named(peer: &Peer, which: Which) -> Result<Process, Refusal> {
    let Some(start_ticks) = which.start_ticks else { return Err(Refusal::BarePid) };
    let process = Process::open(which.pid).map_err(refusal)?;
    if process.identity.start_ticks != start_ticks {
        let why = format!("process {} was started at another time: it is another one", which.pid);
        return Err(Refusal::NoSuchProcess(why));
    }
    if !peer.caller.is_admin {
        let own = peer.process()?.identity.cgroup;
        if !is_below(&process.identity.cgroup, &own) {
            return Err(Refusal::NotYourProcess(which.pid, "it is in another cgroup than you".to_owned()));
        }
    }
    Ok(process)
}

/// Whether each of a process's cgroups is that of another one, or below it.
fn is_below(cgroup: &str, other: &str) -> bool {
    let mut pairs = cgroup.lines().zip(other.lines());
    cgroup.lines().count() == other.lines().count()
        && pairs.all(|(one, other)| {
            let rest = one.strip_prefix(other);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/') || other.ends_with('/'))
        })
}

/// What a service says of itself.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct InFlight {
    pub requests: u64,
}

async fn in_flight(
    State(services): State<Services>,
    Extension(peer): Extension<Peer>,
    Path(text): Path<String>,
    said: Result<Json<InFlight>, JsonRejection>,
) -> Result<StatusCode, Refused> {
    let refuse = |refusal| logged(&peer, "to tell of requests in flight", refusal);
    let name = name(&text).map_err(refuse)?;
    let Json(said) = said.map_err(|error| refuse(Refusal::BadRequest(error.body_text())))?;
    let told = services.ask(|reply| Command::InFlight(name, said.requests, peer.caller, reply));
    told.await.map_err(refuse)?.map_err(refuse)?;
    Ok(StatusCode::NO_CONTENT)
}

async fn remove(
    State(services): State<Services>,
    Extension(peer): Extension<Peer>,
    Path(text): Path<String>,
) -> Result<Json<serde_json::Value>, Refused> {
    let refuse = |refusal| logged(&peer, "to remove a service", refusal);
    let name = name(&text).map_err(refuse)?;
    let removed = services.ask(|reply| Command::Remove(name, peer.caller, reply)).await.map_err(refuse)?;
    let in_settings = removed.map_err(refuse)?;
    Ok(Json(json!({ "schema": SCHEMA, "in_settings": in_settings })))
}

async fn drain(
    State(services): State<Services>,
    Extension(peer): Extension<Peer>,
    wish: Result<Json<DrainWish>, JsonRejection>,
) -> Result<Response, Refused> {
    let refuse = |refusal| logged(&peer, "a drain", refusal);
    let asked = asked(&peer, wish).map_err(refuse)?;
    if let (asked, true) = asked {
        let plan = services.ask(|reply| Command::Plan(asked, reply)).await.map_err(refuse)?;
        return Ok(Json(planned(&plan.map_err(refuse)?)).into_response());
    }
    let begun = services.ask(|reply| Command::Drain(asked.0, reply)).await.map_err(refuse)?;
    let (id, joined) = begun.map_err(refuse)?;
    let answer = json!({ "schema": SCHEMA, "id": id, "joined": joined });
    Ok((StatusCode::ACCEPTED, Json(answer)).into_response())
}

fn asked(peer: &Peer, wish: Result<Json<DrainWish>, JsonRejection>) -> Result<(Asked, bool), Refusal> {
    let Json(wish) = wish.map_err(|error| Refusal::BadRequest(error.body_text()))?;
    let names = match (wish.services, wish.all) {
        (None, true) => None,
        (Some(names), false) if !names.is_empty() => {
            Some(names.iter().map(|text| name(text)).collect::<Result<_, _>>()?)
        }
        (Some(_), true) => {
            return Err(Refusal::BadRequest("name services or say all, not both".to_owned()));
        }
        _ => return Err(Refusal::BadRequest("which services? name some, or say all".to_owned())),
    };
    let deadline = wish.deadline.as_deref().map(seconds).transpose()?;
    let trigger = format!("user {}", peer.caller.uid);
    Ok((Asked { names, deadline, trigger, caller: peer.caller }, wish.dry_run))
}

fn planned(plan: &Plan) -> PlanDocument {
    let service = |(name, waits): &(Name, Vec<Name>), (time, shortened): &(Duration, Option<String>)| {
        let (service, preflight) = plan.services.iter().find(|(service, _)| service.name == *name)?;
        let (pids, refused, notes) = match preflight {
            Preflight::Found(found) => {
                let notes = found.notes.iter().cloned().chain(before_signal(service)).collect();
                (found.members.iter().map(|one| one.identity.pid).collect(), None, notes)
            }
            Preflight::NotRunning => (Vec::new(), None, vec!["it does not run".to_owned()]),
            Preflight::Refused(why) => (Vec::new(), Some(why.clone()), Vec::new()),
        };
        Some(PlannedService {
            name: name.to_string(),
            target: service.target.words(),
            waits_for: waits.iter().map(Name::to_string).collect(),
            signal: signal(service),
            seconds: time.as_secs_f64(),
            on_deadline: service.on_deadline,
            pids,
            refused,
            notes: distinct(notes.into_iter().chain(shortened.clone())),
        })
    };
    let stage = |(stage, grant): (&Vec<(Name, Vec<Name>)>, &Grants)| StageDocument {
        seconds: grant.time.as_secs_f64(),
        services: stage.iter().zip(&grant.services).filter_map(|(one, time)| service(one, time)).collect(),
    };
    PlanDocument {
        schema: SCHEMA.to_owned(),
        deadline_seconds: plan.deadline.as_secs_f64(),
        stages: plan.stages.iter().zip(&plan.grants).map(stage).collect(),
    }
}

/// The commands of the settings that run before the signal.
fn before_signal(service: &Service) -> impl Iterator<Item = String> {
    let prestop = service.prestop.iter().map(|command| ("prestop runs before", command));
    let ready = service.ready.iter().map(|command| ("ready runs before, until it fails", command));
    prestop.chain(ready).map(|(what, command)| format!("{what}: {}", text::printable(command.as_bytes())))
}

/// Each once: two processes may listen on one port.
pub(crate) fn distinct(notes: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut seen = BTreeSet::new();
    notes.into_iter().filter(|note| seen.insert(note.clone())).collect()
}

async fn cancel(
    State(services): State<Services>,
    Extension(peer): Extension<Peer>,
) -> Result<StatusCode, Refused> {
    let refuse = |refusal| logged(&peer, "to cancel a drain", refusal);
    services.ask(|reply| Command::Cancel(peer.caller, reply)).await.map_err(refuse)?.map_err(refuse)?;
    Ok(StatusCode::NO_CONTENT)
}

/// What a client has seen, and of which drain; without that of the last one that is his to know of.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Since {
    since: Option<u64>,
    id: Option<String>,
}

/// The drain as it is now or, after the change that the client has seen, at the next one or in 25 s.
async fn progress(
    State(mut services): State<Services>,
    Extension(peer): Extension<Peer>,
    since: Result<Query<Since>, QueryRejection>,
) -> Result<Json<Progress>, Refused> {
    let Query(Since { since, id }) = since.map_err(|error| Refusal::BadRequest(error.body_text()))?;
    if let Some(since) = since {
        let _ = time::timeout(POLL, services.views.wait_for(|view| view.generation > since)).await;
    }
    let view = services.views.borrow().clone();
    let is_meant =
        |drain: &Arc<Document>| peer.caller.owns(drain.uid) && id.as_ref().is_none_or(|id| *id == drain.id);
    let all: Vec<_> = view.drain.into_iter().chain(view.past).filter(is_meant).collect();
    // A drain of nothing is not what anybody looks back at.
    let drain = all.iter().find(|drain| !drain.services.is_empty()).or(all.first());
    let drain = drain.map(|drain| Document::clone(drain));
    Ok(Json(Progress { schema: SCHEMA.to_owned(), generation: view.generation, drain }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn below_a_cgroup_is_below_it_in_each_hierarchy() {
        assert!(
            is_below("0::/a\n", "0::/a\n")
                && is_below("0::/a/b\n", "0::/a\n")
                && is_below("0::/a\n", "0::/\n")
        );
        assert!(!is_below("0::/ab\n", "0::/a\n") && !is_below("0::/\n", "0::/a\n"));
        assert!(!is_below("1:x:/a\n0::/b\n", "1:x:/b\n0::/b\n") && !is_below("0::/a\n", "1:x:/\n0::/a\n"));
    }

    #[test]
    fn a_note_is_told_once() {
        let notes = ["listens on 127.0.0.1:80", "1 connection", "listens on 127.0.0.1:80"].map(str::to_owned);
        assert_eq!(distinct(notes), ["listens on 127.0.0.1:80", "1 connection"]);
    }

    #[test]
    fn a_bare_pid_is_known_and_refused() {
        let wish: Wish = serde_json::from_str(r#"{"pid": 42}"#).unwrap();
        assert!(wish.pid.is_some());
        assert!(serde_json::from_str::<Wish>(r#"{"process": {"pid": 42, "start": 1}}"#).is_err());
        assert!(serde_json::from_str::<Wish>(r#"{"sginal": "TERM"}"#).is_err());
        assert!(
            seconds("0s").is_err()
                && seconds("2h").is_err()
                && seconds("5").is_err()
                && seconds("30s").is_ok()
                && seconds("soon").is_err()
        );
    }
}

//! HTTP: metrics and health over TCP, and over the control socket also what concerns single processes.

use std::{fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
    serve::Listener,
};
use tokio::{
    net::{TcpListener, TcpStream, UnixListener, UnixStream, unix},
    sync::watch,
};
use tokio_util::sync::CancellationToken;

use crate::{
    clock::{self, Calendar},
    document::Leaks,
    export::prometheus::{self, Own},
    supervisor::{self, Workers},
    table::HostView,
};

/// Without a pass for this long the agent is blind.
const STALE: Duration = Duration::from_secs(5);

/// After a connection that could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the handlers read.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    pub views: watch::Receiver<Arc<HostView>>,
    pub workers: Workers,
    pub own: Own,
}

/// Serves until it is told to stop; requests under way are finished.
pub(crate) async fn serve<L>(listener: L, router: Router, stop: CancellationToken) -> io::Result<()>
where
    L: Listener,
    L::Addr: fmt::Debug,
{
    axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await
}

/// A TCP listener that survives the worker that serves it.
pub(crate) struct Tcp(pub Arc<TcpListener>);

/// A Unix listener that survives the worker that serves it.
pub(crate) struct Unix(pub Arc<UnixListener>);

impl Listener for Tcp {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        accepted(|| self.0.accept()).await
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

impl Listener for Unix {
    type Io = UnixStream;
    type Addr = unix::SocketAddr;

    async fn accept(&mut self) -> (UnixStream, unix::SocketAddr) {
        accepted(|| self.0.accept()).await
    }

    fn local_addr(&self) -> io::Result<unix::SocketAddr> {
        self.0.local_addr()
    }
}

/// Tries until a connection comes: a refused one, or a moment without free fds, must not end the service.
async fn accepted<T, F: Future<Output = io::Result<T>>>(mut accept: impl FnMut() -> F) -> T {
    loop {
        match accept().await {
            Ok(connection) => return connection,
            Err(error) => {
                tracing::debug!(%error, "a connection was not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// For scrapers and probes: no single process, no path, no address.
pub(crate) fn public(shared: Shared) -> Router {
    Router::new()
        .route("/", get(index))
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(shared)
}

/// For whoever may open the control socket.
pub(crate) fn control(shared: Shared) -> Router {
    Router::new().route("/v1/leaks", get(leaks)).with_state(shared.clone()).merge(public(shared))
}

async fn index() -> &'static str {
    "plumb: /metrics /healthz /readyz\n"
}

async fn metrics(State(shared): State<Shared>) -> Response {
    let view = Arc::clone(&shared.views.borrow());
    match prometheus::page(&view, &shared.workers, &shared.own) {
        Ok(page) => ([(header::CONTENT_TYPE, prometheus::CONTENT_TYPE)], page).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn leaks(State(shared): State<Shared>) -> Json<Leaks> {
    let view = Arc::clone(&shared.views.borrow());
    Json(Leaks::new(&view.findings, Calendar::now()))
}

/// Whether restarting the agent would help.
async fn healthz(State(shared): State<Shared>) -> (StatusCode, String) {
    let failing: Vec<_> = not_running(&shared.workers);
    if failing.is_empty() {
        (StatusCode::OK, "ok\n".to_owned())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, format!("failing: {}\n", failing.join(", ")))
    }
}

/// Whether what the agent says can be relied on; what it cannot see is named line by line.
async fn readyz(State(shared): State<Shared>) -> (StatusCode, String) {
    let view = Arc::clone(&shared.views.borrow());
    let age = Duration::from_nanos(clock::boottime().saturating_sub(view.time));
    let (status, verdict) = readiness(&view, age, &not_running(&shared.workers));
    (status, verdict.join("\n") + "\n")
}

fn not_running(workers: &Workers) -> Vec<String> {
    let failing = workers.list().into_iter().filter(|(_, worker)| worker.state != supervisor::State::Running);
    failing.map(|(name, worker)| format!("worker {name} is {}", worker.state.word())).collect()
}

fn readiness(view: &HostView, age: Duration, failing: &[String]) -> (StatusCode, Vec<String>) {
    let mut lines = failing.to_vec();
    let blind = if view.passes == 0 {
        Some("no pass over the processes yet".to_owned())
    } else if age > STALE {
        Some(format!("no pass over the processes for {} s", age.as_secs()))
    } else {
        None
    };
    let is_blind = blind.is_some();
    lines.extend(blind);
    for status in view.programs.iter().filter(|status| !status.is_attached()) {
        let (name, gives) = (status.program.name, status.program.gives);
        lines.push(format!(
            "program {name} is {}: no {gives} ({})",
            status.verdict.word(),
            status.verdict.explain()
        ));
    }
    if view.lost_lately > 0 {
        lines.push(format!("{} events were lost in the last second", view.lost_lately));
    }
    let (status, word) = match (is_blind, lines.is_empty()) {
        (true, _) => (StatusCode::SERVICE_UNAVAILABLE, "not ready"),
        (false, false) => (StatusCode::OK, "degraded"),
        (false, true) => (StatusCode::OK, "ready"),
    };
    lines.insert(0, word.to_owned());
    (status, lines)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{PROGRAMS, Status, Verdict};

    fn view(verdict: Verdict) -> HostView {
        let programs = Arc::new([Status { program: &PROGRAMS[0], verdict }]);
        HostView { passes: 1, programs, ..HostView::default() }
    }

    #[test]
    fn a_missing_probe_a_loss_and_blindness_are_told_apart() {
        let ready = view(Verdict::Attached);
        assert_eq!(readiness(&ready, STALE, &[]), (StatusCode::OK, vec!["ready".to_owned()]));

        let (status, lines) = readiness(&view(Verdict::Unsupported { why: "no hook".into() }), STALE, &[]);
        assert_eq!((status, lines[0].as_str()), (StatusCode::OK, "degraded"));
        assert!(
            lines[1].contains("task_newtask is unsupported") && lines[1].contains("no hook"),
            "{lines:?}"
        );

        let (status, lines) = readiness(&HostView { lost_lately: 3, ..ready.clone() }, STALE, &[]);
        assert_eq!((status, lines[1].as_str()), (StatusCode::OK, "3 events were lost in the last second"));

        let (status, lines) = readiness(&ready, Duration::from_secs(9), &[]);
        assert_eq!((status, lines[0].as_str()), (StatusCode::SERVICE_UNAVAILABLE, "not ready"));
        assert_eq!(readiness(&HostView::default(), STALE, &[]).0, StatusCode::SERVICE_UNAVAILABLE);
    }
}

//! HTTP: metrics and health over TCP, and over the control socket also what concerns single processes.

use std::{convert::Infallible, io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Body,
    extract::{Query, State, rejection::QueryRejection},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
    serve::Listener,
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use plumb_common::task::ProcKey;
use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, unix},
    sync::{mpsc, watch},
    task::JoinSet,
    time,
};
use tokio_util::sync::CancellationToken;

use crate::{
    ask::{Asker, Request},
    clock::{self, Calendar},
    decode::Event,
    document::{Leaks, Processes},
    export::prometheus::{self, Own},
    follow::Who,
    line::{self, Line},
    observe::Input,
    peer::Connection,
    say,
    services::{self, Services},
    subscribe::{self, Item, Subscribers, Subscription},
    supervisor::{self, Workers},
    view::HostView,
};

/// Without a pass for this long the agent is blind.
const STALE: Duration = Duration::from_secs(5);
/// Canaries in a row, one a second, that must be missing before the fd events count as broken: one may be
/// delayed by a flood.
const CANARIES: u32 = 2;
/// Without a pass for this long the observer hangs; one that fails is started again by its supervisor.
const HUNG: Duration = Duration::from_secs(30);

/// After a connection that could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the handlers read.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    pub views: watch::Receiver<Arc<HostView>>,
    pub workers: Workers,
    pub own: Own,
    /// When the workers were started, nanoseconds since boot.
    pub started: u64,
}

/// What a listener grants its clients: anybody may connect to it, and each connection costs an fd.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Connections at a time; further ones wait in the kernel's backlog.
    pub connections: usize,
    /// From the connection, or from the answer before, to the last byte of a request's head.
    pub head: Duration,
    /// From the connection to its end, but for the request under way.
    pub life: Duration,
    /// For the request under way when the life of its connection or the agent ends.
    pub grace: Duration,
}

impl Limits {
    /// `head` is half of what Prometheus waits for an answer: a scrape gets through even when idle
    /// clients hold all places.
    pub(crate) const AGENT: Self = Self {
        connections: 64,
        head: Duration::from_secs(5),
        life: Duration::from_secs(30),
        grace: Duration::from_secs(1),
    };

    /// On the control socket, which only root may open, an event stream lives as long as its reader.
    pub(crate) const CONTROL: Self = Self { life: Duration::MAX, ..Self::AGENT };
}

/// Serves until it is told to stop; requests under way have `grace` to be finished.
pub(crate) async fn serve<L: Listener>(
    mut listener: L,
    router: impl Fn(&L::Io) -> Router,
    limits: Limits,
    stop: CancellationToken,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => {}
            (stream, _) = listener.accept(), if connections.len() < limits.connections => {
                let router = router(&stream);
                connections.spawn(connection(stream, router, limits, stop.clone()));
            }
        }
    }
    while connections.join_next().await.is_some() {}
}

/// Serves one connection. What goes wrong on it concerns nobody but its client.
async fn connection<S>(stream: S, router: Router, limits: Limits, stop: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(limits.head);
    let mut served = pin!(http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)));
    tokio::select! {
        _ = served.as_mut() => return,
        () = time::sleep(limits.life) => {}
        () = stop.cancelled() => {}
    }
    served.as_mut().graceful_shutdown();
    let _ = time::timeout(limits.grace, served).await;
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
    type Io = Connection;
    type Addr = unix::SocketAddr;

    async fn accept(&mut self) -> (Connection, unix::SocketAddr) {
        let (stream, address) = accepted(|| self.0.accept()).await;
        (Connection::new(stream), address)
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
                time::sleep(ACCEPT_PAUSE).await;
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

/// What an event stream needs beyond that, and who hears what is said about findings.
#[derive(Clone, Debug)]
pub(crate) struct Events {
    pub subscribers: Subscribers,
    /// To the observer.
    pub requests: Asker,
    /// To the table's owner.
    pub inputs: mpsc::Sender<Input>,
}

/// For whoever may open the control socket.
pub(crate) fn control(shared: Shared, events: Events, services: Services) -> Router {
    let say = say::router(events.inputs.clone());
    let streams = Router::new().route("/v1/events", get(stream)).with_state((shared.clone(), events));
    Router::new()
        .route("/v1/leaks", get(leaks))
        .route("/v1/processes", get(processes))
        .with_state(shared.clone())
        .merge(streams)
        .merge(say)
        .merge(services::router(services))
        .merge(public(shared))
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

/// The table of the last pass.
async fn processes(State(shared): State<Shared>) -> Json<Processes> {
    let view = Arc::clone(&shared.views.borrow());
    Json(Processes::new(&view.rows, Calendar::now()))
}

/// Whose events a stream is about.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    /// Everybody's without.
    pid: Option<u32>,
}

/// Events as they happen, one object per line, until the client or the process ends.
async fn stream(
    State((mut shared, events)): State<(Shared, Events)>,
    asked: Result<Query<Asked>, QueryRejection>,
) -> Response {
    let refuse = |status: StatusCode, text: String| (status, text + "\n").into_response();
    let asked = match asked {
        Ok(Query(asked)) => asked,
        Err(error) => return refuse(StatusCode::BAD_REQUEST, format!("{error}; GET /v1/events?pid=N")),
    };
    let who = match asked.pid {
        None => Who::Everybody,
        Some(pid) => match process(&mut shared.views, pid).await {
            Some(key) => Who::Process(key),
            None if shared.views.borrow().untracked.processes > 0 => {
                let why = format!("no process that is followed one by one has pid {pid}: see max_processes");
                return refuse(StatusCode::SERVICE_UNAVAILABLE, why);
            }
            None => return refuse(StatusCode::NOT_FOUND, format!("no process has pid {pid}")),
        },
    };
    match events.subscribers.add(who) {
        None => refuse(StatusCode::SERVICE_UNAVAILABLE, "too many listen already".to_owned()),
        Some(subscription) => {
            let lines = Lines::begin(subscription, events.requests, shared.views);
            let body = futures_util::stream::unfold(lines, |mut lines| async {
                let page = lines.next().await?;
                Some((Ok::<_, Infallible>(page), lines))
            });
            ([(header::CONTENT_TYPE, "application/jsonl")], Body::from_stream(body)).into_response()
        }
    }
}

/// The process of a pid; one that has just begun is in the next pass.
async fn process(views: &mut watch::Receiver<Arc<HostView>>, pid: u32) -> Option<ProcKey> {
    for _ in 0..2 {
        let found = |view: &HostView| view.rows.iter().find(|row| row.key.tgid == pid).map(|row| row.key);
        if let Some(key) = found(&views.borrow_and_update()) {
            return Some(key);
        }
        views.changed().await.ok()?;
    }
    None
}

/// A stream in words. What it follows is released when its reader goes.
struct Lines {
    subscription: Subscription,
    requests: Asker,
    views: watch::Receiver<Arc<HostView>>,
    calendar: Calendar,
    /// Passes when the process had exited. What was lost before that, the next one tells.
    exited: Option<u64>,
    ended: bool,
}

impl Lines {
    fn begin(subscription: Subscription, requests: Asker, views: watch::Receiver<Arc<HostView>>) -> Self {
        requests.ask(Request::Follow(subscription.who));
        Self { subscription, requests, views, calendar: Calendar::now(), exited: None, ended: false }
    }

    async fn next(&mut self) -> Option<String> {
        let who = self.subscription.who;
        let mut page = String::new();
        while page.is_empty() && !self.ended {
            tokio::select! {
                // What has happened comes before its end.
                biased;
                item = self.subscription.next() => {
                    let item = item?;
                    // Each opened file is asked of /proc: nobody else on this thread shall wait for that.
                    page = tokio::task::block_in_place(|| self.words(&item));
                }
                changed = self.views.changed() => {
                    changed.ok()?;
                    // An exit event may be lost; a process that no pass shows has ended all the same.
                    let view = self.views.borrow_and_update();
                    let is_there = view.rows.iter().any(|row| who == Who::Everybody || who == Who::Process(row.key));
                    self.ended = !is_there || self.exited.is_some_and(|passes| passes < view.passes);
                }
            }
        }
        if self.ended
            && let Some(gap) = self.subscription.untold()
        {
            page += &self.words(&gap);
        }
        (!page.is_empty()).then_some(page)
    }

    fn words(&mut self, item: &Item) -> String {
        let events = match item {
            Item::Gap(lost) => return line::gap(*lost, "reader") + "\n",
            Item::Lost(lost) => return line::gap(*lost, "kernel") + "\n",
            Item::Events(events) => events,
        };
        let who = self.subscription.who;
        let mut page = String::new();
        for event in events.iter().filter(|event| subscribe::is_about(event, who)) {
            page += &Line::new(event, self.calendar, None).json();
            page.push('\n');
            if matches!(event, Event::Exit(exit)
                if exit.group_dead != 0 && who == Who::Process(exit.header.process))
            {
                self.exited = Some(self.views.borrow().passes);
            }
        }
        page
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        self.requests.ask(Request::Unfollow(self.subscription.who));
    }
}

/// Whether restarting the agent would help.
async fn healthz(State(shared): State<Shared>) -> (StatusCode, String) {
    let (passed, now) = (shared.views.borrow().time, clock::boottime());
    health(passed, shared.started, now, not_running(&shared.workers))
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

/// `passed` is 0 before the first pass; all times are nanoseconds since boot.
fn health(passed: u64, started: u64, now: u64, mut failing: Vec<String>) -> (StatusCode, String) {
    let age = Duration::from_nanos(now.saturating_sub(passed.max(started)));
    if age > HUNG {
        failing.push(format!("no pass over the processes for {} s", age.as_secs()));
    }
    if failing.is_empty() {
        (StatusCode::OK, "ok\n".to_owned())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, format!("failing: {}\n", failing.join(", ")))
    }
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
    for status in view.programs.iter().filter(|status| !status.is_fine()) {
        let (name, gives) = (status.program.name, status.program.gives);
        lines.push(format!(
            "program {name} is {}: no {gives} ({})",
            status.verdict.word(),
            status.verdict.explain()
        ));
    }
    let following = view.following;
    if following.canary_missed >= CANARIES {
        lines.push(format!(
            "fd programs are attached but nothing is seen of them for {} s",
            following.canary_missed
        ));
    }
    if view.untracked.processes > 0 {
        lines.push(format!(
            "{} processes are beyond the bound and counted in sum only",
            view.untracked.processes
        ));
    }
    if following.refused > 0 {
        lines.push(format!("{} processes are not watched: there is no room", following.refused));
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
    use std::time::Instant;

    use axum::body::Bytes;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        sync::Notify,
    };

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

    #[test]
    fn an_observer_that_hangs_is_worth_a_restart() {
        let second = |number: u64| number * 1_000_000_000;
        let ok = (StatusCode::OK, "ok\n".to_owned());
        let hung =
            (StatusCode::SERVICE_UNAVAILABLE, "failing: no pass over the processes for 31 s\n".to_owned());
        // Passed, started, now: without any pass the start counts.
        assert_eq!(health(0, second(100), second(130), Vec::new()), ok);
        assert_eq!(health(0, second(100), second(131), Vec::new()), hung);
        assert_eq!(health(second(200), second(100), second(230), Vec::new()), ok);
        assert_eq!(health(second(200), second(100), second(231), Vec::new()), hung);
        // A pass may end between the two readings.
        assert_eq!(health(second(201), second(100), second(200), Vec::new()), ok);

        let (status, text) =
            health(second(200), second(100), second(201), vec!["worker x is stopped".into()]);
        assert_eq!(
            (status, text.as_str()),
            (StatusCode::SERVICE_UNAVAILABLE, "failing: worker x is stopped\n")
        );
    }

    /// For whoever takes part in a test and is not what it limits.
    const LONG: Duration = Duration::from_secs(60);
    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: plumb\r\nConnection: close\r\n\r\n";
    const HALF: &[u8] = b"GET / HTTP/1.1\r\nHost: plumb\r\nX-Slow: ";

    /// Serves on a port of its own.
    async fn start(router: Router, limits: Limits) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = move |_: &_| router.clone();
        tokio::spawn(serve(Tcp(Arc::new(listener)), router, limits, CancellationToken::new()));
        address
    }

    async fn client(address: SocketAddr, sends: &[u8]) -> TcpStream {
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(sends).await.unwrap();
        client
    }

    /// All that comes until the other side closes.
    async fn answer(mut client: TcpStream) -> String {
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn idle_clients_and_a_half_sent_request_hold_their_places_for_a_bounded_time() {
        let head = Duration::from_millis(300);
        let limits = Limits { connections: 64, head, life: LONG, grace: LONG };
        let address = start(Router::new().route("/", get(index)), limits).await;
        let began = Instant::now();
        let mut slow = vec![client(address, HALF).await];
        for _ in 0..100 {
            slow.push(client(address, b"").await);
        }
        let answer = answer(client(address, REQUEST).await).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let took = began.elapsed();
        assert!(took >= head, "{took:?}: more than 64 were served at a time");
        assert!(took < LONG / 2, "{took:?}");
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_its_answer_is_cut_off() {
        // More than the socket buffers on both sides keep.
        let page = Bytes::from(vec![b' '; 64 << 20]);
        let life = Duration::from_millis(300);
        let limits = Limits { connections: 1, head: LONG, life, grace: life };
        let router = Router::new().route("/", get(index)).route("/page", get(async move || page.clone()));
        let address = start(router, limits).await;
        let began = Instant::now();
        let _slow = client(address, b"GET /page HTTP/1.1\r\nHost: plumb\r\n\r\n").await;
        let answer = answer(client(address, REQUEST).await).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let took = began.elapsed();
        assert!(took >= life * 2 && took < LONG / 2, "{took:?}");
    }

    #[tokio::test]
    async fn a_stop_lets_requests_end_but_does_not_wait_for_slow_clients() {
        let grace = Duration::from_millis(700);
        let limits = Limits { connections: 64, head: LONG, life: LONG, grace };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (asked, stop) = (Arc::new(Notify::new()), CancellationToken::new());
        let asks = Arc::clone(&asked);
        let router = Router::new().route(
            "/",
            get(async move || {
                asks.notify_one();
                time::sleep(Duration::from_millis(50)).await;
                "late"
            }),
        );
        let serving =
            tokio::spawn(serve(Tcp(Arc::new(listener)), move |_| router.clone(), limits, stop.clone()));
        let _slow = client(address, HALF).await;
        let _idle = client(address, b"").await;
        let under_way = client(address, REQUEST).await;
        asked.notified().await;
        let began = Instant::now();
        stop.cancel();
        let answer = answer(under_way).await;
        assert!(answer.ends_with("late"), "{answer}");
        serving.await.unwrap();
        let took = began.elapsed();
        assert!(took >= grace && took < LONG / 2, "{took:?}");
    }
}

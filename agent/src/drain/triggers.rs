//! What drains all services without anybody asking over a socket.

use std::time::Duration;

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot, watch},
};

use super::{
    command::{Asked, Command, View},
    registry::Caller,
    report::State,
    systemd::{Inhibitor, Logind},
};

/// Of the time that logind grants, for the agent itself.
const MARGIN: Duration = Duration::from_millis(500);

/// USR1 drains all, for other init systems and for preStop hooks.
pub(crate) async fn on_usr1(drain: &mpsc::Sender<Command>) {
    let Ok(mut asked) = signal(SignalKind::user_defined1()) else { return std::future::pending().await };
    while asked.recv().await.is_some() {
        ask(drain, "USR1", None).await;
    }
    std::future::pending::<()>().await;
}

async fn ask(drain: &mpsc::Sender<Command>, trigger: &str, deadline: Option<Duration>) -> bool {
    let asked = Asked { names: None, deadline, trigger: trigger.to_owned(), caller: Caller::AGENT };
    let (reply, answer) = oneshot::channel();
    let sent = drain.send(Command::Drain(asked, reply)).await;
    match (sent, answer.await) {
        (Ok(()), Ok(Ok(_))) => true,
        (Ok(()), Ok(Err(why))) => {
            tracing::error!("the drain on {trigger} was refused: {why}");
            false
        }
        _ => false,
    }
}

/// Drains all, and waits until that has ended.
pub(crate) async fn all(
    drain: &mpsc::Sender<Command>,
    mut views: watch::Receiver<View>,
    trigger: &str,
    deadline: Option<Duration>,
) {
    if ask(drain, trigger, deadline).await {
        let is_over = |view: &View| view.drain.as_ref().is_some_and(|drain| drain.state != State::Running);
        // The agent is gone only if it has failed: the drain has a deadline of its own.
        let _ = views.wait_for(is_over).await;
    }
}

/// The shutdown of the host drains all, and waits for that as long as logind lets it.
pub(crate) async fn on_shutdown(
    drain: &mpsc::Sender<Command>,
    views: watch::Receiver<View>,
    deadline: Duration,
) {
    let watched = async {
        let logind = Logind::connect().await.map_err(|error| error.to_string())?;
        let taken = Inhibitor::take(&logind, "registered services are drained first").await;
        let inhibitor = taken.map_err(|error| error.to_string())?;
        let granted = logind.max_delay().await.map_err(|error| error.to_string())?;
        if granted < deadline {
            tracing::warn!(
                "logind delays a shutdown by {} s at most, and a drain may take {} s: raise InhibitDelayMaxSec=",
                granted.as_secs(),
                deadline.as_secs()
            );
        }
        logind.prepare_for_shutdown().await.map_err(|error| error.to_string())?;
        Ok::<_, String>((inhibitor, deadline.min(granted.saturating_sub(MARGIN))))
    };
    match watched.await {
        Ok((inhibitor, deadline)) => {
            all(drain, views, "shutdown of the host", Some(deadline)).await;
            drop(inhibitor);
        }
        Err(why) => tracing::info!("a shutdown of the host drains nothing: {why}"),
    }
    std::future::pending::<()>().await;
}

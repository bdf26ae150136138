//! What drains all services without anybody asking over a socket.

use std::{io, time::Duration};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Mutex, mpsc, oneshot, watch},
    time::{Instant, sleep, timeout},
};

use super::{
    command::{Asked, Command, View},
    registry::{Caller, Refusal},
    report::State,
    systemd::{Inhibitor, Logind, STOPPING, Systemd},
};

/// Of the time that logind grants, for the report of the drain and the agent itself.
const MARGIN: Duration = Duration::from_secs(1);
/// The kernel's word of an end comes so long after it.
const LAST_WORDS: Duration = Duration::from_millis(250);
/// First and longest wait before logind is asked again; doubled in between.
const BACK_OFF: Duration = Duration::from_millis(100);
const MAX_BACK_OFF: Duration = Duration::from_secs(30);
/// An agent that is told to end has better things to do than to wait for systemd.
const ANSWER: Duration = Duration::from_secs(2);
/// What a report says of a drain that the shutdown has begun.
const SHUTDOWN: &str = "shutdown of the host";

/// From now on USR1 does not end the agent.
pub(crate) fn usr1() -> io::Result<Usr1> {
    signal(SignalKind::user_defined1()).map(Usr1)
}

/// The USR1 that the agent gets.
#[derive(Debug)]
pub(crate) struct Usr1(tokio::signal::unix::Signal);

/// USR1 drains all, for other init systems and for preStop hooks.
pub(crate) async fn on_usr1(drain: &mpsc::Sender<Command>, Usr1(mut asked): Usr1) {
    while asked.recv().await.is_some() {
        if let Err(why) = ask(drain, "USR1", None).await {
            refused("USR1", &why);
        }
    }
    std::future::pending::<()>().await;
}

fn refused(trigger: &str, why: &Refusal) {
    tracing::error!("the drain on {trigger} was refused: {why}");
}

/// Begins a drain of all, or joins one that has begun. The agent is gone only if it has failed.
async fn ask(
    drain: &mpsc::Sender<Command>,
    trigger: &str,
    deadline: Option<Duration>,
) -> Result<(), Refusal> {
    let asked = Asked { names: None, deadline, trigger: trigger.to_owned(), caller: Caller::AGENT };
    let (reply, answer) = oneshot::channel();
    let _ = drain.send(Command::Drain(asked, reply)).await;
    answer.await.map_or(Ok(()), |answer| answer.map(drop))
}

/// Drains all, and waits until that has ended and its report is kept. One of some services, which is under way, begins
/// no other stage and is waited for; the driver gives one up that a user has begun.
pub(crate) async fn all(
    drain: &mpsc::Sender<Command>,
    mut views: watch::Receiver<View>,
    trigger: &str,
    deadline: Option<Duration>,
) {
    let is_over = |view: &View| view.drain.as_ref().is_none_or(|drain| drain.state != State::Running);
    let began = Instant::now();
    loop {
        let left = deadline.map(|deadline| deadline.saturating_sub(began.elapsed()));
        match ask(drain, trigger, left).await {
            Ok(()) => break,
            Err(Refusal::UnderWay(other, _)) => {
                tracing::warn!("the drain {other} begins no other stage: {trigger}");
                let (reply, answer) = oneshot::channel();
                let _ = drain.send(Command::Cancel(Caller::AGENT, reply)).await;
                let _ = answer.await;
                // Nobody waits for longer than it may take.
                if views.wait_for(is_over).await.is_err() {
                    return;
                }
            }
            Err(why) => return refused(trigger, &why),
        }
    }
    let _ = views.wait_for(is_over).await;
    sleep(LAST_WORDS).await;
    settle(drain).await;
}

/// A drain that has ended is over, and its report is kept.
async fn settle(drain: &mpsc::Sender<Command>) {
    let (reply, kept) = oneshot::channel();
    let _ = drain.send(Command::Settle(reply)).await;
    let _ = kept.await;
}

/// The shutdown of the host, which drains all services once.
#[derive(Debug)]
pub(crate) struct Shutdown {
    drain: mpsc::Sender<Command>,
    views: watch::Receiver<View>,
    deadline: Duration,
    is_drained: Mutex<bool>,
}

impl Shutdown {
    pub(crate) fn new(
        drain: mpsc::Sender<Command>,
        views: watch::Receiver<View>,
        deadline: Duration,
    ) -> Self {
        Self { drain, views, deadline, is_drained: Mutex::new(false) }
    }

    /// Waits for it for ever: logind holds it back; where there is none systemd tells that it has begun.
    pub(crate) async fn wait(&self) {
        let (mut back_off, mut said) = (BACK_OFF, String::new());
        loop {
            let began = Instant::now();
            let why = self.held_back().await;
            if began.elapsed() > MAX_BACK_OFF {
                (back_off, said) = (BACK_OFF, String::new());
            }
            if said != why {
                tracing::info!("{why}; logind is asked again");
                said = why;
            }
            tokio::select! {
                () = sleep(back_off) => {}
                () = stopping() => self.drain(self.deadline).await,
            }
            back_off = MAX_BACK_OFF.min(back_off * 2);
        }
    }

    /// As long as logind is there, and why it is not.
    async fn held_back(&self) -> String {
        let held = async {
            let logind = Logind::connect().await.map_err(|error| error.to_string())?;
            loop {
                let taken = Inhibitor::take(&logind, "registered services are drained first").await;
                let inhibitor = taken.map_err(|error| error.to_string())?;
                let granted = logind.max_delay().await.map_err(|error| error.to_string())?;
                tracing::info!("a shutdown of the host is held back for {} s at most", granted.as_secs());
                if granted.saturating_sub(MARGIN) < self.deadline {
                    tracing::warn!(
                        "logind delays a shutdown by {} s at most, and a drain may take {} s and 1 s for its report: \
                         raise InhibitDelayMaxSec=",
                        granted.as_secs(),
                        self.deadline.as_secs()
                    );
                }
                logind.prepare_for_shutdown().await.map_err(|error| error.to_string())?;
                self.drain(self.deadline.min(granted.saturating_sub(MARGIN))).await;
                drop(inhibitor);
                logind.called_off().await.map_err(|error| error.to_string())?;
                *self.is_drained.lock().await = false;
            }
        };
        let ended: Result<std::convert::Infallible, String> = held.await;
        match ended {
            Ok(never) => match never {},
            Err(why) => why,
        }
    }

    async fn drain(&self, deadline: Duration) {
        let mut is_drained = self.is_drained.lock().await;
        if !*is_drained {
            all(&self.drain, self.views.clone(), SHUTDOWN, Some(deadline)).await;
            *is_drained = true;
        }
    }

    /// The agent is told to end: drains all if that is because the host goes down, unless that was done.
    pub(crate) async fn at_end(&self) {
        let (has_services, is_unfinished) = {
            let view = self.views.borrow();
            (view.services > 0, view.drain.as_ref().is_some_and(|drain| drain.state != State::Finished))
        };
        if !(has_services || is_unfinished) || !timeout(ANSWER, is_stopping()).await.unwrap_or(false) {
            return;
        }
        if has_services {
            self.drain(self.deadline).await;
        } else {
            settle(&self.drain).await;
        }
    }
}

async fn is_stopping() -> bool {
    let Ok(systemd) = Systemd::connect().await else { return false };
    systemd.state().await.is_ok_and(|state| state == STOPPING)
}

/// Resolves when systemd has begun to stop the host; never where it does not answer.
async fn stopping() {
    if let Ok(systemd) = Systemd::connect().await
        && systemd.stopping().await.is_ok()
    {
        return;
    }
    std::future::pending::<()>().await;
}

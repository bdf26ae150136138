//! What the driver is asked, and what it answers.

use std::{collections::VecDeque, path::PathBuf, sync::Arc, time::Duration};

use tokio::sync::oneshot;

use super::{
    course::Found,
    grants,
    order::Stage,
    process::Process,
    registry::{Caller, Refusal},
    report::Document,
    service::{Name, Service},
};

/// What the driver is asked.
#[derive(Debug)]
pub(crate) enum Command {
    Add(Box<Registration>, Reply<Service>),
    /// Answers whether it is in the settings, and so there again with the next agent.
    Remove(Name, Caller, Reply<bool>),
    List(Caller, oneshot::Sender<Vec<Listed>>),
    Plan(Asked, Reply<Plan>),
    /// Answers as soon as the drain has begun, or with the one that is under way, and whether it is that.
    Drain(Asked, Reply<(String, bool)>),
    /// A service says how many requests it works on.
    InFlight(Name, u64, Caller, oneshot::Sender<Result<(), Refusal>>),
    Cancel(Caller, Reply<()>),
    /// Whether something comes back is looked at now and no more, if the drain has ended: answers when its report is
    /// kept.
    Settle(oneshot::Sender<()>),
}

type Reply<T> = oneshot::Sender<Result<T, Refusal>>;

/// A service that registers itself, or is registered by somebody.
#[derive(Debug)]
pub(crate) struct Registration {
    /// Without its target.
    pub service: Service,
    pub process: Process,
    pub caller: Caller,
}

/// A drain that is asked for.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    /// `None`: all that are the caller's.
    pub names: Option<Vec<Name>>,
    /// Of the whole drain.
    pub deadline: Option<Duration>,
    pub trigger: String,
    pub caller: Caller,
}

/// A registered service, and whether it runs.
#[derive(Clone, Debug)]
pub(crate) struct Listed {
    pub service: Service,
    pub pids: Vec<u32>,
    pub problem: Option<String>,
}

/// What a drain would do.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub deadline: Duration,
    pub stages: Vec<Stage>,
    pub services: Vec<(Service, Preflight)>,
    /// Time of each stage if the ones before it use all of theirs.
    pub grants: Vec<grants::Stage>,
}

/// What was found of a service.
#[derive(Clone, Debug)]
pub(crate) enum Preflight {
    Found(Found),
    NotRunning,
    Refused(String),
}

/// How the driver is set up.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub services: Vec<Service>,
    pub deadline: Duration,
    /// Of the journal and the registrations, which are for the next agent of this boot: in memory, no disk delays a stop.
    pub run_dir: PathBuf,
    /// Of the reports; without it only the last one is there, as long as the agent.
    pub state_dir: Option<PathBuf>,
    pub boot_id: String,
    /// Why nothing can be drained here.
    pub refused: Option<String>,
}

/// What others see: the drain under way or the last one, with a number that grows with each change.
#[derive(Clone, Debug, Default)]
pub(crate) struct View {
    pub generation: u64,
    pub drain: Option<Arc<Document>>,
    /// The last ones that are over, the newest first: another one may begin before those who wait have heard of the end.
    pub past: VecDeque<Arc<Document>>,
    pub services: usize,
}

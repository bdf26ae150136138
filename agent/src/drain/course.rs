//! What can happen in a drain and what is to be done then, and where a service is in its course.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    grants::Wish,
    identity::Identity,
    service::{Service, Signal},
};
use crate::{left::Left, losses::Class};

/// A drain as it was asked for. Times are nanoseconds since boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Begun {
    pub id: String,
    /// Times and pids mean nothing after another boot.
    pub boot_id: String,
    /// Who or what asked.
    pub trigger: String,
    pub uid: u32,
    pub began: u64,
    pub deadline: u64,
    /// Places in `services`.
    pub stages: Vec<Vec<usize>>,
    pub services: Vec<Service>,
    /// Places of those that did not run: nobody leaves them time before it is their turn.
    #[serde(default)]
    pub absent: Vec<usize>,
}

impl Begun {
    /// What the services of a stage ask for, and those of the later ones.
    pub(super) fn wishes(&self, first: usize) -> Vec<Vec<Wish>> {
        let wishes = |(at, stage): (usize, &Vec<usize>)| -> Vec<Wish> {
            let asks = |service: &&usize| at == first || !self.absent.contains(service);
            stage.iter().filter(asks).map(|service| self.services[*service].wish()).collect()
        };
        let stages = self.stages.iter().enumerate().skip(first).map(wishes);
        stages.filter(|stage| !stage.is_empty()).collect()
    }
}

/// A process of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Member {
    pub identity: Identity,
    /// Gets the signal; the others are its children, and are waited for.
    pub is_root: bool,
    /// The service does not name it, but one that has started it: it does not get KILL either.
    #[serde(default)]
    pub is_descendant: bool,
    /// Its arguments, by which it is known when it runs again.
    pub command: String,
}

/// What was found of a service, and what pre-flight says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Found {
    pub members: Vec<Member>,
    /// The systemd unit through which it is stopped.
    pub unit: Option<String>,
    pub notes: Vec<String>,
    /// It has started processes that are not followed: too many, or some that could not be looked at.
    #[serde(default)]
    pub leaves_out: bool,
    /// Established TCP connections.
    pub connections: usize,
    /// Of these, with data under way.
    #[serde(default)]
    pub busy: usize,
    /// Nothing handles the signal: it ends the process by itself.
    pub is_unhandled: bool,
    /// On which it listens.
    #[serde(default)]
    pub ports: Vec<u32>,
    /// These are all.
    #[serde(default)]
    pub knows_ports: bool,
    /// By which systemd asks the unit to stop.
    #[serde(default)]
    pub kill_signal: Option<i32>,
}

/// What came of asking systemd to stop a unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum UnitEnd {
    /// It is stopped, and how systemd calls its end (`Result=`): "success", "exit-code", "timeout" and more.
    Stopped(String),
    /// systemd does not do it.
    Refused(String),
    /// What became of it is not known.
    Unknown(String),
}

/// What the kernel says of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Fact {
    /// Status of a process as wait(2) has it, and when it ended.
    Exit { member: usize, status: i32, time: u64 },
    /// A thread of it takes a signal: by a handler, by default, or to ignore it.
    Taken { at: u64, signal: i32, how: String },
    /// Somebody else than plumb sent KILL.
    Killed { at: u64, by: String },
    /// The kernel killed it because there was no memory.
    NoMemory { at: u64 },
    /// A process that it has started crashed, or got KILL, and was none of those that were found.
    ChildDied { at: u64, signal: i32 },
    /// It listens on a port no longer; so many connections were waiting to be accepted.
    Listener {
        at: u64,
        port: u32,
        #[serde(default)]
        is_ipv6: bool,
        waiting: u32,
    },
    /// Requests that are lost; of some of them that is told from the kernel's clocks.
    Lost { requests: BTreeMap<Class, u64>, guessed: u64, examples: Vec<LostRequest> },
    /// How often what happened to its connections, while it was drained.
    Counted { counts: BTreeMap<String, u64> },
    /// It says itself how many requests it is working on.
    InFlight { at: u64, requests: u64 },
    /// Something may have happened that nobody saw; with `strays` one of its processes may be left that nobody knows.
    Unseen {
        why: String,
        #[serde(default)]
        strays: bool,
    },
    /// What was left of it just before it was given up, and what is not known of that.
    Left { left: Vec<Left>, unknown: Option<String> },
}

/// A request that is lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LostRequest {
    /// Nanoseconds since boot.
    pub at: u64,
    pub class: Class,
    /// Address and port of who asked.
    pub peer: String,
    pub unread_bytes: u32,
    pub unsent_bytes: u32,
}

/// Why a signal was not sent to one process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum NotSent {
    Gone,
    Refused(String),
}

/// What is found of a service when all that were known of it have gone.
#[derive(Clone, Debug)]
pub(crate) struct Rest {
    /// What it has started, and is left.
    pub members: Vec<Member>,
    /// On which these listen.
    pub ports: Vec<u32>,
    /// These are all.
    pub knows_ports: bool,
    /// What runs in its place.
    pub again: Option<String>,
    /// What could not be looked at.
    pub unseen: Option<String>,
}

impl Default for Rest {
    fn default() -> Self {
        Self { members: Vec::new(), ports: Vec::new(), knows_ports: true, again: None, unseen: None }
    }
}

fn yes() -> bool {
    true
}

/// What has happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Entry {
    Begun(Box<Begun>),
    /// Who has got which signal by a drain that was given up for this one, and does not get it again.
    Before {
        signalled: Vec<(Identity, i32)>,
    },
    Resumed {
        at: u64,
    },
    Cancelled {
        at: u64,
    },
    /// Nothing is waited for any longer, and why.
    GivenUp {
        at: u64,
        why: String,
    },
    /// With the time of each of its services, and the words for it where that is less than it asked for.
    Stage {
        at: u64,
        stage: usize,
        grants: Vec<(Duration, Option<String>)>,
    },
    Refused {
        at: u64,
        service: usize,
        why: String,
    },
    NotRunning {
        at: u64,
        service: usize,
    },
    /// Its stage came when no time was left.
    NoTime {
        at: u64,
        service: usize,
    },
    Prestop {
        at: u64,
        service: usize,
    },
    PrestopEnded {
        at: u64,
        service: usize,
        why: Option<String>,
    },
    Found {
        at: u64,
        service: usize,
        found: Box<Found>,
    },
    /// A signal is about to be sent to these members; to none if all have it from the drain before.
    Signalling {
        at: u64,
        service: usize,
        members: Vec<usize>,
        signal: i32,
    },
    Signalled {
        at: u64,
        service: usize,
        failed: Vec<(usize, NotSent)>,
    },
    /// systemd is about to be asked to stop the unit.
    UnitStopping {
        at: u64,
        service: usize,
        unit: String,
    },
    /// It has, with its word for the end; or it is not known, and why.
    UnitStopped {
        at: u64,
        service: usize,
        #[serde(default)]
        result: Option<String>,
        why: Option<String>,
    },
    Gone {
        at: u64,
        service: usize,
        member: usize,
    },
    /// Children that were started after the service was found, and the ports on which they listen.
    More {
        at: u64,
        service: usize,
        members: Vec<Member>,
        #[serde(default)]
        ports: Vec<u32>,
        /// These are all.
        #[serde(default = "yes")]
        knows_ports: bool,
    },
    /// None of its processes is left.
    AllGone {
        at: u64,
        service: usize,
    },
    Seen {
        at: u64,
        service: usize,
        fact: Fact,
    },
    /// Its deadline has passed and it is there.
    Late {
        at: u64,
        service: usize,
    },
    /// It runs again.
    Again {
        at: u64,
        service: usize,
        what: String,
    },
    Settled {
        at: u64,
        service: usize,
    },
    Ended {
        at: u64,
    },
    Finished {
        at: u64,
    },
}

/// What the driver tells.
#[derive(Clone, Debug)]
pub(crate) enum Input {
    Resume,
    /// No other stage begins.
    Cancel,
    /// And those that have begun are waited for no longer; why.
    GiveUp(String),
    /// It is as late as `next` said.
    Time,
    /// Answers to `Find`.
    Found(usize, Found),
    NotRunning(usize),
    Refused(usize, String),
    /// The answer to `Prestop`, and why it failed.
    PrestopEnded(usize, Option<String>),
    /// The answer to `Send`: to whom it was not sent.
    Sent(usize, Vec<(usize, NotSent)>),
    /// The answer to `StopUnit` and `FindUnit`.
    Unit(usize, UnitEnd),
    Gone(usize, usize),
    /// The answer to `Look`.
    Looked(usize, Rest),
    Seen(usize, Fact),
}

/// What the driver is to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Written, and on the disk before what follows.
    Journal(Entry),
    /// Find the processes of a service and check them.
    Find(usize),
    /// Run the command of a service.
    Prestop(usize),
    EndPrestop(usize),
    Send {
        service: usize,
        members: Vec<usize>,
        signal: i32,
    },
    StopUnit(usize, String),
    /// What has become of a unit that was asked to stop, and is not asked again.
    FindUnit(usize, String),
    /// Say when a member goes; those that are gone already, at once.
    Watch(usize),
    /// Whether processes of a service are there although those that were known are gone.
    Look(usize),
}

/// Where a service is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Waiting,
    Checking,
    Prestop,
    Stopping,
    /// All that were known are gone.
    Confirming,
    Killing,
    Gone,
    Late,
    Settled,
}

/// Whether a member has got its signal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Sent {
    #[default]
    Not,
    /// It was announced, and the agent ended before it could say more.
    Perhaps,
    Yes,
    Failed(NotSent),
}

#[derive(Clone, Debug)]
pub(crate) struct MemberRun {
    pub member: Member,
    pub sent: Sent,
    pub gone: Option<u64>,
    /// As wait(2) has it.
    pub status: Option<i32>,
    /// When it ended, by the kernel's word.
    pub exited: Option<u64>,
}

/// The course of one service.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub phase: Phase,
    pub grant: Duration,
    pub notes: Vec<String>,
    pub members: Vec<MemberRun>,
    /// Those that were found before `prestop`, and not after it.
    pub earlier: Vec<MemberRun>,
    pub found: Found,
    pub prestopped: bool,
    /// Its stage began.
    pub began: u64,
    pub signalled: Option<u64>,
    pub signals: Vec<i32>,
    /// Of these, those that reached nobody: all had just gone.
    pub vain: Vec<i32>,
    /// By which it stops, whoever sends them.
    pub stops: Vec<i32>,
    pub gone: Option<u64>,
    pub refused: Option<String>,
    pub is_late: bool,
    /// Why it was not waited for until its deadline.
    pub given_up: Option<String>,
    /// When it got KILL from plumb.
    pub killed: Option<u64>,
    /// systemd is through with its unit, or cannot say.
    pub unit_stopped: bool,
    /// How systemd calls its end.
    pub unit_result: Option<String>,
    pub again: Option<String>,
    /// How often it was looked for after its end.
    pub looks: u8,
    /// What the kernel saw of it.
    pub seen: Seen,
    pub timeline: Vec<(u64, String)>,
}

/// What the kernel saw of a service.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    pub lost: BTreeMap<Class, u64>,
    /// Of these it was told from the kernel's clocks.
    pub guessed: u64,
    /// The first ones.
    pub examples: Vec<LostRequest>,
    /// Port, time since boot, and how many were waiting to be accepted.
    pub listeners: Vec<(u32, u64, u32)>,
    /// Signals that a thread of it has taken.
    pub taken: Vec<i32>,
    /// What ended one that it had started, which was none of its members.
    pub child_died: Option<i32>,
    /// Who has killed it, but plumb.
    pub killed_by: Option<String>,
    pub counts: BTreeMap<String, u64>,
    /// As it has said last, and how often it has.
    pub in_flight: Option<u64>,
    pub said: usize,
    /// Why there may be more.
    pub unseen: Vec<String>,
    /// One of its processes may be left that nobody knows.
    pub has_strays: bool,
    /// What was left of it just before it was given up.
    pub left: Vec<Left>,
    /// And what is not known of that.
    pub left_unknown: Option<String>,
}

impl Run {
    pub(super) fn new() -> Self {
        Self {
            phase: Phase::Waiting,
            grant: Duration::ZERO,
            notes: Vec::new(),
            members: Vec::new(),
            earlier: Vec::new(),
            found: Found::default(),
            prestopped: false,
            began: 0,
            signalled: None,
            signals: Vec::new(),
            stops: Vec::new(),
            vain: Vec::new(),
            gone: None,
            refused: None,
            is_late: false,
            given_up: None,
            killed: None,
            unit_stopped: false,
            unit_result: None,
            again: None,
            looks: 0,
            seen: Seen::default(),
            timeline: Vec::new(),
        }
    }

    /// Whether the next stage need not wait for it.
    pub(super) fn is_past(&self) -> bool {
        matches!(self.phase, Phase::Gone | Phase::Late | Phase::Settled)
    }

    pub(super) fn is_settled(&self) -> bool {
        matches!(self.phase, Phase::Late | Phase::Settled)
    }

    pub(super) fn deadline(&self) -> u64 {
        self.began + nanos(self.grant)
    }

    /// The signals that have reached one of its processes.
    pub(super) fn sent(&self) -> impl Iterator<Item = i32> {
        self.signals.iter().copied().filter(|signal| !self.vain.contains(signal))
    }

    /// Those that get KILL.
    pub(super) fn killable(&self) -> Vec<usize> {
        self.left(false).into_iter().filter(|at| !self.members[*at].member.is_descendant).collect()
    }

    /// Members that are there, as far as is known.
    pub(super) fn left(&self, only_roots: bool) -> Vec<usize> {
        let is_left = |one: &MemberRun| one.gone.is_none() && (one.member.is_root || !only_roots);
        (0..self.members.len()).filter(|at| is_left(&self.members[*at])).collect()
    }
}

pub(super) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

pub(super) fn of_member(member: Member) -> MemberRun {
    MemberRun { member, sent: Sent::Not, gone: None, status: None, exited: None }
}

/// As people write it.
#[must_use]
pub(crate) fn signal_name(signal: i32) -> String {
    const OTHERS: [(i32, &str); 24] = [
        (libc::SIGKILL, "KILL"),
        (libc::SIGSEGV, "SEGV"),
        (libc::SIGABRT, "ABRT"),
        (libc::SIGBUS, "BUS"),
        (libc::SIGPIPE, "PIPE"),
        (libc::SIGILL, "ILL"),
        (libc::SIGTRAP, "TRAP"),
        (libc::SIGFPE, "FPE"),
        (libc::SIGALRM, "ALRM"),
        (libc::SIGSTKFLT, "STKFLT"),
        (libc::SIGCHLD, "CHLD"),
        (libc::SIGCONT, "CONT"),
        (libc::SIGSTOP, "STOP"),
        (libc::SIGTSTP, "TSTP"),
        (libc::SIGTTIN, "TTIN"),
        (libc::SIGTTOU, "TTOU"),
        (libc::SIGURG, "URG"),
        (libc::SIGXCPU, "XCPU"),
        (libc::SIGXFSZ, "XFSZ"),
        (libc::SIGVTALRM, "VTALRM"),
        (libc::SIGPROF, "PROF"),
        (libc::SIGIO, "IO"),
        (libc::SIGPWR, "PWR"),
        (libc::SIGSYS, "SYS"),
    ];
    let other = || OTHERS.iter().find(|(number, _)| *number == signal).map(|(_, name)| *name);
    Signal::by_number(signal)
        .map(Signal::name)
        .or_else(other)
        .map_or_else(|| signal.to_string(), str::to_owned)
}

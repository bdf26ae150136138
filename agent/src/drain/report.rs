//! What came of a drain: one document, and the same for people.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    course::{Fact, Found, LostRequest, NotSent, Phase, Run, Sent, signal_name},
    grants,
    machine::Machine,
    service::Name,
};
use crate::{clock::Calendar, document::SCHEMA, left::Left, losses::Class};

/// What became of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Verdict {
    /// It ended by itself in time, and lost no request.
    Clean,
    /// It ended so that work was lost, or nobody saw how it ended.
    Lossy,
    /// It was there at its deadline.
    Timeout,
    /// KILL ended it.
    Killed,
    /// It ended, and runs again.
    Restarted,
    /// It was not asked to stop.
    Refused,
}

impl Verdict {
    pub(crate) const ALL: [Self; 6] =
        [Self::Clean, Self::Lossy, Self::Timeout, Self::Killed, Self::Restarted, Self::Refused];

    #[must_use]
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::Lossy => "lossy",
            Self::Timeout => "timeout",
            Self::Killed => "killed",
            Self::Restarted => "restarted",
            Self::Refused => "refused",
        }
    }
}

/// How far a drain is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum State {
    Running,
    /// All services are gone or given up; whether they come back is watched.
    Ended,
    Finished,
}

/// A drain, under way or over.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Document {
    pub schema: String,
    pub id: String,
    pub state: State,
    /// Who or what asked for it.
    pub trigger: String,
    pub uid: u32,
    /// RFC 3339 in UTC.
    pub began: String,
    pub deadline_seconds: f64,
    /// Until its end, or until now.
    pub seconds: f64,
    /// Between its end and the deadline; negative when that had passed.
    pub slack_seconds: Option<f64>,
    pub cancelled: bool,
    /// Why nothing was waited for any longer.
    #[serde(default)]
    pub given_up: Option<String>,
    /// How often an agent took it up from one that was killed.
    pub resumed: usize,
    /// `kept`, or why not: then no other agent takes it up.
    pub journal: String,
    pub stages: Vec<Vec<String>>,
    pub services: Vec<ServiceDocument>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ServiceDocument {
    pub name: String,
    /// From 1.
    pub stage: usize,
    pub target: String,
    /// `waiting`, `checking`, `prestop`, `stopping`, `killing`, `gone`, `late` or `settled`.
    pub phase: String,
    /// `null` until it is known.
    pub verdict: Option<Verdict>,
    /// The reason of the verdict.
    pub why: String,
    /// By which it was asked to stop, in order.
    pub signals: Vec<String>,
    pub unit: Option<String>,
    pub pids: Vec<u32>,
    /// Processes that are there.
    pub left: usize,
    pub granted_seconds: f64,
    /// From its first signal to its end.
    pub seconds: Option<f64>,
    pub slack_seconds: Option<f64>,
    /// Of the process that got the signal, as a shell has it.
    pub exit_code: Option<i32>,
    pub connections: usize,
    /// A heuristic: as it was found, so many of them had data that nobody had read or that was not acknowledged.
    #[serde(default)]
    pub suspected_in_flight: usize,
    /// On which it listened.
    #[serde(default)]
    pub ports: Vec<u32>,
    /// By class: `accept_queue`, `keep_alive_race`, `unread`, `unanswered`.
    #[serde(default)]
    pub lost_requests: BTreeMap<Class, u64>,
    /// Of these it was told from the kernel's clocks, because nothing had been seen of the connection before.
    #[serde(default)]
    pub guessed: u64,
    /// The first ones.
    #[serde(default)]
    pub lost: Vec<LostDocument>,
    #[serde(default)]
    pub listeners: Vec<ListenerDocument>,
    /// How often what happened to its connections, from the moment it was found.
    #[serde(default)]
    pub counted: BTreeMap<String, u64>,
    /// Requests that it has said it works on, last.
    #[serde(default)]
    pub in_flight: Option<u64>,
    /// Who sent KILL, if it was not plumb.
    #[serde(default)]
    pub killed_by: Option<String>,
    /// Why there may be more than this tells.
    #[serde(default)]
    pub unseen: Vec<String>,
    /// What was left of it just before it was given up: at most 4 of its processes, 16 threads of each.
    #[serde(default)]
    pub left_threads: Vec<Left>,
    /// What is not known of that.
    #[serde(default)]
    pub left_unknown: Option<String>,
    pub notes: Vec<String>,
    pub timeline: Vec<Moment>,
}

/// A request that is lost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct LostDocument {
    /// Since the drain began.
    pub seconds: f64,
    pub class: Class,
    /// Address and port of who asked.
    pub peer: String,
    pub unread_bytes: u32,
    pub unsent_bytes: u32,
}

/// A port on which nobody listens any more.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ListenerDocument {
    pub port: u32,
    /// Since the drain began.
    pub closed_seconds: f64,
    /// Connections that were waiting to be accepted.
    pub waiting: u32,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Moment {
    /// Since the drain began.
    pub seconds: f64,
    pub what: String,
}

/// The verdict of a service, as soon as there is one, and its reason.
#[must_use]
pub(crate) fn verdict(run: &Run) -> Option<(Verdict, String)> {
    if let Some(why) = &run.refused {
        return Some((Verdict::Refused, why.clone()));
    }
    if let Some(what) = &run.again {
        return Some((Verdict::Restarted, what.clone()));
    }
    if run.is_late {
        if let Some(why) = &run.given_up {
            return Some((Verdict::Timeout, format!("it still ran when it was given up: {why}")));
        }
        let left = run.members.iter().filter(|one| one.gone.is_none()).count();
        let why = match (run.signalled, left) {
            (None, _) => "no time was left to ask it to stop".to_owned(),
            (_, 0) if run.found.unit.is_some() && !run.unit_stopped => {
                "systemd was not through with its unit at its deadline".to_owned()
            }
            (_, 0 | 1) => "it still ran at its deadline".to_owned(),
            (_, left) => format!("{left} of its processes still ran at its deadline"),
        };
        return Some((Verdict::Timeout, why + ignored(run)));
    }
    if !matches!(run.phase, Phase::Gone | Phase::Settled) {
        return None;
    }
    if run.killed.is_some() {
        let why = format!("it did not stop in time{}{}", ignored(run), lost_too(run));
        return Some((Verdict::Killed, why));
    }
    let roots: Vec<_> = run.members.iter().filter(|one| one.member.is_root).map(|one| one.status).collect();
    let signal = roots.iter().flatten().map(|status| status & 0x7f).find(|signal| *signal != 0);
    let code = roots.iter().flatten().map(|status| status >> 8 & 0xff).find(|code| *code != 0);
    let is_asked = |signal| run.signals.contains(&signal) || run.found.kill_signal == Some(signal);
    let verdict = match signal {
        // Its main process may have ended well, and another one not at all.
        _ if run.unit_result.as_deref() == Some("timeout") => {
            let why = "systemd sent KILL: it did not stop within its TimeoutStopSec=";
            (Verdict::Killed, format!("{why}{}", lost_too(run)))
        }
        Some(libc::SIGKILL) => {
            let by = run.seen.killed_by.as_deref().unwrap_or("somebody else");
            (Verdict::Killed, format!("{by} sent KILL{}", lost_too(run)))
        }
        Some(signal) if !is_asked(signal) => {
            (Verdict::Lossy, format!("it died of {}{}", signal_name(signal), lost_too(run)))
        }
        _ if !run.seen.lost.is_empty() => (Verdict::Lossy, lost(run)),
        _ if run.seen.in_flight.is_some_and(|requests| requests > 0) => {
            let requests = run.seen.in_flight.unwrap_or(0);
            (Verdict::Lossy, format!("it said that it worked on {requests} requests, and ended"))
        }
        _ if (!run.found.ports.is_empty() || !run.found.knows_ports) && !run.seen.unseen.is_empty() => {
            let why = run.seen.unseen.join("; ");
            (Verdict::Lossy, format!("it may have lost requests that nobody saw: {why}"))
        }
        // It was sent because the first one had left something under way.
        _ if run.signals.len() > 1 => {
            let late = run.signals.last().map_or_else(String::new, |signal| signal_name(*signal));
            (Verdict::Lossy, format!("it did not stop by itself, and {late} ended what was still under way"))
        }
        Some(signal) => match run.found.connections {
            many @ 1.. if run.found.ports.is_empty() => {
                (Verdict::Lossy, format!("{} ended it with {many} connections", signal_name(signal)))
            }
            _ => (Verdict::Clean, format!("{} ended it, and no request was lost", signal_name(signal))),
        },
        None if run.members.is_empty() => match &run.found.unit {
            Some(_) => (Verdict::Clean, "it had no process, and its unit is stopped".to_owned()),
            None => (Verdict::Clean, "it did not run".to_owned()),
        },
        // The agent was not there, or the event was lost.
        None if roots.contains(&None) => {
            (Verdict::Lossy, "it ended in time, but nobody saw how: work may be lost".to_owned())
        }
        None => match code {
            Some(code) => (Verdict::Clean, format!("it ended in time, with exit code {code}")),
            None => (Verdict::Clean, "it ended in time".to_owned()),
        },
    };
    // One that comes back may still do so.
    (run.phase == Phase::Settled).then_some(verdict)
}

/// `3 requests lost: 2 reset in the accept queue, 1 read and not answered`
fn lost(run: &Run) -> String {
    let all: u64 = run.seen.lost.values().sum();
    let by: Vec<String> = run.seen.lost.iter().map(|(class, many)| format!("{many} {class}")).collect();
    let guessed = match run.seen.guessed {
        0 => String::new(),
        many => format!("; {many} of them perhaps"),
    };
    format!("{all} {} lost: {}{guessed}", if all == 1 { "request" } else { "requests" }, by.join(", "))
}

fn ignored(run: &Run) -> &'static str {
    let is_ignored = run.seen.left.iter().any(|left| left.ignored_the_stop == Some(true));
    if is_ignored { ": it ignored the stop" } else { "" }
}

fn lost_too(run: &Run) -> String {
    if run.seen.lost.is_empty() { String::new() } else { format!("; {}", lost(run)) }
}

/// Seconds between two times since boot.
fn between(from: u64, to: u64) -> f64 {
    (to as f64 - from as f64) / 1e9
}

impl Document {
    /// A drain as it is at a time.
    #[must_use]
    pub(crate) fn new(machine: &Machine, journal: &str, calendar: Calendar, now: u64) -> Self {
        let begun = &machine.begun;
        let end = machine.ended.unwrap_or(now);
        let stage =
            |service: usize| begun.stages.iter().position(|stage| stage.contains(&service)).unwrap_or(0) + 1;
        let services = machine.runs.iter().enumerate();
        Self {
            schema: SCHEMA.to_owned(),
            id: begun.id.clone(),
            state: match (machine.finished, machine.ended) {
                (Some(_), _) => State::Finished,
                (None, Some(_)) => State::Ended,
                (None, None) => State::Running,
            },
            trigger: begun.trigger.clone(),
            uid: begun.uid,
            began: calendar.format(begun.began),
            deadline_seconds: between(begun.began, begun.deadline),
            seconds: between(begun.began, end),
            slack_seconds: machine.ended.map(|end| between(end, begun.deadline)),
            cancelled: machine.cancelled.is_some(),
            given_up: machine.given_up.clone(),
            resumed: machine.resumed.len(),
            journal: journal.to_owned(),
            stages: words(machine.stage_names()),
            services: services.map(|(at, run)| service(machine, at, run, stage(at))).collect(),
        }
    }

    /// Whether every service ended well.
    #[must_use]
    pub(crate) fn is_clean(&self) -> bool {
        !self.cancelled && self.services.iter().all(|service| service.verdict == Some(Verdict::Clean))
    }

    /// Whether a deadline has passed.
    #[must_use]
    pub(crate) fn is_late(&self) -> bool {
        let late = |service: &ServiceDocument| {
            service.verdict == Some(Verdict::Timeout)
                || service.verdict == Some(Verdict::Killed)
                    && service.signals.iter().any(|signal| signal == "KILL")
        };
        self.services.iter().any(late)
    }

    /// One line of how far it is, or what came of it.
    #[must_use]
    pub(crate) fn headline(&self) -> String {
        let Self { id, seconds, services, .. } = self;
        if self.state == State::Running {
            let is_past = |one: &&ServiceDocument| matches!(one.phase.as_str(), "gone" | "late" | "settled");
            let (done, all) = (services.iter().filter(is_past).count(), services.len());
            let cancelled = if self.cancelled { ", no other stage begins" } else { "" };
            return format!("drain {id} under way for {seconds:.1} s: {done} of {all} done{cancelled}");
        }
        let count = |verdict| self.services.iter().filter(|service| service.verdict == Some(verdict)).count();
        let mut counts: Vec<String> = Verdict::ALL
            .into_iter()
            .filter(|verdict| count(*verdict) > 0)
            .map(|verdict| format!("{} {}", count(verdict), verdict.word()))
            .collect();
        // Those that are gone have no verdict yet.
        match services.iter().filter(|service| service.verdict.is_none()).count() {
            0 => {}
            1 => counts.push("1 is gone, and watched for a restart".to_owned()),
            many => counts.push(format!("{many} are gone, and watched for a restart")),
        }
        let what = if counts.is_empty() { "nothing to drain".to_owned() } else { counts.join(", ") };
        let end = match (&self.given_up, self.cancelled) {
            (Some(_), _) => "given up after",
            (None, true) => "cancelled after",
            (None, false) => "over after",
        };
        format!("drain {id} {end} {seconds:.1} s: {what}")
    }
}

fn words(stages: Vec<Vec<&Name>>) -> Vec<Vec<String>> {
    stages.into_iter().map(|stage| stage.into_iter().map(Name::to_string).collect()).collect()
}

fn service(machine: &Machine, at: usize, run: &Run, stage: usize) -> ServiceDocument {
    let begun = &machine.begun;
    let (verdict, why) = verdict(run).map_or((None, String::new()), |(verdict, why)| (Some(verdict), why));
    let taken = run.signalled.zip(run.gone).map(|(from, to)| between(from, to));
    let status = run.members.iter().filter(|one| one.member.is_root).find_map(|one| one.status);
    let mut notes = run.notes.clone();
    for one in &run.members {
        if let Sent::Failed(NotSent::Refused(why)) = &one.sent {
            notes.push(format!("not signalled: {why}"));
        }
    }
    let Found { unit, connections, busy, ports, .. } = &run.found;
    ServiceDocument {
        name: begun.services[at].name.to_string(),
        stage,
        target: begun.services[at].target.words(),
        phase: format!("{:?}", run.phase).to_lowercase(),
        verdict,
        why,
        signals: run.signals.iter().map(|signal| signal_name(*signal)).collect(),
        unit: unit.clone(),
        pids: run.members.iter().map(|one| one.member.identity.pid).collect(),
        left: run.members.iter().filter(|one| one.gone.is_none()).count(),
        granted_seconds: run.grant.as_secs_f64(),
        seconds: taken,
        slack_seconds: run.gone.map(|gone| run.grant.as_secs_f64() - between(run.began, gone)),
        exit_code: status
            .map(|status| if status & 0x7f == 0 { status >> 8 & 0xff } else { 128 + (status & 0x7f) }),
        connections: *connections,
        suspected_in_flight: *busy,
        ports: ports.clone(),
        lost_requests: run.seen.lost.clone(),
        guessed: run.seen.guessed,
        lost: run.seen.examples.iter().map(|one| lost_document(one, begun.began)).collect(),
        listeners: run
            .seen
            .listeners
            .iter()
            .map(|(port, at, waiting)| ListenerDocument {
                port: *port,
                closed_seconds: between(begun.began, *at),
                waiting: *waiting,
            })
            .collect(),
        counted: run.seen.counts.clone(),
        in_flight: run.seen.in_flight,
        killed_by: run.seen.killed_by.clone(),
        unseen: run.seen.unseen.clone(),
        left_threads: run.seen.left.clone(),
        left_unknown: run.seen.left_unknown.clone(),
        notes,
        timeline: run
            .timeline
            .iter()
            .map(|(time, what)| Moment { seconds: between(begun.began, *time), what: what.clone() })
            .collect(),
    }
}

fn lost_document(one: &LostRequest, began: u64) -> LostDocument {
    let LostRequest { at, class, peer, unread_bytes, unsent_bytes } = one.clone();
    LostDocument { seconds: between(began, at), class, peer, unread_bytes, unsent_bytes }
}

impl ServiceDocument {
    /// What it is doing, for who watches.
    #[must_use]
    pub(crate) fn progress(&self) -> String {
        match self.phase.as_str() {
            "waiting" => "waits".to_owned(),
            "checking" => "is looked at".to_owned(),
            "prestop" => "prestop or ready runs".to_owned(),
            "stopping" | "confirming" => format!(
                "{}; {}, {} at most",
                match (&self.unit, self.signals.last()) {
                    (Some(unit), _) => format!("systemd stops {unit}"),
                    (None, Some(signal)) => format!("got {signal}"),
                    (None, None) => "stops".to_owned(),
                },
                if self.left == 1 {
                    "1 process is left".to_owned()
                } else {
                    format!("{} processes are left", self.left)
                },
                grants::seconds(Duration::from_secs_f64(self.granted_seconds.max(0.0))),
            ),
            "killing" => "got KILL".to_owned(),
            "gone" => "gone; is it started again?".to_owned(),
            _ => self.verdict.map_or("?", Verdict::word).to_owned(),
        }
    }
}

/// The evidence of a service's end, as far as there is one now.
#[must_use]
pub(crate) fn exit(member: usize, status: u32, time: u64) -> Fact {
    Fact::Exit { member, status: status as i32, time }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            apply::saw,
            course::{Begun, Member, of_member},
            identity::Identity,
            service::Service,
        },
        *,
    };

    #[test]
    fn ports_that_could_not_be_read_are_not_taken_for_none() {
        for (knows_ports, expected) in [(true, Verdict::Clean), (false, Verdict::Lossy)] {
            let mut run = Run::new();
            let member = Member {
                identity: Identity::example(7),
                is_root: true,
                is_descendant: false,
                command: String::new(),
            };
            run.members = vec![of_member(member)];
            run.found.knows_ports = knows_ports;
            (run.phase, run.gone) = (Phase::Settled, Some(9));
            saw(&mut run, &Fact::Exit { member: 0, status: 0, time: 8 });
            saw(&mut run, &Fact::Unseen { why: "its ports could not be read".to_owned() });
            assert_eq!(verdict(&run).unwrap().0, expected);
        }
    }

    #[test]
    fn the_headline_says_how_far_it_is_and_counts_everybody() {
        let of = |phase: Phase| Run { phase, refused: None, ..Run::new() };
        let services = ["a", "b", "c", "d", "e"].map(Service::example).to_vec();
        let stages = vec![vec![0, 1, 2, 3, 4]];
        let begun = Begun {
            id: "d".to_owned(),
            boot_id: "b".to_owned(),
            trigger: "test".to_owned(),
            uid: 0,
            began: 0,
            deadline: 30_000_000_000,
            stages,
            services,
        };
        let (mut machine, _) = Machine::begin(begun);
        let line =
            |machine: &Machine| Document::new(machine, "kept", Calendar::now(), 3_300_000_000).headline();
        machine.runs[0] = of(Phase::Gone);
        assert_eq!(line(&machine), "drain d under way for 3.3 s: 1 of 5 done");
        machine.cancelled = Some(1);
        assert_eq!(line(&machine), "drain d under way for 3.3 s: 1 of 5 done, no other stage begins");
        (machine.cancelled, machine.ended) = (None, Some(3_000_000_000));
        machine.runs[1..3].fill(of(Phase::Gone));
        machine.runs[3..].fill(of(Phase::Settled));
        machine.runs[4].refused = Some("no".to_owned());
        assert_eq!(
            line(&machine),
            "drain d over after 3.0 s: 1 clean, 1 refused, 3 are gone, and watched for a restart"
        );
        machine.runs.fill(of(Phase::Settled));
        assert_eq!(line(&machine), "drain d over after 3.0 s: 5 clean");
        machine.given_up = Some("why".to_owned());
        assert_eq!(line(&machine), "drain d given up after 3.0 s: 5 clean");
    }

    /// A service with a listener that got TERM, ended in time, and is not expected back.
    fn ended(status: i32, facts: Vec<Fact>) -> (Verdict, String) {
        let mut run = Run::new();
        let member = Member {
            identity: Identity::example(7),
            is_root: true,
            is_descendant: false,
            command: String::new(),
        };
        run.members = vec![of_member(member)];
        run.found = Found { ports: vec![80], connections: 3, ..Found::default() };
        (run.phase, run.gone, run.signals) = (Phase::Settled, Some(9), vec![libc::SIGTERM]);
        let exit = Fact::Exit { member: 0, status, time: 8 };
        [exit].into_iter().chain(facts).for_each(|fact| saw(&mut run, &fact));
        verdict(&run).unwrap()
    }

    fn lost(class: Class, many: u64, guessed: u64) -> Fact {
        Fact::Lost { requests: BTreeMap::from([(class, many)]), guessed, examples: Vec::new() }
    }

    #[test]
    fn a_service_is_clean_only_if_no_request_can_have_been_lost() {
        assert_eq!(ended(0, Vec::new()).0, Verdict::Clean);
        // By TERM itself, with connections, none of which had a request.
        assert_eq!(ended(libc::SIGTERM, Vec::new()).0, Verdict::Clean);
        for class in Class::ALL {
            assert_eq!(ended(0, vec![lost(class, 1, 0)]).0, Verdict::Lossy);
        }
        let (verdict, why) = ended(0, vec![lost(Class::AcceptQueue, 2, 0), lost(Class::Unanswered, 1, 1)]);
        assert_eq!(verdict, Verdict::Lossy);
        assert_eq!(
            why,
            "3 requests lost: 2 reset in the accept queue, 1 read and not answered; 1 of them perhaps"
        );
        let unseen = Fact::Unseen { why: "3 events were lost".to_owned() };
        let (verdict, why) = ended(0, vec![unseen]);
        assert!(verdict == Verdict::Lossy && why.contains("3 events were lost"), "{why}");
        let said = |requests| Fact::InFlight { at: 5, requests };
        assert_eq!(ended(0, vec![said(4)]).0, Verdict::Lossy);
        assert_eq!(ended(0, vec![said(4), said(0)]).0, Verdict::Clean);
    }

    #[test]
    fn whoever_has_killed_it_is_named() {
        let killed = Fact::Killed { at: 5, by: "pid 9 (bash)".to_owned() };
        assert_eq!(
            ended(libc::SIGKILL, vec![killed.clone()]),
            (Verdict::Killed, "pid 9 (bash) sent KILL".to_owned())
        );
        let (_, why) =
            ended(libc::SIGKILL, vec![killed, Fact::NoMemory { at: 6 }, lost(Class::Unanswered, 2, 0)]);
        assert!(why.contains("want of memory") && why.contains("2 requests lost"), "{why}");
        assert_eq!(ended(libc::SIGKILL, Vec::new()).1, "somebody else sent KILL");
    }
}

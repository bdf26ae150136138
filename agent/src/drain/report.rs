//! What came of a drain: one document, and the same for people.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    course::{Found, LostRequest, NotSent, Run, Sent, signal_name},
    grants,
    machine::Machine,
    service::Name,
    verdict::{Verdict, verdict},
};
use crate::{clock::Calendar, document::SCHEMA, left::Left, losses::Class};

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

    /// What changes when it goes on.
    #[must_use]
    pub(super) fn how_far(&self) -> (String, Vec<(String, usize)>) {
        let services = self.services.iter().map(|one| (one.phase.clone(), one.signals.len()));
        (self.id.clone(), services.collect())
    }

    /// One that nobody goes on with: the host has crashed, or the journal is lost. It may have gone further than it says.
    #[must_use]
    pub(super) fn interrupted(mut self) -> Self {
        let why = "the host or the agent went down in it, and its journal is not there or cannot be read";
        for service in self.services.iter_mut().filter(|one| one.verdict.is_none()) {
            service.why = match service.phase.as_str() {
                "waiting" => format!(
                    "nobody saw what became of it: {why}; it had not been asked to stop, as far as was written"
                ),
                "gone" => {
                    format!("nobody saw whether more was lost, and whether it was started again: {why}")
                }
                _ => format!("nobody saw what became of it: {why}"),
            };
            (service.phase, service.verdict) = ("settled".to_owned(), Some(Verdict::Lossy));
        }
        (self.state, self.given_up) = (State::Finished, Some(why.to_owned()));
        self
    }

    /// Tells the log what came of it.
    pub(super) fn log(&self) {
        for one in &self.services {
            let (name, why, word) = (&one.name, &one.why, one.verdict.map_or("no verdict", Verdict::word));
            if one.verdict == Some(Verdict::Clean) {
                tracing::info!(service = name, "{word}: {why}");
            } else {
                tracing::warn!(service = name, "{word}: {why}");
            }
        }
        tracing::info!("{}", self.headline());
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
        signals: run.sent().map(signal_name).collect(),
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

#[cfg(test)]
mod tests {
    use super::{
        super::{
            course::{Begun, Phase},
            service::Service,
        },
        *,
    };

    fn machine(names: &[&str]) -> Machine {
        let begun = Begun {
            id: "d".to_owned(),
            boot_id: "b".to_owned(),
            trigger: "test".to_owned(),
            uid: 0,
            began: 0,
            deadline: 30_000_000_000,
            stages: vec![(0..names.len()).collect()],
            services: names.iter().map(|name| Service::example(name)).collect(),
            absent: Vec::new(),
        };
        Machine::begin(begun).0
    }

    fn of(phase: Phase) -> Run {
        Run { phase, refused: None, ..Run::new() }
    }

    #[test]
    fn of_one_that_nobody_goes_on_with_nothing_is_clean_that_was_not_over() {
        let mut machine = machine(&["settled", "gone", "stopping", "waiting"]);
        let phases = [Phase::Settled, Phase::Gone, Phase::Stopping, Phase::Waiting];
        machine.runs = phases.map(of).to_vec();
        let document = Document::new(&machine, "kept", Calendar::now(), 1).interrupted();
        let whys = ["", "whether more was lost", "what became of it", "it had not been asked to stop"];
        for (service, why) in document.services.iter().zip(whys) {
            assert_eq!(service.verdict == Some(Verdict::Clean), service.name == "settled");
            assert!(service.why.contains(why), "{}", service.why);
        }
        assert_eq!(document.state, State::Finished);
        assert!(document.headline().ends_with("1 clean, 3 lossy"), "{}", document.headline());
    }

    #[test]
    fn the_headline_says_how_far_it_is_and_counts_everybody() {
        let mut machine = machine(&["a", "b", "c", "d", "e"]);
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
}

//! The course of one drain, without IO: what has happened goes in, what is to be done comes out.
//!
//! ```text
//! drain     running --- all stages are past ---> ended --- each is settled ---> finished
//!              |                                   ^
//!              +-- cancelled: no other stage begins -+
//!              +-- given up: what stops is late -----+
//!
//! service   waiting
//!              | its stage begins
//!           checking -- not to be signalled, or not there -----------------> settled
//!              |    ^
//!              |    +-- prestop has ended -- prestop
//!              |                                ^
//!              +-- found, and there is one -----+
//!              | found
//!           stopping -- all its processes are gone --> gone -- 5 s later --> settled
//!              |                                         ^
//!              | deadline                                |
//!              +-- on_deadline = kill --> killing -------+
//!              |                             | 2 s
//!              +-- on_deadline = report -----+--> late
//! ```
//!
//! Whatever changes is an `Entry`, applied here and written to the journal before anything is done about it. An agent
//! that reads them again is where the one before it was. A signal is announced by an entry of its own: one that was
//! announced and of which nothing more is known may have been sent, and is not sent again.

mod resume;

use std::{iter, time::Duration};

use super::{
    course::{
        Action, Begun, Entry, Fact, Found, Input, MemberRun, NotSent, Phase, Rest, Run, Sent, UnitEnd, nanos,
    },
    grants,
    identity::Identity,
    registry::is_admin,
    service::{Name, OnDeadline, Service, Signal, Target},
};

/// After the end of a service, in which it may turn out to have been started again.
pub(crate) const SETTLE: Duration = Duration::from_secs(5);
/// In that time it is looked for once before its end.
const LOOK: Duration = Duration::from_secs(1);
/// For a process to end after KILL, which nothing but the kernel can delay.
pub(crate) const KILL_GRACE: Duration = Duration::from_secs(2);
/// Sockets of a service that have left LISTEN, one by one.
const MAX_LISTENERS: usize = 64;
/// How often a service can say on how many requests it works.
const MAX_SAID: usize = 512;
/// With less time left a stage does not begin, and nobody is asked to stop.
const TOO_LATE: Duration = Duration::from_millis(10);
/// An agent that takes up a drain so long after a deadline sends no KILL for it: nobody may want that any more.
const MAX_OVERDUE: Duration = Duration::from_secs(30);

/// A drain under way.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    pub begun: Begun,
    pub runs: Vec<Run>,
    /// By the drain before.
    pub signalled_before: Vec<(Identity, i32)>,
    /// The last one that has begun.
    pub stage: Option<usize>,
    pub resumed: Vec<u64>,
    pub cancelled: Option<u64>,
    /// Why nothing was waited for any longer.
    pub given_up: Option<String>,
    pub ended: Option<u64>,
    pub finished: Option<u64>,
}

impl Machine {
    /// Begins a drain.
    #[cfg(test)]
    pub(crate) fn begin(begun: Begun) -> (Self, Vec<Action>) {
        Self::begin_after(Vec::new(), begun)
    }

    /// Begins a drain; these have got these signals by the one before, which was given up for it.
    pub(crate) fn begin_after(signalled: Vec<(Identity, i32)>, begun: Begun) -> (Self, Vec<Action>) {
        let now = begun.began;
        let mut actions = vec![Action::Journal(Entry::Begun(Box::new(begun.clone())))];
        let mut machine = Self::new(begun);
        if !signalled.is_empty() {
            machine.record(&mut actions, Entry::Before { signalled });
        }
        machine.advance(now, &mut actions);
        (machine, actions)
    }

    fn new(begun: Begun) -> Self {
        let run = |service: &Service| {
            let stop = service.stop.iter().flat_map(|stop| iter::once(stop.signal).chain(stop.late));
            Run { stops: stop.map(Signal::number).collect(), ..Run::new() }
        };
        let runs = begun.services.iter().map(run).collect();
        Self {
            begun,
            runs,
            signalled_before: Vec::new(),
            stage: None,
            resumed: Vec::new(),
            cancelled: None,
            given_up: None,
            ended: None,
            finished: None,
        }
    }

    /// Where an agent had come to that wrote these; `None` if it had not begun, or wrote what cannot be.
    pub(crate) fn replay(entries: impl IntoIterator<Item = Entry>) -> Option<Self> {
        let mut entries = entries.into_iter();
        let Some(Entry::Begun(begun)) = entries.next() else { return None };
        let services = begun.services.len();
        if begun.stages.iter().flatten().any(|service| *service >= services) {
            return None;
        }
        let mut machine = Self::new(*begun);
        for entry in entries {
            if !machine.fits(&entry) {
                return None;
            }
            machine.apply(&entry);
        }
        Some(machine)
    }

    /// Whether all that an entry names is there.
    fn fits(&self, entry: &Entry) -> bool {
        let members = |service: usize, members: &[usize]| {
            let known = |run: &Run| members.iter().all(|member| *member < run.members.len());
            self.runs.get(service).is_some_and(known)
        };
        match entry {
            Entry::Begun(_) => false,
            Entry::Stage { stage, grants, .. } => {
                self.begun.stages.get(*stage).is_some_and(|stage| stage.len() == grants.len())
            }
            Entry::Signalling { service, members: of, .. } => members(*service, of),
            Entry::Signalled { service, failed, .. } => {
                members(*service, &failed.iter().map(|(member, _)| *member).collect::<Vec<_>>())
            }
            Entry::Gone { service, member, .. }
            | Entry::Seen { service, fact: Fact::Exit { member, .. }, .. } => members(*service, &[*member]),
            Entry::Resumed { .. }
            | Entry::Cancelled { .. }
            | Entry::Before { .. }
            | Entry::GivenUp { .. }
            | Entry::Ended { .. }
            | Entry::Finished { .. } => true,
            Entry::Refused { service, .. }
            | Entry::NotRunning { service, .. }
            | Entry::NoTime { service, .. }
            | Entry::Prestop { service, .. }
            | Entry::PrestopEnded { service, .. }
            | Entry::Seen { service, .. }
            | Entry::Found { service, .. }
            | Entry::UnitStopping { service, .. }
            | Entry::UnitStopped { service, .. }
            | Entry::More { service, .. }
            | Entry::AllGone { service, .. }
            | Entry::Late { service, .. }
            | Entry::Again { service, .. }
            | Entry::Settled { service, .. } => *service < self.runs.len(),
        }
    }

    /// When `Input::Time` is due, nanoseconds since boot.
    pub(crate) fn next(&self) -> Option<u64> {
        if self.finished.is_some() {
            return None;
        }
        let due = |(at, run): (usize, &Run)| match run.phase {
            Phase::Prestop => Some(run.began + nanos(run.grant) / 2),
            Phase::Stopping => {
                Some(self.late_signal(at).map_or(run.deadline(), |(due, _)| due.min(run.deadline())))
            }
            Phase::Killing => Some(given_up(run)),
            Phase::Gone => match run.looks {
                0 => run.gone.map(|gone| gone + nanos(LOOK)),
                1 => run.gone.map(|gone| gone + nanos(SETTLE)),
                _ => None,
            },
            _ => None,
        };
        self.runs.iter().enumerate().filter_map(due).min()
    }

    /// Services that the next `Input::Time` gives up.
    pub(crate) fn about_to_be_late(&self, now: u64) -> Vec<usize> {
        let is_due =
            |run: &Run| matches!(run.phase, Phase::Stopping | Phase::Killing) && now >= given_up(run);
        (0..self.runs.len()).filter(|service| is_due(&self.runs[*service])).collect()
    }

    /// Whether a service is ended by KILL at its deadline.
    pub(crate) fn will_be_killed(&self, service: usize) -> bool {
        self.begun.services[service].on_deadline == OnDeadline::Kill
    }

    /// Takes what has happened.
    pub(crate) fn step(&mut self, now: u64, input: Input) -> Vec<Action> {
        let mut out = Vec::new();
        if self.finished.is_some() {
            return out;
        }
        match input {
            Input::Resume => self.resume(now, &mut out),
            Input::Cancel => {
                if self.cancelled.is_none() && self.ended.is_none() {
                    self.record(&mut out, Entry::Cancelled { at: now });
                }
            }
            Input::GiveUp(why) => {
                if self.ended.is_none() {
                    let phases = self.runs.iter().map(|run| run.phase).enumerate();
                    let prestops: Vec<_> = phases.filter(|(_, phase)| *phase == Phase::Prestop).collect();
                    self.record(&mut out, Entry::GivenUp { at: now, why });
                    out.extend(prestops.into_iter().map(|(service, _)| Action::EndPrestop(service)));
                }
            }
            Input::Time => (0..self.runs.len()).for_each(|service| self.time(now, service, &mut out)),
            Input::Found(service, found) => self.found(now, service, found, &mut out),
            Input::NotRunning(service) if self.runs[service].phase == Phase::Checking => {
                if self.has_ended_unseen(service) {
                    let why = "it ran when the drain began, and nobody saw how it ended".to_owned();
                    let fact = Fact::Unseen { why, strays: false };
                    self.record(&mut out, Entry::Seen { at: now, service, fact });
                }
                self.record(&mut out, Entry::NotRunning { at: now, service });
            }
            Input::Refused(service, why) if self.runs[service].phase == Phase::Checking => {
                self.record(&mut out, Entry::Refused { at: now, service, why });
            }
            Input::PrestopEnded(service, why) if self.runs[service].phase == Phase::Prestop => {
                self.record(&mut out, Entry::PrestopEnded { at: now, service, why });
                out.push(Action::Find(service));
            }
            Input::Sent(service, failed) => {
                self.record(&mut out, Entry::Signalled { at: now, service, failed });
                self.refuse_if_nobody_was_signalled(now, service, &mut out);
            }
            Input::Unit(service, end) => self.unit(now, service, end, &mut out),
            Input::Gone(service, member) => {
                if self.runs[service].members.get(member).is_some_and(|one| one.gone.is_none()) {
                    self.record(&mut out, Entry::Gone { at: now, service, member });
                    self.confirm(service, &mut out);
                }
            }
            Input::Looked(service, rest) => self.looked(now, service, rest, &mut out),
            Input::Seen(service, fact) => {
                if self.is_news(service, &fact) {
                    self.record(&mut out, Entry::Seen { at: now, service, fact });
                }
            }
            Input::NotRunning(_) | Input::Refused(..) | Input::PrestopEnded(..) => {}
        }
        self.advance(now, &mut out);
        out
    }

    /// Whether a service has ended before it was looked for: by itself, or with another one of its stage or one before. Of a unit
    /// nobody knew whether it ran.
    fn has_ended_unseen(&self, service: usize) -> bool {
        let is_unit = matches!(self.begun.services[service].target, Target::Unit(_));
        self.runs[service].members.is_empty() && !is_unit && !self.begun.absent.contains(&service)
    }

    /// Whether something of it is not known already.
    fn is_news(&self, service: usize, fact: &Fact) -> bool {
        let Run { members, signals, seen, .. } = &self.runs[service];
        match fact {
            Fact::Exit { member, .. } => members.get(*member).is_some_and(|one| one.status.is_none()),
            Fact::Taken { signal, .. } => signals.contains(signal) && !seen.taken.contains(signal),
            Fact::Killed { .. } => seen.killed_by.is_none(),
            Fact::ChildDied { .. } => seen.child_died.is_none(),
            Fact::Listener { .. } => seen.listeners.len() < MAX_LISTENERS,
            Fact::Unseen { why, strays } => !seen.unseen.contains(why) || *strays && !seen.has_strays,
            // Whoever says it too often is heard once more, when it has gone.
            Fact::InFlight { requests, .. } => {
                seen.in_flight != Some(*requests)
                    && (seen.said < MAX_SAID || self.runs[service].phase == Phase::Confirming)
            }
            Fact::Left { left, unknown } => (left, unknown) != (&seen.left, &seen.left_unknown),
            Fact::NoMemory { .. } | Fact::Lost { .. } | Fact::Counted { .. } => true,
        }
    }

    fn record(&mut self, out: &mut Vec<Action>, entry: Entry) {
        self.apply(&entry);
        out.push(Action::Journal(entry));
    }

    /// Begins the next stage, or comes to an end, if nothing is to be waited for.
    fn advance(&mut self, now: u64, out: &mut Vec<Action>) {
        while self.ended.is_none() && self.stage_is_past() {
            let next = self.stage.map_or(0, |stage| stage + 1);
            if self.cancelled.is_some() || next >= self.begun.stages.len() {
                self.record(out, Entry::Ended { at: now });
                break;
            }
            let left = Duration::from_nanos(self.begun.deadline.saturating_sub(now));
            let grants = grants::of_stage(&self.begun.wishes(next), left, self.of_users(now)).services;
            self.record(out, Entry::Stage { at: now, stage: next, grants });
            // However long it takes to look at what users have registered.
            let mut services = self.begun.stages[next].clone();
            services.sort_by_key(|service| !is_admin(self.begun.services[*service].uid));
            for service in services {
                if left < TOO_LATE {
                    self.record(out, Entry::NoTime { at: now, service });
                } else {
                    out.push(Action::Find(service));
                }
            }
        }
        if self.ended.is_some() && self.finished.is_none() && self.runs.iter().all(Run::is_settled) {
            self.record(out, Entry::Finished { at: now });
        }
    }

    /// What the stages of users have not taken yet of their half of the whole time.
    fn of_users(&self, now: u64) -> Duration {
        let half = self.begun.deadline.saturating_sub(self.begun.began) / 2;
        let past = self.stage.map_or(0, |stage| stage + 1);
        let began = |stage: usize| match self.begun.stages.get(stage).and_then(|stage| stage.first()) {
            Some(service) if stage < past => self.runs[*service].began,
            _ => now,
        };
        let is_admins = |service: &usize| self.begun.services[*service].wish().is_admin;
        let theirs = (0..past).filter(|stage| !self.begun.stages[*stage].iter().any(is_admins));
        let taken: u64 = theirs.map(|stage| began(stage + 1).saturating_sub(began(stage))).sum();
        Duration::from_nanos(half.saturating_sub(taken))
    }

    fn stage_is_past(&self) -> bool {
        let Some(stage) = self.stage else { return true };
        self.begun.stages[stage].iter().all(|service| self.runs[*service].is_past())
    }

    fn found(&mut self, now: u64, service: usize, found: Found, out: &mut Vec<Action>) {
        if self.runs[service].phase != Phase::Checking {
            return;
        }
        if self.is_too_late(now, service) {
            self.record(out, Entry::NoTime { at: now, service });
            return;
        }
        if self.begun.services[service].has_prestop() && !self.runs[service].prestopped {
            self.record(out, Entry::Prestop { at: now, service });
            // What becomes of it meanwhile is its end, too.
            self.record(out, Entry::Found { at: now, service, found: Box::new(found) });
            out.push(Action::Prestop(service));
            return;
        }
        self.record(out, Entry::Found { at: now, service, found: Box::new(found) });
        out.push(Action::Watch(service));
        self.ask_to_stop(now, service, out);
    }

    /// Whoever is asked now would be given up, or killed, at once: it was looked for too long, or no agent was there.
    fn is_too_late(&self, now: u64, service: usize) -> bool {
        now + nanos(TOO_LATE) > self.runs[service].deadline()
    }

    /// For the first time.
    fn ask_to_stop(&mut self, now: u64, service: usize, out: &mut Vec<Action>) {
        match (self.runs[service].found.unit.clone(), &self.begun.services[service].stop) {
            (Some(unit), _) => {
                self.record(out, Entry::UnitStopping { at: now, service, unit: unit.clone() });
                out.push(Action::StopUnit(service, unit));
            }
            (None, Some(stop)) => self.signal(now, service, stop.signal.number(), out),
            (None, None) => {
                let why = "it has no signal, and systemd does not know it".to_owned();
                self.record(out, Entry::Refused { at: now, service, why });
            }
        }
    }

    fn signal(&mut self, now: u64, service: usize, signal: i32, out: &mut Vec<Action>) {
        let run = &self.runs[service];
        let left = if signal == libc::SIGKILL { run.killable() } else { run.left(true) };
        if left.is_empty() {
            return;
        }
        let has_it = |member: &usize| {
            let identity = &self.runs[service].members[*member].member.identity;
            self.signalled_before.iter().any(|(one, got)| *got == signal && one.is_same_process(identity))
        };
        let members: Vec<usize> = left.into_iter().filter(|member| !has_it(member)).collect();
        self.record(out, Entry::Signalling { at: now, service, members: members.clone(), signal });
        if !members.is_empty() {
            out.push(Action::Send { service, members, signal });
        }
    }

    /// Processes that are there and have got a signal, or may have, and which.
    pub(crate) fn signalled(&self) -> Vec<(Identity, i32)> {
        let mut all = Vec::new();
        for run in &self.runs {
            for one in run.members.iter().filter(|one| one.gone.is_none()) {
                let identity = &one.member.identity;
                let earlier =
                    self.signalled_before.iter().filter(|(other, _)| other.is_same_process(identity));
                all.extend(earlier.cloned());
                let is_sent = matches!(one.sent, Sent::Perhaps | Sent::Yes);
                let is_its = |signal: &&i32| is_sent && (one.member.is_root || **signal == libc::SIGKILL);
                all.extend(run.signals.iter().filter(is_its).map(|signal| (identity.clone(), *signal)));
            }
        }
        all
    }

    /// A service none of whose processes may be signalled is left alone.
    fn refuse_if_nobody_was_signalled(&mut self, now: u64, service: usize, out: &mut Vec<Action>) {
        let run = &self.runs[service];
        let refused = |one: &MemberRun| match &one.sent {
            Sent::Failed(NotSent::Refused(why)) => Some(why.clone()),
            _ => None,
        };
        let mut roots = run.members.iter().filter(|one| one.member.is_root);
        let why = run.members.iter().find_map(refused);
        if run.phase == Phase::Stopping
            && let Some(why) = why
            && roots.all(|one| refused(one).is_some())
        {
            self.record(out, Entry::Refused { at: now, service, why });
        }
    }

    /// systemd has come to an end with a unit.
    fn unit(&mut self, now: u64, service: usize, end: UnitEnd, out: &mut Vec<Action>) {
        if !matches!(self.runs[service].phase, Phase::Stopping | Phase::Killing) {
            return;
        }
        let (result, why) = match end {
            UnitEnd::Stopped(result) => (Some(result), None),
            UnitEnd::Unknown(why) => (None, Some(why)),
            UnitEnd::Refused(why) => {
                self.record(out, Entry::Refused { at: now, service, why });
                return;
            }
        };
        self.record(out, Entry::UnitStopped { at: now, service, result, why });
        self.confirm(service, out);
    }

    /// When the last of its members has gone there may still be others, and commands of its unit (`ExecStopPost=`).
    fn confirm(&mut self, service: usize, out: &mut Vec<Action>) {
        let run = &mut self.runs[service];
        let left = match run.phase {
            Phase::Stopping => run.left(false),
            // What gets no signal is not waited for any longer.
            Phase::Killing => run.killable(),
            _ => return,
        };
        if !left.is_empty() {
            return;
        }
        if run.found.unit.is_some() && !run.unit_stopped {
            return;
        }
        run.phase = Phase::Confirming;
        out.push(Action::Look(service));
    }

    fn looked(&mut self, now: u64, service: usize, rest: Rest, out: &mut Vec<Action>) {
        let Rest { members, ports, knows_ports, again, unseen } = rest;
        let (phase, is_known) = (self.runs[service].phase, self.runs[service].again.is_some());
        // Of what is looked at once more the last look counts.
        let is_last = phase == Phase::Confirming || phase == Phase::Gone && self.runs[service].looks >= 2;
        let unseen = unseen.filter(|_| is_last).map(|why| Fact::Unseen { why, strays: true });
        if let Some(fact) = unseen.filter(|fact| self.is_news(service, fact)) {
            self.record(out, Entry::Seen { at: now, service, fact });
        }
        match phase {
            Phase::Confirming if !members.is_empty() => {
                self.record(out, Entry::More { at: now, service, members, ports, knows_ports });
                out.push(Action::Watch(service));
                // What gets no signal is not waited for after KILL.
                if self.runs[service].killed.is_none() || !self.runs[service].killable().is_empty() {
                    return;
                }
                self.record(out, Entry::AllGone { at: now, service });
            }
            Phase::Confirming => self.record(out, Entry::AllGone { at: now, service }),
            Phase::Gone => {}
            _ => return,
        }
        if let Some(what) = again.filter(|_| !is_known) {
            self.record(out, Entry::Again { at: now, service, what });
        }
        if phase == Phase::Gone && self.runs[service].looks >= 2 {
            self.record(out, Entry::Settled { at: now, service });
        }
    }

    /// What is gone is looked for now, and not later any more.
    pub(crate) fn settle(&mut self) -> Vec<Action> {
        let gone = (0..self.runs.len()).filter(|service| self.runs[*service].phase == Phase::Gone);
        let gone: Vec<usize> = gone.collect();
        for service in &gone {
            let run = &mut self.runs[*service];
            run.looks = 2;
            run.notes.push("it was not watched for all of 5s whether it runs again".to_owned());
        }
        gone.into_iter().map(Action::Look).collect()
    }

    /// The signal that is sent late, and when, unless it has been.
    fn late_signal(&self, service: usize) -> Option<(u64, Signal)> {
        let run = &self.runs[service];
        let late = self.begun.services[service].stop.as_ref()?.late?;
        let is_sent = run.signals.contains(&late.number()) || run.found.unit.is_some();
        // Those that are left of it may be children, which get none.
        (!is_sent && !run.left(true).is_empty()).then(|| (run.began + nanos(run.grant) / 3 * 2, late))
    }

    fn time(&mut self, now: u64, service: usize, out: &mut Vec<Action>) {
        let run = &self.runs[service];
        let since = |time: Duration| run.gone.is_some_and(|gone| now >= gone + nanos(time));
        match run.phase {
            Phase::Prestop if now >= run.began + nanos(run.grant) / 2 => {
                let half = grants::seconds(run.grant / 2);
                let why = match self.begun.services[service].ready {
                    Some(_) => {
                        format!("was given up after {half}: it takes too long, or the service still is ready")
                    }
                    None => format!("ended after {half}: it took too long"),
                };
                out.push(Action::EndPrestop(service));
                self.record(out, Entry::PrestopEnded { at: now, service, why: Some(why) });
                out.push(Action::Find(service));
            }
            // Of a unit there may be no process left, and still it is not stopped.
            Phase::Stopping
                if now >= run.deadline()
                    && self.will_be_killed(service)
                    && !run.killable().is_empty()
                    && now <= run.deadline() + nanos(MAX_OVERDUE) =>
            {
                self.signal(now, service, libc::SIGKILL, out);
            }
            Phase::Stopping if now >= run.deadline() => self.record(out, Entry::Late { at: now, service }),
            Phase::Stopping => {
                if let Some((due, signal)) = self.late_signal(service)
                    && now >= due
                {
                    self.signal(now, service, signal.number(), out);
                }
            }
            Phase::Killing if now >= given_up(run) => {
                self.record(out, Entry::Late { at: now, service });
            }
            Phase::Gone if run.looks < 2 && since(SETTLE) => {
                self.runs[service].looks = 2;
                out.push(Action::Look(service));
            }
            Phase::Gone if run.looks < 1 && since(LOOK) => {
                self.runs[service].looks = 1;
                out.push(Action::Look(service));
            }
            _ => {}
        }
    }

    /// The names of the stages.
    pub(crate) fn stage_names(&self) -> Vec<Vec<&Name>> {
        let name = |service: &usize| &self.begun.services[*service].name;
        self.begun.stages.iter().map(|stage| stage.iter().map(name).collect()).collect()
    }
}

/// When nobody waits for a service any longer. An agent that takes the drain up may send KILL long after the deadline.
fn given_up(run: &Run) -> u64 {
    run.killed.map_or_else(|| run.deadline(), |killed| killed + nanos(KILL_GRACE))
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;

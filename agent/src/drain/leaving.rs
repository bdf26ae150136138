//! What is left of the services of a drain that do not stop in time: asked for a moment before each is given up, and put
//! together with what their processes have begun in the second half of their time.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, mpsc::sync_channel},
    time::Duration,
};

use plumb_common::{
    event::Header,
    sockets::{SIGNAL_GENERATED, Signal as SignalEvent},
};

use super::{
    course::{Fact, Phase, Run, nanos},
    identity::ticks,
    machine::Machine,
    service::Signal,
};
use crate::{
    ask::{Asker, Request},
    decode::Event,
    left::{Acts, Doings, Left, Look, Since},
    stacks::{Names, Stack},
    symbolise::RawStack,
};

/// The look begins so long before a service is given up, or a quarter of its time.
const LEAD: Duration = Duration::from_secs(1);
/// A service is given up so much later at most because of it.
const HOLD: Duration = Duration::from_millis(100);
/// Processes of a service that are looked at.
const MAX_PROCESSES: usize = 4;
/// What is kept of each of them.
const MAX_THREADS: usize = 16;
const MAX_FUNCTIONS: usize = 8;
/// For the observer to answer.
const ANSWER: Duration = Duration::from_secs(1);

/// With stacks as they were copied, and how many events of what is begun had been lost in all.
pub(super) type Copied = (Vec<Look<Option<RawStack>>>, u64);
/// With stacks in words, or without them yet.
pub(super) type Named = Vec<Look<Option<Arc<Stack>>>>;

/// A look at a service.
#[derive(Debug, Default)]
struct Glance {
    found: Named,
    /// How many events of what is begun had been lost.
    lost: u64,
    has_copy: bool,
    has_names: bool,
}

/// What is known of a drain under way.
#[derive(Default)]
pub(super) struct Leaving {
    /// By service.
    glances: HashMap<usize, Glance>,
    /// When each was signalled, and whether the kernel has said so.
    signalled: HashMap<usize, (u64, bool)>,
    /// By pid and start.
    doings: HashMap<(u32, u64), Doings>,
    /// Services whose processes are followed in what they begin, and whether all of that is seen.
    seen: HashMap<usize, bool>,
    /// Events of what is begun that were lost before the drain.
    lost_before: u64,
    /// This task has missed events.
    has_gap: bool,
    names: Arc<Mutex<Names>>,
}

fn lead(run: &Run) -> u64 {
    nanos(LEAD.min(run.grant / 4))
}

/// Whether it runs towards its deadline.
fn is_stopping(run: &Run) -> bool {
    run.phase == Phase::Stopping && !run.left(false).is_empty()
}

impl Leaving {
    pub(super) fn new(lost_before: u64) -> Self {
        Self { lost_before, ..Self::default() }
    }

    /// Whether what the processes of a service begin is seen from now on.
    pub(super) fn sees(&mut self, service: usize, is_seen: bool) {
        self.seen.insert(service, is_seen);
    }

    /// Services that have used half of their time: from now on it is followed what they begin. Those that stop before cost
    /// nothing.
    pub(super) fn half(&mut self, machine: &Machine, now: u64) -> Vec<usize> {
        let due: Vec<usize> =
            self.not_followed(machine).filter(|(_, half)| now >= *half).map(|(at, _)| at).collect();
        for service in &due {
            self.seen.insert(*service, false);
        }
        due
    }

    /// Services that still run, and when half of their time is over.
    fn not_followed<'a>(&'a self, machine: &'a Machine) -> impl Iterator<Item = (usize, u64)> {
        let runs = machine.runs.iter().enumerate();
        runs.filter(|(service, run)| is_stopping(run) && !self.seen.contains_key(service))
            .map(|(service, run)| (service, run.began + nanos(run.grant) / 2))
    }

    /// A service has just got its signal.
    pub(super) fn sent(&mut self, service: usize, now: u64) {
        self.signalled.entry(service).or_insert((now, false));
    }

    pub(super) fn missed(&mut self) {
        self.has_gap = true;
    }

    /// When the next look is due, or a service that waits for one is given up.
    pub(super) fn next(&self, machine: &Machine, now: u64) -> Option<u64> {
        let look = self.not_looked_at(machine).map(|(_, run)| run.deadline().saturating_sub(lead(run))).min();
        let held_by = machine;
        let machine = match self.held(machine, now) {
            Some(until) => machine.next().map(|next| next.max(until)),
            None => machine.next(),
        };
        let half = self.not_followed(held_by).map(|(_, half)| half).min();
        [look, half, machine].into_iter().flatten().min()
    }

    /// Services that are to be looked at now.
    pub(super) fn due(&mut self, machine: &Machine, now: u64) -> Vec<usize> {
        let is_due = |(_, run): &(usize, &Run)| now >= run.deadline().saturating_sub(lead(run));
        let due: Vec<usize> = self.not_looked_at(machine).filter(is_due).map(|(at, _)| at).collect();
        for service in &due {
            self.glances.insert(*service, Glance::default());
        }
        due
    }

    fn not_looked_at<'a>(&'a self, machine: &'a Machine) -> impl Iterator<Item = (usize, &'a Run)> {
        let runs = machine.runs.iter().enumerate();
        runs.filter(|(service, run)| is_stopping(run) && !self.glances.contains_key(service))
    }

    /// Until when it is waited for what is known of a service that is late.
    pub(super) fn held(&self, machine: &Machine, now: u64) -> Option<u64> {
        let until = |(service, run): (usize, &Run)| {
            let glance = self.glances.get(&service).filter(|glance| !glance.has_names)?;
            // Without a copy nothing could be named later; with one, KILL need not wait.
            let is_enough = glance.has_copy && machine.will_be_killed(service);
            let until = run.deadline() + nanos(HOLD);
            (is_stopping(run) && !is_enough && now >= run.deadline() && now < until).then_some(until)
        };
        machine.runs.iter().enumerate().filter_map(until).max()
    }

    /// The processes of a service that are to be looked at, by pid and start, those that were signalled first; what they
    /// have begun; and who names their stacks.
    pub(super) fn wanted(&self, machine: &Machine, service: usize) -> Vec<((u32, u64), Doings)> {
        let run = &machine.runs[service];
        let (roots, mut all) = (run.left(true), run.left(false));
        all.sort_by_key(|member| !roots.contains(member));
        let identity = |member: usize| &run.members[member].member.identity;
        let keys = all.into_iter().take(MAX_PROCESSES).map(identity);
        keys.map(|one| (one.pid, one.start_ticks))
            .map(|key| (key, self.doings.get(&key).cloned().unwrap_or_default()))
            .collect()
    }

    pub(super) fn names(&self) -> Arc<Mutex<Names>> {
        Arc::clone(&self.names)
    }

    /// What was copied has come.
    pub(super) fn copied(&mut self, service: usize, (looks, lost): &Copied) {
        let found = looks.iter().map(bare).collect();
        self.glances.insert(service, Glance { found, lost: *lost, has_copy: true, has_names: false });
    }

    /// The names of what was copied have come.
    pub(super) fn named(&mut self, service: usize, found: Named) {
        if let Some(glance) = self.glances.get_mut(&service) {
            (glance.found, glance.has_names) = (found, true);
        }
    }

    /// What is known of a service that is given up; `None` if nobody has looked at it.
    pub(super) fn fact(&self, service: usize) -> Option<Fact> {
        let glance = self.glances.get(&service)?;
        let unknown = if glance.has_copy {
            (!glance.has_names).then(|| "where its threads are: their stacks had no names in time".to_owned())
        } else {
            Some("its threads: the observer of the agent has not answered in time".to_owned())
        };
        let is_whole = !self.has_gap && glance.lost <= self.lost_before;
        let is_seen = self.seen.get(&service) == Some(&true);
        let signalled = self.signalled.get(&service).filter(|_| is_seen).map(|(at, _)| *at);
        let nothing = Doings::default();
        let left = |look: &Look<Option<Arc<Stack>>>| {
            let key = (look.process.tgid, ticks(look.process.start_boottime));
            let doings = self.doings.get(&key).unwrap_or(&nothing);
            let since = signalled.map(|signalled| Since { signalled, doings, is_whole });
            Left::new(look, since, Option::as_deref).cut(MAX_THREADS, MAX_FUNCTIONS)
        };
        Some(Fact::Left { left: glance.found.iter().map(left).collect(), unknown })
    }

    /// What a batch of events tells of what the services begin.
    pub(super) fn take(&mut self, machine: &Machine, events: &[Event]) {
        let concerns = |event: &Event| matches!(event, Event::Signal(_)) || Acts::of(event).is_some();
        if !events.iter().any(concerns) {
            return;
        }
        let mut members: HashMap<(u32, u64), usize> = HashMap::new();
        for (service, run) in machine.runs.iter().enumerate().filter(|(_, run)| run.signalled.is_some()) {
            let of =
                |one: &super::course::MemberRun| (one.member.identity.pid, one.member.identity.start_ticks);
            members.extend(run.members.iter().map(|one| (of(one), service)));
        }
        for event in events {
            if let Event::Signal(signal) = event {
                let target = (signal.target.tgid, ticks(signal.target.start_boottime));
                if let Some(service) = members.get(&target)
                    && is_the_stop(&machine.runs[*service], signal)
                    && self.signalled.get(service).is_none_or(|(_, by_kernel)| !by_kernel)
                {
                    self.signalled.insert(*service, (signal.header.time, true));
                }
                continue;
            }
            let Header { process, .. } = event.header();
            let key = (process.tgid, ticks(process.start_boottime));
            if let Some(service) = members.get(&key)
                && let Some((signalled, _)) = self.signalled.get(service)
            {
                self.doings.entry(key).or_default().take(event, *signalled);
            }
        }
    }
}

/// Whether it is the signal by which a service is asked to stop: the drain's, or systemd's.
fn is_the_stop(run: &Run, signal: &SignalEvent) -> bool {
    let number = i32::try_from(signal.signal).unwrap_or(0);
    let by = signal.header.process.tgid;
    let is_systemds = run.found.unit.is_some() && by == 1 && Signal::by_number(number).is_some();
    let is_own = by == std::process::id() && run.signals.contains(&number);
    signal.what == SIGNAL_GENERATED && (is_systemds || is_own)
}

/// Without stacks.
fn bare(look: &Look<Option<RawStack>>) -> Look<Option<Arc<Stack>>> {
    look.without_stacks()
}

/// Has the threads of processes looked at; blocks until that is done. Those that are gone are left out.
pub(super) fn copy(asker: &Asker, processes: Vec<((u32, u64), Doings)>) -> Option<Copied> {
    let (mut looks, mut lost) = (Vec::new(), 0);
    for (process, doings) in processes {
        let (reply, answer) = sync_channel(1);
        asker.ask(Request::Left(process, Box::new(doings), reply));
        let (look, now) = answer.recv_timeout(ANSWER).ok()?;
        looks.extend(look.filter(|look| look.count > 0));
        lost = lost.max(now);
    }
    Some((looks, lost))
}

/// Names what was copied; blocks until that is done.
pub(super) fn name(names: &Mutex<Names>, (looks, _): Copied) -> Named {
    let mut names = names.lock().unwrap_or_else(PoisonError::into_inner);
    let named = |look: Look<Option<RawStack>>| {
        let process = look.process;
        look.map(|census| names.census(process, census))
    };
    looks.into_iter().map(named).collect()
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            course::{Begun, Entry, Found, Member},
            identity::Identity,
            service::{OnDeadline, Service},
        },
        *,
    };

    const MS: u64 = 1_000_000;
    /// Of the only service of a drain that has begun at 0.
    const DEADLINE: u64 = 10_000 * MS;

    fn machine(on_deadline: OnDeadline) -> Machine {
        let begun = Begun {
            id: "d".to_owned(),
            boot_id: "b".to_owned(),
            trigger: "test".to_owned(),
            uid: 0,
            began: 0,
            deadline: DEADLINE,
            stages: vec![vec![0]],
            services: vec![Service { on_deadline, ..Service::example("web") }],
            absent: Vec::new(),
        };
        let member = Member {
            identity: Identity::example(7),
            is_root: true,
            is_descendant: false,
            command: "web".to_owned(),
        };
        let found = Found { members: vec![member], ..Found::default() };
        let grants = vec![(Duration::from_nanos(DEADLINE), None)];
        let entries = [
            Entry::Begun(Box::new(begun)),
            Entry::Stage { at: 0, stage: 0, grants },
            Entry::Found { at: 0, service: 0, found: Box::new(found) },
            Entry::Signalling { at: 0, service: 0, members: vec![0], signal: libc::SIGTERM },
            Entry::Signalled { at: 1, service: 0, failed: Vec::new() },
        ];
        Machine::replay(entries).unwrap()
    }

    #[test]
    fn a_look_is_due_a_second_before_the_deadline_and_once() {
        let (machine, mut leaving) = (machine(OnDeadline::Report), Leaving::default());
        assert_eq!(leaving.next(&machine, 0), Some(DEADLINE / 2), "then what it begins is followed");
        assert!(leaving.half(&machine, DEADLINE / 2 - 1).is_empty());
        assert_eq!(leaving.half(&machine, DEADLINE / 2), [0]);
        assert!(leaving.half(&machine, DEADLINE).is_empty());
        assert_eq!(leaving.next(&machine, DEADLINE / 2), Some(DEADLINE - 1_000 * MS));
        assert!(leaving.due(&machine, DEADLINE - 1_001 * MS).is_empty());
        assert_eq!(leaving.due(&machine, DEADLINE - 1_000 * MS), [0]);
        assert!(leaving.due(&machine, DEADLINE).is_empty());
        assert_eq!(leaving.next(&machine, DEADLINE - 900 * MS), Some(DEADLINE), "then that of the machine");
    }

    #[test]
    fn a_service_is_held_for_what_is_not_known_of_it_but_not_for_long() {
        for (on_deadline, without_names) in [(OnDeadline::Report, true), (OnDeadline::Kill, false)] {
            let (machine, mut leaving) = (machine(on_deadline), Leaving::default());
            assert_eq!(leaving.held(&machine, DEADLINE), None, "nobody looks at it");
            leaving.half(&machine, DEADLINE / 2);
            leaving.due(&machine, DEADLINE - 1);
            let until = DEADLINE + 100 * MS;
            assert_eq!(leaving.held(&machine, DEADLINE - 1), None);
            assert_eq!(leaving.held(&machine, DEADLINE), Some(until));
            assert_eq!(leaving.next(&machine, DEADLINE), Some(until), "and the driver sleeps until then");
            assert_eq!(leaving.held(&machine, until), None);
            // A copy is enough for what KILL ends: its stacks may have names afterwards.
            leaving.copied(0, &(Vec::new(), 0));
            assert_eq!(leaving.held(&machine, DEADLINE).is_some(), without_names);
            leaving.named(0, Vec::new());
            assert_eq!(leaving.held(&machine, DEADLINE), None);
        }
    }

    #[test]
    fn what_has_not_come_in_time_is_said_to_be_unknown() {
        let (machine, mut leaving) = (machine(OnDeadline::Report), Leaving::default());
        let unknown = |leaving: &Leaving| match leaving.fact(0) {
            Some(Fact::Left { unknown, .. }) => unknown.unwrap_or_default(),
            fact => panic!("{fact:?}"),
        };
        assert_eq!(leaving.fact(0), None);
        leaving.due(&machine, DEADLINE);
        assert!(unknown(&leaving).contains("has not answered"));
        leaving.copied(0, &(Vec::new(), 0));
        assert!(unknown(&leaving).contains("no names in time"));
        leaving.named(0, Vec::new());
        assert_eq!(unknown(&leaving), "");
        assert_eq!(leaving.wanted(&machine, 0), [((7, 100), Doings::default())]);
    }
}

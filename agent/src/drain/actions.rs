//! What the machine wants is done, and the machine is told what came of it.

use std::{collections::VecDeque, time::Duration};

use tokio::time;
use tokio_util::sync::CancellationToken;

use super::{
    active::{Active, gone, prestop, same},
    command::Preflight,
    course::{Action, Entry, Input, NotSent, UnitEnd, nanos},
    driver::{Driver, EVENTS, Waited},
    machine::KILL_GRACE,
    signaller, units,
};
use crate::clock;

/// What follows from an answer comes before what waited already: whoever was found is asked to stop, however long it takes to
/// look at the others of his stage. Entries are in the order in which they have changed the machine.
pub(super) fn next(actions: Vec<Action>, todo: &mut VecDeque<Action>, written: &mut Vec<Entry>) {
    let mut first = Vec::new();
    for action in actions {
        match action {
            Action::Journal(entry) => written.push(entry),
            action => first.push(action),
        }
    }
    first.into_iter().rev().for_each(|action| todo.push_front(action));
}

impl Driver {
    /// Does what the machine wants, and tells it what came of that until nothing is left to do.
    pub(super) fn perform(&mut self, actions: Vec<Action>) {
        let Some(mut active) = self.active.take() else { return };
        let (mut todo, mut written) = (VecDeque::new(), Vec::new());
        next(actions, &mut todo, &mut written);
        while let Some(action) = todo.pop_front() {
            // Nothing is done that another agent would not know of.
            active.write(&mut written);
            if let Action::Look(service) = action {
                let inputs = active.counted(service).into_iter().chain(active.left_behind(service));
                for input in inputs.collect::<Vec<_>>() {
                    next(active.machine.step(clock::boottime(), input), &mut todo, &mut written);
                }
            }
            if let Some(input) = self.act(&mut active, &action) {
                next(active.machine.step(clock::boottime(), input), &mut todo, &mut written);
            }
        }
        active.write(&mut written);
        if active.machine.finished.is_some() {
            self.close(active);
        } else {
            self.active = Some(active);
        }
        self.publish();
    }

    fn act(&mut self, active: &mut Active, action: &Action) -> Option<Input> {
        match action {
            Action::Journal(_) => None,
            Action::Find(service) => {
                let (found, processes) = active.look(*service);
                Some(match found {
                    Preflight::Found(mut found) => {
                        let ports = active
                            .sockets
                            .as_mut()
                            .map(|sockets| sockets.add(*service, processes.iter(), false));
                        (found.ports, found.knows_ports) = ports.unwrap_or_default();
                        active.take(*service, 0, processes);
                        Input::Found(*service, found)
                    }
                    Preflight::NotRunning => Input::NotRunning(*service),
                    Preflight::Refused(why) => Input::Refused(*service, why),
                })
            }
            Action::Prestop(service) => {
                let commands = &active.machine.begun.services[*service];
                let commands = (commands.prestop.clone(), commands.ready.clone());
                let cancelled = CancellationToken::new();
                active.prestops.insert(*service, cancelled.clone());
                let (id, service, ask) = (active.machine.begun.id.clone(), *service, self.ask.clone());
                self.waits.push(Box::pin(async move {
                    let why = prestop(commands, cancelled).await;
                    // What has ended by it is told first.
                    ask.hurry();
                    time::sleep(EVENTS).await;
                    Waited::Prestop(id, service, why)
                }));
                None
            }
            Action::EndPrestop(service) => {
                active.prestops.remove(service).iter().for_each(CancellationToken::cancel);
                None
            }
            Action::Send { service, members, signal } => {
                let uid = active.machine.begun.services[*service].uid;
                let send = |member: &usize| {
                    let meant = &active.machine.runs[*service].members[*member].member.identity;
                    let sent = match active.processes.get(&(*service, *member)) {
                        Some(process) => signaller::send(process, meant, uid, *signal),
                        None => Err(NotSent::Gone),
                    };
                    sent.err().map(|why| (*member, why))
                };
                let failed = members.iter().filter_map(send).collect();
                active.leaving.sent(*service, clock::boottime());
                Some(Input::Sent(*service, failed))
            }
            Action::StopUnit(service, unit) => {
                let run = &active.machine.runs[*service];
                if active.is_lost(*service) {
                    // Whatever runs there now is not what was found.
                    return Some(Input::Unit(
                        *service,
                        UnitEnd::Unknown("its processes were gone when the agent was back".to_owned()),
                    ));
                }
                let left = run.deadline().saturating_add(nanos(KILL_GRACE)).saturating_sub(clock::boottime());
                let (id, service, unit) = (active.machine.begun.id.clone(), *service, unit.clone());
                self.waits.push(Box::pin(async move {
                    Waited::Unit(id, service, units::stop(unit, Duration::from_nanos(left)).await)
                }));
                None
            }
            Action::FindUnit(service, unit) => {
                let end = match units::end_of(unit) {
                    // It may be the end of a later run.
                    UnitEnd::Stopped(_) if active.is_lost(*service) => UnitEnd::Stopped(String::new()),
                    end => end,
                };
                Some(Input::Unit(*service, end))
            }
            Action::Watch(service) => {
                self.watch(active, *service);
                None
            }
            Action::Look(service) => {
                let rest = active.look_again(*service);
                Some(Input::Looked(*service, rest))
            }
        }
    }

    /// Waits for the members of a service that are there.
    fn watch(&mut self, active: &mut Active, service: usize) {
        let mut taken_up = Vec::new();
        for member in 0..active.machine.runs[service].members.len() {
            let known = &active.machine.runs[service].members[member];
            let meant = known.member.identity.clone();
            if known.gone.is_some() || !active.watched.insert((service, member)) {
                continue;
            }
            let held = active.processes.get(&(service, member)).cloned();
            // Of an agent before.
            if held.is_none() {
                taken_up.push(member);
            }
            let registered = active.registered.get(&service);
            let registered = registered.filter(|process| process.identity.is_same_process(&meant));
            let held = held.or_else(|| registered.cloned()).or_else(|| same(&meant));
            let (id, gone) = (active.machine.begun.id.clone(), held.as_deref().and_then(gone));
            let over = active.over.clone();
            let is_there = held.is_some();
            if let Some(process) = held {
                active.hold(service, member, process);
            }
            // One that cannot be waited for runs into its deadline, and is not called gone.
            if is_there && gone.is_none() {
                continue;
            }
            self.waits.push(Box::pin(async move {
                if let Some(gone) = gone {
                    over.run_until_cancelled(gone).await;
                }
                Waited::Member(id, service, member)
            }));
        }
        if !taken_up.is_empty() {
            active.take_up(service, &taken_up);
        }
    }
}

//! What an entry of the journal changes.

use super::{
    course::{Entry, Fact, Found, Member, MemberRun, NotSent, Phase, Run, Sent, of_member, signal_name},
    machine::Machine,
    service::Target,
};
use crate::losses::MAX_EXAMPLES;

impl Machine {
    /// The only place where anything changes that is not made up again.
    pub(super) fn apply(&mut self, entry: &Entry) {
        let mut tell = |at: u64, service: usize, words: String| self.runs[service].timeline.push((at, words));
        match entry {
            Entry::Begun(_) => {}
            Entry::Before { signalled } => self.signalled_before.clone_from(signalled),
            Entry::Resumed { at } => self.resumed.push(*at),
            Entry::Cancelled { at } => {
                self.cancelled = Some(*at);
                for run in self.runs.iter_mut().filter(|run| run.phase == Phase::Waiting) {
                    run.phase = Phase::Settled;
                    run.refused = Some("cancelled before its stage".to_owned());
                }
            }
            Entry::GivenUp { at, why } => {
                self.cancelled.get_or_insert(*at);
                self.given_up = Some(why.clone());
                self.runs.iter_mut().for_each(|run| give_up(run, *at, why));
            }
            Entry::Stage { at, stage, grants } => {
                self.stage = Some(*stage);
                for (service, (grant, shortened)) in self.begun.stages[*stage].iter().zip(grants) {
                    let run = &mut self.runs[*service];
                    (run.phase, run.began, run.grant) = (Phase::Checking, *at, *grant);
                    run.notes.extend(shortened.clone());
                }
            }
            Entry::Refused { at, service, why } => {
                tell(*at, *service, format!("refused: {why}"));
                let run = &mut self.runs[*service];
                (run.phase, run.refused) = (Phase::Settled, Some(why.clone()));
            }
            Entry::NotRunning { at, service } => {
                let is_first = self.runs[*service].members.is_empty();
                let what = if is_first { "does not run" } else { "has ended, and is not asked to stop" };
                self.runs[*service].timeline.push((*at, what.to_owned()));
                let run = &mut self.runs[*service];
                if !run.members.is_empty() {
                    // It was there before `prestop`.
                    (run.phase, run.gone) = (Phase::Gone, Some(*at));
                    run.members.iter_mut().for_each(|one| one.gone = Some(*at));
                    return;
                }
                run.phase = Phase::Settled;
                run.notes.push(match &self.begun.services[*service].target {
                    Target::Pidfile(path) => format!("{} names no process that runs", path.display()),
                    Target::Exe(path, _) => {
                        format!("no process runs {} with these arguments", path.display())
                    }
                    Target::Cgroup(path) => format!("no process is in {path}"),
                    Target::Port(port) => format!("no process listens on port {port}"),
                    Target::Unit(_) | Target::Process(_) => "it did not run".to_owned(),
                });
            }
            Entry::NoTime { at, service } => {
                tell(*at, *service, "no time is left".to_owned());
                let run = &mut self.runs[*service];
                (run.phase, run.is_late) = (Phase::Settled, true);
                run.notes.push("no time was left: it was not asked to stop".to_owned());
            }
            Entry::Prestop { at, service } => {
                tell(*at, *service, self.begun.services[*service].awaited().to_owned());
                self.runs[*service].phase = Phase::Prestop;
            }
            Entry::PrestopEnded { at, service, why } => {
                let what = self.begun.services[*service].awaited();
                tell(*at, *service, format!("{what} has ended"));
                let run = &mut self.runs[*service];
                (run.phase, run.prestopped) = (Phase::Checking, true);
                run.notes.extend(why.as_ref().map(|why| format!("{what} {why}")));
            }
            Entry::Found { service, found, .. } => {
                let run = &mut self.runs[*service];
                if run.phase != Phase::Prestop {
                    run.phase = Phase::Stopping;
                    run.notes.extend(found.notes.iter().cloned());
                }
                if found.leaves_out {
                    let why = "it has started processes that are not followed: there are too many, or they could not be looked at".to_owned();
                    saw(run, &Fact::Unseen { why, strays: true });
                }
                let is_there = |one: &MemberRun| {
                    let is_it = |member: &Member| member.identity.is_same_process(&one.member.identity);
                    found.members.iter().any(is_it)
                };
                let was_found = !run.members.is_empty();
                run.earlier.extend(run.members.drain(..).filter(|one| !is_there(one)));
                run.members = found.members.iter().cloned().map(of_member).collect();
                // What was known before `prestop` is so still.
                let (mut ports, mut knows_ports) = (found.ports.clone(), found.knows_ports);
                if was_found {
                    ports.extend(run.found.ports.iter().filter(|port| !found.ports.contains(port)));
                    knows_ports &= run.found.knows_ports;
                }
                run.found = Found { members: Vec::new(), ports, knows_ports, ..(**found).clone() };
            }
            Entry::Signalling { at, service, members, signal } => {
                let (name, run) = (signal_name(*signal), &mut self.runs[*service]);
                if members.is_empty() {
                    run.timeline.push((*at, format!("has got {name}")));
                    run.notes.push(format!("{name} was sent by the drain before, and is not sent again"));
                } else {
                    run.timeline.push((*at, format!("gets {name}")));
                }
                run.signalled.get_or_insert(*at);
                run.signals.push(*signal);
                members.iter().for_each(|member| run.members[*member].sent = Sent::Perhaps);
                if *signal == libc::SIGKILL {
                    run.phase = Phase::Killing;
                    run.killed.get_or_insert(*at);
                }
            }
            Entry::Signalled { service, failed, .. } => {
                let run = &mut self.runs[*service];
                let perhaps = run.members.iter().filter(|one| one.sent == Sent::Perhaps).count();
                if perhaps > 0
                    && failed.len() == perhaps
                    && failed.iter().all(|(_, why)| *why == NotSent::Gone)
                {
                    run.vain.extend(run.signals.last());
                }
                for one in run.members.iter_mut().filter(|one| one.sent == Sent::Perhaps) {
                    one.sent = Sent::Yes;
                }
                for (member, why) in failed {
                    run.members[*member].sent = Sent::Failed(why.clone());
                }
            }
            Entry::UnitStopping { at, service, unit } => {
                tell(*at, *service, format!("systemd stops {unit}"));
                let run = &mut self.runs[*service];
                run.signalled.get_or_insert(*at);
                for one in &mut run.members {
                    one.sent = Sent::Yes;
                }
            }
            Entry::UnitStopped { at, service, result, why } => {
                match (result.as_deref(), why) {
                    (_, Some(why)) => tell(*at, *service, why.clone()),
                    (None | Some("" | "success"), None) => {
                        tell(*at, *service, "systemd has stopped it".to_owned());
                    }
                    (Some(result), None) => {
                        tell(
                            *at,
                            *service,
                            format!("systemd has stopped it, and calls it failed ({result})"),
                        );
                    }
                }
                let run = &mut self.runs[*service];
                run.notes.extend(why.clone());
                (run.unit_stopped, run.unit_result) = (true, result.clone());
            }
            Entry::Gone { at, service, member } => {
                let run = &mut self.runs[*service];
                run.members[*member].gone = Some(*at);
                let pid = run.members[*member].member.identity.pid;
                if run.members[*member].member.is_root {
                    run.timeline.push((*at, format!("{pid} is gone")));
                }
            }
            Entry::More { at, service, members, ports, knows_ports } => {
                let many = if members.len() == 1 { "process" } else { "processes" };
                tell(*at, *service, format!("{} more {many}", members.len()));
                let run = &mut self.runs[*service];
                run.phase = if run.killed.is_some() { Phase::Killing } else { Phase::Stopping };
                run.members.extend(members.iter().cloned().map(of_member));
                let more = ports.iter().filter(|port| !run.found.ports.contains(port));
                let more: Vec<u32> = more.copied().collect();
                run.found.ports.extend(more);
                run.found.knows_ports &= knows_ports;
            }
            Entry::AllGone { at, service } => {
                let run = &mut self.runs[*service];
                (run.phase, run.gone) = (Phase::Gone, Some(*at));
            }
            Entry::Seen { service, fact, .. } => saw(&mut self.runs[*service], fact),
            Entry::Late { at, service } => {
                tell(*at, *service, "its deadline has passed".to_owned());
                let run = &mut self.runs[*service];
                (run.phase, run.is_late) = (Phase::Late, true);
            }
            Entry::Again { at, service, what } => {
                tell(*at, *service, format!("runs again: {what}"));
                self.runs[*service].again = Some(what.clone());
            }
            Entry::Settled { service, .. } => self.runs[*service].phase = Phase::Settled,
            Entry::Ended { at } => self.ended = Some(*at),
            Entry::Finished { at } => self.finished = Some(*at),
        }
    }
}

/// A service is not waited for any longer, nor asked to stop.
fn give_up(run: &mut Run, at: u64, why: &str) {
    match run.phase {
        Phase::Gone | Phase::Late | Phase::Settled => return,
        Phase::Stopping | Phase::Confirming | Phase::Killing if run.signalled.is_some() => {
            (run.phase, run.is_late, run.given_up) = (Phase::Late, true, Some(why.to_owned()));
            run.notes.push(format!("given up: {why}"));
        }
        _ => {
            run.phase = Phase::Settled;
            run.refused = Some(format!("cancelled before it was asked to stop: {why}"));
        }
    }
    run.timeline.push((at, format!("is given up: {why}")));
}

/// What the kernel said of a service.
pub(super) fn saw(run: &mut Run, fact: &Fact) {
    let mut tell = |at: u64, words: String| {
        // It is told a moment later.
        let place = run.timeline.partition_point(|(time, _)| *time <= at);
        run.timeline.insert(place, (at, words));
    };
    let seen = &mut run.seen;
    match fact {
        Fact::Exit { member, status, time } => {
            let one = &mut run.members[*member];
            (one.status, one.exited) = (Some(*status), Some(*time));
        }
        Fact::Taken { at, signal, how } => {
            tell(*at, format!("{} is taken, {how}", signal_name(*signal)));
            seen.taken.push(*signal);
        }
        Fact::Killed { at, by } => {
            tell(*at, format!("{by} sends KILL"));
            seen.killed_by = Some(by.clone());
        }
        Fact::NoMemory { at } => {
            tell(*at, "is killed by the kernel: there is no memory".to_owned());
            seen.killed_by = Some("the kernel for want of memory".to_owned());
        }
        Fact::ChildDied { at, signal } => {
            tell(*at, format!("a process that it has started dies of {}", signal_name(*signal)));
            seen.child_died = Some(*signal);
        }
        Fact::Listener { at, port, is_ipv6, waiting } => {
            let which = if *is_ipv6 { " (IPv6)" } else { "" };
            tell(*at, format!("port {port}{which} is closed, {waiting} not accepted"));
            seen.listeners.push((*port, *at, *waiting));
        }
        Fact::Lost { requests, guessed, examples } => {
            for (class, many) in requests {
                let at = examples.iter().find(|one| one.class == *class).map_or(0, |one| one.at);
                if !seen.lost.contains_key(class) && at != 0 {
                    tell(at, format!("the first request is lost: {class}"));
                }
                *seen.lost.entry(*class).or_default() += many;
            }
            seen.guessed += guessed;
            let room = MAX_EXAMPLES.saturating_sub(seen.examples.len());
            seen.examples.extend(examples.iter().take(room).cloned());
        }
        Fact::Counted { counts } => seen.counts.clone_from(counts),
        Fact::InFlight { at, requests } => {
            // The first and the last are enough for who reads it.
            if seen.in_flight.is_none() || *requests == 0 {
                tell(*at, format!("says that it works on {requests} requests"));
            }
            seen.in_flight = Some(*requests);
            seen.said += 1;
        }
        Fact::Unseen { why, strays } => {
            if !seen.unseen.contains(why) {
                seen.unseen.push(why.clone());
            }
            seen.has_strays |= strays;
        }
        Fact::Left { left, unknown } => {
            seen.left.clone_from(left);
            seen.left_unknown.clone_from(unknown);
        }
    }
}

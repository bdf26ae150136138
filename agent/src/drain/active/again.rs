//! What of a service is left when all that was known of it has gone, and what runs in its place.

use std::collections::HashSet;

use super::{
    super::{
        course::{Member, MemberRun, Phase, Rest},
        identity::{Identity, ticks},
        matching::{self, Match},
        process::{self, Process},
        service::Target,
        units,
    },
    Active, NOT_ALL, member, of_unit,
};

impl Active {
    /// What of a service is left, and what runs in its place.
    pub(in super::super) fn look_again(&mut self, service: usize) -> Rest {
        let target = self.machine.begun.services[service].target.clone();
        let is_confirming = self.machine.runs[service].phase == Phase::Confirming;
        let (mut left, are_all) = if is_confirming { self.started(service) } else { (Vec::new(), true) };
        let run = &self.machine.runs[service];
        // A supervisor may be quicker than this task: the kernel's word on when it ended comes first.
        let end = |one: &MemberRun| one.exited.or(one.gone);
        let last = run.members.iter().filter_map(end).max().or(run.gone).unwrap_or(0);
        let ended = ticks(last);
        let is_known = |one: &Match| {
            let is_it = |known: &MemberRun| known.member.identity.is_same_process(&one.process.identity);
            run.members.iter().any(is_it)
        };
        let found = match &target {
            // Nobody but that one is named.
            Target::Process(_) if is_confirming => Ok(Vec::new()),
            Target::Process(meant) => match run.members.first() {
                Some(known) => {
                    let parent = self.processes.get(&(service, 0)).map(|process| process.ppid);
                    successors(meant, (&known.member.command, parent), ended)
                }
                None => Ok(Vec::new()),
            },
            target => now(target),
        };
        // Only a cgroup says by itself whose a process is.
        let has_all = matches!(target, Target::Unit(_) | Target::Cgroup(_));
        let unseen = match &found {
            // Of others it is looked for later whether they run again.
            Err(why) if has_all || !is_confirming => {
                Some(format!("whether it runs again could not be looked at: {why}"))
            }
            _ if !are_all || self.leaves_out.contains(&service) => Some(NOT_ALL.to_owned()),
            _ => None,
        };
        left.retain(|one| !is_known(one));
        // Of another one, which has its port, its pidfile or its program now, nothing is waited for: it was not asked to
        // stop. Where nobody saw when the service ended, what is in its cgroup may be another one, too, and gets no KILL.
        let is_seen = run.members.iter().all(|one| one.exited.is_some());
        let mut again = None;
        for one in found.into_iter().flatten().filter(|one| !is_known(one)) {
            let Identity { pid, comm, .. } = &one.process.identity;
            let born =
                left.iter_mut().find(|born| born.process.identity.is_same_process(&one.process.identity));
            match born {
                // It is named, too.
                Some(born) => born.is_descendant = false,
                None if has_all && one.process.identity.start_ticks < ended => {
                    if is_confirming {
                        left.push(Match { is_descendant: !is_seen, ..one });
                    }
                }
                None => again = again.or_else(|| Some(format!("pid {pid} ({comm})"))),
            }
        }
        let first = run.members.len();
        let members = left.iter().map(|one| Member { is_root: false, ..member(one) }).collect();
        let (mut ports, mut knows_ports) = (Vec::new(), true);
        if let Some(sockets) = self.sockets.as_mut().filter(|_| !left.is_empty()) {
            (ports, knows_ports) = sockets.add(service, left.iter().map(|one| &one.process), true);
        }
        self.take(service, first, left.into_iter().map(|one| one.process).collect());
        Rest { members, ports, knows_ports, again, unseen }
    }
}

/// What a service names now.
fn now(target: &Target) -> Result<Vec<Match>, String> {
    match target {
        Target::Unit(name) => units::known(name)?.as_ref().map_or_else(|| Ok(Vec::new()), of_unit),
        // One that cannot be used names nobody.
        Target::Pidfile(_) => Ok(matching::find(target, None).unwrap_or_default()),
        // Nobody is started from what is not there.
        Target::Exe(path, _) if !path.exists() => Ok(Vec::new()),
        target => matching::find(target, None),
    }
}

/// Processes that do what one did that has ended: its program, with its arguments, in its cgroup. Not what another one of
/// the kind has started, which may serve somebody else all the time, unless that had started the one that has ended.
fn successors(
    meant: &Identity,
    (command, parent): (&str, Option<u32>),
    ended: u64,
) -> Result<Vec<Match>, String> {
    let same = |process: &Process| {
        let identity = &process.identity;
        // An upgrade has put another file there.
        let is_program = identity.exe == meant.exe || identity.comm == meant.comm;
        is_program && identity.cgroup == meant.cgroup && process.command == command
    };
    let all = process::all().map_err(|error| format!("/proc cannot be read: {error}"))?.into_iter();
    let all = all.filter(|pid| matching::runs(*pid, meant.exe) || process::comm(*pid) == meant.comm);
    let all: Vec<Process> =
        all.filter_map(|pid| Process::open(pid).ok()).filter(|process| same(process)).collect();
    let others: HashSet<u32> = all.iter().map(|process| process.identity.pid).collect();
    let is_anothers = |process: &Process| {
        others.contains(&process.ppid) && parent.is_some_and(|parent| parent != process.ppid)
    };
    let found = all
        .into_iter()
        .filter(|process| process.identity.start_ticks >= ended && !is_anothers(process))
        .map(|process| Match { process, is_root: true, is_descendant: false });
    Ok(found.collect())
}

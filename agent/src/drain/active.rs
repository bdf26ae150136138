//! A drain under way: what the driver holds for it, and how it looks at services.

mod again;

use std::{
    collections::{HashMap, HashSet},
    io,
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use plumb_common::{event::Header, task::ProcKey};
use tokio::{io::unix::AsyncFd, time};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    command::{Listed, Preflight},
    course::{Entry, Fact, Found, Input, Member, MemberRun, Phase, Run},
    facts,
    family::{self, Claims, Tree},
    identity::Identity,
    journal::Journal,
    leaving::Leaving,
    machine::Machine,
    matching::{self, Match},
    preflight,
    process::Process,
    report::Document,
    service::{Service, Target},
    sockets::Sockets,
    systemd::Unit,
    units,
    verdict::is_crash,
};
use crate::{
    clock::{self, Calendar},
    decode::Event,
};

const NOT_ALL: &str = "a process that it had started could not be looked at";

/// A drain under way.
pub(super) struct Active {
    pub(super) machine: Machine,
    pub(super) journal: Result<Journal, String>,
    pub(super) processes: HashMap<(usize, usize), Arc<Process>>,
    /// The registered processes, by service, held since before the drain began; none for one that was gone then.
    pub(super) registered: HashMap<usize, Arc<Process>>,
    /// Members whose end is waited for.
    pub(super) watched: HashSet<(usize, usize)>,
    pub(super) prestops: HashMap<usize, CancellationToken>,
    /// What the kernel says of the services; `None` when nobody is asked.
    pub(super) sockets: Option<Sockets>,
    /// What is left of those that do not stop in time.
    pub(super) leaving: Leaving,
    /// Members that have gone, and of which that is all that is known.
    pub(super) untold: HashSet<(usize, usize)>,
    /// What its processes have started.
    tree: Tree,
    /// Services of which not all processes could be looked at when they were taken up.
    leaves_out: HashSet<usize>,
    /// Which service names whom, as of the stage that has begun last.
    claims: Option<(Option<usize>, Claims)>,
    /// On how many requests services have said last that they work.
    pub(super) said: HashMap<usize, u64>,
    /// What is waited for is, until this drain is over: what does not stop would be waited for, and its pidfd held, without end.
    pub(super) over: CancellationToken,
    _over: DropGuard,
}

impl Active {
    pub(super) fn new(
        machine: Machine,
        journal: Result<Journal, String>,
        registered: HashMap<usize, Arc<Process>>,
        sockets: Option<Sockets>,
    ) -> Self {
        if let Err(why) = &journal {
            tracing::warn!("this drain has no journal, nobody takes it up if the agent is killed: {why}");
        }
        let (processes, watched, prestops) = Default::default();
        let leaving = Leaving::new(sockets.as_ref().map_or(0, Sockets::lost_acts));
        let (tree, leaves_out, claims, untold, said) = Default::default();
        let over = CancellationToken::new();
        Self {
            machine,
            journal,
            processes,
            registered,
            watched,
            prestops,
            sockets,
            leaving,
            untold,
            tree,
            leaves_out,
            claims,
            said,
            _over: over.clone().drop_guard(),
            over,
        }
    }

    pub(super) fn document(&self) -> Document {
        let journal = self.journal.as_ref().map_or_else(Clone::clone, |_| "kept".to_owned());
        Document::new(&self.machine, &journal, Calendar::now(), clock::boottime())
    }

    /// Holds processes as the members of a service from a place on; what was held of them before is known no longer.
    pub(super) fn take(&mut self, service: usize, first: usize, processes: Vec<Process>) {
        self.processes.retain(|(of, member), _| *of != service || *member < first);
        for (member, process) in (first..).zip(processes) {
            self.hold(service, member, Arc::new(process));
        }
    }

    /// Holds a process as a member of a service.
    pub(super) fn hold(&mut self, service: usize, member: usize, process: Arc<Process>) {
        self.tree.add(service, &process);
        self.processes.insert((service, member), process);
    }

    /// Looks for a service and at it.
    pub(super) fn look(&mut self, service: usize) -> (Preflight, Vec<Process>) {
        let earlier = self.earlier(service);
        self.claim();
        let (services, registered) = (&self.machine.begun.services, &self.registered);
        let Some((_, claims)) = &self.claims else { return (Preflight::NotRunning, Vec::new()) };
        let held = registered.get(&service).map(Arc::as_ref);
        look((service, &services[service]), (held, earlier), claims, services)
    }

    /// Who names whom, as it was just found.
    pub(super) fn claimed(&mut self, claims: Claims) {
        self.claims = Some((self.machine.stage, claims));
    }

    /// Who names whom may be another one at each stage: what was started again has another number.
    fn claim(&mut self) {
        let Self { machine, registered, claims, .. } = self;
        if claims.as_ref().is_none_or(|(stage, _)| *stage != machine.stage) {
            let held = |service: usize| registered.get(&service).cloned();
            let mut now = Claims::of(&machine.begun.services, held);
            if let Some((_, before)) = claims.take() {
                now.keep(before);
            }
            *claims = Some((machine.stage, now));
        }
    }

    /// What was found of a service before `prestop`, and still is what it was: it may have left its port or its pidfile.
    fn earlier(&self, service: usize) -> Vec<Match> {
        let members = self.machine.runs[service].members.iter().map(|one| &one.member).enumerate();
        let held = members.filter_map(|(at, member)| {
            let process = self.processes.get(&(service, at))?.again().ok()?;
            let is_it = member.is_descendant || member.identity.differs(&process.identity).is_none();
            is_it.then_some(Match { process, is_root: false, is_descendant: member.is_descendant })
        });
        held.collect()
    }

    /// Takes up the processes of a service that another agent has found: what they are asked from now on, and what they have
    /// started.
    pub(super) fn take_up(&mut self, service: usize, members: &[usize]) {
        let held = members.iter().filter_map(|member| self.processes.get(&(service, *member)).cloned());
        let held: Vec<Arc<Process>> = held.collect();
        if let Some(sockets) = &mut self.sockets {
            sockets.add(service, held.iter().map(Arc::as_ref), false);
        }
        // Of these a cgroup has all.
        if matches!(self.machine.begun.services[service].target, Target::Unit(_) | Target::Cgroup(_)) {
            return;
        }
        self.claim();
        let again = held.iter().filter_map(|process| process.again().ok());
        let found: Vec<Match> =
            again.map(|process| Match { process, is_root: true, is_descendant: false }).collect();
        if let Some((_, claims)) = &self.claims {
            let (more, are_all) = family::descendants(&found, claims, service);
            if !are_all {
                self.leaves_out.insert(service);
            }
            more.iter().for_each(|one| self.tree.add(service, &one.process));
        }
    }

    /// Holds what an agent before had found of services whose `prestop` runs, or has run.
    pub(super) fn hold_again(&mut self) {
        let is_between = |run: &Run| matches!(run.phase, Phase::Checking | Phase::Prestop);
        let between = (0..self.machine.runs.len()).filter(|service| is_between(&self.machine.runs[*service]));
        for service in between.collect::<Vec<_>>() {
            let members: Vec<usize> = (0..self.machine.runs[service].members.len()).collect();
            for member in &members {
                if let Some(process) = same(&self.machine.runs[service].members[*member].member.identity) {
                    self.hold(service, *member, process);
                }
            }
            self.take_up(service, &members);
        }
    }

    /// Whether a service had processes when it was found, and none of these is held.
    pub(super) fn is_lost(&self, service: usize) -> bool {
        let is_held = self.processes.keys().any(|(of, _)| *of == service);
        !self.machine.runs[service].members.is_empty() && !is_held
    }

    /// Writes what is to be known before anything else is done.
    pub(super) fn write(&mut self, entries: &mut Vec<Entry>) {
        if entries.is_empty() {
            return;
        }
        let written = std::mem::take(entries);
        let Ok(journal) = &mut self.journal else { return };
        if let Err(error) = journal.append(&written) {
            tracing::error!("the journal of the drain cannot be written: {error}; nobody takes it up now");
            // One that ends somewhere else than the drain would have a signal sent twice.
            if let Ok(journal) = std::mem::replace(&mut self.journal, Err(error.to_string())) {
                let _ = journal.remove();
            }
        }
    }

    /// Of which members this is the end: it lies between the time when one was held and the time when it was gone, and
    /// that of another process that had its number before, or has it now, does not.
    pub(super) fn exited(&self, event: &Header, code: u32) -> Vec<Input> {
        let mut inputs = Vec::new();
        for (service, run) in self.machine.runs.iter().enumerate() {
            for (member, one) in run.members.iter().enumerate() {
                let identity = &one.member.identity;
                if identity.is(event.process)
                    && self.processes.get(&(service, member)).is_some_and(|held| held.looked <= event.time)
                    && one.gone.is_none_or(|gone| event.time <= gone)
                {
                    inputs.push(Input::Seen(
                        service,
                        Fact::Exit { member, status: code as i32, time: event.time },
                    ));
                }
            }
        }
        inputs
    }

    /// What a batch of events tells of the services.
    pub(super) fn seen(&mut self, events: &[Event]) -> Vec<Input> {
        let mut inputs = Vec::new();
        for event in events {
            if let Some((service, signal)) = self.crashed(event) {
                inputs.push(Input::Seen(service, Fact::ChildDied { at: event.header().time, signal }));
            }
            if let Some(service) = self.tree.take(event) {
                let why = "it started more processes than are followed".to_owned();
                inputs.push(Input::Seen(service, Fact::Unseen { why, strays: true }));
            }
            if let Event::Exit(exit) = event
                && exit.group_dead != 0
            {
                inputs.extend(self.exited(event.header(), exit.code));
            }
        }
        let Self { machine, sockets, leaving, .. } = self;
        leaving.take(machine, events);
        let of = |process: ProcKey| owner(machine, process);
        let is_over = |service: usize, time: u64| machine.runs[service].gone.is_some_and(|gone| gone < time);
        inputs.extend(sockets.iter_mut().flat_map(|sockets| sockets.take(events, of, is_over)));
        inputs
    }

    /// The service of which a process has crashed, or got KILL, that was started after that was found, and by what; those that
    /// were found are its members, and a service of its own is not its.
    fn crashed(&self, event: &Event) -> Option<(usize, i32)> {
        let Event::Exit(exit) = event else { return None };
        let process = exit.header.process;
        let signal = exit.code as i32 & 0x7f;
        let service = self.tree.of(process).filter(|_| exit.group_dead != 0 && is_crash(signal))?;
        let is_named = self.claims.as_ref().is_some_and(|(_, claims)| claims.has(process));
        let is_new = self.machine.runs[service].gone.is_none() && owner(&self.machine, process).is_none();
        (is_new && !is_named).then_some((service, signal))
    }

    /// What was counted of a service until now.
    pub(super) fn counted(&mut self, service: usize) -> Vec<Input> {
        let is_gone = self.machine.runs[service].gone.is_some();
        let counted =
            self.sockets.as_mut().map_or_else(Vec::new, |sockets| sockets.counted(service, is_gone));
        let said = self.said.get(&service);
        let said = said.map(|requests| Fact::InFlight { at: clock::boottime(), requests: *requests });
        counted.into_iter().chain(said).map(|fact| Input::Seen(service, fact)).collect()
    }

    /// What is there of what a service has started, and is no service of its own; and whether that is all.
    fn started(&self, service: usize) -> (Vec<Match>, bool) {
        let (mut found, are_all) = self.tree.alive(service);
        let is_own = |one: &Match| {
            self.claims
                .as_ref()
                .is_none_or(|(_, claims)| claims.other(service, &one.process.identity).is_none())
        };
        found.retain(is_own);
        (found, are_all)
    }

    /// Whether the kernel has told of the end of a member: then of all that it did before, too.
    pub(super) fn is_told(&self, service: usize, member: usize) -> bool {
        let members = &self.machine.runs[service].members;
        members.get(member).is_none_or(|one| one.exited.is_some())
    }

    /// Members that are waited for, and are not there any more.
    pub(super) fn gone(&self, service: usize) -> Vec<(usize, usize)> {
        let is_waited_for = |member: usize| {
            self.watched.contains(&(service, member))
                && self.machine.runs[service].members[member].gone.is_none()
        };
        let is_gone =
            |one: &(usize, usize)| self.processes.get(one).is_none_or(|process| !process.is_alive());
        let members = (0..self.machine.runs[service].members.len()).filter(|member| is_waited_for(*member));
        members.map(|member| (service, member)).filter(is_gone).collect()
    }

    /// What a service had started just before its end, so that it was not waited for.
    pub(super) fn left_behind(&self, service: usize) -> Option<Input> {
        let run = &self.machine.runs[service];
        if run.phase != Phase::Gone {
            return None;
        }
        let (left, are_all) = self.started(service);
        let why = match left.first().map(|left| &left.process.identity) {
            Some(Identity { pid, comm, .. }) => {
                format!("{pid} ({comm}), which it had started, still ran when it was gone")
            }
            // Of what is looked at once more the last look counts.
            None if !are_all && run.looks >= 2 => NOT_ALL.to_owned(),
            None => return None,
        };
        Some(Input::Seen(service, Fact::Unseen { why, strays: true }))
    }

    /// When something is to be done, nanoseconds since boot.
    pub(super) fn next(&self) -> Option<u64> {
        self.leaving.next(&self.machine, clock::boottime())
    }
}

/// The service of a drain to which a process belongs.
pub(super) fn owner(machine: &Machine, process: ProcKey) -> Option<usize> {
    // Of whom it kills for want of memory the kernel tells the number alone before 6.9.
    let is_numbered = |one: &MemberRun| one.gone.is_none() && one.member.identity.pid == process.tgid;
    let is =
        |one: &MemberRun| one.member.identity.is(process) || process.start_boottime == 0 && is_numbered(one);
    machine.runs.iter().position(|run| run.members.iter().any(is))
}

/// The registered processes of a drain.
pub(super) fn by_place(
    services: &[Service],
    held: impl Fn(&Service) -> Option<Arc<Process>>,
) -> HashMap<usize, Arc<Process>> {
    let of = |(at, service): (usize, &Service)| Some((at, held(service)?));
    services.iter().enumerate().filter_map(of).collect()
}

/// A process that another agent has looked at, by its number: before 6.9 another one that was started in the same 10 ms
/// would be taken for it.
pub(super) fn same(meant: &Identity) -> Option<Arc<Process>> {
    let process = Process::open(meant.pid).ok()?;
    meant.is_same_process(&process.identity).then(|| Arc::new(process))
}

fn member(found: &Match) -> Member {
    let Match { process: Process { identity, command, .. }, is_root, is_descendant } = found;
    Member {
        identity: identity.clone(),
        is_root: *is_root,
        is_descendant: *is_descendant,
        command: command.clone(),
    }
}

/// Finds one of the services, which is `held` if it is a registered process, and looks at it, and at what was found of it
/// earlier.
pub(super) fn look(
    (own, service): (usize, &Service),
    (held, earlier): (Option<&Process>, Vec<Match>),
    claims: &Claims,
    services: &[Service],
) -> (Preflight, Vec<Process>) {
    let (mut found, unit) = match find(&service.target, held) {
        Ok(found) => found,
        Err(why) => return (Preflight::Refused(why), Vec::new()),
    };
    let is_new = |one: &Match| {
        !found.iter().any(|known| known.process.identity.is_same_process(&one.process.identity))
    };
    let earlier: Vec<Match> = earlier.into_iter().filter(is_new).collect();
    // systemd knows what is left of a unit.
    if unit.is_none() && !earlier.is_empty() {
        found.extend(earlier);
        matching::find_roots(&mut found);
    }
    for one in found.iter().filter(|one| one.is_root) {
        let Identity { pid, comm, .. } = &one.process.identity;
        // It would get two signals, and each would be told of the other service's losses.
        if let Some(other) = claims.better(own, &one.process.identity) {
            let other = &services[other].name;
            return (
                Preflight::Refused(format!("process {pid} ({comm}) is that of {other}, too")),
                Vec::new(),
            );
        }
    }
    // A unit without a process may be between two runs, or have something to do when it is stopped.
    if found.is_empty() && unit.as_ref().is_none_or(units::is_stopped) {
        return match service.target {
            Target::Port(port) if matching::has_connections(port) != Ok(false) => {
                let why = format!(
                    "nobody listens on port {port} any more, and somebody still has connections on it: name it by its \
                     pidfile or exe to stop it"
                );
                (Preflight::Refused(why), Vec::new())
            }
            _ => (Preflight::NotRunning, Vec::new()),
        };
    }
    let unit = match unit.map_or_else(|| units::of_main(service, &found), |unit| Ok(Some(unit))) {
        Ok(unit) => unit,
        Err(why) => return (Preflight::Refused(why), Vec::new()),
    };
    let mut sum = Found {
        unit: unit.as_ref().map(|unit| unit.name.clone()),
        kill_signal: unit.as_ref().map(|unit| unit.kill_signal),
        ..Found::default()
    };
    let named = found.len();
    // Of these a cgroup has all.
    if !matches!(service.target, Target::Unit(_) | Target::Cgroup(_)) {
        let (more, are_all) = family::descendants(&found, claims, own);
        found.extend(more);
        sum.leaves_out = !are_all;
    }
    let stop = units::stop_of(service, unit.as_ref());
    let mut tcp = Some(facts::tcp_of(found.iter().map(|one| &one.process)));
    for Match { process, .. } in found.iter().filter(|one| one.is_root) {
        let Some(stop) = &stop else { continue };
        let Some(facts) = facts::of(process, stop.signal.number()) else { continue };
        // Whichever of them has these.
        let tcp = tcp.take().unwrap_or_default();
        let judgement = preflight::judge(&facts, &tcp, stop, sum.unit.as_deref());
        if let Some(why) = judgement.refused {
            return (Preflight::Refused(format!("process {}: {why}", process.identity.pid)), Vec::new());
        }
        sum.connections += tcp.connections;
        sum.busy += tcp.busy;
        sum.is_unhandled |= judgement.is_unhandled;
        sum.notes.extend(judgement.notes);
    }
    sum.notes.extend(unit.as_ref().map(units::note));
    match found.len() - named {
        0 => {}
        1 => sum.notes.push("1 process that it has started is waited for, and gets no signal".to_owned()),
        many => {
            sum.notes.push(format!("{many} processes that it has started are waited for, and get no signal"));
        }
    }
    sum.members = found.iter().map(member).collect();
    (Preflight::Found(sum), found.into_iter().map(|one| one.process).collect())
}

/// The processes of a service and, if it is named by its unit, that.
pub(super) fn find(target: &Target, held: Option<&Process>) -> Result<(Vec<Match>, Option<Unit>), String> {
    let Target::Unit(name) = target else { return Ok((matching::find(target, held)?, None)) };
    let unit = units::unit(name)?;
    Ok((of_unit(&unit)?, Some(unit)))
}

fn of_unit(unit: &Unit) -> Result<Vec<Match>, String> {
    if unit.control_group.len() < 2 || units::is_stopped(unit) {
        return Ok(Vec::new());
    }
    matching::find(&Target::Cgroup(unit.control_group.clone()), None)
}

pub(super) fn listed(service: &Service, held: Option<&Process>) -> Listed {
    let (pids, problem) = match find(&service.target, held) {
        Ok((found, _)) => (found.iter().map(|one| one.process.identity.pid).collect(), None),
        Err(why) => (Vec::new(), Some(why)),
    };
    Listed { service: service.clone(), pids, problem }
}

/// Ends when a process has; `None` if that cannot be waited for.
pub(super) fn gone(process: &Process) -> Option<impl Future<Output = ()> + Send + 'static> {
    let own = process.pidfd().try_clone_to_owned();
    // SAFETY: an `OwnedFd` stays the same fd until it is dropped.
    let pidfd = own.and_then(|own| unsafe { AsyncFd::register(own) }.map_err(Into::into));
    match pidfd {
        Ok(pidfd) => Some(async move {
            // Readable once all of its threads have ended, and for ever after.
            let _ = pidfd.readable().await;
        }),
        Err(error) => {
            tracing::error!("a process cannot be waited for: {error}");
            None
        }
    }
}

/// Between two runs of `ready`.
const READY_PAUSE: Duration = Duration::from_millis(200);

/// Runs `prestop`, then `ready` until that fails, and says what went wrong.
pub(super) async fn prestop(
    (prestop, ready): (Option<String>, Option<String>),
    cancelled: CancellationToken,
) -> Option<String> {
    let ended = async {
        let failed = match prestop.as_deref() {
            Some(command) => match shell(command).await {
                Ok(status) if status.success() => None,
                Ok(status) => Some(format!("failed ({status})")),
                Err(error) => Some(format!("could not be run: {error}")),
            },
            None => None,
        };
        let Some(ready) = ready else { return failed };
        loop {
            match shell(&ready).await {
                Ok(status) if status.success() => time::sleep(READY_PAUSE).await,
                // What cannot be found says nothing about the service.
                Ok(status) if matches!(status.code(), Some(126 | 127)) => {
                    return Some(format!("ends early: ready could not be run ({status})"));
                }
                Ok(_) => return failed,
                Err(error) => return Some(format!("ends early: ready could not be run: {error}")),
            }
        }
    };
    cancelled.run_until_cancelled(ended).await.unwrap_or_else(|| Some("was ended".to_owned()))
}

async fn shell(command: &str) -> io::Result<ExitStatus> {
    let mut shell = tokio::process::Command::new("/bin/sh");
    shell.args(["-c", command]).stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
    shell.status().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_signal_waits_until_a_service_is_not_ready_any_more() {
        let asked = std::env::temp_dir().join(format!("plumb-ready-{}", std::process::id()));
        let ready = format!("echo >> {0}; test $(wc -l < {0}) -lt 3", asked.display());
        let run = |prestop: Option<&str>, ready: &str| {
            super::prestop((prestop.map(str::to_owned), Some(ready.to_owned())), CancellationToken::new())
        };
        assert_eq!(run(None, &ready).await, None);
        assert_eq!(std::fs::read_to_string(&asked).unwrap().lines().count(), 3);
        std::fs::remove_file(&asked).unwrap();
        assert!(run(Some("exit 3"), "false").await.unwrap().contains("exit status: 3"));
        assert!(run(Some("true"), "/none/such").await.unwrap().contains("could not be run"));
        let (cancelled, ready) = (CancellationToken::new(), (None, Some("true".to_owned())));
        let ended = tokio::spawn(super::prestop(ready, cancelled.clone()));
        cancelled.cancel();
        assert_eq!(ended.await.unwrap().as_deref(), Some("was ended"));
    }
}

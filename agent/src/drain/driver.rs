//! The one task that owns the registry and carries out drains: it does what the machine wants, and tells it what has
//! happened. It waits for pidfds, timers, events and commands, and polls nothing.

mod late;
mod resume;

use std::{
    collections::{HashMap, VecDeque},
    future::pending,
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::{
    sync::{mpsc, watch},
    task::block_in_place,
    time,
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    active::{Active, by_place, gone, listed, look, prestop, same, stop_unit},
    command::{Asked, Command, Plan, Preflight, Registration, Settings, View},
    course::{Action, Begun, Input, NotSent},
    grants,
    identity::Identity,
    journal::Journal,
    leaving,
    machine::Machine,
    order,
    process::Process,
    registrations,
    registry::{Caller, Refusal, Registry},
    report::Document,
    reports,
    service::{Name, Service, Target},
    signaller,
    sockets::Sockets,
};
use crate::{
    ask::Asker,
    clock,
    decode::Event,
    subscribe::{Item, Subscription},
};

/// What the driver waits for.
enum Waited {
    /// A member of a service of the drain of this id has gone.
    Member(String, usize, usize),
    /// A registered process has gone; `None` when it was not to be waited for any more.
    Registered(Option<(Name, Identity)>),
    Prestop(String, usize, Option<String>),
    /// systemd has stopped a unit, or why not.
    Unit(String, usize, Option<String>),
    /// The threads of a service have been looked at, unless nobody answers.
    Copied(String, usize, Option<leaving::Copied>),
    /// And have names.
    Named(String, usize, leaving::Named),
}

/// The process of a registration.
struct Held {
    process: Arc<Process>,
    /// Its end is waited for as long as this is there.
    _waits: DropGuard,
}

pub(crate) struct Driver {
    settings: Settings,
    ask: Asker,
    registry: Registry,
    held: HashMap<Name, Held>,
    active: Option<Active>,
    waits: FuturesUnordered<BoxFuture<'static, Waited>>,
    views: watch::Sender<View>,
    done: Box<dyn Fn(&Document) + Send>,
    number: u64,
}

impl Driver {
    /// Why a driver could not be made of these.
    pub(crate) fn check(settings: &Settings) -> Result<(), Refusal> {
        Registry::default().add_all(settings.services.clone())
    }

    /// `done` is called with each drain that is over.
    pub(crate) fn new(
        settings: Settings,
        ask: Asker,
        views: watch::Sender<View>,
        done: Box<dyn Fn(&Document) + Send>,
    ) -> Result<Self, Refusal> {
        let mut registry = Registry::default();
        registry.add_all(settings.services.clone())?;
        Ok(Self {
            settings,
            ask,
            registry,
            held: HashMap::new(),
            active: None,
            waits: FuturesUnordered::new(),
            views,
            done,
            number: 0,
        })
    }

    /// Runs until it is stopped. A drain that is under way then stays in the journal.
    pub(crate) async fn run(
        mut self,
        commands: &mut mpsc::Receiver<Command>,
        events: Subscription,
        count: &(dyn Fn(usize) + Sync),
        stop: CancellationToken,
    ) {
        let mut events = Some(events);
        block_in_place(|| {
            self.restore();
            self.resume();
        });
        loop {
            count(self.registry.list().len());
            let due = self.active.as_ref().and_then(Active::next);
            let timer = async {
                match due {
                    Some(due) => {
                        time::sleep(Duration::from_nanos(due.saturating_sub(clock::boottime()))).await;
                    }
                    None => pending().await,
                }
            };
            let next_event = async {
                match &mut events {
                    Some(events) => events.next().await,
                    None => pending().await,
                }
            };
            // A look at /proc and a wait for the disk take their time.
            tokio::select! {
                () = stop.cancelled() => return,
                Some(waited) = self.waits.next(), if !self.waits.is_empty() => {
                    block_in_place(|| self.waited(waited));
                }
                command = commands.recv() => match command {
                    Some(command) => block_in_place(|| self.command(command)),
                    None => return,
                },
                () = timer => block_in_place(|| self.due()),
                item = next_event => match item {
                    Some(item) => block_in_place(|| self.events(&item)),
                    None => events = None,
                },
            }
        }
    }

    fn command(&mut self, command: Command) {
        // A move to another cgroup is told by no event.
        self.forget_changed(|_| true);
        // Whoever asked may have gone.
        match command {
            Command::Add(registration, reply) => {
                let done = self.add(*registration);
                let _ = reply.send(done);
            }
            Command::Remove(name, caller, reply) => {
                let done = self.registry.remove(&name, caller).map(|_| self.held.remove(&name)).map(drop);
                self.save();
                self.publish();
                let _ = reply.send(done);
            }
            Command::List(caller, reply) => {
                let own = self.registry.list().iter().filter(|service| caller.owns(service.uid));
                let listed = |service| listed(service, self.held(service));
                let _ = reply.send(own.map(listed).collect());
            }
            Command::Plan(asked, reply) => {
                let _ = reply.send(self.plan(&asked));
            }
            Command::Drain(asked, reply) => {
                let _ = reply.send(self.drain(&asked));
            }
            Command::Cancel(caller, reply) => {
                let _ = reply.send(self.cancel(caller));
            }
        }
    }

    fn possible(&self) -> Result<(), Refusal> {
        self.settings.refused.clone().map_or(Ok(()), |why| Err(Refusal::BadRequest(why)))
    }

    fn add(&mut self, registration: Registration) -> Result<Service, Refusal> {
        self.possible()?;
        let Registration { mut service, process, caller } = registration;
        let pid = process.identity.pid;
        if !process.may_be_signalled_by(caller.uid) && !caller.is_admin {
            let why = format!("it is user {}'s", process.uids.0);
            return Err(Refusal::NotYourProcess(pid, why));
        }
        service.target = Target::Process(process.identity.clone());
        self.registry.add(service.clone())?;
        self.hold(&service, process);
        tracing::info!(service = %service.name, pid, uid = caller.uid, "a service was registered");
        self.save();
        self.publish();
        Ok(service)
    }

    /// Holds the process of a registration, which ends with it.
    fn hold(&mut self, service: &Service, process: Process) {
        let (name, identity, ended) =
            (service.name.clone(), process.identity.clone(), CancellationToken::new());
        if let Some(gone) = gone(&process) {
            let ended = ended.clone();
            self.waits.push(Box::pin(async move {
                let has_gone = ended.run_until_cancelled(gone).await;
                Waited::Registered(has_gone.map(|()| (name, identity)))
            }));
        }
        self.held
            .insert(service.name.clone(), Held { process: Arc::new(process), _waits: ended.drop_guard() });
    }

    /// The process of a registration.
    fn held(&self, service: &Service) -> Option<&Process> {
        self.held.get(&service.name).map(|held| &*held.process)
    }

    /// Keeps the registrations for the next agent.
    fn save(&self) {
        let Some(folder) = &self.settings.state_dir else { return };
        let own: Vec<&Service> =
            self.registry.list().iter().filter(|service| self.held.contains_key(&service.name)).collect();
        if let Err(error) = registrations::save(folder, &self.settings.boot_id, &own) {
            tracing::warn!("registrations are not kept over a restart: {error}");
        }
    }

    /// Takes up the registrations of an agent before, as far as their processes are what they were.
    fn restore(&mut self) {
        let Some(folder) = self.settings.state_dir.clone() else { return };
        for service in registrations::load(&folder, &self.settings.boot_id) {
            let Target::Process(meant) = &service.target else { continue };
            let Ok(process) = Process::open(meant.pid) else { continue };
            if meant.differs(&process.identity).is_none() && self.registry.add(service.clone()).is_ok() {
                self.hold(&service, process);
            }
        }
        let last = reports::last(&folder).map(Arc::new);
        self.views.send_modify(|view| view.drain = last);
        self.publish();
    }

    fn plan(&self, asked: &Asked) -> Result<Plan, Refusal> {
        self.possible()?;
        // A look at services takes time that the drain has not.
        if let Some(active) = self.active.as_ref().filter(|active| active.machine.ended.is_none())
            && !asked.caller.is_admin
        {
            return Err(Refusal::UnderWay(active.machine.begun.id.clone()));
        }
        let selected = self.registry.select(asked.names.as_deref(), asked.caller)?;
        let deadline = asked.deadline.unwrap_or(self.settings.deadline);
        let stages = order::stages(self.registry.list(), &selected);
        let all: Vec<&Service> =
            self.registry.list().iter().filter(|one| selected.contains(&one.name)).collect();
        let wish = |name: &Name| self.registry.get(name).and_then(|service| service.deadline);
        let wishes: Vec<Vec<_>> =
            stages.iter().map(|stage| stage.iter().map(|(name, _)| wish(name)).collect()).collect();
        let mut left = deadline;
        let grant = |at: usize| {
            let grant = grants::of_stage(&wishes[at..], left);
            left -= grant.min(left);
            grant
        };
        let grants = (0..stages.len()).map(grant).collect();
        let services =
            all.into_iter().map(|service| (service.clone(), look(service, self.held(service)).0)).collect();
        Ok(Plan { deadline, stages, services, grants })
    }

    fn drain(&mut self, asked: &Asked) -> Result<String, Refusal> {
        self.possible()?;
        let selected = self.registry.select(asked.names.as_deref(), asked.caller)?;
        if let Some(active) = self.active.as_ref().filter(|active| active.machine.ended.is_none()) {
            let under_way = &active.machine.begun;
            let covers = selected.iter().all(|name| under_way.services.iter().any(|one| one.name == *name));
            return if covers {
                Ok(under_way.id.clone())
            } else {
                Err(Refusal::UnderWay(under_way.id.clone()))
            };
        }
        // One that only watches whether something comes back makes room.
        self.finish_early();
        let began = clock::boottime();
        let deadline = asked.deadline.unwrap_or(self.settings.deadline);
        let services: Vec<Service> =
            self.registry.list().iter().filter(|one| selected.contains(&one.name)).cloned().collect();
        let place = |name: &Name| services.iter().position(|service| service.name == *name);
        let stages = order::stages(self.registry.list(), &selected);
        let stages =
            stages.iter().map(|stage| stage.iter().filter_map(|(name, _)| place(name)).collect()).collect();
        self.number += 1;
        let begun = Begun {
            id: format!("d{}-{}", began / 1_000_000_000, self.number),
            boot_id: self.settings.boot_id.clone(),
            trigger: asked.trigger.clone(),
            uid: asked.caller.uid,
            began,
            deadline: began.saturating_add(u64::try_from(deadline.as_nanos()).unwrap_or(u64::MAX)),
            stages,
            services,
        };
        let id = begun.id.clone();
        tracing::info!(
            drain = id,
            trigger = asked.trigger,
            uid = asked.caller.uid,
            services = selected.len(),
            "drains"
        );
        let journal = match &self.settings.state_dir {
            Some(folder) => Journal::create(folder).map_err(|error| error.to_string()),
            None => Err("there is no state folder".to_owned()),
        };
        let held = |service: &Service| self.held.get(&service.name).map(|held| Arc::clone(&held.process));
        let registered = by_place(&begun.services, held);
        let (machine, actions) = Machine::begin(begun);
        let sockets = Sockets::begin(&self.ask, machine.runs.len());
        self.active = Some(Active::new(machine, journal, registered, Some(sockets)));
        self.perform(actions);
        Ok(id)
    }

    fn cancel(&mut self, caller: Caller) -> Result<(), Refusal> {
        let Some(active) = self.active.as_ref().filter(|active| active.machine.ended.is_none()) else {
            return Err(Refusal::NotUnderWay);
        };
        if let Some(other) = active.machine.begun.services.iter().find(|service| !caller.owns(service.uid)) {
            return Err(Refusal::NotYours(other.name.clone()));
        }
        self.step(Input::Cancel);
        Ok(())
    }

    /// A drain that has ended is over now.
    fn finish_early(&mut self) {
        if let Some(active) = &mut self.active {
            let actions = active.machine.settle();
            self.perform(actions);
        }
    }

    fn waited(&mut self, waited: Waited) {
        let is_current = |id: &str| self.active.as_ref().is_some_and(|active| active.machine.begun.id == id);
        match waited {
            Waited::Member(id, service, member) if is_current(&id) => self.step(Input::Gone(service, member)),
            Waited::Prestop(id, service, why) if is_current(&id) => {
                self.step(Input::PrestopEnded(service, why));
            }
            Waited::Unit(id, service, why) if is_current(&id) => self.step(Input::UnitStopped(service, why)),
            Waited::Copied(id, service, Some(copied)) if is_current(&id) => {
                self.copied(id, service, copied);
            }
            Waited::Named(id, service, named) if is_current(&id) => {
                self.active.iter_mut().for_each(|active| active.leaving.named(service, named.clone()));
                self.tell_left(service);
            }
            Waited::Member(..)
            | Waited::Prestop(..)
            | Waited::Unit(..)
            | Waited::Copied(..)
            | Waited::Named(..) => {}
            Waited::Registered(Some((name, identity))) => {
                if self.held.get(&name).is_some_and(|held| held.process.identity == identity) {
                    self.forget(&name, "its process has ended");
                }
            }
            Waited::Registered(None) => {}
        }
    }

    fn forget(&mut self, name: &Name, why: &str) {
        tracing::info!(service = %name, "a registration ends: {why}");
        self.held.remove(name);
        self.registry.died(name);
        self.save();
        self.publish();
    }

    fn events(&mut self, item: &Item) {
        let events = match item {
            Item::Events(events) => events,
            Item::Gap(many) => {
                self.missed(*many);
                return;
            }
            // The kernel's ledger tells of these.
            Item::Lost(_) => return,
        };
        let seen = self.active.as_mut().map(|active| active.seen(events));
        seen.into_iter().flatten().for_each(|input| self.step(input));
        for event in events.iter().filter(|event| matches!(event, Event::Exec(_))) {
            let tgid = event.header().process.tgid;
            self.forget_changed(|pid| pid == tgid);
        }
    }

    /// A process that runs another program, or is in another cgroup, is not what was registered.
    fn forget_changed(&mut self, is_asked: impl Fn(u32) -> bool) {
        let changed = |(name, held): (&Name, &Held)| {
            let meant = &held.process.identity;
            let now = is_asked(meant.pid).then(|| held.process.again().ok())??;
            meant.differs(&now.identity).map(|why| (name.clone(), why))
        };
        let changed: Vec<_> = self.held.iter().filter_map(changed).collect();
        changed.iter().for_each(|(name, why)| self.forget(name, why));
    }

    fn step(&mut self, input: Input) {
        let Some(active) = &mut self.active else { return };
        let actions = active.machine.step(clock::boottime(), input);
        self.perform(actions);
    }

    /// Does what the machine wants, and tells it what came of that until nothing is left to do.
    fn perform(&mut self, actions: Vec<Action>) {
        let Some(mut active) = self.active.take() else { return };
        let mut todo = VecDeque::from(actions);
        let mut written = Vec::new();
        while let Some(action) = todo.pop_front() {
            if let Action::Journal(entry) = action {
                written.push(entry);
                continue;
            }
            // Nothing is done that another agent would not know of.
            active.write(&mut written);
            if let Action::Look(service) = action {
                let counted = active.counted(service);
                let more = counted.map(|input| active.machine.step(clock::boottime(), input));
                todo.extend(more.into_iter().flatten());
            }
            if let Some(input) = self.act(&mut active, &action) {
                let more = active.machine.step(clock::boottime(), input);
                // Behind what waits: entries are written in the order in which they have changed the machine.
                todo.extend(more);
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
                let held = active.registered.get(service).map(Arc::as_ref);
                let (found, processes) = look(&active.machine.begun.services[*service], held);
                let added = active.sockets.as_mut().map(|sockets| sockets.add(*service, &processes));
                let (ports, sees_acts) = added.unwrap_or_default();
                active.leaving.sees(*service, sees_acts);
                active.take(*service, 0, processes);
                Some(match found {
                    Preflight::Found(mut found) => {
                        found.ports = ports;
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
                let (id, service) = (active.machine.begun.id.clone(), *service);
                self.waits.push(Box::pin(async move {
                    Waited::Prestop(id, service, prestop(commands, cancelled).await)
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
                let (id, service, unit) = (active.machine.begun.id.clone(), *service, unit.clone());
                let within = run.grant;
                self.waits
                    .push(Box::pin(async move { Waited::Unit(id, service, stop_unit(unit, within).await) }));
                None
            }
            Action::Watch(service) => {
                self.watch(active, *service);
                None
            }
            Action::Look(service) => {
                let (more, again) = active.look_again(*service);
                Some(Input::Looked(*service, more, again))
            }
        }
    }

    /// Waits for the members of a service that are there.
    fn watch(&mut self, active: &mut Active, service: usize) {
        for member in 0..active.machine.runs[service].members.len() {
            let known = &active.machine.runs[service].members[member];
            let meant = known.member.identity.clone();
            if known.gone.is_some() || !active.watched.insert((service, member)) {
                continue;
            }
            let held = active.processes.get(&(service, member)).cloned();
            // Of an agent before.
            let held = held.or_else(|| active.registered.get(&service).cloned()).or_else(|| same(&meant));
            let (id, gone) = (active.machine.begun.id.clone(), held.as_deref().and_then(gone));
            let is_there = held.is_some();
            if let Some(process) = held {
                active.processes.insert((service, member), process);
            }
            // One that cannot be waited for runs into its deadline, and is not called gone.
            if is_there && gone.is_none() {
                continue;
            }
            self.waits.push(Box::pin(async move {
                if let Some(gone) = gone {
                    gone.await;
                }
                Waited::Member(id, service, member)
            }));
        }
    }

    /// A drain is over: its report is kept, and nobody takes it up.
    fn close(&mut self, active: Active) {
        let document = active.document();
        tracing::info!("{}", document.headline());
        if let Some(folder) = &self.settings.state_dir
            && let Err(error) = reports::keep(folder, &document)
        {
            tracing::warn!("the report of the drain is not kept: {error}");
        }
        if let Ok(journal) = active.journal {
            let _ = journal.remove();
        }
        (self.done)(&document);
        self.views.send_modify(|view| {
            view.generation += 1;
            view.drain = Some(Arc::new(document));
        });
    }

    fn publish(&self) {
        let (services, document) = (self.registry.list().len(), self.active.as_ref().map(Active::document));
        self.views.send_modify(|view| {
            view.generation += 1;
            view.services = services;
            if let Some(document) = document {
                view.drain = Some(Arc::new(document));
            }
        });
    }
}

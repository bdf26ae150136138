//! The one task that owns the registry and carries out drains: it does what the machine wants, and tells it what has
//! happened. It waits for pidfds, timers, events and commands, and polls nothing.

mod events;
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
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::AbortOnDropHandle,
};

use super::{
    active::{Active, by_place, gone, listed, look},
    command::{Asked, Command, Plan, Registration, Settings, View},
    course::{Begun, Fact, Input, UnitEnd, nanos},
    family::Claims,
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
    sockets::{Known, Sockets},
};
use crate::{ask::Asker, clock, losses::By, subscribe::Subscription};

/// Drains that are over and of which those who wait for them are told.
const PAST: usize = 8;

/// Registered processes that are remembered when they have ended.
const ENDED: usize = 64;

/// Events of an end that come later than this after it were lost.
pub(super) const EVENTS: Duration = Duration::from_millis(100);

/// What the driver waits for.
pub(super) enum Waited {
    /// A member of a service of the drain of this id has gone.
    Member(String, usize, usize),
    /// And the kernel has had its time to tell of that.
    Untold(String, usize, usize),
    /// A registered process has gone; `None` when it was not to be waited for any more.
    Registered(Option<(Name, Identity)>),
    Prestop(String, usize, Option<String>),
    Unit(String, usize, UnitEnd),
    /// What the processes of a service begin is followed now, and whether all of it is seen.
    Followed(String, usize, bool),
    /// The threads of a service have been looked at, unless nobody answers.
    Copied(String, usize, Option<leaving::Copied>),
    /// And have names.
    Named(String, usize, leaving::Named),
}

/// The process of a registration.
pub(super) struct Held {
    process: Arc<Process>,
    /// Its end is waited for as long as this is there.
    _waits: DropGuard,
}

/// What is counted.
#[derive(Debug)]
pub(crate) enum Told<'a> {
    /// A drain is over.
    Drained(&'a Document),
    /// Somebody has got KILL.
    Killed(By),
}

pub(crate) struct Driver {
    pub(super) settings: Settings,
    pub(super) ask: Asker,
    pub(super) registry: Registry,
    pub(super) held: HashMap<Name, Held>,
    /// The last ones whose process has ended: the kernel's event of what ended it comes later.
    ended: VecDeque<(Name, Identity)>,
    /// What services say that they work on.
    pub(super) in_flight: HashMap<Name, u64>,
    pub(super) active: Option<Active>,
    /// Of the drain before.
    pub(super) known_ports: Known,
    pub(super) waits: FuturesUnordered<BoxFuture<'static, Waited>>,
    pub(super) views: watch::Sender<View>,
    pub(super) tell: Box<dyn Fn(Told<'_>) + Send>,
    pub(super) number: u64,
    turn: reports::Turn,
}

fn under_way(begun: &Begun, caller: Caller) -> Refusal {
    Refusal::UnderWay(begun.id.clone(), caller.owns(begun.uid))
}

impl Driver {
    /// Why a driver could not be made of these.
    pub(crate) fn check(settings: &Settings) -> Result<(), Refusal> {
        Registry::default().add_all(settings.services.clone())
    }

    /// `tell` is called with what is to be counted.
    pub(crate) fn new(
        settings: Settings,
        ask: Asker,
        views: watch::Sender<View>,
        tell: Box<dyn Fn(Told<'_>) + Send>,
    ) -> Result<Self, Refusal> {
        let mut registry = Registry::default();
        registry.add_all(settings.services.clone())?;
        Ok(Self {
            settings,
            ask,
            registry,
            held: HashMap::new(),
            ended: VecDeque::new(),
            in_flight: HashMap::new(),
            active: None,
            known_ports: Known::new(),
            waits: FuturesUnordered::new(),
            views,
            tell,
            number: 0,
            turn: reports::Turn::default(),
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
        let _keeper = self.settings.state_dir.clone().map(|folder| {
            let keeper = reports::keep_unfinished(folder, self.views.subscribe(), self.turn.clone());
            AbortOnDropHandle::new(tokio::spawn(keeper))
        });
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
                    block_in_place(|| {
                        self.told_until_now(&mut events);
                        self.waited(waited);
                    });
                }
                command = commands.recv() => match command {
                    Some(command) => block_in_place(|| {
                        self.told_until_now(&mut events);
                        self.command(command);
                    }),
                    None => return,
                },
                () = timer => block_in_place(|| {
                    self.told_until_now(&mut events);
                    self.due();
                }),
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
                let done = self.registry.remove(&name, caller).map(|_| {
                    self.held.remove(&name);
                    self.in_flight.remove(&name);
                    self.settings.services.iter().any(|service| service.name == name)
                });
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
            Command::InFlight(name, requests, caller, reply) => {
                let _ = reply.send(self.in_flight(&name, requests, caller));
            }
            Command::Cancel(caller, reply) => {
                let _ = reply.send(self.cancel(caller));
            }
            Command::Settle(reply) => {
                self.settle();
                let _ = reply.send(());
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
        let own: Vec<&Service> =
            self.registry.list().iter().filter(|service| self.held.contains_key(&service.name)).collect();
        if let Err(error) = registrations::save(&self.settings.run_dir, &self.settings.boot_id, &own) {
            tracing::warn!("registrations are not kept over a restart: {error}");
        }
    }

    /// Takes up the registrations of an agent before, as far as their processes are what they were.
    fn restore(&mut self) {
        let saved = registrations::load(&self.settings.run_dir, &self.settings.boot_id);
        for service in self.registry.take_up(saved) {
            let Target::Process(meant) = &service.target else { continue };
            match Process::open(meant.pid) {
                Ok(process) if meant.differs(&process.identity).is_none() => self.hold(&service, process),
                // Who waits for it waits for those for whom it did.
                _ => self.registry.died(&service.name),
            }
        }
        let last = self.settings.state_dir.as_deref().and_then(reports::last).map(Arc::new);
        self.views.send_modify(|view| view.drain = last);
        self.publish();
    }

    fn plan(&self, asked: &Asked) -> Result<Plan, Refusal> {
        self.possible()?;
        // A look at services takes time that the drain has not.
        if let Some(active) = self.active.as_ref().filter(|active| active.machine.ended.is_none())
            && !asked.caller.is_admin
        {
            return Err(under_way(&active.machine.begun, asked.caller));
        }
        let selected = self.registry.select(asked.names.as_deref(), asked.caller)?;
        let deadline = asked.deadline.unwrap_or(self.settings.deadline);
        let stages = order::stages(self.registry.list(), &selected);
        let all: Vec<&Service> =
            self.registry.list().iter().filter(|one| selected.contains(&one.name)).collect();
        let services: Vec<Service> = all.into_iter().cloned().collect();
        let held = |service: &Service| self.held.get(&service.name).map(|held| Arc::clone(&held.process));
        let claims = Claims::of(&services, |at| held(&services[at]));
        let look = |(at, service): (usize, &Service)| {
            let process = held(service);
            (service.clone(), look((at, service), (process.as_deref(), Vec::new()), &claims, &services).0)
        };
        let absent = claims.absent();
        let wish = |(name, _): &(Name, Vec<Name>)| {
            let place = services.iter().position(|service| service.name == *name)?;
            (!absent.contains(&place)).then(|| services[place].wish())
        };
        let wishes: Vec<Vec<_>> = stages.iter().map(|stage| stage.iter().map(wish).collect()).collect();
        let grants = grants::of_present(&wishes, deadline);
        let services = services.iter().enumerate().map(look).collect();
        Ok(Plan { deadline, stages, services, grants })
    }

    /// The drain that is asked for, and whether it was under way before.
    fn drain(&mut self, asked: &Asked) -> Result<(String, bool), Refusal> {
        self.possible()?;
        let selected = self.registry.select(asked.names.as_deref(), asked.caller)?;
        let (deadline, mut signalled) = (asked.deadline.unwrap_or(self.settings.deadline), Vec::new());
        if let Some(active) = self.active.as_ref().filter(|active| active.machine.ended.is_none()) {
            let under_way = &active.machine.begun;
            // What has been registered by the same name meanwhile is another one.
            let is_same =
                |one: &Service| self.registry.get(&one.name).is_some_and(|now| now.target == one.target);
            let is_in = |name: &Name| under_way.services.iter().any(|one| one.name == *name && is_same(one));
            // Nobody is told of a drain that is not his.
            let covers = asked.caller.owns(under_way.uid) && selected.iter().all(is_in);
            // An hour of a user's is not what the administrator has asked for.
            let is_in_time = under_way.deadline <= clock::boottime().saturating_add(nanos(deadline));
            if !self.is_below(asked.caller) || covers && is_in_time {
                let refusal = || self::under_way(under_way, asked.caller);
                return if covers { Ok((under_way.id.clone(), true)) } else { Err(refusal()) };
            }
            signalled = self.give_up("the administrator drains");
        }
        // One that only watches whether something comes back makes room, unless that is somebody else's.
        if let Some(other) = self.active.as_ref().filter(|other| !asked.caller.owns(other.machine.begun.uid))
        {
            return Err(under_way(&other.machine.begun, asked.caller));
        }
        self.settle();
        let began = clock::boottime();
        let services: Vec<Service> =
            self.registry.list().iter().filter(|one| selected.contains(&one.name)).cloned().collect();
        let place = |name: &Name| services.iter().position(|service| service.name == *name);
        let stages = order::stages(self.registry.list(), &selected);
        let stages: Vec<Vec<usize>> =
            stages.iter().map(|stage| stage.iter().filter_map(|(name, _)| place(name)).collect()).collect();
        let held = |service: &Service| self.held.get(&service.name).map(|held| Arc::clone(&held.process));
        let claims = Claims::of(&services, |at| held(&services[at]));
        let absent = claims.absent();
        let registered = by_place(&services, held);
        self.number += 1;
        let begun = Begun {
            id: format!("d{}-{}", began / 1_000_000_000, self.number),
            boot_id: self.settings.boot_id.clone(),
            trigger: asked.trigger.clone(),
            uid: asked.caller.uid,
            began,
            deadline: began.saturating_add(nanos(deadline)),
            stages,
            services,
            absent,
        };
        let id = begun.id.clone();
        tracing::info!(
            drain = id,
            trigger = asked.trigger,
            uid = asked.caller.uid,
            services = selected.len(),
            "drains"
        );
        let journal = Journal::create(&self.settings.run_dir).map_err(|error| error.to_string());
        let (machine, actions) = Machine::begin_after(signalled, begun);
        let sockets = Sockets::begin(&self.ask, machine.runs.len(), std::mem::take(&mut self.known_ports));
        let mut active = Active::new(machine, journal, registered, Some(sockets));
        active.claimed(claims);
        self.active = Some(active);
        self.perform(actions);
        let said: Vec<(usize, u64)> = self.active.as_ref().map_or_else(Vec::new, |active| {
            let said = |(at, service): (usize, &Service)| Some((at, *self.in_flight.get(&service.name)?));
            active.machine.begun.services.iter().enumerate().filter_map(said).collect()
        });
        for (service, requests) in said {
            self.step(Input::Seen(service, Fact::InFlight { at: began, requests }));
        }
        Ok((id, false))
    }

    /// What a service says of itself; it counts in a drain that is under way, and in the next one.
    fn in_flight(&mut self, name: &Name, requests: u64, caller: Caller) -> Result<(), Refusal> {
        let service = self.registry.get(name).ok_or_else(|| Refusal::Unknown(name.clone()))?;
        if !caller.owns(service.uid) {
            return Err(Refusal::NotYours(name.clone()));
        }
        self.in_flight.insert(name.clone(), requests);
        let place = self.active.as_ref().and_then(|active| {
            active.machine.begun.services.iter().position(|service| service.name == *name)
        });
        if let (Some(service), Some(active)) = (place, &mut self.active) {
            active.said.insert(service, requests);
            self.step(Input::Seen(service, Fact::InFlight { at: clock::boottime(), requests }));
        }
        Ok(())
    }

    fn cancel(&mut self, caller: Caller) -> Result<(), Refusal> {
        let Some(active) = self.active.as_ref().filter(|active| active.machine.ended.is_none()) else {
            return Err(Refusal::NotUnderWay);
        };
        if !caller.owns(active.machine.begun.uid) {
            return Err(under_way(&active.machine.begun, caller));
        }
        if self.is_below(caller) {
            self.give_up("the administrator has cancelled it");
        } else {
            self.step(Input::Cancel);
        }
        Ok(())
    }

    /// A drain that has ended is over now.
    fn settle(&mut self) {
        if let Some(active) = self.active.as_mut().filter(|active| active.machine.ended.is_some()) {
            let actions = active.machine.settle();
            self.perform(actions);
        }
    }

    fn waited(&mut self, waited: Waited) {
        let is_current = |id: &str| self.active.as_ref().is_some_and(|active| active.machine.begun.id == id);
        match waited {
            Waited::Member(id, service, member) if is_current(&id) => self.gone(id, service, member),
            Waited::Untold(id, service, member) if is_current(&id) => self.told(service, member),
            Waited::Prestop(id, service, why) if is_current(&id) => {
                self.step(Input::PrestopEnded(service, why));
            }
            Waited::Unit(id, service, end) if is_current(&id) => self.step(Input::Unit(service, end)),
            Waited::Followed(id, service, is_seen) if is_current(&id) => {
                self.active.iter_mut().for_each(|active| active.leaving.sees(service, is_seen));
            }
            Waited::Copied(id, service, Some(copied)) if is_current(&id) => {
                self.copied(id, service, copied);
            }
            Waited::Named(id, service, named) if is_current(&id) => {
                self.active.iter_mut().for_each(|active| active.leaving.named(service, named.clone()));
                self.tell_left(service);
            }
            Waited::Member(..)
            | Waited::Untold(..)
            | Waited::Prestop(..)
            | Waited::Unit(..)
            | Waited::Followed(..)
            | Waited::Copied(..)
            | Waited::Named(..) => {}
            Waited::Registered(Some((name, identity))) => {
                if self.held.get(&name).is_some_and(|held| held.process.identity == identity) {
                    tracing::info!(service = %name, "a registration ends: its process has ended");
                    self.forget(&name);
                    self.ended.push_front((name, identity));
                    self.ended.truncate(ENDED);
                }
            }
            Waited::Registered(None) => {}
        }
    }

    fn forget(&mut self, name: &Name) {
        self.held.remove(name);
        self.in_flight.remove(name);
        self.registry.died(name);
        self.save();
        self.publish();
    }

    fn step(&mut self, input: Input) {
        let Some(active) = &mut self.active else { return };
        let actions = active.machine.step(clock::boottime(), input);
        self.perform(actions);
    }

    /// A drain is over: nobody takes it up.
    pub(super) fn close(&mut self, mut active: Active) {
        self.known_ports = active.sockets.as_mut().map(Sockets::known).unwrap_or_default();
        self.report(active.document());
        if let Ok(journal) = active.journal {
            let _ = journal.remove();
        }
    }

    /// Keeps the report of a drain that is over, and tells of it.
    pub(super) fn report(&self, document: Document) {
        document.log();
        let _turn = self.turn.take();
        if let Some(folder) = &self.settings.state_dir
            && let Err(error) = reports::keep(folder, &document)
        {
            tracing::warn!("the report of the drain is not kept: {error}");
        }
        (self.tell)(Told::Drained(&document));
        let document = Arc::new(document);
        self.views.send_modify(|view| {
            view.generation += 1;
            view.past.push_front(Arc::clone(&document));
            view.past.truncate(PAST);
            view.drain = Some(document);
        });
    }

    pub(super) fn publish(&self) {
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

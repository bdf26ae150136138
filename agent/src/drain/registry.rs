//! Which services are registered, in which order, and what may be: who asks is told why not.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    order,
    service::{NO_NAME, Name, Service, Target},
};

/// Services of one user at most, and of all.
pub(crate) const PER_USER: usize = 64;
pub(crate) const ALL: usize = 256;

/// Who asks, by the socket's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    pub uid: u32,
    /// Came through the control socket, which only the administrator can open.
    pub is_admin: bool,
}

impl Caller {
    /// The agent itself: its settings, a signal to it, the host's shutdown.
    pub(crate) const AGENT: Self = Self { uid: 0, is_admin: true };

    /// Whether a service of `uid` is the caller's to change.
    #[must_use]
    pub(crate) fn owns(self, uid: u32) -> bool {
        self.is_admin || self.uid == uid
    }
}

/// Whether what a user has registered or begun is the administrator's. Who comes through the open socket is never root.
#[must_use]
pub(crate) const fn is_admin(uid: u32) -> bool {
    uid == Caller::AGENT.uid
}

/// Why a registration, or a drain of one, is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("{0:?} {NO_NAME}")]
    BadName(String),
    #[error("{0}")]
    BadRequest(String),
    #[error("a pid may be another process by the time it is read: send pid and start_ticks")]
    BarePid,
    #[error("there is no service {0}")]
    Unknown(Name),
    #[error("{0} has to wait for {1}, which is not registered")]
    UnknownAfter(Name, Name),
    #[error("{0} is registered already, for {1}")]
    Duplicate(Name, String),
    #[error("they would wait for each other: {}", words(.0))]
    Cycle(Vec<Name>),
    #[error("user {0} has {PER_USER} services")]
    TooManyOfUser(u32),
    #[error("there are {ALL} services")]
    TooMany,
    #[error("{0} belongs to another user")]
    NotYours(Name),
    #[error("process {0} is not yours to signal: {1}")]
    NotYourProcess(u32, String),
    #[error("{0}")]
    NobodysProcess(String),
    #[error("{0}")]
    NoSuchProcess(String),
    #[error("who is at the other end of the socket is not known: {0}")]
    UnknownPeer(String),
    #[error("{0} waits for {1}")]
    Needed(Name, Name),
    /// And whether the caller can cancel it.
    #[error("a drain is under way: {0}")]
    UnderWay(String, bool),
    #[error("no drain is under way")]
    NotUnderWay,
}

fn words(names: &[Name]) -> String {
    names.iter().map(Name::as_str).collect::<Vec<_>>().join(" after ")
}

impl Refusal {
    /// For programs: one word per reason.
    #[must_use]
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::BadName(_) => "bad-name",
            Self::BadRequest(_) => "bad-request",
            Self::BarePid => "bare-pid",
            Self::Unknown(_) => "unknown-service",
            Self::UnknownAfter(..) => "unknown-after",
            Self::Duplicate(..) => "duplicate",
            Self::Cycle(_) => "cycle",
            Self::TooManyOfUser(_) | Self::TooMany => "too-many",
            Self::NotYours(_) => "not-yours",
            Self::NotYourProcess(..) | Self::NobodysProcess(_) => "not-your-process",
            Self::NoSuchProcess(_) => "no-such-process",
            Self::UnknownPeer(_) => "unknown-peer",
            Self::Needed(..) => "needed",
            Self::UnderWay(..) => "under-way",
            Self::NotUnderWay => "not-under-way",
        }
    }

    /// What to do about it.
    #[must_use]
    pub(crate) fn remedy(&self) -> &'static str {
        match self {
            Self::BadName(_) => "take another name",
            Self::BadRequest(_) => "docs/drain.md has examples",
            Self::BarePid => {
                "start_ticks is field 22 of /proc/PID/stat; `plumb services add --pid` sends both"
            }
            Self::Unknown(_) => "`plumb services list` has those that are",
            Self::UnknownAfter(..) => "register that one first",
            Self::Duplicate(..) => "take another name, or remove that one first",
            Self::Cycle(_) => "take one of them out of `after`",
            Self::TooManyOfUser(_) | Self::TooMany => "remove some that are not needed",
            Self::NotYours(_) => {
                "ask its owner, or the administrator: root is that through plumb.sock, and nobody through services.sock"
            }
            Self::NotYourProcess(..) => {
                "have it register itself, or ask the administrator: root is that through plumb.sock, and nobody through services.sock"
            }
            Self::NobodysProcess(_) => "name the process of the service itself",
            Self::NoSuchProcess(_) => "look at it again, and send what it is now",
            Self::UnknownPeer(_) => {
                "register from a process of this host's pid namespace that goes on running"
            }
            Self::Needed(..) => "remove that one first",
            Self::UnderWay(_, true) => "wait for its end, or `plumb drain --cancel`",
            Self::UnderWay(_, false) => "wait for its end: it is not yours to cancel",
            Self::NotUnderWay => "`plumb drain --last` shows the last one",
        }
    }
}

impl Refusal {
    /// What is wrong, and what to do about it, when the settings name these services.
    #[must_use]
    pub(crate) fn of_settings(&self) -> (String, &'static str) {
        match self {
            Self::Duplicate(name, other) => (
                format!("two services have the name {name}, of which one is {other}"),
                "give each a name of its own",
            ),
            Self::UnknownAfter(name, other) => (
                format!("{name} has to wait for {other}, which is no service of this file"),
                "add a [[service]] of that name, or take it out of `after`",
            ),
            _ => (self.to_string(), self.remedy()),
        }
    }
}

/// All services, in the order in which they were registered.
#[derive(Clone, Debug, Default)]
pub(crate) struct Registry(Vec<Service>);

impl Registry {
    #[must_use]
    pub(crate) fn list(&self) -> &[Service] {
        &self.0
    }

    #[must_use]
    pub(crate) fn get(&self, name: &Name) -> Option<&Service> {
        self.0.iter().find(|service| service.name == *name)
    }

    /// Adds all services of the settings, which may wait for each other in any order.
    pub(crate) fn add_all(&mut self, services: Vec<Service>) -> Result<(), Refusal> {
        let mut all = self.0.clone();
        for service in services {
            if let Some(other) = all.iter().find(|other| other.name == service.name) {
                return Err(Refusal::Duplicate(service.name, other.target.words()));
            }
            all.push(service);
        }
        if all.len() > ALL {
            return Err(Refusal::TooMany);
        }
        check(&all)?;
        self.0 = all;
        Ok(())
    }

    /// Adds what was registered before the settings were read, in which services may wait for later ones; returns what was added.
    pub(crate) fn take_up(&mut self, saved: Vec<Service>) -> Vec<Service> {
        let dropped = |service: &Service, why: &Refusal| {
            let Service { name, uid, .. } = service;
            tracing::warn!(service = %name, uid, "a registration of an agent before is dropped: {why}");
        };
        let (taken, mut own): (Vec<Service>, Vec<Service>) =
            saved.into_iter().partition(|service| self.get(&service.name).is_some());
        for service in &taken {
            let Some(other) = self.get(&service.name) else { continue };
            dropped(service, &Refusal::Duplicate(service.name.clone(), other.target.words()));
        }
        // A service may not be in the settings any more.
        let known: BTreeSet<Name> = self.0.iter().chain(&own).map(|service| service.name.clone()).collect();
        for after in own.iter_mut().filter_map(|service| service.after.as_mut()) {
            after.retain(|name| known.contains(name));
        }
        if let Err(why) = self.add_all(own.clone()) {
            own.iter().for_each(|service| dropped(service, &why));
            own.clear();
        }
        own
    }

    /// Adds one. Who registers the same process by the same name again only says it anew, and keeps its place.
    pub(crate) fn add(&mut self, service: Service) -> Result<(), Refusal> {
        let mut all = self.0.clone();
        match all.iter().position(|other| other.name == service.name) {
            Some(at) => {
                let old = &all[at];
                let is_same = match (&old.target, &service.target) {
                    (Target::Process(old), Target::Process(new)) => old.is_same_process(new),
                    _ => false,
                };
                if old.uid != service.uid || !is_same {
                    return Err(Refusal::Duplicate(service.name, old.target.words()));
                }
                all[at] = service;
            }
            None => {
                let own = self.0.iter().filter(|other| other.uid == service.uid).count();
                if own >= PER_USER {
                    return Err(Refusal::TooManyOfUser(service.uid));
                }
                if all.len() >= ALL {
                    return Err(Refusal::TooMany);
                }
                all.push(service);
            }
        }
        check(&all)?;
        self.0 = all;
        Ok(())
    }

    /// Removes one that nobody waits for by name. Others than the administrator hold up only their own; they then wait for
    /// what it had waited for.
    pub(crate) fn remove(&mut self, name: &Name, caller: Caller) -> Result<Service, Refusal> {
        let at = self.0.iter().position(|service| service.name == *name);
        let at = at.ok_or_else(|| Refusal::Unknown(name.clone()))?;
        if !caller.owns(self.0[at].uid) {
            return Err(Refusal::NotYours(name.clone()));
        }
        let holds_up = |service: &&Service| {
            let waits = service.after.as_ref().is_some_and(|after| after.contains(name));
            waits && (is_admin(service.uid) || service.uid == caller.uid)
        };
        if let Some(other) = self.0.iter().find(holds_up) {
            return Err(Refusal::Needed(other.name.clone(), name.clone()));
        }
        let removed = self.0[at].clone();
        self.died(name);
        Ok(removed)
    }

    /// Removes one, such as one whose process has gone. Who waited for it waits for what it had waited for.
    pub(crate) fn died(&mut self, name: &Name) {
        let Some(at) = self.0.iter().position(|service| service.name == *name) else { return };
        let gone = self.0.remove(at);
        for service in &mut self.0 {
            if let Some(after) = &mut service.after
                && after.remove(name)
            {
                after.extend(gone.after.iter().flatten().cloned());
            }
        }
    }

    /// The services of these names, or all that are the caller's to drain; each with a reason if it may not.
    pub(crate) fn select(&self, names: Option<&[Name]>, caller: Caller) -> Result<BTreeSet<Name>, Refusal> {
        let Some(names) = names else {
            return Ok(self
                .0
                .iter()
                .filter(|one| caller.owns(one.uid))
                .map(|one| one.name.clone())
                .collect());
        };
        for name in names {
            let service = self.get(name).ok_or_else(|| Refusal::Unknown(name.clone()))?;
            if !caller.owns(service.uid) {
                return Err(Refusal::NotYours(name.clone()));
            }
        }
        Ok(names.iter().cloned().collect())
    }
}

/// Every name that somebody waits for is known, and nobody waits for himself.
fn check(all: &[Service]) -> Result<(), Refusal> {
    let known: BTreeMap<&Name, &Service> = all.iter().map(|service| (&service.name, service)).collect();
    for service in all {
        let unknown = service.after.iter().flatten().find(|name| !known.contains_key(name));
        if let Some(name) = unknown {
            return Err(Refusal::UnknownAfter(service.name.clone(), name.clone()));
        }
    }
    order::cycle(all).map_or(Ok(()), |names| Err(Refusal::Cycle(names)))
}

#[cfg(test)]
mod tests {
    use super::{super::identity::Identity, *};

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    #[test]
    fn what_cannot_be_is_refused_and_changes_nothing() {
        let mut registry = Registry::default();
        registry.add(Service::example("db")).unwrap();
        registry.add(Service::example("web").after(&["db"])).unwrap();
        let refused = |registry: &mut Registry, service: Service| registry.add(service).unwrap_err().code();
        assert_eq!(refused(&mut registry, Service::example("web")), "duplicate");
        assert_eq!(refused(&mut registry, Service::example("x").after(&["y"])), "unknown-after");
        assert_eq!(refused(&mut registry, Service::example("x").after(&["x"])), "cycle");
        assert_eq!(registry.list().len(), 2);
        let user = Caller { uid: 1000, is_admin: false };
        assert_eq!(registry.remove(&name("web"), user).unwrap_err().code(), "not-yours");
        assert_eq!(registry.remove(&name("db"), Caller::AGENT).unwrap_err().code(), "needed");
        assert_eq!(registry.remove(&name("x"), Caller::AGENT).unwrap_err().code(), "unknown-service");
        assert_eq!(registry.select(Some(&[name("web")]), user).unwrap_err().code(), "not-yours");
        assert!(registry.select(None, user).unwrap().is_empty());
        registry.remove(&name("web"), Caller::AGENT).unwrap();
        registry.remove(&name("db"), Caller::AGENT).unwrap();
        assert!(registry.list().is_empty());
    }

    #[test]
    fn no_user_holds_up_a_removal_by_the_administrator() {
        let mut registry = Registry::default();
        registry.add(Service::example("web")).unwrap();
        registry.add(Service { uid: 1000, ..Service::example("hold").after(&["web"]) }).unwrap();
        registry.add(Service { uid: 1000, ..Service::example("more").after(&["hold"]) }).unwrap();
        registry.remove(&name("web"), Caller::AGENT).unwrap();
        assert_eq!(registry.get(&name("hold")).unwrap().after, Some(BTreeSet::new()));
        let user = Caller { uid: 1000, is_admin: false };
        assert_eq!(registry.remove(&name("hold"), user).unwrap_err().code(), "needed");
    }

    #[test]
    fn what_is_taken_up_keeps_its_order_though_some_have_gone_and_others_are_in_the_settings_now() {
        let mut registry = Registry::default();
        registry.add(Service::example("settings")).unwrap();
        let of = |text: &str, after: &[&str]| Service::example(text).after(after);
        let (first, second) = (of("first", &["second", "gone", "nowhere"]), of("second", &[]));
        let saved = vec![first, of("gone", &["last"]), second, of("last", &[]), of("settings", &[])];
        let added = registry.take_up(saved);
        assert_eq!(added.len(), 4, "{added:?}");
        registry.died(&name("gone"));
        let after = registry.get(&name("first")).unwrap().after.clone();
        assert_eq!(after, Some([name("second"), name("last")].into()));
    }

    #[test]
    fn services_of_the_settings_may_name_later_ones_but_not_each_other() {
        let mut registry = Registry::default();
        let (a, b) = (Service::example("a").after(&["b"]), Service::example("b"));
        registry.add_all(vec![a.clone(), b]).unwrap();
        let mut registry = Registry::default();
        let why = registry.add_all(vec![a, Service::example("b").after(&["a"])]).unwrap_err();
        assert_eq!(why.to_string(), "they would wait for each other: a after b after a");
    }

    #[test]
    fn a_user_has_so_many_services_and_leaves_room_to_others() {
        let mut registry = Registry::default();
        let of = |uid: u32, number: usize| Service { uid, ..Service::example(&format!("s{uid}-{number}")) };
        for number in 0..PER_USER {
            registry.add(of(1000, number)).unwrap();
        }
        assert_eq!(registry.add(of(1000, PER_USER)), Err(Refusal::TooManyOfUser(1000)));
        registry.add(of(1001, 0)).unwrap();
    }

    #[test]
    fn the_same_process_may_register_again_and_another_may_not_take_its_name() {
        let mut registry = Registry::default();
        let of =
            |pid: u32| Service { target: Target::Process(Identity::example(pid)), ..Service::example("app") };
        registry.add(of(1)).unwrap();
        registry.add(Service::example("later")).unwrap();
        registry.add(Service { deadline: Some(std::time::Duration::from_secs(1)), ..of(1) }).unwrap();
        assert_eq!(registry.list()[0].deadline, Some(std::time::Duration::from_secs(1)));
        assert_eq!(registry.add(of(2)).unwrap_err().code(), "duplicate");
        assert_eq!(registry.add(Service { uid: 7, ..of(1) }).unwrap_err().code(), "duplicate");
    }

    #[test]
    fn who_waited_for_one_that_died_waits_for_what_it_had_waited_for() {
        let mut registry = Registry::default();
        registry.add(Service::example("c").after(&[])).unwrap();
        registry.add(Service::example("b").after(&["c"])).unwrap();
        registry.add(Service::example("a").after(&["b"])).unwrap();
        registry.died(&name("b"));
        assert_eq!(registry.get(&name("a")).unwrap().after, Some([name("c")].into()));
        registry.died(&name("nobody"));
    }
}

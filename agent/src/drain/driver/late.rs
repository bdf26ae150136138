//! What the driver does about services that do not stop in time.

use tokio::{task::spawn_blocking, time};

use super::{
    super::{
        active::Active,
        course::{Fact, Input, Phase},
        identity::Identity,
        leaving,
        registry::{Caller, is_admin},
        sockets,
    },
    Driver, EVENTS, Waited,
};
use crate::clock;

impl Driver {
    /// What is given up now is counted before, and what is left of it looked at.
    pub(super) fn due(&mut self) {
        self.tell_gone();
        self.follow_what_they_begin();
        self.look_at_what_is_left();
        let is_held = |active: &Active| active.leaving.held(&active.machine, clock::boottime()).is_some();
        if self.active.as_ref().is_some_and(is_held) {
            return;
        }
        let late = self.active.as_ref().map(|active| active.machine.about_to_be_late(clock::boottime()));
        for service in late.into_iter().flatten() {
            let counted = self.active.as_mut().map(|active| active.counted(service));
            counted.into_iter().flatten().for_each(|input| self.step(input));
            let left = self.active.as_ref().and_then(|active| active.leaving.fact(service));
            left.into_iter().for_each(|fact| self.step(Input::Seen(service, fact)));
        }
        self.step(Input::Time);
    }

    /// Whether the administrator asks while a drain is under way that a user has begun.
    pub(super) fn is_below(&self, caller: Caller) -> bool {
        let is_users =
            |active: &Active| active.machine.ended.is_none() && !is_admin(active.machine.begun.uid);
        caller.is_admin && self.active.as_ref().is_some_and(is_users)
    }

    /// Waits for nothing of the drain under way any longer, and says who has got which signal by it.
    pub(super) fn give_up(&mut self, why: &str) -> Vec<(Identity, i32)> {
        let Some(active) = &mut self.active else { return Vec::new() };
        let signalled = active.machine.signalled();
        let counted: Vec<Input> =
            active.machine.unseen().into_iter().flat_map(|service| active.counted(service)).collect();
        tracing::warn!(drain = active.machine.begun.id, "a drain is given up: {why}");
        counted.into_iter().for_each(|input| self.step(input));
        self.step(Input::GiveUp(why.to_owned()));
        signalled
    }

    fn follow_what_they_begin(&mut self) {
        let Some(active) = &mut self.active else { return };
        for service in active.leaving.half(&active.machine, clock::boottime()) {
            let wanted = active.leaving.wanted(&active.machine, service);
            let processes = wanted.into_iter().map(|(key, _)| key).collect();
            let (ask, id) = (self.ask.clone(), active.machine.begun.id.clone());
            self.waits.push(Box::pin(async move {
                let seen = spawn_blocking(move || sockets::follow_acts(&ask, processes)).await;
                Waited::Followed(id, service, seen.unwrap_or(false))
            }));
        }
    }

    /// Begins to look at what does not stop in time: that takes a moment, for which nothing else waits.
    fn look_at_what_is_left(&mut self) {
        let Some(active) = &mut self.active else { return };
        for service in active.leaving.due(&active.machine, clock::boottime()) {
            let wanted = active.leaving.wanted(&active.machine, service);
            let (ask, id) = (self.ask.clone(), active.machine.begun.id.clone());
            self.waits.push(Box::pin(async move {
                let copied = spawn_blocking(move || leaving::copy(&ask, wanted)).await;
                Waited::Copied(id, service, copied.ok().flatten())
            }));
        }
    }

    pub(super) fn copied(&mut self, id: String, service: usize, copied: leaving::Copied) {
        let Some(active) = &mut self.active else { return };
        active.leaving.copied(service, &copied);
        let names = active.leaving.names();
        self.waits.push(Box::pin(async move {
            let named = spawn_blocking(move || leaving::name(&names, copied)).await;
            Waited::Named(id, service, named.unwrap_or_default())
        }));
    }

    /// A member has gone. What it did before, as to start another process, is told by events that come a moment later.
    pub(super) fn gone(&mut self, id: String, service: usize, member: usize) {
        let Some(active) = &mut self.active else { return };
        active.untold.insert((service, member));
        if active.is_told(service, member) {
            return self.told(service, member);
        }
        // They are there already: the observer need not wait until it would read them anyway.
        self.ask.hurry();
        self.waits.push(Box::pin(async move {
            time::sleep(EVENTS).await;
            Waited::Untold(id, service, member)
        }));
    }

    pub(super) fn told(&mut self, service: usize, member: usize) {
        if self.active.as_mut().is_some_and(|active| active.untold.remove(&(service, member))) {
            self.step(Input::Gone(service, member));
        }
    }

    /// What has gone in time is not late because its events are still waited for, or because the agent was away.
    fn tell_gone(&mut self) {
        let Some(active) = &self.active else { return };
        let late = active.machine.about_to_be_late(clock::boottime()).into_iter();
        let gone: Vec<_> = late.flat_map(|service| active.gone(service)).collect();
        gone.into_iter().for_each(|(service, member)| self.step(Input::Gone(service, member)));
    }

    /// After events: which ends are told now.
    pub(super) fn all_told(&mut self) {
        let Some(active) = &self.active else { return };
        let told =
            active.untold.iter().copied().filter(|(service, member)| active.is_told(*service, *member));
        told.collect::<Vec<_>>().into_iter().for_each(|(service, member)| self.told(service, member));
    }

    /// What comes late of a service that was given up, and is not over yet.
    pub(super) fn tell_left(&mut self, service: usize) {
        let is_given_up =
            |active: &&Active| matches!(active.machine.runs[service].phase, Phase::Killing | Phase::Late);
        let active = self.active.as_ref().filter(is_given_up);
        let fact = active.and_then(|active| active.leaving.fact(service));
        fact.into_iter().for_each(|fact| self.step(Input::Seen(service, fact)));
    }

    /// This task did not keep up with the events.
    pub(super) fn missed(&mut self) {
        let Some(active) = &mut self.active else { return };
        active.leaving.missed();
        for service in active.machine.unseen() {
            let why = "the agent did not keep up with what the kernel told".to_owned();
            self.step(Input::Seen(service, Fact::Unseen { why, strays: true }));
        }
    }
}

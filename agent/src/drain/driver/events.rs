//! What the driver makes of the kernel's events.

use std::iter;

use futures_util::FutureExt;

use super::{
    super::{active::owner, service::Name},
    Driver, Held, Told,
};
use crate::{
    decode::Event,
    losses::{self, By},
    subscribe::{Item, Subscription},
};

/// Batches of events that are taken before something is judged, at most.
const MAX_WAITING: usize = 256;

impl Driver {
    /// Takes what has been told already, before something is judged.
    pub(super) fn told_until_now(&mut self, events: &mut Option<Subscription>) {
        let mut waiting = iter::from_fn(|| events.as_mut()?.next().now_or_never()?);
        // At full load there is always one more.
        waiting.by_ref().take(MAX_WAITING).for_each(|item| self.events(&item));
    }

    pub(super) fn events(&mut self, item: &Item) {
        let events = match item {
            Item::Events(events) => events,
            Item::Gap(_) => {
                self.missed();
                return;
            }
            // The kernel's ledger tells of these.
            Item::Lost(_) => return,
        };
        for (signal, by) in losses::kills(events) {
            let is_in_drain =
                self.active.as_ref().is_some_and(|active| owner(&active.machine, signal.target).is_some());
            // Workers of the agent are nobody's service.
            if by == By::Plumb && !is_in_drain {
                continue;
            }
            (self.tell)(Told::Killed(by));
            let held = self.held.iter().map(|(name, held)| (name, &held.process.identity));
            let mut registered = held.chain(self.ended.iter().map(|(name, identity)| (name, identity)));
            if by != By::Plumb
                && let Some((name, _)) = registered.find(|(_, identity)| identity.is(signal.target))
            {
                tracing::warn!(service = %name, pid = signal.target.tgid, "{} sends KILL to a service", losses::sender(signal));
            }
        }
        let seen = self.active.as_mut().map(|active| active.seen(events));
        seen.into_iter().flatten().for_each(|input| self.step(input));
        self.all_told();
        for event in events.iter().filter(|event| matches!(event, Event::Exec(_))) {
            let tgid = event.header().process.tgid;
            self.forget_changed(|pid| pid == tgid);
        }
    }

    /// A process that runs another program, or is in another cgroup, is not what was registered.
    pub(super) fn forget_changed(&mut self, is_asked: impl Fn(u32) -> bool) {
        let changed = |(name, held): (&Name, &Held)| {
            let meant = &held.process.identity;
            let now = is_asked(meant.pid).then(|| held.process.again().ok())??;
            meant.differs(&now.identity).map(|why| (name.clone(), why))
        };
        let changed: Vec<_> = self.held.iter().filter_map(changed).collect();
        for (name, why) in &changed {
            tracing::warn!(service = %name, "a registration ends: {why}");
            self.forget(name);
        }
    }
}

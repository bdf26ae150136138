//! Who listens to the events. Each has a bounded queue: who does not keep up misses events, is told how many,
//! and holds up nobody else.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
};

use plumb_common::task::ProcKey;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::{decode::Event, follow::Who};

/// Listeners at a time.
const MAX_SUBSCRIBERS: usize = 8;
/// Events that may wait for one listener; at about 140 bytes each.
const MAX_QUEUED: usize = 65_536;

/// What a listener gets.
#[derive(Debug)]
pub(crate) enum Item {
    /// In order; others' are among them.
    Events(Arc<Vec<Event>>),
    /// This many of its events are missing here, because it did not keep up.
    Gap(u64),
    /// This many events of anybody have been lost on the way from the kernel.
    Lost(u64),
}

#[derive(Debug)]
struct Subscriber {
    who: Who,
    items: UnboundedSender<Item>,
    queued: Arc<AtomicUsize>,
    /// Not told yet: events missed, and events lost by anybody.
    gap: Arc<AtomicU64>,
    lost: u64,
    /// The agent itself listens: it is none of those that are counted.
    is_own: bool,
}

/// All listeners.
#[derive(Clone, Debug, Default)]
pub(crate) struct Subscribers {
    list: Arc<Mutex<Vec<Subscriber>>>,
    missed: Arc<AtomicU64>,
}

/// The listener's end. Dropping it unsubscribes.
#[derive(Debug)]
pub(crate) struct Subscription {
    pub who: Who,
    items: UnboundedReceiver<Item>,
    queued: Arc<AtomicUsize>,
    gap: Arc<AtomicU64>,
}

impl Subscription {
    /// What comes next; `None` when the agent ends.
    pub(crate) async fn next(&mut self) -> Option<Item> {
        let item = self.items.recv().await?;
        if let Item::Events(events) = &item {
            self.queued.fetch_sub(events.len(), Relaxed);
        }
        Some(item)
    }

    /// Events missed that it has not been told of yet; for the end.
    pub(crate) fn untold(&self) -> Option<Item> {
        Some(self.gap.swap(0, Relaxed)).filter(|gap| *gap > 0).map(Item::Gap)
    }
}

/// Whether an event is about somebody.
#[must_use]
pub(crate) fn is_about(event: &Event, who: Who) -> bool {
    let of = |key: ProcKey| {
        event.header().process == key || matches!(event, Event::Clone(clone) if clone.child == key)
    };
    match who {
        Who::Everybody => true,
        Who::Process(key) => of(key),
    }
}

impl Subscribers {
    /// A new listener; `None` when there are too many.
    #[must_use]
    pub(crate) fn add(&self, who: Who) -> Option<Subscription> {
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        let is_open = |subscriber: &&Subscriber| !subscriber.items.is_closed() && !subscriber.is_own;
        let has_room = list.iter().filter(is_open).count() < MAX_SUBSCRIBERS;
        drop(list);
        has_room.then(|| self.enter(who, false))
    }

    /// The agent itself listens to the life of processes.
    pub(crate) fn add_own(&self) -> Subscription {
        self.enter(Who::Everybody, true)
    }

    fn enter(&self, who: Who, is_own: bool) -> Subscription {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.retain(|subscriber| !subscriber.items.is_closed());
        let (items, receiver) = unbounded_channel();
        let (queued, gap) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicU64::new(0)));
        list.push(Subscriber {
            who,
            items,
            queued: Arc::clone(&queued),
            gap: Arc::clone(&gap),
            lost: 0,
            is_own,
        });
        Subscription { who, items: receiver, queued, gap }
    }

    /// Hands a batch to everybody; lost is what the ring itself could not keep since the last time.
    pub(crate) fn publish(&self, events: &Arc<Vec<Event>>, lost: u64) {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        for subscriber in list.iter_mut() {
            subscriber.lost += lost;
            // A batch is taken whole, so one larger than the bound still fits into an empty queue.
            let queued = subscriber.queued.load(Relaxed);
            if queued > 0 && queued + events.len() > MAX_QUEUED {
                let own = events.iter().filter(|event| is_about(event, subscriber.who)).count() as u64;
                subscriber.gap.fetch_add(own, Relaxed);
                self.missed.fetch_add(own, Relaxed);
                continue;
            }
            // Neither counts against the bound, so only a reader that takes them gets more of them.
            let gap = if queued == 0 || !events.is_empty() { subscriber.gap.swap(0, Relaxed) } else { 0 };
            if gap > 0 {
                let _ = subscriber.items.send(Item::Gap(gap));
            }
            if subscriber.lost > 0 && (queued == 0 || !events.is_empty()) {
                let _ = subscriber.items.send(Item::Lost(std::mem::take(&mut subscriber.lost)));
            }
            if !events.is_empty() {
                subscriber.queued.fetch_add(events.len(), Relaxed);
                let _ = subscriber.items.send(Item::Events(Arc::clone(events)));
            }
        }
        list.retain(|subscriber| !subscriber.items.is_closed());
    }

    /// Events that listeners missed so far because they did not keep up.
    #[must_use]
    pub(crate) fn missed(&self) -> u64 {
        self.missed.load(Relaxed)
    }

    /// Listeners now.
    #[must_use]
    pub(crate) fn count(&self) -> usize {
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.iter().filter(|subscriber| !subscriber.is_own).count()
    }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;
    use plumb_common::event::FdChange;

    use super::*;

    fn batch(tgid: u32, len: usize) -> Arc<Vec<Event>> {
        let mut event = FdChange::zeroed();
        event.header.process = ProcKey::new(tgid, 1);
        Arc::new(vec![Event::Fd(event); len])
    }

    #[tokio::test]
    async fn who_does_not_keep_up_is_told_how_many_it_missed_and_nobody_else_notices() {
        let all = Subscribers::default();
        let mut slow = all.add(Who::Process(ProcKey::new(7, 1))).unwrap();
        let mut quick = all.add(Who::Everybody).unwrap();
        let mut received = 0;
        for _ in 0..20 {
            for tgid in [7, 8] {
                all.publish(&batch(tgid, 10_000), 0);
                let Some(Item::Events(events)) = quick.next().await else { panic!("a gap") };
                received += events.len();
            }
        }
        assert_eq!(received, 400_000);
        // Six batches fit; of the rest half are its own.
        let mut own = 0;
        let mut gaps = 0;
        for _ in 0..6 {
            let Some(Item::Events(events)) = slow.next().await else { panic!("a gap") };
            own += events.iter().filter(|event| is_about(event, slow.who)).count() as u64;
        }
        all.publish(&batch(7, 1), 0);
        if let Some(Item::Gap(gap)) = slow.next().await {
            gaps += gap;
        }
        assert_eq!((own, gaps, all.missed()), (30_000, 170_000, 170_000));
        assert!(matches!(slow.next().await, Some(Item::Events(_))));
    }

    #[test]
    fn there_is_a_bound_on_listeners_and_one_that_goes_makes_room() {
        let all = Subscribers::default();
        let mut held: Vec<_> = (0..MAX_SUBSCRIBERS).map(|_| all.add(Who::Everybody).unwrap()).collect();
        assert!(all.add(Who::Everybody).is_none());
        held.pop();
        assert!(all.add(Who::Everybody).is_some());
    }
}

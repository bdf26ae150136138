//! Whose fds and threads get origins: a bounded number of suspects, shared out by group, in the order in which they
//! became suspect.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use plumb_common::task::ProcKey;

use crate::detect::Resource;

/// Places in all, and of one group.
const PLACES: usize = 256;
const PLACES_OF_GROUP: usize = 64;

type Suspect = (ProcKey, Resource);

/// Who has a place and who waits for one.
#[derive(Debug, Default)]
pub(crate) struct Watchlist {
    watched: HashMap<Suspect, Arc<str>>,
    by_group: HashMap<Arc<str>, usize>,
    /// By when they came.
    waiting: BTreeMap<u64, (Suspect, Arc<str>)>,
    came: u64,
}

impl Watchlist {
    /// A suspect wants a place. Whether it has one now.
    pub(crate) fn add(&mut self, suspect: Suspect, group: &Arc<str>) -> bool {
        if self.watched.contains_key(&suspect) {
            return true;
        }
        if self.has_room(group) {
            self.admit(suspect, group);
            return true;
        }
        self.came += 1;
        self.waiting.insert(self.came, (suspect, Arc::clone(group)));
        false
    }

    /// A suspect is none any more. Returns those that have a place by that.
    pub(crate) fn remove(&mut self, suspect: Suspect) -> Vec<Suspect> {
        self.waiting.retain(|_, (waiting, _)| *waiting != suspect);
        if let Some(group) = self.watched.remove(&suspect)
            && let Some(places) = self.by_group.get_mut(&group)
        {
            *places -= 1;
            if *places == 0 {
                self.by_group.remove(&group);
            }
        }
        let mut admitted = Vec::new();
        while self.watched.len() < PLACES {
            let mut next = self.waiting.iter().filter(|(_, (_, group))| self.has_room(group));
            let Some(came) = next.next().map(|(came, _)| *came) else { break };
            if let Some((suspect, group)) = self.waiting.remove(&came) {
                self.admit(suspect, &group);
                admitted.push(suspect);
            }
        }
        admitted
    }

    #[must_use]
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    fn has_room(&self, group: &Arc<str>) -> bool {
        self.watched.len() < PLACES && self.by_group.get(group).is_none_or(|places| *places < PLACES_OF_GROUP)
    }

    fn admit(&mut self, suspect: Suspect, group: &Arc<str>) {
        self.watched.insert(suspect, Arc::clone(group));
        *self.by_group.entry(Arc::clone(group)).or_default() += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suspect(pid: u32) -> Suspect {
        (ProcKey::new(pid, 1), Resource::Fd)
    }

    #[test]
    fn one_group_leaves_places_to_others_and_those_who_wait_follow_in_order() {
        let (crowd, other): (Arc<str>, Arc<str>) = ("crowd".into(), "other".into());
        let mut list = Watchlist::default();
        let places = (0..1000).filter(|pid| list.add(suspect(*pid), &crowd)).count();
        assert_eq!((places, list.waiting()), (PLACES_OF_GROUP, 1000 - PLACES_OF_GROUP));
        assert!(list.add(suspect(5000), &other) && list.add(suspect(0), &crowd), "it has its place");
        assert_eq!(list.remove(suspect(5000)), []);
        assert_eq!(list.remove(suspect(3)), [suspect(PLACES_OF_GROUP as u32)]);
        assert_eq!(list.remove(suspect(999)), [], "it only waited");
        assert_eq!(list.waiting(), 1000 - PLACES_OF_GROUP - 2);
    }

    #[test]
    fn there_is_a_bound_for_all() {
        let mut list = Watchlist::default();
        for pid in 0..1000u32 {
            list.add(suspect(pid), &format!("group {}", pid % 50).into());
        }
        assert_eq!(list.waiting(), 1000 - PLACES);
        assert_eq!(list.remove(suspect(0)).len(), 1);
    }
}

//! Who waits for whom: the stages of a drain.

use std::collections::BTreeSet;

use super::{
    registry::ALL,
    service::{Name, Service},
};

/// A set of services, by their places in the list.
type Set = [u64; ALL / 64];

fn has(set: &Set, at: usize) -> bool {
    set[at / 64] >> (at % 64) & 1 == 1
}

fn insert(set: &mut Set, at: usize) {
    set[at / 64] |= 1 << (at % 64);
}

/// For each service all that must be gone before it, directly or not.
struct Closure(Vec<Set>);

impl Closure {
    /// Of what the services name; a service may wait for itself here.
    fn named(all: &[Service]) -> Self {
        let mut closure = Self(vec![Set::default(); all.len()]);
        for (at, service) in all.iter().enumerate() {
            for name in service.after.iter().flatten() {
                if let Some(other) = all.iter().position(|other| other.name == *name) {
                    closure.wait(at, other);
                }
            }
        }
        closure
    }

    /// With those that name nobody waiting for all that were registered later, unless these wait for them.
    fn whole(all: &[Service]) -> Self {
        let mut closure = Self::named(all);
        for (at, _) in all.iter().enumerate().filter(|(_, service)| service.after.is_none()) {
            for later in at + 1..all.len() {
                if !has(&closure.0[later], at) {
                    closure.wait(at, later);
                }
            }
        }
        closure
    }

    fn wait(&mut self, at: usize, other: usize) {
        if has(&self.0[at], other) {
            return;
        }
        let mut more = self.0[other];
        insert(&mut more, other);
        for (place, set) in self.0.iter_mut().enumerate() {
            if place == at || has(set, at) {
                set.iter_mut().zip(more).for_each(|(word, more)| *word |= more);
            }
        }
    }
}

/// Services that name each other in a ring, the first of them again at its end.
#[must_use]
pub(super) fn cycle(all: &[Service]) -> Option<Vec<Name>> {
    let closure = Closure::named(all);
    let first = (0..all.len()).find(|at| has(&closure.0[*at], *at))?;
    let (mut ring, mut at) = (vec![all[first].name.clone()], first);
    loop {
        // Of those it names one at least leads back.
        let leads = |other: &usize| {
            let is_named = all[at].after.as_ref().is_some_and(|after| after.contains(&all[*other].name));
            is_named && (*other == first || has(&closure.0[*other], first))
        };
        at = (0..all.len()).find(leads)?;
        ring.push(all[at].name.clone());
        if at == first || ring.len() > all.len() {
            return Some(ring);
        }
    }
}

/// Services that are drained together, and for whom each waits.
pub(crate) type Stage = Vec<(Name, Vec<Name>)>;

/// The selected services in stages: each waits for all stages before its own. Beside each stand those it waits for
/// itself, without those that these wait for.
#[must_use]
pub(crate) fn stages(all: &[Service], selected: &BTreeSet<Name>) -> Vec<Stage> {
    let closure = Closure::whole(all);
    let chosen: Vec<usize> = (0..all.len()).filter(|at| selected.contains(&all[*at].name)).collect();
    let mut level = vec![None; all.len()];
    let mut stages: Vec<Stage> = Vec::new();
    let mut left = chosen.clone();
    while !left.is_empty() {
        let is_free = |at: &usize| {
            let mut before = chosen.iter().filter(|other| has(&closure.0[*at], **other));
            before.all(|other| level[*other].is_some())
        };
        let (now, later): (Vec<_>, Vec<_>) = left.iter().copied().partition(is_free);
        if now.is_empty() {
            // Cycles are refused at registration; should there be one all the same, they go together.
            stages.push(later.iter().map(|at| (all[*at].name.clone(), Vec::new())).collect());
            break;
        }
        now.iter().for_each(|at| level[*at] = Some(stages.len()));
        let direct = |at: usize| {
            let before = chosen.iter().filter(|other| has(&closure.0[at], **other));
            let is_beyond = |other: usize| {
                chosen.iter().any(|between| has(&closure.0[at], *between) && has(&closure.0[*between], other))
            };
            before.filter(|other| !is_beyond(**other)).map(|other| all[*other].name.clone()).collect()
        };
        stages.push(now.iter().map(|at| (all[*at].name.clone(), direct(*at))).collect());
        left = later;
    }
    stages
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn words(all: &[Service], selected: &[&str]) -> Vec<String> {
        let selected = selected.iter().map(|name| Name::new(name).unwrap()).collect();
        let stages = stages(all, &selected);
        let names = |stage: &Stage| stage.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(" ");
        stages.iter().map(names).collect()
    }

    #[test]
    fn without_a_word_the_last_registered_goes_first() {
        let all = ["a", "b", "c"].map(Service::example);
        assert_eq!(words(&all, &["a", "b", "c"]), ["c", "b", "a"]);
        assert_eq!(words(&all, &["c", "a"]), ["c", "a"]);
        assert!(words(&all, &[]).is_empty());
    }

    #[test]
    fn who_names_somebody_waits_for_these_alone() {
        let all = [
            Service::example("db"),
            Service::example("cache").after(&["web", "worker"]),
            Service::example("web").after(&[]),
            Service::example("worker").after(&[]),
        ];
        assert_eq!(words(&all, &["db", "cache", "web", "worker"]), ["web worker", "cache", "db"]);
        // The order holds also when what is between is not drained.
        assert_eq!(words(&all, &["db", "web"]), ["web", "db"]);
        let stages = stages(&all, &all.iter().map(|service| service.name.clone()).collect());
        let cache = Name::new("cache").unwrap();
        assert_eq!(stages[2], [(Name::new("db").unwrap(), vec![cache])], "web and worker go without saying");
    }

    #[test]
    fn what_is_named_comes_before_the_order_of_registration() {
        // The later one waits for the earlier, which therefore does not wait for it.
        let all = [Service::example("first"), Service::example("second").after(&["first"])];
        assert_eq!(words(&all, &["first", "second"]), ["first", "second"]);
    }

    #[test]
    fn a_ring_is_named() {
        let all = [
            Service::example("x"),
            Service::example("a").after(&["b", "x"]),
            Service::example("b").after(&["x", "c"]),
            Service::example("c").after(&["a"]),
        ];
        let ring: Vec<_> = cycle(&all).unwrap().iter().map(|name| name.as_str().to_owned()).collect();
        assert_eq!(ring, ["a", "b", "c", "a"]);
        assert_eq!(cycle(&all[..1]), None);
    }

    proptest! {
        /// Each selected service is in one stage, after all that it waits for.
        #[test]
        fn stages_hold_each_service_once_and_after_what_it_waits_for(
            edges in proptest::collection::vec((0..20_usize, 0..20_usize), 0..40),
            free in proptest::collection::vec(any::<bool>(), 20),
            chosen in proptest::collection::vec(any::<bool>(), 20),
        ) {
            let mut all: Vec<_> = (0..20).map(|number| Service::example(&format!("s{number}"))).collect();
            for (at, free) in free.iter().enumerate() {
                all[at].after = free.then(BTreeSet::new);
            }
            for (at, other) in edges {
                let name = all[other].name.clone();
                let old = all[at].after.clone();
                all[at].after.get_or_insert_default().insert(name);
                if cycle(&all).is_some() {
                    all[at].after = old;
                }
            }
            let selected: BTreeSet<_> =
                all.iter().zip(&chosen).filter(|(_, chosen)| **chosen).map(|(one, _)| one.name.clone()).collect();
            let stages = stages(&all, &selected);
            let place = |name: &Name| stages.iter().position(|stage| stage.iter().any(|(one, _)| one == name));
            let seen: Vec<_> = stages.iter().flatten().map(|(name, _)| name.clone()).collect();
            prop_assert_eq!(seen.len(), selected.len());
            prop_assert_eq!(&seen.iter().cloned().collect::<BTreeSet<_>>(), &selected);
            for service in all.iter().filter(|service| selected.contains(&service.name)) {
                for other in service.after.iter().flatten().filter(|other| selected.contains(other)) {
                    prop_assert!(place(&service.name) > place(other));
                }
            }
            // Those that name nobody go after all that came later and do not wait for them.
            let closure = Closure::named(&all);
            for (at, service) in all.iter().enumerate() {
                if service.after.is_none() && selected.contains(&service.name) {
                    for (later, other) in all.iter().enumerate().skip(at + 1) {
                        if selected.contains(&other.name) && other.after.is_none() && !has(&closure.0[later], at) {
                            prop_assert!(place(&service.name) != place(&other.name));
                        }
                    }
                }
            }
        }
    }
}

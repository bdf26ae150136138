//! How long what a suspect holds has been held: a life table from repeated looks.
//!
//! Each look lists everything. What is new since the look before is a cohort; what of it is gone at a later
//! look died at that age. A leak is the part that never dies: beyond some age there are no deaths any more, and
//! those who reach that age become more and more. What serves a request or a client dies at every age.

use foldhash::HashMap;
use serde::{Deserialize, Serialize};

/// Identities kept at a time; with more, every second, fourth, … stands for all.
const MAX_KEPT: usize = 4_096;
/// Cohorts told apart; with more, neighbours are merged.
const MAX_COHORTS: usize = 32;
/// Classes of age: below 10 s, 20 s, 40 s, … up to half a year.
pub(crate) const CLASSES: usize = 16;
const YOUNG: f64 = 10.0;
const SECOND: u64 = 1_000_000_000;

/// Beginning of a class of age, in seconds.
#[must_use]
pub(crate) fn age_of(class: usize) -> f64 {
    if class == 0 { 0.0 } else { YOUNG * (1u64 << (class - 1)) as f64 }
}

fn class_of(age: f64) -> usize {
    (0..CLASSES).rev().find(|class| age >= age_of(*class)).unwrap_or(0)
}

/// One class of age. Ages count from the look that first showed something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Age {
    /// Of what is new since the first look: how many of this age are held now.
    pub held: f64,
    /// And how long all were watched at this age, in seconds, added up.
    pub watched: f64,
    /// How many died at this age, of what is new and of what the first look showed.
    pub lost: f64,
}

/// What a suspect holds, by age.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Holdings {
    /// Nanoseconds since boot of the first look and of this one.
    pub since: u64,
    pub now: u64,
    /// All that is held now.
    pub held: u32,
    /// What the first look showed, and how many of these are still held.
    pub first: f64,
    pub kept: f64,
    pub ages: [Age; CLASSES],
    /// Of what is new since then: when it was seen first, oldest first, and how many of it are held.
    pub arrivals: Vec<(u64, f64)>,
}

/// Identities with the cohort they belong to, over all looks.
#[derive(Debug, Default)]
pub(crate) struct Cohorts {
    members: HashMap<u64, u8>,
    /// Nanoseconds since boot of the look that began each cohort, oldest first.
    since: Vec<u64>,
    last: u64,
    /// Each kept identity stands for 2 to this power.
    shift: u32,
    first: f64,
    ages: [Age; CLASSES],
}

/// Mixes what tells one open file or thread from the next that gets its number.
#[must_use]
pub(crate) fn identity(parts: [u64; 3]) -> u64 {
    // splitmix64: every bit of the input moves every bit of the output, so that a part of the identities is a
    // fair sample.
    parts.into_iter().fold(0, |mixed: u64, part| {
        let mut z = (mixed ^ part).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

impl Cohorts {
    /// Whether it was held at the last look. Of many only a sample is known.
    pub(crate) fn contains(&self, identity: u64) -> bool {
        self.members.contains_key(&identity)
    }

    /// Whether this identity is one of those kept as a sample.
    fn is_kept(&self, identity: u64) -> bool {
        identity.trailing_zeros() >= self.shift
    }

    /// Takes everything that is held at `now` and says how old it is.
    pub(crate) fn look(&mut self, now: u64, identities: impl Iterator<Item = u64>) -> Holdings {
        let is_first = self.since.is_empty();
        self.make_room();
        let newest = self.since.len() as u8;
        self.since.push(now);
        let mut held = 0u32;
        let before = std::mem::take(&mut self.members);
        let mut counts = vec![0u32; self.since.len()];
        before.values().for_each(|cohort| counts[usize::from(*cohort)] += 1);
        let mut found: HashMap<u64, u8> = HashMap::default();
        for identity in identities {
            held = held.saturating_add(1);
            if self.is_kept(identity) {
                found.insert(identity, before.get(&identity).copied().unwrap_or(newest));
                while found.len() > MAX_KEPT {
                    self.shift += 1;
                    found.retain(|identity, _| identity.trailing_zeros() >= self.shift);
                    counts = vec![0; self.since.len()];
                    let kept = before.iter().filter(|(identity, _)| self.is_kept(**identity));
                    kept.for_each(|(_, cohort)| counts[usize::from(*cohort)] += 1);
                }
            }
        }
        self.members = found;
        let each = f64::from(1u32 << self.shift.min(31));
        if is_first {
            self.first = self.members.len() as f64 * each;
        } else {
            self.account(now, &counts, each);
        }
        self.last = now;
        self.holdings(now, held, each)
    }

    /// Books what died since the last look, and for how long the others were watched.
    fn account(&mut self, now: u64, before: &[u32], each: f64) {
        let mut after = vec![0u32; self.since.len()];
        self.members.values().for_each(|cohort| after[usize::from(*cohort)] += 1);
        let passed = seconds(now.saturating_sub(self.last));
        for (cohort, since) in self.since.iter().enumerate().take(self.since.len() - 1) {
            let class = &mut self.ages[class_of(seconds(self.last.saturating_sub(*since)))];
            class.lost += f64::from(before[cohort].saturating_sub(after[cohort])) * each;
            if cohort > 0 {
                class.watched += f64::from(before[cohort] + after[cohort]) / 2.0 * each * passed;
            }
        }
    }

    fn holdings(&mut self, now: u64, held: u32, each: f64) -> Holdings {
        self.ages.iter_mut().for_each(|age| age.held = 0.0);
        let mut arrivals: Vec<(u64, f64)> = self.since.iter().map(|since| (*since, 0.0)).collect();
        for cohort in self.members.values() {
            arrivals[usize::from(*cohort)].1 += each;
        }
        let (since, kept) = arrivals.remove(0);
        for (since, count) in &arrivals {
            self.ages[class_of(seconds(now.saturating_sub(*since)))].held += count;
        }
        Holdings { since, now, held, first: self.first, kept, ages: self.ages, arrivals }
    }

    /// Merges the two neighbours that differ least in age, compared to their age; never the first.
    fn make_room(&mut self) {
        while self.since.len() >= MAX_COHORTS {
            let age = |index: usize| seconds(self.last.saturating_sub(self.since[index])) + YOUNG;
            let ratio = |index: &usize| age(*index) / age(*index + 1);
            let pairs = 1..self.since.len() - 1;
            let Some(older) = pairs.min_by(|a, b| ratio(a).total_cmp(&ratio(b))) else { return };
            // The younger age is the one that is sure.
            self.since.remove(older);
            for cohort in self.members.values_mut().filter(|cohort| usize::from(**cohort) > older) {
                *cohort -= 1;
            }
        }
    }
}

fn seconds(nanos: u64) -> f64 {
    nanos as f64 / SECOND as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(range: std::ops::Range<u64>) -> impl Iterator<Item = u64> {
        range.map(|id| identity([id, 0, 0]))
    }

    #[test]
    fn a_leak_loses_nothing_and_its_cohorts_grow_old() {
        let mut cohorts = Cohorts::default();
        let mut last = Holdings::default();
        for look in 0..6u64 {
            last = cohorts.look(look * 20 * SECOND, ids(0..30 + look * 20));
        }
        assert_eq!((last.first, last.kept, last.held), (30.0, 30.0, 130));
        assert_eq!(last.ages.iter().map(|age| age.lost).sum::<f64>(), 0.0);
        let held: Vec<f64> = last.ages.iter().map(|age| age.held).collect();
        // Ages 80, 60, 40, 20 and 0 s.
        assert_eq!(held[..5], [20.0, 0.0, 20.0, 40.0, 20.0]);
    }

    #[test]
    fn what_is_replaced_dies_at_its_age() {
        let mut cohorts = Cohorts::default();
        let mut last = Holdings::default();
        for look in 0..4u64 {
            last = cohorts.look(look * 20 * SECOND, ids(look * 50..look * 50 + 50));
        }
        assert_eq!((last.first, last.kept), (50.0, 0.0));
        assert_eq!(last.ages[0].lost, 150.0);
    }

    #[test]
    fn many_are_judged_by_a_fair_sample_and_memory_is_bounded() {
        let mut cohorts = Cohorts::default();
        let first = cohorts.look(0, ids(0..100_000));
        let then = cohorts.look(20 * SECOND, ids(0..200_000));
        assert!(cohorts.members.len() <= MAX_KEPT);
        assert!((first.first - 100_000.0).abs() < 8_000.0, "{first:?}");
        assert!((then.kept - 100_000.0).abs() < 8_000.0, "{then:?}");
        assert_eq!(then.ages.iter().map(|age| age.lost).sum::<f64>(), 0.0);
        for look in 2..200u64 {
            cohorts.look(look * 20 * SECOND, ids(0..200_000 + look));
        }
        assert!(cohorts.since.len() <= MAX_COHORTS);
    }
}

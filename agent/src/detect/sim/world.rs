//! One made-up process: what it has open, and the chance that opens it.

use std::{cmp::Reverse, collections::BinaryHeap};

use foldhash::{HashMap, HashSet};

use super::identity;

/// Numbers by splitmix64, from a seed.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        identity([self.0, 0, 0])
    }

    /// Uniform in 0 to 1, never 0.
    pub(super) fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    pub(super) fn within(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.uniform()
    }

    /// Uniform in its logarithm: as many slow ones as fast ones.
    pub(super) fn log(&mut self, low: f64, high: f64) -> f64 {
        self.within(low.ln(), high.ln()).exp()
    }

    pub(super) fn chance(&mut self, part: f64) -> bool {
        self.uniform() < part
    }

    pub(super) fn exponential(&mut self, mean: f64) -> f64 {
        -self.uniform().ln() * mean
    }

    pub(super) fn normal(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Number of independent events of which `mean` are expected.
    pub(super) fn poisson(&mut self, mean: f64) -> u32 {
        if mean > 50.0 {
            return (mean + mean.sqrt() * self.normal()).round().max(0.0) as u32;
        }
        let (mut count, mut product) = (0, self.uniform());
        let end = (-mean).exp();
        while product > end {
            count += 1;
            product *= self.uniform();
        }
        count
    }
}

/// What the process has open.
pub(super) struct World {
    pub(super) now: u64,
    pub(super) random: Random,
    next: u64,
    held: HashSet<u64>,
    ends: BinaryHeap<Reverse<(u64, u64)>>,
    /// By name, what was opened to be closed together.
    sets: HashMap<&'static str, Vec<u64>>,
    /// Beyond this nothing is opened.
    pub(super) limit: usize,
}

impl World {
    pub(super) fn new(now: u64, random: Random) -> Self {
        let (held, ends, sets) = (HashSet::default(), BinaryHeap::new(), HashMap::default());
        Self { now, random, next: 0, held, ends, sets, limit: usize::MAX }
    }

    fn take(&mut self) -> Option<u64> {
        self.next += 1;
        (self.held.len() < self.limit && self.held.insert(self.next)).then_some(self.next)
    }

    /// Opens for ever.
    pub(super) fn keep(&mut self, count: u32) {
        for _ in 0..count {
            self.take();
        }
    }

    /// Opens for so many seconds.
    pub(super) fn open(&mut self, seconds: f64) {
        if seconds >= 1.0 - self.random.uniform()
            && let Some(id) = self.take()
        {
            self.ends.push(Reverse((self.now + 1 + seconds as u64, id)));
        }
    }

    /// Opens into a set.
    pub(super) fn fill(&mut self, set: &'static str, count: u32) {
        for _ in 0..count {
            let Some(id) = self.take() else { return };
            self.sets.entry(set).or_default().push(id);
        }
    }

    /// Closes any of a set.
    pub(super) fn drain(&mut self, set: &'static str, count: u32) {
        for _ in 0..count {
            let length = self.size(set);
            if length > 0 {
                let index = (self.random.uniform() * length as f64) as usize % length;
                if let Some(id) = self.sets.get_mut(set).map(|ids| ids.swap_remove(index)) {
                    self.held.remove(&id);
                }
            }
        }
    }

    pub(super) fn size(&self, set: &'static str) -> usize {
        self.sets.get(set).map_or(0, Vec::len)
    }

    pub(super) fn swap(&mut self, one: &'static str, other: &'static str) {
        let (a, b) = (self.sets.remove(one).unwrap_or_default(), self.sets.remove(other).unwrap_or_default());
        self.sets.insert(one, b);
        self.sets.insert(other, a);
    }

    /// Brings a set to a size.
    pub(super) fn resize(&mut self, set: &'static str, size: usize) {
        let now = self.size(set);
        self.fill(set, size.saturating_sub(now) as u32);
        self.drain(set, now.saturating_sub(size) as u32);
    }

    /// Closes what has lived its time.
    pub(super) fn expire(&mut self) {
        while let Some(Reverse((end, id))) = self.ends.peek().copied()
            && end <= self.now
        {
            self.ends.pop();
            self.held.remove(&id);
        }
    }

    /// Requests of one second at a rate, each with a random life of this mean. `tail` makes a few live much longer.
    pub(super) fn serve(&mut self, rate: f64, mean: f64, tail: f64) {
        for _ in 0..self.random.poisson(rate) {
            let life = if tail > 0.0 {
                // Log-normal with this mean.
                mean * (tail * self.random.normal() - tail * tail / 2.0).exp()
            } else {
                self.random.exponential(mean)
            };
            self.open(life);
        }
    }

    pub(super) fn count(&self) -> u32 {
        self.held.len() as u32
    }

    pub(super) fn identities(&self) -> impl Iterator<Item = u64> {
        self.held.iter().map(|id| identity([*id, 0, 0]))
    }
}

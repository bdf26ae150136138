//! What grows from one equal round to the next.

use std::collections::HashMap;

use super::{
    sites::{Key, Left, Site, fd_left, is_kernels, thread_left},
    suppress::Kind,
    traces::Namer,
    tree::{Process, Through},
};

/// What there was of each origin after each round.
#[derive(Debug, Default)]
pub(crate) struct Rounds {
    counts: HashMap<Key, (Site, Vec<u32>)>,
    done: usize,
}

impl Rounds {
    /// Takes what all processes have after one more round.
    pub(crate) fn add<'a>(&mut self, processes: impl Iterator<Item = &'a Process>, namer: &mut impl Namer) {
        let round = self.done;
        self.done += 1;
        for process in processes {
            let of = (process.key, process.comm.as_str());
            let fds = process.fds.iter().filter(|(fd, slot)| **fd > 2 && slot.through == Through::Own);
            fds.for_each(|(fd, slot)| self.count(round, fd_left(Kind::Fd, *fd, &slot.open, of, namer)));
            let threads = process.threads.iter().filter(|(_, thread)| !is_kernels(thread));
            threads.for_each(|(tid, thread)| self.count(round, thread_left(*tid, thread, of, namer)));
        }
    }

    fn count(&mut self, round: usize, left: Left) {
        let key = left.key.clone();
        let (site, counts) = self.counts.entry(key).or_insert_with(|| (left.into_site(), Vec::new()));
        counts.resize(counts.len().max(round + 1), 0);
        counts[round] += 1;
        site.count = counts[round];
    }

    /// Those of which there was never less than before, and more after most rounds.
    pub(crate) fn into_growing(self) -> Vec<Site> {
        let done = self.done;
        let grown = |(mut site, mut counts): (Site, Vec<u32>)| {
            counts.resize(done, 0);
            let first = counts.first().copied().unwrap_or(0);
            site.grows = is_growing(&counts);
            (site.count, site.most, site.processes) =
                (counts.last().map_or(0, |last| last - first.min(*last)), 0, 1);
            site.rounds = counts;
            site.grows.then_some(site)
        };
        self.counts.into_values().filter_map(grown).collect()
    }
}

/// Never falls, and rises after more than half of the rounds.
fn is_growing(counts: &[u32]) -> bool {
    let steps = || counts.iter().zip(counts.iter().skip(1));
    let rises = steps().filter(|(before, after)| after > before).count();
    steps().all(|(before, after)| after >= before) && rises * 2 > steps().count()
}

#[cfg(test)]
mod tests {
    use super::is_growing;

    #[test]
    fn what_rises_after_most_rounds_grows_and_what_fills_up_or_swings_does_not() {
        assert!(is_growing(&[0, 10, 20, 30, 40]));
        assert!(is_growing(&[3, 4, 4, 5, 6]));
        assert!(!is_growing(&[20, 20, 20, 20, 20]));
        assert!(!is_growing(&[12, 20, 20, 20, 20]));
        assert!(!is_growing(&[10, 12, 11, 13, 14]));
        assert!(!is_growing(&[5]));
        assert!(!is_growing(&[]));
    }
}

//! Which processes are followed one by one. There is a bound; a storm in one cgroup does not use up the room of
//! the others, and what is left out is still counted in sum.

use std::collections::{HashMap, HashSet};

use plumb_common::task::{ProcKey, TaskRecord};

/// Processes followed, unless the settings say otherwise; at about 512 bytes each with their history.
pub(crate) const DEFAULT_PROCESSES: usize = 65_536;

/// What is not followed one by one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Untracked {
    pub processes: u64,
    pub fds: u64,
    pub threads: u64,
}

/// Remembers who is followed. A cgroup stands for itself by its `css_set`, which is the same for all
/// processes in the same cgroups; a cgroup below it is another.
#[derive(Debug)]
pub(crate) struct Admission {
    capacity: usize,
    admitted: HashSet<ProcKey>,
}

impl Admission {
    /// Follows at most `capacity` processes.
    #[must_use]
    pub(crate) fn new(capacity: usize) -> Self {
        Self { capacity, admitted: HashSet::new() }
    }

    /// Leaves in a pass what is followed. Who was stays; of the others a cgroup gets in what it likes while
    /// half of the room is free, and then until it holds an eighth.
    pub(crate) fn admit(&mut self, records: &mut Vec<TaskRecord>) -> Untracked {
        let mut untracked = Untracked::default();
        if self.admitted.is_empty() && records.len() <= self.capacity / 2 {
            self.admitted = records.iter().map(|record| record.key).collect();
            return untracked;
        }
        let mut held: HashMap<u64, usize> = HashMap::new();
        let mut admitted = HashSet::with_capacity(records.len().min(self.capacity));
        for record in records.iter().filter(|record| self.admitted.contains(&record.key)) {
            *held.entry(record.css_set).or_default() += 1;
            admitted.insert(record.key);
        }
        for record in records.iter() {
            if admitted.contains(&record.key) {
                continue;
            }
            let of_cgroup = held.entry(record.css_set).or_default();
            let half_is_free = admitted.len() < self.capacity.div_ceil(2);
            if half_is_free || (*of_cgroup < self.capacity.div_ceil(8) && admitted.len() < self.capacity) {
                *of_cgroup += 1;
                admitted.insert(record.key);
            } else {
                untracked.processes += 1;
                untracked.fds += u64::from(record.fds);
                untracked.threads += u64::from(record.threads);
            }
        }
        if untracked.processes > 0 {
            records.retain(|record| admitted.contains(&record.key));
        }
        self.admitted = admitted;
        untracked
    }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;

    use super::*;

    fn records(cgroup: u64, pids: std::ops::Range<u32>) -> Vec<TaskRecord> {
        let record = |pid| TaskRecord {
            key: ProcKey::new(pid, 1),
            css_set: cgroup,
            fds: 3,
            threads: 2,
            ..TaskRecord::zeroed()
        };
        pids.map(record).collect()
    }

    #[test]
    fn a_storm_in_one_cgroup_leaves_room_to_the_others() {
        let mut admission = Admission::new(800);
        let quiet = records(1, 0..50);
        let storm = records(2, 1000..3000);
        let mut pass = [quiet.clone(), storm.clone()].concat();
        let untracked = admission.admit(&mut pass);
        // Half of the room in all.
        assert_eq!(pass.len(), 400);
        assert_eq!(untracked, Untracked { processes: 1650, fds: 4950, threads: 3300 });

        // A third cgroup comes while the storm goes on, with pids above and below.
        let late = records(3, 5000..5080);
        let mut pass = [storm.clone(), late.clone(), quiet.clone()].concat();
        admission.admit(&mut pass);
        for process in late.iter().chain(&quiet) {
            assert!(pass.contains(process), "{process:?}");
        }
        // And is itself bounded.
        let mut pass = [storm, records(3, 5000..5500), quiet].concat();
        let untracked = admission.admit(&mut pass);
        assert_eq!(pass.iter().filter(|record| record.css_set == 3).count(), 100);
        assert_eq!(pass.len() as u64 + untracked.processes, 2550);
    }

    #[test]
    fn room_that_becomes_free_is_used_again() {
        let mut admission = Admission::new(80);
        admission.admit(&mut records(1, 0..100));
        let mut pass = records(1, 60..100);
        assert_eq!(admission.admit(&mut pass), Untracked::default());
        assert_eq!(pass.len(), 40);
    }
}

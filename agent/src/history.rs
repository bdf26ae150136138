//! The course of a count, in a bounded number of points: the longer it is, the further they are apart.

/// Points at most; beyond it every second one is dropped.
const MAX_POINTS: usize = 240;
/// Between two points at first, in nanoseconds.
const FIRST_STEP: u64 = 1_000_000_000;

/// A count at even distances.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct History {
    /// Of the first point, nanoseconds since boot.
    pub began: u64,
    /// Nanoseconds between two points.
    pub step: u64,
    pub points: Vec<u32>,
}

impl History {
    /// Takes the count at a time, which is never before the last one.
    pub(crate) fn push(&mut self, now: u64, count: u32) {
        if self.points.is_empty() {
            (self.began, self.step) = (now, FIRST_STEP);
            self.points.push(count);
            return;
        }
        while now >= self.next() {
            if self.points.len() == MAX_POINTS {
                let mut index = 0;
                self.points.retain(|_| {
                    index += 1;
                    index % 2 == 1
                });
                self.step *= 2;
                continue;
            }
            // What nobody looked at meanwhile was as it is now.
            self.points.push(count);
        }
    }

    /// When the next point is due.
    fn next(&self) -> u64 {
        self.began.saturating_add(self.step.saturating_mul(self.points.len() as u64))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_long_course_keeps_its_form_in_fewer_points() {
        let mut history = History::default();
        for second in 0..10_000u32 {
            history.push(5 + u64::from(second) * FIRST_STEP, second);
        }
        assert!(history.points.len() > MAX_POINTS / 2 && history.points.len() <= MAX_POINTS);
        for (index, count) in history.points.iter().enumerate() {
            let second = index as u64 * history.step / FIRST_STEP;
            assert_eq!(u64::from(*count), second);
        }
    }

    proptest! {
        #[test]
        fn it_is_bounded_whatever_the_times(times in proptest::collection::vec(any::<u64>(), 1..50)) {
            let mut times = times;
            times.sort_unstable();
            let mut history = History::default();
            for time in &times {
                history.push(*time, 1);
                prop_assert!(history.points.len() <= MAX_POINTS);
            }
            prop_assert!(history.next() > times[times.len() - 1] || history.next() == u64::MAX);
        }
    }
}

//! The statistics of paired measurements: medians, and how sure they are.

/// A median with an interval.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Median {
    pub(crate) low: f64,
    pub(crate) median: f64,
    pub(crate) high: f64,
}

impl Median {
    /// The median of `values` and the interval between two of them that holds the true median with at least
    /// 95 %, whatever the distribution: as many values lie below it as heads fall in tosses of a coin. Below
    /// six values there is no such interval, and it is the range.
    pub(crate) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let count = values.len();
        let outside = outside(count);
        Self {
            low: values[outside],
            median: (values[(count - 1) / 2] + values[count / 2]) / 2.0,
            high: values[count - 1 - outside],
        }
    }
}

/// How many of `count` sorted values lie outside the interval at each end: the most whose chance to be on
/// one side of the median is 2.5 % or less. 9 of 30, 0 of 6.
fn outside(count: usize) -> usize {
    let mut chance = 0.5_f64.powi(count as i32);
    let mut below = 0.0;
    let mut outside = 0;
    for heads in 0..count / 2 {
        below += chance;
        if below > 0.025 {
            break;
        }
        outside = heads;
        chance *= (count - heads) as f64 / (heads + 1) as f64;
    }
    outside
}

/// What an operation takes without and with something, in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pair {
    pub(crate) without: f64,
    pub(crate) with: f64,
}

/// With over without.
pub(crate) fn ratio(pairs: &[Pair]) -> Median {
    Median::of(pairs.iter().map(|pair| pair.with / pair.without).collect())
}

/// With minus without, in nanoseconds.
pub(crate) fn added(pairs: &[Pair]) -> Median {
    Median::of(pairs.iter().map(|pair| pair.with - pair.without).collect())
}

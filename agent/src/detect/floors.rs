//! The floor of one count at several time scales: what every process is remembered by.
//!
//! What a program uses and gives back moves the count up and down; what it leaks moves its *minimum* up. So
//! the count is reduced to its minimum per window, the floor. A fast leak shows in short windows, a slow one only
//! in long ones, and load that swings for minutes hides a leak from all windows shorter than its swing.

/// Lengths of the windows in seconds.
pub(super) const SCALES: [u32; 6] = [5, 25, 100, 400, 1_600, 6_400];
/// Complete windows remembered per scale.
const KEPT: usize = 5;
/// Complete windows that it takes to see a rise, and how many of their differences must be rises.
const LEAST: usize = 4;
const RISES: usize = 3;
/// Growth that makes a suspect, and growth in square roots of the count: one whose arrivals know nothing of each
/// other strays from its mean by about its root.
const GROWTH: f64 = 8.0;
const ROOTS: f64 = 1.0;
/// A saw must grow by so many times as much.
const SAW: f64 = 2.5;

/// A count in 16 bits: exact below 4,096, then to one part in 2,048. A host has many processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Count(u16);

impl Count {
    pub(super) const NONE: Self = Self(u16::MAX);

    pub(super) fn new(count: u32) -> Self {
        let shift = (u32::BITS - count.leading_zeros()).saturating_sub(12);
        // What is larger than 12 bits shifted by 14 is as good as that.
        if shift > 14 { Self(0xefff) } else { Self((shift as u16) << 12 | (count >> shift) as u16) }
    }

    pub(super) fn get(self) -> Option<u32> {
        (self != Self::NONE).then(|| u32::from(self.0 & 0xfff) << (self.0 >> 12))
    }
}

/// The present window of one scale, and the minima of those before it, oldest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Scale {
    now: Count,
    past: [Count; KEPT],
}

/// The floors of one count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Floors {
    scales: [Scale; SCALES.len()],
    /// Second since boot of the last reading; 0 before the first.
    last: u32,
}

impl Default for Count {
    fn default() -> Self {
        Self::NONE
    }
}

/// A floor at the beginning of its window, in seconds since boot.
pub(super) type Point = (u32, u32);

impl Default for Floors {
    fn default() -> Self {
        let empty = Scale { now: Count::NONE, past: [Count::NONE; KEPT] };
        Self { scales: [empty; SCALES.len()], last: 0 }
    }
}

impl Floors {
    /// Takes a reading. How many scales had a window completed by it: these are the shortest.
    pub(super) fn observe(&mut self, second: u32, live: u32) -> usize {
        let before = std::mem::replace(&mut self.last, second);
        let reading = Count::new(live);
        for (scale, length) in self.scales.iter_mut().zip(SCALES) {
            let passed = (second / length).saturating_sub(before / length);
            if passed == 0 && scale.now != Count::NONE {
                if reading.get() < scale.now.get() {
                    scale.now = reading;
                }
                continue;
            }
            scale.past.rotate_left(1);
            scale.past[KEPT - 1] = scale.now;
            if passed > 1 {
                // Nobody looked meanwhile: what lies on the two sides of a gap is not compared.
                scale.past = [Count::NONE; KEPT];
            }
            scale.now = reading;
        }
        SCALES.iter().take_while(|length| second / **length != before / **length).count()
    }

    /// Forgets what this scale and shorter ones have seen: it has been judged.
    pub(super) fn restart(&mut self, scale: usize) {
        for scale in &mut self.scales[..=scale] {
            scale.past = [Count::NONE; KEPT];
        }
    }

    /// The floor of the last complete window of a scale.
    pub(super) fn last(&self, scale: usize) -> Option<Point> {
        let floor = self.scales[scale].past[KEPT - 1].get()?;
        Some((start(self.last, SCALES[scale], 1), floor))
    }

    /// Whether three windows of the second scale are complete: a process has come to its usual count by then.
    pub(super) fn is_warm(&self) -> bool {
        self.scales[1].past[KEPT - 3].get().is_some()
    }

    /// The floor of the last two windows of the shortest scale.
    pub(super) fn sustained(&self) -> Option<u32> {
        let [.., before, last] = self.scales[0].past;
        Some(before.get()?.min(last.get()?))
    }

    /// The lowest floor known and the last ones of the shortest scale, when these lie at the limit: what has
    /// reached it cannot rise any more.
    pub(super) fn full(&self, limit: Option<u64>) -> Option<Vec<Point>> {
        let last = self.last(0).filter(|last| is_full(last.1, limit))?;
        let known = self.scales.iter().flat_map(|scale| scale.past).filter_map(Count::get);
        let lowest = known.min()?;
        (lowest < last.1).then(|| vec![(last.0 - SCALES[0], lowest), last])
    }

    /// The floors of a scale that rises, oldest first. `wary` makes it take more, for what has risen before
    /// without being a leak.
    pub(super) fn rising(&self, scale: usize, wary: u8) -> Option<Vec<Point>> {
        let floors = self.scales[scale].past.map(Count::get);
        let known = floors.iter().rev().take_while(|floor| floor.is_some()).count();
        let floors = &floors[KEPT - known..];
        let (first, last) = ((*floors.first()?)?, (*floors.last()?)?);
        let growth = f64::from(last.checked_sub(first)?);
        if known < LEAST || growth < GROWTH {
            return None;
        }
        let steps = || {
            floors.windows(2).map(|pair| f64::from(pair[1].unwrap_or(0)) - f64::from(pair[0].unwrap_or(0)))
        };
        // What rises by the same each time is no chance, as far as is known.
        let (least, most) =
            steps().fold((f64::MAX, 0.0f64), |(least, most), step| (least.min(step), most.max(step)));
        let is_even = wary == 0 && most <= 2.0 * least;
        if !is_even && growth < ROOTS * f64::from(1 + wary) * f64::from(first).sqrt() {
            return None;
        }
        let rises = steps().filter(|step| *step > 0.0).count();
        let falls = steps().any(|step| -step > (growth / 8.0).max(1.0));
        let still = steps().next_back().is_some_and(|step| step > 0.0);
        let is_saw = scale == 0 && is_rising_saw(floors, f64::from(1 + wary));
        ((rises >= RISES && still && !falls) || is_saw).then(|| {
            let back = |index: usize| (known - index) as u32;
            let point = |(index, floor): (usize, &Option<u32>)| {
                Some((start(self.last, SCALES[scale], back(index)), (*floor)?))
            };
            floors.iter().enumerate().filter_map(point).collect()
        })
    }
}

/// Whether these floors belong to a saw that rises by far: windows a little shorter than its period hold its flanks
/// as well as its troughs, but any two neighbours hold a trough.
fn is_rising_saw(floors: &[Option<u32>], wary: f64) -> bool {
    let troughs = || floors.windows(2).map(|pair| pair[0].min(pair[1]).unwrap_or(0));
    let (Some(first), Some(last)) = (troughs().next(), troughs().next_back()) else { return false };
    let steps = || troughs().zip(troughs().skip(1));
    let growth = f64::from(last.saturating_sub(first));
    steps().all(|(before, then)| then >= before)
        && steps().filter(|(before, then)| then > before).count() >= RISES - 1
        && growth >= SAW * GROWTH
        && growth >= SAW * ROOTS * wary * f64::from(first).sqrt()
}

/// Whether a floor lies at the limit.
pub(super) fn is_full(floor: u32, limit: Option<u64>) -> bool {
    limit.is_some_and(|limit| limit > 0 && u64::from(floor) >= limit.saturating_sub((limit / 256).max(2)))
}

/// Beginning of the window `back` before the one of this second.
fn start(second: u32, length: u32, back: u32) -> u32 {
    (second / length).saturating_sub(back) * length
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn floors(series: impl IntoIterator<Item = u32>) -> Floors {
        let mut floors = Floors::default();
        for (second, live) in series.into_iter().enumerate() {
            floors.observe(1_000 + second as u32, live);
        }
        floors
    }

    #[test]
    fn a_rise_is_seen_at_the_scale_at_which_it_shows() {
        let per = |seconds: u32| move |second: u32| 10 + second / seconds;
        let first = |floors: &Floors| (0..SCALES.len()).find(|scale| floors.rising(*scale, 0).is_some());
        assert_eq!(first(&floors((0..25).map(per(1)))), Some(0));
        assert_eq!(first(&floors((0..25).map(per(10)))), None);
        assert_eq!(first(&floors((0..180).map(per(10)))), Some(1));
        assert_eq!(first(&floors((0..720).map(per(50)))), Some(2));
        assert_eq!(first(&floors((0..7_000).map(per(600)))), None);
        assert_eq!(first(&floors((0..11_000).map(per(600)))), Some(4));
    }

    proptest! {
        #[test]
        fn a_saw_is_seen_within_28_seconds_wherever_its_troughs_lie(
            begins in 1_000.0..1_060.0_f64,
            period in 6.0..6.2_f64,
        ) {
            // 60 within half of the time, 50 given back within the other half.
            let saw = |second: f64| {
                let (tooth, within) = ((second / period).floor(), second / period % 1.0);
                let swing = if within < 0.5 { within * 120.0 } else { 60.0 - (within - 0.5) * 100.0 };
                3.0 + tooth * 10.0 + swing
            };
            let mut floors = Floors::default();
            let seen = (1_000..1_100).find(|second| {
                let since = f64::from(*second) - begins;
                floors.observe(*second, if since < 0.0 { 3 } else { saw(since) as u32 });
                floors.rising(0, 0).is_some()
            });
            let seconds = f64::from(seen.unwrap()) - begins;
            prop_assert!((0.0..=28.0).contains(&seconds), "{seconds} s");
        }
    }

    #[test]
    fn what_lies_on_two_sides_of_a_gap_is_not_compared() {
        let mut floors = floors((0..24).map(|second| 10 + second));
        floors.observe(1_400, 500);
        floors.observe(1_406, 500);
        assert_eq!(floors.rising(0, 0), None);
        assert_eq!(floors.last(0), Some((1_400, 500)));
    }

    proptest! {
        #[test]
        fn a_count_in_16_bits_is_never_far_off(count in 0u32..(1 << 26)) {
            let stored = Count::new(count).get().unwrap();
            prop_assert!(stored <= count && count - stored <= count / 2_048, "{stored} for {count}");
            prop_assert!(count >= 4_096 || stored == count);
        }

        #[test]
        fn it_takes_any_series(readings in proptest::collection::vec((0u32..200_000, any::<u32>()), 0..300)) {
            let mut floors = Floors::default();
            let mut second = 0u32;
            for (later, live) in readings {
                second = second.saturating_add(later);
                floors.observe(second, live);
                for scale in 0..SCALES.len() {
                    if let Some(points) = floors.rising(scale, 0) {
                        prop_assert!(points.len() >= LEAST && points.len() <= KEPT);
                        prop_assert!(points.windows(2).all(|pair| pair[0].0 < pair[1].0));
                    }
                }
            }
        }
    }
}

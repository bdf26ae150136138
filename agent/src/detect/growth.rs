//! Whether a floor grows like a leak: far enough, for long enough, steadily, and still.
//!
//! A fill approaches a cap: its floor rises ever more slowly, or stops. A leak rises as fast at the end as at the
//! beginning. What tells them apart best is the mean time of the growth (Laplace's test of a trend): for a leak it
//! is the middle of the time it has been seen, give or take what chance does to that many events.

use super::floors::{self, Point, SCALES};

/// Floors remembered of a suspect; beyond that neighbours are merged, the lower one stays.
pub(super) const MAX_POINTS: usize = 64;
/// Equal parts of the time that growth is divided into.
const BINS: usize = 12;
/// Standard deviations by which the growth may lie earlier than the middle; and later, before its beginning is
/// taken for something else.
const EARLY: f64 = 1.5;
const EARLY_AT_LAST: f64 = 2.6;
/// However much chance there may be, by this part of the time at most.
const AHEAD: f64 = 0.15;
const LATE: f64 = -1.7;
/// Independent steps that growth must consist of: two or three of any size are resizes.
const STEPS: f64 = 7.5;
/// They are counted in so many parts, and the least number holds.
const PARTS: [usize; 3] = [6, 12, 24];
/// Fewer points have no form.
const LEAST_POINTS: usize = 10;
const LEAST_ARRIVALS: usize = 7;
/// Part of its share that the last quarter of the time must have grown by.
const STILL: f64 = 0.35;
/// A rise is like one that was given back up to so many times its height and length; so many are known of a count.
const ALIKE: f64 = 1.5;
const MAX_PRECEDENTS: usize = 3;
/// Above this part of the limit nobody waits for it to be given back.
const NEAR: f64 = 0.8;
/// Longest part of the time that may pass without a rise.
const REST: f64 = 0.3;
/// At the limit, growth by one part in so many of it is enough.
const FULL_PART: u64 = 16;
/// What reaches its limit within so many seconds at its present rate is judged in this part of the time: whoever is to
/// do something about it needs the rest.
const SOON: f64 = 300.0;
const SOON_PART: f64 = 0.55;
/// Growth times seconds: a slow leak is watched for longer, in proportion to the root of its slowness.
const EXPOSURE: f64 = 10_000.0;
/// Without a new peak for this many seconds and windows, or this part of the time it took, a suspect has settled.
const SETTLED: u32 = 60;
const SETTLED_WINDOWS: u32 = 6;
const SETTLED_PART: f64 = 0.75;

/// The floors of a suspect since before it began to rise. Never empty.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Growth {
    /// Length of a window in seconds, and from when on the windows are shorter: before that the points come from the
    /// scale at which the rise was seen.
    window: u32,
    fine: u32,
    points: Vec<Point>,
    /// The highest floor, and when it was reached first.
    peak: Point,
}

/// What a floor does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// It has not grown, or not for long enough, or not steadily: it may be anything yet.
    Open,
    /// Like a leak.
    Leak,
    /// It came down by half of its growth, and stays down.
    GivenBack,
    /// It has stopped rising.
    Settled,
}

/// A rise of a floor, from its beginning to its peak.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Rise {
    height: u32,
    seconds: u32,
}

impl Rise {
    /// Whether another rise is much like this one so far.
    fn covers(self, other: Self) -> bool {
        let within = |other: u32, own: u32| f64::from(other) <= f64::from(own) * ALIKE;
        within(other.height, self.height) && within(other.seconds, self.seconds)
    }
}

/// What one count was called a leak for and then gave back, all of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Precedents {
    rises: Vec<Rise>,
    /// Where one began that has been given back by half.
    pending: Option<(u32, Rise)>,
}

impl Precedents {
    /// Whether a rise is much like one of them so far.
    pub(super) fn cover(&self, rise: Rise) -> bool {
        self.rises.iter().any(|known| known.covers(rise))
    }

    /// A rise from `base` is being given back.
    pub(super) fn expect(&mut self, base: u32, rise: Rise) {
        self.pending = Some((base, rise));
    }

    /// Learns, as soon as the count is back where it began.
    pub(super) fn reading(&mut self, live: u32) {
        if let Some((base, rise)) = self.pending
            && live.saturating_sub(base) <= rise.height / 4
        {
            self.pending = None;
            self.rises.retain(|known| !rise.covers(*known));
            self.rises.push(rise);
            let old = self.rises.len().saturating_sub(MAX_PRECEDENTS);
            self.rises.drain(..old);
        }
    }
}

/// What it takes to be like a leak.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Demand {
    /// Least growth.
    pub growth: u32,
    /// Least time, in seconds.
    pub seconds: u32,
    /// The limit of the count.
    pub limit: Option<u64>,
}

impl Demand {
    /// What it takes when the count is so high after so much growth in so many seconds.
    fn at(self, count: u32, grown: f64, seconds: f64) -> Self {
        let left = self.limit.map(|limit| limit.saturating_sub(u64::from(count)) as f64);
        if left.is_some_and(|left| left * seconds < SOON * grown) {
            return Self { seconds: (f64::from(self.seconds) * SOON_PART) as u32, ..self };
        }
        self
    }

    /// How many times over this growth in this time is enough; below 1 it is not.
    fn met_by(self, grown: f64, seconds: f64) -> f64 {
        let exposure = grown * seconds / EXPOSURE;
        (grown / f64::from(self.growth)).min(seconds / f64::from(self.seconds)).min(exposure)
    }

    /// Whether what was kept came like a leak: when each was seen first, and how many with it that were.
    pub(super) fn is_met_by_arrivals(self, points: &[Point]) -> bool {
        let (Some(first), Some(last)) = (points.first(), points.last()) else { return false };
        let ease = self.met_by(f64::from(last.1.saturating_sub(first.1)), f64::from(last.0 - first.0));
        points.len() >= LEAST_ARRIVALS
            && Steadiness::of(&even(points, BINS.min(points.len() - 1)), points).is_steady(ease)
    }
}

impl Growth {
    pub(super) fn new(window: u32, points: Vec<Point>) -> Option<Self> {
        let peak =
            points.iter().copied().reduce(|peak, point| if point.1 > peak.1 { point } else { peak })?;
        let last = points.last().map_or(0, |point| point.0);
        // At the shortest scale all are as fine as they get.
        let fine = if window == SCALES[0] { 0 } else { last + window };
        Some(Self { window, fine, points, peak })
    }

    /// Length of a window in seconds, and the floors.
    pub(super) fn points(&self) -> (u32, Vec<Point>) {
        (self.window, self.points.clone())
    }

    /// Takes the floor of the next window.
    pub(super) fn push(&mut self, point: Point) {
        if self.points.last().is_some_and(|last| point.0 <= last.0) {
            return;
        }
        if point.1 > self.peak.1 {
            self.peak = point;
        }
        if self.points.len() >= MAX_POINTS {
            let merged = self
                .points
                .chunks(2)
                .map(|pair| (pair[0].0, pair.iter().map(|point| point.1).min().unwrap_or(pair[0].1)));
            self.points = merged.collect();
        }
        self.points.push(point);
    }

    fn first(&self) -> Point {
        self.points.first().copied().unwrap_or_default()
    }

    fn last(&self) -> Point {
        self.points.last().copied().unwrap_or_default()
    }

    /// When it began to rise, in seconds since boot, and the floor before that.
    pub(super) fn began(&self) -> Point {
        self.first()
    }

    /// How far it has grown, and since how many seconds.
    pub(super) fn grown(&self) -> (u32, u32) {
        let lately = self.points.iter().rev().take(2).map(|point| point.1).min().unwrap_or(0);
        (lately.saturating_sub(self.first().1), self.last().0 - self.first().0)
    }

    /// Rise per second by the median of the slopes between all pairs of late floors (Theil and Sen): no single floor
    /// can move it far.
    pub(super) fn slope(&self) -> f64 {
        let late = &self.points[self.points.len().saturating_sub(24)..];
        let mut slopes: Vec<f64> = Vec::with_capacity(late.len() * late.len() / 2);
        for (index, first) in late.iter().enumerate() {
            let rise = |then: &Point| (f64::from(then.1) - f64::from(first.1)) / f64::from(then.0 - first.0);
            slopes.extend(late[index + 1..].iter().map(rise));
        }
        if slopes.is_empty() {
            return 0.0;
        }
        let middle = slopes.len() / 2;
        let (_, median, _) = slopes.select_nth_unstable_by(middle, f64::total_cmp);
        *median
    }

    /// From where it began to its peak.
    pub(super) fn rise(&self) -> Rise {
        let (first, peak) = (self.first(), self.peak);
        Rise { height: peak.1.saturating_sub(first.1), seconds: peak.0.saturating_sub(first.0) }
    }

    /// Whether it is so near the limit that there is no time to wait.
    pub(super) fn is_near(&self, limit: Option<u64>) -> bool {
        limit.is_some_and(|limit| f64::from(self.last().1) >= limit as f64 * NEAR)
    }

    /// Whether the last floors lie at the limit: no count grows beyond that.
    pub(super) fn is_full(&self, limit: Option<u64>) -> bool {
        floors::is_full(self.last().1, limit)
    }

    /// What it looks like now. May find that the growth began later than it seemed.
    pub(super) fn shape(&mut self, demand: Demand) -> Shape {
        let (grown, seconds) = self.grown();
        let half = self.first().1 + (self.peak.1.saturating_sub(self.first().1)) / 2;
        if self.points.len() > 3 && self.points.iter().rev().take(3).all(|point| point.1 <= half) {
            return Shape::GivenBack;
        }
        if self.is_full(demand.limit) {
            let much = u64::from(grown) >= demand.limit.unwrap_or(0) / FULL_PART;
            let is_leak = much && grown >= demand.growth && seconds >= demand.seconds / 2;
            return if is_leak { Shape::Leak } else { Shape::Open };
        }
        let rest = self.last().0.saturating_sub(self.peak.0);
        let took = f64::from(self.peak.0.saturating_sub(self.first().0));
        if rest > SETTLED.max(SETTLED_WINDOWS * self.window).max((SETTLED_PART * took) as u32) {
            return Shape::Settled;
        }
        let mut steadiness = self.steadiness();
        while let Some(found) = steadiness
            && found.early < LATE
            && self.points.len() > LEAST_POINTS + 4
        {
            // Most of it came at the end: what was before is another story.
            self.points.drain(..self.points.len() / 4);
            steadiness = self.steadiness();
        }
        let (grown, seconds) = self.grown();
        let (grown, seconds) = (f64::from(grown), f64::from(seconds));
        let ease = demand.at(self.last().1, grown, seconds).met_by(grown, seconds);
        match steadiness {
            Some(found) if found.is_steady(ease) => Shape::Leak,
            _ => Shape::Open,
        }
    }

    /// How the growth is spread over its time.
    fn steadiness(&self) -> Option<Steadiness> {
        let fine = &self.points[self.points.partition_point(|point| point.0 < self.fine)..];
        if self.grown().0 == 0 || fine.len() < LEAST_POINTS {
            return None;
        }
        // The first rise lies anywhere in its window: what is even begins with the next.
        let base = self.first().1;
        let risen = self.points.iter().position(|point| point.1 > base)?;
        Some(Steadiness::of(&even(&self.points[risen..], BINS), fine))
    }
}

/// The floors of equal parts of the time; where no window begins, in a line between the neighbours.
fn even(points: &[Point], parts: usize) -> Vec<f64> {
    let (Some(&(start, base)), Some(&(end, _))) = (points.first(), points.last()) else { return Vec::new() };
    let length = f64::from(end - start + 1) / parts as f64;
    let mut lowest = vec![None; parts];
    for (time, floor) in points {
        let part = &mut lowest[((f64::from(time - start) / length) as usize).min(parts - 1)];
        *part = Some(part.map_or(*floor, |known: u32| known.min(*floor)));
    }
    let mut floors = vec![f64::from(base); parts];
    let mut last = 0;
    for (index, floor) in lowest.iter().enumerate() {
        let Some(floor) = floor.map(f64::from) else { continue };
        let (before, steps) = (floors[last], index - last);
        for (step, between) in floors[last..=index].iter_mut().enumerate().skip(1) {
            *between = before + (floor - before) * step as f64 / steps as f64;
        }
        last = index;
    }
    let end = floors[last];
    floors[last..].fill(end);
    floors
}

/// How growth is spread over its time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Steadiness {
    /// Part of the time by which the growth came earlier than evenly spread.
    ahead: f64,
    /// The same in standard deviations; negative is later.
    early: f64,
    /// Independent steps that it consists of, by how uneven it is.
    steps: f64,
    /// Growth in the last quarter of the time compared to its share.
    still: f64,
    /// Longest part of the time without a rise.
    rest: f64,
}

impl Steadiness {
    /// `floors` of equal parts of the time, and the `fine` points among which steps are counted.
    fn of(floors: &[f64], fine: &[Point]) -> Self {
        let grown = floors.last().unwrap_or(&0.0) - floors.first().unwrap_or(&0.0);
        if grown <= 0.0 {
            return Self::default();
        }
        let bins = floors.len();
        let parts = (bins - 1) as f64;
        let area: f64 = floors.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0 - floors[0]).sum();
        let ahead = area / (grown * parts) - 0.5;
        let early = ahead * (12.0 * grown / unevenness(floors)).sqrt();
        let quarter = (bins / 4).max(1);
        let late = floors[bins - 1] - floors[bins - 1 - quarter];
        let still = late * parts / (grown * quarter as f64);
        // A block that lasts for some parts is uneven only beside longer ones.
        let steps = PARTS.map(|parts| {
            let floors = even(fine, parts.min(fine.len()));
            let grown = floors.last().unwrap_or(&0.0) - floors.first().unwrap_or(&0.0);
            grown / unevenness(&floors)
        });
        Self { ahead, early, steps: steps.into_iter().fold(f64::INFINITY, f64::min), still, rest: rest(fine) }
    }

    /// With more to see, chance is given more room: a fill has long shown by then.
    fn is_steady(self, ease: f64) -> bool {
        let early = (EARLY * ease).min(EARLY_AT_LAST);
        ease >= 1.0
            && self.ahead <= AHEAD
            && self.early <= early
            && self.steps >= STEPS
            && self.still >= STILL
            && self.rest <= REST
    }
}

/// The longest time without a new peak, as a part of the whole.
fn rest(points: &[Point]) -> f64 {
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return 1.0 };
    let (mut peak, mut longest) = (*first, 0);
    for point in points {
        if point.1 > peak.1 {
            longest = longest.max(point.0 - peak.0);
            peak = *point;
        }
    }
    f64::from(longest.max(last.0 - peak.0)) / f64::from((last.0 - first.0).max(1))
}

/// Size of the steps by which floors grow, 1 at least. The number of independent events in a part of the time
/// varies by as much as it is; the differences of neighbours tell it also when the rate changes slowly.
fn unevenness(floors: &[f64]) -> f64 {
    let steps: Vec<f64> = floors.windows(2).map(|pair| pair[1] - pair[0]).collect();
    let mean = steps.iter().sum::<f64>() / steps.len() as f64;
    let pairs = steps.windows(2).map(|pair| (pair[1] - pair[0]).powi(2));
    let spread = pairs.sum::<f64>() / (2.0 * (steps.len() - 1) as f64);
    if mean > 0.0 { (spread / mean).max(1.0) } else { f64::INFINITY }
}

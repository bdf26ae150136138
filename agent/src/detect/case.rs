//! The case against one count of one process: how it grows, and whether what came is still held.

use super::{
    Change,
    cohorts::{Age, CLASSES, Holdings, age_of},
    finding::{Finding, State, Why},
    floors::{Floors, Point, SCALES},
    growth::{Demand, Growth, Precedents, Rise, Shape},
};

pub(super) const SECOND: u64 = 1_000_000_000;

/// Between two looks at what is held: at first, and as a part of the time since suspicion.
const LOOK: u64 = 15 * SECOND;
const LOOK_PART: u64 = 8;
const LOOK_AT_LAST: u64 = 300 * SECOND;
/// What is leaking is looked at for its examples only, earlier when there are half as many more.
const LOOK_LEAKING: u64 = 60 * SECOND;
/// A verdict is not built on a look that is older than this.
const FRESH: u64 = 10 * SECOND;
/// An answer is waited for this long before it is asked for again.
const ANSWER: u64 = 10 * SECOND;
/// Without anybody who remembers, the growth has to go on for so many times longer.
const WITHOUT_WITNESS: u32 = 3;
/// Of those held, one in so many may have died beyond the age from which they count as kept.
const DEATHS: f64 = 100.0;
/// Item-seconds without a death that prove that something is kept.
/// For each, at least this part of the age must have been watched again.
const WATCHED: f64 = 2_000.0;
const WATCHED_PART: f64 = 0.15;
/// Least number that is kept, and least part of the growth.
const KEPT: f64 = 12.0;
const KEPT_NEW: f64 = 24.0;
const KEPT_PART: f64 = 0.5;
/// Below this part of the growth, what was held has been replaced; judged after this many seconds.
const REPLACED_PART: f64 = 0.25;
const REPLACED_AFTER: f64 = 60.0;
/// What is leaking may rest for this long before it counts as settled, in seconds.
const REST: u64 = 600 * SECOND;

/// A suspect, or a leak.
#[derive(Debug)]
pub(super) struct Case {
    pub finding: Finding,
    /// Growth at one or several scales, and these scales, the shortest first.
    growths: Vec<(usize, Growth)>,
    /// When it became suspect, nanoseconds since boot.
    suspected: u64,
    /// When a look was last asked for.
    asked: u64,
    /// The last look, and when it was.
    holdings: Option<Holdings>,
    looked: u64,
    /// How many there were then; 0 before the first.
    looked_live: u32,
    /// Since when it has not risen, as a leak.
    settled: u64,
    /// What this count has given back before; as of suspicion.
    precedents: Precedents,
    /// How many the cgroups of the process allow, as of the last look.
    pub cgroup_limit: Option<u64>,
    /// People have been told, and want to hear nothing more for now.
    pub told: bool,
    pub silenced: bool,
}

/// What became of what came.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kept {
    /// Whoever reaches this age in seconds stays.
    Since(f64),
    Replaced,
}

/// What becomes of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Stays,
    /// Looked like a leak, and is none or none any more.
    Ends(Why),
}

impl Case {
    pub(super) fn new(finding: Finding, precedents: Precedents, now: u64) -> Self {
        let growths = Vec::new();
        Self {
            growths,
            precedents,
            finding,
            suspected: now,
            asked: now,
            holdings: None,
            looked: 0,
            looked_live: 0,
            settled: 0,
            told: false,
            silenced: false,
            cgroup_limit: None,
        }
    }

    pub(super) fn is_leaking(&self) -> bool {
        self.finding.state == State::Leaking
    }

    /// Of its slowest growth, the length of a window in seconds and the floors.
    pub(super) fn floors(&self) -> (u32, Vec<Point>) {
        self.growths.last().map_or((1, Vec::new()), |(_, growth)| growth.points())
    }

    /// Goes on as the leak it was.
    pub(super) fn take_up(&mut self, window: u32, points: Vec<Point>, since: u64) {
        if let Some(growth) = Growth::new(window, points) {
            // Another version may have had other scales.
            let scale = SCALES.iter().rposition(|length| *length <= window).unwrap_or(0);
            self.growths = vec![(scale, growth)];
            self.tell(0);
            self.finding.state = State::Leaking;
            self.finding.leaking_since = Some(since);
        }
    }

    /// It also grows at this scale.
    pub(super) fn add(&mut self, scale: usize, points: Vec<Point>) {
        if let Some(growth) = Growth::new(SCALES[scale], points) {
            self.growths.push((scale, growth));
            self.growths.sort_by_key(|(scale, _)| *scale);
        }
    }

    /// Whether its growth at this scale is known.
    pub(super) fn has(&self, scale: usize) -> bool {
        self.growths.iter().any(|(known, _)| *known == scale)
    }

    /// Where a leak began, and what it rose by.
    pub(super) fn rise(&self) -> Option<(u32, Rise)> {
        let (_, growth) = self.growths.first().filter(|_| self.is_leaking())?;
        Some((growth.began().1, growth.rise()))
    }

    /// Takes the floors of the windows that are complete: of the first `closed` scales. What has ended is
    /// forgotten in `floors`.
    pub(super) fn windows(
        &mut self,
        closed: usize,
        floors: &mut Floors,
        demand: Demand,
        now: u64,
    ) -> (Step, Option<Change>) {
        for (scale, growth) in &mut self.growths {
            // Finer than the scale at which the rise was seen: what comes in few steps is no leak.
            let finer = scale.saturating_sub(1);
            if finer < closed
                && let Some(floor) = floors.last(finer)
            {
                growth.push(floor);
            }
        }
        if self.is_leaking() {
            let every = if self.has_outgrown() { LOOK } else { LOOK_LEAKING };
            return (self.leak_goes_on(demand, now), self.ask(now, every));
        }
        let (mut looks_like_one, mut ended) = (false, None);
        self.growths.retain_mut(|(scale, growth)| {
            let why = match growth.shape(demand) {
                Shape::Open => return true,
                Shape::Leak => {
                    looks_like_one = true;
                    return true;
                }
                Shape::GivenBack => Why::GivenBack,
                Shape::Settled => Why::Settled,
            };
            floors.restart(*scale);
            ended = Some(why);
            false
        });
        if let (true, Some(why)) = (self.growths.is_empty(), ended) {
            return (Step::Ends(why), None);
        }
        self.tell(self.growths.len() - 1);
        let is_fresh = now.saturating_sub(self.looked) <= FRESH;
        if is_fresh && self.growths.iter().all(|(_, growth)| self.stays(growth) == Some(Kept::Replaced)) {
            floors.restart(self.growths.last().map_or(0, |(scale, _)| *scale));
            return (Step::Ends(Why::Replaced), None);
        }
        let every = LOOK.max((now.saturating_sub(self.suspected) / LOOK_PART).min(LOOK_AT_LAST));
        let every = if looks_like_one { every.min(FRESH) } else { every };
        let every = if self.has_outgrown() { every.min(LOOK_LEAKING) } else { every };
        (Step::Stays, self.ask(now, every))
    }

    fn leak_goes_on(&mut self, demand: Demand, now: u64) -> Step {
        let Some((_, growth)) = self.growths.first() else { return Step::Ends(Why::Settled) };
        // The baseline of a leak does not move any more.
        let shape = growth.clone().shape(demand);
        self.finding.growth_per_minute = (growth.slope() * 60.0).max(0.0);
        match shape {
            Shape::GivenBack => return Step::Ends(Why::GivenBack),
            // It has stopped because there is no room.
            Shape::Settled if self.finding.is_at_limit() => self.settled = 0,
            Shape::Settled if self.settled == 0 => self.settled = now,
            Shape::Settled if now.saturating_sub(self.settled) >= REST => return Step::Ends(Why::Settled),
            Shape::Settled => {}
            Shape::Open | Shape::Leak => self.settled = 0,
        }
        Step::Stays
    }

    /// Puts what is known of one of the growths into the finding.
    fn tell(&mut self, index: usize) {
        if let Some((_, growth)) = self.growths.get(index) {
            let (second, floor) = growth.began();
            // A window may begin before the process does.
            self.finding.first_seen = (u64::from(second) * SECOND).max(self.finding.key.start_boottime);
            self.finding.baseline = floor;
            self.finding.growth_per_minute = (growth.slope() * 60.0).max(0.0);
        }
    }

    /// Whether the last look is of so few that it says little: there are half as many more.
    fn has_outgrown(&self) -> bool {
        u64::from(self.finding.live) * 2 >= u64::from(self.looked_live) * 3
    }

    fn ask(&mut self, now: u64, every: u64) -> Option<Change> {
        let waiting = self.looked < self.asked && now.saturating_sub(self.asked) < ANSWER;
        if waiting || now.saturating_sub(self.looked.max(self.suspected)) < every {
            return None;
        }
        self.asked = now;
        Some(Change::Grown(self.finding.key, self.finding.resource, self.finding.baseline))
    }

    /// Takes the answer, which may make it a leak.
    pub(super) fn look(&mut self, holdings: Option<Holdings>, demand: Demand, now: u64) {
        (self.looked, self.looked_live) = (now.max(self.asked), self.finding.live);
        self.holdings = holdings;
        if self.is_leaking() {
            return;
        }
        // Nobody could remember: the trend speaks for itself, and longer.
        let seconds = demand.seconds.saturating_mul(WITHOUT_WITNESS);
        let demand = if self.holdings.is_some() { demand } else { Demand { seconds, ..demand } };
        let proven = |growth: &Growth| match &self.holdings {
            None => growth.clone().shape(demand) == Shape::Leak,
            Some(holdings) => {
                let Some(Kept::Since(age)) = self.stays(growth) else { return false };
                growth.clone().shape(demand) == Shape::Leak || self.arrive(holdings, growth, age, demand)
            }
        };
        // What is like a rise that was given back may be given back again, if there is time to wait for it.
        let is_known =
            |growth: &Growth| self.precedents.cover(growth.rise()) && !growth.is_near(demand.limit);
        let is_leak = |(_, growth): &(usize, Growth)| !is_known(growth) && proven(growth);
        let Some(index) = self.growths.iter().position(is_leak) else { return };
        self.tell(index);
        self.growths.swap(0, index);
        self.growths.truncate(1);
        self.finding.state = State::Leaking;
        self.finding.leaking_since = Some(now);
    }

    /// Whether what is kept came like a leak. Traffic that comes and goes hides the form of a floor, and not this.
    fn arrive(&self, holdings: &Holdings, growth: &Growth, age: f64, demand: Demand) -> bool {
        let second = |nanos: u64| (nanos / SECOND) as u32;
        let old = holdings.arrivals.iter().filter(|(since, _)| nanos(holdings.now - since) >= age);
        let mut sum = 0.0;
        let mut points = vec![(second(holdings.since), 0)];
        for (since, count) in old {
            sum += count;
            points.push((second(*since), sum as u32));
        }
        f64::from(growth.grown().0) >= sum * KEPT_PART && demand.is_met_by_arrivals(&points)
    }

    /// Whether what came is still held; `None` when that cannot be said yet.
    fn stays(&self, growth: &Growth) -> Option<Kept> {
        let holdings = self.holdings.as_ref()?;
        let (grown, seconds) = growth.grown();
        let (grown, seconds) = (f64::from(grown), f64::from(seconds.max(1)));
        let watched = nanos(holdings.now.saturating_sub(holdings.since));
        // What came before the first look: more of it than before the growth can only have come with it.
        let before = (holdings.kept - f64::from(growth.began().1)).max(0.0);
        let sum = |class: usize, of: fn(&Age) -> f64| -> f64 { holdings.ages[class..].iter().map(of).sum() };
        for class in 0..CLASSES {
            let age = age_of(class);
            if age > watched {
                break;
            }
            let new = sum(class, |age| age.held);
            let lost = sum(class, |age| age.lost);
            let proof = sum(class, |age| age.watched) + before * (watched - age);
            let of_all = new + before >= KEPT.max(KEPT_PART * grown * (1.0 - age / seconds).max(0.0));
            let of_new = new >= KEPT_NEW.max(KEPT_PART * grown / seconds * (watched - age));
            let allowed = ((if of_all { new + before } else { new }) / DEATHS).floor();
            let long_enough = proof >= WATCHED.max((new + before) * age * WATCHED_PART);
            if (of_all || of_new) && lost <= allowed && long_enough {
                return Some(Kept::Since(age));
            }
        }
        let old = (1..CLASSES).find(|class| age_of(*class) >= watched / 4.0).unwrap_or(CLASSES - 1);
        let expected = REPLACED_PART * grown / seconds * (watched - age_of(old));
        let replaced = sum(old, |age| age.held) < expected && before < REPLACED_PART * grown;
        let is_time = watched >= REPLACED_AFTER.max(seconds / 8.0);
        (is_time && replaced).then_some(Kept::Replaced)
    }
}

fn nanos(nanos: u64) -> f64 {
    nanos as f64 / SECOND as f64
}

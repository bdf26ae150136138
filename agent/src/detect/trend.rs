//! The rising floor of one count of one process.
//!
//! What a program uses and gives back moves the count up and down; what it leaks moves the *minimum*
//! up. So the count is reduced to its minimum per window, the floor, and a floor above the one before it
//! is a rise. The baseline is the floor before the first rise.
//!
//! A busy server's count wanders: with arrivals that know nothing of each other it strays from its mean by
//! about the square root of it. Growth counts only beyond that, so a process with 400 connections has
//! to grow by more than one with four.

const SECOND: u64 = 1_000_000_000;

/// Length of a window in nanoseconds.
const WINDOW: u64 = 10 * SECOND;
/// Windows without a rise after which the growth is taken for settled.
const SETTLED_WINDOWS: u16 = 30;
/// Rises, least growth over the baseline, and growth in square roots of the baseline.
const SUSPECT: (u16, f64, f64) = (2, 8.0, 4.0);
const GROWN: (u16, f64, f64) = (5, 20.0, 8.0);
/// Part of the limit above which fewer rises are waited for.
const HIGH_USE: f64 = 0.8;

/// What is remembered of one count: a few numbers, whatever its history.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Trend {
    window: Option<Window>,
    /// Minimum of the last complete window; `None` before there is one.
    floor: Option<u32>,
    baseline: u32,
    /// Highest floor since the baseline.
    peak: u32,
    rises: u16,
    /// Complete windows since the last rise.
    flat: u16,
    /// The whole last window lay above `HIGH_USE` of the limit.
    high: bool,
    /// When the first rise, or high use, began; and when the floor rose last. Nanoseconds since boot.
    since: u64,
    risen: u64,
    level: Level,
}

/// What the trend alone says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    #[default]
    Quiet,
    Suspect,
    /// Grown like a leak; what is still held must confirm it.
    Grown,
}

/// The window that is being filled.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Window {
    began: u64,
    min: u32,
    high: bool,
}

impl Trend {
    /// Takes a reading and returns the level it leads to.
    pub(super) fn observe(&mut self, now: u64, live: u32, limit: Option<u64>) -> Level {
        let high = limit.is_some_and(|limit| f64::from(live) > HIGH_USE * limit as f64);
        let window = self.window.get_or_insert(Window { began: now, min: live, high });
        window.min = window.min.min(live);
        window.high &= high;
        if now.saturating_sub(window.began) >= WINDOW {
            let complete = *window;
            self.window = Some(Window { began: now, min: live, high });
            self.close(complete, now);
        }
        self.level
    }

    /// Begins anew from the present floor: the growth was not what it looked like.
    pub(super) fn restart(&mut self) {
        self.settle(self.floor.unwrap_or(0));
        self.level = Level::Quiet;
    }

    fn settle(&mut self, floor: u32) {
        (self.baseline, self.peak, self.rises, self.flat) = (floor, floor, 0, 0);
    }

    fn close(&mut self, window: Window, now: u64) {
        self.high = window.high;
        match self.floor.replace(window.min) {
            None => self.settle(window.min),
            Some(floor) if window.min > floor => {
                if self.rises == 0 {
                    self.settle(floor);
                    self.since = window.began;
                }
                self.rises = self.rises.saturating_add(1);
                self.flat = 0;
                self.risen = now;
                self.peak = self.peak.max(window.min);
            }
            Some(floor) => {
                self.flat = self.flat.saturating_add(1);
                let given_back = self.growth() <= (self.peak - self.baseline) / 2;
                if (window.min < floor && given_back) || self.flat >= SETTLED_WINDOWS {
                    self.settle(window.min);
                }
            }
        }
        self.judge(window.began);
    }

    fn judge(&mut self, began: u64) {
        let beyond = |(rises, least, roots): (u16, f64, f64)| {
            let growth = f64::from(self.growth());
            self.rises >= rises && growth >= least.max(roots * f64::from(self.baseline).sqrt())
        };
        let next = if beyond(GROWN)
            || (self.high && beyond(SUSPECT))
            // Once grown, it stays so until it is given back or settles.
            || (self.level == Level::Grown && self.rises > 0)
        {
            Level::Grown
        } else if beyond(SUSPECT) || self.high {
            Level::Suspect
        } else {
            Level::Quiet
        };
        if self.rises == 0 && self.high && self.level == Level::Quiet {
            self.since = began;
        }
        self.level = next;
    }

    /// How far the floor lies above the baseline.
    pub(super) fn growth(&self) -> u32 {
        self.floor.unwrap_or(0).saturating_sub(self.baseline)
    }

    /// The floor before it began to rise.
    pub(super) fn baseline(&self) -> u32 {
        self.baseline
    }

    /// When it began, nanoseconds since boot.
    pub(super) fn since(&self) -> u64 {
        self.since
    }

    /// Mean rise of the floor per minute, from the baseline to the last rise.
    pub(super) fn growth_per_minute(&self) -> f64 {
        // A floor is the minimum of its window; in a rising count that is the value at its beginning.
        let span = self.risen.saturating_sub(self.since);
        if self.rises == 0 || span == 0 {
            return 0.0;
        }
        f64::from(self.growth()) * 60.0 * SECOND as f64 / span as f64
    }
}

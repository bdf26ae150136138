//! The rising floor of one count of one process.
//!
//! What a program uses and gives back moves the count up and down; what it leaks moves the *minimum*
//! up. So the count is reduced to its minimum per window, the floor, and a floor above the one before it
//! is a rise. The baseline is the floor before the first rise. A pool that warms up rises once or twice;
//! a leak rises and rises.

use super::State;

const SECOND: u64 = 1_000_000_000;

/// Length of a window in nanoseconds.
const WINDOW: u64 = 10 * SECOND;
/// Windows without a rise after which the growth is taken for settled.
const SETTLED_WINDOWS: u16 = 30;
/// Rises and growth over the baseline that make a suspect.
const SUSPECT_RISES: u16 = 2;
const SUSPECT_GROWTH: u32 = 8;
/// Rises and growth over the baseline that make a leak.
const LEAKING_RISES: u16 = 5;
const LEAKING_GROWTH: u32 = 20;
/// Part of the limit above which fewer rises are waited for.
const HIGH_USE: f64 = 0.8;

/// What is remembered of one count: a few numbers, whatever its history.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Trend {
    window: Option<Window>,
    /// Minimum of the last complete window; `None` before there is one.
    floor: Option<u32>,
    baseline: u32,
    rises: u16,
    /// Complete windows since the last rise.
    flat: u16,
    /// The whole last window lay above `HIGH_USE` of the limit.
    high: bool,
    /// When the first rise, or high use, began; and when the floor rose last. Nanoseconds since boot.
    since: u64,
    risen: u64,
    state: State,
}

/// The window that is being filled.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Window {
    began: u64,
    min: u32,
    high: bool,
}

impl Trend {
    /// Takes a reading and returns the state it leads to.
    pub(super) fn observe(&mut self, now: u64, live: u32, limit: Option<u64>) -> State {
        let high = limit.is_some_and(|limit| f64::from(live) > HIGH_USE * limit as f64);
        let window = self.window.get_or_insert(Window { began: now, min: live, high });
        window.min = window.min.min(live);
        window.high &= high;
        if now.saturating_sub(window.began) >= WINDOW {
            let complete = *window;
            self.window = Some(Window { began: now, min: live, high });
            self.close(complete, now);
        }
        self.state
    }

    fn close(&mut self, window: Window, now: u64) {
        let Some(floor) = self.floor.replace(window.min) else {
            self.baseline = window.min;
            self.high = window.high;
            self.judge(window.began);
            return;
        };
        self.high = window.high;
        if window.min > floor {
            if self.rises == 0 {
                self.baseline = floor;
                self.since = window.began;
            }
            self.rises = self.rises.saturating_add(1);
            self.flat = 0;
            self.risen = now;
        } else {
            self.flat = self.flat.saturating_add(1);
            let given_back = self.growth() <= floor.saturating_sub(self.baseline) / 2;
            if (window.min < floor && given_back) || self.flat >= SETTLED_WINDOWS {
                self.baseline = window.min;
                self.rises = 0;
                self.flat = 0;
            }
        }
        self.judge(window.began);
    }

    fn judge(&mut self, began: u64) {
        let rising = |rises, growth| self.rises >= rises && self.growth() >= growth;
        let next = if rising(LEAKING_RISES, LEAKING_GROWTH)
            || (self.high && rising(SUSPECT_RISES, SUSPECT_GROWTH))
            // Once leaking, what it has taken is the leak until it is given back or settles.
            || (self.state == State::Leaking && self.rises > 0)
        {
            State::Leaking
        } else if rising(SUSPECT_RISES, SUSPECT_GROWTH) || self.high {
            State::Suspect
        } else {
            State::Quiet
        };
        if self.rises == 0 && self.high && self.state == State::Quiet {
            self.since = began;
        }
        self.state = next;
    }

    fn growth(&self) -> u32 {
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

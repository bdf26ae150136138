//! The families of made-up processes. Each case draws its own parameters; what a family is called says what
//! they have in common, and a leak's deadline what is promised of it.

use super::world::World;

pub(super) const MINUTE: f64 = 60.0;
pub(super) const HOUR: f64 = 3_600.0;

/// What a family shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Leak,
    Sound,
    /// Sound, and yet for minutes the same as a leak in everything that can be seen. Not in the totals.
    Undecidable,
}

/// Processes of one kind.
pub(super) struct Family {
    pub name: &'static str,
    pub kind: Kind,
    pub make: fn(&mut World) -> Plan,
}

/// What a process does in a second, given its number.
pub(super) type Second = Box<dyn FnMut(&mut World, u64)>;

/// What one process will do.
pub(super) struct Plan {
    /// Length of the series.
    pub seconds: u64,
    /// Of its fds.
    pub limit: u64,
    /// Second of the first leaked item.
    pub leaks_from: Option<u64>,
    /// Seconds from there until it is to be found.
    pub deadline: f64,
    pub second: Second,
}

pub(super) fn plan(hours: f64, second: impl FnMut(&mut World, u64) + 'static) -> Plan {
    let seconds = (hours * HOUR) as u64;
    Plan { seconds, limit: 65_536, leaks_from: None, deadline: f64::INFINITY, second: Box::new(second) }
}

impl Plan {
    pub(super) fn leaks(self, from: u64, deadline: f64) -> Self {
        let seconds = from + (deadline * 1.6) as u64 + 60;
        Self { leaks_from: Some(from), deadline, seconds, ..self }
    }
}

/// What a program has open from its start.
pub(super) fn starts(world: &mut World) {
    let count = world.random.log(3.0, 700.0) as u32;
    world.keep(count);
}

/// Half leak from the start on, half after some time.
pub(super) fn when(world: &mut World) -> u64 {
    if world.random.chance(0.5) { 0 } else { world.random.within(1.0, 900.0) as u64 }
}

/// Connections that are there from the start, as many as the load keeps up.
pub(super) fn settled(world: &mut World, rate: f64, hold: f64) {
    for _ in 0..world.random.poisson(rate * hold) {
        let life = world.random.exponential(hold);
        world.open(life);
    }
}

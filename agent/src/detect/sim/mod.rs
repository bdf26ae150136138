//! Processes that are made up, to see how often the detector is right: families of them, leaking and sound, with
//! random parameters. Each fd has its own time of opening and closing, so that what is still held is computed as
//! it is for a real process.
//!
//! Two sets of seeds: the detector is tuned with one and reported with the other.

mod families;
mod leaks;
mod report;
mod sound;
mod world;

use plumb_common::task::ProcKey;

use self::{
    families::{Family, Kind},
    world::{Random, World},
};
use super::{
    Change, Confirmation, Detector, HostLimits, Resource, Settings, State, What,
    cohorts::{Cohorts, identity},
    tests::row,
};
use crate::table::Row;

const SECOND: u64 = 1_000_000_000;
/// When each process begins, in seconds since boot: anywhere in the longest window.
const BEGINS: u64 = 100_000;
const SPREAD: f64 = 10_800.0;
/// Seeds for tuning, and for what is reported: no case is in both.
const TUNING: u64 = 0x7469_6e67;
const REPORTING: u64 = 0x0072_6570_6f72_7400;

/// What became of one process.
#[derive(Clone, Copy, Debug, Default)]
struct Run {
    hours: f64,
    /// Seconds from the first leaked item (from the start of a sound one).
    suspect: Option<f64>,
    leaking: Option<f64>,
    /// Until when a leak is to be found.
    deadline: f64,
    /// Verdicts that were wrong: on a sound process, or before anything leaked.
    wrong: u32,
    /// Part of the time as a suspect.
    suspected: f64,
}

/// Plays one process of a family.
fn run(family: &Family, seed: u64) -> Run {
    let mut random = Random::new(seed);
    let begins = BEGINS + random.within(0.0, SPREAD) as u64;
    let mut world = World::new(begins, random);
    let mut plan = (family.make)(&mut world);
    world.limit = plan.limit as usize;
    let mut detector = Detector::new(HostLimits { threads: 32_768 }, Settings::default());
    let mut cohorts = Cohorts::default();
    let mut run = Run { deadline: plan.deadline, ..Run::default() };
    let first_leak = begins + plan.leaks_from.unwrap_or(0);
    let key = ProcKey::new(42, 7);
    let mut is_suspect = 0u64;
    for second in 0..plan.seconds {
        world.now = begins + second;
        (plan.second)(&mut world, second);
        world.expire();
        let now = world.now * SECOND + 300_000_000;
        let row = Row { fd_limit: plan.limit, ..row(world.count(), 1) };
        let since = world.now as f64 - first_leak as f64;
        for change in detector.observe(&[row], now) {
            match change {
                Change::Suspect(..) => {
                    cohorts = Cohorts::default();
                    cohorts.look(now, world.identities());
                    if since >= 0.0 {
                        run.suspect = run.suspect.or(Some(since));
                    }
                }
                Change::Grown(..) => {
                    let holdings = Some(cohorts.look(now, world.identities()));
                    let found = Confirmation { holdings, ..Confirmation::default() };
                    detector.confirm(key, Resource::Fd, found, now);
                }
                Change::Quiet(..) => {}
            }
        }
        if detector.tell(now).iter().any(|news| news.what == What::Leak) {
            if plan.leaks_from.is_some() && since >= 0.0 {
                run.leaking = run.leaking.or(Some(since));
            } else {
                run.wrong += 1;
            }
        }
        let state = detector.cases.values().next().map(|case| case.finding.state);
        is_suspect += u64::from(state == Some(State::Suspect));
        run.hours = (second + 1) as f64 / 3600.0;
        if run.leaking.is_some() || (plan.leaks_from.is_some() && since > plan.deadline * 1.5) {
            break;
        }
    }
    run.suspected = is_suspect as f64 / (run.hours * 3600.0);
    run
}

/// Each case has a seed of its own, whatever the number of cases of other families.
fn seed(set: u64, family: &Family, case: usize) -> u64 {
    let name = family.name.bytes().fold(set, |mixed, byte| identity([mixed, u64::from(byte), 0]));
    identity([set, name, case as u64])
}

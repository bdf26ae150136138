//! The moments in which nothing else slows the CPU.
//!
//! A CPU of a virtual machine is often one of two threads of a core, and what runs on the other slows it by a third, for
//! a millisecond or for a minute, without any trace in /proc/stat. A calculation that enters no kernel sees this
//! as well as the operations do, and no program in the kernel can slow it: it tells which slices to believe. A reader that
//! takes the CPU meanwhile spoils a slice as well: its time is measured apart.

use std::{
    hint,
    time::{Duration, Instant},
};

use anyhow::Result;

/// Of the shortest calculation so far: up to this it was calm.
const TOLERANCE: f64 = 1.03;
/// So many slices for each that is wanted, while it is not calm.
const ATTEMPTS: usize = 6;

/// Knows how fast the CPU can be.
#[derive(Default)]
pub(crate) struct Calm {
    shortest: Option<Duration>,
}

impl Calm {
    /// The seconds of the `wanted` calmest slices that `slice` measured.
    pub(crate) fn slices(
        &mut self,
        wanted: usize,
        mut slice: impl FnMut() -> Result<Duration>,
    ) -> Result<Vec<f64>> {
        slice()?;
        let mut slices: Vec<(Duration, f64)> = Vec::new();
        let mut calm = 0;
        let mut before = calculate();
        while calm < wanted && slices.len() < wanted * ATTEMPTS {
            let took = slice()?.as_secs_f64();
            let after = calculate();
            let slowest = before.max(after);
            let shortest = self.shortest.get_or_insert(after);
            *shortest = after.min(*shortest);
            calm += usize::from(slowest <= shortest.mul_f64(TOLERANCE));
            slices.push((slowest, took));
            before = after;
        }
        slices.sort_by_key(|(slowest, _)| *slowest);
        Ok(slices.into_iter().take(wanted).map(|(_, took)| took).collect())
    }
}

/// How long it takes: as many independent steps at a time as a CPU can do, about 60 microseconds of them.
fn calculate() -> Duration {
    const STEPS: u64 = 20_000;
    let start = Instant::now();
    let mut lanes = [1, 2, 3, 4, 5, 6, 7, 8_u64];
    for step in 0..STEPS {
        for lane in &mut lanes {
            *lane = (*lane ^ (*lane >> 7)).wrapping_add(step);
        }
        lanes = hint::black_box(lanes);
    }
    start.elapsed()
}

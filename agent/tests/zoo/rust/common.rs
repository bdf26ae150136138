//! What the Rust programs share: how they end, and numbers at random.
#![allow(dead_code, reason = "each program uses its part")]

use std::{env, time::Duration};

pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// SIGALRM ends the process after the seconds of its first argument.
pub(crate) fn end_after_argument() -> Result<()> {
    let seconds = env::args().nth(1).ok_or("usage: PROGRAM SECONDS")?;
    // SAFETY: a plain system call.
    unsafe { libc::alarm(seconds.parse()?) };
    Ok(())
}

/// splitmix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// Uniform between 0 and 1.
    pub(crate) fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Until the next of so many events a second that know nothing of each other.
    pub(crate) fn until_next(&mut self, per_second: f64) -> Duration {
        Duration::from_secs_f64(-(1.0 - self.uniform()).ln() / per_second)
    }
}

//! The two clocks: since boot, which the kernel stamps with, and the calendar, which people read.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds since boot, suspend included (`CLOCK_BOOTTIME`).
#[must_use]
pub(crate) fn boottime() -> u64 {
    nanos(ClockId::Boottime)
}

/// CPU time of the calling thread.
#[must_use]
pub(crate) fn thread_cpu() -> Duration {
    Duration::from_nanos(nanos(ClockId::ThreadCPUTime))
}

/// Turns times since boot into calendar times; holds for as long as nobody sets the clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Calendar {
    boot: Duration,
}

impl Calendar {
    #[must_use]
    pub(crate) fn now() -> Self {
        Self { boot: Duration::from_nanos(nanos(ClockId::Realtime).saturating_sub(boottime())) }
    }

    /// RFC 3339 in UTC, to the second.
    #[must_use]
    pub(crate) fn format(self, since_boot: u64) -> String {
        humantime::format_rfc3339_seconds(self.at(since_boot)).to_string()
    }

    /// Nanoseconds since boot of a calendar time; 0 for what was before.
    #[must_use]
    pub(crate) fn since_boot(self, time: SystemTime) -> u64 {
        let since = time.duration_since(UNIX_EPOCH + self.boot).unwrap_or_default();
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    }

    fn at(self, since_boot: u64) -> SystemTime {
        // Whatever is further away than the calendar reaches is not a time.
        (UNIX_EPOCH + self.boot).checked_add(Duration::from_nanos(since_boot)).unwrap_or(UNIX_EPOCH)
    }

    /// RFC 3339 in UTC, to the millisecond.
    #[must_use]
    pub(crate) fn format_millis(self, since_boot: u64) -> String {
        humantime::format_rfc3339_millis(self.at(since_boot)).to_string()
    }
}

fn nanos(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    // Neither clock is negative on a running system.
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

//! The ledger of the event ring: for every source, `seen = sent + filtered + forged + lost`, by cause.
//!
//! The kernel side keeps a per-CPU array with one `u64` per (source, outcome); the agent sums it.

/// Which program produced the event.
pub const SOURCES: [&str; 8] = ["clone", "exec", "rename", "exit", "fd", "signal", "socket", "stack"];
pub const CLONE: u32 = 0;
pub const EXEC: u32 = 1;
pub const RENAME: u32 = 2;
pub const EXIT: u32 = 3;
pub const FD: u32 = 4;
pub const SIGNAL: u32 = 5;
pub const SOCKET: u32 = 6;
/// Of a new fd or thread. One that is lost is an origin without a stack, not a lost event.
pub const STACK: u32 = 7;

/// What became of it.
pub const OUTCOMES: [&str; 6] = ["sent", "filtered", "ring_full", "forged", "fault", "quota"];
/// Written to the ring.
pub const SENT: u32 = 0;
/// The listener asked for another process; of a stack, the thread has no 64-bit user registers or is in no call.
pub const FILTERED: u32 = 1;
/// Lost: the ring had no room.
pub const RING_FULL: u32 = 2;
/// Refused: the syscall claims a new fd, but its slot is empty.
pub const FORGED: u32 = 3;
/// Lost: kernel or user memory could not be read.
pub const FAULT: u32 = 4;
/// Lost: the ring was filling up, and the cgroup had used its share of it; of stacks, the process had its number or
/// more than a few.
pub const QUOTA: u32 = 5;

/// The outcomes that are losses.
pub const LOSSES: [u32; 3] = [RING_FULL, FAULT, QUOTA];

/// Index of the time that the fd programs took, in nanoseconds; only where trees are followed.
pub const SPENT: u32 = (SOURCES.len() * OUTCOMES.len()) as u32;

/// Entries of the array.
pub const LEN: u32 = SPENT + 1;

/// The ledger at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts(pub [u64; LEN as usize]);

impl Default for Counts {
    fn default() -> Self {
        Self([0; LEN as usize])
    }
}

impl Counts {
    #[must_use]
    pub fn of(&self, source: u32, outcome: u32) -> u64 {
        self.0[index(source, outcome) as usize]
    }

    /// Events of a source that are missing.
    #[must_use]
    pub fn lost(&self, source: u32) -> u64 {
        LOSSES.iter().map(|outcome| self.of(source, *outcome)).sum()
    }

    /// Time that the fd programs took, in nanoseconds; 0 unless trees are followed.
    #[must_use]
    pub fn spent(&self) -> u64 {
        self.0[SPENT as usize]
    }

    /// Sum over the sources of events; stacks come beside them.
    #[must_use]
    pub fn of_outcome(&self, outcome: u32) -> u64 {
        (0..STACK).map(|source| self.of(source, outcome)).sum()
    }
}

/// Index of one counter.
#[must_use]
pub const fn index(source: u32, outcome: u32) -> u32 {
    source * OUTCOMES.len() as u32 + outcome
}

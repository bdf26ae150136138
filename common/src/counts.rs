//! The ledger of the event ring: for every source, `seen = sent + filtered + forged + lost`, by cause.
//!
//! The kernel side keeps a per-CPU array with one `u64` per (source, outcome); the agent sums it.

/// Which program produced the event.
pub const SOURCES: [&str; 5] = ["clone", "exec", "rename", "exit", "fd"];
pub const CLONE: u32 = 0;
pub const EXEC: u32 = 1;
pub const RENAME: u32 = 2;
pub const EXIT: u32 = 3;
pub const FD: u32 = 4;

/// What became of it.
pub const OUTCOMES: [&str; 6] = ["sent", "filtered", "ring_full", "forged", "fault", "quota"];
/// Written to the ring.
pub const SENT: u32 = 0;
/// The listener asked for another process.
pub const FILTERED: u32 = 1;
/// Lost: the ring had no room.
pub const RING_FULL: u32 = 2;
/// Refused: the syscall claims a new fd, but its slot is empty.
pub const FORGED: u32 = 3;
/// Lost: kernel or user memory could not be read.
pub const FAULT: u32 = 4;
/// Lost: the ring was filling up, and the cgroup had used its share of it.
pub const QUOTA: u32 = 5;

/// The outcomes that are losses.
pub const LOSSES: [u32; 3] = [RING_FULL, FAULT, QUOTA];

/// Entries of the array.
pub const LEN: u32 = (SOURCES.len() * OUTCOMES.len()) as u32;

/// Sum over the sources.
#[must_use]
pub fn of_outcome(ledger: &[u64; LEN as usize], outcome: u32) -> u64 {
    (0..SOURCES.len() as u32).map(|source| ledger[index(source, outcome) as usize]).sum()
}

/// Index of one counter.
#[must_use]
pub const fn index(source: u32, outcome: u32) -> u32 {
    source * OUTCOMES.len() as u32 + outcome
}

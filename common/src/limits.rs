//! Sizes that both sides must agree on, and the bounds of the work done in the kernel.

/// Length of `task_struct.comm` in bytes, with its terminating NUL (`TASK_COMM_LEN`, since 2.6).
pub const COMM_LEN: usize = 16;

/// Bytes kept of a file's last path component or of an anonymous inode's name.
pub const NAME_LEN: usize = 32;

/// Default size of the event ring in bytes; a power of two and a multiple of the page size.
/// Its pages are mapped twice and so count twice in the agent's resident memory.
pub const RING_BYTES: u32 = 2 << 20;

/// Words of an `open_fds` bitmap that one call of the verified counting function reads.
pub const BITMAP_WORDS: u32 = 256;

/// Calls of that function per table. 256 x 256 words hold 4,194,304 fds; what lies beyond is not
/// counted and the record says so (`task::FLAG_FDS_TRUNCATED`).
pub const BITMAP_CALLS: u32 = 256;

/// Processes whose fd events the agent can follow at a time.
pub const MAX_WATCHED: u32 = 1024;

/// As `MAX_WATCHED`, of the processes of a tree.
pub const MAX_TREE: u32 = 16_384;

/// Sizes of the rings where a tree is followed. With a stack for each new fd, and nobody's left out, the larger one
/// has room for what one core opens and closes in 60 ms.
pub const TREE_RING_BYTES: u32 = 8 << 20;
pub const TREE_STACK_RING_BYTES: u32 = 64 << 20;

/// Default size of the ring of stacks in bytes; as for the events, its pages count twice.
pub const STACK_RING_BYTES: u32 = 1 << 20;

/// Bytes of a user stack that a record has room for: the smaller one when that much is not there.
pub const STACK_BYTES: [usize; 2] = [4 << 10, 16 << 10];

/// More sizes, where trees are followed: whatever is copied is memory that two processors have to fetch.
pub const TREE_STACK_BYTES: [usize; 3] = [1 << 10, 2 << 10, 8 << 10];

/// Bytes kept of the user stack of whoever closes an fd, where trees are followed: the next few callers. And of whoever
/// closes what is not open, which is told first.
pub const CLOSE_STACK_BYTES: usize = 512;
pub const BAD_CLOSE_STACK_BYTES: usize = 1 << 10;

/// Fds of one received message, and messages of one call, that are followed.
pub const MESSAGE_FDS: usize = 16;
pub const MESSAGES: usize = 4;

/// Stacks taken of one watched process per second (2^30 ns) at most, so that one that opens fds as fast as it
/// can does not use up the ring and the processor of the agent.
pub const STACKS_PER_SECOND: u32 = 1000;

/// Beyond so many the ring must be half empty for more: the other half is for those that take few.
pub const FEW_STACKS: u32 = 16;

/// Cgroups whose use of a filling ring is told apart; beyond it the least recently seen is forgotten.
pub const MAX_SHARES: u32 = 1024;

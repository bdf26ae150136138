//! Every map and every read-only global the agent sets before load.

use aya_ebpf::{
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf},
};
use plumb_common::{
    counts,
    event::{FdControl, Watch},
    limits::{BITMAP_WORDS, COMM_LEN, MAX_SHARES, MAX_WATCHED, RING_BYTES, STACK_RING_BYTES},
    offsets,
    sockets::{
        COUNTERS, Closed, Connection, Conversation, MAX_CLOSED, MAX_CONVERSATIONS, MAX_PORTS, MAX_TARGETS,
        Port, SLOTS,
    },
    task::ProcKey,
};

/// Lifecycle and fd events, in the order of their reservation.
#[map]
pub(crate) static EVENTS: RingBuf = RingBuf::with_byte_size(RING_BYTES, 0);

/// User stacks of those who make fds and threads.
#[map]
pub(crate) static STACKS: RingBuf = RingBuf::with_byte_size(STACK_RING_BYTES, 0);

/// The ledger, indexed by `counts::index`. One value, so that the agent reads it in one call.
#[map]
pub(crate) static COUNTS: PerCpuArray<[u64; counts::LEN as usize]> = PerCpuArray::with_max_entries(1, 0);

/// Where one piece of an `open_fds` bitmap is copied to before its bits are counted. The agent runs one
/// pass at a time, so nobody else writes here.
#[map]
pub(crate) static SCRATCH: PerCpuArray<[u64; BITMAP_WORDS as usize]> = PerCpuArray::with_max_entries(1, 0);

/// The process whose threads or files the next pass is about. Start 0 takes any process of that number.
#[map]
pub(crate) static ITER_PROCESS: Array<ProcKey> = Array::with_max_entries(1, 0);

/// Whose fd events reach the ring, when `WATCHED_ONLY` is set.
#[map]
pub(crate) static FD_CONTROL: Array<FdControl> = Array::with_max_entries(1, 0);

/// The watched processes by thread group id. Only the agent adds to it; a process that finds no room
/// is not watched, and the agent says so.
#[map]
pub(crate) static WATCHED: HashMap<u32, Watch> = HashMap::with_max_entries(MAX_WATCHED, 0);

/// Ports of the services that are followed, by the service's slot.
#[map]
pub(crate) static PORTS: HashMap<Port, u32> = HashMap::with_max_entries(MAX_PORTS, 0);

/// Processes whose signals are followed, by thread group id, with their start.
#[map]
pub(crate) static TARGETS: HashMap<u32, u64> = HashMap::with_max_entries(MAX_TARGETS, 0);

/// Connections of followed ports, by the address of their socket.
#[map]
pub(crate) static CONVERSATIONS: HashMap<u64, Conversation> = HashMap::with_max_entries(MAX_CONVERSATIONS, 0);

/// Connections that services have closed, with `MARK_USED` or 0, and whether it is told that they have lost a request. One
/// that still comes is told from a new one by it, and once.
#[map]
pub(crate) static CLOSED: LruHashMap<Connection, Closed> = LruHashMap::with_max_entries(MAX_CLOSED, 0);

/// Counters of each slot, `sockets::COUNTERS`.
#[map]
pub(crate) static SOCKET_COUNTS: PerCpuArray<[u64; COUNTERS.len()]> = PerCpuArray::with_max_entries(SLOTS, 0);

/// What each cgroup has used of a ring that is filling up. A guide for who must wait, not an account: the
/// least recently seen may be forgotten.
#[map]
pub(crate) static SHARES: LruHashMap<u64, Share> = LruHashMap::with_max_entries(MAX_SHARES, 0);

/// One cgroup's use of the ring.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Share {
    /// How far the reader was, in quarters of the ring.
    pub quarter: u64,
    /// Bytes sent since.
    pub bytes: u64,
}

/// Byte offsets of kernel fields, by `plumb_common::offsets` index.
#[unsafe(no_mangle)]
static OFFSETS: [u32; offsets::LEN] = [offsets::MISSING; offsets::LEN];

/// Only events of this process reach the ring; 0 for all.
#[unsafe(no_mangle)]
static FILTER_TGID: u32 = 0;

/// Only events of processes whose leader has this name reach the ring; all zero for any.
#[unsafe(no_mangle)]
static FILTER_COMM: [u8; COMM_LEN] = [0; COMM_LEN];

/// 1: of the fd events only those of `FD_CONTROL` and `WATCHED` reach the ring.
#[unsafe(no_mangle)]
static WATCHED_ONLY: u32 = 0;

/// 1: the stacks of everybody whose events reach the ring are taken; 0: those that `WATCHED` says.
#[unsafe(no_mangle)]
static ALL_STACKS: u32 = 0;

/// 1: whatever a watched process forks is watched too, nobody else's events are sent, and stacks are taken without
/// a budget.
#[unsafe(no_mangle)]
static TREE: u32 = 0;

/// 1: the kernel has `bpf_task_pt_regs` (since 5.15).
#[unsafe(no_mangle)]
static HAS_TASK_PT_REGS: u32 = 0;

/// 1: every KILL is told, whoever gets it.
#[unsafe(no_mangle)]
static KILLS: u32 = 0;

/// Offset of a kernel field, `None` when this kernel has no such field. `index` is a constant, so the
/// verifier knows the value and removes the branch that is not taken.
#[inline(always)]
pub(crate) fn offset(index: usize) -> Option<usize> {
    // SAFETY: `index` is one of the constants of `plumb_common::offsets`; volatile because the agent
    // replaces the value after compilation.
    let offset = unsafe { core::ptr::read_volatile((&raw const OFFSETS).cast::<u32>().add(index)) };
    if offset == offsets::MISSING { None } else { Some(offset as usize) }
}

#[inline(always)]
pub(crate) fn filter_tgid() -> u32 {
    // SAFETY: a plain read of a static the agent may have replaced before load.
    unsafe { core::ptr::read_volatile(&raw const FILTER_TGID) }
}

#[inline(always)]
pub(crate) fn filter_comm() -> [u8; COMM_LEN] {
    // SAFETY: as above.
    unsafe { core::ptr::read_volatile(&raw const FILTER_COMM) }
}

#[inline(always)]
pub(crate) fn watched_only() -> bool {
    // SAFETY: as above.
    unsafe { core::ptr::read_volatile(&raw const WATCHED_ONLY) != 0 }
}

#[inline(always)]
pub(crate) fn all_stacks() -> bool {
    // SAFETY: as above.
    unsafe { core::ptr::read_volatile(&raw const ALL_STACKS) != 0 }
}

#[inline(always)]
pub(crate) fn tree() -> bool {
    // SAFETY: as above.
    unsafe { core::ptr::read_volatile(&raw const TREE) != 0 }
}

#[inline(always)]
pub(crate) fn has_task_pt_regs() -> bool {
    // SAFETY: as above.
    unsafe { core::ptr::read_volatile(&raw const HAS_TASK_PT_REGS) != 0 }
}

#[inline(always)]
pub(crate) fn kills() -> bool {
    // SAFETY: as above.
    unsafe { core::ptr::read_volatile(&raw const KILLS) != 0 }
}

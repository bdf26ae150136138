//! The only writer of the ring, and of the ledger beside it.

use aya_ebpf::helpers::{bpf_get_current_pid_tgid, generated::bpf_ktime_get_boot_ns};
use bytemuck::Pod;
use plumb_common::{counts, event::Header, limits::COMM_LEN, offsets, task::ProcKey};

use crate::{kernel, maps};

/// `BPF_RB_NO_WAKEUP`, `BPF_RB_FORCE_WAKEUP` (linux/bpf.h, since 5.8).
const NO_WAKEUP: u64 = 1;
const FORCE_WAKEUP: u64 = 2;
/// `BPF_RB_AVAIL_DATA`, `BPF_RB_RING_SIZE`, `BPF_RB_CONS_POS`.
const AVAILABLE: u64 = 0;
const SIZE: u64 = 1;
const CONSUMED: u64 = 2;

/// Bytes before each record of the ring (`BPF_RINGBUF_HDR_SZ`).
const HEADER: u64 = 8;

/// Eighths of a ring that records may fill where trees are followed: all of it is for what tells of whole processes,
/// without which nothing can be said of the rest.
pub(crate) const WHOLE: u64 = 8;
pub(crate) const MOST: u64 = 7;

/// Adds one to a counter of the ledger.
#[inline(always)]
pub(crate) fn count(source: u32, outcome: u32) {
    if let Some(counters) = maps::COUNTS.get_ptr_mut(0) {
        // Per CPU, and still atomic: where tracepoints can be preempted another program may come in between.
        // SAFETY: the map's own value, and an index that `counts` gives.
        unsafe { increment(counters.cast::<u64>().add(counts::index(source, outcome) as usize)) };
    }
}

/// Adds the time since `began` to what the programs took.
#[inline(always)]
pub(crate) fn spend(began: u64) {
    if let Some(counters) = maps::COUNTS.get_ptr_mut(0) {
        // Per CPU; of two programs, one of which preempted the other, one may be forgotten.
        // SAFETY: the map's own value.
        unsafe {
            let spent = counters.cast::<u64>().add(counts::SPENT as usize);
            *spent += now() - began;
        }
    }
}

/// # Safety
/// `counter` is valid.
#[cfg(target_arch = "bpf")]
#[inline(always)]
unsafe fn increment(counter: *mut u64) {
    use core::intrinsics::{AtomicOrdering::Relaxed, atomic_xadd};
    // `core::sync::atomic` has no such operation for this target.
    // SAFETY: as required.
    unsafe { atomic_xadd::<u64, u64, { Relaxed }>(counter, 1) };
}

/// Only for the workspace to be checked.
///
/// # Safety
/// `counter` is valid.
#[cfg(not(target_arch = "bpf"))]
unsafe fn increment(counter: *mut u64) {
    // SAFETY: as required.
    unsafe { *counter += 1 };
}

/// Nanoseconds since boot.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// Writes one event, or counts why not. The reader is woken each time that another eighth of the ring is full:
/// waking it costs the writer microseconds. Below that its own tick finds the event.
#[inline(always)]
pub(crate) fn send<T: Pod>(source: u32, event: T) {
    // SAFETY: the record has been reserved.
    send_filled::<T>(source, |record| unsafe { record.write(event) });
}

/// As `send`, of an event that is written where it goes: all calls together have 512 bytes of stack.
#[inline(always)]
pub(crate) fn send_filled<T: Pod>(source: u32, fill: impl FnOnce(*mut T)) {
    let size = maps::EVENTS.query(SIZE);
    let used = maps::EVENTS.query(AVAILABLE);
    if maps::tree() {
        let part = if matches!(source, counts::FD | counts::RENAME) { MOST } else { WHOLE };
        if !fits(used, size, part) {
            return count(source, counts::RING_FULL);
        }
    } else if used >= size / 2 && !is_within_share(used, size, size_of::<T>() as u64) {
        return count(source, counts::QUOTA);
    }
    // One number, and not two, to keep on the stack while the record is filled.
    let flag = wake_up(used, size, size_of::<T>() as u64);
    let Some(mut entry) = maps::EVENTS.reserve::<T>(0) else {
        return count(source, counts::RING_FULL);
    };
    fill(entry.as_mut_ptr());
    entry.submit(flag);
    count(source, counts::SENT);
}

/// The flag to submit a record of so many bytes with, into a ring of which so much was used.
#[inline(always)]
fn wake_up(used: u64, size: u64, bytes: u64) -> u64 {
    // Never by 0: a branch that panics would be refused.
    let eighth = (size / 8).max(1);
    if used / eighth == (used + HEADER + bytes) / eighth { NO_WAKEUP } else { FORCE_WAKEUP }
}

/// Whether a ring of which so much is used has room within its first eighths.
#[inline(always)]
fn fits(used: u64, size: u64, part: u64) -> bool {
    part == WHOLE || used < size / 8 * part
}

/// Whether the ring of stacks is half empty.
#[inline(always)]
pub(crate) fn has_room_for_stacks() -> bool {
    maps::STACKS.query(AVAILABLE) < maps::STACKS.query(SIZE) / 2
}

/// Makes room for a record within so many eighths of the ring of stacks, has it filled and sends it; or counts why not.
#[inline(always)]
pub(crate) fn send_stack<T: 'static>(part: u64, fill: impl FnOnce(*mut T)) {
    let size = maps::STACKS.query(SIZE);
    let used = maps::STACKS.query(AVAILABLE);
    if maps::tree() && !fits(used, size, part) {
        return count(counts::STACK, counts::RING_FULL);
    }
    let flag = wake_up(used, size, size_of::<T>() as u64);
    let Some(mut entry) = maps::STACKS.reserve::<T>(0) else {
        return count(counts::STACK, counts::RING_FULL);
    };
    fill(entry.as_mut_ptr());
    entry.submit(flag);
    count(counts::STACK, counts::SENT);
}

/// Notes what the running task's cgroups use of a ring that is filling up. In its last quarter each set of
/// cgroups has a sixteenth of the ring until the reader has gone on by a quarter, so that a storm in one
/// leaves room to the others.
#[inline(always)]
fn is_within_share(used: u64, size: u64, bytes: u64) -> bool {
    let cgroups = kernel::read::<u64>(kernel::current(), offsets::TASK_CSS_SET).unwrap_or(0);
    let quarter = maps::EVENTS.query(CONSUMED) / (size / 4).max(1);
    let Some(share) = maps::SHARES.get_ptr_mut(cgroups) else {
        // A full map forgets its oldest entry, so this fails only for a moment: then nobody is refused.
        let _ = maps::SHARES.insert(cgroups, maps::Share { quarter, bytes }, 0);
        return true;
    };
    // SAFETY: a map value; a lost addition on another CPU makes the share a little larger.
    let share = unsafe { &mut *share };
    if share.quarter != quarter {
        (share.quarter, share.bytes) = (quarter, 0);
    }
    if used >= size / 4 * 3 && share.bytes >= size / 16 {
        return false;
    }
    share.bytes += bytes;
    true
}

/// The header of an event that the running task caused; `None`, counted, when nobody asked for it or the
/// task cannot be read.
#[inline(always)]
pub(crate) fn by_current(source: u32, kind: u32) -> Option<Header> {
    let ids = bpf_get_current_pid_tgid();
    let tgid = (ids >> 32) as u32;
    // Asked before anything is read: on a busy host most events are nobody's.
    let is_chosen = source == counts::FD || maps::tree();
    let since = if is_chosen { watched(tgid, ids as u32) } else { EVERYBODY };
    if since == NOBODY {
        count(source, counts::FILTERED);
        return None;
    }
    let start = kernel::beyond_current::<u64>(offsets::TASK_GROUP_LEADER, offsets::TASK_START_BOOTTIME);
    if start == 0 {
        count(source, counts::FAULT);
        return None;
    }
    // The number of a watched process that has ended may be another's by now.
    let is_another = since != EVERYBODY && since != start;
    let leader = || kernel::read(kernel::current(), offsets::TASK_GROUP_LEADER);
    if is_another || !wanted(tgid, leader) {
        count(source, counts::FILTERED);
        return None;
    }
    let (process, comm) = (ProcKey::new(tgid, start), kernel::current_comm());
    Some(Header { kind, tid: ids as u32, time: now(), process, comm })
}

/// As `by_current`, of whoever runs: the event is about somebody else.
#[inline(always)]
pub(crate) fn by_anybody(kind: u32) -> Header {
    let ids = bpf_get_current_pid_tgid();
    let start = kernel::beyond_current::<u64>(offsets::TASK_GROUP_LEADER, offsets::TASK_START_BOOTTIME);
    let process = ProcKey::new((ids >> 32) as u32, start);
    Header { kind, tid: ids as u32, time: now(), process, comm: kernel::current_comm() }
}

/// The header of an event about `task`, which need not be the running one.
///
/// # Safety
/// `task` is a non-null typed pointer to a `task_struct`.
#[inline(always)]
pub(crate) unsafe fn about(
    source: u32,
    kind: u32,
    task: kernel::Typed,
    comm: [u8; COMM_LEN],
) -> Option<Header> {
    // SAFETY: forwarded.
    let found = unsafe {
        (
            kernel::process_of(task),
            kernel::load::<u32>(task, offsets::TASK_PID),
            kernel::load::<u64>(task, offsets::TASK_GROUP_LEADER),
        )
    };
    let (Some(process), Some(tid), Some(leader)) = found else {
        count(source, counts::FAULT);
        return None;
    };
    let is_outside = maps::tree() && !follows(process);
    if is_outside || !wanted(process.tgid, || Some(leader)) {
        count(source, counts::FILTERED);
        return None;
    }
    Some(Header { kind, tid, time: now(), process, comm })
}

/// In the place of a start time.
const EVERYBODY: u64 = 0;
const NOBODY: u64 = u64::MAX;

/// Start time of the process of that number whose fd events are asked for, or whether everybody's or nobody's are. Numbers
/// and no enum: the compiler compares the time of an `EVERYBODY` too, and nobody has written it.
#[inline(always)]
fn watched(tgid: u32, tid: u32) -> u64 {
    if !maps::watched_only() {
        return EVERYBODY;
    }
    if let Some(control) = maps::FD_CONTROL.get(0)
        && (control.all != 0 || control.canary_tid == tid)
    {
        return EVERYBODY;
    }
    // SAFETY: the value is read at once; a change in between only makes the answer an old one.
    match unsafe { maps::WATCHED.get(tgid) } {
        Some(watch) => watch.start_boottime,
        None => NOBODY,
    }
}

/// Whether a process is watched.
#[inline(always)]
fn follows(process: ProcKey) -> bool {
    // SAFETY: as in `watched`.
    let watch = unsafe { maps::WATCHED.get(process.tgid) };
    watch.is_some_and(|watch| watch.start_boottime == process.start_boottime)
}

#[inline(always)]
fn wanted(tgid: u32, leader: impl FnOnce() -> Option<u64>) -> bool {
    let only = maps::filter_tgid();
    if only != 0 && only != tgid {
        return false;
    }
    let asked = maps::filter_comm();
    if asked[0] == 0 {
        return true;
    }
    let comm = leader().and_then(|leader| kernel::read::<[u8; COMM_LEN]>(leader, offsets::TASK_COMM));
    let Some(comm) = comm else { return false };
    // Up to the NUL: on 5.10 the rest of an older, longer name may stand behind it.
    for (have, want) in comm.iter().zip(&asked) {
        if have != want {
            return false;
        }
        if *want == 0 {
            break;
        }
    }
    true
}

//! The iterators: what is there now. One record per process, per thread of a process, per fd of a process.
//!
//! Iterators exist since 5.8. Their context is a pair of pointers (`struct bpf_iter__task`,
//! `bpf_iter__task_file`): meta data first, whose first field is the output, then the object.

use aya_ebpf::{
    cty::c_void,
    helpers::generated::{bpf_probe_read_kernel, bpf_seq_write},
};
use bytemuck::{Pod, Zeroable};
use plumb_common::{
    file::{FdRecord, SOCKFS_MAGIC, SocketRecord},
    limits::{BITMAP_CALLS, BITMAP_WORDS},
    offsets,
    task::{
        FLAG_FDS_TRUNCATED, FLAG_FDS_UNKNOWN, FLAG_KERNEL_THREAD, FLAG_STAND_IN, TaskRecord, ThreadRecord,
    },
};

use crate::{
    emit,
    kernel::{self, Typed, follow, load},
    maps,
    regs::{self, Place},
};

/// linux/sched.h.
const PF_KTHREAD: u32 = 0x0020_0000;
/// `enum` in linux/mm_types_task.h: MM_FILEPAGES, MM_ANONPAGES, MM_SHMEMPAGES (2 is swap).
const RESIDENT: [usize; 3] = [0, 1, 3];
/// Size of `struct percpu_counter` without lock debugging; where it is another, resident memory is 0.
const PERCPU_COUNTER: usize = 40;
/// asm-generic/resource.h.
const RLIMIT_NPROC: usize = 6;
const RLIMIT_NOFILE: usize = 7;
/// Size of `struct rlimit`: soft, then hard.
const RLIMIT_SIZE: usize = 16;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// A word of the iterator's context.
///
/// # Safety
/// `ctx` is the context of an iterator with at least `index + 1` words.
#[inline(always)]
unsafe fn word(ctx: *const c_void, index: usize) -> Typed {
    // SAFETY: as required; volatile keeps each access a plain 8-byte load, as the verifier wants it.
    unsafe { core::ptr::read_volatile(ctx.cast::<Typed>().add(index)) }
}

/// Appends a record to the pass. When the buffer is full the kernel calls again for the same object.
///
/// # Safety
/// `ctx` is the context of an iterator.
#[inline(always)]
unsafe fn write<T: Pod>(ctx: *const c_void, record: &T) {
    // SAFETY: meta and its seq_file are valid during the call; the record is plain bytes.
    unsafe {
        let seq = core::ptr::read_volatile(word(ctx, 0).cast::<*mut _>());
        bpf_seq_write(seq, (&raw const *record).cast(), size_of::<T>() as u32);
    }
}

/// One record per process: from its leader or, once that has exited, from any thread that still has the
/// fd table.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
extern "C" fn processes(ctx: *const c_void) -> i32 {
    // SAFETY: the context of iter/task.
    let task = unsafe { word(ctx, 1) };
    if !task.is_null() {
        // SAFETY: the verifier tracks both.
        unsafe { process(ctx, task) };
    }
    0
}

#[inline(always)]
unsafe fn process(ctx: *const c_void, task: Typed) -> Option<()> {
    // SAFETY: every pointer comes from the iterator or from a checked load through it.
    unsafe {
        let tgid: u32 = load(task, offsets::TASK_TGID)?;
        let mut flags = 0;
        if load::<u32>(task, offsets::TASK_PID)? != tgid {
            let leader = follow(task, offsets::TASK_GROUP_LEADER)?;
            if load::<u64>(leader, offsets::TASK_FILES)? != 0 || load::<u64>(task, offsets::TASK_FILES)? == 0
            {
                return None;
            }
            flags |= FLAG_STAND_IN;
        }
        if load::<u32>(task, offsets::TASK_FLAGS)? & PF_KTHREAD != 0 {
            flags |= FLAG_KERNEL_THREAD;
        }
        let mut record = TaskRecord::zeroed();
        record.key = kernel::process_of(task)?;
        record.time = emit::now();
        record.css_set = load(task, offsets::TASK_CSS_SET).unwrap_or(0);
        record.exec_id = load(task, offsets::TASK_EXEC_ID).unwrap_or(0);
        record.state = state(task);
        record.exit_state = load(task, offsets::TASK_EXIT_STATE).unwrap_or(0);
        record.comm = load(task, offsets::TASK_COMM)?;
        if let Some(parent) = follow(task, offsets::TASK_REAL_PARENT) {
            record.ppid = load(parent, offsets::TASK_TGID)?;
        }
        if let Some(cred) = follow(task, offsets::TASK_CRED) {
            record.uid = load(cred, offsets::CRED_UID)?;
        }
        let signal = follow(task, offsets::TASK_SIGNAL)?;
        record.threads = load(signal, offsets::SIGNAL_NR_THREADS)?;
        let limits = maps::offset(offsets::SIGNAL_RLIM)?;
        record.fd_limit = core::ptr::read_volatile(signal.add(limits + RLIMIT_NOFILE * RLIMIT_SIZE).cast());
        record.nproc_limit = core::ptr::read_volatile(signal.add(limits + RLIMIT_NPROC * RLIMIT_SIZE).cast());
        record.rss_pages = resident(task).unwrap_or(0);
        if let Some(files) = follow(task, offsets::TASK_FILES) {
            record.files = load(task, offsets::TASK_FILES)?;
            match count_fds(files) {
                Some((fds, truncated)) => {
                    record.fds = fds;
                    flags |= truncated;
                }
                None => flags |= FLAG_FDS_UNKNOWN,
            }
        }
        record.flags = flags;
        write(ctx, &record);
    }
    Some(())
}

/// Whether the running iterator is asked about the process of this task.
///
/// # Safety
/// `task` is a non-null typed pointer to a `task_struct`.
#[inline(always)]
unsafe fn is_iterated(task: Typed) -> bool {
    let Some(asked) = maps::ITER_PROCESS.get(0) else { return false };
    // SAFETY: as required.
    let tgid = unsafe { load::<u32>(task, offsets::TASK_TGID) };
    if tgid != Some(asked.tgid) {
        return false;
    }
    // SAFETY: as required.
    asked.start_boottime == 0 || unsafe { kernel::process_of(task) } == Some(*asked)
}

/// The threads of the process in `ITER_PROCESS`.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
extern "C" fn threads(ctx: *const c_void) -> i32 {
    // SAFETY: the context of iter/task.
    let task = unsafe { word(ctx, 1) };
    if !task.is_null() {
        // SAFETY: the verifier tracks both.
        unsafe { thread(ctx, task) };
    }
    0
}

#[inline(always)]
unsafe fn thread(ctx: *const c_void, task: Typed) -> Option<()> {
    // SAFETY: every pointer comes from the iterator.
    unsafe {
        if !is_iterated(task) {
            return None;
        }
        let place = regs::place_of(task).unwrap_or(Place { ip: 0, sp: 0, bp: 0 });
        let record = ThreadRecord {
            start_boottime: load(task, offsets::TASK_START_BOOTTIME)?,
            tid: load(task, offsets::TASK_PID)?,
            tgid: load(task, offsets::TASK_TGID)?,
            state: state(task),
            exit_state: load(task, offsets::TASK_EXIT_STATE).unwrap_or(0),
            ip: place.ip,
            sp: place.sp,
            bp: place.bp,
            comm: load(task, offsets::TASK_COMM)?,
        };
        write(ctx, &record);
    }
    Some(())
}

/// The open files of the process in `ITER_PROCESS`. The kernel skips threads that share the leader's table;
/// a thread that has unshared it is left out, as in /proc/PID/fd.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
extern "C" fn files(ctx: *const c_void) -> i32 {
    // SAFETY: the context of iter/task_file: meta, task, fd (32 bits), file.
    let (task, fd, file) = unsafe {
        let fd = core::ptr::read_volatile(ctx.cast::<u8>().add(16).cast::<u32>());
        (word(ctx, 1), fd, word(ctx, 3))
    };
    if !task.is_null() && !file.is_null() {
        // SAFETY: the verifier tracks all three.
        unsafe { open_file(ctx, task, fd, file) };
    }
    0
}

#[inline(always)]
unsafe fn open_file(ctx: *const c_void, task: Typed, fd: u32, file: Typed) -> Option<()> {
    // SAFETY: every pointer comes from the iterator or from a checked load through it.
    unsafe {
        if !is_iterated(task) {
            return None;
        }
        let leader = follow(task, offsets::TASK_GROUP_LEADER)?;
        let table: u64 = load(leader, offsets::TASK_FILES)?;
        if table != 0 && table != load::<u64>(task, offsets::TASK_FILES)? {
            return None;
        }
        let mut record = FdRecord::zeroed();
        record.file = file as u64;
        record.tgid = load(task, offsets::TASK_TGID)?;
        record.fd = fd;
        record.flags = load(file, offsets::FILE_FLAGS)?;
        record.pos = load(file, offsets::FILE_POS)?;
        if let Some(dentry) = follow(file, offsets::FILE_DENTRY) {
            let name: u64 = load(dentry, offsets::DENTRY_NAME)?;
            kernel::read_str(name, &mut record.name);
        }
        if let Some(inode) = follow(file, offsets::FILE_INODE) {
            record.inode = load(inode, offsets::INODE_INO)?;
            record.mode = u32::from(load::<u16>(inode, offsets::INODE_MODE)?);
            if let Some(sb) = follow(inode, offsets::INODE_SB) {
                record.dev = load(sb, offsets::SB_DEV)?;
                if load::<u64>(sb, offsets::SB_MAGIC)? == SOCKFS_MAGIC {
                    let socket: u64 = load(file, offsets::FILE_PRIVATE_DATA)?;
                    record.is_socket = u32::from(addresses(socket, &mut record.socket).is_some());
                }
            }
        }
        write(ctx, &record);
    }
    Some(())
}

/// Fills in what a `struct socket` says of itself. `struct sock` begins with its `sock_common`.
#[inline(always)]
fn addresses(socket: u64, to: &mut SocketRecord) -> Option<()> {
    to.kind = kernel::read::<u16>(socket, offsets::SOCKET_TYPE)?;
    let sk = kernel::read::<u64>(socket, offsets::SOCKET_SK)?;
    to.family = kernel::read::<u16>(sk, offsets::SOCK_FAMILY)?;
    to.state = u32::from(kernel::read::<u8>(sk, offsets::SOCK_STATE)?);
    if to.family == AF_INET || to.family == AF_INET6 {
        to.local_port = kernel::read::<u16>(sk, offsets::SOCK_NUM)?;
        to.remote_port = u16::from_be(kernel::read::<u16>(sk, offsets::SOCK_DPORT)?);
    }
    if to.family == AF_INET {
        to.local[..4].copy_from_slice(&kernel::read::<[u8; 4]>(sk, offsets::SOCK_LOCAL4)?);
        to.remote[..4].copy_from_slice(&kernel::read::<[u8; 4]>(sk, offsets::SOCK_REMOTE4)?);
    }
    if to.family == AF_INET6 {
        to.local = kernel::read::<[u8; 16]>(sk, offsets::SOCK_LOCAL6)?;
        to.remote = kernel::read::<[u8; 16]>(sk, offsets::SOCK_REMOTE6)?;
    }
    Some(())
}

/// Scheduler state; the field was renamed in 5.14.
///
/// # Safety
/// `task` is a non-null typed task.
#[inline(always)]
unsafe fn state(task: Typed) -> u32 {
    // SAFETY: as required.
    unsafe { load::<u32>(task, offsets::TASK_STATE).or_else(|| load(task, offsets::TASK_STATE_BEFORE_5_14)) }
        .unwrap_or(0)
}

/// Resident pages of the task's memory: an array of atomics before 6.2, of per-CPU counters since.
///
/// # Safety
/// `task` is a non-null typed task.
#[inline(always)]
unsafe fn resident(task: Typed) -> Option<u64> {
    // SAFETY: as required.
    let mm = unsafe { follow(task, offsets::TASK_MM)? };
    // Not plain loads: 5.10 refuses one into an array of a typedef.
    let counts = mm as u64 + maps::offset(offsets::MM_RSS_STAT_COUNT)? as u64;
    let pages: i64 = match maps::offset(offsets::MM_RSS_STAT_STRIDE) {
        Some(PERCPU_COUNTER) => {
            const STEP: usize = PERCPU_COUNTER / size_of::<i64>();
            let words = kernel::read_at::<[i64; 3 * STEP + 1]>(counts)?;
            RESIDENT.map(|kind| words[kind * STEP].max(0)).iter().sum()
        }
        Some(_) => return None,
        None => {
            let words = kernel::read_at::<[i64; 4]>(counts)?;
            RESIDENT.map(|kind| words[kind].max(0)).iter().sum()
        }
    };
    Some(pages as u64)
}

/// Set bits of the table's `open_fds`, and `FLAG_FDS_TRUNCATED` if it is larger than the bound.
///
/// # Safety
/// `files` is a non-null typed `files_struct`.
#[inline(always)]
unsafe fn count_fds(files: Typed) -> Option<(u32, u32)> {
    // SAFETY: `fdt` is never null; the iterator holds the RCU read lock that keeps it.
    let fdt = unsafe { follow(files, offsets::FILES_FDT)? };
    // SAFETY: as above.
    let max_fds = unsafe { load::<u32>(fdt, offsets::FDT_MAX_FDS)? };
    // Not a plain load: since 6.17 that yields a pointer, which a global function does not take.
    let bitmap = kernel::read::<u64>(fdt as u64, offsets::FDT_OPEN_FDS)?;
    let words = u64::from(max_fds) / 64;
    // Most tables have 64 or 256 slots.
    if words == 1 {
        return Some((kernel::read_at::<u64>(bitmap)?.count_ones(), 0));
    }
    if words == 4 {
        let [a, b, c, d] = kernel::read_at::<[u64; 4]>(bitmap)?;
        return Some((a.count_ones() + b.count_ones() + c.count_ones() + d.count_ones(), 0));
    }
    let fds = plumb_count_table(bitmap, words);
    if fds == FAULT {
        return None;
    }
    let bound = u64::from(BITMAP_CALLS * BITMAP_WORDS);
    Some((fds as u32, if words > bound { FLAG_FDS_TRUNCATED } else { 0 }))
}

/// Set bits of a bitmap at a kernel address, as far as the bound goes; `FAULT` if it cannot be read.
///
/// Like the function it calls it is global: verified once, for any arguments. Inlined, its loop would be
/// verified anew for each way the caller's branches can lead to it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn plumb_count_table(bitmap: u64, words: u64) -> u64 {
    let mut fds = 0;
    for call in 0..u64::from(BITMAP_CALLS) {
        // No branch but these in the loop, and numbers that the verifier knows: 5.10 follows every way
        // through every round.
        let done = call * u64::from(BITMAP_WORDS);
        if done >= words {
            break;
        }
        let bits = plumb_count_bits(bitmap + done * 8, words - done);
        if bits == FAULT {
            return FAULT;
        }
        fds += bits;
    }
    fds
}

const FAULT: u64 = u64::MAX;

/// Set bits among the first `BITMAP_WORDS` of `words` words at a kernel address, `FAULT` if they cannot be
/// read.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn plumb_count_bits(address: u64, words: u64) -> u64 {
    let words = words.min(u64::from(BITMAP_WORDS));
    let Some(scratch) = maps::SCRATCH.get_ptr_mut(0) else { return FAULT };
    let scratch = scratch.cast::<u64>();
    // SAFETY: `words` fit into the scratch value.
    let status = unsafe { bpf_probe_read_kernel(scratch.cast(), (words * 8) as u32, address as *const _) };
    if status != 0 {
        return FAULT;
    }
    let mut bits = 0;
    for i in 0..BITMAP_WORDS as usize {
        if i as u64 >= words {
            break;
        }
        // SAFETY: `i` is below the number of words.
        bits += u64::from(unsafe { core::ptr::read_volatile(scratch.add(i)) }.count_ones());
    }
    bits
}

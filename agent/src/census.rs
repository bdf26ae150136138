//! The threads of a process that makes too many: how many of which type, how old they are, and where some of them
//! are blocked.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    sync::Arc,
};

use plumb_common::{
    limits::STACK_BYTES,
    task::{ProcKey, ThreadRecord},
};

use crate::{
    clock,
    kernel::Kernel,
    left::{self, Doings, Look},
    stacks::Stack,
    symbolise::RawStack,
    text,
    thread_type::thread_type,
};

/// Types that are told apart.
const MAX_TYPES: usize = 20;
/// Threads of a leak that are looked at.
pub(crate) const MAX_BLOCKED: usize = 8;
/// `TASK_RUNNING`, include/linux/sched.h: such a thread is not where it entered the kernel last.
const RUNNING: u32 = 0;

/// Threads with one name but for a number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ThreadType {
    pub name: String,
    pub count: u32,
    /// When the oldest, the median and the newest of them started, nanoseconds since boot.
    pub started: [u64; 3],
}

/// A thread and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Blocked<S> {
    pub tid: u32,
    pub name: String,
    pub started: u64,
    /// It runs, or waits for a CPU: it is not where it entered the kernel last.
    pub is_running: bool,
    /// The kernel function in which it waits (/proc/PID/task/TID/wchan); empty for one that runs.
    pub wait_channel: String,
    pub stack: S,
}

/// The threads of one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Census<S> {
    /// The most frequent first.
    pub types: Vec<ThreadType>,
    pub blocked: Vec<Blocked<S>>,
}

/// With stacks in words; `None` for a thread that runs or cannot be read.
pub(crate) type Named = Census<Option<Arc<Stack>>>;
/// As copied.
pub(crate) type Copied = Census<Option<RawStack>>;

impl Copied {
    /// Counts all threads, and looks where those of `wanted` are, of which there are few.
    pub(crate) fn take(process: ProcKey, threads: &[ThreadRecord], wanted: &[u32]) -> Self {
        let is_wanted = |thread: &&ThreadRecord| wanted.contains(&thread.tid) && thread.exit_state == 0;
        let memory = File::open(format!("/proc/{}/mem", process.tgid)).ok();
        let blocked = threads.iter().filter(is_wanted).map(|thread| {
            let folder = format!("/proc/{}/task/{}", process.tgid, thread.tid);
            let is_asleep = thread.state != RUNNING && thread.sp != 0;
            let wait = fs::read(format!("{folder}/wchan")).ok().filter(|name| is_asleep && name != b"0");
            Blocked {
                tid: thread.tid,
                name: text::terminated(&thread.comm),
                started: thread.start_boottime,
                is_running: thread.state == RUNNING,
                wait_channel: wait.map(|name| text::printable(&name)).unwrap_or_default(),
                stack: memory.as_ref().filter(|_| is_asleep).map(|memory| RawStack {
                    ip: thread.ip,
                    sp: thread.sp,
                    bp: thread.bp,
                    stack: above(memory, thread.sp),
                }),
            }
        });
        let mut types = types(threads.iter());
        types.truncate(MAX_TYPES);
        Self { types, blocked: blocked.collect() }
    }
}

impl<S> Census<S> {
    /// The same with other stacks.
    pub(crate) fn map<T>(self, stacks: impl FnOnce(Vec<S>) -> Vec<T>) -> Census<T> {
        let (heads, copied): (Vec<_>, Vec<S>) = self
            .blocked
            .into_iter()
            .map(|Blocked { tid, name, started, is_running, wait_channel, stack }| {
                (Blocked { tid, name, started, is_running, wait_channel, stack: () }, stack)
            })
            .unzip();
        let blocked = heads.into_iter().zip(stacks(copied)).map(|(head, stack)| {
            let Blocked { tid, name, started, is_running, wait_channel, .. } = head;
            Blocked { tid, name, started, is_running, wait_channel, stack }
        });
        Census { types: self.types, blocked: blocked.collect() }
    }
}

/// In which /proc tells when a process was started, nanoseconds: `USER_HZ` is 100.
const TICK: u64 = 10_000_000;

/// Looks at the threads of the process that has this number and was started then, in 1/100 s since boot; `None` if there
/// is none. Those that have done something are looked at first.
pub(crate) fn look(
    kernel: &mut Kernel,
    (pid, start_ticks): (u32, u64),
    doings: Option<&Doings>,
) -> io::Result<Option<Look<Option<RawStack>>>> {
    let threads = kernel.threads(ProcKey::new(pid, 0))?;
    let leader = threads.iter().find(|thread| thread.tid == pid);
    let process = match leader {
        Some(leader) => ProcKey::new(pid, leader.start_boottime),
        // It has exited, and others of its threads have not.
        None => match kernel.processes()?.iter().find(|record| record.key.tgid == pid) {
            Some(record) => record.key,
            None => return Ok(None),
        },
    };
    if process.start_boottime / TICK != start_ticks {
        return Ok(None);
    }
    let there = threads.iter().filter(|thread| thread.exit_state == 0);
    let comm = leader.or(threads.first()).map(|thread| text::terminated(&thread.comm));
    let wanted = left::wanted(&threads, doings);
    let mut census = Copied::take(process, &threads, &wanted);
    // Whoever keeps fewer keeps those that tell most.
    census.blocked.sort_by_key(|thread| wanted.iter().position(|tid| *tid == thread.tid));
    Ok(Some(Look {
        process,
        comm: comm.unwrap_or_default(),
        count: there.count() as u32,
        census,
        at: clock::boottime(),
    }))
}

/// What can be read of a stack, from its pointer up.
fn above(memory: &File, sp: u64) -> Vec<u8> {
    let mut stack = vec![0; STACK_BYTES[1]];
    // A stack that ends before is read in part.
    let read = memory.read_at(&mut stack, sp).unwrap_or(0);
    stack.truncate(read);
    stack
}

/// How many threads of each type began before `old`, nanoseconds since boot.
#[must_use]
pub(crate) fn older_than(old: u64, threads: &[ThreadRecord]) -> Vec<(String, u32)> {
    let older = threads.iter().filter(|thread| thread.start_boottime < old);
    types(older).into_iter().map(|kind| (kind.name, kind.count)).collect()
}

/// The most frequent first.
fn types<'a>(threads: impl Iterator<Item = &'a ThreadRecord>) -> Vec<ThreadType> {
    let mut starts: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for thread in threads.filter(|thread| thread.exit_state == 0) {
        let name = text::terminated(&thread.comm);
        starts.entry(thread_type(&name).to_owned()).or_default().push(thread.start_boottime);
    }
    let mut types: Vec<_> = starts
        .into_iter()
        .map(|(name, mut starts)| {
            starts.sort_unstable();
            let started = [starts[0], starts[starts.len() / 2], starts[starts.len() - 1]];
            ThreadType { name, count: starts.len() as u32, started }
        })
        .collect();
    types.sort_by(|a, b| b.count.cmp(&a.count).then(a.name.cmp(&b.name)));
    types
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;

    use super::*;

    fn thread(tid: u32, name: &str, start: u64) -> ThreadRecord {
        let mut record = ThreadRecord::zeroed();
        (record.tid, record.start_boottime) = (tid, start);
        record.comm[..name.len()].copy_from_slice(name.as_bytes());
        record
    }

    #[test]
    fn threads_are_counted_by_type_with_their_ages() {
        let threads =
            [thread(1, "main", 1), thread(2, "io-1", 9), thread(3, "io-2", 5), thread(4, "io-12", 7)];
        let expected = [("io", 3, [5, 7, 9]), ("main", 1, [1, 1, 1])];
        let found = types(threads.iter());
        let found: Vec<_> = found.iter().map(|kind| (kind.name.as_str(), kind.count, kind.started)).collect();
        assert_eq!(found, expected);
        assert_eq!(older_than(7, &threads), [("io".to_owned(), 1), ("main".to_owned(), 1)]);
    }

    #[test]
    fn stacks_are_put_to_their_threads() {
        let blocked = |tid, stack| Blocked {
            tid,
            name: String::new(),
            started: 0,
            is_running: false,
            wait_channel: String::new(),
            stack,
        };
        let census = Census { types: Vec::new(), blocked: vec![blocked(1, 10), blocked(2, 20)] };
        let named = census.map(|stacks| stacks.iter().map(|stack| stack + 1).collect());
        assert_eq!(named.blocked, [blocked(1, 11), blocked(2, 21)]);
    }
}

//! What leaks: what came since a process became suspect, or was there then, and is still held. What a program
//! opens and closes again is in one list only.

use std::{
    collections::{HashMap, VecDeque},
    io,
    path::Path,
};

use crate::{
    clock,
    detect::{
        Confirmation, Example, Resource,
        cohorts::{Cohorts, Holdings, identity},
    },
    files::OpenFile,
    kernel::Kernel,
    pids, text,
    thread_type::thread_type,
};
use plumb_common::{
    file::FdRecord,
    task::{ProcKey, ThreadRecord},
};

/// Suspects whose holdings are remembered at the same time; with 4,096 identities each this bounds memory at a
/// few MiB.
const MAX_SUSPECTS: usize = 64;
/// Survivors that are put into words.
const MAX_DESCRIBED: usize = 256;

/// What suspects have held since they became suspect.
#[derive(Debug, Default)]
pub(crate) struct Evidence {
    remembered: HashMap<(ProcKey, Resource), Cohorts>,
}

impl Evidence {
    /// Remembers what a new suspect holds. Beyond `MAX_SUSPECTS` nothing is kept: such a suspect is judged
    /// by its trend alone.
    pub(crate) fn remember(
        &mut self,
        kernel: &mut Kernel,
        key: ProcKey,
        resource: Resource,
    ) -> io::Result<()> {
        self.remembered.remove(&(key, resource));
        if self.remembered.len() < MAX_SUSPECTS {
            let mut cohorts = Cohorts::default();
            look(&mut cohorts, &list(kernel, key, resource, |_| false)?);
            self.remembered.insert((key, resource), cohorts);
        }
        Ok(())
    }

    /// Forgets a process that is no longer suspect.
    pub(crate) fn forget(&mut self, key: ProcKey, resource: Resource) {
        self.remembered.remove(&(key, resource));
    }

    /// Looks up what of it is still held, and puts the newest of that into words, as many as exceed the
    /// baseline: what was there before the growth is not the leak.
    pub(crate) fn confirm(
        &mut self,
        kernel: &mut Kernel,
        (key, resource): (ProcKey, Resource),
        baseline: u32,
    ) -> io::Result<Confirmation> {
        let cohorts = self.remembered.get_mut(&(key, resource));
        let has_lasted = |identity| cohorts.as_ref().is_none_or(|cohorts| cohorts.contains(identity));
        let held = list(kernel, key, resource, has_lasted)?;
        let holdings = cohorts.map(|cohorts| look(cohorts, &held));
        let room = match resource {
            Resource::Thread => pids::room(Path::new("/proc"), Path::new("/sys/fs/cgroup"), key.tgid),
            Resource::Fd => None,
        };
        let (examples, of, sampled) = held.examples(baseline);
        Ok(Confirmation { holdings, examples, of, sampled, room, functions: Vec::new() })
    }
}

fn look(cohorts: &mut Cohorts, held: &Held) -> Holdings {
    cohorts.look(clock::boottime(), held.identities.iter().copied())
}

/// Something a process holds.
enum Holding {
    File(FdRecord),
    Thread(ThreadRecord),
}

impl Holding {
    fn identity(&self) -> u64 {
        match self {
            // The kernel uses the address of a closed file again, often for the same number; the inode of a
            // socket or a pipe is another one then.
            Self::File(record) => identity([u64::from(record.fd), record.file, record.inode]),
            Self::Thread(record) => identity([u64::from(record.tid), record.start_boottime, 0]),
        }
    }

    /// Kind and words.
    fn words(&self) -> (String, String) {
        match self {
            Self::File(record) => {
                let file = OpenFile::describe(record);
                (file.kind, file.target)
            }
            Self::Thread(record) => ("thread".to_owned(), text::terminated(&record.comm)),
        }
    }
}

/// What a process holds.
#[derive(Default)]
struct Held {
    identities: Vec<u64>,
    /// How many of it are wanted, and the newest of these, newest first.
    wanted: usize,
    newest: VecDeque<Holding>,
}

impl Held {
    /// Takes the next newer one.
    fn push(&mut self, holding: Holding, wanted: impl Fn(u64) -> bool) {
        let identity = holding.identity();
        self.identities.push(identity);
        if wanted(identity) {
            self.wanted += 1;
            self.newest.push_front(holding);
            self.newest.truncate(MAX_DESCRIBED);
        }
    }

    /// What has come since the baseline, how many that are, and of how many of the newest the examples are if not of all.
    fn examples(&self, baseline: u32) -> (Vec<Example>, u32, Option<u32>) {
        let grown = self.wanted.saturating_sub(baseline as usize).max(1);
        let known = self.newest.len();
        let sampled = (grown > known && known > 0).then_some(known as u32);
        let of = grown.min(self.wanted) as u32;
        (summarise(self.newest.iter().take(grown).map(Holding::words)), of, sampled)
    }
}

/// Goes through all that a process holds, the oldest first.
fn list(
    kernel: &mut Kernel,
    key: ProcKey,
    resource: Resource,
    wanted: impl Fn(u64) -> bool,
) -> io::Result<Held> {
    let mut held = Held::default();
    match resource {
        // A leak takes the lowest free number again and again: the highest fds are its newest.
        Resource::Fd => kernel.files(key, |record| held.push(Holding::File(*record), &wanted))?,
        Resource::Thread => {
            let mut threads = kernel.threads(key)?;
            threads.sort_unstable_by_key(|thread| thread.start_boottime);
            threads.into_iter().for_each(|thread| held.push(Holding::Thread(thread), &wanted));
        }
    }
    Ok(held)
}

/// Counts equal ones, the most frequent first. Threads whose names differ by a number are of one type.
fn summarise(described: impl Iterator<Item = (String, String)>) -> Vec<Example> {
    let mut examples: Vec<Example> = Vec::new();
    for (kind, what) in described {
        let is_of_type = |name: &str| kind == "thread" && thread_type(name) == thread_type(&what);
        let is_same =
            |of: &&mut Example| of.kind == kind && (of.what == what || is_of_type(of.what.as_str()));
        match examples.iter_mut().find(is_same) {
            Some(example) => {
                if example.what != what {
                    thread_type(&what).clone_into(&mut example.what);
                }
                example.count += 1;
            }
            None => examples.push(Example { what, kind, count: 1 }),
        }
    }
    examples.sort_by_key(|example| std::cmp::Reverse(example.count));
    examples
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;

    use super::*;

    fn thread(tid: u32, start: u64, name: &[u8]) -> ThreadRecord {
        let mut record = ThreadRecord::zeroed();
        (record.tid, record.start_boottime) = (tid, start);
        record.comm[..name.len()].copy_from_slice(name);
        record
    }

    fn held(threads: impl IntoIterator<Item = ThreadRecord>, cohorts: Option<&Cohorts>) -> Held {
        let mut held = Held::default();
        for holding in threads.into_iter().map(Holding::Thread) {
            held.push(holding, |identity| cohorts.is_none_or(|cohorts| cohorts.contains(identity)));
        }
        held
    }

    #[test]
    fn only_survivors_are_examples_and_what_was_there_before_the_growth_is_not() {
        let workers = (10..14).map(|tid| thread(tid, u64::from(tid), b"worker"));
        let leaked = [20, 21].map(|tid| thread(tid, u64::from(tid), b"leaky"));
        let before = workers.clone().chain(leaked).chain([thread(22, 22, b"passing")]);
        let mut cohorts = Cohorts::default();
        look(&mut cohorts, &held(before, None));
        let now = held(workers.chain(leaked).chain([thread(22, 40, b"passing")]), Some(&cohorts));
        assert_eq!(look(&mut cohorts, &now).kept, 6.0, "thread 22 is another one than before");
        let expected = Example { what: "leaky".to_owned(), kind: "thread".to_owned(), count: 2 };
        assert_eq!(now.examples(4), (vec![expected], 2, None));
    }

    #[test]
    fn without_a_memory_there_are_examples_all_the_same() {
        assert_eq!(held([thread(1, 1, b"main")], None).examples(0).0.len(), 1);
    }

    #[test]
    fn what_is_more_than_is_looked_at_says_of_how_many_it_is() {
        let many = held((1..=300).map(|tid| thread(tid, u64::from(tid), b"leaky")), None);
        let of = |baseline| {
            let (examples, of, sampled) = many.examples(baseline);
            (examples[0].count, of, sampled)
        };
        assert_eq!((of(4), of(44), of(100)), ((256, 296, Some(256)), (256, 256, None), (200, 200, None)));
    }

    #[test]
    fn threads_that_differ_by_a_number_are_of_one_type() {
        let named = |names: &[&str]| {
            let threads = names.iter().enumerate();
            let threads = threads.map(|(tid, name)| thread(tid as u32, tid as u64, name.as_bytes()));
            let examples = held(threads, None).examples(0).0.into_iter();
            examples.map(|example| (example.what, example.count)).collect::<Vec<_>>()
        };
        let of = |what: &str, count| (what.to_owned(), count);
        assert_eq!(named(&["ship-1", "main", "ship-2", "ship-3"]), [of("ship", 3), of("main", 1)]);
        assert_eq!(named(&["w-1", "w-1"]), [of("w-1", 2)]);
    }
}

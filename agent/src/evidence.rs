//! What leaks: the fds or threads that were there when a process became suspect and still are when its
//! growth is confirmed. What a program opens and closes again is in one list only.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
};

use crate::{
    detect::{Confirmation, Example, Resource},
    files::OpenFile,
    kernel::Kernel,
    text,
};
use plumb_common::{
    file::FdRecord,
    task::{ProcKey, ThreadRecord},
};

/// Suspects whose holdings are remembered at the same time.
const MAX_SUSPECTS: usize = 64;
/// The newest identities kept per process; with `MAX_SUSPECTS` this bounds memory at a few MiB.
const MAX_KEPT: usize = 4096;
/// Survivors that are put into words.
const MAX_DESCRIBED: u32 = 256;
/// Examples per finding.
const MAX_EXAMPLES: usize = 5;

/// Tells one open file or thread from the next that gets its number.
type Identity = (u32, u64);

/// What a suspect held: all of it, or the newest as a sample.
#[derive(Debug)]
struct Memory {
    sample: HashSet<Identity>,
    /// How many it held in all.
    held: u32,
}

/// What suspects held when they became suspect.
#[derive(Debug, Default)]
pub(crate) struct Evidence {
    remembered: HashMap<(ProcKey, Resource), Memory>,
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
        if self.remembered.len() < MAX_SUSPECTS || self.remembered.contains_key(&(key, resource)) {
            let held = list(kernel, key, resource, |_| true)?;
            let sample = held.newest.iter().map(Holding::identity).collect();
            self.remembered.insert((key, resource), Memory { sample, held: held.count });
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
        let memory = self.remembered.get(&(key, resource));
        // All that is held now is looked at: what a fast leak held at suspicion is not among its newest.
        let survived = |identity| memory.is_none_or(|memory| memory.sample.contains(&identity));
        Ok(confirm(&list(kernel, key, resource, survived)?, memory, baseline))
    }
}

/// `still` is what of the sample is still held.
fn confirm(still: &Held, memory: Option<&Memory>, baseline: u32) -> Confirmation {
    // What holds for the sample holds for the rest.
    let survivors = memory.map(|memory| {
        let sampled = memory.sample.len().max(1) as u64;
        u32::try_from(u64::from(still.count) * u64::from(memory.held) / sampled).unwrap_or(u32::MAX)
    });
    let grown = survivors.unwrap_or(still.count).saturating_sub(baseline).clamp(1, MAX_DESCRIBED);
    let examples = summarise(still.newest.iter().take(grown as usize).map(Holding::words));
    Confirmation { survivors, examples }
}

/// Something a process holds.
enum Holding {
    File(FdRecord),
    Thread(ThreadRecord),
}

impl Holding {
    fn identity(&self) -> Identity {
        match self {
            Self::File(record) => (record.fd, record.file),
            Self::Thread(record) => (record.tid, record.start_boottime),
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

/// What a process holds of some kind: how many, and the newest of them, newest first.
#[derive(Default)]
struct Held {
    count: u32,
    newest: VecDeque<Holding>,
}

impl Held {
    /// Takes the next newer one.
    fn push(&mut self, holding: Holding) {
        self.count += 1;
        self.newest.push_front(holding);
        self.newest.truncate(MAX_KEPT);
    }
}

/// Goes through all that a process holds, the oldest first, and keeps what is wanted.
fn list(
    kernel: &mut Kernel,
    key: ProcKey,
    resource: Resource,
    wanted: impl Fn(Identity) -> bool,
) -> io::Result<Held> {
    let mut held = Held::default();
    let mut take = |holding: Holding| {
        if wanted(holding.identity()) {
            held.push(holding);
        }
    };
    match resource {
        // A leak takes the lowest free number again and again: the highest fds are its newest.
        Resource::Fd => kernel.files(key, |record| take(Holding::File(*record)))?,
        Resource::Thread => {
            let mut threads = kernel.threads(key)?;
            threads.sort_unstable_by_key(|thread| thread.start_boottime);
            threads.into_iter().map(Holding::Thread).for_each(take);
        }
    }
    Ok(held)
}

/// Counts equal ones, the most frequent first.
fn summarise(described: impl Iterator<Item = (String, String)>) -> Vec<Example> {
    let mut examples: Vec<Example> = Vec::new();
    for (kind, what) in described {
        match examples.iter_mut().find(|example| example.kind == kind && example.what == what) {
            Some(example) => example.count += 1,
            None => examples.push(Example { what, kind, count: 1 }),
        }
    }
    examples.sort_by_key(|example| std::cmp::Reverse(example.count));
    examples.truncate(MAX_EXAMPLES);
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

    fn held(threads: impl IntoIterator<Item = ThreadRecord>, memory: Option<&Memory>) -> Held {
        let mut held = Held::default();
        for holding in threads.into_iter().map(Holding::Thread) {
            if memory.is_none_or(|memory| memory.sample.contains(&holding.identity())) {
                held.push(holding);
            }
        }
        held
    }

    fn remembered(held: &Held) -> Memory {
        Memory { sample: held.newest.iter().map(Holding::identity).collect(), held: held.count }
    }

    #[test]
    fn only_survivors_are_examples_and_what_was_there_before_the_growth_is_not() {
        let workers = (10..14).map(|tid| thread(tid, u64::from(tid), b"worker"));
        let leaked = [20, 21].map(|tid| thread(tid, u64::from(tid), b"leaky"));
        let before = workers.clone().chain(leaked).chain([thread(22, 22, b"passing")]);
        let memory = remembered(&held(before, None));
        let now = workers.chain(leaked).chain([thread(22, 40, b"passing")]);
        let found = confirm(&held(now, Some(&memory)), Some(&memory), 4);
        assert_eq!(found.survivors, Some(6), "thread 22 is another one than before");
        let expected = Example { what: "leaky".to_owned(), kind: "thread".to_owned(), count: 2 };
        assert_eq!(found.examples, [expected]);
    }

    #[test]
    fn a_leak_that_is_faster_than_memory_is_long_is_confirmed_from_a_sample() {
        let leaked = |count| (0..count).map(|tid| thread(tid, u64::from(tid), b"leaky"));
        let memory = remembered(&held(leaked(30_000), None));
        assert_eq!((memory.sample.len(), memory.held), (MAX_KEPT, 30_000));
        let found = confirm(&held(leaked(60_000), Some(&memory)), Some(&memory), 0);
        assert_eq!(found.survivors, Some(30_000));
        assert_eq!(found.examples[0].count, MAX_DESCRIBED);
    }

    #[test]
    fn without_a_memory_there_are_examples_but_no_survivors() {
        let found = confirm(&held([thread(1, 1, b"main")], None), None, 0);
        assert_eq!((found.survivors, found.examples.len()), (None, 1));
    }
}

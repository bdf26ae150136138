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
/// The newest identities looked at per process; with `MAX_SUSPECTS` this bounds memory at 4 MiB.
const MAX_LISTED: usize = 4096;
/// Survivors that are put into words.
const MAX_DESCRIBED: u32 = 256;
/// Examples per finding.
const MAX_EXAMPLES: usize = 5;

/// Tells one open file or thread from the next that gets its number.
type Identity = (u32, u64);

/// What suspects held when they became suspect.
#[derive(Debug, Default)]
pub(crate) struct Evidence {
    remembered: HashMap<(ProcKey, Resource), HashSet<Identity>>,
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
            let held = Holdings::list(kernel, key, resource)?;
            self.remembered.insert((key, resource), held.identities().collect());
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
        let held = Holdings::list(kernel, key, resource)?;
        Ok(confirm(held, self.remembered.get(&(key, resource)), baseline))
    }
}

fn confirm(held: Holdings, known: Option<&HashSet<Identity>>, baseline: u32) -> Confirmation {
    let survived = |identity: &Identity| known.is_none_or(|known| known.contains(identity));
    let survivors = held.identities().filter(survived).count() as u32;
    let grown = survivors.saturating_sub(baseline).clamp(1, MAX_DESCRIBED);
    let examples = summarise(held.newest(survived, grown as usize));
    Confirmation { survivors: known.map(|_| survivors), examples }
}

/// The newest that a process holds, newest first.
enum Holdings {
    Files(Vec<FdRecord>),
    Threads(Vec<ThreadRecord>),
}

fn file_identity(record: &FdRecord) -> Identity {
    (record.fd, record.file)
}

fn thread_identity(record: &ThreadRecord) -> Identity {
    (record.tid, record.start_boottime)
}

impl Holdings {
    fn list(kernel: &mut Kernel, key: ProcKey, resource: Resource) -> io::Result<Self> {
        match resource {
            Resource::Fd => {
                // A leak takes the lowest free number again and again: the highest fds are its newest.
                let mut newest = VecDeque::with_capacity(MAX_LISTED);
                kernel.files(key, |record| {
                    if newest.len() == MAX_LISTED {
                        newest.pop_back();
                    }
                    newest.push_front(*record);
                })?;
                Ok(Self::Files(newest.into()))
            }
            Resource::Thread => {
                let mut threads = kernel.threads(key)?;
                threads.sort_unstable_by_key(|thread| std::cmp::Reverse(thread.start_boottime));
                threads.truncate(MAX_LISTED);
                Ok(Self::Threads(threads))
            }
        }
    }

    fn identities(&self) -> Box<dyn Iterator<Item = Identity> + '_> {
        match self {
            Self::Files(files) => Box::new(files.iter().map(file_identity)),
            Self::Threads(threads) => Box::new(threads.iter().map(thread_identity)),
        }
    }

    /// Kind and words of the newest that pass the test.
    fn newest(self, survived: impl Fn(&Identity) -> bool, limit: usize) -> Vec<(String, String)> {
        match self {
            Self::Files(files) => {
                let files = files.iter().filter(|file| survived(&file_identity(file))).take(limit);
                files.map(OpenFile::describe).map(|file| (file.kind, file.target)).collect()
            }
            Self::Threads(threads) => {
                let threads = threads.iter().filter(|thread| survived(&thread_identity(thread))).take(limit);
                threads.map(|thread| ("thread".to_owned(), text::terminated(&thread.comm))).collect()
            }
        }
    }
}

/// Counts equal ones, the most frequent first.
fn summarise(described: Vec<(String, String)>) -> Vec<Example> {
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

    #[test]
    fn only_survivors_are_examples_and_what_was_there_before_the_growth_is_not() {
        let mut threads: Vec<_> = (10..14).map(|tid| thread(tid, u64::from(tid), b"worker")).collect();
        threads.extend([thread(20, 20, b"leaky"), thread(21, 21, b"leaky"), thread(22, 40, b"passing")]);
        threads.reverse();
        let before: HashSet<_> = (10..14).chain(20..23).map(|tid| (tid, u64::from(tid))).collect();
        let found = confirm(Holdings::Threads(threads), Some(&before), 4);
        assert_eq!(found.survivors, Some(6), "thread 22 is another one than before");
        let expected = Example { what: "leaky".to_owned(), kind: "thread".to_owned(), count: 2 };
        assert_eq!(found.examples, [expected]);
    }

    #[test]
    fn without_a_memory_there_are_examples_but_no_survivors() {
        let found = confirm(Holdings::Threads(vec![thread(1, 1, b"main")]), None, 0);
        assert_eq!((found.survivors, found.examples.len()), (None, 1));
    }
}

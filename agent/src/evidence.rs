//! What leaks: the fds or threads that were there when a process became suspect and still are when it is
//! found leaking. What a program opens and closes again is in one list only.

use std::{
    collections::{HashMap, HashSet},
    io,
};

use plumb_common::{
    file::FdRecord,
    task::{ProcKey, ThreadRecord},
};
use serde::{Deserialize, Serialize};

use crate::{detect::Resource, files::OpenFile, kernel::Kernel, text};

/// Suspects whose holdings are remembered at the same time.
const MAX_SUSPECTS: usize = 64;
/// Identities remembered per suspect, and survivors that are put into words.
const MAX_REMEMBERED: usize = 65_536;
const MAX_DESCRIBED: usize = 256;
/// Examples per finding.
const MAX_EXAMPLES: usize = 5;

/// One kind of thing that leaks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Example {
    /// Path, addresses, anonymous kind, or thread name.
    pub what: String,
    /// `file`, `socket`, `eventfd`, …, or `thread`.
    pub kind: String,
    /// How many of the newest survivors look like this.
    pub count: u32,
}

/// Tells one open file or thread from the next that gets its number.
type Identity = (u32, u64);

/// What suspects held when they became suspect.
#[derive(Debug, Default)]
pub(crate) struct Evidence {
    remembered: HashMap<(ProcKey, Resource), HashSet<Identity>>,
}

impl Evidence {
    /// Remembers what a new suspect holds. Beyond `MAX_SUSPECTS` nothing is kept: the examples are then
    /// the newest of all there is.
    pub(crate) fn remember(
        &mut self,
        kernel: &mut Kernel,
        key: ProcKey,
        resource: Resource,
    ) -> io::Result<()> {
        if self.remembered.len() < MAX_SUSPECTS {
            let held = holdings(kernel, key, resource)?;
            self.remembered.insert((key, resource), held.identities().take(MAX_REMEMBERED).collect());
        }
        Ok(())
    }

    /// Forgets a process that is no longer suspect.
    pub(crate) fn forget(&mut self, key: ProcKey, resource: Resource) {
        self.remembered.remove(&(key, resource));
    }

    /// Looks up what leaks, the most frequent first.
    pub(crate) fn examples(
        &mut self,
        kernel: &mut Kernel,
        key: ProcKey,
        resource: Resource,
    ) -> io::Result<Vec<Example>> {
        let held = holdings(kernel, key, resource)?;
        let known = self.remembered.get(&(key, resource));
        let survived = |identity: &Identity| known.is_none_or(|known| known.contains(identity));
        Ok(summarise(held.newest_first(survived)))
    }
}

/// What a process holds now.
enum Holdings {
    Files(Vec<FdRecord>),
    Threads(Vec<ThreadRecord>),
}

fn holdings(kernel: &mut Kernel, key: ProcKey, resource: Resource) -> io::Result<Holdings> {
    match resource {
        Resource::Fd => kernel.files(key.tgid).map(Holdings::Files),
        Resource::Thread => kernel.threads(key.tgid).map(Holdings::Threads),
    }
}

fn file_identity(record: &FdRecord) -> Identity {
    (record.fd, record.file)
}

fn thread_identity(record: &ThreadRecord) -> Identity {
    (record.tid, record.start_boottime)
}

impl Holdings {
    fn identities(&self) -> Box<dyn Iterator<Item = Identity> + '_> {
        match self {
            Self::Files(files) => Box::new(files.iter().rev().map(file_identity)),
            Self::Threads(threads) => Box::new(threads.iter().rev().map(thread_identity)),
        }
    }

    /// Kind and words of the newest that pass the test. A leak takes the lowest free number again and
    /// again, so the highest fds are its newest.
    fn newest_first(self, survived: impl Fn(&Identity) -> bool) -> Vec<(String, String)> {
        match self {
            Self::Files(files) => {
                let files = files.iter().rev().filter(|file| survived(&file_identity(file)));
                files
                    .take(MAX_DESCRIBED)
                    .map(OpenFile::describe)
                    .map(|file| (file.kind, file.target))
                    .collect()
            }
            Self::Threads(mut threads) => {
                threads.sort_unstable_by_key(|thread| std::cmp::Reverse(thread.start_boottime));
                let threads = threads.iter().filter(|thread| survived(&thread_identity(thread)));
                threads
                    .take(MAX_DESCRIBED)
                    .map(|thread| ("thread".to_owned(), text::terminated(&thread.comm)))
                    .collect()
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
    fn only_survivors_are_examples_and_the_most_frequent_come_first() {
        let held = Holdings::Threads(vec![
            thread(1, 10, b"main"),
            thread(2, 20, b"leaky"),
            thread(3, 30, b"leaky"),
            thread(4, 40, b"passing"),
        ]);
        let before: HashSet<_> = [(1, 10), (2, 20), (3, 30), (4, 35)].into();
        let examples = summarise(held.newest_first(|identity| before.contains(identity)));
        let names: Vec<_> = examples.iter().map(|example| (example.what.as_str(), example.count)).collect();
        assert_eq!(names, [("leaky", 2), ("main", 1)], "thread 4 is another one than before");
    }
}

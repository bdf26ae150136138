//! The files that code comes from, shared by all processes: which are open, and what has been found out about them.

use std::{os::fd::OwnedFd, sync::Arc};

use foldhash::{HashMap, HashMapExt, HashSet};

use super::process::FileKey;

/// Files held open at most.
const MAX_OPEN: usize = 128;
/// Files remembered at most.
const MAX_KNOWN: usize = 8192;

/// How much of a file may be parsed; it only ever becomes less, until the file is another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trust {
    Full,
    /// Its debug information did harm.
    NoDebug,
    /// The rest did, too, or it cannot be read.
    Sealed,
}

#[derive(Debug)]
pub(super) struct Module {
    /// As the process has it, made safe to print.
    pub(super) path: Arc<str>,
    pub(super) key: FileKey,
    pub(super) trust: Trust,
    pub(super) build_id: Option<Arc<str>>,
    file: Option<Arc<OwnedFd>>,
    used: u64,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    modules: HashMap<u32, Module>,
    by_key: HashMap<FileKey, u32>,
    /// The newest id; 0 is none.
    newest: u32,
    clock: u64,
}

impl Table {
    pub(super) fn new() -> Self {
        Self { modules: HashMap::new(), ..Self::default() }
    }

    /// The module of a file; without one it is known by name only.
    pub(super) fn add(&mut self, key: FileKey, path: &Arc<str>, file: Option<OwnedFd>) -> u32 {
        if let Some(id) = self.by_key.get(&key).copied() {
            if let Some(file) = file {
                self.keep_open(id, Arc::new(file));
            }
            return id;
        }
        if self.modules.len() >= MAX_KNOWN
            && let Some(oldest) = self.modules.iter().min_by_key(|(_, module)| module.used).map(|(id, _)| *id)
            && let Some(module) = self.modules.remove(&oldest)
        {
            self.by_key.remove(&module.key);
        }
        self.newest += 1;
        self.clock += 1;
        let trust = if file.is_some() { Trust::Full } else { Trust::Sealed };
        let module =
            Module { path: Arc::clone(path), key, trust, build_id: None, file: None, used: self.clock };
        self.modules.insert(self.newest, module);
        self.by_key.insert(key, self.newest);
        if let Some(file) = file {
            self.keep_open(self.newest, Arc::new(file));
        }
        self.newest
    }

    pub(super) fn get(&self, id: u32) -> Option<&Module> {
        self.modules.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: u32) -> Option<&mut Module> {
        self.modules.get_mut(&id)
    }

    /// The open file of a module.
    pub(super) fn file(&mut self, id: u32) -> Option<Arc<OwnedFd>> {
        self.clock += 1;
        let module = self.modules.get_mut(&id)?;
        module.used = self.clock;
        module.file.clone()
    }

    /// Keeps a file open, and closes the one that was not used for longest when there are too many.
    pub(super) fn keep_open(&mut self, id: u32, file: Arc<OwnedFd>) {
        let mut open: Vec<_> =
            self.modules.iter().filter(|(_, m)| m.file.is_some()).map(|(id, m)| (m.used, *id)).collect();
        if open.len() >= MAX_OPEN {
            open.sort_unstable();
            for (_, least) in &open[..=open.len() - MAX_OPEN] {
                if let Some(module) = self.modules.get_mut(least) {
                    module.file = None;
                }
            }
        }
        self.clock += 1;
        if let Some(module) = self.modules.get_mut(&id) {
            (module.file, module.used) = (Some(file), self.clock);
        }
    }

    /// Closes the files of all modules but these.
    pub(super) fn close_others(&mut self, used: &HashSet<u32>) {
        for module in self.modules.iter_mut().filter(|(id, _)| !used.contains(id)).map(|(_, module)| module) {
            module.file = None;
        }
    }

    /// Trusts a module less.
    pub(super) fn blame(&mut self, id: u32, to: Trust) {
        if let Some(module) = self.modules.get_mut(&id)
            && module.trust != Trust::Sealed
        {
            module.trust = to;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn key(inode: u64) -> FileKey {
        FileKey { device: 1, inode, size: 1, modified: (0, 0) }
    }

    #[test]
    fn files_are_closed_by_age_and_modules_stay() {
        let mut table = Table::new();
        let path: Arc<str> = "x".into();
        let open = || Some(OwnedFd::from(File::open("/dev/null").unwrap()));
        let first = table.add(key(0), &path, open());
        for inode in 1..300 {
            table.add(key(inode), &path, open());
            assert!(table.file(first).is_some(), "in use");
        }
        let open_files = table.modules.values().filter(|module| module.file.is_some()).count();
        assert_eq!(open_files, MAX_OPEN);
        assert_eq!(table.modules.len(), 300);
        assert_eq!(table.add(key(0), &path, None), first, "the same file is the same module");
        table.close_others(&HashSet::from_iter([first]));
        assert!(table.file(first).is_some());
        assert_eq!(table.modules.values().filter(|module| module.file.is_some()).count(), 1);
    }

    #[test]
    fn trust_is_lost_for_good() {
        let mut table = Table::new();
        let id = table.add(key(1), &"x".into(), Some(File::open("/dev/null").unwrap().into()));
        table.blame(id, Trust::NoDebug);
        assert_eq!(table.get(id).unwrap().trust, Trust::NoDebug);
        table.blame(id, Trust::Sealed);
        table.blame(id, Trust::NoDebug);
        assert_eq!(table.get(id).unwrap().trust, Trust::Sealed);
        let other = table.add(FileKey { size: 2, ..key(1) }, &"x".into(), None);
        assert_ne!(other, id, "a changed file is another");
    }
}

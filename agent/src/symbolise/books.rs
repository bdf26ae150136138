//! What is remembered of processes and of their files, and what the worker is given of it.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use foldhash::{HashMap, HashMapExt};
use plumb_common::task::ProcKey;
use rustix::fs::makedev;

use super::{
    Place, Stack,
    maps::Maps,
    modules::{Table, Trust},
    process::{self, FileKey, Mapped},
    protocol::{Content, Mapping, Walk},
    told,
    worker::Library,
};
use crate::text;

/// Looking at the mappings again costs at most one part in so many of the time.
const REFRESH_SHARE: u32 = 20;
/// Mappings that are older are looked at again when stacks are to be walked.
const AGE: Duration = Duration::from_secs(1);
/// Bytes of code shown to the worker.
const CODE: usize = 16;

/// Processes and files.
pub(super) struct Books {
    pub(super) table: Table,
    pub(super) processes: HashMap<ProcKey, Process>,
    debug_files: PathBuf,
    pub(super) clock: u64,
    /// Mappings that are only old are not looked at again before.
    not_before: Instant,
}

/// What is remembered of a process.
pub(super) struct Process {
    pub(super) maps: Arc<Maps>,
    /// When its mappings were looked at; and they are not looked at again before.
    pub(super) looked: Instant,
    pub(super) not_before: Instant,
    /// Of an image that is told of: when its process was made, in nanoseconds since boot.
    pub(super) made: Option<u64>,
    pub(super) perf_map: Option<Arc<OwnedFd>>,
    /// Files of it that have slowed down or killed the worker.
    pub(super) harm: u32,
    pub(super) used: u64,
}

impl Process {
    pub(super) fn new(maps: Arc<Maps>, used: u64) -> Self {
        let now = Instant::now();
        Self { maps, looked: now, not_before: now, made: None, perf_map: None, harm: 0, used }
    }

    pub(super) fn perf_map(&mut self, key: ProcKey) -> Option<Arc<OwnedFd>> {
        // It may be another by now; the one that is open lasts longer than the process.
        let map = if told::is_told(key) {
            told::open_perf_map(key, self.made)
        } else {
            process::open_perf_map(key).ok()
        };
        self.perf_map = map.map(Arc::new).or(self.perf_map.take());
        let map = self.perf_map.clone()?;
        rustix::fs::seek(&*map, rustix::fs::SeekFrom::Start(0)).ok()?;
        Some(map)
    }
}

impl Books {
    pub(super) fn new(debug_files: PathBuf) -> Self {
        let (table, processes) = (Table::new(), HashMap::new());
        Self { table, processes, debug_files, clock: 0, not_before: Instant::now() }
    }

    /// Reads the mappings of a process and opens its files.
    pub(super) fn look(&mut self, key: ProcKey) {
        // What is told of is not in /proc under its key. What has ended has no mappings any more.
        match process::mappings(key) {
            Ok(mapped) if !(mapped.is_empty() && self.processes.contains_key(&key)) => self.take(key, mapped),
            _ => {}
        }
    }

    fn take(&mut self, key: ProcKey, mapped: Vec<Mapped>) {
        let begun = Instant::now();
        self.clock += 1;
        let mut seen: Vec<((u32, u32), u64, Content)> = Vec::new();
        let mut contents = Vec::with_capacity(mapped.len());
        for one in &mapped {
            let known =
                seen.iter().find(|known| one.inode != 0 && (known.0, known.1) == (one.device, one.inode));
            let content = match known {
                Some(known) => known.2,
                None => self.content(key, one),
            };
            if known.is_none() {
                seen.push((one.device, one.inode, content));
            }
            contents.push(content);
        }
        self.make_room(key);
        let not_before = Instant::now() + begun.elapsed() * REFRESH_SHARE;
        let before = self.processes.remove(&key);
        let (perf_map, harm) = before.map(|before| (before.perf_map, before.harm)).unwrap_or_default();
        let maps = Arc::new(Maps::new(mapped, contents));
        let known = Process { not_before, perf_map, harm, ..Process::new(maps, self.clock) };
        self.processes.insert(key, known);
    }

    /// Whether it was time to look again.
    pub(super) fn look_again(&mut self, key: ProcKey) -> bool {
        let is_due = self.processes.get(&key).is_none_or(|known| known.not_before <= Instant::now());
        let looks = is_due && !told::is_told(key);
        if looks {
            self.look(key);
        }
        looks
    }

    /// Looks again at mappings that are old, since another library may be where one was; returns what they were. All
    /// processes together cost no more than one that is looked at all the time.
    pub(super) fn refresh(&mut self, key: ProcKey) -> Option<Arc<Maps>> {
        let begun = Instant::now();
        let known = self.processes.get(&key)?;
        let is_old = begun.saturating_duration_since(known.looked) >= AGE;
        if !is_old || begun < self.not_before.max(known.not_before) || told::is_told(key) {
            return None;
        }
        let before = Arc::clone(&known.maps);
        // The stacks may be of the image before an exec, and others will tell of that.
        let mapped = process::mappings(key).ok().filter(|mapped| before.is_same_image(mapped));
        let is_there = mapped.is_some();
        if let Some(mapped) = mapped {
            self.take(key, mapped);
        }
        self.not_before = Instant::now() + begun.elapsed() * REFRESH_SHARE;
        is_there.then_some(before)
    }

    /// Puts other mappings in the place of those of a process, which are returned.
    pub(super) fn exchange(&mut self, key: ProcKey, maps: Arc<Maps>) -> Option<Arc<Maps>> {
        self.processes.get_mut(&key).map(|known| std::mem::replace(&mut known.maps, maps))
    }

    fn open(key: ProcKey, mapped: &Mapped) -> std::io::Result<(OwnedFd, FileKey)> {
        if told::is_told(key) { told::open(key, mapped) } else { process::open_mapped(key, mapped) }
    }

    pub(super) fn content(&mut self, key: ProcKey, mapped: &Mapped) -> Content {
        if mapped.inode == 0 {
            // Such as [vdso]: the kernel's.
            let is_special = mapped.path.first() == Some(&b'[') && !mapped.path.starts_with(b"[anon");
            return if is_special { Content::Sealed } else { Content::Anonymous };
        }
        let path = text::printable(&mapped.path).into();
        let id = match Self::open(key, mapped) {
            Ok((file, found)) => self.table.add(found, &path, Some(file)),
            Err(_) => {
                let device = makedev(mapped.device.0, mapped.device.1);
                let unread = FileKey { device, inode: mapped.inode, size: 0, modified: (0, 0) };
                self.table.add(unread, &path, None)
            }
        };
        Content::File(id)
    }

    pub(super) fn stack(&self, key: ProcKey, walk: &Walk) -> Stack {
        let mappings = self.processes.get(&key).map(|known| known.maps.mappings()).unwrap_or_default();
        let place = |address: u64| {
            let after = mappings.partition_point(|mapping| mapping.start <= address);
            let mapping = after.checked_sub(1).and_then(|index| mappings.get(index));
            match mapping.filter(|mapping| address < mapping.end) {
                Some(Mapping { start, offset, content: Content::File(module), .. }) => {
                    Place::File { module: *module, offset: (address - start).wrapping_add(*offset) }
                }
                _ => Place::Memory { process: key, address },
            }
        };
        let places = walk.frames.iter().map(|(address, how)| (place(*address), *how)).collect();
        Stack { places, complete: walk.complete }
    }
}

impl Table {
    /// What the worker may know.
    pub(super) fn content(&self, content: Content) -> Content {
        match content {
            Content::File(id) if self.get(id).is_none_or(|module| module.trust == Trust::Sealed) => {
                Content::Sealed
            }
            other => other,
        }
    }
}

/// What the worker may ask for.
pub(super) struct Asked<'a> {
    pub(super) books: &'a mut Books,
    pub(super) process: Option<ProcKey>,
    /// Of the file that is being named.
    pub(super) path: Option<Arc<str>>,
}

impl Library for Asked<'_> {
    fn module(&mut self, id: u32) -> Option<Arc<OwnedFd>> {
        let module = self.books.table.get(id).filter(|module| module.trust != Trust::Sealed)?;
        let wanted = module.key;
        if let Some(file) = self.books.table.file(id) {
            return Some(file);
        }
        let mut users =
            self.books.processes.iter().filter_map(|(key, known)| Books::open(*key, known.maps.of(id)?).ok());
        let (file, _) = users.find(|(_, found)| *found == wanted)?;
        let file = Arc::new(file);
        self.books.table.keep_open(id, Arc::clone(&file));
        Some(file)
    }

    fn debug(&mut self, build_id: &[u8], link: &[u8]) -> Option<OwnedFd> {
        process::open_debug(Path::new(&self.books.debug_files), self.path.as_deref()?, build_id, link)
    }

    fn code(&mut self, address: u64) -> Vec<u8> {
        // The memory of whoever has the number now is no image's.
        let process = self.process.filter(|key| !told::is_told(*key));
        process.map(|key| process::code(key, address, CODE)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of this process, with mappings of another time.
    fn books(change: impl FnOnce(&mut Vec<Mapped>)) -> (Books, ProcKey) {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        let ticks: u64 =
            stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().nth(19).unwrap().parse().unwrap();
        let key = ProcKey::new(std::process::id(), ticks * 10_000_000);
        let mut books = Books::new("/nonexistent".into());
        let mut mapped = process::mappings(key).unwrap();
        change(&mut mapped);
        books.take(key, mapped);
        (books, key)
    }

    fn is_there(books: &Books, key: ProcKey, start: u64) -> bool {
        books.processes[&key].maps.mappings().iter().any(|mapping| mapping.start == start)
    }

    #[test]
    fn old_mappings_are_looked_at_again_unless_they_are_of_another_image() {
        let gone = Mapped { start: 4096, end: 8192, offset: 0, device: (0, 0), inode: 0, path: Vec::new() };
        let (mut books, key) = books(|mapped| mapped.insert(0, gone.clone()));
        assert!(books.refresh(key).is_none() && is_there(&books, key, 4096), "they are new");
        let make_old = |books: &mut Books| {
            let known = books.processes.get_mut(&key).unwrap();
            let before = Instant::now().checked_sub(AGE).unwrap();
            (known.looked, known.not_before) = (before, before);
        };
        make_old(&mut books);
        let begun = Instant::now();
        let before = books.refresh(key).unwrap();
        assert!(books.not_before > begun, "nor soon again");
        assert_eq!((before.mappings()[0].start, is_there(&books, key, 4096)), (4096, false));
        make_old(&mut books);
        books.not_before = Instant::now() + Duration::from_secs(3600);
        assert!(books.refresh(key).is_none(), "which is not done all the time");

        let (mut books, key) = self::books(|mapped| {
            mapped.retain(|one| one.path != b"[vdso]");
            mapped.insert(0, Mapped { path: b"[vdso]".to_vec(), ..gone });
        });
        make_old(&mut books);
        assert!(books.refresh(key).is_none() && is_there(&books, key, 4096));
    }
}

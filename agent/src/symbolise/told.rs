//! Images that somebody else tells the mappings of, instead of /proc: nothing is read of a process by its number
//! without proof, since the number may be another's, or the image another, by now.

use std::{
    ffi::OsStr,
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::Path,
    sync::Arc,
};

use plumb_common::task::ProcKey;
use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::{
    Books, MAX_PROCESSES, Process, Stack, Symboliser,
    maps::Maps,
    process::{self, FileKey, Mapped},
};

/// In the key of an image beside the time when it began: no process starts 292 years after boot, so that the key is
/// never one of a process in /proc.
const TOLD: u64 = 1 << 63;

/// The key of the image that a process has from a time on, in nanoseconds since boot.
pub(super) fn image_key(tgid: u32, begun: u64) -> ProcKey {
    ProcKey::new(tgid, TOLD | begun)
}

/// Whether a key is one of an image.
pub(super) fn is_told(key: ProcKey) -> bool {
    key.start_boottime & TOLD != 0
}

impl Symboliser {
    /// A new image without mappings, of a process that was made at `made`.
    pub(super) fn begin(&mut self, image: ProcKey, made: Option<u64>) {
        self.books.insert_told(image, Arc::default(), made);
    }

    /// An image with the mappings that its parent's has now, which may be none.
    pub(super) fn copy(&mut self, from: Option<ProcKey>, image: ProcKey, made: u64) {
        let parent = from.and_then(|key| self.books.processes.get(&key));
        let maps = parent.map(|parent| Arc::clone(&parent.maps)).unwrap_or_default();
        self.books.insert_told(image, maps, Some(made));
    }

    /// Adds a mapping and opens its file. False if there is no room for it.
    pub(super) fn map(&mut self, image: ProcKey, mapped: Mapped) -> bool {
        let Some(known) = self.books.processes.get(&image) else { return false };
        let content = known.maps.known(&mapped);
        let content = content.unwrap_or_else(|| self.books.content(image, &mapped));
        let Some(known) = self.books.processes.get_mut(&image) else { return false };
        Arc::make_mut(&mut known.maps).put(mapped, content)
    }
}

impl Books {
    fn insert_told(&mut self, image: ProcKey, maps: Arc<Maps>, made: Option<u64>) {
        self.clock += 1;
        self.make_room(image);
        let known = Process { made, ..Process::new(maps, self.clock) };
        self.processes.insert(image, known);
    }

    /// Lets the oldest process go when there would be too many.
    pub(super) fn make_room(&mut self, key: ProcKey) {
        if self.processes.len() >= MAX_PROCESSES
            && !self.processes.contains_key(&key)
            && let Some(oldest) =
                self.processes.iter().min_by_key(|(_, known)| known.used).map(|(key, _)| *key)
        {
            self.processes.remove(&oldest);
        }
    }

    /// Opens the perf map of an image with stacks in compiled code, since it is found only as long as the process is
    /// there.
    pub(super) fn keep_perf_map(&mut self, image: ProcKey, stacks: &[Stack]) {
        if is_told(image)
            && stacks.iter().any(Stack::is_in_memory)
            && let Some(known) = self.processes.get_mut(&image)
            && known.perf_map.is_none()
        {
            known.perf_map(image);
        }
    }
}

/// Opens the file of a mapping. The process may be gone and its number another's: whatever is found where the file was
/// is opened only if it is the file that was mapped. A path says where to look, without links, since the kernel made it;
/// a file that has been deleted is found as long as the mapping is there.
pub(super) fn open(image: ProcKey, mapped: &Mapped) -> io::Result<(OwnedFd, FileKey)> {
    let theirs = ProcKey::new(image.tgid, 0);
    let ours = ProcKey::new(std::process::id(), 0);
    let range = format!("/proc/{}/map_files/{:x}-{:x}", image.tgid, mapped.start, mapped.end);
    let by_range = rustix::fs::open(range, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    if let Ok(place) = by_range
        && let Ok(found) = open_if_same(&place, mapped, &Served::of(theirs))
    {
        return Ok(found);
    }
    let found = open_by_path(theirs, mapped);
    found.or_else(|_| open_by_path(ours, mapped))
}

/// From the root of a process.
fn open_by_path(root: ProcKey, mapped: &Mapped) -> io::Result<(OwnedFd, FileKey)> {
    let served = Served::of(root);
    if served.is_on_the_way(&mapped.path) {
        return Err(io::Error::other("behind a file system in user space"));
    }
    let path = Path::new(OsStr::from_bytes(&mapped.path));
    let place = process::open_inside(root, path, ResolveFlags::NO_SYMLINKS)?;
    open_if_same(&place, mapped, &served)
}

fn open_if_same(place: &OwnedFd, mapped: &Mapped, served: &Served) -> io::Result<(OwnedFd, FileKey)> {
    let status = process::look(place)?;
    let device = (status.stx_dev_major, status.stx_dev_minor);
    // Some file systems have another device here than for the kernel, and either may be an unnamed one: btrfs has one
    // per subvolume here, an overlay those of its layers there.
    let may_be = device == mapped.device || device.0 == 0 || mapped.device.0 == 0;
    if status.stx_ino != mapped.inode || !may_be {
        return Err(io::Error::other("another file has its name now"));
    }
    if served.has(device) || served.has(mapped.device) {
        // Whoever serves it could let the agent wait.
        return Err(io::Error::other("a file system in user space"));
    }
    process::open_regular(place)
}

/// The file systems in user space that a process sees: device and mount point of each.
struct Served(Vec<(String, Vec<u8>)>);

impl Served {
    fn of(key: ProcKey) -> Self {
        let table = process::read(key, "mountinfo").unwrap_or_default();
        let served = table.split(|byte| *byte == b'\n').filter_map(|line| {
            // number parent device root mount-point options … - kind
            let kind = line.windows(3).position(|word| word == b" - ").and_then(|at| line.get(at + 3..))?;
            let mut words = line.split(|byte| *byte == b' ').skip(2);
            let device = String::from_utf8_lossy(words.next()?).into_owned();
            kind.starts_with(b"fuse").then(|| Some((device, unescaped(words.nth(1)?))))?
        });
        Self(served.collect())
    }

    fn has(&self, device: (u32, u32)) -> bool {
        let device = format!("{}:{}", device.0, device.1);
        self.0.iter().any(|(other, _)| *other == device)
    }

    fn is_on_the_way(&self, path: &[u8]) -> bool {
        let is_below = |mount: &[u8]| {
            let rest = path.strip_prefix(mount);
            rest.is_some_and(|rest| mount.ends_with(b"/") || rest.is_empty() || rest.starts_with(b"/"))
        };
        self.0.iter().any(|(_, mount)| is_below(mount))
    }
}

/// A path of mountinfo, where blanks and backslashes are three octal digits behind a backslash.
fn unescaped(path: &[u8]) -> Vec<u8> {
    let mut parts = path.split(|byte| *byte == b'\\');
    let mut plain = parts.next().unwrap_or_default().to_vec();
    for part in parts {
        let (digits, rest) = part.split_at(part.len().min(3));
        plain.push(digits.iter().fold(0, |byte: u8, digit| byte.wrapping_shl(3) | (digit & 7)));
        plain.extend_from_slice(rest);
    }
    plain
}

/// As `process::open_perf_map`, of a process that is there and was made at this time.
pub(super) fn open_perf_map(image: ProcKey, made: Option<u64>) -> Option<OwnedFd> {
    let key = process::find(image.tgid, made?)?;
    let map = process::open_perf_map(key).ok()?;
    // Nobody else had the pid in between.
    process::is_there(key).then_some(map)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;
    use crate::symbolise::protocol::Content;

    /// A process that is there, under the key of an image: nothing of it may be read.
    fn own_image() -> ProcKey {
        image_key(std::process::id(), 1)
    }

    fn memory(start: u64) -> Mapped {
        Mapped { start, end: start + 4096, offset: 0, device: (0, 0), inode: 0, path: b"//anon".to_vec() }
    }

    fn starts(symboliser: &Symboliser, image: ProcKey) -> Vec<u64> {
        let known = symboliser.books.processes.get(&image);
        known.map(|known| known.maps.mappings().iter().map(|one| one.start).collect()).unwrap_or_default()
    }

    #[test]
    fn an_image_is_never_looked_up_in_proc() {
        let mut symboliser = Symboliser::with("/nonexistent", "/nonexistent");
        let image = own_image();
        symboliser.attach(image);
        assert!(!symboliser.books.processes.contains_key(&image));
        symboliser.begin(image, None);
        assert!(!symboliser.books.look_again(image));
        assert_eq!(starts(&symboliser, image), [0; 0]);
        assert!(open_perf_map(image, None).is_none());
    }

    #[test]
    fn only_the_file_that_was_mapped_is_opened() {
        let path = std::env::current_exe().unwrap();
        let status = process::look(&std::fs::File::open(&path).unwrap().into()).unwrap();
        let path = path.into_os_string().into_vec();
        let device = (status.stx_dev_major, status.stx_dev_minor);
        let mapped = Mapped { device, inode: status.stx_ino, path, ..memory(0x1000) };
        // No process has this number.
        let gone = image_key(u32::MAX, 1);
        assert!(open(gone, &mapped).is_ok());
        assert!(open(gone, &Mapped { inode: mapped.inode + 1, ..mapped.clone() }).is_err());
        assert!(
            open(gone, &Mapped { device: (device.0 + 1, device.1), ..mapped.clone() }).is_err()
                || device.0 == 0
        );
        let deleted = [&mapped.path[..], b" (deleted)"].concat();
        assert!(open(gone, &Mapped { path: deleted, ..mapped.clone() }).is_err());
        assert!(open(gone, &Mapped { path: b"//toolong".to_vec(), ..mapped }).is_err());
    }

    #[test]
    fn a_server_in_user_space_is_not_asked() {
        let served = Served(vec![("0:50".into(), unescaped(b"/mnt/a\\040b\\134"))]);
        assert!(served.has((0, 50)) && !served.has((0, 5)));
        assert!(served.is_on_the_way(b"/mnt/a b\\/c/d") && served.is_on_the_way(b"/mnt/a b\\"));
        assert!(!served.is_on_the_way(b"/mnt/a b\\c") && !served.is_on_the_way(b"/mnt"));
        assert!(Served(vec![(String::new(), b"/".to_vec())]).is_on_the_way(b"/x"));
        assert_eq!(unescaped(b"/x\\"), b"/x\0", "cut");
    }

    #[test]
    fn a_copy_is_its_own_from_then_on() {
        let mut symboliser = Symboliser::with("/nonexistent", "/nonexistent");
        let (parent, child) = (image_key(7, 1), image_key(8, 2));
        symboliser.begin(parent, Some(1));
        assert!(symboliser.map(parent, memory(0x1000)));
        symboliser.copy(Some(parent), child, 2);
        assert!(symboliser.map(parent, memory(0x5000)) && symboliser.map(child, memory(0x9000)));
        assert_eq!(starts(&symboliser, parent), [0x1000, 0x5000]);
        assert_eq!(starts(&symboliser, child), [0x1000, 0x9000]);
        symboliser.forget(parent);
        assert_eq!(starts(&symboliser, child), [0x1000, 0x9000]);
        assert!(!symboliser.map(parent, memory(0x1000)), "nobody knows it any more");
    }

    #[test]
    fn a_mapping_is_what_it_is_in_maps() {
        let mut symboliser = Symboliser::with("/nonexistent", "/nonexistent");
        let image = own_image();
        let mut content = |path: &[u8], inode| {
            let mapped = Mapped { path: path.to_vec(), inode, ..memory(0x1000) };
            symboliser.books.content(image, &mapped)
        };
        assert_eq!(content(b"//anon", 0), Content::Anonymous);
        assert_eq!(content(b"", 0), Content::Anonymous);
        assert_eq!(content(b"[vdso]", 0), Content::Sealed);
        assert!(matches!(content(b"/nonexistent", 5), Content::File(_)));
    }
}

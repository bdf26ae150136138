//! What /proc knows of the code of a process: its executable mappings, and the files behind them.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use plumb_common::task::ProcKey;
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags, makedev, open, openat, openat2, statx,
};
use rustix::time::{ClockId, Timespec, clock_gettime};

/// Read of one file of /proc at most, in bytes.
const MAX_TEXT: u64 = 16 << 20;
/// Executable mappings of one process at most.
pub(super) const MAX_MAPPINGS: usize = 8192;
/// Nanoseconds in the unit of start times in /proc.
const TICK: u64 = 10_000_000;
/// How far the times of files and of processes may be apart, in nanoseconds.
const MAX_OFF: i128 = 2_000_000_000;

/// An executable mapping, as /proc/PID/maps has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mapped {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) offset: u64,
    pub(super) device: (u32, u32),
    /// 0 for memory without a file.
    pub(super) inode: u64,
    pub(super) path: Vec<u8>,
}

/// Identity of a file's content, as far as the file system tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FileKey {
    pub(super) device: u64,
    pub(super) inode: u64,
    pub(super) size: u64,
    /// Seconds and nanoseconds.
    pub(super) modified: (i64, u32),
}

/// Executable mappings, sorted. Fails when the process is gone or another has its pid.
pub(super) fn mappings(key: ProcKey) -> io::Result<Vec<Mapped>> {
    let text = read(key, "maps")?;
    if !is_there(key) {
        return Err(io::ErrorKind::NotFound.into());
    }
    let mut mapped: Vec<_> = text.split(|byte| *byte == b'\n').filter_map(parse).take(MAX_MAPPINGS).collect();
    mapped.sort_unstable_by_key(|mapping| mapping.start);
    Ok(mapped)
}

fn parse(line: &[u8]) -> Option<Mapped> {
    // start-end perms offset major:minor inode, blanks, path
    let mut words = line.splitn(6, |byte| *byte == b' ');
    let mut word = || str::from_utf8(words.next()?).ok();
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let (start, end) = word()?.split_once('-')?;
    let permissions = word()?;
    let offset = hex(word()?)?;
    let (major, minor) = word()?.split_once(':')?;
    let inode = word()?.parse().ok()?;
    let device = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    let path = words.next().unwrap_or_default().trim_ascii_start().to_vec();
    let mapped = Mapped { start: hex(start)?, end: hex(end)?, offset, device, inode, path };
    permissions.contains('x').then_some(mapped)
}

/// Whether the process that had this pid still has it.
pub(super) fn is_there(key: ProcKey) -> bool {
    started(key) == Some(key.start_boottime / TICK)
}

/// The process with this pid, if it was made at this time, nanoseconds since boot. The kernel notes the start of a
/// process a moment before it tells about it.
pub(super) fn find(tgid: u32, made: u64) -> Option<ProcKey> {
    let tick = started(ProcKey::new(tgid, made))?;
    let is_it = tick == made / TICK || tick + 1 == made / TICK;
    is_it.then(|| ProcKey::new(tgid, tick * TICK))
}

/// When the process with this pid was made, in ticks since boot.
fn started(key: ProcKey) -> Option<u64> {
    let stat = read(key, "stat").unwrap_or_default();
    let after_name = stat.iter().rposition(|byte| *byte == b')').and_then(|at| stat.get(at + 1..));
    let text = String::from_utf8_lossy(after_name.unwrap_or_default());
    // The 22nd field; the third is the first here.
    text.split_ascii_whitespace().nth(19).and_then(|ticks| ticks.parse().ok())
}

pub(super) fn read(key: ProcKey, name: &str) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(format!("/proc/{}/{name}", key.tgid))?.take(MAX_TEXT).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Opens the file behind a mapping; only a regular file that is the mapped one.
pub(super) fn open_mapped(key: ProcKey, mapped: &Mapped) -> io::Result<(OwnedFd, FileKey)> {
    if mapped.device.0 == 0 && is_fuse(key, mapped.device) {
        // Whoever serves it could let the agent wait.
        return Err(io::Error::other("a file system in user space"));
    }
    let path = format!("/proc/{}/map_files/{:x}-{:x}", key.tgid, mapped.start, mapped.end);
    // This names the mapped file itself, also when it has been deleted; it takes CAP_CHECKPOINT_RESTORE.
    if let Ok(place) = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
        return open_regular(&place);
    }
    let place = open_inside(key, Path::new(OsStr::from_bytes(&mapped.path)), ResolveFlags::empty())?;
    let (file, found) = open_regular(&place)?;
    // Some file systems show another device here than in maps; it is then an unnamed one.
    let device = makedev(mapped.device.0, mapped.device.1);
    if found.inode == mapped.inode && (found.device == device || mapped.device.0 == 0) {
        return Ok((file, found));
    }
    Err(io::Error::other("another file has its name now"))
}

/// A place in the mount namespace of a process; links lead nowhere else.
pub(super) fn open_inside(key: ProcKey, path: &Path, more: ResolveFlags) -> io::Result<OwnedFd> {
    let root = open(format!("/proc/{}/root", key.tgid), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let links = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | more;
    Ok(openat2(&root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), links)?)
}

/// Opens what has been looked at and found to be a regular file: opening anything else may have effects.
pub(super) fn open_regular(place: &OwnedFd) -> io::Result<(OwnedFd, FileKey)> {
    let before = look(place)?;
    if FileType::from_raw_mode(before.stx_mode.into()) != FileType::RegularFile {
        return Err(io::Error::other("not a regular file"));
    }
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = open(format!("/proc/self/fd/{}", place.as_raw_fd()), flags, Mode::empty())?;
    let status = look(&file)?;
    let key = FileKey {
        device: makedev(status.stx_dev_major, status.stx_dev_minor),
        inode: status.stx_ino,
        size: status.stx_size,
        modified: (status.stx_mtime.tv_sec, status.stx_mtime.tv_nsec),
    };
    Ok((file, key))
}

/// What the kernel knows of a file, without asking a server again.
pub(super) fn look(file: &OwnedFd) -> rustix::io::Result<Statx> {
    statx(file, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::BASIC_STATS)
}

fn is_fuse(key: ProcKey, device: (u32, u32)) -> bool {
    let device = format!("{}:{}", device.0, device.1);
    let table = read(key, "mountinfo").unwrap_or_default();
    String::from_utf8_lossy(&table).lines().any(|line| {
        let kind = line.split_once(" - ").map(|(_, kind)| kind);
        line.split(' ').nth(2) == Some(&device) && kind.is_some_and(|kind| kind.starts_with("fuse"))
    })
}

/// Opens the names that a process has written for its compiled code: /tmp/perf-PID.map, by its own view of the
/// file system and of its pid. As perf does, it trusts the process itself and root only.
pub(super) fn open_perf_map(key: ProcKey) -> io::Result<OwnedFd> {
    let status = read(key, "status")?;
    let status = String::from_utf8_lossy(&status);
    let last =
        |name| status.lines().find_map(|line| line.strip_prefix(name)?.split_ascii_whitespace().last());
    let pid: u32 = last("NSpid:").and_then(|pid| pid.parse().ok()).unwrap_or(key.tgid);
    let user = status.lines().find_map(|line| line.strip_prefix("Uid:")?.split_ascii_whitespace().nth(1));
    let user = user.and_then(|user| user.parse::<u32>().ok());
    let path = format!("/tmp/perf-{pid}.map");
    let place = open_inside(key, Path::new(&path), ResolveFlags::NO_SYMLINKS)?;
    let owner = rustix::fs::fstat(&place)?.st_uid;
    if owner != 0 && Some(owner) != user {
        return Err(io::Error::other("somebody else's perf map"));
    }
    let (file, found) = open_regular(&place)?;
    if is_before(key, found.modified) {
        return Err(io::Error::other("the perf map of an earlier process"));
    }
    Ok(file)
}

/// Whether a file was written before a process was made, and so not by it. Its clock goes by the tick, and is set.
fn is_before(key: ProcKey, modified: (i64, u32)) -> bool {
    let nanos = |time: Timespec| i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec);
    let clock = |id| nanos(clock_gettime(id));
    let made = clock(ClockId::Realtime) - clock(ClockId::Boottime) + i128::from(key.start_boottime);
    let modified = Timespec { tv_sec: modified.0, tv_nsec: modified.1.into() };
    nanos(modified) + MAX_OFF < made
}

/// A few bytes of a process's memory; empty if they cannot be had.
pub(super) fn code(key: ProcKey, address: u64, most: usize) -> Vec<u8> {
    let mut bytes = vec![0; most];
    let memory = open(format!("/proc/{}/mem", key.tgid), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let read = memory.and_then(|memory| rustix::io::pread(&memory, &mut bytes, address));
    bytes.truncate(read.unwrap_or(0));
    bytes
}

/// The debug file for a build id, from where distributions put it: by build id, or by its name beside the path of
/// the program.
pub(super) fn open_debug(folder: &Path, program: &str, build_id: &[u8], link: &[u8]) -> Option<OwnedFd> {
    let hex: String = build_id.iter().map(|byte| format!("{byte:02x}")).collect();
    let (first, rest) = hex.split_at_checked(2)?;
    let mut places = vec![folder.join(".build-id").join(first).join(format!("{rest}.debug"))];
    if !link.is_empty() && !link.contains(&b'/') && link != b".." {
        let beside = Path::new(program).parent().and_then(|parent| parent.strip_prefix("/").ok());
        places.extend(beside.map(|beside| folder.join(beside).join(OsStr::from_bytes(link))));
    }
    let opened = |place: &PathBuf| {
        let place = openat(rustix::fs::CWD, place, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
        Some(open_regular(&place).ok()?.0)
    };
    places.iter().find_map(opened)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps_are_read_whatever_is_in_the_path() {
        let line = b"7f01-7f02 r-xp 00001000 fe:01 42                  /opt/a b (deleted)";
        let mapped = parse(line).unwrap();
        assert_eq!((mapped.start, mapped.end, mapped.offset), (0x7f01, 0x7f02, 0x1000));
        assert_eq!((mapped.device, mapped.inode), ((0xfe, 1), 42));
        assert_eq!(mapped.path, b"/opt/a b (deleted)");
        assert_eq!(parse(b"7f01-7f02 rw-p 00000000 00:00 0"), None);
        assert_eq!(parse(b"7f01-7f02 rwxp 00000000 00:00 0").unwrap().path, b"");
        assert_eq!(parse(b""), None);
    }

    #[test]
    fn a_path_from_a_debug_link_stays_below_the_folder() {
        let nowhere = Path::new("/nonexistent");
        assert!(open_debug(nowhere, "/usr/bin/x", b"", b"x").is_none());
        assert!(open_debug(nowhere, "x", b"\x01\x02", b"../../etc/passwd").is_none());
    }

    #[test]
    fn what_is_no_regular_file_is_not_opened() {
        for path in ["/dev/null", "/proc/self/root", "/tmp"] {
            let place = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
            assert!(open_regular(&place).is_err(), "{path}");
        }
    }

    #[test]
    fn a_perf_map_that_is_older_than_its_process_is_anothers() {
        let (now, booted) = (clock_gettime(ClockId::Realtime), clock_gettime(ClockId::Boottime));
        let key = |seconds: i64| ProcKey::new(1, (booted.tv_sec - seconds).unsigned_abs() * 1_000_000_000);
        let begun = 100.min(booted.tv_sec);
        assert!(is_before(key(begun), (now.tv_sec - begun - 10, 0)));
        assert!(!is_before(key(begun), (now.tv_sec - begun, 0)), "as it began");
        assert!(!is_before(key(begun), (now.tv_sec, 0)));
    }
}

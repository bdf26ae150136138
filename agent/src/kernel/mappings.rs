//! Executable mappings of a process and of whatever it forks, as perf events tell of them (perf_event_open(2);
//! `PERF_RECORD_MMAP2` since 3.16). Nothing is missed of a process that lives for a millisecond, and nothing stops it.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use perf_event_open_sys::bindings as perf;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Bytes of the ring of one CPU; a power of two of pages. A record of a mapping has about 120.
const RING_BYTES: usize = 256 << 10;
/// `PERF_RECORD_MISC_COMM_EXEC`: a name that comes with an exec.
const COMM_EXEC: u16 = 1 << 13;

/// An executable mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CodeMapping {
    pub start: u64,
    pub end: u64,
    /// In the file, bytes.
    pub offset: u64,
    /// Major and minor number.
    pub device: (u32, u32),
    /// 0 for memory without a file.
    pub inode: u64,
    /// As the process has it; of memory such as `//anon` or `[vdso]`.
    pub path: Vec<u8>,
}

/// What became of the memory of a process. Times are nanoseconds since boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapEvent {
    Mapped {
        time: u64,
        tgid: u32,
        mapping: CodeMapping,
    },
    /// It runs another program: nothing of the memory before is left.
    Exec {
        time: u64,
        tgid: u32,
    },
    /// A new process has the memory of its parent.
    Forked {
        time: u64,
        parent: u32,
        child: u32,
    },
}

impl MapEvent {
    #[must_use]
    pub fn time(&self) -> u64 {
        match self {
            Self::Mapped { time, .. } | Self::Exec { time, .. } | Self::Forked { time, .. } => *time,
        }
    }
}

/// The rings of all CPUs.
#[derive(Debug, Default)]
pub struct Mappings {
    rings: Vec<PerfRing>,
    lost: u64,
}

impl Mappings {
    /// Follows a process of one thread, and all that it will fork.
    pub fn follow(pid: u32) -> io::Result<Self> {
        let mut rings = Vec::new();
        for cpu in 0..configured_cpus() {
            match PerfRing::open(pid, cpu) {
                Ok(ring) => rings.push(ring),
                // A CPU that is down runs nothing.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Self { rings, lost: 0 })
    }

    /// What there is, in the order of time.
    pub fn drain(&mut self) -> Vec<MapEvent> {
        let mut events = Vec::new();
        for ring in &mut self.rings {
            ring.drain(|record| match parse(record) {
                Some(Record::Event(event)) => events.push(event),
                Some(Record::Lost(count)) => self.lost += count,
                None => {}
            });
        }
        events.sort_by_key(MapEvent::time);
        events
    }

    /// Records for which there was no room.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Each is readable when there is something new, so that a file can be opened before it is deleted.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.rings.iter().map(|ring| ring.event.as_fd())
    }
}

fn configured_cpus() -> u32 {
    // SAFETY: no preconditions.
    let count = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_CONF) };
    u32::try_from(count).unwrap_or(1).max(1)
}

/// The ring of one CPU.
#[derive(Debug)]
struct PerfRing {
    event: OwnedFd,
    /// A `perf_event_mmap_page`, then the records.
    memory: NonNull<u8>,
    page: usize,
}

// SAFETY: it owns its mapping, which is used through `&mut self` only.
unsafe impl Send for PerfRing {}

impl PerfRing {
    fn open(pid: u32, cpu: u32) -> io::Result<Self> {
        let mut attributes = perf::perf_event_attr {
            type_: perf::PERF_TYPE_SOFTWARE,
            config: u64::from(perf::PERF_COUNT_SW_DUMMY),
            size: size_of::<perf::perf_event_attr>() as u32,
            sample_type: u64::from(perf::PERF_SAMPLE_TIME),
            clockid: libc::CLOCK_BOOTTIME,
            ..perf::perf_event_attr::default()
        };
        attributes.set_inherit(1);
        attributes.set_exclude_kernel(1);
        attributes.set_mmap(1);
        attributes.set_mmap2(1);
        attributes.set_comm(1);
        attributes.set_comm_exec(1);
        attributes.set_task(1);
        attributes.set_sample_id_all(1);
        attributes.set_use_clockid(1);
        attributes.set_watermark(1);
        attributes.__bindgen_anon_2.wakeup_watermark = 1;
        let (pid, cpu) = (pid.cast_signed(), cpu.cast_signed());
        let flags = u64::from(perf::PERF_FLAG_FD_CLOEXEC);
        // SAFETY: the attributes live during the call.
        let fd =
            unsafe { libc::syscall(libc::SYS_perf_event_open, &raw mut attributes, pid, cpu, -1, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call returned a new fd, which nobody else has.
        let event = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let page = rustix::param::page_size();
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel wants it.
        let memory = unsafe {
            mmap(std::ptr::null_mut(), page + RING_BYTES, access, MapFlags::SHARED, event.as_fd(), 0)?
        };
        let memory = NonNull::new(memory.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        debug_assert!(event.as_raw_fd() >= 0);
        Ok(Self { event, memory, page })
    }

    /// Hands out each record, and gives its room back.
    fn drain(&mut self, mut each: impl FnMut(&[u8])) {
        let control = self.memory.cast::<perf::perf_event_mmap_page>();
        // SAFETY: the kernel's own page of the mapping; both numbers are shared with it and eight bytes wide.
        let (head, tail) = unsafe {
            let control = control.as_ptr();
            (
                AtomicU64::from_ptr(&raw mut (*control).data_head),
                AtomicU64::from_ptr(&raw mut (*control).data_tail),
            )
        };
        // SAFETY: behind the control page lie so many bytes; what is between tail and head the kernel does not touch.
        let ring = unsafe { std::slice::from_raw_parts(self.memory.as_ptr().add(self.page), RING_BYTES) };
        let end = head.load(Ordering::Acquire);
        let begin = tail.load(Ordering::Relaxed);
        records(ring, begin, end, &mut each);
        tail.store(end, Ordering::Release);
    }
}

impl Drop for PerfRing {
    fn drop(&mut self) {
        // SAFETY: its own mapping, to which nothing points any more.
        let _ = unsafe { munmap(self.memory.as_ptr().cast(), self.page + RING_BYTES) };
    }
}

/// Cuts the bytes between two positions into records, each with its header, those that wrap around in one piece.
fn records(ring: &[u8], begin: u64, end: u64, each: &mut impl FnMut(&[u8])) {
    let (mut at, mut whole) = (begin, Vec::new());
    let copy = |from: u64, len: usize, to: &mut Vec<u8>| {
        let from = (from % ring.len() as u64) as usize;
        let first = len.min(ring.len() - from);
        to.extend_from_slice(&ring[from..from + first]);
        to.extend_from_slice(&ring[..len - first]);
    };
    while end.saturating_sub(at) >= HEADER as u64 && end - at <= ring.len() as u64 {
        whole.clear();
        copy(at, HEADER, &mut whole);
        let size = usize::from(u16_at(&whole, 6).unwrap_or(0));
        if size < HEADER || size as u64 > end - at {
            return;
        }
        whole.clear();
        copy(at, size, &mut whole);
        each(&whole);
        at += size as u64;
    }
}

/// `struct perf_event_header`: type, misc, size.
const HEADER: usize = 8;

#[derive(Debug, PartialEq, Eq)]
enum Record {
    Event(MapEvent),
    Lost(u64),
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// Reads one record (include/uapi/linux/perf_event.h); the time stands at its end.
fn parse(record: &[u8]) -> Option<Record> {
    let (kind, misc) = (u32_at(record, 0)?, u16_at(record, 4)?);
    let time = u64_at(record, record.len().checked_sub(8)?)?;
    let tgid = u32_at(record, HEADER)?;
    let event = match kind {
        perf::PERF_RECORD_LOST => return Some(Record::Lost(u64_at(record, HEADER + 8)?)),
        perf::PERF_RECORD_COMM if misc & COMM_EXEC != 0 => MapEvent::Exec { time, tgid },
        perf::PERF_RECORD_FORK => {
            let parent = u32_at(record, HEADER + 4)?;
            if parent == tgid {
                return None;
            }
            MapEvent::Forked { time, parent, child: tgid }
        }
        perf::PERF_RECORD_MMAP2 => {
            let start = u64_at(record, HEADER + 8)?;
            let mapping = CodeMapping {
                start,
                end: start.checked_add(u64_at(record, HEADER + 16)?)?,
                offset: u64_at(record, HEADER + 24)?,
                device: (u32_at(record, HEADER + 32)?, u32_at(record, HEADER + 36)?),
                inode: u64_at(record, HEADER + 40)?,
                path: terminated(record.get(HEADER + 64..record.len() - 8)?),
            };
            MapEvent::Mapped { time, tgid, mapping }
        }
        _ => return None,
    };
    Some(Record::Event(event))
}

fn terminated(bytes: &[u8]) -> Vec<u8> {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default().to_vec()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(kind: u32, misc: u16, body: &[u8]) -> Vec<u8> {
        let size = (HEADER + body.len()) as u16;
        [&kind.to_ne_bytes()[..], &misc.to_ne_bytes(), &size.to_ne_bytes(), body].concat()
    }

    fn mapped(path: &[u8], time: u64) -> Vec<u8> {
        let numbers = [0x1000u64, 0x2000, 0x300].map(u64::to_ne_bytes).concat();
        let file =
            [&[8u32, 1].map(u32::to_ne_bytes).concat()[..], &[42u64, 0].map(u64::to_ne_bytes).concat()]
                .concat();
        let ids = [7u32, 8].map(u32::to_ne_bytes).concat();
        let access = [5u32, 2].map(u32::to_ne_bytes).concat();
        let name = [path, &vec![0; 8 - path.len() % 8]].concat();
        record(
            perf::PERF_RECORD_MMAP2,
            0,
            &[ids, numbers, file, access, name, time.to_ne_bytes().to_vec()].concat(),
        )
    }

    #[test]
    fn a_mapping_is_read_whole() {
        let mapping = CodeMapping {
            start: 0x1000,
            end: 0x3000,
            offset: 0x300,
            device: (8, 1),
            inode: 42,
            path: b"/usr/lib/libc.so.6".to_vec(),
        };
        let event = MapEvent::Mapped { time: 99, tgid: 7, mapping };
        assert_eq!(parse(&mapped(b"/usr/lib/libc.so.6", 99)), Some(Record::Event(event)));
    }

    #[test]
    fn records_that_wrap_around_come_in_one_piece() {
        let one = mapped(b"/bin/true", 5);
        let mut ring = vec![0; 256];
        let begin = 200u64;
        for (at, byte) in (begin as usize..).zip(&one) {
            ring[at % 256] = *byte;
        }
        let mut found = Vec::new();
        records(&ring, begin, begin + one.len() as u64, &mut |record| found.push(record.to_vec()));
        assert_eq!(found, [one]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_records_or_nothing(
            ring in proptest::collection::vec(any::<u8>(), 1..300), begin in any::<u64>(), len in 0u64..400,
        ) {
            records(&ring, begin, begin.saturating_add(len), &mut |record| drop(parse(record)));
        }
    }
}

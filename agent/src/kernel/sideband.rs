//! The ring of one perf event: opens it, and makes of its records what they say about mappings. Total: whatever the
//! bytes are, they are an event, something else, or damage that is counted.

use std::{
    io,
    mem::offset_of,
    os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr::NonNull,
    slice,
    sync::atomic::{AtomicU64, Ordering},
};

use linux_perf_event_reader::{
    BranchSampleFormat, CommOrExecRecord, Endianness, EventRecord, ForkOrExitRecord, Mmap2FileId,
    Mmap2Record, RawData, RawEventRecord, ReadFormat, RecordIdParseInfo, RecordParseInfo, RecordType,
    SampleFormat, constants::PERF_RECORD_MISC_MMAP_BUILD_ID,
};
use perf_event_open_sys::{bindings as sys, perf_event_open};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::mappings::{MapEvent, Mapping};

/// Bytes of records in one ring: a power of two of pages. A program of twenty libraries takes 3 KiB.
pub(super) const RING_BYTES: usize = 128 << 10;
/// `struct perf_event_header`: type, misc, size.
const HEADER: usize = 8;
/// The time behind each record (`sample_id_all` with `PERF_SAMPLE_TIME` alone).
const TRAILER: usize = 8;

/// How the records are laid out, which follows from `attributes`.
const LAYOUT: RecordParseInfo = RecordParseInfo {
    endian: Endianness::NATIVE,
    sample_format: SampleFormat::TIME,
    branch_sample_format: BranchSampleFormat::empty(),
    read_format: ReadFormat::empty(),
    common_data_offset_from_end: Some(TRAILER as u8),
    sample_regs_user: 0,
    user_regs_count: 0,
    sample_regs_intr: 0,
    intr_regs_count: 0,
    id_parse_info: RecordIdParseInfo {
        nonsample_record_id_offset_from_end: None,
        sample_record_id_offset_from_start: None,
    },
    nonsample_record_time_offset_from_end: Some(TRAILER as u8),
    sample_record_time_offset_from_start: Some(0),
};

/// Asks for mappings, execs and forks, and for nothing that is counted or sampled.
fn attributes() -> sys::perf_event_attr {
    let mut attributes = sys::perf_event_attr {
        type_: sys::PERF_TYPE_SOFTWARE,
        // An older kernel takes a longer struct whose end is zero (`perf_copy_attr`, kernel/events/core.c).
        size: size_of::<sys::perf_event_attr>() as u32,
        config: sys::PERF_COUNT_SW_DUMMY.into(),
        sample_type: sys::PERF_SAMPLE_TIME.into(),
        read_format: sys::PERF_FORMAT_LOST.into(),
        clockid: libc::CLOCK_BOOTTIME,
        ..Default::default()
    };
    // Readable at the first byte. `wakeup_events` would count samples only.
    attributes.__bindgen_anon_2.wakeup_watermark = 1;
    attributes.set_watermark(1);
    attributes.set_inherit(1);
    // Not needed for these records, and what an event of the kernel's own takes more rights for.
    attributes.set_exclude_kernel(1);
    attributes.set_exclude_hv(1);
    attributes.set_mmap(1);
    attributes.set_mmap2(1);
    attributes.set_comm(1);
    attributes.set_comm_exec(1);
    attributes.set_task(1);
    attributes.set_sample_id_all(1);
    attributes.set_use_clockid(1);
    attributes
}

/// What a ring has held so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Account {
    /// Records that the kernel had no room for.
    pub(super) lost: u64,
    /// Records that could not be understood; what was behind one of impossible length is with it.
    pub(super) damaged: u64,
}

/// The ring of the events that one CPU sees of a process and its descendants.
pub(super) struct Sideband {
    event: OwnedFd,
    pages: Pages,
    account: Account,
}

impl Sideband {
    /// Follows a thread, and all that it and its descendants will make, as long as they run on this CPU.
    pub(super) fn open(pid: u32, cpu: u32) -> io::Result<Self> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let (pid, cpu) = (i32::try_from(pid).map_err(invalid)?, i32::try_from(cpu).map_err(invalid)?);
        let event = match open_event(&mut attributes(), pid, cpu) {
            // Before 6.0 the event cannot be asked what was lost.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                open_event(&mut sys::perf_event_attr { read_format: 0, ..attributes() }, pid, cpu)?
            }
            opened => opened?,
        };
        let pages = Pages::map(event.as_fd())?;
        Ok(Self { event, pages, account: Account::default() })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// What the ring has held so far. From 6.0 on the kernel counts what it had no room for; before, it says so with
    /// the next record that has room.
    pub(super) fn account(&self) -> Account {
        // A value, which is 0, and then this.
        let mut read = [0; 2 * size_of::<u64>()];
        let counted = match rustix::io::read(&self.event, &mut read) {
            Ok(length) if length == read.len() => u64::from_ne_bytes(read.as_chunks().0[1]),
            _ => 0,
        };
        Account { lost: self.account.lost.max(counted), ..self.account }
    }

    /// Takes what is there.
    pub(super) fn drain_into(&mut self, events: &mut Vec<MapEvent>) {
        let account = &mut self.account;
        self.pages.take(|bytes| {
            for told in Records(Some(bytes)) {
                match told {
                    Told::Event(event) => events.push(event),
                    Told::Lost(count) => account.lost += count,
                    Told::Damaged => account.damaged += 1,
                    Told::Other => {}
                }
            }
        });
    }
}

fn open_event(attributes: &mut sys::perf_event_attr, pid: i32, cpu: i32) -> io::Result<OwnedFd> {
    let flags = sys::PERF_FLAG_FD_CLOEXEC.into();
    // SAFETY: the struct is initialised, has the size it says, and outlives the call.
    let event = unsafe { perf_event_open(attributes, pid, cpu, -1, flags) };
    if event < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this fd for us.
    Ok(unsafe { OwnedFd::from_raw_fd(event) })
}

/// The memory that the kernel writes records into: a page of its own, then the records.
struct Pages {
    start: NonNull<u8>,
    /// Bytes of the first page.
    page: usize,
    /// Bytes read since the ring was made: what `data_tail` says.
    tail: u64,
}

// SAFETY: the pages belong to this value alone, wherever it is; nothing of them depends on a thread.
unsafe impl Send for Pages {}

impl Pages {
    fn map(event: BorrowedFd<'_>) -> io::Result<Self> {
        let page = rustix::param::page_size();
        // Writable: otherwise the kernel would write over what has not been read.
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let start =
            unsafe { mmap(std::ptr::null_mut(), page + RING_BYTES, access, MapFlags::SHARED, event, 0)? };
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, page, tail: 0 })
    }

    /// Hands over what the kernel has written since, and gives the room back.
    fn take(&mut self, read: impl FnOnce(RawData<'_>)) {
        let head = self.position(offset_of!(sys::perf_event_mmap_page, data_head)).load(Ordering::Acquire);
        let length = usize::try_from(head.wrapping_sub(self.tail)).unwrap_or(usize::MAX);
        if length > 0 && length <= RING_BYTES {
            // SAFETY: the kernel has written all of the ring up to `head`, which the load above orders, and writes
            // nothing from `data_tail` to there before the store below. It is mapped behind the first page.
            let ring = unsafe { slice::from_raw_parts(self.start.add(self.page).as_ptr(), RING_BYTES) };
            read(window(ring, self.tail, length));
        }
        self.tail = head;
        self.position(offset_of!(sys::perf_event_mmap_page, data_tail)).store(head, Ordering::Release);
    }

    /// One of the two positions, which the kernel and this process read and write at the same time.
    fn position(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: the first page begins with a `perf_event_mmap_page` for as long as `self` lives. Both fields are
        // aligned, and on either side they are only touched whole.
        unsafe { AtomicU64::from_ptr(self.start.add(offset).cast().as_ptr()) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and nothing borrows from it any more.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.page + RING_BYTES) };
    }
}

/// `length` bytes from a position that counts since the ring was made; in two parts where they go over its end.
fn window(ring: &[u8], position: u64, length: usize) -> RawData<'_> {
    let begin = (position % ring.len() as u64) as usize;
    let (before, behind) = ring.split_at(begin);
    match behind.get(..length) {
        Some(whole) => RawData::Single(whole),
        None => RawData::Split(behind, before.get(..length - behind.len()).unwrap_or(before)),
    }
}

/// What one record says.
#[derive(Debug, PartialEq, Eq)]
enum Told {
    Event(MapEvent),
    /// So many records before this one.
    Lost(u64),
    Damaged,
    /// Nothing about mappings.
    Other,
}

/// One record after the other, until the bytes end or a length is impossible.
struct Records<'a>(Option<RawData<'a>>);

impl Iterator for Records<'_> {
    type Item = Told;

    fn next(&mut self) -> Option<Told> {
        let mut rest = self.0.take().filter(|rest| !rest.is_empty())?;
        let mut header = [0; HEADER];
        if rest.read_exact(&mut header).is_err() {
            return Some(Told::Damaged);
        }
        let [k0, k1, k2, k3, m0, m1, s0, s1] = header;
        let body = usize::from(u16::from_ne_bytes([s0, s1])).checked_sub(HEADER);
        let Some(body) = body.and_then(|length| rest.split_off_prefix(length).ok()) else {
            return Some(Told::Damaged);
        };
        self.0 = Some(rest);
        let (kind, misc) = (u32::from_ne_bytes([k0, k1, k2, k3]), u16::from_ne_bytes([m0, m1]));
        Some(told(RecordType(kind), misc, body).unwrap_or(Told::Damaged))
    }
}

/// What a record says; `None` for one that is too short or says what cannot be.
fn told(kind: RecordType, misc: u16, mut body: RawData<'_>) -> Option<Told> {
    if ![RecordType::MMAP2, RecordType::COMM, RecordType::FORK, RecordType::LOST].contains(&kind) {
        return Some(Told::Other);
    }
    if kind == RecordType::MMAP2 && misc & PERF_RECORD_MISC_MMAP_BUILD_ID != 0 {
        // Not asked for.
        return None;
    }
    let time = RawEventRecord::new(kind, misc, body, LAYOUT).timestamp()?;
    // A name ends before the time.
    let body = body.split_off_prefix(body.len().checked_sub(TRAILER)?).ok()?;
    match RawEventRecord::new(kind, misc, body, LAYOUT).parse().ok()? {
        EventRecord::Mmap2(record) => Some(Told::Event(mapped(time, &record)?)),
        EventRecord::Comm(record) => exec(time, &record),
        EventRecord::Fork(record) => forked(time, &record),
        EventRecord::Lost(record) => Some(Told::Lost(record.count)),
        _ => Some(Told::Other),
    }
}

fn mapped(time: u64, record: &Mmap2Record<'_>) -> Option<MapEvent> {
    let Mmap2FileId::InodeAndVersion(file) = &record.file_id else { return None };
    let end = record.address.checked_add(record.length).filter(|end| *end > record.address)?;
    let mapping = Mapping {
        start: record.address,
        end,
        offset: record.page_offset,
        device: (file.major, file.minor),
        inode: file.inode,
        path: record.path.as_slice().into_owned(),
    };
    Some(MapEvent::Mapped { time, tgid: number(record.pid)?, mapping })
}

/// A new name is an exec only if the kernel marks it.
fn exec(time: u64, record: &CommOrExecRecord<'_>) -> Option<Told> {
    let tgid = number(record.pid)?;
    Some(if record.is_execve { Told::Event(MapEvent::Exec { time, tgid }) } else { Told::Other })
}

/// A thread has the thread group of who made it.
fn forked(time: u64, record: &ForkOrExitRecord) -> Option<Told> {
    let (parent, child) = (number(record.ppid)?, number(record.pid)?);
    let is_thread = parent == child;
    Some(if is_thread { Told::Other } else { Told::Event(MapEvent::Forked { time, parent, child }) })
}

/// Of a process; the kernel has -1 for one that is gone, and 0 for none or one of another pid namespace.
fn number(pid: i32) -> Option<u32> {
    u32::try_from(pid).ok().filter(|pid| *pid != 0)
}

#[cfg(test)]
#[path = "sideband_tests.rs"]
mod tests;

//! A ring of io_uring for one operation.

use std::{
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    ptr,
    sync::atomic::{AtomicU32, Ordering},
};

/// `IORING_OFF_*`, and `IORING_ENTER_GETEVENTS`.
const OFFSET_RING: libc::off_t = 0;
const OFFSET_ENTRIES: libc::off_t = 0x1000_0000;
const GET_EVENTS: u32 = 1;
const PAGE: usize = 4096;

pub(crate) struct Uring {
    fd: OwnedFd,
    ring: *mut u8,
    entry: *mut u8,
    /// `struct io_uring_params`: five words, five reserved, then the offsets of either ring, ten words each.
    params: [u32; 30],
}

#[derive(Clone, Copy)]
pub(crate) struct Entry<'a> {
    pub(crate) opcode: u8,
    pub(crate) fd: RawFd,
    pub(crate) offset: u64,
    pub(crate) bytes: &'a [u8],
}

impl Uring {
    /// `None` where the kernel has or allows none.
    pub(crate) fn new() -> Option<Self> {
        let mut params = [0_u32; 30];
        // SAFETY: the kernel is given as many words as it expects.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
        if fd < 0 {
            return None;
        }
        // SAFETY: it has just been made, and is nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
        let map = |offset| {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: a new mapping, chosen by the kernel.
            let at = unsafe {
                libc::mmap(ptr::null_mut(), PAGE, access, libc::MAP_SHARED, fd.as_raw_fd(), offset)
            };
            assert_ne!(at, libc::MAP_FAILED);
            at.cast::<u8>()
        };
        // `IORING_FEAT_SINGLE_MMAP`, since 5.4.
        assert_eq!(params[5] & 1, 1);
        let (ring, entry) = (map(OFFSET_RING), map(OFFSET_ENTRIES));
        Some(Self { fd, ring, entry, params })
    }

    /// Hands over the one operation; to be called once.
    pub(crate) fn submit(&self, entry: Entry<'_>, is_waiting: bool) {
        let submit = &self.params[10..20];
        // SAFETY: the rings of one entry lie within their first page, and the kernel has not been told of it yet.
        unsafe {
            ptr::write_bytes(self.entry, 0, 64);
            // `struct io_uring_sqe`: opcode, fd, offset, address, length.
            self.entry.write(entry.opcode);
            self.entry.add(4).cast::<i32>().write(entry.fd);
            self.entry.add(8).cast::<u64>().write(entry.offset);
            if !entry.bytes.is_empty() {
                self.entry.add(16).cast::<u64>().write(entry.bytes.as_ptr() as u64);
                self.entry.add(24).cast::<u32>().write(entry.bytes.len() as u32);
            }
            // Head, tail, mask, entries, flags, dropped, array.
            self.word(submit[6]).write(0);
            AtomicU32::from_ptr(self.word(submit[1])).store(1, Ordering::Release);
            let (fd, null) = (self.fd.as_raw_fd(), ptr::null::<u8>());
            let (wait, flags) = if is_waiting { (1, GET_EVENTS) } else { (0, 0) };
            let entered = libc::syscall(libc::SYS_io_uring_enter, fd, 1, wait, flags, null, 0);
            assert_eq!(entered, 1, "{}", std::io::Error::last_os_error());
        }
    }

    /// `None` before it is complete. Makes no system call.
    pub(crate) fn result(&self) -> Option<i32> {
        let complete = &self.params[20..30];
        // SAFETY: as above. Head, tail, mask, entries, overflow, completions: of each, what was given and the result.
        unsafe {
            let tail = AtomicU32::from_ptr(self.word(complete[1])).load(Ordering::Acquire);
            (tail == 1).then(|| self.ring.add(complete[5] as usize + 8).cast::<i32>().read())
        }
    }

    fn word(&self, offset: u32) -> *mut u32 {
        // SAFETY: the kernel's offset, within the page.
        unsafe { self.ring.add(offset as usize).cast() }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // SAFETY: mapped by this.
        unsafe {
            libc::munmap(self.ring.cast(), PAGE);
            libc::munmap(self.entry.cast(), PAGE);
        }
    }
}

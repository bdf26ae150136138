//! io_uring: calls without a system call of their name, and files that are in no fd table.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::{
    Path, Result,
    create::{connected, one, two},
    passing::{received, send},
    path,
    process::Threads,
    sys::{self, dup_above, pid, pipe, socketpair, sys},
    table::HIGH,
};

pub(crate) const PATHS: &[Path] = &[
    path("io-uring-setup", "io_uring_setup(2)", |stage| {
        let mut parameters = [0u32; 30];
        one(stage, || sys!(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr()))
    }),
    path("io-uring-openat", "IORING_OP_OPENAT", |stage| {
        let ring = Ring::new(0)?;
        one(stage, || ring.run(&openat()))
    }),
    path("io-uring-openat2", "IORING_OP_OPENAT2", |stage| {
        let ring = Ring::new(0)?;
        let how = [0u64; 3];
        let call =
            Entry { operation: 28, off: how.as_ptr() as u64, len: size_of_val(&how) as u32, ..openat() };
        one(stage, || ring.run(&call))
    }),
    path("io-uring-openat-worker", "IORING_OP_OPENAT in a worker thread", |stage| {
        let ring = Ring::new(0)?;
        one(stage, || ring.run(&Entry { flags: ASYNC, ..openat() }))
    }),
    path("io-uring-openat-sqpoll", "IORING_OP_OPENAT in the thread that polls the ring", |stage| {
        let ring = Ring::new(SQPOLL)?;
        one(stage, || ring.run(&openat()))
    }),
    path("io-uring-accept", "IORING_OP_ACCEPT", |stage| {
        let (ring, listener) = (Ring::new(0)?, connected()?);
        one(stage, || ring.run(&Entry { operation: 13, fd: listener, ..Entry::default() }))
    }),
    path("io-uring-socket", "IORING_OP_SOCKET", |stage| {
        let ring = Ring::new(0)?;
        let call =
            Entry { operation: 45, fd: libc::AF_UNIX, off: libc::SOCK_STREAM as u64, ..Entry::default() };
        one(stage, || ring.run(&call))
    }),
    path("io-uring-pipe", "IORING_OP_PIPE: two fds in user memory", |stage| {
        let ring = Ring::new(0)?;
        two(stage, |ends| ring.run(&Entry { operation: 62, addr: ends as u64, ..Entry::default() }))
    }),
    path("io-uring-recvmsg", "IORING_OP_RECVMSG of an fd (SCM_RIGHTS)", |stage| {
        let (ring, [here, there]) = (Ring::new(0)?, socketpair()?);
        send(here, 0)?;
        received(stage, |message| {
            ring.run(&Entry { operation: 10, fd: there, addr: message as u64, len: 1, ..Entry::default() })
        })
    }),
    path("io-uring-close", "IORING_OP_CLOSE", |stage| {
        let (ring, fd) = (Ring::new(0)?, dup_above(0, HIGH)?);
        stage.begin()?;
        ring.run(&close(fd))?;
        stage.closed(fd);
        Ok(())
    }),
    path("io-uring-direct-open", "IORING_OP_OPENAT into a slot of the ring: open, in no fd table", |stage| {
        let ring = Ring::with_slot(-1)?;
        stage.begin()?;
        ring.run(&Entry { file_index: 1, ..openat() }).map(drop)
    }),
    path("io-uring-direct-close", "IORING_OP_CLOSE of a slot of the ring", |stage| {
        let ring = Ring::with_slot(-1)?;
        ring.run(&Entry { file_index: 1, ..openat() })?;
        stage.begin()?;
        ring.run(&Entry { file_index: 1, ..close(0) }).map(drop)
    }),
    path(
        "io-uring-register-files",
        "IORING_REGISTER_FILES, then close(2): the ring keeps the file",
        |stage| {
            let fd = dup_above(0, HIGH)?;
            let ring = Ring::new(0)?;
            stage.begin()?;
            ring.register(fd)?;
            sys!(libc::SYS_close, fd)?;
            stage.closed(fd);
            Ok(())
        },
    ),
    path("io-uring-fixed-fd-install", "IORING_OP_FIXED_FD_INSTALL: an fd for a slot of the ring", |stage| {
        let ring = Ring::with_slot(0)?;
        one(stage, || ring.run(&Entry { operation: 54, flags: FIXED_FILE, ..Entry::default() }))
    }),
    path(
        "io-worker",
        "a worker thread of io_uring: the kernel counts it in Threads:, and so does plumb",
        |stage| {
            let (ring, [end, _]) = (Ring::new(0)?, pipe()?);
            let mut threads = Threads::open()?;
            let mut buffer = 0u8;
            let before = threads.count()?;
            stage.begin()?;
            let addr = &raw mut buffer as u64;
            ring.submit(
                &Entry { operation: 22, flags: ASYNC, fd: end, addr, len: 1, ..Entry::default() },
                0,
            )?;
            // Up to 5.11 workers are kernel threads.
            let mut more = 0;
            for _ in 0..1000 {
                more = threads.count()? - before;
                if more != 0 {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            if more != 0 {
                stage.claim("threads", pid(), more);
            }
            Ok(())
        },
    ),
];

const SQPOLL: u32 = 2;
const FIXED_FILE: u8 = 1;
const ASYNC: u8 = 1 << 4;

/// `struct io_uring_sqe`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Entry {
    operation: u8,
    flags: u8,
    priority: u16,
    fd: i32,
    off: u64,
    addr: u64,
    len: u32,
    call_flags: u32,
    user_data: u64,
    buffer: u16,
    personality: u16,
    /// One more than the slot; 0 for an fd.
    file_index: u32,
    addr3: u64,
    reserved: u64,
}

fn openat() -> Entry {
    Entry { operation: 18, fd: libc::AT_FDCWD, addr: c"/".as_ptr() as u64, ..Entry::default() }
}

fn close(fd: i32) -> Entry {
    Entry { operation: 19, fd, ..Entry::default() }
}

/// A ring with one call at a time.
struct Ring {
    fd: i32,
    flags: u32,
    rings: *mut u8,
    entries: *mut Entry,
    /// `struct io_uring_params`: from word 10 the offsets of the submission ring, from 20 of the other.
    parameters: [u32; 30],
}

impl Ring {
    fn new(flags: u32) -> Result<Self> {
        const RINGS: i64 = 0;
        const ENTRIES: i64 = 0x1000_0000;
        let mut parameters = [0; 30];
        parameters[2] = flags;
        let fd = sys!(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr())?;
        let shared = libc::MAP_SHARED | libc::MAP_POPULATE;
        let size = (parameters[25] as usize + parameters[1] as usize * 16).max(parameters[16] as usize + 16);
        // Since 5.4 both rings are one mapping.
        let rings = sys::map(size, shared, fd, RINGS)?.cast();
        let entries = sys::map(4 * size_of::<Entry>(), shared, fd, ENTRIES)?.cast();
        Ok(Self { fd, flags, rings, entries, parameters })
    }

    /// With one slot for a file: this one, or empty for -1.
    fn with_slot(file: i32) -> Result<Self> {
        let ring = Self::new(0)?;
        ring.register(file)?;
        Ok(ring)
    }

    fn register(&self, file: i32) -> Result<()> {
        const FILES: u32 = 2;
        sys!(libc::SYS_io_uring_register, self.fd, FILES, &raw const file, 1).map(drop)
    }

    /// The word whose offset is in this word of the parameters.
    fn word(&self, parameter: usize) -> &AtomicU32 {
        // SAFETY: the offset comes from the kernel and is within the mapping, which is never removed.
        unsafe { AtomicU32::from_ptr(self.rings.add(self.parameters[parameter] as usize).cast()) }
    }

    /// Hands a call to the kernel and waits for so many results.
    fn submit(&self, entry: &Entry, results: u32) -> Result<()> {
        const TAIL: usize = 11;
        const MASK: usize = 12;
        const ARRAY: usize = 16;
        const GETEVENTS: u32 = 1;
        const SQ_WAKEUP: u32 = 2;
        let tail = self.word(TAIL).load(Ordering::Acquire);
        let slot = tail & self.word(MASK).load(Ordering::Relaxed);
        // SAFETY: the slot is below the number of entries, and the kernel is done with it.
        unsafe { self.entries.add(slot as usize).write(*entry) };
        // SAFETY: the array has as many words as there are entries.
        let index = unsafe { AtomicU32::from_ptr(self.word(ARRAY).as_ptr().add(slot as usize)) };
        index.store(slot, Ordering::Relaxed);
        self.word(TAIL).store(tail.wrapping_add(1), Ordering::Release);
        // The thread that polls takes the call by itself, if it is awake.
        let calls = u32::from(self.flags & SQPOLL == 0);
        sys!(libc::SYS_io_uring_enter, self.fd, calls, results, GETEVENTS | SQ_WAKEUP, 0, 0).map(drop)
    }

    /// The result of a call.
    fn run(&self, entry: &Entry) -> Result<i32> {
        const HEAD: usize = 20;
        const MASK: usize = 22;
        const RESULTS: usize = 25;
        self.submit(entry, 1)?;
        let head = self.word(HEAD).load(Ordering::Relaxed);
        let slot = head & self.word(MASK).load(Ordering::Relaxed);
        // SAFETY: struct io_uring_cqe is four words, the third of which is the result.
        let result = unsafe { self.word(RESULTS).as_ptr().add(slot as usize * 4 + 2).read_volatile() } as i32;
        self.word(HEAD).store(head.wrapping_add(1), Ordering::Release);
        if result < 0 { Err(std::io::Error::from_raw_os_error(-result)) } else { Ok(result) }
    }
}

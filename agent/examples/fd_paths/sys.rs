//! System calls as the kernel has them, and helper processes.

use std::{
    ffi::{CString, c_int, c_long, c_void},
    io,
    os::unix::ffi::OsStringExt,
    ptr,
};

pub(crate) type Result<T> = io::Result<T>;

/// What fits into a register.
pub(crate) trait Word {
    fn word(self) -> c_long;
}

macro_rules! words {
    ($($type:ty),*) => { $(impl Word for $type {
        fn word(self) -> c_long {
            self as c_long
        }
    })* };
}
words!(i32, u32, i64, u64, usize);

impl<T> Word for *const T {
    fn word(self) -> c_long {
        self as c_long
    }
}

impl<T> Word for *mut T {
    fn word(self) -> c_long {
        self as c_long
    }
}

/// # Safety
/// As the system call `number` wants it.
pub(crate) unsafe fn call(number: c_long, words: &[c_long]) -> Result<i32> {
    let mut all = [0; 6];
    all[..words.len()].copy_from_slice(words);
    let [a, b, c, d, e, f] = all;
    // SAFETY: as required.
    match unsafe { libc::syscall(number, a, b, c, d, e, f) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result as i32),
    }
}

/// A system call by its number. Pointers among the arguments must be to live memory of the size that the
/// call expects; all uses are in this program.
macro_rules! sys {
    ($number:expr $(, $argument:expr)* $(,)?) => {{
        let words: &[std::ffi::c_long] = &[$($crate::sys::Word::word($argument)),*];
        // SAFETY: every pointer handed in is to live memory as large as the call expects.
        unsafe { $crate::sys::call($number, words) }
    }};
}
pub(crate) use sys;

/// The id of this process.
pub(crate) fn pid() -> i32 {
    std::process::id() as i32
}

pub(crate) fn close(fd: i32) -> Result<()> {
    sys!(libc::SYS_close, fd).map(drop)
}

/// A new fd that is `lowest` or above; by default a copy of stdin's.
pub(crate) fn dup_above(fd: i32, lowest: i32) -> Result<i32> {
    sys!(libc::SYS_fcntl, fd, libc::F_DUPFD, lowest)
}

pub(crate) fn open(path: &str) -> Result<i32> {
    let path = CString::new(path)?;
    sys!(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), libc::O_RDONLY, 0)
}

pub(crate) fn pipe() -> Result<[i32; 2]> {
    let mut ends = [0; 2];
    sys!(libc::SYS_pipe2, ends.as_mut_ptr(), 0)?;
    Ok(ends)
}

pub(crate) fn socketpair() -> Result<[i32; 2]> {
    let mut ends = [0; 2];
    sys!(libc::SYS_socketpair, libc::AF_UNIX, libc::SOCK_STREAM, 0, ends.as_mut_ptr())?;
    Ok(ends)
}

/// This program.
pub(crate) fn executable() -> Result<CString> {
    Ok(CString::new(std::env::current_exe()?.into_os_string().into_vec())?)
}

/// Runs this program anew, in the place of this one.
pub(crate) fn exec(arguments: &[String]) -> Result<()> {
    let path = executable()?;
    let words: Vec<CString> =
        arguments.iter().map(|word| CString::new(word.as_str())).collect::<std::result::Result<_, _>>()?;
    let mut argv = vec![c"fd_paths".as_ptr()];
    argv.extend(words.iter().map(|word| word.as_ptr()));
    argv.push(ptr::null());
    let envp = [ptr::null::<i8>()];
    sys!(libc::SYS_execve, path.as_ptr(), argv.as_ptr(), envp.as_ptr()).map(drop)
}

/// Has this process end with its parent.
fn end_with(parent: i32) -> Result<()> {
    sys!(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0)?;
    if sys!(libc::SYS_getppid)? == parent { Ok(()) } else { sys!(libc::SYS_exit_group, 0).map(drop) }
}

/// Sleeps until the parent ends.
pub(crate) fn pause_with(parent: i32) -> Result<()> {
    end_with(parent)?;
    loop {
        // Returns only after a signal that was handled, of which there are none.
        let _ = sys!(libc::SYS_pause);
    }
}

/// `size` bytes of memory.
pub(crate) fn map(size: usize, flags: c_int, fd: i32, offset: i64) -> Result<*mut c_void> {
    // SAFETY: a mapping at an address that the kernel chooses disturbs no other.
    let at =
        unsafe { libc::mmap(ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, fd, offset) };
    if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at) }
}

/// A process that does its work in rounds, each when it is told to, and ends with this one.
pub(crate) struct Helper {
    pub(crate) pid: i32,
    channel: i32,
}

impl Helper {
    /// `flags` are those of clone(2). Call it from a process with one thread.
    pub(crate) fn start(flags: c_int, mut work: impl FnMut(u32) -> Result<i32>) -> Result<Self> {
        let [channel, far] = socketpair()?;
        let parent = pid();
        let child = sys!(libc::SYS_clone, flags | libc::SIGCHLD, 0, 0, 0, 0)?;
        if child != 0 {
            return Ok(Self { pid: child, channel });
        }
        end_with(parent)?;
        for round in 0.. {
            let mut byte = 0u8;
            sys!(libc::SYS_read, far, &raw mut byte, 1)?;
            let result = work(round).unwrap_or_else(|error| -error.raw_os_error().unwrap_or(libc::EIO));
            sys!(libc::SYS_write, far, &raw const result, size_of::<i32>())?;
        }
        pause_with(parent)?;
        unreachable!("it pauses for ever")
    }

    /// A copy of this process that does nothing.
    pub(crate) fn idle(flags: c_int) -> Result<Self> {
        Self::start(flags, |_| Ok(0))
    }

    pub(crate) fn tell(&self) -> Result<()> {
        sys!(libc::SYS_write, self.channel, &raw const *b"\n", 1).map(drop)
    }

    /// The result of the round it was told to do.
    pub(crate) fn result(&self) -> Result<i32> {
        let mut result = 0i32;
        let read = sys!(libc::SYS_read, self.channel, &raw mut result, size_of::<i32>())?;
        match result {
            _ if read == 0 => Err(io::ErrorKind::UnexpectedEof.into()),
            errno if errno < 0 => Err(io::Error::from_raw_os_error(-errno)),
            result => Ok(result),
        }
    }

    pub(crate) fn go(&self) -> Result<i32> {
        self.tell()?;
        self.result()
    }

    /// Ends it and waits until it is gone.
    pub(crate) fn kill(&self) -> Result<()> {
        sys!(libc::SYS_kill, self.pid, libc::SIGKILL)?;
        self.wait()
    }

    pub(crate) fn wait(&self) -> Result<()> {
        sys!(libc::SYS_wait4, self.pid, 0, 0, 0).map(drop)
    }
}

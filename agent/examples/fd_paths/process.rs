//! Tables and threads that come and go with processes.

use std::{
    ffi::CString,
    fs::File,
    io::{self, Read, Seek},
    mem::ManuallyDrop,
    ptr,
    sync::mpsc,
    thread,
    time::Duration,
};

use crate::{
    Path, Result, Stage, claim, path,
    sys::{self, Helper, dup_above, executable, pid, sys},
    table::HIGH,
};

pub(crate) const PATHS: &[Path] = &[
    path("fork", "fork(2): a copy of the table", |stage| born(stage, || clone3(0, 0, None))),
    path("clone-files", "clone(2) with CLONE_FILES: a process that shares the table", |stage| {
        born(stage, || clone3(libc::CLONE_FILES as u64, 0, None))
    }),
    path("vfork", "vfork and exec, as posix_spawn(3) does it", |stage| {
        let pipe = sys::pipe()?;
        born(stage, || spawn(pipe))
    }),
    path("clone3-pidfd", "clone3(2) with CLONE_PIDFD: an fd in the parent", |stage| {
        let mut pidfd = -1i32;
        stage.begin()?;
        clone3(libc::CLONE_PIDFD as u64, &raw mut pidfd as u64, None)?;
        stage.opened(pidfd);
        Ok(())
    }),
    path("pid-reuse", "a process ends and another one gets its pid", |stage| {
        let first = Helper::idle(0)?;
        dup_above(0, HIGH)?;
        stage.begin()?;
        first.kill()?;
        clone3(0, 0, Some(first.pid))?;
        stage.claim("exited", first.pid, 0);
        stage.claim("forked", pid(), first.pid);
        Ok(())
    }),
    path("exit", "a process ends: its table goes", |stage| {
        let child = Helper::idle(0)?;
        stage.begin()?;
        child.kill()?;
        stage.claim("exited", child.pid, 0);
        Ok(())
    }),
    path("exit-unreaped", "a process ends and nobody waits for it", |stage| {
        let child = Helper::start(0, |_| sys!(libc::SYS_exit_group, 0))?;
        stage.begin()?;
        child.tell()?;
        let mut info = [0u64; 16];
        let options = libc::WEXITED | libc::WNOWAIT;
        sys!(libc::SYS_waitid, libc::P_PID, child.pid, info.as_mut_ptr(), options, 0)?;
        stage.claim("exited", child.pid, 0);
        Ok(())
    }),
    path("exit-shared", "one of two processes that share a table ends: the table stays", |stage| {
        let child = Helper::idle(libc::CLONE_FILES)?;
        dup_above(0, HIGH)?;
        stage.begin()?;
        child.kill()?;
        stage.claim("exited", child.pid, 0);
        Ok(())
    }),
    path("shared-open", "a process opens an fd in a table that another one shares", |stage| {
        let child = Helper::start(libc::CLONE_FILES, |_| dup_above(0, HIGH))?;
        stage.begin()?;
        let fd = child.go()?;
        stage.claim("opened", child.pid, fd);
        Ok(())
    }),
    path("shared-close", "a process closes an fd in a table that another one shares", |stage| {
        let fd = dup_above(0, HIGH)?;
        let child = Helper::start(libc::CLONE_FILES, move |_| sys!(libc::SYS_close, fd))?;
        stage.begin()?;
        child.go()?;
        stage.claim("closed", child.pid, fd);
        Ok(())
    }),
    path(
        "unshare-files",
        "unshare(2) of the table, then close(2): the other process keeps the fd",
        |stage| {
            let fd = dup_above(0, HIGH)?;
            Helper::idle(libc::CLONE_FILES)?;
            stage.begin()?;
            sys!(libc::SYS_unshare, libc::CLONE_FILES)?;
            sys!(libc::SYS_close, fd)?;
            stage.closed(fd);
            Ok(())
        },
    ),
    path(
        "unshare-thread",
        "a thread unshares the table and opens an fd: /proc/PID/fd does not have it either",
        |stage| {
            let (go, told) = mpsc::channel();
            let (tell, opened) = mpsc::channel();
            thread::spawn(move || {
                let done = told.recv().map_err(io::Error::other).and_then(|()| {
                    sys!(libc::SYS_unshare, libc::CLONE_FILES)?;
                    dup_above(0, HIGH)
                });
                // The other end waits for it.
                let _ = tell.send(done);
                loop {
                    thread::park();
                }
            });
            stage.begin()?;
            go.send(()).map_err(io::Error::other)?;
            let fd = opened.recv().map_err(io::Error::other)??;
            stage.opened(fd);
            Ok(())
        },
    ),
    path("exec-cloexec", "exec closes what was marked", |stage| {
        let fd = marked()?;
        stage.begin()?;
        sys::exec(&["--resume".to_owned(), claim("closed", pid(), fd)])
    }),
    path("exec-shared", "exec of a process that shares its table: it gets its own first", |stage| {
        let fd = marked()?;
        Helper::idle(libc::CLONE_FILES)?;
        stage.begin()?;
        sys::exec(&["--resume".to_owned(), claim("closed", pid(), fd)])
    }),
    path("exec-thread", "exec from a thread that is not the leader: it takes the leader's id", |stage| {
        marked()?;
        let (go, told) = mpsc::channel::<()>();
        thread::spawn(move || -> Result<()> {
            told.recv().map_err(io::Error::other)?;
            sys::exec(&["--resume".to_owned(), claim("exec", pid(), 0), claim("threads", pid(), -1)])
        });
        stage.begin()?;
        go.send(()).map_err(io::Error::other)?;
        loop {
            thread::park();
        }
    }),
    path("thread", "a thread starts", |stage| {
        stage.begin()?;
        thread::spawn(|| {
            loop {
                thread::park();
            }
        });
        stage.claim("threads", pid(), 1);
        Ok(())
    }),
    path("thread-exit", "a thread ends", |stage| {
        let (go, told) = mpsc::channel::<()>();
        let thread = thread::spawn(move || told.recv());
        let mut threads = Threads::open()?;
        stage.begin()?;
        go.send(()).map_err(io::Error::other)?;
        let _ = thread.join();
        threads.wait_for(1)?;
        stage.claim("threads", pid(), -1);
        Ok(())
    }),
    path("leader-exits", "the leader ends before another thread, which opens an fd", |_| {
        let mut threads = Threads::open()?;
        thread::spawn(move || -> Result<()> {
            let mut stage = Stage { claims: Vec::new(), begun: false };
            threads.wait_for_zombie()?;
            stage.begin()?;
            let fd = dup_above(0, HIGH)?;
            stage.opened(fd);
            stage.finish()
        });
        // Ends this thread only.
        sys!(libc::SYS_exit, 0).map(drop)
    }),
    path("userfaultfd-fork", "read(2) of a userfaultfd's event of a fork", userfaultfd_fork),
];

/// A path that makes a process.
fn born(stage: &mut Stage, make: impl FnOnce() -> Result<i32>) -> Result<()> {
    dup_above(0, HIGH)?;
    stage.begin()?;
    let child = make()?;
    stage.claim("forked", pid(), child);
    Ok(())
}

/// An fd that exec closes.
fn marked() -> Result<i32> {
    sys!(libc::SYS_fcntl, 0, libc::F_DUPFD_CLOEXEC, HIGH)
}

/// Another process that runs this program and has started up.
fn spawn([started, say]: [i32; 2]) -> Result<i32> {
    let path = executable()?;
    let mut child = 0;
    let (parent, say) = (CString::new(pid().to_string())?, CString::new(say.to_string())?);
    let words = [c"fd_paths", c"--pause", &parent, &say];
    let mut argv = words.map(|word| word.as_ptr().cast_mut()).to_vec();
    argv.push(ptr::null_mut());
    let envp = [ptr::null_mut()];
    // SAFETY: both arrays end with a null pointer, and their strings live.
    let status = unsafe {
        libc::posix_spawn(
            &raw mut child,
            path.as_ptr(),
            ptr::null(),
            ptr::null(),
            argv.as_ptr(),
            envp.as_ptr(),
        )
    };
    if status != 0 {
        return Err(io::Error::from_raw_os_error(status));
    }
    let mut byte = 0u8;
    sys!(libc::SYS_read, started, &raw mut byte, 1)?;
    Ok(child)
}

/// A child that does nothing, with the given pid if there is one (since 5.5).
fn clone3(flags: u64, pidfd: u64, wanted: Option<i32>) -> Result<i32> {
    let wanted = wanted.as_ref();
    let set_tid = wanted.map_or(0, |pid| ptr::from_ref(pid) as u64);
    // flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup
    let arguments =
        [flags, pidfd, 0, 0, libc::SIGCHLD as u64, 0, 0, 0, set_tid, u64::from(wanted.is_some()), 0u64];
    let parent = pid();
    let child = sys!(libc::SYS_clone3, arguments.as_ptr(), size_of_val(&arguments))?;
    if child == 0 {
        sys::pause_with(parent)?;
    }
    Ok(child)
}

/// This process's status: looking at it again makes no fd. It stays open, so that its end is not seen either.
pub(crate) struct Threads(ManuallyDrop<File>);

impl Threads {
    pub(crate) fn open() -> Result<Self> {
        // Not /proc/self: where the leader has gone, that is the same and less obvious.
        Ok(Self(ManuallyDrop::new(File::open(format!("/proc/{}/status", pid()))?)))
    }

    fn field(&mut self, name: &str) -> Result<String> {
        let mut text = String::new();
        self.0.rewind()?;
        self.0.read_to_string(&mut text)?;
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        Ok(line.ok_or_else(|| io::Error::other(format!("no {name}")))?.trim().to_owned())
    }

    /// `Threads:`, as the kernel counts them.
    pub(crate) fn count(&mut self) -> Result<i32> {
        self.field("Threads:")?.parse().map_err(io::Error::other)
    }

    fn wait_for(&mut self, count: i32) -> Result<()> {
        while self.count()? != count {
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn wait_for_zombie(&mut self) -> Result<()> {
        while !self.field("State:")?.starts_with('Z') {
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// The fork waits until the event is read; the event brings a userfaultfd for the child.
fn userfaultfd_fork(stage: &mut Stage) -> Result<()> {
    const API: u64 = 0xaa;
    const EVENT_FORK: u64 = 2;
    const UFFDIO_API: u32 = 0xc018_aa3f;
    const UFFDIO_REGISTER: u32 = 0xc020_aa00;
    const MISSING: u64 = 1;
    const SIZE: usize = 4096;
    let uffd = sys!(libc::SYS_userfaultfd, libc::O_CLOEXEC)?;
    let api = [API, EVENT_FORK, 0];
    sys!(libc::SYS_ioctl, uffd, UFFDIO_API, api.as_ptr())?;
    let memory = sys::map(SIZE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)?;
    let range = [memory as u64, SIZE as u64, MISSING, 0];
    sys!(libc::SYS_ioctl, uffd, UFFDIO_REGISTER, range.as_ptr())?;
    let (go, told) = mpsc::channel();
    thread::spawn(move || -> Result<()> {
        told.recv().map_err(io::Error::other)?;
        let parent = pid();
        if sys!(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0)? == 0 {
            sys::pause_with(parent)?;
        }
        // The child ends with this thread.
        loop {
            thread::park();
        }
    });
    stage.begin()?;
    go.send(()).map_err(io::Error::other)?;
    let mut message = [0u32; 8];
    sys!(libc::SYS_read, uffd, message.as_mut_ptr(), size_of_val(&message))?;
    stage.opened(message[2] as i32);
    Ok(())
}

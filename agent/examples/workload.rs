//! Programs with a known behaviour, for the tests and for trying plumb out.
//!
//! `leak-fds FILE` and `leak-threads` leak one a second until they are ended. The others do what they are
//! named after, print `ready`, and go on when a line comes in on stdin; all end when stdin is closed.

use std::{
    env,
    fs::File,
    io::{self, BufRead, Read, Write},
    os::fd::IntoRawFd,
    thread,
    time::Duration,
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["leak-fds", path] => leak_fds(path),
        ["leak-threads"] => leak_threads(),
        ["hold-fds", count] => hold_fds(count.parse()?),
        ["hold-threads", count] => hold_threads(count.parse()?),
        ["hold-processes", count] => hold_crowd(count.parse()?, 1),
        ["hold-crowd", processes, threads] => hold_crowd(processes.parse()?, threads.parse()?),
        ["leader-exits"] => leader_exits(),
        ["fd-calls", folder] => fd_calls(folder),
        ["fd-storm", pairs] => fd_storm(pairs.parse()?),
        ["stacks"] => stacks(),
        ["vanishing-pipes"] => vanishing_pipes(),
        ["getppid", calls] => getppid(calls.parse()?),
        ["fork-storm", alive] => fork_storm(alive.parse()?),
        _ => Err("usage: workload leak-fds FILE | leak-threads | hold-fds N | hold-threads N | \
                  hold-processes N | hold-crowd PROCESSES THREADS | leader-exits | fd-calls FOLDER | \
                  fd-storm N | fork-storm N | getppid N | stacks | vanishing-pipes"
            .into()),
    }
}

fn leak_fds(path: &str) -> Result<()> {
    loop {
        let _leaked = File::open(path)?.into_raw_fd();
        // What a healthy program does beside it: a file that is closed again.
        drop(File::open("/proc/self/stat")?);
        thread::sleep(Duration::from_secs(1));
    }
}

fn leak_threads() -> Result<()> {
    loop {
        thread::Builder::new().name("leaky".to_owned()).spawn(forever)?;
        thread::sleep(Duration::from_secs(1));
    }
}

fn forever() {
    loop {
        thread::park();
    }
}

/// Prints where on its stack a word is, and at each line makes fds from a shallow and a deep stack, a thread, and
/// an fd from that.
fn stacks() -> Result<()> {
    let word = std::hint::black_box([0x706c_756d_6221_u64; 4]);
    println!("{}", word.as_ptr() as usize);
    while ready()? {
        // SAFETY: dup takes any number.
        let shallow = check(unsafe { libc::dup(0) })?;
        let deep = deep(48)?;
        // SAFETY: as above.
        let made = thread::spawn(|| check(unsafe { libc::dup(0) })).join();
        println!("made {shallow} {deep} {}", made.map_err(|_| "the thread panicked")??);
    }
    std::hint::black_box(&word);
    Ok(())
}

/// dup below so many frames of a KiB and more.
#[inline(never)]
fn deep(frames: u32) -> Result<i32> {
    let frame = std::hint::black_box([frames as u8; 1024]);
    // SAFETY: dup takes any number.
    let made = if frames == 0 { check(unsafe { libc::dup(0) })? } else { deep(frames - 1)? };
    std::hint::black_box(&frame);
    Ok(made)
}

/// Says that the stage is set, and waits for a line; false when stdin has been closed.
fn ready() -> Result<bool> {
    println!("ready");
    Ok(io::stdin().lock().read_line(&mut String::new())? > 0)
}

/// `count` 0 is as many as the hard limit allows.
fn hold_fds(count: u64) -> Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a live rlimit.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: as above.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) })?;
    for held in 0.. {
        // SAFETY: dup takes any number.
        match check(unsafe { libc::dup(0) }) {
            Err(error) if count == 0 && error.raw_os_error() == Some(libc::EMFILE) => break,
            fd => fd?,
        };
        if held + 1 == count {
            break;
        }
    }
    while ready()? {}
    Ok(())
}

fn hold_threads(count: usize) -> Result<()> {
    for i in 0..count {
        thread::Builder::new().name(format!("held-{i}")).stack_size(64 << 10).spawn(forever)?;
    }
    while ready()? {}
    Ok(())
}

/// Processes of so many threads each.
fn hold_crowd(processes: usize, threads: usize) -> Result<()> {
    let (mut started, mut starting) = io::pipe()?;
    for _ in 0..processes {
        // SAFETY: this process has one thread, so the child may do anything.
        if check(unsafe { libc::fork() })? == 0 {
            // SAFETY: a plain system call. The child ends with its parent.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            for _ in 1..threads {
                thread::Builder::new().stack_size(16 << 10).spawn(forever)?;
            }
            starting.write_all(&[0])?;
            forever();
        }
    }
    drop(starting);
    // Nobody is ready before everybody is; a child that failed has ended.
    started.read_exact(&mut vec![0; processes])?;
    while ready()? {}
    Ok(())
}

/// The leader ends and leaves the process to two other threads.
fn leader_exits() -> Result<()> {
    thread::spawn(forever);
    thread::Builder::new().name("heir".to_owned()).spawn(|| {
        while ready().unwrap_or(false) {}
        // SAFETY: ends the process without touching what the leader has left behind.
        unsafe { libc::_exit(0) }
    })?;
    // SAFETY: SYS_exit ends this thread only.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    Ok(())
}

/// Sends an fd from one end of a socket to the other, and returns the number that it has there.
fn pass(ends: [i32; 2], fd: i32, receive: i64) -> Result<i32> {
    let mut byte = 0u8;
    let mut data = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // Eight bytes are what control data is aligned to.
    let mut control = [0u64; 3];
    // SAFETY: all pointers are to live memory of the right size; all zero is a message.
    unsafe {
        let mut message: libc::mmsghdr = std::mem::zeroed();
        (message.msg_hdr.msg_iov, message.msg_hdr.msg_iovlen) = (&raw mut data, 1);
        (message.msg_hdr.msg_control, message.msg_hdr.msg_controllen) = ((&raw mut control).cast(), 24);
        let head = libc::CMSG_FIRSTHDR(&raw const message.msg_hdr);
        ((*head).cmsg_level, (*head).cmsg_type) = (libc::SOL_SOCKET, libc::SCM_RIGHTS);
        (*head).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(head).cast::<i32>().write_unaligned(fd);
        check(libc::sendmsg(ends[0], &raw const message.msg_hdr, 0) as i32)?;
        libc::CMSG_DATA(head).cast::<i32>().write_unaligned(-1);
        // recvmsg takes flags in its third argument, recvmmsg the number of messages.
        let third = i64::from(receive == libc::SYS_recvmmsg);
        check(libc::syscall(receive, ends[1], &raw mut message, third, 0, 0) as i32)?;
        Ok(libc::CMSG_DATA(head).cast::<i32>().read_unaligned())
    }
}

/// Makes every followed call and prints what it was, as `plumb watch` should see it.
fn fd_calls(folder: &str) -> Result<()> {
    ready()?;
    let mut seen: Vec<String> = Vec::new();
    let mut open = |name: &str, fd: i64| -> Result<i32> {
        seen.push(format!("open {name} {fd}"));
        Ok(check(i32::try_from(fd)?)?)
    };
    let path = std::ffi::CString::new(format!("{folder}/fd-calls"))?;
    let how = [libc::O_RDWR as u64, 0, 0];
    // SAFETY: all pointers are to live memory of the right size; the fds are this function's own.
    unsafe {
        use libc::syscall;
        let created = open("creat", syscall(libc::SYS_creat, path.as_ptr(), 0o600))?;
        let opened = open("open", syscall(libc::SYS_open, path.as_ptr(), libc::O_RDONLY, 0))?;
        let at = open("openat", syscall(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), libc::O_RDONLY, 0))?;
        open(
            "openat2",
            syscall(libc::SYS_openat2, libc::AT_FDCWD, path.as_ptr(), how.as_ptr(), size_of_val(&how)),
        )?;
        let listener = open("socket", syscall(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0))?;
        check(libc::listen(listener, 5))?;
        let mut address: libc::sockaddr_in = std::mem::zeroed();
        let mut length = size_of_val(&address) as libc::socklen_t;
        check(libc::getsockname(listener, (&raw mut address).cast(), &raw mut length))?;
        for (name, number) in [("accept", libc::SYS_accept), ("accept4", libc::SYS_accept4)] {
            let client = open("socket", syscall(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0))?;
            check(libc::connect(client, (&raw const address).cast(), length))?;
            open(name, syscall(number, listener, 0, 0, 0))?;
        }
        for (name, number) in [("pipe", libc::SYS_pipe), ("pipe2", libc::SYS_pipe2)] {
            let mut ends = [0i32; 2];
            check(i32::try_from(syscall(number, ends.as_mut_ptr(), 0))?)?;
            open(name, i64::from(ends[0]))?;
            open(name, i64::from(ends[1]))?;
        }
        open("dup", syscall(libc::SYS_dup, created))?;
        let high = open("fcntl", syscall(libc::SYS_fcntl, created, libc::F_DUPFD, 100))?;
        open("fcntl", syscall(libc::SYS_fcntl, created, libc::F_DUPFD_CLOEXEC, 100))?;
        let mut ends = [0i32; 2];
        check(i32::try_from(syscall(
            libc::SYS_socketpair,
            libc::AF_UNIX,
            libc::SOCK_DGRAM,
            0,
            &raw mut ends,
        ))?)?;
        open("socketpair", i64::from(ends[0]))?;
        open("socketpair", i64::from(ends[1]))?;
        for (name, number) in [("recvmsg", libc::SYS_recvmsg), ("recvmmsg", libc::SYS_recvmmsg)] {
            open(name, i64::from(pass(ends, created, number)?))?;
        }
        // Neither makes an fd.
        check(libc::fcntl(created, libc::F_GETFD))?;
        check(libc::syscall(libc::SYS_dup2, created, created) as i32)?;
        // Through the 32-bit entry; only calls without pointers can be made from here.
        let compat = compat_dup(created);
        open("dup", compat)?;
        seen.push(format!("replace dup2 {opened}"));
        check(libc::syscall(libc::SYS_dup2, created, opened) as i32)?;
        seen.push(format!("replace dup3 {at}"));
        check(libc::syscall(libc::SYS_dup3, created, at, libc::O_CLOEXEC) as i32)?;
        seen.push(format!("close close {created}"));
        check(libc::close(created))?;
        // A number that is not open closes nothing.
        libc::close(9999);
        if libc::syscall(libc::SYS_close_range, high, high + 1, 4) == 0 {
            seen.push(format!("close-on-exec close_range {high}-{}", high + 1));
        }
        check(libc::syscall(libc::SYS_close_range, high, high + 1, 0) as i32)?;
        seen.push(format!("close close_range {high}-{}", high + 1));
    }
    let mut stdout = io::stdout().lock();
    for line in seen {
        writeln!(stdout, "{line}")?;
    }
    drop(stdout);
    ready()?;
    Ok(())
}

/// `pairs` times dup and close, and no other fd call.
fn fd_storm(pairs: u32) -> Result<()> {
    while ready()? {
        for _ in 0..pairs {
            // SAFETY: dup and close take any number; this one was just made.
            unsafe { check(libc::close(check(libc::dup(0))?))? };
        }
    }
    Ok(())
}

/// Makes pipes into a page that another thread takes away again and again, a second long, then prints how many.
/// Whoever reads the two numbers after the call finds the page gone now and then.
fn vanishing_pipes() -> Result<()> {
    const PAGE: usize = 4096;
    // SAFETY: a new mapping; the other thread drops its content only, which may happen at any time.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let page = libc::mmap(std::ptr::null_mut(), PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().into());
        }
        let address = page as usize;
        thread::spawn(move || {
            loop {
                libc::madvise(address as *mut _, PAGE, libc::MADV_DONTNEED);
            }
        });
        ready()?;
        let mut pipes = 0;
        let began = std::time::Instant::now();
        while began.elapsed() < Duration::from_secs(1) {
            check(libc::pipe(page.cast()))?;
            pipes += 1;
            // Their numbers may be gone too.
            check(libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) as i32)?;
        }
        println!("{pipes}");
    }
    ready()?;
    Ok(())
}

/// First nothing, then a call that has to do with no fd.
fn getppid(calls: u32) -> Result<()> {
    ready()?;
    ready()?;
    for _ in 0..calls {
        // SAFETY: takes nothing, cannot fail.
        unsafe { libc::syscall(libc::SYS_getppid) };
    }
    ready()?;
    Ok(())
}

/// Forks without end, at most `alive` children at a time, which open a file, take a name of their own and
/// end after a moment or two.
fn fork_storm(alive: usize) -> Result<()> {
    // SAFETY: plain system calls on memory that lives long enough; one thread, so a child may do anything.
    unsafe {
        println!("ready");
        let mut stdin = libc::pollfd { fd: 0, events: libc::POLLIN, revents: 0 };
        let mut children = 0;
        for round in 0u32.. {
            while children > 0 && libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) > 0 {
                children -= 1;
            }
            if libc::poll(&raw mut stdin, 1, i32::from(children == alive)) != 0 {
                break;
            }
            if children == alive {
                continue;
            }
            match libc::fork() {
                0 => {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    let name = std::ffi::CString::new(format!("s{round}"))?;
                    libc::prctl(libc::PR_SET_NAME, name.as_ptr());
                    libc::dup(0);
                    libc::usleep(round % 50 * 20_000);
                    libc::_exit(0)
                }
                // No number or no memory is free: that is what a storm is for.
                -1 => thread::sleep(Duration::from_millis(1)),
                _ => children += 1,
            }
        }
    }
    Ok(())
}

/// dup, number 41 of the 32-bit table.
fn compat_dup(fd: i32) -> i64 {
    let result: i64;
    // SAFETY: the instruction clobbers nothing but its result; r8 to r11 may be zeroed on the way.
    unsafe {
        std::arch::asm!(
            "push rbx",
            "mov ebx, {fd:e}",
            "int 0x80",
            "pop rbx",
            fd = in(reg) fd,
            inout("rax") 41i64 => result,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    result
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

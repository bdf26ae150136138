//! Calls that return a new fd, or write two of them.

use std::ffi::CString;

use crate::{
    Path, Result, Stage, path,
    sys::{self, executable, pid, sys},
};

pub(crate) const PATHS: &[Path] = &[
    path("open", "open(2)", |stage| one(stage, || sys!(libc::SYS_open, c"/".as_ptr(), libc::O_RDONLY, 0))),
    path("open-failed", "an open(2) that fails", |stage| {
        stage.begin()?;
        match sys!(libc::SYS_open, c"/no/such/file".as_ptr(), libc::O_RDONLY, 0) {
            Err(_) => Ok(()),
            Ok(_) => Err(std::io::Error::other("/no/such/file exists")),
        }
    }),
    path("creat", "creat(2)", |stage| {
        let file = CString::new(format!("/tmp/fd_paths-{}", pid()))?;
        one(stage, || {
            let fd = sys!(libc::SYS_creat, file.as_ptr(), 0o600)?;
            sys!(libc::SYS_unlink, file.as_ptr())?;
            Ok(fd)
        })
    }),
    path("openat", "openat(2)", |stage| one(stage, || sys::open("/"))),
    path("openat-path", "openat(2) with O_PATH", |stage| {
        one(stage, || sys!(libc::SYS_openat, libc::AT_FDCWD, c"/".as_ptr(), libc::O_PATH, 0))
    }),
    path("openat2", "openat2(2)", |stage| {
        let how = [0u64; 3];
        one(stage, || sys!(libc::SYS_openat2, libc::AT_FDCWD, c"/".as_ptr(), how.as_ptr(), size_of_val(&how)))
    }),
    path("open-by-handle-at", "open_by_handle_at(2)", open_by_handle_at),
    path("open-tree", "open_tree(2) of a cloned mount", |stage| {
        one(stage, || sys!(libc::SYS_open_tree, libc::AT_FDCWD, c"/tmp".as_ptr(), 1))
    }),
    path("open-tree-attr", "open_tree_attr(2)", |stage| {
        one(stage, || sys!(SYS_OPEN_TREE_ATTR, libc::AT_FDCWD, c"/tmp".as_ptr(), 1, 0, 0))
    }),
    path("fsopen", "fsopen(2)", |stage| one(stage, fsopen)),
    path("fsmount", "fsmount(2)", |stage| {
        const CREATE: u32 = 6;
        let context = fsopen()?;
        sys!(libc::SYS_fsconfig, context, CREATE, 0, 0, 0)?;
        one(stage, || sys!(libc::SYS_fsmount, context, 0, 0))
    }),
    path("fspick", "fspick(2)", |stage| {
        one(stage, || sys!(libc::SYS_fspick, libc::AT_FDCWD, c"/proc".as_ptr(), 0))
    }),
    path("memfd-create", "memfd_create(2)", |stage| {
        one(stage, || sys!(libc::SYS_memfd_create, c"fd_paths".as_ptr(), 0))
    }),
    path("memfd-secret", "memfd_secret(2); up to 6.4 off unless the kernel is told at boot", |stage| {
        one(stage, || sys!(libc::SYS_memfd_secret, 0))
    }),
    path("socket", "socket(2)", |stage| {
        one(stage, || sys!(libc::SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM, 0))
    }),
    path("socketpair", "socketpair(2): two fds in user memory", |stage| {
        two(stage, |ends| sys!(libc::SYS_socketpair, libc::AF_UNIX, libc::SOCK_STREAM, 0, ends))
    }),
    path("accept", "accept(2)", |stage| {
        let listener = connected()?;
        one(stage, || sys!(libc::SYS_accept, listener, 0, 0))
    }),
    path("accept4", "accept4(2)", |stage| {
        let listener = connected()?;
        one(stage, || sys!(libc::SYS_accept4, listener, 0, 0, libc::SOCK_CLOEXEC))
    }),
    path("pipe", "pipe(2): two fds in user memory", |stage| two(stage, |ends| sys!(libc::SYS_pipe, ends))),
    path("pipe2", "pipe2(2)", |stage| two(stage, |ends| sys!(libc::SYS_pipe2, ends, libc::O_CLOEXEC))),
    path("epoll-create", "epoll_create(2)", |stage| one(stage, || sys!(libc::SYS_epoll_create, 1))),
    path("epoll-create1", "epoll_create1(2)", |stage| one(stage, || sys!(libc::SYS_epoll_create1, 0))),
    path("eventfd", "eventfd(2) without flags", |stage| one(stage, || sys!(libc::SYS_eventfd, 0))),
    path("eventfd2", "eventfd(2)", |stage| one(stage, || sys!(libc::SYS_eventfd2, 0, 0))),
    path("timerfd-create", "timerfd_create(2)", |stage| {
        one(stage, || sys!(libc::SYS_timerfd_create, libc::CLOCK_MONOTONIC, 0))
    }),
    path("signalfd", "signalfd(2) without flags", |stage| {
        one(stage, || sys!(libc::SYS_signalfd, -1, &raw const SIGNALS, 8))
    }),
    path("signalfd4", "signalfd(2)", |stage| one(stage, || signalfd4(-1))),
    path("signalfd4-again", "signalfd(2) with the fd it once returned: no new one", |stage| {
        let fd = signalfd4(-1)?;
        stage.begin()?;
        signalfd4(fd).map(drop)
    }),
    path("inotify-init", "inotify_init(2)", |stage| one(stage, || sys!(libc::SYS_inotify_init))),
    path("inotify-init1", "inotify_init1(2)", |stage| one(stage, || sys!(libc::SYS_inotify_init1, 0))),
    path("fanotify-init", "fanotify_init(2)", |stage| one(stage, || fanotify_init(0))),
    path("fanotify-read", "read(2) of a fanotify event: an fd of the file", |stage| {
        let fanotify = fanotify_with_an_event(0)?;
        stage.begin()?;
        let (fd, _) = fanotify_read(fanotify)?;
        stage.opened(fd);
        Ok(())
    }),
    path("fanotify-read-pidfd", "the same with FAN_REPORT_PIDFD: an fd of the process, too", |stage| {
        let fanotify = fanotify_with_an_event(FAN_REPORT_PIDFD)?;
        stage.begin()?;
        let (fd, pidfd) = fanotify_read(fanotify)?;
        stage.opened(fd);
        stage.opened(pidfd);
        Ok(())
    }),
    path("userfaultfd", "userfaultfd(2)", |stage| one(stage, || sys!(libc::SYS_userfaultfd, 0))),
    path("userfaultfd-device", "ioctl USERFAULTFD_IOC_NEW of /dev/userfaultfd", |stage| {
        let device = sys::open("/dev/userfaultfd")?;
        one(stage, || sys!(libc::SYS_ioctl, device, 0xaa00, 0))
    }),
    path("perf-event-open", "perf_event_open(2)", |stage| {
        // type PERF_TYPE_SOFTWARE, size PERF_ATTR_SIZE_VER0, config PERF_COUNT_SW_DUMMY
        let attributes = [1 | 64 << 32, 9, 0, 0, 0, 0, 0, 0u64];
        one(stage, || sys!(libc::SYS_perf_event_open, attributes.as_ptr(), 0, -1, -1, 0))
    }),
    path("mq-open", "mq_open(3)", |stage| {
        let name = CString::new(format!("fd_paths-{}", pid()))?;
        one(stage, || {
            let fd = sys!(libc::SYS_mq_open, name.as_ptr(), libc::O_CREAT | libc::O_RDWR, 0o600, 0)?;
            sys!(libc::SYS_mq_unlink, name.as_ptr())?;
            Ok(fd)
        })
    }),
    path("pidfd-open", "pidfd_open(2)", |stage| one(stage, || sys!(libc::SYS_pidfd_open, pid(), 0))),
    path("landlock-create-ruleset", "landlock_create_ruleset(2)", |stage| {
        let handled = 1u64;
        one(stage, || sys!(libc::SYS_landlock_create_ruleset, &raw const handled, 8, 0))
    }),
    path("bpf-map", "bpf(2): a map", |stage| one(stage, bpf_map)),
    path("bpf-map-by-id", "bpf(2): a map by its id", |stage| {
        let mut info = [0u32; 20];
        let attributes = [bpf_map()? as u64 | (size_of_val(&info) as u64) << 32, info.as_mut_ptr() as u64];
        bpf(15, &attributes)?;
        one(stage, || bpf(14, &[info[1].into()]))
    }),
    path("bpf-program", "bpf(2): a program", |stage| one(stage, || bpf_program(1))),
    path("bpf-btf", "bpf(2): types", |stage| {
        // Header of 24 bytes, one type (an int of 32 bits), three bytes of strings: "\0i\0".
        let btf = [0x0001_eb9fu32, 24, 0, 16, 16, 3, 1, 1 << 24, 4, 32, 0x6900];
        one(stage, || bpf(18, &[btf.as_ptr() as u64, 0, 43]))
    }),
    path("bpf-raw-tracepoint", "bpf(2): a link to a raw tracepoint", |stage| {
        const RAW_TRACEPOINT: u64 = 17;
        let program = bpf_program(RAW_TRACEPOINT)?;
        one(stage, || bpf(17, &[c"sched_process_hang".as_ptr() as u64, program as u64]))
    }),
    path("bpf-stats", "bpf(2): statistics, enabled while the fd is open", |stage| {
        one(stage, || bpf(32, &[0]))
    }),
    path("tiocgptpeer", "ioctl TIOCGPTPEER: the other end of a pseudo-terminal", |stage| {
        let ptmx = sys!(libc::SYS_openat, libc::AT_FDCWD, c"/dev/ptmx".as_ptr(), libc::O_RDWR, 0)?;
        let unlocked = 0;
        sys!(libc::SYS_ioctl, ptmx, libc::TIOCSPTLCK, &raw const unlocked)?;
        one(stage, || sys!(libc::SYS_ioctl, ptmx, 0x5441, libc::O_RDWR))
    }),
    path("ns-get-userns", "ioctl NS_GET_USERNS: the owner of a namespace", |stage| {
        let namespace = sys::open("/proc/self/ns/uts")?;
        one(stage, || sys!(libc::SYS_ioctl, namespace, 0xb701))
    }),
    path("ns-get-parent", "ioctl NS_GET_PARENT: the parent of a namespace", |stage| {
        let child = sys::Helper::start(0, |_| sys!(libc::SYS_unshare, libc::CLONE_NEWUSER))?;
        child.go()?;
        let namespace = sys::open(&format!("/proc/{}/ns/user", child.pid))?;
        one(stage, || sys!(libc::SYS_ioctl, namespace, 0xb702))
    }),
    path("pidfd-get-namespace", "ioctl PIDFD_GET_UTS_NAMESPACE", |stage| {
        let pidfd = sys!(libc::SYS_pidfd_open, pid(), 0)?;
        one(stage, || sys!(libc::SYS_ioctl, pidfd, 0xff0a, 0))
    }),
    path("siocgskns", "ioctl SIOCGSKNS: the network namespace of a socket", |stage| {
        let socket = sys!(libc::SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM, 0)?;
        one(stage, || sys!(libc::SYS_ioctl, socket, 0x894c))
    }),
    path("siocunixfile", "ioctl SIOCUNIXFILE: the file of a bound unix socket", |stage| {
        let socket = sys!(libc::SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM, 0)?;
        let name = format!("/tmp/fd_paths-{}", pid());
        let address = [&libc::AF_UNIX.to_ne_bytes()[..2], name.as_bytes(), b"\0"].concat();
        sys!(libc::SYS_bind, socket, address.as_ptr(), address.len())?;
        sys!(libc::SYS_unlink, address[2..].as_ptr())?;
        one(stage, || sys!(libc::SYS_ioctl, socket, 0x89e0))
    }),
];

const SYS_OPEN_TREE_ATTR: i64 = 467;
const FAN_REPORT_PIDFD: u32 = 0x80;
static SIGNALS: u64 = 1 << (libc::SIGUSR1 - 1);

/// One fd, returned.
pub(crate) fn one(stage: &mut Stage, call: impl FnOnce() -> Result<i32>) -> Result<()> {
    stage.begin()?;
    let fd = call()?;
    stage.opened(fd);
    Ok(())
}

/// Two fds, written to user memory.
pub(crate) fn two(stage: &mut Stage, call: impl FnOnce(*mut i32) -> Result<i32>) -> Result<()> {
    let mut ends = [0; 2];
    stage.begin()?;
    call(ends.as_mut_ptr())?;
    ends.into_iter().for_each(|fd| stage.opened(fd));
    Ok(())
}

fn open_by_handle_at(stage: &mut Stage) -> Result<()> {
    /// `struct file_handle` with room for the handle.
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        handle: [u8; 128],
    }
    let mut handle = Handle { bytes: 128, kind: 0, handle: [0; 128] };
    let mut mount = 0;
    sys!(libc::SYS_name_to_handle_at, libc::AT_FDCWD, c"/tmp".as_ptr(), &raw mut handle, &raw mut mount, 0)?;
    let anywhere = sys::open("/tmp")?;
    one(stage, || sys!(libc::SYS_open_by_handle_at, anywhere, &raw mut handle, libc::O_RDONLY))
}

fn fsopen() -> Result<i32> {
    sys!(libc::SYS_fsopen, c"tmpfs".as_ptr(), 0)
}

/// A listener with a connection that waits.
pub(crate) fn connected() -> Result<i32> {
    let listener = sys!(libc::SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM, 0)?;
    let client = sys!(libc::SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM, 0)?;
    let mut address = [0u8; 110];
    address[..2].copy_from_slice(&libc::AF_UNIX.to_ne_bytes()[..2]);
    // A unix socket without a path gets an abstract name.
    sys!(libc::SYS_bind, listener, address.as_ptr(), 2)?;
    sys!(libc::SYS_listen, listener, 5)?;
    let mut length = address.len() as u32;
    sys!(libc::SYS_getsockname, listener, address.as_mut_ptr(), &raw mut length)?;
    sys!(libc::SYS_connect, client, address.as_ptr(), length)?;
    Ok(listener)
}

fn signalfd4(fd: i32) -> Result<i32> {
    sys!(libc::SYS_signalfd4, fd, &raw const SIGNALS, 8, 0)
}

fn fanotify_init(flags: u32) -> Result<i32> {
    sys!(libc::SYS_fanotify_init, flags, libc::O_RDONLY)
}

/// An instance with the event of an open that this process has made.
fn fanotify_with_an_event(flags: u32) -> Result<i32> {
    const MARK_ADD: u32 = 1;
    const OPEN: u64 = 0x20;
    let fanotify = fanotify_init(flags)?;
    let file = executable()?;
    sys!(libc::SYS_fanotify_mark, fanotify, MARK_ADD, OPEN, libc::AT_FDCWD, file.as_ptr())?;
    sys::close(sys!(libc::SYS_openat, libc::AT_FDCWD, file.as_ptr(), libc::O_RDONLY, 0)?)?;
    Ok(fanotify)
}

/// The fd in the meta data, and the one in the record behind it if there is any.
fn fanotify_read(fanotify: i32) -> Result<(i32, i32)> {
    let mut event = [0i32; 16];
    sys!(libc::SYS_read, fanotify, event.as_mut_ptr(), size_of_val(&event))?;
    Ok((event[4], event[7]))
}

fn bpf(command: u32, attributes: &[u64]) -> Result<i32> {
    sys!(libc::SYS_bpf, command, attributes.as_ptr(), size_of_val(attributes))
}

/// An array of one word.
fn bpf_map() -> Result<i32> {
    const ARRAY: u64 = 2;
    bpf(0, &[ARRAY | 4 << 32, 4 | 1 << 32])
}

/// `return 0`.
fn bpf_program(kind: u64) -> Result<i32> {
    let code = [0xb7u64, 0x95];
    bpf(5, &[kind | 2 << 32, code.as_ptr() as u64, c"GPL".as_ptr() as u64])
}

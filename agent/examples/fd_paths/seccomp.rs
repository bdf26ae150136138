//! What a supervisor or a filter does in the place of a system call: fds installed from outside, and results
//! that are not true.

use crate::{
    Path, Result,
    create::one,
    path,
    sys::{Helper, dup_above, sys},
    table::HIGH,
};

pub(crate) const PATHS: &[Path] = &[
    path("seccomp-listener", "seccomp(2) with a listener", |stage| {
        one(stage, || listener(libc::SYS_getppid))
    }),
    path("seccomp-addfd", "SECCOMP_IOCTL_NOTIF_ADDFD: an fd installed from outside", |stage| {
        let mut supervised = Supervised::start(libc::SYS_getppid)?;
        stage.begin()?;
        let fd = supervised.run(|call| call.install(0, 0))?.0;
        stage.claim("opened", supervised.child.pid, fd);
        Ok(())
    }),
    path("seccomp-addfd-setfd", "the same over an open fd, which is closed", |stage| {
        let mut supervised = Supervised::start(libc::SYS_getppid)?;
        stage.begin()?;
        let fd = supervised.run(|call| call.install(SETFD, HIGH))?.0;
        stage.claim("replaced", supervised.child.pid, fd);
        Ok(())
    }),
    path("seccomp-addfd-send", "the same as the answer to an openat(2), which returns the fd", |stage| {
        let mut supervised = Supervised::start(libc::SYS_openat)?;
        stage.begin()?;
        let fd = supervised.run(|call| call.install(SEND, 0))?.0;
        stage.claim("opened", supervised.child.pid, fd);
        Ok(())
    }),
    path("forged-open", "a supervisor answers openat2(2) with 777, without an fd", |stage| {
        let mut supervised = Supervised::start(libc::SYS_openat2)?;
        stage.begin()?;
        let (_, returned) = supervised.run(|call| call.answer(777))?;
        expect(returned, 777)?;
        stage.claim("forged", supervised.child.pid, 1);
        Ok(())
    }),
    path(
        "forged-open-of-another",
        "a supervisor answers openat2(2) with an fd that was open before",
        |stage| {
            let mut supervised = Supervised::start(libc::SYS_openat2)?;
            stage.begin()?;
            let (_, returned) = supervised.run(|call| call.answer(HIGH))?;
            expect(returned, HIGH)
        },
    ),
    path("forged-close", "a filter answers close(2) with 0, without closing", |stage| {
        let fd = dup_above(0, HIGH)?;
        // Error number 0: no error.
        filter(libc::SYS_close, Some(fd), libc::SECCOMP_RET_ERRNO, 0)?;
        stage.begin()?;
        sys!(libc::SYS_close, fd).map(drop)
    }),
];

const SETFD: u32 = 1;
const SEND: u32 = 2;
const NOTIF_RECV: u32 = 0xc050_2100;
const NOTIF_SEND: u32 = 0xc018_2101;
const NOTIF_ADDFD: u32 = 0x4018_2103;

fn expect(returned: i32, wanted: i32) -> Result<()> {
    if returned == wanted { Ok(()) } else { Err(std::io::Error::other(format!("it returned {returned}"))) }
}

/// A filter for one call, optionally with one first argument only. Returns what seccomp(2) does.
fn filter(call: i64, first: Option<i32>, action: u32, flags: u64) -> Result<i32> {
    // struct sock_filter: code, jumps if true and if false, constant. Offsets into struct seccomp_data.
    const LOAD: u64 = 0x20;
    const EQUAL: u64 = 0x15;
    const RETURN: u64 = 0x06;
    const fn instruction(code: u64, no: u64, constant: u64) -> u64 {
        code | no << 24 | constant << 32
    }
    let mut code = vec![instruction(LOAD, 0, 0)];
    let rest = if first.is_some() { 3 } else { 1 };
    code.push(instruction(EQUAL, rest, call as u64));
    if let Some(first) = first {
        code.push(instruction(LOAD, 0, 16));
        code.push(instruction(EQUAL, 1, first as u64));
    }
    code.push(instruction(RETURN, 0, action.into()));
    code.push(instruction(RETURN, 0, libc::SECCOMP_RET_ALLOW.into()));
    let program = [code.len(), code.as_ptr() as usize];
    sys!(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, program.as_ptr())
}

/// The fd on which this process's calls of one kind are announced.
fn listener(call: i64) -> Result<i32> {
    filter(call, None, libc::SECCOMP_RET_USER_NOTIF, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER)
}

/// A process one of whose calls is answered by this one.
struct Supervised {
    child: Helper,
    listener: i32,
}

impl Supervised {
    /// The process has an open fd `HIGH`.
    fn start(call: i64) -> Result<Self> {
        dup_above(0, HIGH)?;
        let child = Helper::start(0, move |round| match round {
            0 => listener(call),
            _ if call == libc::SYS_getppid => sys!(call),
            _ => {
                let how = [0u64; 3];
                sys!(call, libc::AT_FDCWD, c"/".as_ptr(), how.as_ptr(), size_of_val(&how))
            }
        })?;
        let theirs = child.go()?;
        let pidfd = sys!(libc::SYS_pidfd_open, child.pid, 0)?;
        let listener = sys!(libc::SYS_pidfd_getfd, pidfd, theirs, 0)?;
        Ok(Self { child, listener })
    }

    /// Has it make the call. Returns what `serve` does, and what the call returned.
    fn run(&mut self, serve: impl FnOnce(&Call) -> Result<i32>) -> Result<(i32, i32)> {
        self.child.tell()?;
        // struct seccomp_notif, which begins with the id
        let mut notification = [0u64; 10];
        sys!(libc::SYS_ioctl, self.listener, NOTIF_RECV, notification.as_mut_ptr())?;
        let served = serve(&Call { listener: self.listener, id: notification[0] });
        if served.is_err() {
            // Whatever went wrong, the process must not hang.
            let _ = Call { listener: self.listener, id: notification[0] }.answer(0);
        }
        let served = served?;
        Ok((served, self.child.result()?))
    }
}

/// A call that waits for its answer.
struct Call {
    listener: i32,
    id: u64,
}

impl Call {
    fn answer(&self, value: i32) -> Result<i32> {
        // struct seccomp_notif_resp: id, value, error and flags
        let answer = [self.id, value as u64, 0];
        sys!(libc::SYS_ioctl, self.listener, NOTIF_SEND, answer.as_ptr())
    }

    /// Installs stdout; returns the number it got.
    fn install(&self, flags: u32, over: i32) -> Result<i32> {
        // struct seccomp_notif_addfd: id, flags and source, new fd and its flags
        let request = [self.id, u64::from(flags) | 1 << 32, over as u64];
        let fd = sys!(libc::SYS_ioctl, self.listener, NOTIF_ADDFD, request.as_ptr())?;
        if flags & SEND == 0 {
            self.answer(0)?;
        }
        Ok(fd)
    }
}

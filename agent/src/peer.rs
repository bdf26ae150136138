//! Who is at the other end of a connection to a Unix socket, by the kernel's word.

use std::{
    mem::size_of,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::Arc,
};

use tokio::net::UnixStream;

use crate::drain::{Caller, NoProcess, Process, Refusal, pid_of};

/// `SO_PEERPIDFD` of include/uapi/asm-generic/socket.h, since 6.5.
const SO_PEERPIDFD: i32 = 77;

/// A user that nobody is, and that owns nothing: whoever is not known may do nothing.
const NOBODY: u32 = u32::MAX;

/// Whoever connected.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub caller: Caller,
    /// Of the process that connected; `None` before 6.5, or when it has ended.
    pidfd: Option<Arc<OwnedFd>>,
}

impl Peer {
    /// `is_admin`: only the administrator can open that socket.
    pub(crate) fn of(stream: &UnixStream, is_admin: bool) -> Self {
        let uid = stream.peer_cred().map_or(NOBODY, |credentials| credentials.uid());
        // Root of the host has the other socket; here it may be root of a container only.
        let uid = if uid == 0 && !is_admin { NOBODY } else { uid };
        Self { caller: Caller { uid, is_admin }, pidfd: pidfd(stream).map(Arc::new) }
    }

    /// The process itself, to be registered.
    pub(crate) fn process(&self) -> Result<Process, Refusal> {
        let unknown = |why: &str| Refusal::UnknownPeer(why.to_owned());
        let Some(pidfd) = &self.pidfd else {
            return Err(unknown(
                "this kernel does not say it (SO_PEERPIDFD, since 6.5): name pid and start_ticks",
            ));
        };
        let pid = pid_of(pidfd).ok_or_else(|| unknown("it has ended, or is of another pid namespace"))?;
        let pidfd = pidfd.try_clone().map_err(|error| unknown(&error.to_string()))?;
        Process::of_pidfd(pid, pidfd).map_err(refusal)
    }
}

/// A process that cannot be taken, for who asked.
pub(crate) fn refusal(why: NoProcess) -> Refusal {
    match why {
        NoProcess::Denied(pid, what) => Refusal::NotYourProcess(pid, format!("it is {what}")),
        why => Refusal::NoSuchProcess(why.to_string()),
    }
}

fn pidfd(stream: &UnixStream) -> Option<OwnedFd> {
    let (mut fd, mut len) = (-1_i32, size_of::<i32>() as libc::socklen_t);
    // SAFETY: both places can be written, and have room for what the kernel writes there.
    let status = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut len,
        )
    };
    // SAFETY: the kernel has made this fd for us.
    (status == 0 && fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

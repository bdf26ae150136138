//! Sends a signal to a process that was looked at again just before. The only place of a drain that can.

use rustix::{
    io::Errno,
    process::{Signal, pidfd_send_signal},
};

use super::{
    course::NotSent,
    identity::Identity,
    process::{NoProcess, Process},
};

/// Signals `process` if it still is what was `meant`, for a service of `uid`.
///
/// Between the last look and the signal a process may still run another program: that takes microseconds, and it is the
/// same process of the same user.
pub(crate) fn send(process: &Process, meant: &Identity, uid: u32, signal: i32) -> Result<(), NotSent> {
    let now = process.again().map_err(|why| match why {
        NoProcess::Gone(_) => NotSent::Gone,
        why => NotSent::Refused(why.to_string()),
    })?;
    if let Some(why) = meant.differs(&now.identity) {
        return Err(NotSent::Refused(why));
    }
    if !now.may_be_signalled_by(uid) {
        return Err(NotSent::Refused(format!("process {} belongs to user {} now", meant.pid, now.uids.0)));
    }
    let Some(signal) = Signal::from_named_raw(signal) else {
        return Err(NotSent::Refused(format!("{signal} is no signal")));
    };
    match pidfd_send_signal(process.pidfd(), signal) {
        Ok(()) => Ok(()),
        Err(Errno::SRCH) => Err(NotSent::Gone),
        Err(error) => Err(NotSent::Refused(format!("process {}: {error}", meant.pid))),
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::ExitStatusExt, process::Command};

    use super::*;

    #[test]
    fn only_what_was_meant_gets_a_signal() {
        let mut child = Command::new("sleep").arg("30").spawn().unwrap();
        let process = Process::open(child.id()).unwrap();
        let meant = process.identity.clone();
        for other in [
            Identity { start_ticks: meant.start_ticks + 1, ..meant.clone() },
            Identity { exe: (0, 0), ..meant.clone() },
            Identity { cgroup: "0::/elsewhere\n".to_owned(), ..meant.clone() },
        ] {
            assert!(
                matches!(send(&process, &other, 0, libc::SIGTERM), Err(NotSent::Refused(_))),
                "{other:?}"
            );
        }
        let stranger = meant.uid + 4321;
        assert!(matches!(send(&process, &meant, stranger, libc::SIGTERM), Err(NotSent::Refused(_))));
        assert!(process.is_alive());
        send(&process, &meant, meant.uid, libc::SIGTERM).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGTERM));
        assert_eq!(send(&process, &meant, meant.uid, libc::SIGTERM), Err(NotSent::Gone));
    }
}

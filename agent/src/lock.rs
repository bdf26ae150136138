//! Locks that make an agent the only one in a folder.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::Duration,
};

use rustix::{fs::FlockOperation, io::Errno};
use tokio::time::{Instant, sleep};

/// One that is killed has its locks until its memory is gone.
const PATIENCE: Duration = Duration::from_secs(2);
const RETRY: Duration = Duration::from_millis(50);

/// What became of it.
#[derive(Debug)]
pub(crate) enum Lock {
    /// For as long as the file is open.
    Taken(File),
    /// By the process with this pid.
    Held(String),
}

/// Takes the lock of a folder, which waits a moment for whoever is ending.
pub(crate) async fn take(folder: &Path) -> io::Result<Lock> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let mut file = options.open(folder.join("agent.lock"))?;
    let end = Instant::now() + PATIENCE;
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(Errno::WOULDBLOCK) if Instant::now() < end => sleep(RETRY).await,
            Err(Errno::WOULDBLOCK) => {
                let mut pid = String::new();
                let _ = (&file).take(16).read_to_string(&mut pid);
                return Ok(Lock::Held(pid.trim().to_owned()));
            }
            Err(error) => return Err(error.into()),
        }
    }
    file.set_len(0)?;
    writeln!(file, "{}", std::process::id())?;
    Ok(Lock::Taken(file))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_has_it_and_the_next_gets_it_as_soon_as_that_one_ends() {
        let folder = std::env::temp_dir().join(format!("plumb-lock-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let Lock::Taken(first) = take(&folder).await.unwrap() else { panic!("nobody has it") };
        let own = std::process::id().to_string();
        assert!(matches!(take(&folder).await.unwrap(), Lock::Held(pid) if pid == own));
        let ending = async {
            sleep(Duration::from_millis(200)).await;
            drop(first);
        };
        let (next, ()) = tokio::join!(take(&folder), ending);
        assert!(matches!(next.unwrap(), Lock::Taken(_)));
        fs::remove_dir_all(&folder).unwrap();
    }
}

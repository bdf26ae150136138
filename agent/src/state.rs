//! The state folder: what the detector has found, kept over a restart of the agent. A folder that cannot be used, and
//! a file that cannot be believed, are a warning, and the agent goes on without.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::watch,
    task::{JoinHandle, spawn_blocking},
};

use crate::detect::Saved;

/// Of what is written; another one is not read.
const VERSION: u32 = 1;
/// The file is this long at most, in bytes.
const LIMIT: u64 = 8 << 20;
const NAME: &str = "findings.json";

/// The whole file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: u32,
    /// Times since boot and pids mean nothing after another boot.
    boot_id: String,
    findings: Vec<Saved>,
}

/// A state folder that can be used.
#[derive(Clone, Debug)]
pub(crate) struct StateDir {
    folder: PathBuf,
    boot_id: String,
}

impl StateDir {
    /// Opens the folder, and makes it if need be, for its owner only.
    pub(crate) fn open(folder: &Path, boot_id: String) -> Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let found = fs::metadata(folder)?;
        ensure!(found.mode() & 0o022 == 0, "it can be written by others");
        ensure!(found.uid() == rustix::process::geteuid().as_raw(), "it belongs to somebody else");
        // What cannot be written is found out now, and not when it is too late.
        let probe = folder.join(".probe");
        File::create(&probe).and_then(|_| fs::remove_file(&probe))?;
        Ok(Self { folder: folder.to_owned(), boot_id })
    }

    fn file(&self) -> PathBuf {
        self.folder.join(NAME)
    }

    /// What was saved since this boot; empty when nothing was.
    pub(crate) fn load(&self) -> Result<Vec<Saved>> {
        let mut options = File::options();
        let file =
            match options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(self.file()) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
                Err(error) => return Err(error.into()),
            };
        ensure!(file.metadata()?.is_file(), "it is no file");
        let mut bytes = Vec::new();
        file.take(LIMIT + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > LIMIT {
            bail!("it is longer than {LIMIT} bytes");
        }
        let document: Document = serde_json::from_slice(&bytes).context("it is not what plumb writes")?;
        ensure!(document.version == VERSION, "it has version {}, not {VERSION}", document.version);
        Ok(if document.boot_id == self.boot_id { document.findings } else { Vec::new() })
    }

    /// Puts a file that cannot be believed aside, for whoever wants to know why.
    pub(crate) fn set_aside(&self) -> PathBuf {
        let aside = self.folder.join(format!("{NAME}.refused"));
        // What cannot be renamed is overwritten by the next save.
        let _ = fs::rename(self.file(), &aside);
        aside
    }

    /// Writes all, or leaves what was there.
    pub(crate) fn save(&self, findings: Vec<Saved>) -> Result<()> {
        let document = Document { version: VERSION, boot_id: self.boot_id.clone(), findings };
        let bytes = serde_json::to_vec(&document)?;
        ensure!(bytes.len() as u64 <= LIMIT, "{} bytes are too much", bytes.len());
        replace(&self.folder, NAME, &bytes)?;
        Ok(())
    }
}

/// Keeps what is sent last, beside whoever sends it: a slow disk holds up nobody. The task ends when all senders are gone
/// and the last is kept.
pub(crate) fn keeper(state: StateDir) -> (watch::Sender<Vec<Saved>>, JoinHandle<()>) {
    let (newest, mut given) = watch::channel(Vec::new());
    let keeper = tokio::spawn(async move {
        while given.changed().await.is_ok() {
            let (saved, state) = (given.borrow_and_update().clone(), state.clone());
            if let Ok(Err(error)) = spawn_blocking(move || state.save(saved)).await {
                tracing::warn!("findings are not kept: {error:#}");
            }
        }
    });
    (newest, keeper)
}

/// Puts a file in the place of another one, for its owner only: all of it is on the disk, or what was there is.
pub(crate) fn replace(folder: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let draft = folder.join(format!("{name}.new"));
    let _ = fs::remove_file(&draft);
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&draft)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&draft, folder.join(name))?;
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let folder = std::env::temp_dir().join(format!("plumb-state-{}-{name}", std::process::id()));
            let _ = fs::remove_dir_all(&folder);
            Self(folder)
        }

        fn open(&self, boot: &str) -> Result<StateDir> {
            StateDir::open(&self.0, boot.to_owned())
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn what_was_saved_is_there_after_a_restart_and_not_after_a_boot() {
        let folder = Folder::new("same");
        let state = folder.open("boot").unwrap();
        assert_eq!(fs::metadata(&folder.0).unwrap().permissions().mode() & 0o777, 0o700);
        assert!(state.load().unwrap().is_empty());
        let saved = crate::detect::Saved::example();
        state.save(vec![saved.clone()]).unwrap();
        state.save(vec![saved.clone(), saved.clone()]).unwrap();
        assert_eq!(state.load().unwrap(), [saved.clone(), saved]);
        assert!(folder.open("another").unwrap().load().unwrap().is_empty());
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1, "nothing else is left");
    }

    #[tokio::test]
    async fn what_is_sent_last_is_kept_when_nobody_sends_any_more() {
        let folder = Folder::new("keeper");
        let state = folder.open("boot").unwrap();
        let (newest, keeper) = keeper(state.clone());
        let saved = crate::detect::Saved::example();
        for many in 0..=100 {
            newest.send_replace(vec![saved.clone(); many]);
        }
        drop(newest);
        keeper.await.unwrap();
        assert_eq!(state.load().unwrap().len(), 100);
    }

    #[test]
    fn what_cannot_be_believed_is_refused_and_kept_aside() {
        let folder = Folder::new("hostile");
        let state = folder.open("boot").unwrap();
        let file = folder.0.join(NAME);
        let good = serde_json::to_string(&Document { version: 1, boot_id: "boot".into(), findings: vec![] })
            .unwrap();
        for text in
            ["", "{", "[]", &good.replace('1', "2"), &good[..good.len() - 1], &good.replace("}", ",\"x\":1}")]
        {
            fs::write(&file, text).unwrap();
            assert!(state.load().is_err(), "{text}");
        }
        fs::write(&file, vec![b'['; 200_000]).unwrap();
        assert!(state.load().is_err(), "deeper than any stack");
        fs::write(&file, vec![b' '; LIMIT as usize + 1]).unwrap();
        assert!(state.load().unwrap_err().to_string().contains("longer"));
        let aside = state.set_aside();
        assert!(aside.exists() && state.load().unwrap().is_empty());
        symlink(&aside, &file).unwrap();
        assert!(state.load().is_err(), "a link is not followed");
    }

    #[test]
    fn a_folder_that_others_can_write_is_not_used() {
        let folder = Folder::new("open");
        fs::create_dir(&folder.0).unwrap();
        fs::set_permissions(&folder.0, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(folder.open("boot").unwrap_err().to_string().contains("others"));
        fs::write(folder.0.join("file"), "").unwrap();
        assert!(StateDir::open(&folder.0.join("file/state"), String::new()).is_err());
    }
}

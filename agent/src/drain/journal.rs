//! The journal of a drain under way: what an agent that was killed tells the next one of the same boot. It is in the run
//! folder, which is in memory on most hosts: a stop that waits for a busy disk comes late.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use super::course::Entry;

const NAME: &str = "drain.journal";
/// The file is this long at most, in bytes.
const LIMIT: u64 = 16 << 20;

/// A journal that is written to.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    path: PathBuf,
    /// Bytes that are written.
    len: u64,
}

impl Journal {
    /// A new one in a folder, in the place of an old one.
    pub(super) fn create(folder: &Path) -> io::Result<Self> {
        let path = folder.join(NAME);
        let _ = fs::remove_file(&path);
        let mut options = File::options();
        let file = options.append(true).create_new(true).mode(0o600).open(&path)?;
        File::open(folder)?.sync_all()?;
        Ok(Self { file, path, len: 0 })
    }

    /// The one that another agent left, with what is in it. A last line that was not finished was not acted upon.
    pub(super) fn open(folder: &Path) -> io::Result<Option<(Self, Vec<Entry>)>> {
        let path = folder.join(NAME);
        let mut options = File::options();
        options.read(true).append(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let mut file = match options.open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut text = String::new();
        (&mut file).take(LIMIT + 1).read_to_string(&mut text)?;
        if text.len() as u64 > LIMIT {
            return Err(io::Error::other("it is too long"));
        }
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        file.set_len(whole as u64)?;
        let entries = text[..whole].lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        Ok(Some((Self { file, path, len: whole as u64 }, entries)))
    }

    /// Puts one that cannot be read aside, for whoever wants to know why.
    pub(super) fn set_aside(folder: &Path) -> PathBuf {
        let aside = folder.join(format!("{NAME}.refused"));
        // What cannot be renamed is replaced by the next drain's.
        let _ = fs::rename(folder.join(NAME), &aside);
        aside
    }

    /// Writes entries, and returns when they are as safe as the file system of the folder makes them.
    pub(super) fn append(&mut self, entries: &[Entry]) -> io::Result<()> {
        let mut text = Vec::new();
        for entry in entries {
            serde_json::to_writer(&mut text, entry)?;
            text.push(b'\n');
        }
        self.len += text.len() as u64;
        if self.len > LIMIT {
            return Err(io::Error::other("it is too long"));
        }
        self.file.write_all(&text)?;
        self.file.sync_data()
    }

    /// Nobody is to go on with it.
    pub(super) fn remove(self) -> io::Result<()> {
        fs::remove_file(&self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_again_but_for_a_line_that_was_cut() {
        let folder = std::env::temp_dir().join(format!("plumb-journal-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        assert!(Journal::open(&folder).unwrap().is_none());
        let mut journal = Journal::create(&folder).unwrap();
        let entries = [Entry::Resumed { at: 1 }, Entry::Late { at: 2, service: 3 }];
        journal.append(&entries[..1]).unwrap();
        journal.append(&entries[1..]).unwrap();
        let path = folder.join(NAME);
        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let (mut journal, read) = Journal::open(&folder).unwrap().unwrap();
            assert_eq!(read, &entries[..read.len()]);
            assert_eq!(read.len(), whole[..cut].iter().filter(|byte| **byte == b'\n').count());
            // What comes next is a line of its own.
            journal.append(&entries[..1]).unwrap();
            assert_eq!(Journal::open(&folder).unwrap().unwrap().1.len(), read.len() + 1);
        }
        fs::write(&path, "nonsense\n").unwrap();
        assert!(Journal::open(&folder).is_err());
        assert!(Journal::set_aside(&folder).exists() && Journal::open(&folder).unwrap().is_none());
        Journal::create(&folder).unwrap().remove().unwrap();
        assert!(!path.exists());
        fs::remove_dir_all(&folder).unwrap();
    }
}

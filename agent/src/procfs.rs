//! What only /proc knows of a process: its executable and its cgroup. Read once per image, never per pass.

use std::{
    fs,
    io::Read,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use foldhash::HashMap;
use plumb_common::{
    limits::COMM_LEN,
    task::{FLAG_KERNEL_THREAD, ProcKey, TaskRecord},
};

use crate::{group, text};

/// The words that describe a process; shared by every view of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ProcStatic {
    /// Name of the leader.
    pub comm: Box<str>,
    /// Path of the executable; `None` for a kernel thread, or when it may not be read.
    pub exe: Option<Box<str>>,
    /// See `group`.
    pub group: Arc<str>,
}

impl ProcStatic {
    /// All that is known of a process that no pass has shown yet.
    #[must_use]
    pub(crate) fn of_comm(comm: &[u8; COMM_LEN]) -> Self {
        let comm = text::terminated(comm);
        Self { group: comm.as_str().into(), comm: comm.into(), exe: None }
    }
}

/// Processes read in one pass at most; each takes about 30 us.
const PER_PASS: usize = 2048;

/// Text read of one file at most, in bytes.
const FILE_LIMIT: u64 = 16 << 10;

/// Describes processes and remembers the descriptions for as long as they hold.
#[derive(Debug)]
pub(crate) struct Describer {
    root: PathBuf,
    known: HashMap<ProcKey, Known>,
    pass: u64,
    /// Processes that may still be read in this pass.
    budget: usize,
}

#[derive(Debug)]
struct Known {
    exec_id: u64,
    css_set: u64,
    comm: [u8; COMM_LEN],
    seen: u64,
    words: Arc<ProcStatic>,
}

impl Describer {
    /// Reads below `root`, normally /proc.
    #[must_use]
    pub(crate) fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), known: HashMap::default(), pass: 0, budget: 0 }
    }

    /// Describes every record of a pass, in its order, and forgets processes that are not in it.
    pub(crate) fn describe(&mut self, records: &[TaskRecord]) -> Vec<Arc<ProcStatic>> {
        self.pass += 1;
        let pass = self.pass;
        // The first pass describes a whole host; then only what is new.
        self.budget = if pass == 1 { usize::MAX } else { PER_PASS };
        let words = records.iter().map(|record| self.one(record)).collect();
        self.known.retain(|_, known| known.seen == pass);
        words
    }

    fn one(&mut self, record: &TaskRecord) -> Arc<ProcStatic> {
        if let Some(known) = self.known.get_mut(&record.key)
            && (known.exec_id, known.css_set, known.comm) == (record.exec_id, record.css_set, record.comm)
        {
            known.seen = self.pass;
            return Arc::clone(&known.words);
        }
        let Some(budget) = self.budget.checked_sub(1) else {
            // In a storm of short-lived processes: the next pass may have time for those that stay.
            return Arc::new(ProcStatic::of_comm(&record.comm));
        };
        self.budget = budget;
        let words = Arc::new(self.read(record));
        self.known.insert(
            record.key,
            Known {
                exec_id: record.exec_id,
                css_set: record.css_set,
                comm: record.comm,
                seen: self.pass,
                words: Arc::clone(&words),
            },
        );
        words
    }

    fn read(&self, record: &TaskRecord) -> ProcStatic {
        let comm = text::terminated(&record.comm);
        if record.flags & FLAG_KERNEL_THREAD != 0 {
            return ProcStatic { comm: comm.into(), exe: None, group: "kernel".into() };
        }
        let folder = self.root.join(record.key.tgid.to_string());
        let exe = fs::read_link(folder.join("exe")).ok();
        let exe = exe.map(|path| text::printable(path.as_os_str().as_bytes()));
        let cgroups = read_bounded(&folder.join("cgroup")).unwrap_or_default();
        let cgroups = String::from_utf8_lossy(&cgroups);
        let group = group::of(&cgroups, exe.as_deref().unwrap_or_default(), &comm);
        ProcStatic {
            comm: comm.into(),
            exe: exe.map(Into::into),
            group: text::printable(group.as_bytes()).into(),
        }
    }
}

fn read_bounded(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path).ok()?.take(FILE_LIMIT).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

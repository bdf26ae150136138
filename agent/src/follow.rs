//! Whose fds are followed: decides when the fd programs are attached, and tells the kernel for whom.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    time::Instant,
};

use clap::ValueEnum;
use plumb_common::{
    event::FdControl,
    task::{FLAG_FDS_UNKNOWN, ProcKey, TaskRecord},
};
use serde::Deserialize;

use crate::{
    canary::Canary,
    clock,
    decode::Event,
    detect::Resource,
    kernel::{Kernel, Seam, WatchError},
    origins::Listing,
};

/// When the fd programs are attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum FdEvents {
    /// All the time where that costs other syscalls nothing, else while somebody is watched
    #[default]
    Auto,
    /// All the time
    Always,
    /// While a process is watched or somebody listens
    Watched,
}

/// Whom to follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Who {
    Everybody,
    Process(ProcKey),
}

/// The fds of a process are listed again no sooner than this many times the last listing took: 2 % of a core.
const LISTING_SHARE: u32 = 50;

/// How the following goes, for readers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Following {
    /// How fds can be followed; `None` when this kernel allows no way.
    pub seam: Option<Seam>,
    pub attached: bool,
    /// Processes watched now.
    pub watched: usize,
    /// Processes that are not watched now because there is no room for them.
    pub refused: usize,
    /// Canaries in a row that were not seen.
    pub canary_missed: u32,
}

/// Who asked for whom. Outlives the observer: who listens goes on listening when it is started anew.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    /// How many listen to each.
    listeners: BTreeMap<Who, u32>,
    suspects: BTreeSet<(ProcKey, Resource)>,
}

impl Wanted {
    fn is_empty(&self) -> bool {
        self.listeners.is_empty() && self.suspects.is_empty()
    }

    /// Whether anybody's fds are wanted; threads are always followed.
    fn any_fds(&self) -> bool {
        !self.listeners.is_empty() || self.suspects.iter().any(|(_, resource)| *resource == Resource::Fd)
    }

    fn is_suspect(&self, process: ProcKey) -> bool {
        Resource::ALL.into_iter().any(|resource| self.suspects.contains(&(process, resource)))
    }

    fn processes(&self) -> HashSet<ProcKey> {
        let listened = self
            .listeners
            .keys()
            .filter_map(|who| if let Who::Process(key) = who { Some(*key) } else { None });
        listened.chain(self.suspects.iter().map(|(process, _)| *process)).collect()
    }
}

/// The observer's side of it.
#[derive(Debug)]
pub(crate) struct Follow {
    mode: FdEvents,
    wanted: Wanted,
    /// Processes that the kernel was told of.
    told: HashSet<ProcKey>,
    refused: usize,
    canary: Canary,
    /// When each is to be listed again.
    due: HashMap<ProcKey, Instant>,
}

impl Follow {
    #[must_use]
    pub(crate) fn new(mode: FdEvents, wanted: Wanted) -> Self {
        let (told, due) = (HashSet::new(), HashMap::new());
        Self { mode, wanted, told, refused: 0, canary: Canary::default(), due }
    }

    /// Somebody listens. Attached first: what comes later is in the ring, what was before is listed.
    pub(crate) fn add(&mut self, kernel: &mut Kernel, who: Who) {
        *self.wanted.listeners.entry(who).or_default() += 1;
        self.apply(kernel);
    }

    /// And no longer.
    pub(crate) fn remove(&mut self, kernel: &mut Kernel, who: Who) {
        if let Some(count) = self.wanted.listeners.get_mut(&who) {
            *count -= 1;
            if *count == 0 {
                self.wanted.listeners.remove(&who);
            }
        }
        self.apply(kernel);
    }

    /// A process is suspect, or no longer.
    pub(crate) fn suspect(&mut self, kernel: &mut Kernel, what: (ProcKey, Resource), is_suspect: bool) {
        if is_suspect {
            self.wanted.suspects.insert(what);
        } else {
            self.wanted.suspects.remove(&what);
        }
        self.apply(kernel);
    }

    /// Whether the stacks of a process are wanted.
    #[must_use]
    pub(crate) fn is_suspect(&self, process: ProcKey) -> bool {
        self.wanted.is_suspect(process)
    }

    /// Whether what a process opens is seen.
    #[must_use]
    pub(crate) fn sees(&self, kernel: &Kernel, process: ProcKey) -> bool {
        kernel.follows_fds() && self.told.contains(&process)
    }

    /// What outlives the observer.
    pub(crate) fn into_wanted(self) -> Wanted {
        self.wanted
    }

    fn is_for_all(&self) -> bool {
        self.wanted.listeners.contains_key(&Who::Everybody)
    }

    /// Makes the kernel do what is wanted. What it refuses is tried again at the next pass.
    fn apply(&mut self, kernel: &mut Kernel) {
        let always = match self.mode {
            FdEvents::Always => true,
            FdEvents::Auto => kernel.seam() == Some(Seam::Functions),
            FdEvents::Watched => false,
        };
        // Said before anything is attached: otherwise the first events would be measured by what was wanted
        // the last time.
        let control = FdControl { all: u32::from(self.is_for_all()), canary_tid: 0 };
        if let Err(error) = kernel.set_fd_control(control) {
            tracing::warn!(%error, "the kernel cannot be told whose fds are followed");
        }
        if let Err(verdict) = kernel.follow_fds(always || self.wanted.any_fds()) {
            tracing::warn!("fds cannot be followed: {}", verdict.explain());
        }
        if !kernel.follows_fds() {
            self.canary.rest();
        }
        let wanted = self.wanted.processes();
        for gone in self.told.difference(&wanted) {
            if let Err(error) = kernel.unwatch(*gone) {
                tracing::warn!(pid = gone.tgid, %error, "a process cannot be released");
            }
        }
        self.told.clear();
        self.refused = 0;
        // All of them each time: an entry that somebody has taken away is back within a second.
        for process in wanted {
            match kernel.watch(process, self.wanted.is_suspect(process)) {
                Ok(()) => {
                    self.told.insert(process);
                }
                Err(WatchError::Full) => self.refused += 1,
                Err(error) => tracing::warn!(pid = process.tgid, %error, "a process cannot be watched"),
            }
        }
    }

    /// Before each pass: the canary, and whatever did not work the last time.
    pub(crate) fn tend(&mut self, kernel: &mut Kernel) {
        self.apply(kernel);
        if kernel.follows_fds()
            && let Err(error) = self.canary.sing(kernel, self.is_for_all())
        {
            tracing::warn!(%error, "the canary cannot be sent");
        }
    }

    /// Whether events should come soon.
    #[must_use]
    pub(crate) fn is_listened_to(&self) -> bool {
        !self.wanted.is_empty()
    }

    /// Looks for the canary.
    pub(crate) fn look(&mut self, events: &[Event]) {
        self.canary.look(events);
    }

    /// Lists the fds of watched processes that the pass has found, as often as that is cheap; forgets the others.
    pub(crate) fn list(&mut self, kernel: &mut Kernel, records: &[TaskRecord]) -> Vec<(ProcKey, Listing)> {
        if self.wanted.is_empty() {
            return Vec::new();
        }
        let found: HashMap<ProcKey, &TaskRecord> =
            records.iter().map(|record| (record.key, record)).collect();
        self.wanted.suspects.retain(|(key, _)| found.contains_key(key));
        self.wanted.listeners.retain(|who, _| !matches!(who, Who::Process(key) if !found.contains_key(key)));
        self.due.retain(|key, _| self.told.contains(key));
        let mut listings = Vec::new();
        for process in &self.told {
            let began = Instant::now();
            let Some(record) = found.get(process) else { continue };
            if self.due.get(process).is_some_and(|due| began < *due) {
                continue;
            }
            let mut listing = Listing { began: clock::boottime(), files: record.files, ..Listing::default() };
            // To see that there is nothing, all processes of the host would be walked.
            let is_empty = record.files == 0 || (record.fds == 0 && record.flags & FLAG_FDS_UNKNOWN == 0);
            let files = if is_empty {
                Ok(())
            } else {
                kernel.files(*process, |file| listing.push(file.fd, file.file))
            };
            let done = files.and_then(|()| {
                if self.wanted.suspects.contains(&(*process, Resource::Thread)) {
                    let threads = kernel.threads(*process)?;
                    let started = threads.iter().map(|thread| (thread.tid, thread.start_boottime));
                    listing.threads = Some(started.collect());
                }
                Ok(())
            });
            match done {
                Ok(()) => listings.push((*process, listing)),
                Err(error) => tracing::warn!(pid = process.tgid, %error, "what it has cannot be listed"),
            }
            self.due.insert(*process, began + began.elapsed() * LISTING_SHARE);
        }
        listings
    }

    #[must_use]
    pub(crate) fn state(&self, kernel: &Kernel) -> Following {
        Following {
            seam: kernel.seam(),
            attached: kernel.follows_fds(),
            watched: self.told.len(),
            refused: self.refused,
            canary_missed: self.canary.missed(),
        }
    }
}

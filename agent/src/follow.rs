//! Whose fds are followed: decides when the fd programs are attached, and tells the kernel for whom.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::{Duration, Instant},
};

use clap::ValueEnum;
use plumb_common::task::{ProcKey, TaskRecord};
use serde::Deserialize;

use crate::{
    canary::Canary,
    clock,
    decode::Event,
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

/// Time spent on listing the fds of watched processes per pass, but for the last one.
const LISTING_BUDGET: Duration = Duration::from_millis(20);

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

/// How many asked for each. Outlives the observer: who listens goes on listening when it is started anew.
pub(crate) type Wanted = BTreeMap<Who, u32>;

/// The observer's side of it.
#[derive(Debug)]
pub(crate) struct Follow<'a> {
    mode: FdEvents,
    wanted: &'a mut Wanted,
    /// Processes that the kernel was told of.
    told: HashSet<ProcKey>,
    refused: usize,
    canary: Canary,
    /// The process whose turn it is to be listed.
    next: usize,
}

impl<'a> Follow<'a> {
    #[must_use]
    pub(crate) fn new(mode: FdEvents, wanted: &'a mut Wanted) -> Self {
        Self { mode, wanted, told: HashSet::new(), refused: 0, canary: Canary::default(), next: 0 }
    }

    /// Somebody asks for events. Attached first: what comes later is in the ring, what was before is listed.
    pub(crate) fn add(&mut self, kernel: &mut Kernel, who: Who) {
        *self.wanted.entry(who).or_default() += 1;
        self.apply(kernel);
    }

    /// And no longer.
    pub(crate) fn remove(&mut self, kernel: &mut Kernel, who: Who) {
        if let Some(count) = self.wanted.get_mut(&who) {
            *count -= 1;
            if *count == 0 {
                self.wanted.remove(&who);
            }
        }
        self.apply(kernel);
    }

    /// Makes the kernel do what is wanted. What it refuses is tried again at the next pass.
    fn apply(&mut self, kernel: &mut Kernel) {
        let always = match self.mode {
            FdEvents::Always => true,
            FdEvents::Auto => kernel.seam() == Some(Seam::Functions),
            FdEvents::Watched => false,
        };
        if let Err(verdict) = kernel.follow_fds(always || !self.wanted.is_empty()) {
            tracing::warn!("fds cannot be followed: {}", verdict.explain());
        }
        if !kernel.follows_fds() {
            self.canary.rest();
        }
        let wanted: HashSet<ProcKey> = self.processes().collect();
        for gone in self.told.difference(&wanted) {
            if let Err(error) = kernel.unwatch(*gone) {
                tracing::warn!(pid = gone.tgid, %error, "a process cannot be released");
            }
        }
        self.told.clear();
        self.refused = 0;
        // All of them each time: an entry that somebody has taken away is back within a second.
        for process in wanted {
            match kernel.watch(process) {
                Ok(()) => {
                    self.told.insert(process);
                }
                Err(WatchError::Full) => self.refused += 1,
                Err(error) => tracing::warn!(pid = process.tgid, %error, "a process cannot be watched"),
            }
        }
    }

    fn processes(&self) -> impl Iterator<Item = ProcKey> {
        self.wanted.keys().filter_map(|who| if let Who::Process(key) = who { Some(*key) } else { None })
    }

    /// Before each pass: the canary, and whatever did not work the last time.
    pub(crate) fn tend(&mut self, kernel: &mut Kernel) {
        self.apply(kernel);
        if kernel.follows_fds() {
            let all = self.wanted.contains_key(&Who::Everybody);
            if let Err(error) = self.canary.sing(kernel, all) {
                tracing::warn!(%error, "the canary cannot be sent");
            }
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

    /// Lists the fds of watched processes that the pass has found; forgets the others. As many as there is
    /// time for, in turn.
    pub(crate) fn list(&mut self, kernel: &mut Kernel, records: &[TaskRecord]) -> Vec<(ProcKey, Listing)> {
        if self.told.is_empty() {
            return Vec::new();
        }
        let tables: HashMap<ProcKey, u64> = records.iter().map(|record| (record.key, record.files)).collect();
        self.wanted.retain(|who, _| !matches!(who, Who::Process(key) if !tables.contains_key(key)));
        let mut order: Vec<ProcKey> = self.told.iter().copied().collect();
        order.sort_unstable();
        let turn = self.next % order.len();
        order.rotate_left(turn);
        let began = Instant::now();
        let mut listings = Vec::new();
        for process in order {
            self.next += 1;
            let Some(files) = tables.get(&process) else { continue };
            let mut listing = Listing { began: clock::boottime(), files: *files, ..Listing::default() };
            match kernel.files(process, |file| {
                listing.fds.insert(file.fd, file.file);
            }) {
                Ok(()) => listings.push((process, listing)),
                Err(error) => tracing::warn!(pid = process.tgid, %error, "fds cannot be listed"),
            }
            if began.elapsed() > LISTING_BUDGET {
                break;
            }
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

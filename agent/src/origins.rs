//! Where the live fds of watched processes came from. Events make origins; a listing of the process's own
//! table is the truth, and what the events had got wrong is counted and mended.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use plumb_common::{
    event::{FD_CLOSE_ON_EXEC, FD_CLOSED, FD_UNKNOWN, FdChange},
    syscalls,
    task::ProcKey,
};

use crate::decode::Event;

/// Origins kept at a time, over all processes; at about 150 bytes each.
const MAX_ORIGINS: usize = 262_144;
/// A listing is sure to show, or not to show, only events this far away from it, in nanoseconds: a slot is
/// filled a moment before the event through `sys_exit` and a moment after it through the functions.
const SETTLED: u64 = 50_000_000;

/// Pending closes that a late event without a number is compared with.
const MAX_TRIED: usize = 64;

/// Where one live fd came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    /// Address of its `struct file`.
    pub file: u64,
    /// When, nanoseconds since boot; 0 for what was open before the process was watched.
    pub since: u64,
    /// The thread that did it; 0 when no event told.
    pub tid: u32,
    /// Index into `syscalls::TABLE`, or `OTHER`.
    pub how: u32,
}

impl Origin {
    /// Whether nothing more can be learnt of it from an event at `time`.
    fn is_told(&self, listed: u64, time: u64) -> bool {
        self.tid != 0 || (self.since == 0 && time > listed.saturating_add(SETTLED))
    }
}

/// One process's table as an iterator listed it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Listing {
    /// Nanoseconds since boot.
    pub began: u64,
    /// Address of the `files_struct`.
    pub files: u64,
    /// Each open fd with the address of its `struct file`.
    pub fds: HashMap<u32, u64>,
    /// There are more than `MAX_ORIGINS`: what is missing may be open all the same.
    pub cut: bool,
}

impl Listing {
    /// Takes the next fd, as long as there is room.
    pub(crate) fn push(&mut self, fd: u32, file: u64) {
        if self.fds.len() < MAX_ORIGINS {
            self.fds.insert(fd, file);
        } else {
            self.cut = true;
        }
    }
}

/// What listings found that no event had told of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct FdDrift {
    /// Fds that were there: a path that is not followed, or a lost event.
    pub opens_unseen: u64,
    /// Fds that were not there any more.
    pub closes_unseen: u64,
}

/// The origins of one process, by fd and by file.
#[derive(Debug, Default)]
struct Slots {
    fds: BTreeMap<u32, Origin>,
    holders: HashMap<u64, BTreeSet<u32>>,
}

impl Slots {
    fn insert(&mut self, fd: u32, origin: Origin) {
        self.remove(fd);
        self.fds.insert(fd, origin);
        self.holders.entry(origin.file).or_default().insert(fd);
    }

    fn remove(&mut self, fd: u32) -> Option<Origin> {
        let origin = self.fds.remove(&fd)?;
        if let Some(holders) = self.holders.get_mut(&origin.file) {
            holders.remove(&fd);
            if holders.is_empty() {
                self.holders.remove(&origin.file);
            }
        }
        Some(origin)
    }
}

/// One watched process. What an event does here takes no longer when the process has many fds.
#[derive(Debug, Default)]
struct Watched {
    files: u64,
    slots: Slots,
    /// Last event about an fd, as far as it may be too close to a listing.
    touched: HashMap<u32, u64>,
    /// Last removal of a file of which it is not known which of its fds went.
    unsure: HashMap<u64, u64>,
    /// Differences that a late event may still explain: fds that were there, and fds that were not.
    opens_pending: HashMap<u32, u64>,
    closes_pending: BTreeMap<u32, u64>,
    /// Start of the last listing.
    listed: u64,
    /// A listing has shown what was open before.
    seeded: bool,
    /// There was no room for all: what is missing is no drift.
    cut: bool,
}

/// The origins of all watched processes.
#[derive(Debug, Default)]
pub(crate) struct Origins {
    processes: HashMap<ProcKey, Watched>,
    held: usize,
    drift: FdDrift,
}

impl Origins {
    /// From now on events of this process make origins.
    pub(crate) fn watch(&mut self, process: ProcKey) {
        self.processes.entry(process).or_default();
    }

    pub(crate) fn unwatch(&mut self, process: ProcKey) {
        if let Some(watched) = self.processes.remove(&process) {
            self.held -= watched.slots.fds.len();
        }
    }

    /// What listings found so far that no event had told of.
    #[must_use]
    pub(crate) fn drift(&self) -> FdDrift {
        self.drift
    }

    /// Origins held now.
    #[must_use]
    pub(crate) fn held(&self) -> usize {
        self.held
    }

    /// The origin of one fd.
    #[cfg(test)]
    fn of(&self, process: ProcKey, fd: u32) -> Option<Origin> {
        self.processes.get(&process)?.slots.fds.get(&fd).copied()
    }

    /// How many of a process's live fds came from which call, those from before the watch left out.
    #[must_use]
    pub(crate) fn by_call(&self, process: ProcKey) -> BTreeMap<&'static str, u32> {
        let mut calls = BTreeMap::new();
        let watched = self.processes.get(&process);
        for origin in
            watched.iter().flat_map(|watched| watched.slots.fds.values()).filter(|origin| origin.since > 0)
        {
            *calls.entry(syscalls::name(origin.how)).or_default() += 1;
        }
        calls
    }

    /// Applies one event.
    pub(crate) fn apply(&mut self, event: &Event) {
        let process = event.header().process;
        match event {
            Event::Exit(exit) if exit.group_dead != 0 => self.unwatch(process),
            Event::Exec(_) => {
                // Not every hook tells of close-on-exec; the next listing does.
                if let Some(watched) = self.processes.get_mut(&process) {
                    watched.seeded = false;
                }
            }
            Event::Fd(change) => {
                if let Some(watched) = self.processes.get_mut(&process) {
                    let before = watched.slots.fds.len();
                    watched.apply(change, MAX_ORIGINS - self.held);
                    self.held = self.held + watched.slots.fds.len() - before;
                }
            }
            _ => {}
        }
    }

    /// Takes a listing over as the truth about its process.
    pub(crate) fn merge(&mut self, process: ProcKey, listing: &Listing) {
        if let Some(watched) = self.processes.get_mut(&process) {
            self.drift.opens_unseen += std::mem::take(&mut watched.opens_pending).len() as u64;
            self.drift.closes_unseen += std::mem::take(&mut watched.closes_pending).len() as u64;
            let before = watched.slots.fds.len();
            watched.merge(listing, MAX_ORIGINS - (self.held - before));
            self.held = self.held + watched.slots.fds.len() - before;
        }
    }
}

impl Watched {
    fn apply(&mut self, event: &FdChange, room: usize) {
        let time = event.header.time;
        // A thread that has left the table of its process is not in the listing either.
        if (self.files != 0 && event.files != self.files) || event.change == FD_CLOSE_ON_EXEC {
            return;
        }
        let late = time.saturating_add(SETTLED) < self.listed;
        if event.change == FD_CLOSED {
            self.closed(event, late);
            return;
        }
        let origin = Origin { file: event.file, since: time, tid: event.header.tid, how: event.how };
        if self.opens_pending.get(&event.fd) == Some(&event.file) {
            self.opens_pending.remove(&event.fd);
        }
        match self.slots.fds.get(&event.fd) {
            // The listing has shown more recent things; of these it only did not know the origin.
            Some(known) if late && known.file != event.file => return,
            // The file is the one whose origin is known already: the result of a call was forged, with the
            // number of an fd that is open.
            Some(known) if known.file == event.file && known.is_told(self.listed, time) => return,
            None if late => return,
            None if room == 0 => self.cut = true,
            _ => self.slots.insert(event.fd, origin),
        }
        self.touch(event.fd, time);
    }

    fn closed(&mut self, event: &FdChange, late: bool) {
        let time = event.header.time;
        if event.fd == FD_UNKNOWN && event.file != 0 {
            let holders = self.slots.holders.get(&event.file);
            let only = holders.filter(|holders| holders.len() == 1).and_then(BTreeSet::first).copied();
            if late || holders.is_none() {
                // Which pending close it explains is not known either; there is seldom more than one.
                let told = self.closes_pending.iter().take(MAX_TRIED).find(|(_, file)| **file == event.file);
                if let Some(fd) = told.map(|(fd, _)| *fd) {
                    self.closes_pending.remove(&fd);
                }
            } else if let Some(fd) = only {
                self.slots.remove(fd);
                self.touch(fd, time);
            } else {
                // Which of several numbers went is for the listing to say.
                self.unsure.insert(event.file, time);
            }
        } else if event.fd == event.fd_last {
            let goes = |file: u64| event.file == 0 || (event.reused != 0) != (file == event.file);
            if self.closes_pending.get(&event.fd).is_some_and(|file| event.reused != 0 || goes(*file)) {
                self.closes_pending.remove(&event.fd);
            }
            if !late {
                if self.slots.fds.get(&event.fd).is_some_and(|origin| goes(origin.file)) {
                    self.slots.remove(event.fd);
                }
                self.touch(event.fd, time);
            }
        } else if event.fd < event.fd_last {
            let within = event.fd..=event.fd_last;
            let explained: Vec<u32> = self.closes_pending.range(within.clone()).map(|(fd, _)| *fd).collect();
            for fd in explained {
                self.closes_pending.remove(&fd);
            }
            if !late {
                let gone: Vec<u32> = self.slots.fds.range(within).map(|(fd, _)| *fd).collect();
                for fd in gone {
                    self.slots.remove(fd);
                    self.touch(fd, time);
                }
            }
        }
    }

    fn touch(&mut self, fd: u32, time: u64) {
        let last = self.touched.entry(fd).or_default();
        *last = time.max(*last);
    }

    fn merge(&mut self, listing: &Listing, room: usize) {
        if self.files != listing.files {
            (self.files, self.seeded) = (listing.files, false);
        }
        let settled = listing.began.saturating_sub(SETTLED);
        self.touched.retain(|_, time| *time >= settled);
        self.unsure.retain(|_, time| *time >= settled);
        let differs = |(fd, origin): (&u32, &Origin)| {
            let now = listing.fds.get(fd);
            let may = now == Some(&origin.file)
                || (now.is_none() && listing.cut)
                || self.touched.contains_key(fd)
                || self.unsure.contains_key(&origin.file);
            (!may).then_some((*fd, now.is_none()))
        };
        let gone: Vec<(u32, bool)> = self.slots.fds.iter().filter_map(differs).collect();
        for (fd, is_empty) in gone {
            let origin = self.slots.remove(fd);
            if let Some(origin) = origin
                && self.seeded
                && is_empty
            {
                self.closes_pending.insert(fd, origin.file);
            }
        }
        self.cut = listing.cut || (self.cut && self.slots.fds.len() < listing.fds.len());
        for (&fd, &file) in &listing.fds {
            if self.slots.fds.contains_key(&fd) || self.touched.contains_key(&fd) {
                continue;
            }
            if self.slots.fds.len() >= room {
                self.cut = true;
                break;
            }
            let since = if self.seeded { listing.began } else { 0 };
            self.slots.insert(fd, Origin { file, since, tid: 0, how: syscalls::OTHER });
            if self.seeded && !self.cut {
                self.opens_pending.insert(fd, file);
            }
        }
        (self.listed, self.seeded) = (listing.began, true);
    }
}

#[cfg(test)]
#[path = "origins_tests.rs"]
mod tests;

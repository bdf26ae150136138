//! Where the live fds of watched processes came from. Events make origins; a listing of the process's own
//! table is the truth, and what the events had got wrong is counted and mended.

use std::collections::{BTreeMap, HashMap};

use plumb_common::{
    event::{FD_CLOSE_ON_EXEC, FD_CLOSED, FD_UNKNOWN, FdChange},
    syscalls,
    task::ProcKey,
};

use crate::decode::Event;

/// Origins kept at a time, over all processes; at about 48 bytes each.
const MAX_ORIGINS: usize = 262_144;
/// A listing is sure to show, or not to show, only events this far away from it, in nanoseconds: a slot is
/// filled a moment before the event through `sys_exit` and a moment after it through the functions.
const SETTLED: u64 = 50_000_000;

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
}

/// What listings found that no event had told of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct FdDrift {
    /// Fds that were there: a path that is not followed, or a lost event.
    pub opens_unseen: u64,
    /// Fds that were not there any more.
    pub closes_unseen: u64,
}

/// A difference that a late event may still explain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pending {
    Open { fd: u32, file: u64 },
    Close { fd: u32, file: u64 },
}

/// One watched process.
#[derive(Debug, Default)]
struct Watched {
    files: u64,
    fds: HashMap<u32, Origin>,
    /// Last event about an fd, as far as it may be too close to a listing.
    touched: HashMap<u32, u64>,
    pending: Vec<Pending>,
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
            self.held -= watched.fds.len();
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
        self.processes.get(&process)?.fds.get(&fd).copied()
    }

    /// How many of a process's live fds came from which call, those from before the watch left out.
    #[must_use]
    pub(crate) fn by_call(&self, process: ProcKey) -> BTreeMap<&'static str, u32> {
        let mut calls = BTreeMap::new();
        let watched = self.processes.get(&process);
        for origin in
            watched.iter().flat_map(|watched| watched.fds.values()).filter(|origin| origin.since > 0)
        {
            let name = syscalls::TABLE.get(origin.how as usize).map_or("other", |call| call.name);
            *calls.entry(name).or_default() += 1;
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
                    let before = watched.fds.len();
                    watched.apply(change, MAX_ORIGINS - self.held);
                    self.held = self.held + watched.fds.len() - before;
                }
            }
            _ => {}
        }
    }

    /// Takes a listing over as the truth about its process.
    pub(crate) fn merge(&mut self, process: ProcKey, listing: &Listing) {
        if let Some(watched) = self.processes.get_mut(&process) {
            for pending in watched.pending.drain(..) {
                match pending {
                    Pending::Open { .. } => self.drift.opens_unseen += 1,
                    Pending::Close { .. } => self.drift.closes_unseen += 1,
                }
            }
            let before = watched.fds.len();
            watched.merge(listing, MAX_ORIGINS - (self.held - before));
            self.held = self.held + watched.fds.len() - before;
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
        let told = Pending::Open { fd: event.fd, file: event.file };
        self.pending.retain(|pending| *pending != told);
        match self.fds.get_mut(&event.fd) {
            // The listing has shown more recent things; of these it only did not know the origin.
            Some(known) if late && known.file != event.file => return,
            // The file is the one whose origin is known already: the result of a call was forged, with the
            // number of an fd that is open.
            Some(known) if known.file == event.file && known.is_told(self.listed, time) => return,
            Some(known) => *known = origin,
            None if late => return,
            None if room == 0 => self.cut = true,
            None => {
                self.fds.insert(event.fd, origin);
            }
        }
        self.touch(event.fd, time);
    }

    fn closed(&mut self, event: &FdChange, late: bool) {
        let within = |fd: u32| {
            if event.fd == FD_UNKNOWN && event.file != 0 {
                true
            } else {
                (event.fd..=event.fd_last).contains(&fd)
            }
        };
        let same = |file: u64| event.file == 0 || event.reused != 0 || file == event.file;
        self.pending.retain(|pending| match *pending {
            Pending::Close { fd, file } => !(within(fd) && same(file)),
            Pending::Open { .. } => true,
        });
        if late {
            return;
        }
        let time = event.header.time;
        if event.fd == FD_UNKNOWN && event.file != 0 {
            let holders: Vec<u32> =
                self.fds.iter().filter(|(_, origin)| origin.file == event.file).map(|(fd, _)| *fd).collect();
            // Which of several numbers went is for the listing to say.
            if let [fd] = holders[..] {
                self.fds.remove(&fd);
            }
            holders.into_iter().for_each(|fd| self.touch(fd, time));
        } else if event.fd == event.fd_last {
            let stays = |origin: &Origin| {
                if event.reused != 0 { origin.file == event.file } else { !same(origin.file) }
            };
            if self.fds.get(&event.fd).is_some_and(|origin| !stays(origin)) {
                self.fds.remove(&event.fd);
            }
            self.touch(event.fd, time);
        } else {
            let gone: Vec<u32> = self.fds.keys().copied().filter(|fd| within(*fd)).collect();
            for fd in gone {
                self.fds.remove(&fd);
                self.touch(fd, time);
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
        let unsure = listing.began.saturating_sub(SETTLED);
        self.touched.retain(|_, time| *time >= unsure);
        let Self { fds, touched, pending, seeded, .. } = self;
        fds.retain(|fd, origin| {
            let now = listing.fds.get(fd);
            if now == Some(&origin.file) || touched.contains_key(fd) {
                return true;
            }
            if *seeded && now.is_none() {
                pending.push(Pending::Close { fd: *fd, file: origin.file });
            }
            false
        });
        self.cut &= self.fds.len() < listing.fds.len();
        for (&fd, &file) in &listing.fds {
            if self.fds.contains_key(&fd) || self.touched.contains_key(&fd) {
                continue;
            }
            if self.fds.len() >= room {
                self.cut = true;
                break;
            }
            let since = if self.seeded { listing.began } else { 0 };
            self.fds.insert(fd, Origin { file, since, tid: 0, how: syscalls::OTHER });
            if self.seeded && !self.cut {
                self.pending.push(Pending::Open { fd, file });
            }
        }
        (self.listed, self.seeded) = (listing.began, true);
    }
}

#[cfg(test)]
#[path = "origins_tests.rs"]
mod tests;

//! The fds of one watched process: events make origins, a listing corrects them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use plumb_common::{
    event::{FD_CLOSE_ON_EXEC, FD_CLOSED, FD_UNKNOWN, FdChange, MARK_REUSED},
    syscalls,
};

use super::{FdDrift, Listing, SETTLED};
use crate::{
    decode::Event,
    stacks::{Made, Stack},
};

/// Pending closes that a late event without a number is compared with.
const MAX_TRIED: usize = 64;

/// Where one live fd came from.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Origin {
    /// Address of its `struct file`.
    file: u64,
    /// When, nanoseconds since boot; 0 for what was open before the process was watched.
    since: u64,
    /// The thread that did it; 0 when no event told.
    tid: u32,
    /// Index into `syscalls::TABLE`, or `OTHER`.
    how: u32,
    /// The stack of that thread, once it has been unwound.
    stack: Option<Arc<Stack>>,
}

impl Origin {
    /// Whether nothing more can be learnt of it from an event at `time`.
    fn is_told(&self, listed: u64, time: u64) -> bool {
        self.tid != 0 || (self.since == 0 && time > listed.saturating_add(SETTLED))
    }
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
        self.holders.entry(origin.file).or_default().insert(fd);
        self.fds.insert(fd, origin);
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

/// The fds of one process. What an event does here takes no longer when there are many.
#[derive(Debug, Default)]
pub(super) struct Fds {
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

impl Fds {
    pub(super) fn held(&self) -> usize {
        self.slots.fds.len()
    }

    /// File, time and thread of one.
    #[cfg(test)]
    pub(super) fn of(&self, fd: u32) -> Option<(u64, u64, u32)> {
        self.slots.fds.get(&fd).map(|origin| (origin.file, origin.since, origin.tid))
    }

    /// Number, time, call and stack of each.
    pub(super) fn origins(&self) -> impl Iterator<Item = (u32, u64, &'static str, &Option<Arc<Stack>>)> {
        self.slots
            .fds
            .iter()
            .map(|(fd, origin)| (*fd, origin.since, syscalls::name(origin.how), &origin.stack))
    }

    /// Where the stack belongs of what was made there and then; `None` when that is gone.
    pub(super) fn made(&mut self, made: &Made) -> Option<&mut Option<Arc<Stack>>> {
        let origin = self.slots.fds.get_mut(&made.number)?;
        (origin.since == made.time && origin.tid == made.by).then_some(&mut origin.stack)
    }

    pub(super) fn apply(&mut self, event: &Event, room: usize) {
        match event {
            // Not every hook tells of close-on-exec; the next listing does.
            Event::Exec(_) => self.seeded = false,
            Event::Fd(change) => self.change(change, room),
            _ => {}
        }
    }

    fn change(&mut self, event: &FdChange, room: usize) {
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
        let origin =
            Origin { file: event.file, since: time, tid: event.header.tid, how: event.how, stack: None };
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
            let is_reused = event.marks & MARK_REUSED != 0;
            let goes = |file: u64| event.file == 0 || is_reused != (file == event.file);
            if self.closes_pending.get(&event.fd).is_some_and(|file| is_reused || goes(*file)) {
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

    /// Takes over what is there; returns what the one before had found that no event explained since.
    pub(super) fn merge(&mut self, listing: &Listing, room: usize) -> FdDrift {
        let drift = FdDrift {
            opens_unseen: std::mem::take(&mut self.opens_pending).len() as u64,
            closes_unseen: std::mem::take(&mut self.closes_pending).len() as u64,
        };
        let most = self.held() + room;
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
            if self.slots.fds.len() >= most {
                self.cut = true;
                break;
            }
            let since = if self.seeded { listing.began } else { 0 };
            self.slots.insert(fd, Origin { file, since, tid: 0, how: syscalls::OTHER, stack: None });
            if self.seeded && !self.cut {
                self.opens_pending.insert(fd, file);
            }
        }
        (self.listed, self.seeded) = (listing.began, true);
        drift
    }
}

//! Where the live fds and threads of watched processes came from. Events make origins; a listing of the
//! process's own is the truth, and what the events had got wrong is counted and mended.

mod fds;
mod threads;

use std::{collections::HashMap, sync::Arc};

use plumb_common::task::ProcKey;

use self::{fds::Fds, threads::Threads};
use crate::{
    decode::Event,
    detect::{Earlier, Resource},
    stacks::{self, Made, Stack},
};

/// Origins of fds kept at a time, over all processes, at about 150 bytes each; and of threads.
const MAX_ORIGINS: usize = 262_144;
/// A listing is sure to show, or not to show, only events this far away from it, in nanoseconds: a slot is
/// filled a moment before the event through `sys_exit` and a moment after it through the functions.
const SETTLED: u64 = 50_000_000;

/// What one process has as iterators listed it.
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
    /// Each thread with its start, where threads matter; the leader among them.
    pub threads: Option<HashMap<u32, u64>>,
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

/// What lives from one place in the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Group {
    /// The way to the call, innermost first; `None` where no stack could be had.
    pub stack: Option<Arc<Stack>>,
    /// The call.
    pub how: &'static str,
    pub live: u32,
    /// When the oldest and the newest of them were made, nanoseconds since boot.
    pub oldest: u64,
    pub newest: u64,
    /// The newest of them, newest first: when it was made, and its number or thread id.
    pub examples: Vec<(u64, u32)>,
}

impl Group {
    /// The same for an agent after this one; `None` where no stack could be had.
    #[must_use]
    pub(crate) fn earlier(&self) -> Option<Earlier> {
        let [function, caller] = self.stack.as_deref()?.headline()?;
        let words = stacks::called(&function?, caller.as_ref());
        Some(Earlier { words, live: self.live, newest: self.newest })
    }
}

/// Examples per group.
const MAX_EXAMPLES: usize = 3;
/// How long a stack is mostly on its way, in nanoseconds: it waits for the worker, is unwound and gets its names. What
/// has none after that is told as having none.
const NAMING: u64 = 5_000_000_000;

/// Everything of one kind that a watched process has, by where it came from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ByOrigin {
    /// What was there before the process was watched.
    pub before: u32,
    /// What was made a moment ago: its stack is still on its way.
    pub naming: u32,
    /// The rest, the largest group first.
    pub groups: Vec<Group>,
}

impl ByOrigin {
    /// How many have come since the process is watched.
    #[must_use]
    pub(crate) fn since_watching(&self) -> u32 {
        self.naming + self.groups.iter().map(|group| group.live).sum::<u32>()
    }

    /// How many the program's own functions made, by the name of the function.
    #[must_use]
    pub(crate) fn functions(&self) -> Vec<(String, u32)> {
        let function = |group: &Group| {
            let [function, _] = group.stack.as_deref()?.headline()?;
            Some((function?.function?, group.live))
        };
        self.groups.iter().filter_map(function).collect()
    }

    /// Of numbers, when each was made, by which call and where; `now` in nanoseconds since boot.
    fn count<'a>(
        made: impl Iterator<Item = (u32, u64, &'static str, &'a Option<Arc<Stack>>)>,
        now: u64,
    ) -> Self {
        let mut counted = Self::default();
        let mut groups: HashMap<(*const Stack, &'static str), Group> = HashMap::new();
        for (number, since, how, stack) in made {
            if since == 0 {
                counted.before += 1;
                continue;
            }
            if stack.is_none() && now < since.saturating_add(NAMING) {
                counted.naming += 1;
                continue;
            }
            // One way has one stack, so its address will do.
            let at = (stack.as_ref().map_or(std::ptr::null(), Arc::as_ptr), how);
            let group = groups.entry(at).or_insert_with(|| Group {
                stack: stack.clone(),
                how,
                live: 0,
                oldest: since,
                newest: 0,
                examples: Vec::new(),
            });
            group.live += 1;
            group.oldest = group.oldest.min(since);
            group.newest = group.newest.max(since);
            let older = group.examples.partition_point(|example| *example > (since, number));
            if older < MAX_EXAMPLES {
                group.examples.truncate(MAX_EXAMPLES - 1);
                group.examples.insert(older, (since, number));
            }
        }
        counted.groups = groups.into_values().collect();
        counted.groups.sort_by(|a, b| b.live.cmp(&a.live).then(a.oldest.cmp(&b.oldest)));
        counted
    }
}

/// One watched process: what of it matters.
#[derive(Debug, Default)]
struct Process {
    fds: Option<Fds>,
    threads: Option<Threads>,
}

impl Process {
    fn held(&self) -> usize {
        self.fds.as_ref().map_or(0, Fds::held) + self.threads.as_ref().map_or(0, Threads::held)
    }
}

/// The origins of all watched processes.
#[derive(Debug, Default)]
pub(crate) struct Origins {
    processes: HashMap<ProcKey, Process>,
    held: usize,
    drift: FdDrift,
}

impl Origins {
    /// From now on events of this process make origins.
    pub(crate) fn watch(&mut self, process: ProcKey, resource: Resource) {
        let process = self.processes.entry(process).or_default();
        match resource {
            Resource::Fd => drop(process.fds.get_or_insert_default()),
            Resource::Thread => drop(process.threads.get_or_insert_default()),
        }
    }

    pub(crate) fn unwatch(&mut self, process: ProcKey, resource: Resource) {
        self.change(process, |process, _| match resource {
            Resource::Fd => process.fds = None,
            Resource::Thread => process.threads = None,
        });
        if self.processes.get(&process).is_some_and(|of| of.fds.is_none() && of.threads.is_none()) {
            self.processes.remove(&process);
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

    /// What a process has at `now` (nanoseconds since boot), by where it came from; empty when that is not watched.
    #[must_use]
    pub(crate) fn by_origin(&self, process: ProcKey, resource: Resource, now: u64) -> ByOrigin {
        let Some(process) = self.processes.get(&process) else { return ByOrigin::default() };
        match (resource, &process.fds, &process.threads) {
            (Resource::Fd, Some(fds), _) => ByOrigin::count(fds.origins(), now),
            (Resource::Thread, _, Some(threads)) => ByOrigin::count(threads.origins(), now),
            _ => ByOrigin::default(),
        }
    }

    /// Applies one event.
    pub(crate) fn apply(&mut self, event: &Event) {
        let process = event.header().process;
        match event {
            Event::Exit(exit) if exit.group_dead != 0 => {
                self.held -= self.processes.remove(&process).map_or(0, |gone| gone.held());
            }
            _ => self.change(process, |process, room| {
                if let Some(fds) = &mut process.fds {
                    fds.apply(event, room);
                }
                if let Some(threads) = &mut process.threads {
                    threads.apply(event, room);
                }
            }),
        }
    }

    /// Takes a listing over as the truth about its process.
    pub(crate) fn merge(&mut self, process: ProcKey, listing: &Listing) {
        let mut drift = FdDrift::default();
        self.change(process, |process, room| {
            let most = process.held() + room;
            if let Some(fds) = &mut process.fds {
                drift = fds.merge(listing, room);
            }
            // What the fds have taken is no room any more.
            let room = most.saturating_sub(process.held());
            if let (Some(threads), Some(listed)) = (&mut process.threads, &listing.threads) {
                threads.merge(listed, listing.began, room);
            }
        });
        self.drift.opens_unseen += drift.opens_unseen;
        self.drift.closes_unseen += drift.closes_unseen;
    }

    /// Adds the stack of whoever made an fd or a thread that is still there.
    pub(crate) fn name(&mut self, process: ProcKey, made: &Made, stack: &Arc<Stack>) {
        let Some(process) = self.processes.get_mut(&process) else { return };
        let fd = process.fds.as_mut().and_then(|fds| fds.made(made));
        let thread = process.threads.as_mut().and_then(|threads| threads.made(made));
        if let Some(of) = fd.or(thread) {
            *of = Some(Arc::clone(stack));
        }
    }

    /// Changes one process, which is told how many origins it may have more than now.
    fn change(&mut self, process: ProcKey, change: impl FnOnce(&mut Process, usize)) {
        if let Some(process) = self.processes.get_mut(&process) {
            let before = process.held();
            change(process, MAX_ORIGINS.saturating_sub(self.held));
            self.held = self.held + process.held() - before;
        }
    }
}

#[cfg(test)]
mod tests;

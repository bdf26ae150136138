//! The threads of one watched process: clone and exit make and end origins, a listing corrects them.

use std::{collections::HashMap, sync::Arc};

use plumb_common::event::CLONE_THREAD;

use super::SETTLED;
use crate::{
    decode::Event,
    stacks::{Made, Stack},
};

/// Where one live thread came from.
#[derive(Debug)]
struct Origin {
    /// When, nanoseconds since boot; 0 for what ran before its process was watched.
    since: u64,
    /// The thread that made it; 0 when no event told.
    by: u32,
    stack: Option<Arc<Stack>>,
}

/// The threads of one process, by id.
#[derive(Debug, Default)]
pub(super) struct Threads {
    live: HashMap<u32, Origin>,
    /// A listing has shown what ran before.
    seeded: bool,
}

impl Threads {
    pub(super) fn held(&self) -> usize {
        self.live.len()
    }

    /// Id, time, call and stack of each.
    pub(super) fn origins(&self) -> impl Iterator<Item = (u32, u64, &'static str, &Option<Arc<Stack>>)> {
        self.live.iter().map(|(tid, origin)| (*tid, origin.since, "clone", &origin.stack))
    }

    /// Where the stack belongs of what was made there and then; `None` when that is gone.
    pub(super) fn made(&mut self, made: &Made) -> Option<&mut Option<Arc<Stack>>> {
        let origin = self.live.get_mut(&made.number)?;
        (origin.since == made.time && origin.by == made.by).then_some(&mut origin.stack)
    }

    pub(super) fn apply(&mut self, event: &Event, room: usize) {
        match event {
            Event::Clone(clone) if clone.flags & CLONE_THREAD != 0 && room > 0 => {
                let origin = Origin { since: clone.header.time, by: clone.header.tid, stack: None };
                self.live.insert(clone.child_tid, origin);
            }
            Event::Exit(exit) => drop(self.live.remove(&exit.header.tid)),
            // All but the one that called it are gone, and that has the number of the leader now.
            Event::Exec(_) => (self.live, self.seeded) = (HashMap::new(), false),
            _ => {}
        }
    }

    /// Takes over the threads that there were at a time, each with its start.
    pub(super) fn merge(&mut self, listed: &HashMap<u32, u64>, began: u64, room: usize) {
        let most = self.held() + room;
        // What is newer than the listing is not in it.
        let settled = began.saturating_sub(SETTLED);
        self.live.retain(|tid, origin| listed.contains_key(tid) || origin.since > settled);
        for (&tid, &start) in listed {
            if self.live.len() >= most {
                break;
            }
            let since = if self.seeded { start } else { 0 };
            self.live.entry(tid).or_insert(Origin { since, by: 0, stack: None });
        }
        self.seeded = true;
    }
}

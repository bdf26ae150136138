//! What belongs to a verdict beside it: where things came from, the course of the count, the threads. Kept for what
//! is resolved as long as that is visible.

use std::{collections::HashMap, sync::Arc};

use plumb_common::task::ProcKey;

use crate::{
    census::{self, MAX_BLOCKED},
    detect::{Earlier, Finding, Resource, State},
    history::History,
    origins::{ByOrigin, Group, Origins},
};

/// The threads of a leak are looked at again after this time, in nanoseconds; of so many leaks.
const LOOK_AGAIN: u64 = 30_000_000_000;
const MAX_LOOKED_AT: usize = 16;

/// Of one finding.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Detail {
    pub origins: ByOrigin,
    /// Since it is suspect.
    pub history: History,
    /// Of a finding about threads, once they have been looked at.
    pub threads: Option<Arc<census::Named>>,
}

/// Of all findings.
#[derive(Debug, Default)]
pub(crate) struct Details {
    known: HashMap<(ProcKey, Resource), (Detail, u64)>,
}

impl Details {
    /// Brings everything up to date after a pass, forgets what has no finding any more, and returns the threads that
    /// should be looked at.
    pub(crate) fn update(
        &mut self,
        findings: &[Finding],
        origins: &Origins,
        now: u64,
    ) -> Vec<(ProcKey, Vec<u32>)> {
        let mut known = std::mem::take(&mut self.known);
        let mut wanted = Vec::new();
        for finding in findings {
            let at = (finding.key, finding.resource);
            if self.known.contains_key(&at) {
                // Two rules found the same.
                continue;
            }
            let (mut detail, mut looked) = known.remove(&at).unwrap_or_default();
            if finding.state != State::Resolved {
                detail.history.push(now, finding.live);
                detail.origins = origins.by_origin(finding.key, finding.resource, now);
                let is_due = looked == 0 || now.saturating_sub(looked) >= LOOK_AGAIN;
                let threads = newest(&detail.origins);
                if finding.resource == Resource::Thread
                    && is_due
                    && !threads.is_empty()
                    && wanted.len() < MAX_LOOKED_AT
                {
                    wanted.push((finding.key, threads));
                    looked = now;
                }
            }
            self.known.insert(at, (detail, looked));
        }
        wanted
    }

    /// Takes a look at threads.
    pub(crate) fn threads(&mut self, process: ProcKey, threads: census::Named) {
        if let Some((detail, _)) = self.known.get_mut(&(process, Resource::Thread)) {
            detail.threads = Some(Arc::new(threads));
        }
    }

    /// Where most of it came from, for the next agent.
    #[must_use]
    pub(crate) fn origin(&self, process: ProcKey, resource: Resource) -> Option<Earlier> {
        let (detail, _) = self.known.get(&(process, resource))?;
        detail.origins.groups.iter().find_map(Group::earlier)
    }

    /// Puts to a finding what belongs to it.
    pub(crate) fn fill(&self, finding: &mut Finding) {
        if let Some((detail, _)) = self.known.get(&(finding.key, finding.resource)) {
            finding.detail = detail.clone();
        }
    }
}

/// Threads of the largest groups, some of each.
fn newest(origins: &ByOrigin) -> Vec<u32> {
    let examples = origins.groups.iter().flat_map(|group| group.examples.iter().map(|(_, tid)| *tid));
    examples.take(MAX_BLOCKED).collect()
}

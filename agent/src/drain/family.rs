//! Which processes belong together: those that the processes of a service have started, and which service names whom.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fs,
    sync::Arc,
};

use plumb_common::task::ProcKey;

use super::{
    active,
    identity::{Identity, ticks},
    matching::Match,
    process::{self, NoProcess, Process},
    service::{Service, Target},
};
use crate::decode::Event;

/// Descendants of one service at most, of which each takes an fd.
const MAX_DESCENDANTS: usize = 1024;
/// Processes of all services of a drain that are followed at most, in 32 bytes each.
const MAX_TREE: usize = 16_384;

/// Which process each service of a drain names, apart from what that has started.
#[derive(Debug, Default)]
pub(super) struct Claims(Vec<Claim>);

#[derive(Debug)]
struct Claim {
    is_admins: bool,
    roots: Vec<Identity>,
    /// Its processes are all in the cgroup of this name.
    unit: Option<String>,
    /// Nothing of it runs; not known of a unit.
    is_absent: bool,
}

impl Claims {
    /// As of now; `held` are the processes of registrations.
    pub(super) fn of(services: &[Service], held: impl Fn(usize) -> Option<Arc<Process>>) -> Self {
        let claim = |(at, service): (usize, &Service)| {
            let unit = match &service.target {
                Target::Unit(unit) => Some(unit.clone()),
                _ => None,
            };
            let found = match unit {
                Some(_) => None,
                None => active::find(&service.target, held(at).as_deref()).ok().map(|found| found.0),
            };
            let is_absent = found.as_ref().is_some_and(Vec::is_empty);
            let roots = found.into_iter().flatten().filter(|one| one.is_root).map(|one| one.process.identity);
            Claim { is_admins: service.uid == 0, roots: roots.collect(), unit, is_absent }
        };
        Self(services.iter().enumerate().map(claim).collect())
    }

    /// Places of services of which nothing runs.
    pub(super) fn absent(&self) -> Vec<usize> {
        (0..self.0.len()).filter(|at| self.0[*at].is_absent).collect()
    }

    /// Whom a service has named before is its own for as long as he is there.
    pub(super) fn keep(&mut self, before: Self) {
        for (claim, before) in self.0.iter_mut().zip(before.0) {
            let is_there = |root: &Identity| {
                let is_named = claim.roots.iter().any(|known| known.is_same_process(root));
                !is_named && process::start_ticks(root.pid) == Some(root.start_ticks)
            };
            let kept: Vec<Identity> = before.roots.into_iter().filter(is_there).collect();
            claim.roots.extend(kept);
        }
    }

    /// Another service that names a process.
    pub(super) fn other(&self, own: usize, identity: &Identity) -> Option<usize> {
        (0..self.0.len()).find(|at| *at != own && self.0[*at].names(identity))
    }

    /// Whether a service names a process, as far as that is known without its cgroup.
    pub(super) fn has(&self, process: ProcKey) -> bool {
        self.0.iter().flat_map(|claim| &claim.roots).any(|root| root.is(process))
    }

    /// Another service that names a process with better right: the administrator's, or that of which plumb heard first.
    pub(super) fn better(&self, own: usize, identity: &Identity) -> Option<usize> {
        let rank = |at: usize| (!self.0[at].is_admins, at);
        let others = (0..self.0.len()).filter(|at| *at != own && self.0[*at].names(identity));
        others.min_by_key(|at| rank(*at)).filter(|other| rank(*other) < rank(own))
    }
}

impl Claim {
    fn names(&self, identity: &Identity) -> bool {
        let is_in = |unit: &String| identity.cgroup.split(['/', '\n']).any(|part| part == unit);
        self.roots.iter().any(|root| root.is_same_process(identity)) || self.unit.as_ref().is_some_and(is_in)
    }
}

/// Processes of a drain that are there, and what they start from then on.
#[derive(Debug, Default)]
pub(super) struct Tree(HashMap<u32, Node>);

#[derive(Debug)]
struct Node {
    service: usize,
    start_ticks: u64,
    /// What it had started before this was looked for.
    since: u64,
}

impl Tree {
    pub(super) fn add(&mut self, service: usize, process: &Process) {
        let Identity { pid, start_ticks, .. } = process.identity;
        self.0.insert(pid, Node { service, start_ticks, since: process.looked });
    }

    fn node(&self, key: ProcKey) -> Option<&Node> {
        self.0.get(&key.tgid).filter(|node| node.start_ticks == ticks(key.start_boottime))
    }

    /// The service that has started a process, or has it.
    pub(super) fn of(&self, key: ProcKey) -> Option<usize> {
        self.node(key).map(|node| node.service)
    }

    /// The service of which something has been started for which there is no room.
    pub(super) fn take(&mut self, event: &Event) -> Option<usize> {
        match event {
            Event::Clone(clone) if clone.child != clone.header.process => {
                let parent = self.node(clone.header.process)?;
                let service = (parent.since <= clone.header.time).then_some(parent.service)?;
                if self.0.len() == MAX_TREE {
                    return Some(service);
                }
                let start_ticks = ticks(clone.child.start_boottime);
                self.0.insert(clone.child.tgid, Node { service, start_ticks, since: 0 });
            }
            Event::Exit(exit) if exit.group_dead != 0 && self.node(exit.header.process).is_some() => {
                self.0.remove(&exit.header.process.tgid);
            }
            _ => {}
        }
        None
    }

    /// What is there of a service, and whether that is all.
    pub(super) fn alive(&self, service: usize) -> (Vec<Match>, bool) {
        let (mut found, mut are_all) = (Vec::new(), true);
        for (pid, node) in self.0.iter().filter(|(_, node)| node.service == service) {
            match Process::open(*pid) {
                Ok(process) if process.identity.start_ticks == node.start_ticks => {
                    found.push(Match { process, is_root: false, is_descendant: true });
                }
                Ok(_) | Err(NoProcess::Gone(_) | NoProcess::Denied(..)) => {}
                Err(_) => are_all &= process::start_ticks(*pid) != Some(node.start_ticks),
            }
        }
        (found, are_all)
    }
}

/// What the processes of a service have started, and those in turn, parents first, without what is another service's; and
/// whether these are all. They are waited for, and get no signal.
pub(super) fn descendants(found: &[Match], claims: &Claims, own: usize) -> (Vec<Match>, bool) {
    let mut known: HashSet<u32> = found.iter().map(|one| one.process.identity.pid).collect();
    let mut todo: Vec<u32> = known.iter().copied().collect();
    let (mut more, mut parents, mut are_all) = (Vec::new(), None, true);
    while let Some(parent) = todo.pop() {
        for pid in children(parent).unwrap_or_else(|| {
            parents
                .get_or_insert_with(parents_of_all)
                .iter()
                .filter(|(of, _)| *of == parent)
                .map(|(_, pid)| *pid)
                .collect()
        }) {
            let process = match Process::open(pid) {
                Ok(process) => process,
                // Plumb and its parent are denied.
                Err(NoProcess::Gone(_) | NoProcess::Denied(..)) => continue,
                Err(_) => {
                    are_all = false;
                    continue;
                }
            };
            let is_child = process.ppid == parent && claims.other(own, &process.identity).is_none();
            if !is_child || !known.insert(pid) {
                continue;
            }
            if more.len() == MAX_DESCENDANTS {
                return (more, false);
            }
            todo.push(pid);
            more.push(Match { process, is_root: false, is_descendant: true });
        }
    }
    (more, are_all)
}

/// The children of a process, of each of its threads; `None` where the kernel does not list them
/// (`CONFIG_PROC_CHILDREN`, since 4.2).
fn children(pid: u32) -> Option<BTreeSet<u32>> {
    let list = |thread: &fs::DirEntry| fs::read_to_string(thread.path().join("children")).ok();
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return Some(BTreeSet::new()) };
    let mut all = BTreeSet::new();
    for thread in threads.filter_map(Result::ok) {
        // One may be left out while another ends (fs/proc/array.c, get_children_pid).
        for _ in 0..2 {
            match list(&thread) {
                Some(pids) => all.extend(pids.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok())),
                None if thread.path().exists() => return None,
                None => {}
            }
        }
    }
    Some(all)
}

/// Each process of the host, behind its parent.
fn parents_of_all() -> Vec<(u32, u32)> {
    process::all()
        .unwrap_or_default()
        .into_iter()
        .filter_map(|pid| Some((process::parent(pid)?, pid)))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        process::{Child, Command, Stdio},
    };

    use super::*;

    struct Running(Child);

    impl Drop for Running {
        fn drop(&mut self) {
            // The whole group.
            let pid = i32::try_from(self.0.id()).unwrap();
            // SAFETY: a signal to processes that this test has started.
            unsafe { libc::kill(-pid, libc::SIGKILL) };
            let _ = self.0.wait();
        }
    }

    /// A shell, its child and that one's child.
    fn three() -> Running {
        use std::os::unix::process::CommandExt;
        let script = "(sleep 300 & echo; wait) & wait";
        let mut shell = Command::new("/bin/sh");
        let mut child = shell.args(["-c", script]).process_group(0).stdout(Stdio::piped()).spawn().unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        Running(child)
    }

    fn root(pid: u32) -> Vec<Match> {
        vec![Match { process: Process::open(pid).unwrap(), is_root: true, is_descendant: false }]
    }

    fn pids(found: &[Match]) -> Vec<u32> {
        found.iter().map(|one| one.process.identity.pid).collect()
    }

    #[test]
    fn what_a_process_has_started_is_found_and_what_another_service_names_is_not() {
        let shell = three();
        let found = root(shell.0.id());
        let (more, are_all) = descendants(&found, &Claims::default(), 0);
        assert!(
            are_all && more.len() == 2 && more.iter().all(|one| one.is_descendant && !one.is_root),
            "{more:?}"
        );
        assert_eq!((more[0].process.ppid, more[1].process.ppid), (shell.0.id(), pids(&more)[0]));
        let claim = |is_admins, at: &Match| Claim {
            is_admins,
            roots: vec![at.process.identity.clone()],
            unit: None,
            is_absent: false,
        };
        let claims = Claims(vec![claim(true, &found[0]), claim(false, &more[1])]);
        assert_eq!(pids(&descendants(&found, &claims, 0).0), pids(&more[..1]));
        // Nobody has less right to what he names alone.
        assert_eq!(claims.better(1, &more[1].process.identity), None);
        let twice = Claims(vec![claim(false, &found[0]), claim(true, &found[0]), claim(true, &found[0])]);
        let better = |own| twice.better(own, &found[0].process.identity);
        assert_eq!([better(0), better(1), better(2)], [Some(1), None, Some(1)]);
    }

    #[test]
    fn the_kernel_lists_what_the_parents_say() {
        let shell = three();
        let by_parents = parents_of_all().into_iter().filter(|(parent, _)| *parent == shell.0.id());
        let by_parents: BTreeSet<u32> = by_parents.map(|(_, pid)| pid).collect();
        assert!(
            children(shell.0.id()).is_none_or(|children| children == by_parents) && by_parents.len() == 1
        );
        assert_eq!(children(u32::MAX), Some(BTreeSet::new()));
    }
}

//! Which sockets and signals of services are followed: asked by the drain, done by the observer.

use std::sync::mpsc::SyncSender;

use plumb_common::{
    counts,
    sockets::{Port, SLOTS},
    task::ProcKey,
};

use crate::{
    drain,
    follow::{Follow, Who},
    kernel::{Kernel, Program, SocketCounts, Status},
};

/// What the observer is asked for.
#[derive(Clone, Debug)]
pub(crate) enum SocketRequest {
    /// Follow; the answer is what this kernel does not show.
    Begin(SyncSender<Vec<String>>),
    /// From now on these ports and processes, by number and start, are those of a slot; the answer is whether that is so.
    Add { slot: u32, ports: Vec<Port>, processes: Vec<(u32, u64)>, done: SyncSender<bool> },
    /// From now on it is followed what these processes open; the answer is whether all of it is seen.
    Acts { processes: Vec<(u32, u64)>, done: SyncSender<bool> },
    /// What was counted since the programs were loaded; nothing if nobody is followed any more.
    Count(SyncSender<Option<SocketLedger>>),
    /// Follow nobody.
    End,
}

/// What was counted of all slots.
#[derive(Clone, Debug, Default)]
pub(crate) struct SocketLedger {
    pub counts: Vec<SocketCounts>,
    /// Events of sockets and signals that are missing.
    pub lost: u64,
    /// Events of new fds, threads and processes that are missing.
    pub lost_acts: u64,
    /// Of new threads and processes alone.
    pub lost_clones: u64,
}

/// Who is followed.
#[derive(Debug, Default)]
pub(crate) struct Sockets {
    ports: Vec<Port>,
    processes: Vec<ProcKey>,
    /// Whose new fds, threads and processes are followed, too.
    acting: Vec<ProcKey>,
}

impl Sockets {
    /// Does what is asked for. Whoever asked may not wait any more.
    pub(crate) fn answer(
        &mut self,
        kernel: &mut Kernel,
        follow: &mut Follow,
        rejected: u64,
        request: SocketRequest,
    ) {
        match request {
            SocketRequest::Begin(reply) => {
                self.end(kernel, follow);
                kernel.follow_sockets(true);
                let missing = kernel
                    .programs()
                    .iter()
                    .filter(|Status { program, .. }| program.is_evidence() || program.is_of_children())
                    .filter(|status| !status.is_fine());
                let words = missing
                    .map(|status| format!("{} ({})", status.program.gives, status.verdict.explain()))
                    .collect();
                let _ = reply.send(words);
            }
            SocketRequest::Add { slot, ports, processes, done } => {
                let added = self.add(kernel, slot, ports, &processes);
                if let Err(error) = &added {
                    tracing::warn!("a service's sockets are not followed: {error:#}");
                }
                let _ = done.send(added.is_ok());
            }
            SocketRequest::Acts { processes, done } => {
                let seen = self.follow_acts(kernel, follow, &processes).unwrap_or_else(|error| {
                    tracing::warn!("what a service opens is not followed: {error:#}");
                    false
                });
                let _ = done.send(seen);
            }
            SocketRequest::Count(reply) => {
                let ledger = kernel.follows_sockets().then(|| ledger(kernel, rejected)).flatten();
                let _ = reply.send(ledger);
            }
            SocketRequest::End => self.end(kernel, follow),
        }
    }

    fn add(
        &mut self,
        kernel: &mut Kernel,
        slot: u32,
        ports: Vec<Port>,
        processes: &[(u32, u64)],
    ) -> anyhow::Result<()> {
        for port in ports {
            kernel.follow_port(port, slot)?;
            self.ports.push(port);
        }
        for key in keys(kernel, processes)? {
            kernel.follow_signals(key)?;
            self.processes.push(key);
        }
        Ok(())
    }

    fn follow_acts(
        &mut self,
        kernel: &mut Kernel,
        follow: &mut Follow,
        processes: &[(u32, u64)],
    ) -> anyhow::Result<bool> {
        let keys = keys(kernel, processes)?;
        let mut seen = keys.len() == processes.len();
        for key in keys {
            if !self.acting.contains(&key) {
                follow.add(kernel, Who::Process(key));
                self.acting.push(key);
            }
            seen &= follow.sees(kernel, key);
        }
        Ok(seen)
    }

    /// Follows nobody.
    pub(crate) fn end(&mut self, kernel: &mut Kernel, follow: &mut Follow) {
        for port in self.ports.drain(..) {
            let _ = kernel.unfollow_port(port);
        }
        for process in self.processes.drain(..) {
            let _ = kernel.unfollow_signals(process);
        }
        for process in self.acting.drain(..) {
            follow.remove(kernel, Who::Process(process));
        }
        kernel.follow_sockets(false);
    }
}

/// Of processes by number and start.
fn keys(kernel: &mut Kernel, processes: &[(u32, u64)]) -> anyhow::Result<Vec<ProcKey>> {
    let is_meant = |key: &ProcKey| processes.contains(&(key.tgid, drain::ticks(key.start_boottime)));
    Ok(kernel.processes()?.iter().map(|record| record.key).filter(is_meant).collect())
}

fn ledger(kernel: &Kernel, rejected: u64) -> Option<SocketLedger> {
    let counts = (0..SLOTS).map(|slot| kernel.socket_counts(slot)).collect::<Result<_, _>>().ok()?;
    let ledger = kernel.counts().ok()?;
    let not_run = kernel.not_run_of(Program::is_evidence);
    let lost = ledger.lost(counts::SIGNAL) + ledger.lost(counts::SOCKET) + rejected + not_run;
    // Whose end was lost may have crashed.
    let lost_clones = ledger.lost(counts::CLONE)
        + ledger.lost(counts::EXIT)
        + rejected
        + kernel.not_run_of(Program::is_of_children);
    Some(SocketLedger { counts, lost, lost_acts: lost_acts(kernel, rejected), lost_clones })
}

/// Events of new fds, threads and processes that are missing since the programs were loaded; all where that cannot be read.
pub(crate) fn lost_acts(kernel: &Kernel, rejected: u64) -> u64 {
    let Ok(ledger) = kernel.counts() else { return u64::MAX };
    ledger.lost(counts::FD)
        + ledger.lost(counts::CLONE)
        + rejected
        + kernel.not_run_of(|program| !program.is_evidence())
}

//! What the kernel says of the sockets and signals of the services of a drain: asked for, and put together by service.

use std::{
    collections::{BTreeMap, HashSet},
    sync::mpsc::{Receiver, sync_channel},
    time::Duration,
};

use plumb_common::{
    sockets::{
        COUNTERS, LISTENER_CLOSED, SIGNAL_DELIVERED, SIGNAL_GENERATED, SIGNAL_NO_MEMORY, SLOTS, Signal,
        Socket,
    },
    task::ProcKey,
};

use super::{
    course::{Fact, Input, LostRequest},
    facts,
    process::Process,
};
use crate::{
    ask::{Asker, Request},
    decode::Event,
    losses::{self, Class, Tally},
    sockets::{SocketLedger, SocketRequest},
};

/// For the observer to answer: it may be amid a pass over a large host.
const ANSWER: Duration = Duration::from_secs(2);
const KILL: u32 = 9;

/// What is followed for a drain under way.
pub(super) struct Sockets {
    ask: Asker,
    /// What is not seen, and why; of all services.
    pub(super) missing: Vec<String>,
    tallies: Vec<Tally>,
    before: SocketLedger,
    /// Services whose ports are not followed, or not all of them.
    unfollowed: HashSet<usize>,
    /// It has not answered once, and is not waited for again.
    is_silent: bool,
}

fn ask<T>(asker: &Asker, request: impl FnOnce(std::sync::mpsc::SyncSender<T>) -> SocketRequest) -> Option<T> {
    let (reply, answer): (_, Receiver<T>) = sync_channel(1);
    asker.ask(Request::Sockets(request(reply)));
    answer.recv_timeout(ANSWER).ok()
}

/// Follows what processes open, and says whether all of it is seen. Takes a moment.
pub(super) fn follow_acts(asker: &Asker, processes: Vec<(u32, u64)>) -> bool {
    ask(asker, |done| SocketRequest::Acts { processes, done }).unwrap_or(false)
}

impl Sockets {
    /// Begins to follow, for so many services.
    pub(super) fn begin(asker: &Asker, services: usize) -> Self {
        let missing = ask(asker, SocketRequest::Begin);
        let is_silent = missing.is_none();
        let before = if is_silent { None } else { ask(asker, SocketRequest::Count).flatten() };
        Self {
            ask: asker.clone(),
            missing: missing.unwrap_or_default(),
            tallies: vec![Tally::default(); services],
            before: before.unwrap_or_default(),
            unfollowed: HashSet::new(),
            is_silent,
        }
    }

    /// Events of what processes begin that had been lost before the drain.
    pub(super) fn lost_acts(&self) -> u64 {
        self.before.lost_acts
    }

    /// Follows the processes of a service and the ports on which they listen, which are returned; and whether these are all.
    pub(super) fn add(&mut self, service: usize, processes: &[Process]) -> (Vec<u32>, bool) {
        let (mut ports, mut are_all) = (Vec::new(), true);
        for process in processes {
            match facts::ports(process.identity.pid) {
                Some(found) => ports.extend(found),
                // Who has gone listens nowhere.
                None => are_all &= !process.is_alive(),
            }
        }
        ports.sort_unstable_by_key(|port| (port.netns, port.port));
        ports.dedup();
        let known = processes.iter().map(|process| (process.identity.pid, process.identity.start_ticks));
        let (processes, numbers) = (known.collect(), ports.iter().map(|port| port.port).collect());
        if let Some(slot) = slot(service)
            && !self.is_silent
        {
            let done = ask(&self.ask, |done| SocketRequest::Add { slot, ports, processes, done });
            self.is_silent = done.is_none();
            are_all &= done != Some(false);
        }
        if !are_all {
            self.unfollowed.insert(service);
        }
        (numbers, are_all)
    }

    /// What a batch of events tells of each service.
    pub(super) fn take(&mut self, events: &[Event], is_own: impl Fn(ProcKey) -> Option<usize>) -> Vec<Input> {
        let mut facts = Vec::new();
        let mut lost: BTreeMap<usize, Lost> = BTreeMap::new();
        for event in events {
            match event {
                Event::Socket(socket) => {
                    let service = socket.slot as usize;
                    let Some(tally) = self.tallies.get_mut(service) else { continue };
                    if socket.what == LISTENER_CLOSED {
                        facts.push((service, listener(socket)));
                    } else if let Some(class) = tally.take(socket) {
                        lost.entry(service).or_default().add(class, socket);
                    }
                }
                Event::Signal(signal) => {
                    if let Some(service) = is_own(signal.target)
                        && let Some(fact) = of_signal(signal)
                    {
                        facts.push((service, fact));
                    }
                }
                _ => {}
            }
        }
        let lost = lost.into_iter().map(|(service, lost)| (service, lost.fact()));
        facts.into_iter().chain(lost).map(|(service, fact)| Input::Seen(service, fact)).collect()
    }

    /// What was counted of a service, or what may be missing.
    pub(super) fn counted(&mut self, service: usize) -> Fact {
        let unseen = |why: String| Fact::Unseen { why };
        if slot(service).is_none() {
            return unseen(format!("only {SLOTS} services are followed at a time"));
        }
        if !self.missing.is_empty() {
            return unseen(format!("this kernel does not show {}", self.missing.join("; ")));
        }
        if self.unfollowed.contains(&service) {
            return unseen("its ports could not be read, or not be followed".to_owned());
        }
        let answer = if self.is_silent { None } else { ask(&self.ask, SocketRequest::Count) };
        self.is_silent = answer.is_none();
        let Some(now) = answer.flatten() else {
            return unseen("the observer of the agent does not answer, or was started anew".to_owned());
        };
        if now.lost > self.before.lost {
            return unseen(format!("{} events were lost", now.lost - self.before.lost));
        }
        let of = |ledger: &SocketLedger| ledger.counts.get(service).copied().unwrap_or_default();
        let (now, before) = (of(&now), of(&self.before));
        let counts = COUNTERS.iter().zip(now.iter().zip(before));
        let counts = counts.map(|(name, (now, before))| ((*name).to_owned(), now.saturating_sub(before)));
        Fact::Counted { counts: counts.collect() }
    }
}

fn slot(service: usize) -> Option<u32> {
    u32::try_from(service).ok().filter(|slot| *slot < SLOTS)
}

impl Drop for Sockets {
    fn drop(&mut self) {
        self.ask.ask(Request::Sockets(SocketRequest::End));
    }
}

fn listener(socket: &Socket) -> Fact {
    Fact::Listener { at: socket.header.time, port: socket.peer.local_port, waiting: socket.unread }
}

fn of_signal(signal: &Signal) -> Option<Fact> {
    let (at, number) = (signal.header.time, i32::try_from(signal.signal).ok()?);
    match signal.what {
        SIGNAL_DELIVERED => Some(Fact::Taken { at, signal: number, how: losses::handler(signal).to_owned() }),
        SIGNAL_GENERATED if signal.signal == KILL && signal.header.process.tgid != std::process::id() => {
            Some(Fact::Killed { at, by: losses::sender(signal) })
        }
        SIGNAL_NO_MEMORY => Some(Fact::NoMemory { at }),
        _ => None,
    }
}

/// The requests of one batch that a service has lost.
#[derive(Default)]
struct Lost {
    requests: BTreeMap<Class, u64>,
    guessed: u64,
    examples: Vec<LostRequest>,
}

impl Lost {
    fn add(&mut self, class: Class, socket: &Socket) {
        *self.requests.entry(class).or_default() += 1;
        self.guessed += u64::from(losses::is_guessed(socket));
        if self.examples.len() < losses::MAX_EXAMPLES {
            self.examples.push(LostRequest {
                at: socket.header.time,
                class,
                peer: losses::address(&socket.peer).to_string(),
                unread_bytes: socket.unread,
                unsent_bytes: socket.unsent,
            });
        }
    }

    fn fact(self) -> Fact {
        Fact::Lost { requests: self.requests, guessed: self.guessed, examples: self.examples }
    }
}

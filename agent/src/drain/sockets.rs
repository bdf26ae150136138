//! What the kernel says of the sockets and signals of the services of a drain: asked for, and put together by service.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    iter,
    sync::mpsc::{Receiver, sync_channel},
    time::Duration,
};

use plumb_common::{
    sockets::{
        COUNTERS, LISTENER_CLOSED, Port, SIGNAL_DELIVERED, SIGNAL_GENERATED, SIGNAL_NO_MEMORY, SLOTS, Signal,
        Socket,
    },
    task::ProcKey,
};

use super::{
    course::{Fact, Input, LostRequest},
    facts,
    process::{Process, start_ticks},
};
use crate::{
    ask::{Asker, Request},
    decode::Event,
    losses::{self, Class, Tally},
    sockets::{SocketLedger, SocketRequest},
};

/// For the observer to answer: it may be amid a pass over a large host.
const ANSWER: Duration = Duration::from_secs(2);
/// For what was counted of a service that is gone, on which its verdict depends. The driver waits, and so do the others'
/// signals; whoever has not answered is not waited for again in this drain.
const LAST_ANSWER: Duration = Duration::from_secs(4);
const KILL: u32 = 9;
/// Ports of processes that the next drain knows of, at most.
const MAX_KNOWN: usize = 4096;

/// On which port a process has been followed, which is named by its number and its start.
pub(super) type Known = HashSet<((u32, u64), Port)>;

/// What is followed for a drain under way.
pub(super) struct Sockets {
    ask: Asker,
    /// What is not seen, and why; of all services.
    pub(super) missing: Vec<String>,
    tallies: Vec<Tally>,
    before: SocketLedger,
    /// The service in whose slot the kernel has what becomes of a port: the first of those that have it.
    owners: HashMap<Port, usize>,
    /// The others, by the one and the number of the port.
    sharing: HashMap<(usize, u32), Vec<usize>>,
    /// Ports that were followed, now or in the drain before: their listener may be closed already.
    known: Known,
    /// Services with a port that was not followed from the moment when they were found.
    late: HashSet<usize>,
    /// Services whose ports are not followed, or not all of them.
    unfollowed: HashSet<usize>,
    /// It has not answered once, and is not waited for again.
    is_silent: bool,
}

fn ask<T>(asker: &Asker, request: impl FnOnce(std::sync::mpsc::SyncSender<T>) -> SocketRequest) -> Option<T> {
    ask_for(ANSWER, asker, request)
}

fn ask_for<T>(
    patience: Duration,
    asker: &Asker,
    request: impl FnOnce(std::sync::mpsc::SyncSender<T>) -> SocketRequest,
) -> Option<T> {
    let (reply, answer): (_, Receiver<T>) = sync_channel(1);
    asker.ask(Request::Sockets(request(reply)));
    answer.recv_timeout(patience).ok()
}

/// Follows what processes open, and says whether all of it is seen. Takes a moment.
pub(super) fn follow_acts(asker: &Asker, processes: Vec<(u32, u64)>) -> bool {
    ask(asker, |done| SocketRequest::Acts { processes, done }).unwrap_or(false)
}

impl Sockets {
    /// Begins to follow, for so many services; these ports were followed before.
    pub(super) fn begin(asker: &Asker, services: usize, known: Known) -> Self {
        let missing = ask(asker, SocketRequest::Begin);
        let is_silent = missing.is_none();
        let before = if is_silent { None } else { ask(asker, SocketRequest::Count).flatten() };
        Self {
            ask: asker.clone(),
            missing: missing.unwrap_or_default(),
            tallies: vec![Tally::default(); services],
            before: before.unwrap_or_default(),
            owners: HashMap::new(),
            sharing: HashMap::new(),
            known,
            late: HashSet::new(),
            unfollowed: HashSet::new(),
            is_silent,
        }
    }

    /// Events of what processes begin that had been lost before the drain.
    pub(super) fn lost_acts(&self) -> u64 {
        self.before.lost_acts
    }

    /// Follows the processes of a service and the ports on which they listen, or have listened, which are returned; and
    /// whether these are all. When it is asked to stop already that is late.
    pub(super) fn add<'a>(
        &mut self,
        service: usize,
        processes: impl Iterator<Item = &'a Process>,
        is_late: bool,
    ) -> (Vec<u32>, bool) {
        let (mut ports, mut keys, mut are_all) = (Vec::new(), Vec::new(), true);
        let processes: Vec<&Process> = processes.collect();
        let pids: Vec<u32> = processes.iter().map(|process| process.identity.pid).collect();
        for (process, found) in processes.into_iter().zip(facts::ports(&pids)) {
            let key = (process.identity.pid, process.identity.start_ticks);
            keys.push(key);
            ports.extend(self.known.iter().filter(|(of, _)| *of == key).map(|(_, port)| *port));
            match found {
                Some(found) => {
                    let room = MAX_KNOWN.saturating_sub(self.known.len());
                    self.known.extend(found.iter().take(room).map(|port| (key, *port)));
                    ports.extend(found);
                }
                // Who ends has closed what it had.
                None => are_all &= process.ends(),
            }
        }
        ports.sort_unstable_by_key(|port| (port.netns, port.port));
        ports.dedup();
        let numbers = ports.iter().map(|port| port.port).collect();
        ports.retain(|port| self.owners.get(port) != Some(&service));
        if is_late && !ports.is_empty() {
            self.late.insert(service);
        }
        let (shared, own): (Vec<_>, Vec<_>) =
            ports.into_iter().partition(|port| self.owners.contains_key(port));
        for port in shared {
            let sharing = self.sharing.entry((self.owners[&port], port.port)).or_default();
            if !sharing.contains(&service) {
                sharing.push(service);
            }
        }
        if let Some(slot) = slot(service)
            && !self.is_silent
        {
            let (ports, processes) = (own.clone(), keys);
            let done = ask(&self.ask, |done| SocketRequest::Add { slot, ports, processes, done });
            self.is_silent = done.is_none();
            are_all &= done != Some(false);
            if done == Some(true) {
                self.owners.extend(own.into_iter().map(|port| (port, service)));
            }
        }
        if !are_all {
            self.unfollowed.insert(service);
        }
        (numbers, are_all)
    }

    /// What the next drain may want to know: of processes that it finds again.
    pub(super) fn known(&mut self) -> Known {
        let mut known = std::mem::take(&mut self.known);
        known.retain(|((pid, start), _)| start_ticks(*pid) == Some(*start));
        known
    }

    /// What a batch of events tells of each service; `is_over` says of a service whether it had gone at a time.
    pub(super) fn take(
        &mut self,
        events: &[Event],
        is_own: impl Fn(ProcKey) -> Option<usize>,
        is_over: impl Fn(usize, u64) -> bool,
    ) -> Vec<Input> {
        let mut facts = Vec::new();
        let mut lost: BTreeMap<usize, Lost> = BTreeMap::new();
        for event in events {
            match event {
                Event::Socket(socket) => {
                    let owner = socket.slot as usize;
                    let sharing = self.sharing.get(&(owner, socket.peer.local_port)).into_iter().flatten();
                    let all: Vec<usize> = iter::once(owner).chain(sharing.copied()).collect();
                    // Who has gone loses nothing as long as another one serves there.
                    let is_over = |service: &usize| is_over(*service, socket.header.time);
                    let serves = all.iter().any(|service| !is_over(service));
                    for service in all.into_iter().filter(|service| !serves || !is_over(service)) {
                        let Some(tally) = self.tallies.get_mut(service) else { continue };
                        if socket.what == LISTENER_CLOSED {
                            facts.push((service, listener(socket)));
                        } else if let Some(class) = tally.take(socket) {
                            lost.entry(service).or_default().add(class, socket);
                        }
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
    pub(super) fn counted(&mut self, service: usize, is_gone: bool) -> Vec<Fact> {
        let patience = if is_gone { LAST_ANSWER } else { ANSWER };
        let answer = if self.is_silent { None } else { ask_for(patience, &self.ask, SocketRequest::Count) };
        self.is_silent = answer.is_none();
        let now = answer.flatten();
        let clones = now.as_ref().map_or(0, |now| now.lost_clones.saturating_sub(self.before.lost_clones));
        let strays = (clones > 0).then(|| {
            let why = format!(
                "{clones} events of new or ended processes were lost, and one of them may be its own"
            );
            Fact::Unseen { why, strays: true }
        });
        iter::once(self.counted_of(service, now)).chain(strays).collect()
    }

    fn counted_of(&self, service: usize, now: Option<SocketLedger>) -> Fact {
        let unseen = |why: String| Fact::Unseen { why, strays: false };
        if slot(service).is_none() {
            return unseen(format!("only {SLOTS} services are followed at a time"));
        }
        if !self.missing.is_empty() {
            return unseen(format!("this kernel does not show {}", self.missing.join("; ")));
        }
        if self.unfollowed.contains(&service) {
            return unseen("its ports could not be read, or not be followed".to_owned());
        }
        if self.late.contains(&service) {
            let why = "one of its processes listened on a port that was not followed from the beginning";
            return unseen(why.to_owned());
        }
        let Some(now) = now else {
            return unseen("the observer of the agent does not answer, or was started anew".to_owned());
        };
        if now.lost > self.before.lost {
            return unseen(format!("{} events were lost", now.lost - self.before.lost));
        }
        let shared = self.sharing.iter().filter(|(_, sharing)| sharing.contains(&service));
        let slots: BTreeSet<usize> = shared.map(|((owner, _), _)| *owner).chain([service]).collect();
        let of = |ledger: &SocketLedger, counter: usize| -> u64 {
            slots.iter().filter_map(|slot| ledger.counts.get(*slot)).map(|counts| counts[counter]).sum()
        };
        let counts = COUNTERS
            .iter()
            .enumerate()
            .map(|(at, name)| ((*name).to_owned(), of(&now, at).saturating_sub(of(&self.before, at))));
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
    let Socket { header, peer, unread, .. } = socket;
    let is_ipv6 = losses::address(peer).is_ipv6();
    Fact::Listener { at: header.time, port: peer.local_port, is_ipv6, waiting: *unread }
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

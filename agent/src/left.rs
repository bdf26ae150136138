//! What is left of a process that was asked to stop: its threads by type, where they wait, and what each has begun since
//! the signal.

use std::collections::{BTreeMap, HashMap, HashSet};

use plumb_common::{
    event::{FD_OPENED, FD_REPLACED},
    syscalls,
    task::{ProcKey, ThreadRecord},
};
use serde::{Deserialize, Serialize};

use crate::{
    census::{self, Blocked, Census},
    decode::Event,
    stacks::{Function, Stack},
    text,
    thread_type::thread_type,
};

/// Threads of a process that are looked at one by one.
pub(crate) const MAX_LOOKED_AT: usize = 32;
/// Functions of a stack that are kept.
const MAX_FUNCTIONS: usize = 24;
/// Threads whose doings are told apart; a thread beyond counts for its process only.
const MAX_ACTORS: usize = 4096;

/// What was begun since the signal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Acts {
    /// New fds, but those of accepted connections.
    pub opened: u64,
    /// Connections.
    pub accepted: u64,
    /// New threads and processes.
    pub cloned: u64,
    /// When the last of it was, nanoseconds since boot; 0 for never.
    pub last: u64,
}

impl Acts {
    /// Of an event; `None` for one that begins nothing.
    #[must_use]
    pub(crate) fn of(event: &Event) -> Option<Self> {
        let last = event.header().time;
        match event {
            Event::Clone(_) => Some(Self { cloned: 1, last, ..Self::default() }),
            Event::Fd(change) if matches!(change.change, FD_OPENED | FD_REPLACED) => {
                let is_accept = matches!(syscalls::name(change.how), "accept" | "accept4");
                let (opened, accepted) = if is_accept { (0, 1) } else { (1, 0) };
                Some(Self { opened, accepted, last, ..Self::default() })
            }
            _ => None,
        }
    }

    fn add(&mut self, more: Self) {
        self.opened += more.opened;
        self.accepted += more.accepted;
        self.cloned += more.cloned;
        self.last = self.last.max(more.last);
    }

    #[must_use]
    pub(crate) fn is_none(&self) -> bool {
        self.opened + self.accepted + self.cloned == 0
    }

    /// Whether it went on as if nobody had asked it to stop: it took new work, or still began something when half of the
    /// time was over. Before that it may have been what the end itself takes, such as a file for its state.
    #[must_use]
    pub(crate) fn ignored_the_stop(&self, signalled: u64, looked: u64) -> bool {
        let half = signalled + looked.saturating_sub(signalled) / 2;
        self.accepted > 0 || (!self.is_none() && self.last >= half)
    }

    /// `accepted 3, opened 5, cloned 1`
    #[must_use]
    pub(crate) fn words(&self) -> String {
        let parts = [(self.accepted, "accepted"), (self.opened, "opened"), (self.cloned, "cloned")];
        let parts = parts.into_iter().filter(|(many, _)| *many > 0);
        parts.map(|(many, what)| format!("{what} {many}")).collect::<Vec<_>>().join(", ")
    }
}

/// What the threads of one process have begun since its signal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Doings {
    all: Acts,
    by_thread: HashMap<u32, Acts>,
}

impl Doings {
    /// Takes an event of this process; what was before the signal does not count.
    pub(crate) fn take(&mut self, event: &Event, signalled: u64) {
        let header = event.header();
        let Some(acts) = Acts::of(event).filter(|_| header.time >= signalled) else { return };
        self.all.add(acts);
        if self.by_thread.len() < MAX_ACTORS || self.by_thread.contains_key(&header.tid) {
            self.by_thread.entry(header.tid).or_default().add(acts);
        }
    }
}

/// What is left of one process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Left {
    pub pid: u32,
    pub comm: String,
    /// All its threads.
    pub count: u32,
    /// The most frequent first; at most 20 of them.
    pub types: Vec<LeftType>,
    /// Those that were looked at, at most 32: some of each type, and of those that wait at different places.
    pub threads: Vec<LeftThread>,
    /// After the signal, of all threads, also those that have ended; fds of a drain only in the second half of its time; `null`
    /// when that was not seen.
    pub since_signal: Option<Acts>,
    /// It went on as if nobody had asked it to stop; `null` when that is not known.
    pub ignored_the_stop: Option<bool>,
}

/// Threads with one name but for a number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LeftType {
    pub name: String,
    pub count: u32,
    pub oldest_ms: u64,
    pub newest_ms: u64,
}

/// One thread.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LeftThread {
    pub tid: u32,
    pub name: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub age_ms: u64,
    /// It runs, or waits for a CPU.
    pub is_running: bool,
    /// The kernel function in which it waits; `null` for one that runs, and where the kernel does not say.
    pub wait_channel: Option<String>,
    /// Innermost first, cut at 24; empty for one that runs, and where it could not be had.
    pub stack: Vec<Function>,
    /// The function of the program itself in which it is; `null` when that is not known.
    pub at: Option<String>,
    /// `null` when it was not seen what it did.
    pub since_signal: Option<Acts>,
    pub ignored_the_stop: Option<bool>,
}

/// A look at the threads of a process.
#[derive(Clone, Debug)]
pub(crate) struct Look<S> {
    pub process: ProcKey,
    pub comm: String,
    pub count: u32,
    pub census: Census<S>,
    /// Nanoseconds since boot.
    pub at: u64,
}

impl<S> Look<S> {
    /// It as it is until its stacks have names.
    pub(crate) fn without_stacks<T>(&self) -> Look<Option<T>> {
        let blocked = self.census.blocked.iter().map(|one| Blocked {
            tid: one.tid,
            name: one.name.clone(),
            started: one.started,
            is_running: one.is_running,
            wait_channel: one.wait_channel.clone(),
            stack: None,
        });
        let census = Census { types: self.census.types.clone(), blocked: blocked.collect() };
        Look { process: self.process, comm: self.comm.clone(), count: self.count, census, at: self.at }
    }

    /// The same with other stacks.
    pub(crate) fn map<T>(self, census: impl FnOnce(Census<S>) -> Census<T>) -> Look<T> {
        let Self { process, comm, count, at, .. } = self;
        Look { process, comm, count, census: census(self.census), at }
    }
}

/// What happened since a signal, where that was seen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Since<'a> {
    pub signalled: u64,
    pub doings: &'a Doings,
    /// No event was lost: what is not there did not happen.
    pub is_whole: bool,
}

impl Left {
    /// With named stacks; or, without, as far as it is known until there are names.
    pub(crate) fn new<S>(
        look: &Look<S>,
        since: Option<Since<'_>>,
        named: impl Fn(&S) -> Option<&Stack>,
    ) -> Self {
        let age = |started: u64| look.at.saturating_sub(started) / 1_000_000;
        let ignored = |acts: &Acts| {
            let since = since?;
            let ignored = acts.ignored_the_stop(since.signalled, look.at.max(acts.last));
            (ignored || since.is_whole).then_some(ignored)
        };
        let thread = |one: &Blocked<S>| {
            let stack = named(&one.stack);
            let headline = stack.and_then(Stack::headline).and_then(|[function, _]| function);
            let acts = since.map(|since| since.doings.by_thread.get(&one.tid).copied().unwrap_or_default());
            LeftThread {
                tid: one.tid,
                name: one.name.clone(),
                kind: thread_type(&one.name).to_owned(),
                age_ms: age(one.started),
                is_running: one.is_running,
                wait_channel: Some(one.wait_channel.clone()).filter(|name| !name.is_empty()),
                stack: stack
                    .map(|stack| stack.functions().into_iter().take(MAX_FUNCTIONS).collect())
                    .unwrap_or_default(),
                at: headline.map(|function| function.words()),
                since_signal: acts,
                ignored_the_stop: acts.and_then(|acts| ignored(&acts)),
            }
        };
        let kind = |kind: &census::ThreadType| LeftType {
            name: kind.name.clone(),
            count: kind.count,
            oldest_ms: age(kind.started[0]),
            newest_ms: age(kind.started[2]),
        };
        let all = since.map(|since| since.doings.all);
        Self {
            pid: look.process.tgid,
            comm: look.comm.clone(),
            count: look.count,
            types: look.census.types.iter().map(kind).collect(),
            threads: look.census.blocked.iter().map(thread).collect(),
            since_signal: all,
            ignored_the_stop: all.and_then(|acts| ignored(&acts)),
        }
    }

    /// The same with so many threads and functions of each.
    #[must_use]
    pub(crate) fn cut(mut self, threads: usize, functions: usize) -> Self {
        self.threads.truncate(threads);
        self.threads.iter_mut().for_each(|thread| thread.stack.truncate(functions));
        self
    }

    /// For people: a line for each type, and below it one for each place where threads of it are.
    #[must_use]
    pub(crate) fn lines(&self) -> Vec<String> {
        let threads = |many: u32| if many == 1 { "1 thread".to_owned() } else { format!("{many} threads") };
        let mut head = format!("pid {} ({}), {}", self.pid, self.comm, threads(self.count));
        if let (Some(true), Some(acts)) = (self.ignored_the_stop, &self.since_signal) {
            head += &format!(": ignored the stop, after the signal it {}", acts.words());
        } else if let Some(acts) = self.since_signal.filter(|acts| !acts.is_none()) {
            head += &format!(": after the signal it {}", acts.words());
        }
        let mut lines = vec![head];
        for kind in &self.types {
            let (newest, oldest) = (seconds(kind.newest_ms), seconds(kind.oldest_ms));
            let ages =
                if newest == oldest { format!("{oldest} old") } else { format!("{newest} to {oldest} old") };
            lines.push(format!("  {} x {}, {ages}", kind.count, kind.name));
            let mut places: BTreeMap<String, Vec<u32>> = BTreeMap::new();
            let own = self.threads.iter().filter(|thread| thread.kind == kind.name);
            for thread in own {
                places.entry(thread.words()).or_default().push(thread.tid);
            }
            let mut places: Vec<_> = places.into_iter().collect();
            places.sort_by_key(|(_, tids)| std::cmp::Reverse(tids.len()));
            for (place, tids) in &places {
                let who = match &tids[..] {
                    [tid] => format!("tid {tid}"),
                    [tid, ..] => format!("{} of them, such as tid {tid}", tids.len()),
                    [] => continue,
                };
                lines.push(format!("      {who}: {place}"));
            }
            let looked_at: usize = places.iter().map(|(_, tids)| tids.len()).sum();
            if looked_at > 0 && looked_at < kind.count as usize {
                lines.push(format!("      {} more were not looked at", kind.count as usize - looked_at));
            }
        }
        let told: u32 = self.types.iter().map(|kind| kind.count).sum();
        if told < self.count {
            lines.push(format!("  {} of other types, or ending", self.count - told));
        }
        lines
    }
}

impl LeftThread {
    /// Where it is, and what it did.
    fn words(&self) -> String {
        let mut words = match (&self.wait_channel, self.is_running) {
            (_, true) => "runs".to_owned(),
            (Some(name), _) => format!("waits in {name}"),
            (None, false) => "waits, the kernel does not say where".to_owned(),
        };
        let inner = self.stack.first().map(Function::words);
        match (&self.at, inner) {
            (Some(at), Some(inner)) if *at != inner => words += &format!(", {inner} below {at}"),
            (Some(at), _) => words += &format!(", {at}"),
            (None, Some(inner)) => words += &format!(", {inner}"),
            (None, None) if !self.is_running => words += ", its stack is unknown",
            (None, None) => {}
        }
        match (self.ignored_the_stop, self.since_signal.filter(|acts| !acts.is_none())) {
            (Some(true), Some(acts)) => words += &format!("; ignored the stop: {}", acts.words()),
            (_, Some(acts)) => words += &format!("; after the signal {}", acts.words()),
            _ => {}
        }
        words
    }
}

/// `0.25 s`, `3 s`, `5 min`, `2 h`, `4 d`: as exact as it matters.
fn seconds(ms: u64) -> String {
    match ms / 1000 {
        0..10 => format!("{:.1} s", ms as f64 / 1000.0),
        whole @ 10..120 => format!("{whole} s"),
        whole @ 120..7_200 => format!("{} min", whole / 60),
        whole @ 7_200..172_800 => format!("{} h", whole / 3_600),
        whole => format!("{} d", whole / 86_400),
    }
}

/// Which threads to look at: first those that have done something, then one of each type and place, where the places are
/// told apart by what enters the kernel, then another one of each.
#[must_use]
pub(crate) fn wanted(threads: &[ThreadRecord], doings: Option<&Doings>) -> Vec<u32> {
    let there: Vec<&ThreadRecord> = threads.iter().filter(|thread| thread.exit_state == 0).collect();
    let mut chosen: Vec<u32> = Vec::new();
    if let Some(doings) = doings {
        let mut actors: Vec<(&u32, &Acts)> = doings.by_thread.iter().collect();
        actors.sort_by_key(|(tid, acts)| (std::cmp::Reverse((acts.accepted, acts.last)), **tid));
        let is_there: HashSet<u32> = there.iter().map(|thread| thread.tid).collect();
        let actors = actors.into_iter().map(|(tid, _)| *tid).filter(|tid| is_there.contains(tid));
        chosen.extend(actors.take(MAX_LOOKED_AT / 4));
    }
    let mut groups: BTreeMap<(String, u64), Vec<u32>> = BTreeMap::new();
    for thread in &there {
        let name = text::terminated(&thread.comm);
        // A thread that waits elsewhere in the kernel, by another call, came from another instruction; and one that was
        // called from elsewhere has its stack pointer at another distance from a page, mostly.
        let place = thread.ip ^ (thread.sp & 0xfff) << 48;
        let group = groups.entry((thread_type(&name).to_owned(), place)).or_default();
        if group.len() < MAX_LOOKED_AT && !chosen.contains(&thread.tid) {
            group.push(thread.tid);
        }
    }
    // Of each type by itself, so that a type of many places leaves room to the others.
    let mut types: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
    for round in 0..MAX_LOOKED_AT {
        for ((kind, _), group) in &groups {
            if let Some(tid) = group.get(round) {
                types.entry(kind).or_default().push(*tid);
            }
        }
    }
    for round in 0..MAX_LOOKED_AT {
        for tids in types.values() {
            if let Some(tid) = tids.get(round)
                && chosen.len() < MAX_LOOKED_AT
            {
                chosen.push(*tid);
            }
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;
    use plumb_common::event::{CLONE_THREAD, Clone as CloneEvent, FD_CLOSED, FdChange, Header};

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn header(tid: u32, time: u64) -> Header {
        Header { tid, time, process: ProcKey::new(7, 1), ..Header::zeroed() }
    }

    fn fd(tid: u32, time: u64, change: u32, how: &str) -> Event {
        let how = syscalls::TABLE.iter().position(|call| call.name == how).unwrap() as u32;
        Event::Fd(FdChange { header: header(tid, time), change, how, ..FdChange::zeroed() })
    }

    fn clone(tid: u32, time: u64) -> Event {
        Event::Clone(CloneEvent { header: header(tid, time), flags: CLONE_THREAD, ..CloneEvent::zeroed() })
    }

    fn thread(tid: u32, name: &str, ip: u64) -> ThreadRecord {
        let mut record = ThreadRecord::zeroed();
        (record.tid, record.tgid, record.ip, record.start_boottime) = (tid, 7, ip, SECOND);
        record.comm[..name.len()].copy_from_slice(name.as_bytes());
        record
    }

    fn look(names: &[&str]) -> Look<Option<std::sync::Arc<Stack>>> {
        let blocked = names.iter().zip(1..).map(|(name, tid)| Blocked {
            tid,
            name: (*name).to_owned(),
            started: SECOND,
            is_running: false,
            wait_channel: "futex_do_wait".to_owned(),
            stack: None,
        });
        let types = vec![census::ThreadType {
            name: "io".to_owned(),
            count: names.len() as u32,
            started: [SECOND, SECOND, 2 * SECOND],
        }];
        Look {
            process: ProcKey::new(7, 1),
            comm: "app".to_owned(),
            count: names.len() as u32 + 1,
            census: Census { types, blocked: blocked.collect() },
            at: 20 * SECOND,
        }
    }

    #[test]
    fn only_what_begins_something_after_the_signal_counts() {
        let mut doings = Doings::default();
        for event in [
            fd(1, 9, FD_OPENED, "openat"),
            fd(1, 10, FD_OPENED, "openat"),
            fd(1, 11, FD_REPLACED, "dup2"),
            fd(1, 12, FD_CLOSED, "close"),
            fd(2, 13, FD_OPENED, "accept4"),
            clone(2, 14),
        ] {
            doings.take(&event, 10);
        }
        assert_eq!(doings.all, Acts { opened: 2, accepted: 1, cloned: 1, last: 14 });
        assert_eq!(doings.by_thread[&1], Acts { opened: 2, last: 11, ..Acts::default() });
        assert_eq!(doings.by_thread[&2].words(), "accepted 1, cloned 1");
    }

    #[test]
    fn who_takes_new_work_ignores_the_stop_and_who_writes_its_state_does_not() {
        let opened = |last| Acts { opened: 1, last, ..Acts::default() };
        assert!(!opened(12).ignored_the_stop(10, 20), "early: it may be for its end");
        assert!(opened(16).ignored_the_stop(10, 20));
        assert!(Acts { accepted: 1, last: 11, ..Acts::default() }.ignored_the_stop(10, 20));
        assert!(!Acts::default().ignored_the_stop(10, 20));
    }

    #[test]
    fn what_was_not_seen_is_unknown_and_not_denied() {
        let mut doings = Doings::default();
        let left = |doings: &Doings, is_whole| {
            let since = Since { signalled: 10 * SECOND, doings, is_whole };
            Left::new(&look(&["io-1", "io-2"]), Some(since), Option::as_deref)
        };
        assert_eq!(left(&doings, true).ignored_the_stop, Some(false));
        assert_eq!(left(&doings, false).ignored_the_stop, None);
        doings.take(&fd(1, 11 * SECOND, FD_OPENED, "accept"), 10 * SECOND);
        let known = left(&doings, false);
        assert_eq!((known.ignored_the_stop, known.threads[0].ignored_the_stop), (Some(true), Some(true)));
        assert_eq!(known.threads[1].ignored_the_stop, None);
        let unseen = Left::new(&look(&["io-1"]), None, Option::as_deref);
        assert_eq!((unseen.since_signal, unseen.ignored_the_stop), (None, None));
    }

    #[test]
    fn threads_in_one_place_are_one_line() {
        let mut doings = Doings::default();
        doings.take(&clone(3, 19 * SECOND), 10 * SECOND);
        let since = Since { signalled: 10 * SECOND, doings: &doings, is_whole: true };
        let left = Left::new(&look(&["io-1", "io-2", "io-3"]), Some(since), Option::as_deref);
        assert_eq!(
            left.lines(),
            [
                "pid 7 (app), 4 threads: ignored the stop, after the signal it cloned 1",
                "  3 x io, 18 s to 19 s old",
                "      2 of them, such as tid 1: waits in futex_do_wait, its stack is unknown",
                "      tid 3: waits in futex_do_wait, its stack is unknown; ignored the stop: cloned 1",
                "  1 of other types, or ending",
            ]
        );
        assert_eq!(left.clone().cut(1, 0).threads.len(), 1);
        let json = serde_json::to_string(&left).unwrap();
        assert_eq!(serde_json::from_str::<Left>(&json).unwrap(), left);
    }

    #[test]
    fn some_threads_of_each_type_and_place_are_looked_at_however_many_there_are() {
        let mut threads: Vec<_> = (1..50_000).map(|tid| thread(tid, "worker", 0x1000)).collect();
        threads.extend((50_000..50_040).map(|tid| thread(tid, "worker", u64::from(tid))));
        threads.push(thread(60_000, "main", 0x2000));
        threads.push(ThreadRecord { exit_state: 16, ..thread(60_001, "gone", 0x2000) });
        let mut doings = Doings::default();
        doings.take(&fd(777, 5, FD_OPENED, "accept"), 1);
        doings.take(&fd(60_001, 5, FD_OPENED, "accept"), 1);
        let chosen = wanted(&threads, Some(&doings));
        assert_eq!((chosen.len(), chosen[0]), (MAX_LOOKED_AT, 777));
        assert!(chosen.contains(&60_000) && !chosen.contains(&60_001), "{chosen:?}");
        assert!(chosen.iter().filter(|tid| (50_000..50_040).contains(*tid)).count() > 20, "{chosen:?}");
        let unique: HashSet<_> = chosen.iter().collect();
        assert_eq!(unique.len(), chosen.len());
        assert_eq!(wanted(&[thread(1, "a", 0)], None), [1]);
    }
}

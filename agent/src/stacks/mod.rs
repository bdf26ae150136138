//! The worker that makes named stacks of copied ones: unwinds, names, and hands on. It rests nine times as long as
//! it works, but not for more than a second: only large programs that it meets for the first time take it longer.
//! Equal stacks are one in memory.

mod matched;
mod survivors;
mod words;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use plumb_common::task::ProcKey;
use tokio_util::sync::CancellationToken;

pub(crate) use self::{
    matched::Matched,
    survivors::Survivors,
    words::{Function, called},
};
use crate::{
    census,
    decode::Sample,
    symbolise::{self, Counters, Frame, RawStack, Symboliser, is_in_runtime_file, origin_frame},
};

/// Samples on their way to the worker at most; at 16 KiB each.
const MAX_WAITING: usize = 512;
/// And of one process: a fast leak must not push out the stacks of others.
const MAX_WAITING_OF_ONE: usize = MAX_WAITING / 2;
/// Different stacks kept at a time: a process that makes them up as it goes must not fill the agent's memory.
const MAX_STACKS: usize = 4096;
/// Names that could not be had, since there was no worker or it got no time, are asked for again after this.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// After some work the worker rests so many times as long, and so long at most.
const REST: u32 = 9;
const LONGEST_REST: Duration = Duration::from_secs(1);

/// Which origin a stack belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Made {
    /// The new fd, or the id of the new thread.
    pub number: u32,
    /// When, nanoseconds since boot.
    pub time: u64,
    /// The thread that made it.
    pub by: u32,
}

/// The way to a call, innermost frame first.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Stack {
    pub frames: Vec<Frame>,
    /// The frame of the program itself that the call is put down to, and which of the functions there.
    pub origin: Option<(usize, usize)>,
    /// The outermost function is in it.
    pub complete: bool,
}

impl Stack {
    fn new(frames: Vec<Frame>, complete: bool) -> Self {
        // Without names it is the first frame outside of the C library.
        let outside = || frames.iter().position(|frame| !is_in_runtime_file(frame)).map(|at| (at, 0));
        Self { origin: origin_frame(&frames).or_else(outside), frames, complete }
    }
}

/// A stack and what it made.
#[derive(Clone, Debug)]
pub(crate) struct Named {
    pub process: ProcKey,
    pub made: Made,
    pub stack: Arc<Stack>,
}

/// What the worker is told.
#[derive(Debug)]
enum Work {
    /// Stacks of this process will come: remember its files, as they are now.
    Watch(ProcKey),
    Forget(ProcKey),
    Unwind(Vec<Sample>),
    Census(ProcKey, census::Copied),
    /// Whether it is to stop.
    Look,
}

/// What comes out of it.
#[derive(Debug)]
pub(crate) enum Done {
    Named(Vec<Named>),
    Census(ProcKey, Box<census::Named>),
}

/// What did not go well, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Losses {
    /// Samples that were not unwound: the worker did not keep up, or their events did not come.
    pub not_unwound: u64,
    /// Stacks not kept because there were too many different ones.
    pub too_many: u64,
    pub symboliser: Counters,
}

/// How many samples are on their way to the worker, in all and of each process.
#[derive(Debug, Default)]
struct Waiting {
    all: usize,
    of: HashMap<ProcKey, usize>,
}

impl Waiting {
    /// Whether there is room for one more.
    fn enter(&mut self, process: ProcKey) -> bool {
        let of_process = self.of.entry(process).or_default();
        let has_room = self.all < MAX_WAITING && *of_process < MAX_WAITING_OF_ONE;
        self.all += usize::from(has_room);
        *of_process += usize::from(has_room);
        if *of_process == 0 {
            self.of.remove(&process);
        }
        has_room
    }

    fn leave(&mut self, process: ProcKey) {
        self.all -= 1;
        if let Some(of_process) = self.of.get_mut(&process) {
            *of_process -= 1;
            if *of_process == 0 {
                self.of.remove(&process);
            }
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    not_unwound: AtomicU64,
    too_many: AtomicU64,
    symboliser: Mutex<Counters>,
}

/// The giving end.
#[derive(Clone, Debug)]
pub(crate) struct Queue {
    work: Sender<Work>,
    shared: Arc<Shared>,
}

/// The end where the work comes out. It outlives a worker that fails.
#[derive(Debug)]
pub(crate) struct Inbox {
    work: Receiver<Work>,
    shared: Arc<Shared>,
}

impl Inbox {
    /// These samples do not wait any more.
    fn done(&self, samples: &[Sample]) {
        let mut waiting = self.shared.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        samples.iter().for_each(|sample| waiting.leave(sample.head.header.process));
    }
}

impl Queue {
    pub(crate) fn new() -> (Self, Inbox) {
        let (sender, work) = channel();
        let shared = Arc::<Shared>::default();
        (Self { work: sender, shared: Arc::clone(&shared) }, Inbox { work, shared })
    }

    /// Stacks of this process will come. Also after an exec, which gave it other files.
    pub(crate) fn watch(&self, process: ProcKey) {
        let _ = self.work.send(Work::Watch(process));
    }

    pub(crate) fn forget(&self, process: ProcKey) {
        let _ = self.work.send(Work::Forget(process));
    }

    /// Those for which there is no room are counted.
    pub(crate) fn unwind(&self, mut samples: Vec<Sample>) {
        let all = samples.len();
        let mut waiting = self.shared.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        samples.retain(|sample| waiting.enter(sample.head.header.process));
        drop(waiting);
        self.shared.not_unwound.fetch_add((all - samples.len()) as u64, Ordering::Relaxed);
        if !samples.is_empty() {
            let _ = self.work.send(Work::Unwind(samples));
        }
    }

    /// So many were given up before they came here.
    pub(crate) fn lost(&self, count: u64) {
        self.shared.not_unwound.fetch_add(count, Ordering::Relaxed);
    }

    /// Wakes the worker, so that it sees that it is to stop.
    pub(crate) fn wake(&self) {
        let _ = self.work.send(Work::Look);
    }

    /// To name the stacks of threads.
    pub(crate) fn census(&self, process: ProcKey, threads: census::Copied) {
        let _ = self.work.send(Work::Census(process, threads));
    }

    #[must_use]
    pub(crate) fn losses(&self) -> Losses {
        Losses {
            not_unwound: self.shared.not_unwound.load(Ordering::Relaxed),
            too_many: self.shared.too_many.load(Ordering::Relaxed),
            symboliser: *self.shared.symboliser.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }
}

/// Runs until it is stopped or nobody takes what it makes.
pub(crate) fn run(inbox: &Inbox, give: impl Fn(Done) -> bool, stop: &CancellationToken) {
    let mut names = Names::default();
    while let Ok(first) = inbox.work.recv()
        && !stop.is_cancelled()
    {
        let began = Instant::now();
        // All that has come meanwhile at once: together it costs much less.
        let mut samples = Vec::new();
        for work in std::iter::once(first).chain(inbox.work.try_iter()) {
            let done = match work {
                Work::Unwind(more) => {
                    samples.extend(more);
                    continue;
                }
                Work::Watch(process) | Work::Forget(process) => {
                    // What came before belongs to the files of then.
                    inbox.done(&samples);
                    let before = names.of(std::mem::take(&mut samples));
                    match work {
                        Work::Watch(_) => names.watch(process),
                        _ => names.symboliser.forget(process),
                    }
                    Done::Named(before)
                }
                Work::Look => continue,
                Work::Census(process, threads) => {
                    Done::Census(process, Box::new(names.census(process, threads)))
                }
            };
            if !give(done) {
                return;
            }
        }
        inbox.done(&samples);
        if !samples.is_empty() && !give(Done::Named(names.of(samples))) {
            return;
        }
        inbox.shared.too_many.store(names.too_many, Ordering::Relaxed);
        *inbox.shared.symboliser.lock().unwrap_or_else(PoisonError::into_inner) = names.symboliser.counters();
        thread::sleep((began.elapsed() * REST).min(LONGEST_REST));
    }
}

/// Each stack that is in use somewhere, with its names.
pub(crate) struct Names {
    symboliser: Symboliser,
    known: HashMap<symbolise::Stack, Known>,
    /// In use, and known under other names by now.
    renamed: Vec<Weak<Stack>>,
    /// Names that could not be had are not asked for again before.
    not_before: Instant,
    /// Not kept.
    too_many: u64,
}

struct Known {
    stack: Weak<Stack>,
    names: Lasting,
}

/// How long names hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lasting {
    ForEver,
    /// Code in memory is made and freed: until the next look.
    Now,
    /// Not all could be had.
    UntilAsked,
}

impl Default for Names {
    fn default() -> Self {
        Self::with(Symboliser::default())
    }
}

impl Names {
    fn with(symboliser: Symboliser) -> Self {
        let not_before = Instant::now();
        Self { symboliser, known: HashMap::new(), renamed: Vec::new(), not_before, too_many: 0 }
    }

    /// Remembers the files of a process, as they are now.
    pub(crate) fn watch(&mut self, process: ProcKey) {
        self.symboliser.attach(process);
    }

    pub(crate) fn symboliser(&mut self) -> &mut Symboliser {
        &mut self.symboliser
    }

    /// Unwinds and names.
    pub(crate) fn of(&mut self, samples: Vec<Sample>) -> Vec<Named> {
        let mut by_process: HashMap<ProcKey, (Vec<Made>, Vec<RawStack>)> = HashMap::new();
        for Sample { head, bytes } in samples {
            let (made, raw) = by_process.entry(head.header.process).or_default();
            made.push(Made { number: head.made, time: head.header.time, by: head.header.tid });
            raw.push(RawStack { ip: head.ip, sp: head.sp, bp: head.bp, stack: bytes });
        }
        let mut named = Vec::new();
        for (process, (made, raw)) in by_process {
            for (made, walked) in made.into_iter().zip(self.symboliser.unwind(process, &raw)) {
                match self.name(walked) {
                    Some(stack) => named.push(Named { process, made, stack }),
                    None => self.too_many += 1,
                }
            }
        }
        named
    }

    /// Names the stacks of threads.
    pub(crate) fn census(&mut self, process: ProcKey, threads: census::Copied) -> census::Named {
        threads.map(|stacks| self.each(process, stacks))
    }

    /// Unwinds and names what there is.
    fn each(&mut self, process: ProcKey, raw: Vec<Option<RawStack>>) -> Vec<Option<Arc<Stack>>> {
        let there: Vec<RawStack> = raw.iter().flatten().cloned().collect();
        let mut walked = self.symboliser.unwind(process, &there).into_iter();
        raw.into_iter().map(|raw| raw.and_then(|_| self.name(walked.next()?))).collect()
    }

    /// The one copy of a stack in words; `None` when there are too many.
    fn name(&mut self, walked: symbolise::Stack) -> Option<Arc<Stack>> {
        let known = self.known.get(&walked).and_then(|known| Some((known.stack.upgrade()?, known.names)));
        if let Some((stack, names)) = &known
            && (*names == Lasting::ForEver
                || (*names == Lasting::UntilAsked && Instant::now() < self.not_before))
        {
            return Some(Arc::clone(stack));
        }
        let has_room = self.has_room();
        if known.is_none() && !has_room {
            return None;
        }
        let (frames, is_answered) = self.symboliser.name_stack(&walked);
        let names = match (is_answered, walked.is_in_memory()) {
            (false, _) => Lasting::UntilAsked,
            (true, true) => Lasting::Now,
            (true, false) => Lasting::ForEver,
        };
        if !is_answered {
            self.not_before = Instant::now() + ASK_AGAIN;
        }
        let mut stack = Arc::new(Stack::new(frames, walked.complete));
        if let Some((before, _)) = known {
            // Under the same names, or better ones, it is the same.
            if before == stack || !is_answered || !has_room {
                stack = before;
            } else {
                self.renamed.push(Arc::downgrade(&before));
            }
        }
        self.known.insert(walked, Known { stack: Arc::downgrade(&stack), names });
        Some(stack)
    }

    fn has_room(&mut self) -> bool {
        if self.known.len() + self.renamed.len() >= MAX_STACKS {
            self.known.retain(|_, known| known.stack.strong_count() > 0);
            self.renamed.retain(|stack| stack.strong_count() > 0);
        }
        self.known.len() + self.renamed.len() < MAX_STACKS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_leaves_room_to_others_until_it_is_served() {
        let (fast, slow) = (ProcKey::new(1, 1), ProcKey::new(2, 1));
        let mut waiting = Waiting::default();
        assert_eq!((0..1_000).filter(|_| waiting.enter(fast)).count(), MAX_WAITING_OF_ONE);
        assert!(waiting.enter(slow));
        waiting.leave(fast);
        assert!(waiting.enter(fast) && !waiting.enter(fast));
        (0..MAX_WAITING_OF_ONE).for_each(|_| waiting.leave(fast));
        waiting.leave(slow);
        assert_eq!((waiting.all, waiting.of.len()), (0, 0));
    }

    /// A stack of this process, without a worker to name it.
    fn walked(symboliser: &mut Symboliser, ip: u64) -> symbolise::Stack {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        let fields = stat.rsplit_once(')').unwrap().1;
        let ticks: u64 = fields.split_ascii_whitespace().nth(19).unwrap().parse().unwrap();
        let process = ProcKey::new(std::process::id(), ticks * 10_000_000);
        symboliser.unwind(process, &[RawStack { ip, ..RawStack::default() }]).remove(0)
    }

    fn nobody() -> Symboliser {
        Symboliser::with("/nonexistent", "/nonexistent")
    }

    #[test]
    fn names_that_could_not_be_had_are_asked_for_again() {
        let mut names = Names::with(nobody());
        let here = walked as *const () as u64;
        let walked = walked(&mut names.symboliser, here);
        assert!(!walked.is_in_memory());
        let begun = Instant::now();
        let first = names.name(walked.clone()).unwrap();
        let state = |names: &Names| names.known[&walked].names;
        assert_eq!((first.frames[0].lines.len(), state(&names)), (0, Lasting::UntilAsked));
        assert!(names.symboliser.counters().not_started > 0 && names.not_before > begun);
        names.not_before = Instant::now() + Duration::from_secs(3600);
        assert!(Arc::ptr_eq(&first, &names.name(walked.clone()).unwrap()));
        assert_eq!(state(&names), Lasting::UntilAsked);
        // Who knows nothing of the file answers that it has no names.
        (names.symboliser, names.not_before) = (nobody(), Instant::now());
        let again = names.name(walked.clone()).unwrap();
        assert_eq!((state(&names), again.frames[0].module.clone()), (Lasting::ForEver, None));
        assert_eq!((Arc::ptr_eq(&first, &again), names.renamed.len()), (false, 1));
        drop(first);
        assert!(names.has_room());
    }

    #[test]
    fn code_in_memory_may_have_another_name_another_time() {
        let mut names = Names::with(nobody());
        let walked = walked(&mut names.symboliser, 8);
        assert!(walked.is_in_memory());
        let first = names.name(walked.clone()).unwrap();
        assert_eq!(names.known[&walked].names, Lasting::Now);
        assert!(Arc::ptr_eq(&first, &names.name(walked).unwrap()), "it has the same one");
    }
}

//! From the registers and the stack of a thread to functions and lines.
//!
//! Whatever is read of a foreign file is read by a worker without rights (`child`), which a bad file may slow down
//! or kill; `worker` starts and ends it, `process`, `maps` and `modules` know the files, `images` what the kernel told
//! about processes that may be gone (`told`), `origin` picks the frame that matters. Everything here blocks.

mod books;
pub(crate) mod child;
mod images;
mod maps;
mod modules;
mod names;
mod origin;
mod process;
mod protocol;
mod told;
mod worker;

use std::{
    ffi::OsString,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use plumb_common::task::ProcKey;
use serde::{Deserialize, Serialize};

pub(crate) use self::origin::{is_go_standard, is_runtime_file};
use self::{
    books::{Asked, Books, Process},
    modules::Trust,
    names::Names,
    protocol::{Content, FromWorker, MAX_FRAMES, RawLine, ToWorker, Walk},
    worker::{Failed, Worker},
};
pub use self::{
    images::Images,
    origin::{is_in_runtime_file, origin_frame},
};

/// Time for the stacks of one call, and for the names in one file: with debug information, then without.
const UNWIND: Duration = Duration::from_millis(1000);
const NAME_WITH_DEBUG: Duration = Duration::from_millis(700);
const NAME: Duration = Duration::from_millis(300);
/// Bytes of a stack that are used at most.
const MAX_STACK: usize = 64 << 10;
/// Bytes of stacks in one request.
const BATCH: usize = 512 << 10;
/// Processes remembered at most.
const MAX_PROCESSES: usize = 1024;
/// Addresses in memory that are named at once.
const MAX_ADDRESSES: usize = 256;
/// Files of one process that may do harm before its stacks are no longer looked at.
const MAX_HARM: u32 = 4;

/// Registers and stack of one thread at one syscall.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RawStack {
    /// Just behind the syscall instruction.
    pub ip: u64,
    pub sp: u64,
    pub bp: u64,
    /// From `sp` upwards; may be cut.
    #[serde(with = "serde_bytes")]
    pub stack: Vec<u8>,
}

/// How a frame was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum How {
    /// The innermost one.
    Registers,
    /// By call frame information.
    Tables,
    /// By the tables of Go.
    Go,
    /// The caller of a syscall stub that no table covers.
    Leaf,
    /// By the end of the function that was called, which is compiled code.
    Epilogue,
    /// By the frame pointer, which may skip callers.
    FramePointer,
}

/// Where an instruction is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Place {
    File {
        module: u32,
        offset: u64,
    },
    /// In memory without a file, or in no mapping.
    Memory {
        process: ProcKey,
        address: u64,
    },
}

/// Where the calls came from, innermost first. Equal stacks of different processes are equal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Stack {
    places: Arc<[(Place, How)]>,
    /// The outermost function is in it.
    pub complete: bool,
}

impl Stack {
    /// Whether some of it is in memory without a file: what is there may have another name another time.
    pub(crate) fn is_in_memory(&self) -> bool {
        self.places.iter().any(|(place, _)| matches!(place, Place::Memory { .. }))
    }
}

/// One frame of a stack, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub how: How,
    /// The path of the file, as the process has it; `None` for memory without a file.
    pub module: Option<Arc<str>>,
    /// In hexadecimal digits.
    pub build_id: Option<Arc<str>>,
    /// In the file, or the address in memory.
    pub offset: u64,
    /// Innermost first: what was inlined, then the function itself. Empty if it has no name.
    pub lines: Arc<[Line]>,
}

/// A function, and a place in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// As its programmer would write it; empty if it is not known.
    pub function: String,
    pub file: Option<String>,
    pub line: Option<u32>,
    /// Into the function that follows.
    pub inlined: bool,
}

/// What did not go well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests that took too long.
    pub timeouts: u64,
    /// Requests that killed the worker.
    pub crashes: u64,
    /// Questions that were not asked, because the file or the process has done harm before or cannot be read; and names
    /// for which there was no room.
    pub refused: u64,
    /// Workers replaced because they held too much.
    pub recycled: u64,
    /// Workers that did not start.
    pub not_started: u64,
}

/// Unwinds and names stacks.
pub struct Symboliser {
    worker: Worker,
    books: Books,
    names: Names,
    counters: Counters,
}

impl Symboliser {
    /// With this program's own binary as the worker, also after an upgrade has replaced it on disk.
    #[must_use]
    pub fn new() -> Self {
        Self::with("/proc/self/exe", "/usr/lib/debug")
    }

    /// With another plumb binary, and another folder of debug files.
    #[must_use]
    pub fn with(program: impl Into<OsString>, debug_files: impl Into<PathBuf>) -> Self {
        Self {
            worker: Worker::new(program),
            books: Books::new(debug_files.into()),
            names: Names::default(),
            counters: Counters::default(),
        }
    }

    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Remembers the files of a process, so that its stacks have names after it has exited. To be called again
    /// after an exec.
    pub fn attach(&mut self, process: ProcKey) {
        self.books.look(process);
    }

    /// Nothing more will be asked about this process: files that only it uses are closed.
    pub fn forget(&mut self, process: ProcKey) {
        self.names.forget(process);
        if self.books.processes.remove(&process).is_some() {
            let mappings = self.books.processes.values().flat_map(|known| known.maps.mappings());
            let used = mappings.filter_map(|mapping| match mapping.content {
                Content::File(module) => Some(module),
                Content::Anonymous | Content::Sealed => None,
            });
            self.books.table.close_others(&used.collect());
        }
    }

    /// Walks stacks, which were taken of one process.
    pub fn unwind(&mut self, process: ProcKey, stacks: &[RawStack]) -> Vec<Stack> {
        let until = Instant::now() + UNWIND;
        if !self.books.processes.contains_key(&process) {
            self.books.look(process);
        }
        let before = if stacks.is_empty() { None } else { self.books.refresh(process) };
        let mut walks = self.walk(process, &stacks.iter().collect::<Vec<_>>(), until);
        if walks.iter().any(|walk| walk.lost) && self.books.look_again(process) {
            for (index, walk) in self.walk_lost(process, stacks, &walks, until) {
                walks[index] = walk;
            }
        }
        let mut found: Vec<_> = walks.iter().map(|walk| self.books.stack(process, walk)).collect();
        // What is gone by now was there when the stacks were taken, maybe.
        if let Some(before) = before.filter(|_| walks.iter().any(|walk| walk.lost)) {
            let now = self.books.exchange(process, before);
            for (index, walk) in self.walk_lost(process, stacks, &walks, until) {
                if !walk.lost {
                    found[index] = self.books.stack(process, &walk);
                }
            }
            if let Some(now) = now {
                self.books.exchange(process, now);
            }
        }
        self.books.keep_perf_map(process, &found);
        let mut wanted: Vec<u64> = Vec::new();
        for (place, _) in found.iter().flat_map(|stack| &*stack.places) {
            if let Place::Memory { address, .. } = place
                && wanted.len() < MAX_ADDRESSES
                && !wanted.contains(address)
            {
                wanted.push(*address);
            }
        }
        self.names.begin(process, told::is_told(process), wanted);
        found
    }

    /// Walks those again that came to an address that is in no mapping.
    fn walk_lost(
        &mut self,
        process: ProcKey,
        stacks: &[RawStack],
        walks: &[Walk],
        until: Instant,
    ) -> Vec<(usize, Walk)> {
        let lost: Vec<_> = (0..walks.len()).filter(|index| walks[*index].lost).collect();
        let again: Vec<_> = lost.iter().map(|index| &stacks[*index]).collect();
        lost.into_iter().zip(self.walk(process, &again, until)).collect()
    }

    fn walk(&mut self, process: ProcKey, stacks: &[&RawStack], until: Instant) -> Vec<Walk> {
        let mut walks = Vec::with_capacity(stacks.len());
        for batch in stacks.chunks(BATCH / MAX_STACK) {
            let found = self.walk_batch(process, batch, until);
            let bare = |raw: &&RawStack| Walk {
                frames: vec![(raw.ip.wrapping_sub(1), How::Registers)],
                ..Walk::default()
            };
            match found.filter(|found| found.len() == batch.len()) {
                Some(found) => walks.extend(found),
                None => walks.extend(batch.iter().map(bare)),
            }
        }
        walks
    }

    fn walk_batch(&mut self, process: ProcKey, batch: &[&RawStack], until: Instant) -> Option<Vec<Walk>> {
        let stacks: Vec<_> = batch
            .iter()
            .map(|raw| RawStack { stack: raw.stack[..raw.stack.len().min(MAX_STACK)].to_vec(), ..**raw })
            .collect();
        let mut request = ToWorker::Unwind { mappings: Vec::new(), stacks };
        loop {
            let known = self.books.processes.get_mut(&process)?;
            if known.harm >= MAX_HARM {
                self.counters.refused += 1;
                return None;
            }
            if let ToWorker::Unwind { mappings, .. } = &mut request {
                *mappings = known.maps.mappings().to_vec();
                for mapping in mappings {
                    mapping.content = self.books.table.content(mapping.content);
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            let asked = Asked { books: &mut self.books, process: Some(process), path: None };
            match ask(&mut self.worker, &request, None, left, asked, &mut self.counters) {
                Ok(FromWorker::Walked(mut walks)) => {
                    walks.iter_mut().for_each(|walk| walk.frames.truncate(MAX_FRAMES));
                    return Some(walks);
                }
                Err(Failed::Stale) if !left.is_zero() => {}
                Err(Failed::Died(Some(module)) | Failed::Late(Some(module))) => {
                    self.books.table.blame(module, Trust::Sealed);
                    self.books.processes.get_mut(&process)?.harm += 1;
                }
                _ => return None,
            }
        }
    }

    /// The frames of a stack in words; names are remembered.
    pub fn symbolise(&mut self, stack: &Stack) -> Vec<Frame> {
        self.name_stack(stack).0
    }

    /// As `symbolise`, and whether all was answered: if not, there may be more names another time.
    pub(crate) fn name_stack(&mut self, stack: &Stack) -> (Vec<Frame>, bool) {
        let mut wanted: Vec<(u32, Vec<u64>)> = Vec::new();
        let mut in_memory: Vec<(ProcKey, Vec<u64>)> = Vec::new();
        let mut is_answered = true;
        for (place, _) in stack.places.iter().filter(|(place, _)| self.names.get(place).is_none()) {
            match *place {
                Place::File { module, offset } => collect(&mut wanted, module, offset),
                Place::Memory { process, address } => collect(&mut in_memory, process, address),
            }
        }
        for (module, offsets) in wanted {
            let places = self.name(module, &offsets);
            is_answered &= places.is_some();
            for (offset, lines) in offsets.into_iter().zip(places.unwrap_or_default()) {
                is_answered &= self.keep(Place::File { module, offset }, lines);
            }
        }
        for (process, mut addresses) in in_memory {
            // The map is read once for all stacks of a time, if they are not too many.
            for address in self.names.wanted(process) {
                if addresses.len() < MAX_ADDRESSES && !addresses.contains(&address) {
                    addresses.push(address);
                }
            }
            let places = self.name_in_memory(process, &addresses);
            is_answered &= places.is_some();
            for (address, lines) in addresses.into_iter().zip(places.unwrap_or_default()) {
                is_answered &= self.keep(Place::Memory { process, address }, lines);
            }
        }
        (stack.places.iter().map(|(place, how)| self.frame(place, *how)).collect(), is_answered)
    }

    /// False if there is no room.
    fn keep(&mut self, place: Place, lines: Vec<RawLine>) -> bool {
        let has_room = self.names.keep(place, lines);
        self.counters.refused += u64::from(!has_room);
        has_room
    }

    fn frame(&self, place: &Place, how: How) -> Frame {
        let lines = self.names.get(place).unwrap_or_default();
        match *place {
            Place::Memory { address, .. } => {
                Frame { how, module: None, build_id: None, offset: address, lines }
            }
            Place::File { module, offset } => {
                let known = self.books.table.get(module);
                let path = known.map(|module| Arc::clone(&module.path));
                let build_id = known.and_then(|module| module.build_id.clone());
                Frame { how, module: path, build_id, offset, lines }
            }
        }
    }

    /// Names places in a file; `None` if that may work another time.
    fn name(&mut self, module: u32, offsets: &[u64]) -> Option<Vec<Vec<RawLine>>> {
        let mut stale = false;
        loop {
            // What is forgotten is not read any more.
            let Some(known) = self.books.table.get(module) else { return Some(Vec::new()) };
            let (debug, time, less) = match known.trust {
                Trust::Full => (true, NAME_WITH_DEBUG, Trust::NoDebug),
                Trust::NoDebug => (false, NAME, Trust::Sealed),
                Trust::Sealed => {
                    self.counters.refused += 1;
                    return Some(vec![Vec::new(); offsets.len()]);
                }
            };
            let path = Some(Arc::clone(&known.path));
            let request = ToWorker::Name { module, debug, offsets: offsets.to_vec() };
            let asked = Asked { books: &mut self.books, process: None, path };
            match ask(&mut self.worker, &request, None, time, asked, &mut self.counters) {
                Ok(FromWorker::Named { build_id, places }) if places.len() == offsets.len() => {
                    if let Some(known) = self.books.table.get_mut(module).filter(|_| !build_id.is_empty()) {
                        let digits = build_id.iter().take(64).map(|byte| format!("{byte:02x}"));
                        known.build_id = Some(digits.collect::<String>().into());
                    }
                    return Some(places);
                }
                Err(Failed::Stale) if !stale => stale = true,
                // Nothing else was asked for, so whatever happened is this file's fault.
                Err(Failed::Died(_) | Failed::Late(_)) => self.books.table.blame(module, less),
                _ => return None,
            }
        }
    }

    /// Names places in memory; `None` if that may work another time.
    fn name_in_memory(&mut self, process: ProcKey, addresses: &[u64]) -> Option<Vec<Vec<RawLine>>> {
        let known = self.books.processes.get_mut(&process).filter(|known| known.harm < MAX_HARM);
        let Some(map) = known.and_then(|known| known.perf_map(process)) else {
            return Some(vec![Vec::new(); addresses.len()]);
        };
        let request = ToWorker::PerfMap { addresses: addresses.to_vec() };
        let asked = Asked { books: &mut self.books, process: Some(process), path: None };
        match ask(&mut self.worker, &request, Some(&map), NAME, asked, &mut self.counters) {
            Ok(FromWorker::Named { places, .. }) if places.len() == addresses.len() => Some(places),
            Err(Failed::Died(_) | Failed::Late(_)) => {
                self.books.processes.get_mut(&process)?.harm += 1;
                None
            }
            _ => None,
        }
    }
}

impl Default for Symboliser {
    fn default() -> Self {
        Self::new()
    }
}

fn ask(
    worker: &mut Worker,
    request: &ToWorker,
    file: Option<&OwnedFd>,
    time: Duration,
    mut asked: Asked<'_>,
    counters: &mut Counters,
) -> Result<FromWorker, Failed> {
    worker.ask(request, file, time, &mut asked, counters)
}

fn collect<K: PartialEq>(groups: &mut Vec<(K, Vec<u64>)>, key: K, value: u64) {
    match groups.iter_mut().find(|(other, _)| *other == key) {
        Some((_, values)) if values.contains(&value) => {}
        Some((_, values)) => values.push(value),
        None => groups.push((key, vec![value])),
    }
}

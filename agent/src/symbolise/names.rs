//! Names of places, bounded in bytes: what made-up debug information gives to many places is long.

use std::{
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use foldhash::HashMap;
use plumb_common::task::ProcKey;

use super::{Line, Place, protocol::RawLine};
use crate::text;

/// Places in files whose names are remembered, and bytes of these names: between half of this and all of it.
const MAX_PLACES: usize = 64 << 10;
const MAX_REMEMBERED: usize = 16 << 20;
/// Bytes of all names, those among them that nobody but stacks holds any more. What would be more has no name.
const MAX_BYTES: usize = 32 << 20;
/// Functions kept of one place: the innermost ones, and the one that is there.
const MAX_LINES: usize = 16;
/// How long code of an image that has no name is not looked for again.
const NAMELESS: Duration = Duration::from_secs(1);
/// While there is no room it is looked for after so many places.
const LOOK_EVERY: u32 = 1024;

/// In two halves: when the younger is full, the older is forgotten.
#[derive(Default)]
pub(super) struct Names {
    young: Half,
    old: Half,
    /// Of code in memory, which may be another's soon: as long as the stacks of one time are named.
    memory: HashMap<ProcKey, Memory>,
    memory_bytes: usize,
    /// Forgotten here, and held by stacks.
    held: Vec<(Weak<[Line]>, usize)>,
    held_bytes: usize,
    /// Places that are refused before room is looked for again.
    skip: u32,
}

#[derive(Default)]
struct Half {
    places: HashMap<Place, Arc<[Line]>>,
    bytes: usize,
}

struct Memory {
    named: HashMap<u64, Arc<[Line]>>,
    /// Addresses of stacks that may be named next.
    wanted: Vec<u64>,
    /// When what had no name was last forgotten.
    begun: Instant,
}

impl Default for Memory {
    fn default() -> Self {
        Self { named: HashMap::default(), wanted: Vec::new(), begun: Instant::now() }
    }
}

impl Names {
    /// `None` if it has not been named; without lines it has no name.
    pub(super) fn get(&self, place: &Place) -> Option<Arc<[Line]>> {
        match place {
            Place::Memory { process, address } => self.memory.get(process)?.named.get(address).cloned(),
            Place::File { .. } => {
                self.young.places.get(place).or_else(|| self.old.places.get(place)).cloned()
            }
        }
    }

    /// False if there is no room: then it is asked for again.
    pub(super) fn keep(&mut self, place: Place, lines: Vec<RawLine>) -> bool {
        let lines: Arc<[Line]> = kept(lines).collect();
        let bytes = size(&lines);
        if !self.has_room(bytes) {
            return false;
        }
        match place {
            Place::Memory { process, address } => {
                self.memory_bytes += bytes;
                let before = self.memory.entry(process).or_default().named.insert(address, lines);
                self.memory_bytes -= before.as_deref().map_or(0, size);
            }
            Place::File { .. } => {
                let is_full = self.young.bytes + bytes > MAX_REMEMBERED / 2;
                if is_full || self.young.places.len() >= MAX_PLACES / 2 {
                    let old = std::mem::replace(&mut self.old, std::mem::take(&mut self.young));
                    self.let_go(old.places.into_values());
                }
                self.young.bytes += bytes;
                let before = self.young.places.insert(place, lines);
                self.young.bytes -= before.as_deref().map_or(0, size);
            }
        }
        true
    }

    /// From now on stacks are named that were taken at another time. Those of an image are named one by one: its names
    /// stay, and what has none is looked for again after a while.
    pub(super) fn begin(&mut self, process: ProcKey, is_image: bool, wanted: Vec<u64>) {
        match self.memory.get_mut(&process).filter(|_| is_image && self.memory_bytes < MAX_REMEMBERED / 2) {
            Some(memory) => {
                if memory.begun.elapsed() >= NAMELESS {
                    let (before, nameless) = (memory.named.len(), size(&[]));
                    memory.named.retain(|_, lines| !lines.is_empty());
                    self.memory_bytes -= (before - memory.named.len()) * nameless;
                    memory.begun = Instant::now();
                }
                memory.wanted = wanted;
            }
            None => {
                self.forget(process);
                if !wanted.is_empty() {
                    self.memory.insert(process, Memory { wanted, ..Memory::default() });
                }
            }
        }
    }

    /// Addresses that have no name yet and will want one.
    pub(super) fn wanted(&self, process: ProcKey) -> impl Iterator<Item = u64> {
        let memory = self.memory.get(&process);
        let is_open = |memory: &&Memory, address: &u64| !memory.named.contains_key(address);
        memory
            .into_iter()
            .flat_map(move |memory| memory.wanted.iter().copied().filter(move |at| is_open(&memory, at)))
    }

    pub(super) fn forget(&mut self, process: ProcKey) {
        if let Some(memory) = self.memory.remove(&process) {
            self.memory_bytes -= memory.named.values().map(|lines| size(lines)).sum::<usize>();
            self.let_go(memory.named.into_values());
        }
    }

    fn let_go(&mut self, names: impl Iterator<Item = Arc<[Line]>>) {
        // What has no name is one and the same, and takes nothing.
        for lines in names.filter(|lines| !lines.is_empty() && Arc::strong_count(lines) > 1) {
            self.held_bytes += size(&lines);
            self.held.push((Arc::downgrade(&lines), size(&lines)));
        }
    }

    /// Bytes of all names, and a few of some that nobody holds any more.
    fn bytes(&self) -> usize {
        self.young.bytes + self.old.bytes + self.memory_bytes + self.held_bytes
    }

    fn has_room(&mut self, bytes: usize) -> bool {
        if self.bytes() + bytes <= MAX_BYTES {
            return true;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        self.held.retain(|(lines, _)| lines.strong_count() > 0);
        self.held_bytes = self.held.iter().map(|(_, bytes)| bytes).sum();
        let has_room = self.bytes() + bytes <= MAX_BYTES;
        self.skip = if has_room { 0 } else { LOOK_EVERY };
        has_room
    }
}

fn kept(lines: Vec<RawLine>) -> impl Iterator<Item = Line> {
    let last = lines.len().saturating_sub(1);
    let is_kept = move |index: usize| index < MAX_LINES - 1 || index == last;
    lines.into_iter().enumerate().filter(move |(index, _)| is_kept(*index)).map(|(_, line)| Line {
        function: text::printable(&line.function),
        file: (!line.file.is_empty()).then(|| text::printable(&line.file)),
        line: (line.line != 0).then_some(line.line),
        inlined: line.inlined,
    })
}

/// What the names of one place take.
fn size(lines: &[Line]) -> usize {
    let texts = |line: &Line| line.function.capacity() + line.file.as_ref().map_or(0, String::capacity);
    // The place, in a table that is half full, and the counts of those who hold them.
    2 * size_of::<(Place, Arc<[Line]>)>() + 16 + size_of_val(lines) + lines.iter().map(texts).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROCESS: ProcKey = ProcKey::new(7, 1);

    fn file(offset: u64) -> Place {
        Place::File { module: 1, offset }
    }

    /// As long as made-up debug information makes them.
    fn long() -> Vec<RawLine> {
        let line = RawLine { function: vec![b'f'; 4096], file: vec![b'/'; 4096], line: 1, inlined: true };
        vec![line; 32]
    }

    #[test]
    fn long_names_of_many_places_stay_within_their_bytes_and_the_newest_are_there() {
        let mut names = Names::default();
        for offset in 0..10_000 {
            assert!(names.keep(file(offset), long()));
            assert!(names.bytes() <= MAX_REMEMBERED && names.held.is_empty());
        }
        assert!(names.get(&file(0)).is_none());
        assert_eq!(names.get(&file(9_999)).map(|lines| lines.len()), Some(MAX_LINES));
    }

    #[test]
    fn what_stacks_hold_counts_until_they_are_gone() {
        let mut names = Names::default();
        let mut stacks = Vec::new();
        for offset in 0..10_000 {
            let is_kept = names.keep(file(offset), long());
            let lines = names.get(&file(offset));
            assert_eq!(lines.is_some(), is_kept, "it is asked for again");
            stacks.push(lines);
            assert!(names.bytes() <= MAX_BYTES);
        }
        let held: usize = stacks.iter().flatten().map(|lines| size(lines)).sum();
        assert!(held > MAX_BYTES / 2 && held <= MAX_BYTES, "{held}");
        assert!(stacks[9_999].is_none());
        drop(stacks);
        assert!((10_000..10_000 + 2 * u64::from(LOOK_EVERY)).any(|offset| names.keep(file(offset), long())));
    }

    #[test]
    fn of_many_functions_at_one_place_the_innermost_and_the_last_are_kept() {
        let mut names = Names::default();
        let line = |at: u32| RawLine { line: at, ..RawLine::default() };
        names.keep(file(0), (1..=32).map(line).collect());
        let kept: Vec<_> = names.get(&file(0)).unwrap().iter().filter_map(|line| line.line).collect();
        assert_eq!(kept, (1..MAX_LINES as u32).chain([32]).collect::<Vec<_>>());
    }

    #[test]
    fn code_in_memory_has_its_name_for_the_stacks_of_one_time() {
        let mut names = Names::default();
        let place = |address| Place::Memory { process: PROCESS, address };
        names.begin(PROCESS, false, vec![1, 2]);
        assert_eq!(names.wanted(PROCESS).collect::<Vec<_>>(), [1, 2]);
        names.keep(place(1), vec![RawLine { function: b"old".to_vec(), ..RawLine::default() }]);
        assert_eq!(names.wanted(PROCESS).collect::<Vec<_>>(), [2]);
        let held = names.get(&place(1));
        assert_eq!(held.as_ref().unwrap()[0].function, "old");
        names.begin(PROCESS, true, vec![1, 2]);
        assert!(names.get(&place(1)).is_some(), "of an image they stay");
        names.begin(PROCESS, false, Vec::new());
        assert!(names.get(&place(1)).is_none());
        assert_eq!((names.memory_bytes, names.held.len()), (0, 1));
    }
}

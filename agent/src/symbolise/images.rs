//! Which image (the address space between two execs) each process of a followed tree had at a time, and what the
//! `Symboliser` is told of it.

use foldhash::{HashMap, HashMapExt};
use plumb_common::task::ProcKey;

use super::{MAX_PROCESSES, Symboliser, process::Mapped, told::image_key};
use crate::kernel::{MapEvent, Mapping};

/// Images remembered at most. When there are more, those that an exec has ended go first; then a new one is not taken.
const MAX_IMAGES: usize = MAX_PROCESSES;

/// The images of a process tree. Times are nanoseconds since boot.
pub struct Images {
    /// By process, in the order of time.
    known: HashMap<u32, Vec<Image>>,
    count: usize,
    dropped: u64,
}

#[derive(Clone, Copy, Debug)]
struct Image {
    key: ProcKey,
    begun: u64,
    /// By an exec, or by another process with the same number.
    ended: Option<u64>,
    /// When its process was made; `None` if nobody has said.
    made: Option<u64>,
}

impl Images {
    /// Of the process that is followed, as it was made, and of all that it makes.
    #[must_use]
    pub fn new(root: ProcKey) -> Self {
        let mut images = Self { known: HashMap::new(), count: 0, dropped: 0 };
        images.add(root.tgid, root.start_boottime, Some(root.start_boottime));
        images
    }

    /// Takes what the kernel told; opens the files of new mappings at once, so that they are there when a file is
    /// deleted or its process gone.
    pub fn take(&mut self, symboliser: &mut Symboliser, events: Vec<MapEvent>) {
        for event in events {
            match event {
                MapEvent::Mapped { time, tgid, mapping } => self.mapped(symboliser, tgid, time, mapping),
                MapEvent::Exec { time, tgid } => {
                    let made = self.newest(tgid).and_then(|image| image.made);
                    if let Some(key) = self.begin(symboliser, tgid, time, made) {
                        symboliser.begin(key, made);
                    }
                }
                MapEvent::Forked { time, parent, child } => {
                    let from = self.newest(parent).map(|image| image.key);
                    if let Some(key) = self.begin(symboliser, child, time, Some(time)) {
                        symboliser.copy(from, key, time);
                    }
                }
            }
        }
    }

    /// The key under which the `Symboliser` knows the image that process `tgid` had at `time`; it is no key of a
    /// process. `None` for a process that is not followed, an image that was not taken and one that is forgotten.
    #[must_use]
    pub fn at(&self, tgid: u32, time: u64) -> Option<ProcKey> {
        let images = self.known.get(&tgid)?;
        let image = images.iter().rev().find(|image| image.begun <= time)?;
        image.ended.is_none_or(|ended| time < ended).then_some(image.key)
    }

    /// Nothing more will be asked about images of `tgid` that began before `time`. To be called when a process has
    /// ended, and when it has execed, once the stacks of the old image have been walked.
    pub fn forget(&mut self, symboliser: &mut Symboliser, tgid: u32, time: u64) {
        let Some(images) = self.known.get_mut(&tgid) else { return };
        let old = images.iter().take_while(|image| image.begun < time).count();
        self.count -= old;
        images.drain(..old).for_each(|image| symboliser.forget(image.key));
        if images.is_empty() {
            self.known.remove(&tgid);
        }
    }

    /// Images and mappings that were left out or let go because there were too many.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    fn newest(&self, tgid: u32) -> Option<Image> {
        self.known.get(&tgid)?.last().copied()
    }

    fn mapped(&mut self, symboliser: &mut Symboliser, tgid: u32, time: u64, mapping: Mapping) {
        let key = match self.at(tgid, time) {
            Some(key) => key,
            // Its fork was lost, or it is forgotten: whoever asks for it gets at least what is still told.
            None => match self.begin(symboliser, tgid, time, None) {
                Some(key) => {
                    symboliser.begin(key, None);
                    key
                }
                None => return,
            },
        };
        // As in /proc/PID/maps, memory has no offset.
        let offset = if mapping.inode == 0 { 0 } else { mapping.offset };
        let Mapping { start, end, device, inode, path, .. } = mapping;
        let kept = symboliser.map(key, Mapped { start, end, offset, device, inode, path });
        self.dropped += u64::from(!kept);
    }

    /// Ends the image that the process had, and begins another if there is room.
    fn begin(
        &mut self,
        symboliser: &mut Symboliser,
        tgid: u32,
        time: u64,
        made: Option<u64>,
    ) -> Option<ProcKey> {
        if let Some(before) = self.known.get_mut(&tgid).and_then(|images| images.last_mut()) {
            before.ended.get_or_insert(time);
        }
        if self.count >= MAX_IMAGES {
            self.dropped += 1;
            self.let_go(symboliser)?;
        }
        Some(self.add(tgid, time, made))
    }

    fn add(&mut self, tgid: u32, begun: u64, made: Option<u64>) -> ProcKey {
        let key = image_key(tgid, begun);
        self.known.entry(tgid).or_default().push(Image { key, begun, ended: None, made });
        self.count += 1;
        key
    }

    /// Forgets the image that ended first.
    fn let_go(&mut self, symboliser: &mut Symboliser) -> Option<()> {
        let ended = self.known.values().flatten().filter(|image| image.ended.is_some());
        let first = ended.min_by_key(|image| image.ended)?.key;
        let images = self.known.get_mut(&first.tgid)?;
        images.retain(|image| image.key != first);
        if images.is_empty() {
            self.known.remove(&first.tgid);
        }
        self.count -= 1;
        symboliser.forget(first);
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn symboliser() -> Symboliser {
        Symboliser::with("/nonexistent", "/nonexistent")
    }

    fn exec(time: u64, tgid: u32) -> MapEvent {
        MapEvent::Exec { time, tgid }
    }

    fn forked(time: u64, parent: u32, child: u32) -> MapEvent {
        MapEvent::Forked { time, parent, child }
    }

    fn memory(time: u64, tgid: u32) -> MapEvent {
        let path = b"//anon".to_vec();
        let mapping = Mapping { start: 4096, end: 8192, offset: 4096, device: (0, 0), inode: 0, path };
        MapEvent::Mapped { time, tgid, mapping }
    }

    fn mappings(symboliser: &Symboliser, key: ProcKey) -> usize {
        symboliser.books.processes.get(&key).map_or(0, |known| known.maps.mappings().len())
    }

    #[test]
    fn each_time_has_its_image() {
        let (mut symboliser, mut images) = (symboliser(), Images::new(ProcKey::new(7, 10)));
        let events = vec![exec(20, 7), memory(21, 7), forked(30, 7, 8), exec(40, 8), exec(50, 7)];
        images.take(&mut symboliser, events);
        let at = |tgid, time| images.at(tgid, time).map(|key| (key.tgid, key.start_boottime & !(1 << 63)));
        assert_eq!([at(7, 9), at(7, 10), at(7, 19)], [None, Some((7, 10)), Some((7, 10))]);
        assert_eq!([at(7, 20), at(7, 49), at(7, 50)], [Some((7, 20)), Some((7, 20)), Some((7, 50))]);
        assert_eq!([at(8, 29), at(8, 30), at(8, 40)], [None, Some((8, 30)), Some((8, 40))]);
        assert_eq!(at(9, 30), None);
        let held = |tgid, time| mappings(&symboliser, images.at(tgid, time).unwrap());
        assert_eq!([held(7, 10), held(7, 20), held(7, 50)], [0, 1, 0]);
        assert_eq!([held(8, 30), held(8, 40)], [1, 0], "a fork copies, an exec begins anew");
    }

    #[test]
    fn what_is_told_late_goes_where_it_belongs() {
        let (mut symboliser, mut images) = (symboliser(), Images::new(ProcKey::new(7, 10)));
        images.take(&mut symboliser, vec![exec(20, 7), exec(30, 7), memory(25, 7)]);
        assert_eq!(mappings(&symboliser, images.at(7, 25).unwrap()), 1);
        assert_eq!(mappings(&symboliser, images.at(7, 30).unwrap()), 0);
        images.take(&mut symboliser, vec![memory(40, 9)]);
        assert_eq!(mappings(&symboliser, images.at(9, 41).unwrap()), 1, "its fork was lost");
    }

    #[test]
    fn a_number_that_is_used_again_is_another_process() {
        let (mut symboliser, mut images) = (symboliser(), Images::new(ProcKey::new(7, 10)));
        images.take(&mut symboliser, vec![forked(20, 7, 8), memory(21, 8), forked(30, 7, 8)]);
        images.forget(&mut symboliser, 8, 25);
        assert_eq!(images.at(8, 22), None, "forgotten");
        assert_eq!(mappings(&symboliser, images.at(8, 30).unwrap()), 0);
        images.forget(&mut symboliser, 8, u64::MAX);
        assert_eq!((images.at(8, 30), images.count), (None, 1));
        assert_eq!(symboliser.books.processes.len(), 0, "the first one has not been told of");
    }

    #[test]
    fn there_are_not_too_many() {
        let (mut symboliser, mut images) = (symboliser(), Images::new(ProcKey::new(7, 10)));
        let many = MAX_IMAGES as u64;
        images.take(&mut symboliser, (0..2 * many).map(|time| exec(100 + time, 7)).collect());
        assert_eq!((images.count, images.dropped()), (MAX_IMAGES, many + 1));
        assert!(symboliser.books.processes.len() <= MAX_IMAGES);
        assert_eq!(images.at(7, 10), None);
        assert!(images.at(7, 99 + many).is_none() && images.at(7, 100 + many).is_some());

        images.forget(&mut symboliser, 7, 99 + 2 * many);
        images.take(
            &mut symboliser,
            (1..2 * many).map(|time| forked(10_000 + time, 7, 100 + time as u32)).collect(),
        );
        assert_eq!(images.count, MAX_IMAGES);
        assert!(images.at(7, 20_000).is_some() && images.at(101, 20_000).is_some());
        assert!(images.at(100 + MAX_IMAGES as u32, 20_000).is_none(), "no room, and nobody has ended");
    }
}

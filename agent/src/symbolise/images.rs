//! Which program a process ran at a time. An image is what lies in its memory between two execs; each has a key of its
//! own among the processes that a `Symboliser` knows.

use std::collections::HashMap;

use plumb_common::task::ProcKey;

use super::Symboliser;
use crate::kernel::MapEvent;

/// Images of one process that are remembered: one that runs another program again and again is seldom asked about.
const MAX_IMAGES: usize = 64;

/// The images of processes, by when each began.
#[derive(Debug, Default)]
pub(crate) struct Images {
    /// Of each process the oldest first.
    began: HashMap<u32, Vec<u64>>,
}

impl Images {
    /// Takes what the kernel told, in the order of time.
    pub(crate) fn take(&mut self, symboliser: &mut Symboliser, events: Vec<MapEvent>) {
        for event in events {
            match event {
                MapEvent::Exec { time, tgid } => {
                    let image = self.begin(symboliser, tgid, time);
                    symboliser.begin(image, None);
                }
                MapEvent::Forked { time, parent, child } => {
                    let of_parent = self.at(parent, time);
                    let image = self.begin(symboliser, child, time);
                    symboliser.begin(image, of_parent);
                }
                MapEvent::Mapped { time, tgid, mapping } => {
                    let image = match self.at(tgid, time) {
                        Some(image) => image,
                        None => {
                            let image = self.begin(symboliser, tgid, time);
                            symboliser.begin(image, None);
                            image
                        }
                    };
                    symboliser.map(image, mapping);
                }
            }
        }
    }

    /// The key of what a process ran at a time, in nanoseconds since boot.
    pub(crate) fn at(&self, tgid: u32, time: u64) -> Option<ProcKey> {
        let began = self.began.get(&tgid)?;
        let after = began.partition_point(|began| *began <= time);
        Some(ProcKey::new(tgid, *began.get(after.checked_sub(1)?)?))
    }

    fn begin(&mut self, symboliser: &mut Symboliser, tgid: u32, time: u64) -> ProcKey {
        let began = self.began.entry(tgid).or_default();
        if began.len() >= MAX_IMAGES {
            symboliser.forget(ProcKey::new(tgid, began.remove(0)));
        }
        began.push(time);
        ProcKey::new(tgid, time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_belongs_to_the_last_image_that_began_before() {
        let mut images = Images::default();
        let mut symboliser = Symboliser::new();
        let fork = MapEvent::Forked { time: 10, parent: 1, child: 7 };
        images.take(&mut symboliser, vec![fork, MapEvent::Exec { time: 20, tgid: 7 }]);
        assert_eq!(images.at(7, 9), None);
        assert_eq!(images.at(7, 10), Some(ProcKey::new(7, 10)));
        assert_eq!(images.at(7, 25), Some(ProcKey::new(7, 20)));
        assert_eq!(images.at(8, 25), None);
    }
}

//! Processes whose mappings somebody else tells, as they come: nothing is asked of /proc, where the process may be gone
//! or another one.

use std::time::Instant;

use plumb_common::task::ProcKey;

use super::{
    Books, MAX_PROCESSES, Process, Symboliser,
    process::{self, FileKey, MAX_MAPPINGS, Mapped},
    protocol::{Content, Mapping},
};
use crate::{kernel::CodeMapping, text};

impl Symboliser {
    /// A process begins that has nothing in its memory, or what another one has.
    pub(crate) fn begin(&mut self, image: ProcKey, of: Option<ProcKey>) {
        self.books.begin(image, of);
    }

    /// Something is mapped, whatever was there before. Its file is opened at once: soon it may be deleted.
    pub(crate) fn map(&mut self, image: ProcKey, mapping: CodeMapping) {
        self.books.map(image, mapping);
    }
}

impl Books {
    fn begin(&mut self, image: ProcKey, of: Option<ProcKey>) {
        self.clock += 1;
        let of = of.and_then(|of| self.processes.get(&of));
        let (mappings, mapped) = of.map(|of| (of.mappings.clone(), of.mapped.clone())).unwrap_or_default();
        if self.processes.len() >= MAX_PROCESSES
            && let Some(oldest) =
                self.processes.iter().min_by_key(|(_, known)| known.used).map(|(key, _)| *key)
        {
            self.processes.remove(&oldest);
        }
        let (not_before, perf_map, harm, used) = (Instant::now(), None, 0, self.clock);
        let known = Process { mappings, mapped, not_before, perf_map, harm, used, is_told: true };
        self.processes.insert(image, known);
    }

    fn map(&mut self, image: ProcKey, mapping: CodeMapping) {
        let CodeMapping { start, end, offset, device, inode, path } = mapping;
        let mapped = Mapped { start, end, offset, device, inode, path };
        let content = self.told_content(image, &mapped);
        let Some(known) = self.processes.get_mut(&image) else { return };
        let mut all: Vec<(Mapping, Mapped)> = known
            .mappings
            .drain(..)
            .zip(known.mapped.drain(..))
            .flat_map(|old| without(old, start, end))
            .collect();
        if all.len() < MAX_MAPPINGS {
            let at = all.partition_point(|(old, _)| old.start < start);
            all.insert(at, (Mapping { start, end, offset, content }, mapped));
        }
        (known.mappings, known.mapped) = all.into_iter().unzip();
    }

    fn told_content(&mut self, image: ProcKey, mapped: &Mapped) -> Content {
        let known = self.processes.get(&image).and_then(|known| {
            let at = known.mapped.iter().position(|other| {
                mapped.inode != 0 && (other.device, other.inode) == (mapped.device, mapped.inode)
            })?;
            known.mappings.get(at)
        });
        if let Some(known) = known {
            return known.content;
        }
        if mapped.inode == 0 {
            return Content::without_file(&mapped.path);
        }
        let path = text::printable(&mapped.path).into();
        match process::open_told(image.tgid, mapped) {
            Ok((file, found)) => Content::File(self.table.add(found, &path, Some(file))),
            Err(_) => Content::File(self.table.add(FileKey::unread(mapped), &path, None)),
        }
    }
}

/// What is left of an older mapping when a range is mapped anew.
fn without((old, mapped): (Mapping, Mapped), start: u64, end: u64) -> Vec<(Mapping, Mapped)> {
    let part = |from: u64, to: u64| {
        let further = from - old.start;
        let mapping =
            Mapping { start: from, end: to, offset: old.offset.wrapping_add(further), ..old.clone() };
        let mapped = Mapped { start: from, end: to, offset: mapping.offset, ..mapped.clone() };
        (from < to).then_some((mapping, mapped))
    };
    if old.end <= start || end <= old.start {
        return vec![(old, mapped)];
    }
    let before = part(old.start, start.max(old.start));
    let after = part(end.min(old.end), old.end);
    before.into_iter().chain(after).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_mapping_cuts_what_was_there() {
        let old = || {
            let mapping = Mapping { start: 100, end: 200, offset: 1000, content: Content::Anonymous };
            let mapped =
                Mapped { start: 100, end: 200, offset: 1000, device: (0, 0), inode: 0, path: Vec::new() };
            (mapping, mapped)
        };
        let left = |start, end| -> Vec<(u64, u64, u64)> {
            without(old(), start, end).iter().map(|(left, _)| (left.start, left.end, left.offset)).collect()
        };
        assert_eq!(left(50, 100), [(100, 200, 1000)]);
        assert_eq!(left(100, 200), []);
        assert_eq!(left(50, 300), []);
        assert_eq!(left(120, 150), [(100, 120, 1000), (150, 200, 1050)]);
        assert_eq!(left(150, 250), [(100, 150, 1000)]);
        assert_eq!(left(50, 150), [(150, 200, 1050)]);
    }
}

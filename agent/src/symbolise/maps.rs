//! The executable mappings of one address space, each with what the worker may know of it: by address, none over
//! another.

use std::ops::Range;

use super::{
    process::{MAX_MAPPINGS, Mapped},
    protocol::{Content, Mapping},
};

#[derive(Clone, Debug, Default)]
pub(super) struct Maps {
    /// By their start; ends are sorted too.
    mappings: Vec<Mapping>,
    /// The same ones, as the kernel tells them.
    mapped: Vec<Mapped>,
}

impl Maps {
    /// Of mappings that are sorted, and the contents in the same order.
    pub(super) fn new(mapped: Vec<Mapped>, contents: impl IntoIterator<Item = Content>) -> Self {
        let mappings = mapped.iter().zip(contents).map(|(one, content)| mapping(one, content)).collect();
        Self { mappings, mapped }
    }

    pub(super) fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }

    /// The first mapping of a file.
    pub(super) fn of(&self, module: u32) -> Option<&Mapped> {
        let index = self.mappings.iter().position(|mapping| mapping.content == Content::File(module))?;
        self.mapped.get(index)
    }

    /// Whether mappings may be of the same image: each exec puts the vDSO somewhere else where addresses are randomised, and
    /// the first file is the program.
    pub(super) fn is_same_image(&self, mapped: &[Mapped]) -> bool {
        let vdso = |mapped: &[Mapped]| mapped.iter().find(|one| one.path == b"[vdso]").map(|one| one.start);
        let program =
            |mapped: &[Mapped]| mapped.iter().find(|one| one.inode != 0).map(|one| (one.device, one.inode));
        let same = |other: &[Mapped]| vdso(other) == vdso(mapped) && program(other) == program(mapped);
        !mapped.is_empty() && same(&self.mapped)
    }

    /// What has been found out about this file before.
    pub(super) fn known(&self, mapped: &Mapped) -> Option<Content> {
        let is_same =
            |one: &Mapped| one.inode != 0 && one.inode == mapped.inode && one.device == mapped.device;
        let index = self.mapped.iter().position(|one| is_same(one) && one.path == mapped.path)?;
        self.mappings.get(index).map(|mapping| mapping.content)
    }

    /// Puts a mapping where others may be, as mmap does: of those the parts beside it stay. False if there are too
    /// many, and it is left out.
    pub(super) fn put(&mut self, mut new: Mapped, content: Content) -> bool {
        let range = self.overlapped(new.start, new.end);
        let mut beside = self.cut(range.clone(), &new);
        let has_room = self.mappings.len() - range.len() + beside.len() < MAX_MAPPINGS;
        if !has_room {
            // What it lies over is gone all the same.
            beside.truncate(range.len());
        }
        let at = range.start + usize::from(beside.first().is_some_and(|(part, _)| part.start < new.start));
        self.replace(range, beside);
        let mut range = at..at;
        if content == Content::Anonymous {
            self.join(&mut range, &mut new);
        }
        if has_room {
            self.replace(range, [(new, content)]);
        }
        has_room
    }

    /// Those that have an address in common with a range.
    fn overlapped(&self, start: u64, end: u64) -> Range<usize> {
        let first = self.mapped.partition_point(|one| one.end <= start);
        first..self.mapped.partition_point(|one| one.start < end).max(first)
    }

    /// What stays of mappings that a new one lies over.
    fn cut(&self, range: Range<usize>, new: &Mapped) -> Vec<(Mapped, Content)> {
        let over = self.mapped[range.clone()].iter().zip(&self.mappings[range]);
        over.flat_map(|(one, mapping)| {
            let before = (one.start < new.start).then(|| Mapped { end: new.start, ..one.clone() });
            let offset = one.offset.wrapping_add(new.end.wrapping_sub(one.start));
            let behind = (one.end > new.end).then(|| Mapped { start: new.end, offset, ..one.clone() });
            [before, behind].into_iter().flatten().map(|part| (part, mapping.content))
        })
        .collect()
    }

    /// Takes up anonymous neighbours, as the kernel does: compiled code comes page by page.
    fn join(&self, range: &mut Range<usize>, new: &mut Mapped) {
        let is_like = |index: usize| {
            let content = self.mappings.get(index).map(|mapping| mapping.content);
            content == Some(Content::Anonymous) && self.mapped[index].path == new.path
        };
        let (before, behind) = (range.start.checked_sub(1), range.end);
        let before = before.filter(|index| is_like(*index) && self.mapped[*index].end == new.start);
        let joins_behind = is_like(behind) && self.mapped[behind].start == new.end;
        if let Some(index) = before {
            (new.start, range.start) = (self.mapped[index].start, index);
        }
        if joins_behind {
            (new.end, range.end) = (self.mapped[behind].end, behind + 1);
        }
    }

    fn replace(&mut self, range: Range<usize>, by: impl IntoIterator<Item = (Mapped, Content)>) {
        let (mapped, mappings): (Vec<_>, Vec<_>) = by
            .into_iter()
            .map(|(one, content)| {
                let mapping = mapping(&one, content);
                (one, mapping)
            })
            .unzip();
        self.mapped.splice(range.clone(), mapped);
        self.mappings.splice(range, mappings);
    }
}

fn mapping(one: &Mapped, content: Content) -> Mapping {
    Mapping { start: one.start, end: one.end, offset: one.offset, content }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn mapped(start: u64, end: u64, inode: u64) -> Mapped {
        let path = format!("/{inode}").into_bytes();
        Mapped { start, end, offset: start * 10, device: (8, 1), inode, path }
    }

    fn brief(maps: &Maps) -> Vec<(u64, u64, u64, u64)> {
        let both = maps.mapped.iter().zip(maps.mappings());
        both.map(|(one, mapping)| {
            assert_eq!(*mapping, super::mapping(one, mapping.content));
            (one.start, one.end, one.offset, one.inode)
        })
        .collect()
    }

    #[test]
    fn a_library_is_mapped_whole_and_then_in_parts() {
        let mut maps = Maps::default();
        for (start, end, inode) in [(10, 50, 1), (60, 70, 2), (20, 30, 3), (45, 65, 4)] {
            assert!(maps.put(mapped(start, end, inode), Content::File(1)));
        }
        let left = [(10, 20, 100, 1), (20, 30, 200, 3), (30, 45, 120, 1), (45, 65, 450, 4), (65, 70, 605, 2)];
        assert_eq!(brief(&maps), left);
        assert!(maps.put(mapped(0, 100, 5), Content::Sealed));
        assert_eq!(brief(&maps), [(0, 100, 0, 5)]);
        assert!(maps.put(mapped(0, 100, 6), Content::Sealed), "just as long");
        assert_eq!(brief(&maps), [(0, 100, 0, 6)]);
    }

    #[test]
    fn another_program_is_another_image_though_it_lies_where_the_one_before_was() {
        let vdso = |start| Mapped { path: b"[vdso]".to_vec(), ..mapped(start, start + 2, 0) };
        let before = vec![mapped(10, 20, 1), mapped(30, 40, 3), vdso(90)];
        let maps = Maps::new(before.clone(), [Content::File(1), Content::File(2), Content::Sealed]);
        assert!(maps.is_same_image(&before));
        assert!(maps.is_same_image(&[mapped(10, 20, 1), mapped(30, 40, 4), vdso(90)]), "another library");
        assert!(!maps.is_same_image(&[mapped(10, 20, 2), mapped(30, 40, 3), vdso(90)]));
        assert!(!maps.is_same_image(&[mapped(10, 20, 1), mapped(30, 40, 3), vdso(70)]));
        assert!(!maps.is_same_image(&[]));
    }

    #[test]
    fn compiled_code_that_grows_is_one_mapping() {
        let mut maps = Maps::default();
        let memory = |start, end| Mapped { path: b"//anon".to_vec(), ..mapped(start, end, 0) };
        for (start, end) in [(10, 20), (30, 40), (20, 30), (5, 10), (12, 15)] {
            assert!(maps.put(memory(start, end), Content::Anonymous));
        }
        assert_eq!(maps.mapped.iter().map(|one| (one.start, one.end)).collect::<Vec<_>>(), [(5, 40)]);
    }

    #[test]
    fn there_are_not_too_many() {
        let mut maps = Maps::default();
        for page in 0..MAX_MAPPINGS as u64 {
            assert!(maps.put(mapped(2 * page, 2 * page + 1, 1), Content::File(1)));
        }
        assert!(!maps.put(mapped(1 << 40, 1 << 41, 1), Content::File(1)));
        assert!(maps.put(mapped(2, 3, 2), Content::File(2)), "in another's place");
        assert_eq!(maps.mappings().len(), MAX_MAPPINGS);
        assert_eq!(maps.of(2).map(|one| one.start), Some(2));

        let mut maps = Maps::default();
        assert!(maps.put(mapped(0, 1 << 30, 1), Content::File(1)));
        let put = (0..2 * MAX_MAPPINGS as u64)
            .filter(|at| maps.put(mapped(10 * at + 5, 10 * at + 6, 2), Content::File(2)));
        assert!(put.count() < MAX_MAPPINGS);
        assert!(maps.mappings().len() <= MAX_MAPPINGS);
    }

    proptest! {
        /// Each address has what was mapped there last, at its offset.
        #[test]
        fn the_last_one_counts(puts in prop::collection::vec((0..60_u64, 1..20_u64, 0..4_u64), 0..40)) {
            let (mut maps, mut model) = (Maps::default(), BTreeMap::new());
            for (start, length, inode) in puts {
                let content = if inode == 0 { Content::Anonymous } else { Content::File(inode as u32) };
                assert!(maps.put(mapped(start, start + length, inode), content));
                model.extend((start..start + length).map(|at| (at, (start * 10 + at - start, inode))));
            }
            let mut found = BTreeMap::new();
            for (start, end, offset, inode) in brief(&maps) {
                for at in start..end {
                    assert!(found.insert(at, (offset + at - start, inode)).is_none(), "two at {at}");
                }
            }
            let known = |places: &BTreeMap<u64, (u64, u64)>| {
                // Memory has no offset.
                let plain = |(at, (offset, inode)): (&u64, &(u64, u64))| (*at, if *inode == 0 { 0 } else { *offset }, *inode);
                places.iter().map(plain).collect::<Vec<_>>()
            };
            assert_eq!(known(&found), known(&model));
        }
    }
}

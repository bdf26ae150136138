//! Finds fields of kernel structs in the kernel's own BTF and hands their offsets to the programs.
//!
//! A small parser of our own: it reads one file, needs struct members only, and keeps nothing. The
//! format is Documentation/bpf/btf.rst; every access is bounded, and what is not understood is an error.

use plumb_common::offsets;

/// Where the kernel publishes its types, since 5.4 with `CONFIG_DEBUG_INFO_BTF`.
pub(crate) const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

const MAGIC: u16 = 0xeb9f;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const FUNCTION: u32 = 12;
const RESTRICT: u32 = 11;
const TYPE_TAG: u32 = 18;
/// Nesting of anonymous members and of modifiers; the kernel's own types stay below 10.
const MAX_DEPTH: u32 = 32;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BtfError {
    #[error("not a BTF file")]
    NotBtf,
    #[error("BTF ends in the middle of a type")]
    Truncated,
    #[error("BTF has a type of unknown kind {0}")]
    UnknownKind(u32),
}

/// What the programs need to know of this kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    /// Byte offsets by `plumb_common::offsets` index; `MISSING` for what this kernel does not have.
    pub offsets: [u32; offsets::LEN],
    /// Whether it has the helper `bpf_task_pt_regs`.
    pub has_task_pt_regs: bool,
    /// Whether resets have a reason: then their tracepoint tells of every one, since 6.10.
    pub has_reset_reason: bool,
}

/// Reads a kernel's types.
pub(crate) fn facts(btf: &[u8]) -> Result<Facts, BtfError> {
    let types = Types::parse(btf)?;
    Ok(Facts {
        offsets: offsets::PATHS.map(|path| types.resolve(path).unwrap_or(offsets::MISSING)),
        has_task_pt_regs: types.has(FUNCTION, "bpf_task_pt_regs"),
        has_reset_reason: types.has(ENUM, "sk_rst_reason"),
    })
}

/// One type: where its record starts, and the record's common fields.
#[derive(Clone, Copy)]
struct Type {
    at: usize,
    name: u32,
    info: u32,
    /// Size in bytes, or the id of the type it refers to.
    size_or_type: u32,
}

impl Type {
    fn kind(self) -> u32 {
        (self.info >> 24) & 0x1f
    }
    fn members(self) -> usize {
        (self.info & 0xffff) as usize
    }
    /// Member offsets also carry a bit-field size.
    fn has_bitfields(self) -> bool {
        self.info >> 31 == 1
    }
}

struct Types<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Start of each type record; type ids begin at 1.
    starts: Vec<u32>,
}

impl<'a> Types<'a> {
    fn parse(btf: &'a [u8]) -> Result<Self, BtfError> {
        let word = |at| u32_at(btf, at).ok_or(BtfError::NotBtf);
        if word(0)? & 0xffff != u32::from(MAGIC) {
            return Err(BtfError::NotBtf);
        }
        let header = word(4)? as usize;
        let section = |at: usize| -> Result<&'a [u8], BtfError> {
            let start = header.checked_add(word(at)? as usize).ok_or(BtfError::NotBtf)?;
            let end = start.checked_add(word(at + 4)? as usize).ok_or(BtfError::NotBtf)?;
            btf.get(start..end).ok_or(BtfError::Truncated)
        };
        let mut parsed = Self { types: section(8)?, strings: section(16)?, starts: Vec::new() };
        let mut at = 0;
        while at < parsed.types.len() {
            parsed.starts.push(at as u32);
            let record = parsed.record(at).ok_or(BtfError::Truncated)?;
            let entries = record.members();
            // Bytes after the three common words, by kind (include/uapi/linux/btf.h).
            at += 12
                + match record.kind() {
                    2 | 7..=12 | 16 | 18 => 0,
                    1 | 14 | 17 => 4,
                    ARRAY => 12,
                    STRUCT | UNION | 15 | 19 => 12 * entries,
                    6 | 13 => 8 * entries,
                    kind => return Err(BtfError::UnknownKind(kind)),
                };
        }
        Ok(parsed)
    }

    fn record(&self, at: usize) -> Option<Type> {
        let word = |i: usize| u32_at(self.types, at + 4 * i);
        Some(Type { at, name: word(0)?, info: word(1)?, size_or_type: word(2)? })
    }

    fn by_id(&self, id: u32) -> Option<Type> {
        self.record(*self.starts.get((id as usize).checked_sub(1)?)? as usize)
    }

    fn name(&self, at: u32) -> &'a [u8] {
        let rest = self.strings.get(at as usize..).unwrap_or_default();
        rest.split(|byte| *byte == 0).next().unwrap_or_default()
    }

    /// `struct.field.field`, or with `[]` at its end the size of one element of that array.
    fn resolve(&self, path: &str) -> Option<u32> {
        let (path, want_stride) = path.strip_suffix("[]").map_or((path, false), |path| (path, true));
        let mut names = path.split('.');
        let wanted = names.next()?.as_bytes();
        let all = self.starts.iter().filter_map(|at| self.record(*at as usize));
        let mut container =
            all.into_iter().find(|t| t.kind() == STRUCT && t.members() > 0 && self.name(t.name) == wanted)?;
        let mut offset = 0;
        let mut names = names.peekable();
        while let Some(name) = names.next() {
            let (at, type_id) = self.member(container, name.as_bytes(), 0)?;
            offset += at;
            let mut field = self.strip(type_id)?;
            if field.kind() == ARRAY {
                field = self.strip(u32_at(self.types, field.at + 12)?)?;
                if want_stride && names.peek().is_none() {
                    return matches!(field.kind(), 1 | STRUCT | UNION).then_some(field.size_or_type);
                }
            }
            container = field;
        }
        (!want_stride).then_some(offset)
    }

    /// Whether the kernel has a type of this kind and name; a BPF helper is a function.
    fn has(&self, kind: u32, wanted: &str) -> bool {
        let mut all = self.starts.iter().filter_map(|at| self.record(*at as usize));
        all.any(|t| t.kind() == kind && self.name(t.name) == wanted.as_bytes())
    }

    /// Byte offset and type of a member, looked for in anonymous members too.
    fn member(&self, container: Type, wanted: &[u8], depth: u32) -> Option<(u32, u32)> {
        if depth > MAX_DEPTH || !matches!(container.kind(), STRUCT | UNION) {
            return None;
        }
        for i in 0..container.members() {
            let at = container.at + 12 + 12 * i;
            let [name, type_id, bits] =
                [u32_at(self.types, at)?, u32_at(self.types, at + 4)?, u32_at(self.types, at + 8)?];
            let (bits, bitfield) =
                if container.has_bitfields() { (bits & 0xff_ffff, bits >> 24) } else { (bits, 0) };
            let name = self.name(name);
            if name == wanted {
                return (bitfield == 0 && bits % 8 == 0).then_some((bits / 8, type_id));
            }
            if name.is_empty()
                && let Some(inner) = self.strip(type_id)
                && let Some((offset, type_id)) = self.member(inner, wanted, depth + 1)
            {
                return Some((bits / 8 + offset, type_id));
            }
        }
        None
    }

    /// The type behind typedefs and qualifiers.
    fn strip(&self, id: u32) -> Option<Type> {
        let mut found = self.by_id(id)?;
        for _ in 0..MAX_DEPTH {
            if !matches!(found.kind(), TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG) {
                return Some(found);
            }
            found = self.by_id(found.size_or_type)?;
        }
        None
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(word.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A BTF file with the given types and strings.
    fn file(types: &[u32], strings: &str) -> Vec<u8> {
        let types: Vec<u8> = types.iter().flat_map(|word| word.to_le_bytes()).collect();
        let header = [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32];
        let mut file = vec![0x9f, 0xeb, 1, 0];
        file.extend(header.iter().flat_map(|word| word.to_le_bytes()));
        file.extend(&types);
        file.extend(strings.as_bytes());
        file
    }

    // Strings: 1 int, 5 outer, 11 first, 17 inner_field, 29 list, 34 helper
    const STRINGS: &str = "\0int\0outer\0first\0inner_field\0list\0helper\0";

    fn sample() -> Vec<u8> {
        #[rustfmt::skip]
        let types = [
            1, 1 << 24, 4, 32,                                   // 1: int
            0, STRUCT << 24 | 1, 4,  17, 1, 32,                  // 2: anonymous, inner_field at byte 4
            0, ARRAY << 24, 0,  1, 1, 3,                         // 3: int[3]
            5, STRUCT << 24 | 3, 24,  11, 1, 0,  0, 2, 64,  29, 3, 128, // 4: outer
            34, FUNCTION << 24, 1,                               // 5: helper
        ];
        file(&types, STRINGS)
    }

    #[test]
    fn finds_members_also_in_anonymous_structs() {
        let btf = sample();
        let types = Types::parse(&btf).unwrap();
        assert_eq!(types.resolve("outer.first"), Some(0));
        assert_eq!(types.resolve("outer.inner_field"), Some(12));
        assert_eq!(types.resolve("outer.list"), Some(16));
        assert_eq!(types.resolve("outer.list[]"), Some(4));
        assert_eq!(types.resolve("outer.first[]"), None);
        assert_eq!(types.resolve("outer.nothing"), None);
        assert_eq!(types.resolve("nobody.first"), None);
        assert!(types.has(FUNCTION, "helper") && !types.has(FUNCTION, "outer"));
    }

    #[test]
    fn every_cut_of_a_file_is_an_error_or_an_answer_but_never_a_panic() {
        let btf = sample();
        for end in 0..btf.len() {
            if let Ok(types) = Types::parse(&btf[..end]) {
                types.resolve("outer.inner_field");
            }
        }
    }

    #[test]
    fn this_kernel_has_every_field_or_its_older_name() {
        let btf = std::fs::read(KERNEL_BTF).unwrap();
        let found = facts(&btf).unwrap().offsets;
        let optional = [offsets::TASK_STATE, offsets::TASK_STATE_BEFORE_5_14, offsets::MM_RSS_STAT_STRIDE];
        for (index, path) in offsets::PATHS.iter().enumerate() {
            assert!(found[index] != offsets::MISSING || optional.contains(&index), "{path} is missing");
        }
        let state =
            [offsets::TASK_STATE, offsets::TASK_STATE_BEFORE_5_14].map(|i| found[i] != offsets::MISSING);
        assert_eq!(state.iter().filter(|known| **known).count(), 1);
    }
}

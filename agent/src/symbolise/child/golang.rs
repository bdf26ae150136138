//! Go's own tables (`.gopclntab`, Go 1.18 and later): frame sizes, and names also in stripped programs.
//!
//! The layout is that of `runtime.pcHeader`, `runtime._func` and `runtime.moduledata` (runtime/symtab.go,
//! runtime/runtime2.go); it changed in 1.20, and from 1.26 on only the module data knows where the code begins.

use object::{
    LittleEndian,
    elf::{PF_X, R_X86_64_RELATIVE, Rela64, SHT_RELA},
    read::elf::{ProgramHeader, Rela, SectionHeader},
};

use super::{
    image::{Image, LE},
    walk::{Registers, Stack},
};
use crate::symbolise::protocol::{MAX_LINES, RawLine};

/// The start of the table: magic number, two zeros, size of an instruction (x86) and of a pointer.
const HEADERS: [([u8; 8], Layout); 2] = [
    ([0xf0, 0xff, 0xff, 0xff, 0, 0, 1, 8], Layout::GO_1_18),
    ([0xf1, 0xff, 0xff, 0xff, 0, 0, 1, 8], Layout::GO_1_20),
];
/// Longest name kept, in bytes.
const MAX_NAME: usize = 1024;
/// No frame of Go is larger: the stack of a goroutine ends at 1 GiB.
const MAX_FRAME: i32 = 1 << 30;
/// `runtime.moduledata`: its `text` and `etext`, and where `gofunc` may be, in words.
const MODULE_TEXT: u64 = 22;
const MODULE_GOFUNC: std::ops::Range<u64> = 32..56;
/// Bytes of a segment that are searched for a table or for the module data.
const MAX_SEARCH: usize = 256 << 20;
/// Relocations that may be that of the module data.
const MAX_CANDIDATES: usize = 8;
/// Functions with inlined calls that are looked at to recognise `gofunc`.
const WITNESSES: usize = 16;

const FLAG_TOP: u8 = 1;
const FLAG_WRITES_SP: u8 = 2;
/// Starts a thread.
const CLONE: &[u8] = b"runtime.clone";
const PCDATA_INLINED: u32 = 2;
const FUNCDATA_INLINED: u32 = 3;
const NONE: u32 = u32::MAX;

/// What differs between versions, in bytes.
#[derive(Clone, Copy)]
struct Layout {
    function: usize,
    inlined: usize,
    inlined_name: usize,
    inlined_parent: usize,
}

impl Layout {
    const GO_1_18: Self = Self { function: 40, inlined: 20, inlined_name: 12, inlined_parent: 16 };
    const GO_1_20: Self = Self { function: 44, inlined: 16, inlined_name: 4, inlined_parent: 8 };
}

pub(super) struct Go {
    layout: Layout,
    /// Where the code begins.
    text: u64,
    count: usize,
    names: &'static [u8],
    units: &'static [u8],
    files: &'static [u8],
    /// Tables from addresses to values.
    values: &'static [u8],
    functions: &'static [u8],
    /// Where the data of functions begins; unknown without it, which costs the inlined calls.
    gofunc: Option<u64>,
}

pub(super) enum Step {
    To(Registers),
    End,
    Stop,
}

/// One entry of the table of functions.
#[derive(Clone, Copy)]
struct Function {
    entry: u64,
    end: u64,
    at: &'static [u8],
    layout: Layout,
}

impl Function {
    fn word(&self, index: usize) -> Option<u32> {
        word(self.at, index * 4)
    }

    fn flags(&self) -> Option<u8> {
        self.at.get(self.layout.function - 3).copied()
    }

    fn pcdata(&self, table: u32) -> Option<u32> {
        (table < self.word(7)?).then(|| word(self.at, self.layout.function + table as usize * 4))?
    }

    fn funcdata(&self, table: u32) -> Option<u32> {
        let count = self.at.get(self.layout.function - 1).copied()?;
        let before = usize::try_from(self.word(7)?).ok()?.checked_add(table as usize)?;
        let at = before.checked_mul(4)?.checked_add(self.layout.function)?;
        (table < u32::from(count)).then(|| word(self.at, at))?.filter(|data| *data != NONE)
    }
}

impl Go {
    pub(super) fn of(image: &Image) -> Option<Self> {
        let (data, at) = [&b".gopclntab"[..], b".data.rel.ro.gopclntab"]
            .into_iter()
            .find_map(|name| image.section(name))
            .filter(|(data, _)| layout(data).is_some())
            .or_else(|| by_magic(image))?;
        let layout = layout(data)?;
        let long = |index: usize| Some(u64::from_le_bytes(*data.get(index * 8..)?.first_chunk()?));
        let part = |index| data.get(usize::try_from(long(index)?).ok()?..);
        let module = Module::find(image, at, at.checked_add(long(4)?)?);
        let text = module
            .as_ref()
            .and_then(|module| module.word(image, MODULE_TEXT))
            .or_else(|| long(3).filter(|text| *text != 0))
            .or_else(|| image.section(b".text").map(|(_, at)| at))?;
        let mut go = Self {
            layout,
            text,
            count: usize::try_from(long(1)?).ok()?,
            names: part(4)?,
            units: part(5)?,
            files: part(6)?,
            values: part(7)?,
            functions: part(8)?,
            gofunc: None,
        };
        // A count beyond the end of the table is a lie.
        go.functions.get(..go.count.checked_mul(8)?.checked_add(4)?)?;
        go.gofunc = module.and_then(|module| {
            let witnesses = go.witnesses();
            let candidates = MODULE_GOFUNC.filter_map(|index| module.word(image, index));
            candidates.filter(|_| !witnesses.is_empty()).find(|candidate| {
                witnesses.iter().all(|function| go.is_plausible(image, *candidate, function))
            })
        });
        Some(go)
    }

    fn function(&self, address: u64) -> Option<Function> {
        let wanted = u32::try_from(address.checked_sub(self.text)?).ok()?;
        let entry = |index: usize| word(self.functions, index * 8);
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low.midpoint(high);
            if entry(middle)? <= wanted { low = middle + 1 } else { high = middle }
        }
        self.nth(low.checked_sub(1)?).filter(|function| address < function.end)
    }

    fn nth(&self, index: usize) -> Option<Function> {
        let entry = word(self.functions, index * 8)?;
        let at = usize::try_from(word(self.functions, index * 8 + 4)?).ok()?;
        let end = word(self.functions, index * 8 + 8)?;
        let at = self.functions.get(at..)?;
        at.get(..self.layout.function)?;
        Some(Function {
            entry: self.text.checked_add(entry.into())?,
            end: self.text.checked_add(end.into())?,
            at,
            layout: self.layout,
        })
    }

    /// The value that a table has at an address of a function.
    fn value(&self, function: &Function, table: u32, address: u64) -> Option<i32> {
        if table == 0 {
            return None;
        }
        let mut bytes = self.values.get(table as usize..)?;
        let (mut value, mut end) = (-1i32, function.entry);
        let mut first = true;
        loop {
            let delta = varint(&mut bytes)?;
            if delta == 0 && !first {
                return None;
            }
            first = false;
            value = value.wrapping_add((delta >> 1) as i32 ^ -((delta & 1) as i32));
            end = end.wrapping_add(varint(&mut bytes)?.into());
            if address < end {
                return Some(value);
            }
        }
    }

    /// The frame of the caller; `None` if the address is not Go's.
    pub(super) fn step(&self, address: u64, registers: Registers, stack: &Stack<'_>) -> Option<Step> {
        let function = self.function(address)?;
        let flags = function.flags()?;
        if flags & FLAG_TOP != 0 {
            return Some(Step::End);
        }
        // Such as systemstack and asmcgocall: the caller is on another stack. In clone it is the child that goes to
        // another one.
        if flags & FLAG_WRITES_SP != 0 && self.name(&function) != Some(CLONE) {
            return Some(Step::Stop);
        }
        let up = || {
            let size = self.value(&function, function.word(4)?, address)?;
            let size = u64::try_from(size).ok().filter(|_| size < MAX_FRAME)?;
            let at = registers.sp.checked_add(size)?;
            let ip = stack.word(at)?;
            Some(Registers { ip, sp: at.checked_add(8)?, bp: None, exact: false })
        };
        Some(up().map_or(Step::Stop, Step::To))
    }

    /// The functions at an address, innermost first.
    pub(super) fn lines(&self, image: &Image, address: u64) -> Option<Vec<RawLine>> {
        let function = self.function(address)?;
        let mut lines = Vec::new();
        let mut address = address;
        while lines.len() < MAX_LINES {
            let (file, line) = self.source(&function, address).unwrap_or_default();
            match self.inlined(image, &function, address) {
                Some((name, parent)) => {
                    lines.push(RawLine { function: name.to_vec(), file, line, inlined: true });
                    address = function.entry.checked_add(parent.into())?;
                }
                None => {
                    let name = self.name(&function)?;
                    lines.push(RawLine { function: name.to_vec(), file, line, inlined: false });
                    break;
                }
            }
        }
        Some(lines)
    }

    fn name(&self, function: &Function) -> Option<&'static [u8]> {
        string(self.names, function.word(1)?)
    }

    fn source(&self, function: &Function, address: u64) -> Option<(Vec<u8>, u32)> {
        let line = self.value(function, function.word(6)?, address)?;
        let number = u32::try_from(self.value(function, function.word(5)?, address)?).ok()?;
        let unit = function.word(8)?.checked_add(number)?;
        let file = word(self.units, usize::try_from(unit).ok()?.checked_mul(4)?)?;
        let file = string(self.files, file).unwrap_or_default();
        Some((file.to_vec(), u32::try_from(line).unwrap_or(0)))
    }

    /// The function that was inlined at an address, and where it was called, from the start of the outer one.
    fn inlined(&self, image: &Image, function: &Function, address: u64) -> Option<(&'static [u8], u32)> {
        let index = self.value(function, function.pcdata(PCDATA_INLINED)?, address)?;
        let entry = self.inlined_call(image, self.gofunc?, function, u64::try_from(index).ok()?)?;
        let name = string(self.names, word(entry, self.layout.inlined_name)?)?;
        Some((name, word(entry, self.layout.inlined_parent)?))
    }

    fn inlined_call(
        &self,
        image: &Image,
        gofunc: u64,
        function: &Function,
        index: u64,
    ) -> Option<&'static [u8]> {
        let tree = gofunc.checked_add(function.funcdata(FUNCDATA_INLINED)?.into())?;
        let at = tree.checked_add(index.checked_mul(self.layout.inlined as u64)?)?;
        image.bytes_at(at)?.get(..self.layout.inlined)
    }

    /// Some functions into which calls were inlined.
    fn witnesses(&self) -> Vec<Function> {
        let all = (0..self.count.min(1 << 16)).filter_map(|index| self.nth(index));
        let inlining = all.filter(|function| {
            function.funcdata(FUNCDATA_INLINED).is_some()
                && function.pcdata(PCDATA_INLINED).is_some_and(|table| table != 0)
        });
        inlining.take(WITNESSES).collect()
    }

    /// Whether the first inlined call of a function makes sense if its data is there.
    fn is_plausible(&self, image: &Image, gofunc: u64, function: &Function) -> bool {
        let Some(entry) = self.inlined_call(image, gofunc, function, 0) else { return false };
        let name = word(entry, self.layout.inlined_name).and_then(|name| usize::try_from(name).ok());
        let starts = name.is_some_and(|name| {
            name.checked_sub(1).is_some_and(|before| self.names.get(before) == Some(&0))
                && self.names.get(name).is_some_and(|byte| *byte != 0)
        });
        let size = function.end - function.entry.min(function.end);
        starts && word(entry, self.layout.inlined_parent).is_some_and(|parent| u64::from(parent) < size)
    }
}

/// `runtime.moduledata` in the file. In a position-independent one its addresses are in the relocations.
struct Module {
    at: u64,
    relocations: Vec<(u64, u64)>,
}

impl Module {
    /// Its first words are the addresses of the table and of the names in it.
    fn find(image: &Image, table: u64, names: u64) -> Option<Self> {
        let data = image.loads().filter(|load| load.p_flags(LE) & PF_X == 0);
        let plain = data.filter_map(|load| {
            let bytes = image.bytes_at(load.p_vaddr(LE))?;
            let words = bytes[..bytes.len().min(MAX_SEARCH)].as_chunks::<8>().0;
            let word = |index: usize| words.get(index).map(|word| u64::from_le_bytes(*word));
            let index = (0..words.len()).find(|i| word(*i) == Some(table) && word(i + 1) == Some(names))?;
            load.p_vaddr(LE).checked_add(index as u64 * 8)
        });
        if let Some(at) = plain.into_iter().next() {
            return Some(Self { at, relocations: Vec::new() });
        }
        let relative = || {
            let sections = image.sections.iter().filter(|section| section.sh_type(LE) == SHT_RELA);
            let relocations = sections
                .filter_map(|section| section.data_as_array::<Rela64<LittleEndian>, _>(LE, image.data).ok())
                .flatten();
            relocations
                .filter(|rela| rela.r_type(LE, false) == R_X86_64_RELATIVE)
                .map(|rela| (rela.r_offset(LE), rela.r_addend(LE).cast_unsigned()))
        };
        let mut starts =
            relative().filter(|(_, value)| *value == table).map(|(at, _)| at).take(MAX_CANDIDATES);
        let at =
            starts.find(|at| relative().any(|pair| Some(pair.0) == at.checked_add(8) && pair.1 == names))?;
        let end = at.checked_add(MODULE_GOFUNC.end * 8)?;
        Some(Self { at, relocations: relative().filter(|(place, _)| (at..end).contains(place)).collect() })
    }

    fn word(&self, image: &Image, index: u64) -> Option<u64> {
        let at = self.at.checked_add(index * 8)?;
        let relocated = self.relocations.iter().find(|(place, _)| *place == at).map(|(_, value)| *value);
        relocated.or_else(|| image.word_at(at)).filter(|value| *value != 0)
    }
}

fn layout(data: &[u8]) -> Option<Layout> {
    HEADERS.iter().find(|(start, _)| data.starts_with(start)).map(|(_, layout)| *layout)
}

/// The table in a file whose sections have no names.
fn by_magic(image: &Image) -> Option<(&'static [u8], u64)> {
    image.loads().filter(|load| load.p_flags(LE) & PF_X == 0).find_map(|load| {
        let bytes = image.bytes_at(load.p_vaddr(LE))?;
        let starts =
            bytes.as_chunks::<8>().0.iter().enumerate().filter(|(_, start)| layout(*start).is_some());
        starts.map(|(index, _)| index * 8).find_map(|at| {
            // The first function name is where the header says.
            let data = &bytes[at..];
            let names = u64::from_le_bytes(*data.get(32..)?.first_chunk()?);
            data.get(usize::try_from(names).ok()?)?;
            Some((data, load.p_vaddr(LE).checked_add(at as u64)?))
        })
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Up to the NUL.
fn string(bytes: &'static [u8], at: u32) -> Option<&'static [u8]> {
    let bytes = bytes.get(at as usize..)?;
    let bytes = &bytes[..bytes.len().min(MAX_NAME)];
    bytes.split(|byte| *byte == 0).next().filter(|name| !name.is_empty())
}

/// At most five bytes, seven bits each.
fn varint(bytes: &mut &'static [u8]) -> Option<u32> {
    let mut value = 0;
    for shift in [0, 7, 14, 21, 28] {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u32::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

//! From addresses to functions and lines: Go's tables, debug information, then symbols.

use addr2line::{Context, demangle_auto};
use gimli::{Dwarf, EndianSlice, LittleEndian};
use object::{
    elf::{SHN_UNDEF, SHT_DYNSYM, SHT_SYMTAB, STT_FUNC, STT_GNU_IFUNC, STT_NOTYPE},
    read::elf::Sym,
};

use super::{
    Module,
    image::{Image, LE},
};
use crate::symbolise::protocol::{MAX_LINES, RawLine};

pub(super) type Debug = Context<EndianSlice<'static, LittleEndian>>;

/// Longest name sent, in bytes; the agent shows less.
const MAX_NAME: usize = 1024;
/// Symbols looked at per table; the largest programs have about a million.
const MAX_SYMBOLS: usize = 4 << 20;

/// Debug information of a file, if it has any.
pub(super) fn debug_of(image: &mut Image) -> Option<Debug> {
    image.sections.section_by_name(LE, b".debug_info")?;
    let dwarf = Dwarf::load(|id| {
        let section = image.sections.section_by_name(LE, id.name().as_bytes());
        let bytes = section.map(|_| image.debug_section(id.name()).ok_or(()));
        Ok::<_, ()>(EndianSlice::new(bytes.transpose()?.unwrap_or_default(), LittleEndian))
    });
    Context::from_dwarf(dwarf.ok()?).ok()
}

/// Names places in a file, each by its offset.
pub(super) fn of(module: &Module, offsets: &[u64], debug: bool) -> Vec<Vec<RawLine>> {
    let addresses: Vec<_> = offsets.iter().map(|offset| module.image.address(*offset)).collect();
    let mut places: Vec<_> = addresses
        .iter()
        .map(|address| {
            let address = (*address)?;
            let go = module.go.as_ref().and_then(|go| go.lines(&module.image, address));
            go.or_else(|| by_debug(module.debug.as_ref().filter(|_| debug)?, address))
        })
        .map(Option::unwrap_or_default)
        .collect();
    // A symbol may be a better alias, or name what the function is in, which line tables do not.
    let may_be_better = |lines: &Vec<RawLine>| {
        lines.last().is_none_or(|line| !line.function.windows(2).any(|pair| pair == b"::"))
    };
    let unnamed: Vec<_> = (0..places.len()).filter(|index| may_be_better(&places[*index])).collect();
    let wanted: Vec<_> = unnamed.iter().map(|index| addresses[*index].unwrap_or(u64::MAX)).collect();
    for (index, name) in unnamed.into_iter().zip(by_symbols(module, &wanted)) {
        let Some(name) = name else { continue };
        let raw = String::from_utf8_lossy(name);
        let demangled = demangle_auto(raw.clone(), None);
        match places[index].last_mut() {
            Some(line) => {
                let is_qualified = demangled != raw && demangled.contains("::");
                let is_alias = line.function.starts_with(b"_") && is_better(name, &line.function);
                if line.function.is_empty() || is_qualified || is_alias {
                    line.function = bounded(&demangled);
                }
            }
            None => places[index].push(RawLine { function: bounded(&demangled), ..RawLine::default() }),
        }
    }
    places
}

fn by_debug(debug: &Debug, address: u64) -> Option<Vec<RawLine>> {
    let mut frames = debug.find_frames(address).skip_all_loads().ok()?;
    let mut lines = Vec::new();
    while let Ok(Some(frame)) = frames.next() {
        let function = frame.function.as_ref().and_then(|name| name.demangle().ok());
        let file = frame.location.as_ref().and_then(|location| location.file);
        lines.push(RawLine {
            function: bounded(&function.unwrap_or_default()),
            file: bounded(file.unwrap_or_default()),
            line: frame.location.as_ref().and_then(|location| location.line).unwrap_or(0),
            inlined: true,
        });
        if lines.len() == MAX_LINES {
            break;
        }
    }
    lines.last_mut()?.inlined = false;
    Some(lines)
}

/// The symbols that cover these addresses, by one look at each table. A symbol without a size covers nothing: in
/// a program stripped in part the nearest one is a wrong name.
fn by_symbols(module: &Module, addresses: &[u64]) -> Vec<Option<&'static [u8]>> {
    let mut found: Vec<Option<&'static [u8]>> = vec![None; addresses.len()];
    if addresses.is_empty() {
        return found;
    }
    let mut wanted: Vec<_> = addresses.iter().copied().zip(0..).collect::<Vec<(u64, usize)>>();
    wanted.sort_unstable();
    let images = [Some(&module.image), module.debug_image.as_ref()];
    for image in images.into_iter().flatten() {
        for kind in [SHT_SYMTAB, SHT_DYNSYM] {
            let Ok(table) = image.sections.symbols(LE, image.data, kind) else { continue };
            for symbol in table.iter().take(MAX_SYMBOLS) {
                let (start, size) = (symbol.st_value(LE), symbol.st_size(LE));
                let is_code = matches!(symbol.st_type(), STT_FUNC | STT_GNU_IFUNC | STT_NOTYPE);
                if size == 0 || !is_code || symbol.st_shndx(LE) == SHN_UNDEF {
                    continue;
                }
                let first = wanted.partition_point(|(address, _)| *address < start);
                let within = wanted[first..].iter().take_while(|(address, _)| address - start < size);
                for (_, index) in within {
                    if let Ok(name) = table.symbol_name(LE, symbol)
                        && found[*index].is_none_or(|other| is_better(name, other))
                    {
                        found[*index] = Some(name);
                    }
                }
            }
        }
    }
    found
}

/// Of the names of one place the one that a programmer writes: `open`, not `__open64`.
fn is_better(name: &[u8], other: &[u8]) -> bool {
    let rank = |name: &[u8]| (name.iter().take_while(|byte| **byte == b'_').count(), name.len());
    // Mangled names begin with an underscore, too, and have no other.
    rank(name) < rank(other)
}

fn bounded(text: &str) -> Vec<u8> {
    text.as_bytes()[..text.len().min(MAX_NAME)].to_vec()
}

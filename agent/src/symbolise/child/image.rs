//! One ELF file, mapped: where its bytes are. Everything in it may be a lie, so every access is checked.

use std::os::fd::OwnedFd;

use object::{
    LittleEndian,
    elf::{FileHeader64, PF_X, PT_LOAD, PT_NOTE, ProgramHeader64, SHT_NOTE},
    read::elf::{CompressionHeader, FileHeader, NoteIterator, ProgramHeader, SectionHeader, SectionTable},
};
use rustix::mm::{MapFlags, ProtFlags, mmap};

pub(super) type Header = FileHeader64<LittleEndian>;
pub(super) const LE: LittleEndian = LittleEndian;

/// Section data made by decompression at most, per file.
const MAX_DECOMPRESSED: u64 = 40 << 20;

/// A file in memory for as long as the worker lives: it is replaced before it holds too much.
pub(super) struct Image {
    pub(super) data: &'static [u8],
    pub(super) segments: &'static [ProgramHeader64<LittleEndian>],
    pub(super) sections: SectionTable<'static, Header>,
    decompressed: u64,
}

impl Image {
    pub(super) fn map(file: &OwnedFd) -> Option<Self> {
        Self::parse(map(file)?)
    }

    fn parse(data: &'static [u8]) -> Option<Self> {
        let header = Header::parse(data).ok()?;
        header.endian().ok()?;
        Some(Self {
            data,
            segments: header.program_headers(LE, data).unwrap_or_default(),
            // They may be stripped or lie beyond the end of the file: segments are enough to unwind.
            sections: header.sections(LE, data).unwrap_or_default(),
            decompressed: 0,
        })
    }

    /// The virtual address of a place in the file, in a segment that is executed.
    pub(super) fn address(&self, offset: u64) -> Option<u64> {
        self.loads().filter(|load| load.p_flags(LE) & PF_X != 0).find_map(|load| {
            let within = offset.checked_sub(load.p_offset(LE))?;
            (within < load.p_filesz(LE)).then(|| load.p_vaddr(LE).checked_add(within))?
        })
    }

    /// The bytes of the file from a virtual address up to the end of the segment.
    pub(super) fn bytes_at(&self, address: u64) -> Option<&'static [u8]> {
        self.loads().find_map(|load| {
            let within = address.checked_sub(load.p_vaddr(LE))?;
            let left = load.p_filesz(LE).checked_sub(within).filter(|left| *left > 0)?;
            let start = usize::try_from(load.p_offset(LE).checked_add(within)?).ok()?;
            let rest = self.data.get(start..)?;
            Some(&rest[..rest.len().min(usize::try_from(left).ok()?)])
        })
    }

    /// The eight bytes at a virtual address.
    pub(super) fn word_at(&self, address: u64) -> Option<u64> {
        Some(u64::from_le_bytes(*self.bytes_at(address)?.first_chunk()?))
    }

    pub(super) fn loads(&self) -> impl Iterator<Item = &'static ProgramHeader64<LittleEndian>> + use<> {
        self.segments.iter().filter(|segment| segment.p_type(LE) == PT_LOAD)
    }

    /// Bytes of a section as they are in the file, and its address.
    pub(super) fn section(&self, name: &[u8]) -> Option<(&'static [u8], u64)> {
        let (_, section) = self.sections.section_by_name(LE, name)?;
        Some((section.data(LE, self.data).ok()?, section.sh_addr(LE)))
    }

    /// Bytes of a section of debug information, decompressed if it has to be.
    pub(super) fn debug_section(&mut self, name: &str) -> Option<&'static [u8]> {
        let (_, section) = self.sections.section_by_name(LE, name.as_bytes())?;
        let Some((header, offset, compressed)) = section.compression(LE, self.data).ok()? else {
            return section.data(LE, self.data).ok();
        };
        self.decompressed = self.decompressed.saturating_add(header.ch_size(LE));
        if self.decompressed > MAX_DECOMPRESSED {
            return None;
        }
        if Vec::<u8>::new().try_reserve_exact(usize::try_from(header.ch_size(LE)).ok()?).is_err() {
            // Other files hold the memory: as with any allocation that fails, a new worker may have more luck.
            std::process::abort();
        }
        let start = usize::try_from(offset).ok()?;
        let data = self.data.get(start..start.checked_add(usize::try_from(compressed).ok()?)?)?;
        let format = match header.ch_type(LE) {
            object::elf::ELFCOMPRESS_ZLIB => object::CompressionFormat::Zlib,
            object::elf::ELFCOMPRESS_ZSTD => object::CompressionFormat::Zstandard,
            _ => return None,
        };
        let whole = object::CompressedData { format, data, uncompressed_size: header.ch_size(LE) };
        Some(Box::leak(whole.decompress().ok()?.into_owned().into_boxed_slice()))
    }

    /// The build id; empty if there is none.
    pub(super) fn build_id(&self) -> &'static [u8] {
        let by_segment = self.segments.iter().filter(|segment| segment.p_type(LE) == PT_NOTE);
        let by_segment = by_segment.filter_map(|segment| segment.notes(LE, self.data).ok()?);
        let by_section = self.sections.iter().filter(|section| section.sh_type(LE) == SHT_NOTE);
        let by_section = by_section.filter_map(|section| section.notes(LE, self.data).ok()?);
        by_segment.chain(by_section).find_map(build_id).unwrap_or_default()
    }
}

fn build_id(mut notes: NoteIterator<'static, Header>) -> Option<&'static [u8]> {
    while let Ok(Some(note)) = notes.next() {
        if note.name() == object::elf::ELF_NOTE_GNU && note.n_type(LE) == object::elf::NT_GNU_BUILD_ID {
            return Some(note.desc()).filter(|id| id.len() <= 64);
        }
    }
    None
}

/// Maps a whole file. Should it become shorter, reading it kills this process: that is what it is for.
fn map(file: &OwnedFd) -> Option<&'static [u8]> {
    let size = rustix::fs::fstat(file).ok()?.st_size;
    let size = usize::try_from(size).ok().filter(|size| *size > 0)?;
    // SAFETY: a new mapping, chosen by the kernel; nothing else is there.
    let start = unsafe {
        mmap(std::ptr::null_mut(), size, ProtFlags::READ, MapFlags::PRIVATE, file, 0).ok()?.cast::<u8>()
    };
    // SAFETY: it is mapped, readable, and never unmapped. That the file may change meanwhile is a race on
    // plain bytes, of which no more is asked than that each read gives some value.
    Some(unsafe { std::slice::from_raw_parts(start, size) })
}

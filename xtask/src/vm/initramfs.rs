//! The initial file system of a virtual machine: an archive that the kernel unpacks into memory.
//!
//! The format is "newc" of cpio, see Documentation/driver-api/early-userspace/buffer-format.rst.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter, Read, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use crate::cmd;

const FOLDER: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
/// The dynamic linker's index: uprobes on a library named without its path are found through it.
const LINKER_CACHE: &str = "/etc/ld.so.cache";

enum Content {
    Folder,
    /// Read when the image is written, so that only one file is in memory at a time.
    Host(PathBuf),
    Bytes(Vec<u8>),
}

/// The files to be, by their path in the guest. The order of the map puts a folder before its content.
#[derive(Default)]
pub(super) struct Image {
    entries: BTreeMap<PathBuf, Content>,
    /// An archive of a distribution, which the kernel unpacks first.
    base: Option<PathBuf>,
}

impl Image {
    /// Everything is laid upon the distribution in this archive, which was made by others and is whole.
    pub(super) fn lay_upon(&mut self, base: PathBuf) {
        self.base = Some(base);
    }

    /// Takes a file of the host, and the shared libraries it needs at the paths they have on the host.
    /// Symbolic links are followed: the guest gets their content.
    pub(super) fn add_file(&mut self, host: &Path, guest: &Path) -> Result<()> {
        for library in libraries(host)? {
            self.add(&library, Content::Host(library.clone()));
        }
        if Path::new(LINKER_CACHE).exists() {
            self.add(LINKER_CACHE.as_ref(), Content::Host(LINKER_CACHE.into()));
        }
        ensure!(guest.is_absolute(), "{} is not an absolute path", guest.display());
        self.add(guest, Content::Host(host.to_owned()));
        Ok(())
    }

    pub(super) fn add_bytes(&mut self, guest: &Path, bytes: Vec<u8>) {
        self.add(guest, Content::Bytes(bytes));
    }

    fn add(&mut self, guest: &Path, content: Content) {
        // A distribution has links to /usr in these places, which the kernel would replace by folders.
        let in_usr = ["/bin", "/lib", "/lib64", "/sbin"].iter().any(|folder| guest.starts_with(folder));
        let moved = (self.base.is_some() && in_usr)
            .then(|| Path::new("/usr").join(guest.strip_prefix("/").unwrap_or(guest)));
        let guest = moved.as_deref().unwrap_or(guest);
        for folder in guest.ancestors().skip(1).filter(|folder| *folder != Path::new("/")) {
            self.entries.insert(folder.to_owned(), Content::Folder);
        }
        self.entries.insert(guest.to_owned(), content);
    }

    pub(super) fn write(&self, to: &Path) -> Result<()> {
        let file = File::create(to).with_context(|| format!("cannot write {}", to.display()))?;
        let mut out = BufWriter::new(file);
        if let Some(base) = &self.base {
            let read = File::open(base).and_then(|mut base| io::copy(&mut base, &mut out));
            read.with_context(|| format!("cannot copy {}", base.display()))?;
        }
        let mut archive = Archive::new(out);
        for (path, content) in &self.entries {
            match content {
                Content::Folder => archive.entry(path, FOLDER | 0o755, &[])?,
                Content::Bytes(bytes) => archive.entry(path, REGULAR | 0o644, bytes)?,
                Content::Host(host) => {
                    let read = || anyhow::Ok((fs::metadata(host)?.permissions().mode(), fs::read(host)?));
                    let (mode, bytes) = read().with_context(|| format!("cannot read {}", host.display()))?;
                    archive.entry(path, REGULAR | mode & 0o7777, &bytes)?;
                }
            }
        }
        archive.finish()
    }
}

/// A "newc" archive that is being written.
struct Archive<W> {
    out: W,
    entries: u32,
}

impl<W: Write> Archive<W> {
    fn new(out: W) -> Self {
        Self { out, entries: 0 }
    }

    fn entry(&mut self, path: &Path, mode: u32, content: &[u8]) -> Result<()> {
        let name = path.strip_prefix("/").unwrap_or(path).as_os_str().as_encoded_bytes();
        self.entries += 1;
        let size = u32::try_from(content.len())
            .with_context(|| format!("{} is too large for an initramfs", path.display()))?;
        let name_size = u32::try_from(name.len() + 1)?;
        let (inode, links) = (self.entries, 1);
        // Inode, mode, uid, gid, links, mtime, size, device (two), device number (two), name, checksum.
        let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
        write!(self.out, "070701")?;
        for field in fields {
            write!(self.out, "{field:08x}")?;
        }
        self.out.write_all(name)?;
        self.out.write_all(b"\0")?;
        // Both the header with the name and the content fill whole words of four bytes.
        self.pad(110 + name.len() + 1)?;
        self.out.write_all(content)?;
        self.pad(content.len())
    }

    fn pad(&mut self, written: usize) -> Result<()> {
        let missing = written.next_multiple_of(4) - written;
        Ok(self.out.write_all(&[0; 3][..missing])?)
    }

    fn finish(mut self) -> Result<()> {
        self.entry(Path::new("TRAILER!!!"), 0, &[])?;
        Ok(self.out.flush()?)
    }
}

/// The shared libraries of an ELF file with a dynamic linker, which is among them; otherwise none.
fn libraries(file: &Path) -> Result<Vec<PathBuf>> {
    let mut magic = [0; 4];
    let elf = File::open(file)
        .with_context(|| format!("cannot read {}", file.display()))?
        .read_exact(&mut magic)
        .is_ok_and(|()| magic == *b"\x7fELF");
    if !elf {
        return Ok(Vec::new());
    }
    let mut ldd = Command::new("ldd");
    ldd.arg(file).env("LC_ALL", "C");
    match cmd::output(&mut ldd) {
        Ok(listing) => parse_ldd(&listing).with_context(|| format!("libraries of {}", file.display())),
        // This is how ldd answers for a statically linked program.
        Err(error) if format!("{error:#}").contains("not a dynamic executable") => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn parse_ldd(listing: &str) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for line in listing.lines() {
        // Either "name => path (address)" or "path (address)"; the kernel's own library has no path.
        let target = line.split_once(" => ").map_or(line, |(_, target)| target).trim();
        if target == "not found" {
            bail!("{}", line.trim());
        }
        if target.starts_with('/') {
            paths.push(target.split(" (").next().unwrap_or(target).into());
        }
    }
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::{Archive, Image, REGULAR, parse_ldd};

    /// The expected bytes follow the kernel's description of the format, field by field.
    #[test]
    fn an_archive_is_newc() {
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes);
        archive.entry(Path::new("/a/file"), REGULAR | 0o755, b"hello").unwrap();
        archive.finish().unwrap();
        let expected = [
            "070701",
            "00000001000081ED00000000000000000000000100000000",
            "0000000500000000000000000000000000000000",
            "0000000700000000a/file\0\0\0\0hello\0\0\0",
            "070701",
            "000000020000000000000000000000000000000100000000",
            "0000000000000000000000000000000000000000",
            "0000000B00000000TRAILER!!!\0\0\0\0",
        ];
        assert_eq!(String::from_utf8(bytes).unwrap().to_uppercase(), expected.concat().to_uppercase());
    }

    #[test]
    fn folders_come_before_their_content() {
        let mut image = Image::default();
        image.add_bytes(Path::new("/b/c/file"), Vec::new());
        image.add_bytes(Path::new("/b/a"), Vec::new());
        let paths: Vec<_> = image.entries.keys().map(|path| path.to_str().unwrap()).collect();
        assert_eq!(paths, ["/b", "/b/a", "/b/c", "/b/c/file"]);
    }

    #[test]
    fn upon_a_distribution_nothing_lands_in_the_place_of_its_links() {
        let mut image = Image::default();
        image.lay_upon(PathBuf::from("/base"));
        image.add_bytes(Path::new("/lib64/ld.so"), Vec::new());
        image.add_bytes(Path::new("/library/file"), Vec::new());
        let paths: Vec<_> = image.entries.keys().map(|path| path.to_str().unwrap()).collect();
        assert_eq!(paths, ["/library", "/library/file", "/usr", "/usr/lib64", "/usr/lib64/ld.so"]);
    }

    #[test]
    fn libraries_are_read_from_ldd() {
        let listing =
            "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/libc.so.6 (0x2)\n\t/lib64/ld.so.2 (0x3)\n";
        assert_eq!(parse_ldd(listing).unwrap(), ["/lib/libc.so.6", "/lib64/ld.so.2"].map(PathBuf::from));
        assert!(parse_ldd("\tstatically linked\n").unwrap().is_empty());
        let error = parse_ldd("\tlibx.so => not found\n").unwrap_err();
        assert_eq!(error.to_string(), "libx.so => not found");
    }
}

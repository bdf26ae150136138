//! Names of compiled code that its process wrote down, one line per function: start, size, name.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom},
    os::fd::OwnedFd,
};

use crate::symbolise::protocol::RawLine;

/// Read of one map at most, in bytes.
const MAX_BYTES: u64 = 32 << 20;
/// A longer line is cut.
const MAX_LINE: u64 = 4096;
/// Longest name of a function or file sent, in bytes; the agent shows less.
const MAX_NAME: usize = 512;

/// Names addresses. Code is compiled again at the same place: the last line that covers an address holds, and of a map
/// that is too long the end counts.
pub(super) fn names(map: OwnedFd, addresses: &[u64]) -> Vec<Vec<RawLine>> {
    names_in_last(MAX_BYTES, map, addresses).unwrap_or_else(|_| vec![Vec::new(); addresses.len()])
}

fn names_in_last(most: u64, map: OwnedFd, addresses: &[u64]) -> io::Result<Vec<Vec<RawLine>>> {
    let mut wanted: Vec<_> = addresses.iter().copied().zip(0..).collect::<Vec<(u64, usize)>>();
    wanted.sort_unstable();
    let mut found = vec![Vec::new(); addresses.len()];
    let mut map = File::from(map);
    // By the end, and not by what the file system says: the worker may ask for no more than this.
    let begin = map.seek(SeekFrom::End(0))?.saturating_sub(most);
    // The byte before says whether the first line is whole.
    map.seek(SeekFrom::Start(begin.saturating_sub(1)))?;
    let mut map = BufReader::with_capacity(1 << 16, map.take(most + 1));
    if begin > 0 {
        map.skip_until(b'\n')?;
    }
    let mut line = Vec::new();
    loop {
        line.clear();
        if map.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        if line.last() != Some(&b'\n') {
            map.skip_until(b'\n')?;
        }
        let Some((start, size, name)) = parse(line.trim_ascii()) else { continue };
        let first = wanted.partition_point(|(address, _)| *address < start);
        let within = wanted[first..].iter().take_while(|(address, _)| address - start < size);
        for (_, index) in within {
            found[*index] = name.to_vec();
        }
    }
    let named = |name: Vec<u8>| if name.is_empty() { Vec::new() } else { vec![line_of(&name)] };
    Ok(found.into_iter().map(named).collect())
}

fn parse(line: &[u8]) -> Option<(u64, u64, &[u8])> {
    let mut words = line.splitn(3, |byte| *byte == b' ');
    let mut number = || {
        let word = str::from_utf8(words.next()?).ok()?;
        u64::from_str_radix(word.strip_prefix("0x").unwrap_or(word), 16).ok()
    };
    let (start, size) = (number()?, number()?);
    Some((start, size, words.next()?))
}

fn line_of(name: &[u8]) -> RawLine {
    let mut line = line_as_written(name);
    line.function.truncate(MAX_NAME);
    line.file.truncate(MAX_NAME);
    line
}

/// Python writes `py::function:file`, Node `kind:function file:line:column`.
fn line_as_written(name: &[u8]) -> RawLine {
    let split = |text: &[u8], at: u8| {
        let at = text.iter().rposition(|byte| *byte == at)?;
        Some((text[..at].to_vec(), text[at + 1..].to_vec()))
    };
    if name.starts_with(b"py::")
        && let Some((function, file)) = split(name, b':').filter(|(function, _)| function.len() > 4)
    {
        return RawLine { function, file, ..RawLine::default() };
    }
    let number = |digits: &[u8]| str::from_utf8(digits).ok()?.parse::<u32>().ok();
    let source = || {
        let (function, place) = split(name, b' ')?;
        let (place, column) = split(&place, b':')?;
        number(&column)?;
        let (file, line) = split(&place, b':')?;
        Some(RawLine { function, file, line: number(&line)?, inlined: false })
    };
    source().unwrap_or_else(|| RawLine { function: name.to_vec(), ..RawLine::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_of_python_and_node_name_their_source() {
        let line = |function: &str, file: &str, line| RawLine {
            function: function.into(),
            file: file.into(),
            line,
            inlined: false,
        };
        assert_eq!(line_of(b"py::Pool.get:/srv/app/pool.py"), line("py::Pool.get", "/srv/app/pool.py", 0));
        assert_eq!(line_of(b"JS:*handle /srv/a b/x.js:12:3"), line("JS:*handle /srv/a", "b/x.js", 12));
        assert_eq!(line_of(b"JS:~open node:fs:550:18"), line("JS:~open", "node:fs", 550));
        assert_eq!(line_of(b"Builtin:Call"), line("Builtin:Call", "", 0));
        assert_eq!(parse(b"7f00 1a py::x y:/z"), Some((0x7f00, 0x1a, &b"py::x y:/z"[..])));
        assert_eq!(parse(b"7f00 nonsense"), None);
    }

    #[test]
    fn the_end_of_a_long_map_counts_from_its_first_whole_line() {
        let text = b"10 10 first\n20 10 second\n10 8 third\n";
        let named = |most| {
            let map = rustix::fs::memfd_create(c"map", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            rustix::io::pwrite(&map, text, 0).unwrap();
            let names = names_in_last(most, map, &[0x25, 0x12, 0x1f, 0x30]).unwrap();
            let name = |lines: &Vec<RawLine>| lines.first().map(|line| line.function.clone());
            names.iter().map(|lines| name(lines).unwrap_or_default()).collect::<Vec<_>>()
        };
        assert_eq!(named(1000), [&b"second"[..], b"third", b"first", b""]);
        assert_eq!(named(text.len() as u64), named(1000));
        assert_eq!(named(text.len() as u64 - 1), [&b"second"[..], b"third", b"", b""]);
        assert_eq!(named(24), [&b"second"[..], b"third", b"", b""], "which begins there");
        assert_eq!(named(23), [&b""[..], b"third", b"", b""]);
        assert_eq!(named(3), [b""; 4]);
    }
}

//! Names of compiled code that its process wrote down, one line per function: start, size, name.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    os::fd::OwnedFd,
};

use crate::symbolise::protocol::RawLine;

/// Read of one map at most, in bytes.
const MAX_BYTES: u64 = 32 << 20;
/// A longer line is cut.
const MAX_LINE: u64 = 4096;

/// Names addresses. Code is compiled again at the same place: the last line that covers an address holds.
pub(super) fn names(map: OwnedFd, addresses: &[u64]) -> Vec<Vec<RawLine>> {
    let mut found = vec![Vec::new(); addresses.len()];
    let mut map = BufReader::with_capacity(1 << 16, File::from(map).take(MAX_BYTES));
    let mut line = Vec::new();
    loop {
        line.clear();
        match map.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        if line.last() != Some(&b'\n') && map.skip_until(b'\n').is_err() {
            break;
        }
        let Some((start, size, name)) = parse(line.trim_ascii()) else { continue };
        for (address, names) in addresses.iter().zip(&mut found) {
            if address.checked_sub(start).is_some_and(|within| within < size) {
                *names = name.to_vec();
            }
        }
    }
    let named = |name: Vec<u8>| if name.is_empty() { Vec::new() } else { vec![line_of(&name)] };
    found.into_iter().map(named).collect()
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

/// Python writes `py::function:file`, Node `kind:function file:line:column`.
fn line_of(name: &[u8]) -> RawLine {
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
}

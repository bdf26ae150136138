//! Bytes that a foreign process chose become text that is safe to print: valid UTF-8, one line, no
//! control characters, bounded.

use std::fmt::Write;

/// Longest text kept of anything a process names, in bytes.
pub(crate) const MAX: usize = 256;

/// Escapes control characters and what is not UTF-8 as `\xNN`, and cuts at `MAX` bytes.
#[must_use]
pub(crate) fn printable(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().min(MAX));
    'whole: for chunk in bytes.utf8_chunks() {
        for char in chunk.valid().chars() {
            if text.len() >= MAX {
                break 'whole;
            }
            if is_harmful(char) {
                let mut utf8 = [0; 4];
                char.encode_utf8(&mut utf8).bytes().for_each(|byte| escape(&mut text, byte));
            } else {
                text.push(char);
            }
        }
        chunk.invalid().iter().for_each(|byte| escape(&mut text, *byte));
    }
    text.truncate(text.floor_char_boundary(MAX));
    text
}

/// As `printable`, of a NUL-terminated field of the kernel.
#[must_use]
pub(crate) fn terminated(bytes: &[u8]) -> String {
    printable(bytes.split(|byte| *byte == 0).next().unwrap_or_default())
}

/// Control characters, and those that reorder or hide the text around them.
pub(crate) fn is_harmful(char: char) -> bool {
    char.is_control()
        || matches!(char, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

fn escape(text: &mut String, byte: u8) {
    // Writing to a String does not fail.
    let _ = write!(text, "\\x{byte:02x}");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_kept_and_tricks_are_shown() {
        assert_eq!(terminated(b"nginx\0garbage"), "nginx");
        assert_eq!(printable("caf\u{e9} 1".as_bytes()), "caf\u{e9} 1");
        assert_eq!(printable(b"a\nb\x1b[2J\xff"), "a\\x0ab\\x1b[2J\\xff");
        assert_eq!(printable("\u{202e}gnp".as_bytes()), "\\xe2\\x80\\xaegnp");
    }

    proptest! {
        #[test]
        fn any_bytes_become_one_bounded_line(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let text = printable(&bytes);
            prop_assert!(text.len() <= MAX);
            prop_assert!(!text.chars().any(char::is_control));
        }
    }
}

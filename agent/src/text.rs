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

/// At most so many letters; what is cut off leaves a `…`.
#[must_use]
pub(crate) fn shortened(text: &str, letters: usize) -> String {
    match text.char_indices().nth(letters) {
        None => text.to_owned(),
        Some(_) => text.chars().take(letters.saturating_sub(1)).chain(['…']).collect(),
    }
}

/// As `shortened`, but not within a word, if that leaves half of the room or more.
#[must_use]
pub(crate) fn shortened_at_word(text: &str, letters: usize) -> String {
    let short = shortened(text, letters);
    let at =
        short.rfind(' ').filter(|at| short.len() < text.len() && short[..*at].chars().count() * 2 >= letters);
    at.map_or(short.clone(), |at| format!("{}…", short[..at].trim_end_matches([' ', ','])))
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

    #[test]
    fn what_is_too_long_is_cut_at_a_word() {
        assert_eq!((shortened("héllo", 5).as_str(), shortened("héllo!", 5).as_str()), ("héllo", "héll…"));
        let text = "leak (a.c:3), called by main";
        assert_eq!(shortened_at_word(text, text.len()), text);
        assert_eq!(shortened_at_word(text, 18), "leak (a.c:3)…");
        assert_eq!(shortened_at_word("very_long_name x", 10), "very_long…");
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

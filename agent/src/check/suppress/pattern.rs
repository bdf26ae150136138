//! A glob of a rule, and its reverse: a glob for a given text.

use globset::{Glob, GlobSet};

use crate::text;

/// Longest glob, in bytes.
pub(super) const MAX_GLOB: usize = 4096;
/// Longest part of a text that a generated glob spells out, in bytes.
const MAX_SPELLED: usize = 1024;
/// Runs of digits at least so long are chance: inodes, pids, ephemeral ports.
const CHANCE_DIGITS: usize = 4;

/// A glob: `*` stands for anything, also `/`; `?`, `[ab]` and `{one,two}` as in the ignore rules of the agent. The
/// text that it is written as matches, too: a name can be copied as it is, `{{closure}}` or not.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    exact: String,
    glob: Option<GlobSet>,
}

impl Pattern {
    /// # Errors
    /// What is wrong with the glob.
    pub(super) fn new(written: &str) -> Result<Self, String> {
        if let Some(exact) = literal(written) {
            return Ok(Self { exact, glob: None });
        }
        // A set of one: a matcher of its own panics where braces are nested too deeply.
        let one = Glob::new(written).map_err(|error| error.kind().to_string())?;
        let set = GlobSet::new([one]).map_err(|error| error.kind().to_string())?;
        Ok(Self { exact: written.to_owned(), glob: Some(set) })
    }

    pub(super) fn matches(&self, text: &str) -> bool {
        self.exact == text || self.glob.as_ref().is_some_and(|glob| glob.is_match(text))
    }
}

fn is_special(char: char) -> bool {
    matches!(char, '*' | '?' | '[' | ']' | '{' | '}' | '\\')
}

/// The one text that a glob without wildcards stands for.
fn literal(written: &str) -> Option<String> {
    let mut chars = written.chars();
    let mut text = String::with_capacity(written.len());
    while let Some(char) = chars.next() {
        match char {
            '\\' => text.push(chars.next()?),
            char if is_special(char) => return None,
            char => text.push(char),
        }
    }
    Some(text)
}

/// A glob for this text, on one line.
#[must_use]
pub(super) fn escaped(text: &str) -> String {
    glob_for(text, usize::MAX)
}

/// As `escaped`, with a wildcard for each number that will be another one the next time.
#[must_use]
pub(super) fn generalised(text: &str) -> String {
    glob_for(text, CHANCE_DIGITS)
}

fn glob_for(text: &str, chance: usize) -> String {
    let mut glob = String::with_capacity(text.len());
    let wild = |glob: &mut String, after_wild: bool| {
        if !after_wild {
            glob.push('*');
        }
        true
    };
    let mut after_wild = false;
    let mut rest = text;
    while let Some(char) = rest.chars().next() {
        if text.len() - rest.len() >= MAX_SPELLED {
            wild(&mut glob, after_wild);
            break;
        }
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let taken = if digits > 0 { digits } else { char.len_utf8() };
        let (part, after) = rest.split_at(taken);
        let at_edge = rest.len() == text.len() || after.is_empty();
        rest = after;
        if digits >= chance || taken > MAX_SPELLED || text::is_harmful(char) {
            after_wild = wild(&mut glob, after_wild);
            continue;
        }
        after_wild = false;
        match char {
            // Spaces around a value do not count.
            ' ' if at_edge => glob.push_str("[ ]"),
            char if is_special(char) => glob.extend(['\\', char]),
            _ => glob.push_str(part),
        }
    }
    glob
}

//! A glob of a rule, and its reverse: a glob for a given text.

use globset::{Glob, GlobSet};

use crate::text;

/// Longest glob, in bytes.
pub(super) const MAX_GLOB: usize = 4096;
/// Longest part of a text that a generated glob spells out, in bytes.
const MAX_SPELLED: usize = 1024;
/// Bytes of a name that the kernel keeps.
const COMM: usize = 15;
/// Runs of digits at least so long are chance: inodes, pids, ephemeral ports.
const CHANCE_DIGITS: usize = 4;

/// A glob: `*` stands for anything, also `/`; `?`, `[ab]` and `{one,two}` as in the ignore rules of the agent. The
/// text that it is written as matches, too: a name can be copied as it is, `{{closure}}` or not.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    exact: String,
    glob: Option<GlobSet>,
    /// Of a path, its last part, where that says something.
    name: Option<Box<Self>>,
}

/// A last part of so many letters and digits says something: `*.log` does, `*` does not.
const TELLING: usize = 3;

impl Pattern {
    /// # Errors
    /// What is wrong with the glob.
    pub(super) fn new(written: &str) -> Result<Self, String> {
        let last = written.strip_prefix('/').and_then(|path| path.rsplit('/').next());
        let tells = |last: &&str| last.chars().filter(char::is_ascii_alphanumeric).count() >= TELLING;
        // What is between braces or brackets may not be whole.
        let name = last.filter(tells).and_then(|last| Self::new(last).ok()).map(Box::new);
        if let Some(exact) = literal(written) {
            return Ok(Self { exact, glob: None, name });
        }
        // A set of one: a matcher of its own panics where braces are nested too deeply.
        let one = Glob::new(written).map_err(|error| error.kind().to_string())?;
        let set = GlobSet::new([one]).map_err(|error| error.kind().to_string())?;
        Ok(Self { exact: written.to_owned(), glob: Some(set), name })
    }

    pub(super) fn matches(&self, text: &str) -> bool {
        self.exact == text || self.glob.as_ref().is_some_and(|glob| glob.is_match(text))
    }

    /// Whether the last part of a path that it stands for may be this.
    pub(super) fn matches_name(&self, name: &str) -> bool {
        self.name.as_ref().is_some_and(|pattern| pattern.matches(name))
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

/// As `escaped`, for the name of a process: without the hash that cargo puts at the end of a test binary's name, of which
/// the kernel keeps as much as has room.
#[must_use]
pub(super) fn without_hash(comm: &str) -> String {
    let hashed = comm.rsplit_once('-').filter(|(name, hash)| {
        let is_hash = hash.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        !name.is_empty() && is_hash && (hash.len() == 16 || hash.len() >= 4 && comm.len() == COMM)
    });
    hashed.map_or_else(|| escaped(comm), |(name, _)| escaped(name) + "-*")
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

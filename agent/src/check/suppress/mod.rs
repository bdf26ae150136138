//! What is known to be no leak, and why: the rules, and which of them holds for a finding.

mod frames;
mod generate;
mod parse;
mod pattern;

use std::{collections::BTreeSet, sync::Arc};

pub(crate) use generate::generate;
use serde::{Serialize, Serializer};

use self::{frames::FrameLine, pattern::Pattern};
use crate::stacks::Function;

/// Longest text of one file, in bytes.
pub(crate) const MAX_FILE: usize = 1 << 20;
/// Most rules of the user, of all files together.
pub(crate) const MAX_RULES: usize = 10_000;

/// Rules that come with plumb, in the format of the user's.
const BUILTIN: &str = include_str!("builtin.supp");
const BUILTIN_FILE: &str = "built-in";

/// What a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    /// Fds open at the end of the process that made them, or more of them after each round.
    Fd,
    /// Fds that another program got by mistake.
    ExecFd,
    /// Threads that ran at the end of their process, or more of them after each round.
    Thread,
    /// A number closed twice.
    DoubleClose,
    /// A number closed that another thread had opened and still used.
    ForeignClose,
    /// Children that nobody waited for.
    Zombie,
    /// Children that ran when the command had ended.
    Orphan,
    /// Threads of processes that did not stop when they were told to.
    Unstopped,
    /// Accepted connections that were open when their process ended after it was told to stop.
    InFlight,
}

impl Kind {
    pub(crate) const ALL: [Self; 9] = [
        Self::Fd,
        Self::ExecFd,
        Self::Thread,
        Self::DoubleClose,
        Self::ForeignClose,
        Self::Zombie,
        Self::Orphan,
        Self::Unstopped,
        Self::InFlight,
    ];

    /// As it is written in files and documents.
    #[must_use]
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Fd => "fd",
            Self::ExecFd => "exec-fd",
            Self::Thread => "thread",
            Self::DoubleClose => "double-close",
            Self::ForeignClose => "foreign-close",
            Self::Zombie => "zombie",
            Self::Orphan => "orphan",
            Self::Unstopped => "unstopped",
            Self::InFlight => "in-flight",
        }
    }

    #[must_use]
    pub(crate) fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.word() == word)
    }
}

impl Serialize for Kind {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.word())
    }
}

/// What rules look at. What is not known or does not apply is empty.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subject<'a> {
    pub kind: Kind,
    /// Name of the process.
    pub comm: &'a str,
    pub syscall: &'a str,
    /// Kind of file as `plumb fds` has it: `file`, `socket`, `pipe`.
    pub resource: &'a str,
    /// A path, or `tcp 127.0.0.1:80 LISTEN`.
    pub target: &'a str,
    /// The type of the thread, see `thread_type`.
    pub thread: &'a str,
    /// Innermost first; what was inlined is an entry of its own.
    pub stack: &'a [Function],
}

/// A field of a rule that is not its stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Comm,
    Syscall,
    Resource,
    Target,
    Thread,
}

impl Field {
    const ALL: [Self; 5] = [Self::Comm, Self::Syscall, Self::Resource, Self::Target, Self::Thread];

    fn word(self) -> &'static str {
        match self {
            Self::Comm => "comm",
            Self::Syscall => "syscall",
            Self::Resource => "resource",
            Self::Target => "target",
            Self::Thread => "thread",
        }
    }

    fn of<'a>(self, subject: &Subject<'a>) -> &'a str {
        match self {
            Self::Comm => subject.comm,
            Self::Syscall => subject.syscall,
            Self::Resource => subject.resource,
            Self::Target => subject.target,
            Self::Thread => subject.thread,
        }
    }
}

/// Tells rules of one `Suppressions` apart: for those who count what each has matched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct RuleId(usize);

/// One block of a file. All that it gives must match.
#[derive(Clone, Debug)]
pub(crate) struct Rule {
    pub id: RuleId,
    pub name: String,
    pub reason: String,
    /// The file it is from, as it was named; `built-in` for plumb's own.
    pub file: Arc<str>,
    /// Where the block begins, from 1.
    pub line: usize,
    kinds: Vec<Kind>,
    fields: Vec<(Field, Pattern)>,
    /// A prefix of the stack.
    stack: Vec<FrameLine>,
}

impl Rule {
    fn matches(&self, subject: &Subject<'_>) -> bool {
        self.kinds.contains(&subject.kind)
            && self.fields.iter().all(|(field, pattern)| {
                let value = field.of(subject);
                // Of a process that had ended before it was looked at only the name of a file is known.
                let is_name = *field == Field::Target && !value.contains('/');
                pattern.matches(value) || is_name && pattern.matches_name(value)
            })
            && frames::matches(&self.stack, subject.stack)
    }
}

/// Why a file is refused, for the person who wrote it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{line}: {cause}; {remedy}")]
pub(crate) struct ParseError {
    pub file: String,
    /// From 1.
    pub line: usize,
    pub cause: String,
    pub remedy: String,
}

/// All rules: the user's, in the order in which they were added, then plumb's own.
#[derive(Clone, Debug)]
pub(crate) struct Suppressions {
    users: Vec<Rule>,
    builtin: Vec<Rule>,
}

impl Suppressions {
    /// None at all, not even plumb's own.
    #[must_use]
    pub(crate) fn none() -> Self {
        Self { users: Vec::new(), builtin: Vec::new() }
    }

    #[must_use]
    pub(crate) fn builtin() -> Self {
        let mut builtin = parse::parse(BUILTIN, BUILTIN_FILE).expect("a test parses the built-in rules");
        number(&mut builtin, 0);
        Self { users: Vec::new(), builtin }
    }

    /// Adds the rules of a file, or none of them when it is refused.
    ///
    /// # Errors
    /// The first line that is wrong, and what to do about it.
    pub(crate) fn add(&mut self, text: &str, file: &str) -> Result<(), ParseError> {
        let mut rules = parse::parse(text, file)?;
        if let Some(over) = rules.get(MAX_RULES - self.users.len()) {
            return Err(ParseError {
                file: file.to_owned(),
                line: over.line,
                cause: format!("there are more than {MAX_RULES} rules"),
                remedy: "put similar ones together with * in their globs".to_owned(),
            });
        }
        number(&mut rules, self.builtin.len() + self.users.len());
        self.users.append(&mut rules);
        Ok(())
    }

    /// The first rule that holds.
    #[must_use]
    pub(crate) fn of(&self, subject: &Subject<'_>) -> Option<&Rule> {
        self.users.iter().chain(&self.builtin).find(|rule| rule.matches(subject))
    }

    /// The user's rules that are not among those that matched.
    pub(crate) fn unused(&self, matched: &BTreeSet<RuleId>) -> impl Iterator<Item = &Rule> {
        self.users.iter().filter(|rule| !matched.contains(&rule.id))
    }
}

fn number(rules: &mut [Rule], first: usize) {
    for (rule, id) in rules.iter_mut().zip(first..) {
        rule.id = RuleId(id);
    }
}

#[cfg(test)]
mod builtin_tests;
#[cfg(test)]
mod tests;

//! The stack of a rule: which functions a line stands for, and whether all lines are the beginning of a stack.

use super::pattern::Pattern;
use crate::stacks::Function;

#[derive(Clone, Debug)]
pub(super) enum FrameLine {
    /// `...`: any number of functions.
    Any,
    /// By its name.
    Fun(Pattern),
    /// By the path of its program or library, or the end of it.
    Obj(Pattern),
    /// By the path of its source, or the end of it, and the line in it.
    Src(Pattern, Option<u32>),
}

impl FrameLine {
    fn matches(&self, function: &Function) -> bool {
        match self {
            Self::Any => true,
            Self::Fun(name) => function.function.as_deref().is_some_and(|it| is_named(name, it)),
            Self::Obj(path) => function.module.as_deref().is_some_and(|it| is_at(path, it)),
            Self::Src(path, line) => {
                function.file.as_deref().is_some_and(|it| is_at(path, it))
                    && line.is_none_or(|line| function.line == Some(line))
            }
        }
    }
}

/// With or without the version of its symbol: `pthread_create@@GLIBC_2.34`.
fn is_named(pattern: &Pattern, name: &str) -> bool {
    pattern.matches(name) || name.split_once('@').is_some_and(|(plain, _)| pattern.matches(plain))
}

fn is_at(pattern: &Pattern, path: &str) -> bool {
    pattern.matches(path) || path.rsplit_once('/').is_some_and(|(_, base)| pattern.matches(base))
}

/// Whether the lines are a prefix of the stack. Only the last `...` is ever tried again: what an earlier one could
/// still give leaves no more of the stack to the rest. So it takes at most lines times functions.
#[must_use]
pub(super) fn matches(lines: &[FrameLine], stack: &[Function]) -> bool {
    let (mut line, mut function) = (0, 0);
    let mut retry = None;
    while let Some(wanted) = lines.get(line) {
        if matches!(wanted, FrameLine::Any) {
            line += 1;
            retry = Some((line, function));
            continue;
        }
        let Some(found) = stack.get(function) else { return false };
        if wanted.matches(found) {
            line += 1;
            function += 1;
            continue;
        }
        let Some((after, from)) = retry else { return false };
        line = after;
        function = from + 1;
        retry = Some((line, function));
    }
    true
}

//! Stacks in words, and as documents.

use serde::{Deserialize, Serialize};

use super::Stack;
use crate::symbolise::{Frame, How};

/// One function of a stack. What was inlined comes before the function it was inlined into.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Function {
    /// As its programmer would write it; `null` without symbols.
    pub function: Option<String>,
    pub file: Option<String>,
    pub line: Option<u32>,
    pub inlined: bool,
    /// Path of the program or library; `null` for code in memory.
    pub module: Option<String>,
    /// In hexadecimal digits.
    pub build_id: Option<String>,
    /// Where in the file, or the address in memory, in hexadecimal digits.
    pub offset: String,
    /// It was found by the frame pointer alone: callers between it and the one before may be missing.
    pub uncertain: bool,
}

impl Function {
    /// `db_connect (pool.c:118)`, `db_connect in libpool.so`, or `libpool.so+0x1a2b`.
    #[must_use]
    pub(crate) fn words(&self) -> String {
        let module = self.module.as_deref().map_or("[memory]", base);
        match (&self.function, &self.file, self.line) {
            (Some(function), Some(file), Some(line)) => format!("{function} ({}:{line})", base(file)),
            (Some(function), ..) => format!("{function} in {module}"),
            _ => format!("{module}+0x{}", self.offset),
        }
    }
}

/// A function and the one that called it: `db_connect (pool.c:118), called by retry (pool.c:90)`.
#[must_use]
pub(crate) fn called(function: &Function, caller: Option<&Function>) -> String {
    match caller {
        Some(caller) => format!("{}, called by {}", function.words(), caller.words()),
        None => function.words(),
    }
}

fn base(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

impl Stack {
    /// Every function, innermost first.
    #[must_use]
    pub(crate) fn functions(&self) -> Vec<Function> {
        self.frames.iter().flat_map(functions).collect()
    }

    /// The function of the program itself that the call is put down to, and the one that called that.
    #[must_use]
    pub(crate) fn headline(&self) -> Option<[Option<Function>; 2]> {
        let (at, index) = self.origin?;
        let known = functions(&self.frames[at]);
        let outer = || self.frames.get(at + 1).and_then(|frame| functions(frame).into_iter().next());
        let caller = known.get(index + 1).cloned().or_else(outer);
        Some([known.into_iter().nth(index), caller])
    }
}

fn functions(frame: &Frame) -> Vec<Function> {
    let function = |line: Option<&crate::symbolise::Line>| Function {
        function: line.map(|line| line.function.clone()).filter(|function| !function.is_empty()),
        file: line.and_then(|line| line.file.clone()),
        line: line.and_then(|line| line.line),
        inlined: line.is_some_and(|line| line.inlined),
        module: frame.module.as_deref().map(str::to_owned),
        build_id: frame.build_id.as_deref().map(str::to_owned),
        offset: format!("{:x}", frame.offset),
        uncertain: frame.how == How::FramePointer,
    };
    if frame.lines.is_empty() {
        return vec![function(None)];
    }
    frame.lines.iter().map(|line| function(Some(line))).collect()
}

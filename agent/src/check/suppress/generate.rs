//! A block that suppresses a finding: for people to give a reason, and to widen.

use std::fmt::Write;

use super::{Field, Subject, parse::NO_REASON, pattern};
use crate::{
    check::interpreter::is_interpreter,
    stacks::Function,
    symbolise::{is_go_standard, is_runtime_file},
    text,
};

/// Most functions of a generated stack.
const FUNCTIONS: usize = 6;

/// Standard libraries of Rust and C++.
const RUNTIME_FUNCTIONS: &[&str] =
    &["std::", "core::", "alloc::", "<std::", "<core::", "<alloc::", "__libc_", "__GI_", "_start"];

/// A block that matches the finding as soon as it has a reason. The stack begins at the first function outside of
/// libc and the standard libraries. Where there is one, the target is left out: it tends to be another one the next
/// time. In an interpreter the functions are its own, and only the target tells one script's line from another's.
#[must_use]
pub(crate) fn generate(subject: &Subject<'_>) -> String {
    let own = own(subject.stack);
    let named = own.iter().find_map(|function| function.function.as_deref());
    let module = own.first().and_then(|function| function.module.as_deref()).unwrap_or_default();
    let tells = named.is_some() && !is_interpreter(module);
    let mut name = format!("{} of {}", subject.kind.word(), plain(subject.comm));
    if let Some(function) = named {
        name = format!("{} in {}", subject.kind.word(), plain(function));
    }
    let mut lines =
        vec![name.trim_end().to_owned(), format!("reason: {NO_REASON}"), subject.kind.word().to_owned()];
    for field in Field::ALL {
        let value = field.of(subject);
        let glob = match field {
            Field::Target if tells => continue,
            Field::Target => pattern::generalised(value),
            Field::Comm => pattern::without_hash(value),
            _ => pattern::escaped(value),
        };
        // Without any field or function a rule would suppress everything, and is refused.
        match (field, glob.as_str()) {
            (Field::Comm, "") => lines.push("comm: *".to_owned()),
            (_, "") => {}
            (field, glob) => lines.push(format!("{}: {glob}", field.word())),
        }
    }
    if !own.is_empty() {
        lines.push("...".to_owned());
    }
    for function in own.iter().take(FUNCTIONS) {
        let line = frame(function);
        // Functions may be missing before one that is uncertain.
        if function.uncertain || line == "..." {
            lines.push("...".to_owned());
        }
        if line != "..." {
            lines.push(line);
        }
    }
    lines.dedup_by(|line, before| line == "..." && before == "...");
    lines.iter().fold("{\n".to_owned(), |mut block, line| {
        // Writing to a String does not fail.
        let _ = writeln!(block, "   {line}");
        block
    }) + "}\n"
}

/// The functions from the first that is the program's own; all of them if none is.
fn own(stack: &[Function]) -> &[Function] {
    let first = stack.iter().position(|function| !is_runtime(function)).unwrap_or(0);
    &stack[first..]
}

fn frame(function: &Function) -> String {
    if let Some(name) = function.function.as_deref().filter(|name| !name.trim().is_empty()) {
        return format!("fun: {}", pattern::escaped(name));
    }
    match function.module.as_deref().map(base) {
        Some(base) if !base.is_empty() => format!("obj: {}", pattern::escaped(base)),
        _ => "...".to_owned(),
    }
}

fn base(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// For the name of a rule: bounded, and on one line.
fn plain(text: &str) -> String {
    text.chars().take(80).map(|char| if text::is_harmful(char) { '?' } else { char }).collect()
}

fn is_runtime(function: &Function) -> bool {
    let file = function.module.as_deref().map(base).unwrap_or_default();
    let name = function.function.as_deref().unwrap_or_default();
    let source = function.file.as_deref().unwrap_or_default();
    is_runtime_file(file)
        || RUNTIME_FUNCTIONS.iter().any(|start| name.starts_with(start))
        || source.contains("/library/") && source.starts_with("/rustc/")
        || source.starts_with("library/std/")
        || (source.ends_with(".go") || source.ends_with(".s")) && is_go_standard(name)
}

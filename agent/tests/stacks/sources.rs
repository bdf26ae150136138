//! The programs that are sampled: building them, and the places that their sources mark.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use plumb::symbolise::{Frame, Symboliser};

/// What a program does, in the order of its phases.
pub(crate) const CALLS: [&str; 9] =
    ["open", "fopen", "socket", "accept", "pipe", "dup", "eventfd", "epoll_create", "pthread_create"];

pub(crate) fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stacks/programs").join(name)
}

/// The line with the mark of this name.
pub(crate) fn marked(name: &str, mark: &str) -> u32 {
    let text = fs::read_to_string(source(name)).unwrap();
    let wanted = format!("MARK {mark}");
    let is_marked = |line: &&str| {
        line.split_once(&wanted)
            .is_some_and(|(_, rest)| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_'))
    };
    let lines: Vec<_> = (1..).zip(text.lines()).filter(|(_, line)| is_marked(line)).map(|(n, _)| n).collect();
    assert_eq!(lines.len(), 1, "{wanted} in {name}");
    lines[0]
}

/// Runs a compiler; its output is the last argument.
pub(crate) fn compile(compiler: &str, arguments: &[&str], source: &Path, program: &str) {
    let output = Command::new(compiler).args(arguments).arg(source).args(["-o", program]).output().unwrap();
    assert!(output.status.success(), "{compiler}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A symboliser with the plumb that is tested as its worker, and without the debug files that this host may have.
pub(crate) fn symboliser() -> Symboliser {
    symboliser_with("/nonexistent")
}

pub(crate) fn symboliser_with(debug_files: &str) -> Symboliser {
    let plumb = env::var_os("PLUMB_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_plumb").into());
    Symboliser::with(plumb, debug_files)
}

/// The functions of a stack that are in a file of this name, as (function, file name, line).
pub(crate) fn own(frames: &[Frame], module: &str) -> Vec<(String, String, u32)> {
    let inside = frames
        .iter()
        .filter(|frame| frame.module.as_deref().is_some_and(|path| path.rsplit('/').next() == Some(module)));
    let lines = inside.flat_map(|frame| frame.lines.iter());
    lines
        .map(|line| {
            let file = line.file.as_deref().and_then(|file| file.rsplit('/').next()).unwrap_or_default();
            (line.function.clone(), file.to_owned(), line.line.unwrap_or(0))
        })
        .collect()
}

/// Frames on one line each.
pub(crate) fn brief(frames: &[Frame]) -> String {
    let mut text = String::new();
    for frame in frames {
        text +=
            &format!("\n  {:?} {}+{:#x}", frame.how, frame.module.as_deref().unwrap_or("-"), frame.offset);
        for line in &*frame.lines {
            let file = line.file.as_deref().unwrap_or("-");
            text += &format!(" {} ({file}:{})", line.function, line.line.unwrap_or(0));
        }
    }
    text
}

/// A function of libc as a programmer calls it.
pub(crate) fn plain(function: &str) -> &str {
    let name = function.trim_start_matches('_');
    name.strip_suffix("64").unwrap_or(name)
}

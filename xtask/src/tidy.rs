//! Rules of the architecture that the compiler does not check, as ordinary tests.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::workspace;

/// A file that is longer has to be listed here with a reason.
const MAX_LINES: usize = 600;

/// Every Rust source below a folder of the workspace, with its text.
fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![workspace().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path.strip_prefix(workspace()).unwrap().to_owned(), text));
            }
        }
    }
    assert!(!found.is_empty(), "no sources in {folder}");
    found
}

/// Lines of code that mention a word, outside comments.
fn mentions<'a>(text: &'a str, word: &str) -> Vec<&'a str> {
    let is_word_byte =
        |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    code.filter(|line| {
        line.match_indices(word).any(|(at, _)| {
            let before = at.checked_sub(1).and_then(|at| line.as_bytes().get(at));
            !is_word_byte(before) && !is_word_byte(line.as_bytes().get(at + word.len()))
        })
    })
    .collect()
}

#[test]
fn only_the_kernel_module_imports_aya() {
    for (path, text) in sources("agent/src") {
        if !path.starts_with("agent/src/kernel") {
            assert_eq!(mentions(&text, "aya"), [""; 0], "{}", path.display());
        }
    }
    assert!(!mentions("use aya::Ebpf;", "aya").is_empty() && mentions("papaya();", "aya").is_empty());
}

/// The core takes values and a clock reading and returns values.
#[test]
fn the_core_does_no_io_and_reads_no_clock() {
    let pure = [
        "agent/src/admission.rs",
        "agent/src/audit.rs",
        "agent/src/check",
        "agent/src/decode.rs",
        "agent/src/table",
        "agent/src/detect",
        "agent/src/losses.rs",
        "agent/src/drain/apply.rs",
        "agent/src/drain/course.rs",
        "agent/src/drain/grants.rs",
        "agent/src/drain/identity.rs",
        "agent/src/drain/machine.rs",
        "agent/src/drain/order.rs",
        "agent/src/drain/preflight.rs",
        "agent/src/drain/registry.rs",
        "agent/src/drain/service.rs",
        "agent/src/origins",
        "agent/src/group.rs",
        "agent/src/left.rs",
        "agent/src/symbolise/origin.rs",
        "agent/src/text.rs",
        "agent/src/thread_type.rs",
    ];
    let impure = ["tokio", "fs", "Instant", "SystemTime", "clock", "thread", "env"];
    for (path, text) in sources("agent/src") {
        let is_test = path.file_stem().is_some_and(|stem| stem.to_string_lossy().ends_with("tests"));
        if pure.iter().any(|pure| path.starts_with(pure)) && !is_test {
            // Tests may name what they want.
            let code = text.split("#[cfg(test)]").next().unwrap_or_default();
            for word in impure {
                let imports = mentions(code, word).into_iter().filter(|line| {
                    line.trim_start().starts_with("use ") || line.contains(&format!("{word}::"))
                });
                assert_eq!(imports.collect::<Vec<_>>(), [""; 0], "{} in {}", word, path.display());
            }
        }
    }
}

/// What a foreign file claims is read by the worker alone, which may die of it.
#[test]
fn only_the_worker_parses_foreign_files() {
    for (path, text) in sources("agent/src") {
        if !path.starts_with("agent/src/symbolise/child") {
            for word in ["object", "gimli", "addr2line"] {
                let uses =
                    mentions(&text, word).into_iter().filter(|line| line.contains(&format!("{word}::")));
                assert_eq!(uses.collect::<Vec<_>>(), [""; 0], "{}", path.display());
            }
        }
    }
}

/// A signal goes through a pidfd whose process was checked; never to a number. The agent sends one only to its own
/// worker and to the services of a drain, `plumb audit` to the process that is named, `plumb check` to the command that it
/// has started.
#[test]
fn nobody_signals_a_pid() {
    let senders = [
        "agent/src/drain/signaller.rs",
        "agent/src/symbolise/worker.rs",
        "agent/src/cli/check/command.rs",
        "agent/src/cli/check/follower.rs",
        "agent/src/cli/check/script.rs",
    ];
    for (path, text) in sources("agent/src") {
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        if !senders.iter().any(|sender| path == Path::new(sender)) {
            assert_eq!(mentions(code, "pidfd_send_signal"), [""; 0], "{}", path.display());
        }
    }
    for (path, text) in sources("agent/src") {
        // A test ends the children that it has started.
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        for word in ["kill", "kill_process", "tgkill", "tkill"] {
            let calls = mentions(code, word).into_iter().filter(|line| line.contains(&format!("{word}(")));
            assert_eq!(calls.collect::<Vec<_>>(), [""; 0], "{}", path.display());
        }
    }
}

#[test]
fn only_the_rim_imports_both_the_kernel_and_the_exporters() {
    for (path, text) in sources("agent/src") {
        let is_rim = path == Path::new("agent/src/daemon.rs") || path.starts_with("agent/src/cli");
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        if !is_rim && (code.contains("kernel::Kernel") || code.contains("kernel::{")) {
            assert!(!code.contains("export::"), "{} imports both ends", path.display());
        }
    }
}

#[test]
fn files_are_short_and_begin_with_what_they_own() {
    for folder in ["agent/src", "common/src", "ebpf/src", "xtask/src"] {
        for (path, text) in sources(folder) {
            let lines = text.lines().count();
            assert!(lines <= MAX_LINES, "{} has {lines} lines", path.display());
            let is_test = path.file_stem().is_some_and(|stem| stem.to_string_lossy().ends_with("tests"));
            assert!(is_test || text.starts_with("//! "), "{} does not say what it owns", path.display());
        }
    }
}

//! Which frame of a stack is the program's own: the first that is not of a runtime or of a standard library.

use super::{Frame, Line};

/// Files of C and C++ runtimes: how their names begin.
const RUNTIME_FILES: &[&str] = &[
    "libc.so",
    "libc-2.",
    "ld-linux",
    "ld-2.",
    "ld-musl",
    "libc.musl",
    "libpthread",
    "libdl",
    "librt",
    "libm.so",
    "libresolv",
    "libstdc++",
    "libc++",
    "libgcc_s",
];

/// Functions of C and C++ runtimes, also where they are linked into the program.
const C_RUNTIME: &[&str] =
    &["std::", "__gnu_cxx::", "__cxxabiv1::", "__libc_", "_IO_", "__GI_", "boost::asio::detail::", "_start"];

/// The wrappers of libc that are linked into a static program, and what they call.
const LIBC_FUNCTIONS: &[&str] = &[
    "accept",
    "accept4",
    "clone",
    "clone3",
    "clone_internal",
    "creat",
    "creat64",
    "create_thread",
    "dup",
    "dup2",
    "dup3",
    "epoll_create",
    "epoll_create1",
    "eventfd",
    "fanotify_init",
    "fcntl",
    "fcntl64",
    "fdopendir",
    "fopen",
    "fopen64",
    "fopen_internal",
    "fork",
    "freopen",
    "freopen64",
    "inotify_init",
    "inotify_init1",
    "memfd_create",
    "mkostemp",
    "mkstemp",
    "mkstemp64",
    "open",
    "open64",
    "openat",
    "openat64",
    "opendir",
    "pidfd_open",
    "pipe",
    "pipe2",
    "popen",
    "posix_openpt",
    "pthread_create",
    "recvmsg",
    "shm_open",
    "signalfd",
    "socket",
    "socketpair",
    "syscall",
    "thrd_create",
    "timerfd_create",
    "tmpfile",
    "tmpfile64",
    "vfork",
    "do_fcntl",
    "do_system",
];

/// How the sources of C libraries begin that are told without the folder in which they were built: glibc's, then musl's.
const LIBC_SOURCES: &[&str] = &[
    "./dirent/",
    "./io/",
    "./libio/",
    "./misc/",
    "./nptl/",
    "./posix/",
    "./rt/",
    "./socket/",
    "./stdio-common/",
    "./stdlib/",
    "./sysdeps/",
    "src/dirent/",
    "src/fcntl/",
    "src/linux/",
    "src/misc/",
    "src/mman/",
    "src/network/",
    "src/process/",
    "src/stdio/",
    "src/temp/",
    "src/thread/",
    "src/unistd/",
];

/// Crates that come between a Rust program and the kernel, beside std.
const RUST_RUNTIME: &[&str] = &["std", "core", "alloc", "tokio", "mio", "rustix", "nix", "libc", "socket2"];

/// The place for a headline: a frame and one of its lines, the first that is the program's own.
#[must_use]
pub fn origin_frame(frames: &[Frame]) -> Option<(usize, usize)> {
    let is_python = |frame: &Frame| frame.lines.first().is_some_and(|line| line.function.starts_with("py::"));
    // Below a function of Python there is its interpreter, or an extension.
    if let Some(python) = frames.iter().position(is_python) {
        let mut native = frames[..python].iter().enumerate().filter(|(_, frame)| !is_interpreter(frame));
        return native.find_map(|(index, frame)| Some((index, own_line(frame)?))).or(Some((python, 0)));
    }
    frames.iter().enumerate().find_map(|(index, frame)| Some((index, own_line(frame)?)))
}

/// Whether a frame is in a file of a C or C++ runtime.
#[must_use]
pub fn is_in_runtime_file(frame: &Frame) -> bool {
    is_runtime_file(file_name(frame))
}

/// Whether a file of this name, without its folder, is of a C or C++ runtime.
pub(crate) fn is_runtime_file(name: &str) -> bool {
    RUNTIME_FILES.iter().any(|start| name.starts_with(start))
}

/// The first line that is not of a runtime; the function itself counts as much as what was inlined into it.
fn own_line(frame: &Frame) -> Option<usize> {
    if is_in_runtime_file(frame) {
        return None;
    }
    let is_node = is_node_file(file_name(frame));
    frame.lines.iter().position(|line| !line.function.is_empty() && !is_runtime(line, is_node))
}

fn file_name(frame: &Frame) -> &str {
    frame.module.as_deref().and_then(|path| path.rsplit('/').next()).unwrap_or_default()
}

fn is_interpreter(frame: &Frame) -> bool {
    let file = file_name(frame);
    let is_standard = frame.module.as_deref().is_some_and(|path| path.contains("/lib-dynload/"));
    file.starts_with("python") || file.starts_with("libpython") || is_standard
}

fn is_runtime(line: &Line, is_node: bool) -> bool {
    let function = line.function.as_str();
    let is_go = line.file.as_deref().is_some_and(|file| file.ends_with(".go") || file.ends_with(".s"));
    if is_go {
        return is_go_standard(function);
    }
    let plain = function.trim_start_matches('_').split("@@").next().unwrap_or_default();
    (LIBC_FUNCTIONS.contains(&plain) && line.file.as_deref().is_none_or(is_libc_source))
        || C_RUNTIME.iter().any(|start| function.starts_with(start))
        || is_rust_runtime(function)
        || line.file.as_deref().is_some_and(is_rust_source)
        || is_node_internal(line, is_node)
}

/// Whether a source is one of a C library: a program may have functions of the same names.
fn is_libc_source(file: &str) -> bool {
    let is_built = file.split('/').any(|part| part.starts_with("glibc") || part.starts_with("musl"));
    // Relative ones are those of a package that was built without its folder.
    let is_relative = !file.starts_with('/') && LIBC_SOURCES.iter().any(|start| file.starts_with(start));
    is_built || file.contains("/sysdeps/") || is_relative
}

/// `std::…`, and `<std::fs::File as …>` or `<F as std::…>`: the type decides, unless it is a parameter.
fn is_rust_runtime(function: &str) -> bool {
    let path = function.trim_start_matches(['<', '&', '*', '[', '(']);
    let path = path.strip_prefix("mut ").or_else(|| path.strip_prefix("dyn ")).unwrap_or(path);
    let of = |path: &str| {
        RUST_RUNTIME.iter().any(|name| path.strip_prefix(name).is_some_and(|rest| rest.starts_with("::")))
    };
    if of(path) {
        return true;
    }
    // `<T as core::ops::FnOnce>::call_once`: glue for a type without a path.
    let implemented = function.strip_prefix('<').and_then(|rest| rest.split_once(" as "));
    implemented.is_some_and(|(kind, of_trait)| !kind.contains("::") && of(of_trait))
}

/// Sources of the standard library, or of such a crate. What was inlined may have no more of a path than this.
fn is_rust_source(file: &str) -> bool {
    let standard = file.starts_with("/rustc/") && file.contains("/library/");
    let package = file.split_once("/registry/src/").and_then(|(_, rest)| rest.split('/').nth(1));
    let of = |package: &str| {
        RUST_RUNTIME.iter().any(|name| {
            package.strip_prefix(name).is_some_and(|rest| {
                rest.starts_with("-") && rest[1..].starts_with(|c: char| c.is_ascii_digit())
            })
        })
    };
    standard || package.is_some_and(of)
}

/// First elements of the import paths of Go's standard library (`go list std`, Go 1.27). Modules of one's own may have
/// names without a dot, too.
const GO_STANDARD: &[&str] = &[
    "archive",
    "arena",
    "bufio",
    "bytes",
    "cmp",
    "compress",
    "container",
    "context",
    "crypto",
    "database",
    "debug",
    "embed",
    "encoding",
    "errors",
    "expvar",
    "flag",
    "fmt",
    "go",
    "hash",
    "html",
    "image",
    "index",
    "internal",
    "io",
    "iter",
    "log",
    "maps",
    "math",
    "mime",
    "net",
    "os",
    "path",
    "plugin",
    "reflect",
    "regexp",
    "runtime",
    "slices",
    "sort",
    "strconv",
    "strings",
    "structs",
    "sync",
    "syscall",
    "testing",
    "text",
    "time",
    "unicode",
    "unique",
    "unsafe",
    "vendor",
    "weak",
];

/// Whether a function of Go is in a package of its standard library.
pub(crate) fn is_go_standard(function: &str) -> bool {
    let function = function.strip_prefix("go:").unwrap_or(function);
    // Type parameters and receivers may hold other paths.
    let head = function.split(['[', '(']).next().unwrap_or_default();
    head.split(['/', '.']).next().is_some_and(|first| GO_STANDARD.contains(&first))
}

/// Whether a file of this name is Node, or a library of it: others may have a namespace `node`.
fn is_node_file(name: &str) -> bool {
    let rest = ["nodejs", "node", "libnode.so", "libuv.so"].iter().find_map(|start| name.strip_prefix(start));
    rest.is_some_and(|version| {
        version.chars().all(|char| char.is_ascii_digit() || char == '.' || char == '-')
    })
}

fn is_node_internal(line: &Line, is_node: bool) -> bool {
    let function = line.function.as_str();
    let has_file = |part: &str| line.file.as_deref().is_none_or(|file| file.contains(part));
    function.starts_with("Builtin:")
        || function.starts_with("Builtins_")
        || function.starts_with("BytecodeHandler:")
        || function.starts_with("v8::")
        || (function.starts_with("node::") && is_node)
        // Many programs have it linked into them.
        || (function.starts_with("uv_") && (is_node || has_file("uv/")))
        || line.file.as_deref().is_some_and(|file| file.starts_with("node:"))
}

#[cfg(test)]
#[path = "origin_tests.rs"]
mod tests;

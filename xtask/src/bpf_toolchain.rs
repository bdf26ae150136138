//! The compiler and linker for the kernel programs, and how they are called.
//!
//! Shared by `xtask` (which installs them) and `agent/build.rs` (which uses them), so it needs nothing
//! but the standard library. Debian 12 ships a compiler with a precompiled `core` for BPF; that is the
//! route taken here, with the linker built against the same LLVM.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

/// Debian's compiler, whatever is first on PATH.
const RUSTC: &str = "/usr/bin/rustc";
const TARGET: &str = "bpfel-unknown-none";
pub(crate) const LINKER_VERSION: &str = "0.13.0";

/// A compiler that can build for BPF.
pub(crate) struct Compiler {
    /// Major version of its LLVM; the linker must have the same.
    pub(crate) llvm: u32,
}

impl Compiler {
    /// Looks for Debian's compiler and its `core` for BPF. `None` when either is missing.
    pub(crate) fn find() -> Option<Self> {
        let sysroot = stdout(Command::new(RUSTC).args(["--print", "sysroot"]))?;
        if !Path::new(sysroot.trim()).join("lib/rustlib").join(TARGET).is_dir() {
            return None;
        }
        let version = stdout(Command::new(RUSTC).arg("-vV"))?;
        let llvm = version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
        Some(Self { llvm: llvm.split('.').next()?.parse().ok()? })
    }
}

/// Where `cargo xtask` installs the linker: another version, or one for another LLVM, lies elsewhere.
pub(crate) fn linker_root(workspace: &Path, compiler: &Compiler) -> PathBuf {
    workspace.join(format!("target/tools/bpf-linker-{LINKER_VERSION}-llvm{}", compiler.llvm))
}

/// The linker that `cargo xtask` has installed, if it is there.
pub(crate) fn linker(workspace: &Path, compiler: &Compiler) -> Option<PathBuf> {
    let linker = linker_root(workspace, compiler).join("bin/bpf-linker");
    linker.is_file().then_some(linker)
}

/// Builds the kernel programs in release mode below `out` and returns the folder of the objects.
#[allow(dead_code, reason = "agent/build.rs compiles, xtask installs")]
pub(crate) fn compile(workspace: &Path, out: &Path) -> Result<PathBuf, String> {
    let missing = |what: &str| {
        format!(
            "{what} is not installed: the kernel programs cannot be built. Run `cargo xtask build` once, as root"
        )
    };
    let compiler = Compiler::find().ok_or_else(|| missing("the compiler for BPF"))?;
    let linker = linker(workspace, &compiler).ok_or_else(|| missing("bpf-linker"))?;
    let flags = [
        r#"--cfg=bpf_target_arch="x86_64""#,
        "-Cdebuginfo=2",
        &format!("-Clinker={}", linker.display()),
        "-Clink-arg=--btf",
    ]
    .join("\x1f");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    cargo
        .current_dir(workspace)
        .args([
            "build",
            "--locked",
            "--release",
            "--package",
            "plumb-ebpf",
            "--target",
            TARGET,
            "--target-dir",
        ])
        .arg(out)
        .env("RUSTC", RUSTC)
        // Lets a stable compiler use the unstable features that aya-ebpf needs.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags);
    // What the outer build means for the host must not reach the inner one.
    for host_only in ["RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTFLAGS", "CARGO_BUILD_TARGET"] {
        cargo.env_remove(host_only);
    }
    let status = cargo.status().map_err(|error| format!("cannot start cargo: {error}"))?;
    if !status.success() {
        return Err("the kernel programs do not build; the compiler's message is above".to_owned());
    }
    Ok(out.join(TARGET).join("release"))
}

fn stdout(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok()
}

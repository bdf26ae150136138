//! Installs what a step needs and is not there yet: one line each, what and why.

use std::{path::Path, process::Command};

use anyhow::{Context, Result, bail};

use crate::{
    bpf_toolchain::{self, Compiler, LINKER_VERSION},
    cmd::run,
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
                "its core library for BPF",
            ),
        ])?;
    }
    if bpf_toolchain::linker(workspace()).is_some() {
        return Ok(());
    }
    let llvm = Compiler::find().context("Debian's compiler for BPF is installed but does not answer")?.llvm;
    install(&[
        package("g++", "/usr/bin/g++", "links LLVM, which is C++, into bpf-linker"),
        package(
            format!("llvm-{llvm}-dev"),
            format!("/usr/lib/llvm-{llvm}/bin/llvm-config"),
            "the LLVM that bpf-linker is built on",
        ),
        package(
            format!("libpolly-{llvm}-dev"),
            format!("/usr/lib/llvm-{llvm}/lib/libPolly.a"),
            "a part of that LLVM which Debian packages apart",
        ),
    ])?;
    eprintln!(
        "xtask: builds bpf-linker {LINKER_VERSION} into target/tools: the linker for BPF (about a minute)"
    );
    run(Command::new(env!("CARGO"))
        .env("LLVM_PREFIX", format!("/usr/lib/llvm-{llvm}"))
        .args(["install", "--quiet", "bpf-linker", "--version", LINKER_VERSION])
        .args(["--no-default-features", "--features", &format!("llvm-{llvm}"), "--root"])
        .arg(bpf_toolchain::tools(workspace())))
}

/// What the tests need beyond the build: real servers, and an emulator for other kernels.
pub(crate) fn for_test() -> Result<()> {
    install(&[
        package("redis-server", "/usr/bin/redis-server", "a real server that must raise no finding"),
        package("nginx-light", "/usr/sbin/nginx", "a real server that must raise no finding"),
        package("prometheus", "/usr/bin/promtool", "promtool checks the metrics page"),
        package("qemu-system-x86", "/usr/bin/qemu-system-x86_64", "runs the tests on other kernels"),
    ])
}

fn install(packages: &[Package]) -> Result<()> {
    let missing: Vec<_> = packages.iter().filter(|package| !Path::new(&package.proof).exists()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !Path::new("/usr/bin/apt-get").exists() {
        let names: Vec<_> = missing.iter().map(|package| package.name.as_str()).collect();
        bail!("this set-up knows Debian only; install the equivalent of: {}", names.join(" "));
    }
    for package in &missing {
        eprintln!("xtask: installs {}: {}", package.name, package.why);
    }
    run(Command::new("apt-get").args(["update", "-qq"]))?;
    run(Command::new("apt-get")
        .args(["install", "-qq", "-y", "--no-install-recommends"])
        .args(missing.iter().map(|package| &package.name))
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdout(std::io::stderr()))?;
    for package in missing {
        if !Path::new(&package.proof).exists() {
            bail!("{} is installed but {} is not there", package.name, package.proof);
        }
    }
    Ok(())
}

/// Refuses to go on without root, with the command that has it.
pub(crate) fn require_root(subcommand: &str) -> Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    bail!(
        "installing packages and loading kernel programs need root. Run:\n  \
         sudo env \"PATH=$PATH\" \"HOME=$HOME\" cargo xtask {subcommand}"
    )
}

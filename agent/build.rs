//! Builds the kernel programs, so that the agent embeds exactly the source it was built from.

#[path = "../xtask/src/bpf_toolchain.rs"]
#[allow(dead_code, reason = "xtask uses the rest")]
mod bpf_toolchain;

use std::{
    env,
    path::Path,
    process::{Command, ExitCode},
};

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("cargo::error={error}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let variable = |name| env::var(name).map_err(|error| format!("{name}: {error}"));
    let agent = variable("CARGO_MANIFEST_DIR")?;
    let workspace = Path::new(&agent).parent().ok_or("agent/ lies in the workspace")?;
    for input in ["ebpf", "common", "Cargo.lock", "xtask/src/bpf_toolchain.rs"] {
        println!("cargo::rerun-if-changed={}", workspace.join(input).display());
    }
    let objects = bpf_toolchain::compile(workspace, &Path::new(&variable("OUT_DIR")?).join("ebpf"))?;
    println!("cargo::rustc-env=PLUMB_EBPF_OBJECT={}", objects.join("plumb-ebpf").display());
    // Of the benchmark only.
    println!("cargo::rustc-env=PLUMB_EBPF_FLOOR_OBJECT={}", objects.join("plumb-ebpf-floor").display());

    let line = |command: &mut Command| {
        let output = command.output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let head = workspace.join(".git/logs/HEAD");
    if head.is_file() {
        println!("cargo::rerun-if-changed={}", head.display());
    }
    let revision = line(Command::new("git").current_dir(workspace).args(["rev-parse", "--short=12", "HEAD"]));
    println!("cargo::rustc-env=PLUMB_REVISION={}", revision.as_deref().unwrap_or("unknown"));
    let rustc = line(Command::new(variable("RUSTC")?).arg("--version"));
    println!("cargo::rustc-env=PLUMB_RUSTC={}", rustc.as_deref().unwrap_or("unknown"));
    Ok(())
}

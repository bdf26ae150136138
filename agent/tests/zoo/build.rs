//! How a program of each language is built and started.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::manifest::{self, Case, Language};

/// The go command; `cargo xtask zoo` installs one and names it here.
const GO: &str = "PLUMB_GO";
const WARNINGS: [&str; 3] = ["-Wall", "-Wextra", "-Werror"];

/// The words that start a program, but for its argument.
pub(crate) type Words = Vec<PathBuf>;

/// Builds what has to be built; for each case how it is started.
pub(crate) fn all(cases: &[Case]) -> Vec<Words> {
    let folder = target().join("zoo");
    fs::create_dir_all(&folder).unwrap();
    cases.iter().map(|case| build(case, &folder)).collect()
}

/// The target folder of cargo: this binary is target/PROFILE/deps/NAME.
fn target() -> PathBuf {
    env::current_exe().unwrap().ancestors().nth(3).unwrap().to_owned()
}

fn build(case: &Case, folder: &Path) -> Words {
    let source = case.source();
    let built = folder.join(case.name());
    match case.language() {
        Language::C => {
            let options = ["-std=gnu11", "-g", "-O2", "-pthread"];
            run(Command::new("gcc").args(options).args(WARNINGS).arg("-o").arg(&built).arg(source));
        }
        Language::Cpp => {
            let options = ["-std=c++17", "-g", "-O2", "-pthread"];
            run(Command::new("g++").args(options).args(WARNINGS).arg("-o").arg(&built).arg(source));
        }
        Language::Go => {
            let go = env::var_os(GO).unwrap_or_else(|| "go".into());
            let common = manifest::folder().join("go/common.go");
            // Nothing but its own standard library, and nothing outside the target folder.
            run(Command::new(go)
                .args(["build", "-o"])
                .arg(&built)
                .arg(common)
                .arg(source)
                .envs([
                    ("GOPROXY", "off"),
                    ("GOTOOLCHAIN", "local"),
                    ("GOFLAGS", "-mod=mod"),
                    ("GOENV", "off"),
                ])
                .env("CGO_ENABLED", "0")
                .env("GOCACHE", folder.join("go-cache"))
                .env("GOPATH", folder.join("go-path")));
        }
        Language::Rust => return vec![target_example(case.name())],
        Language::Python => return vec!["/usr/bin/python3".into(), "-B".into(), source],
        Language::Shell => return vec!["/bin/bash".into(), source],
    }
    vec![built]
}

/// Built by `cargo build --examples`.
fn target_example(name: &str) -> PathBuf {
    env::current_exe().unwrap().parent().unwrap().join("../examples").join(name)
}

fn run(command: &mut Command) {
    let done = command.output();
    let output = done.unwrap_or_else(|error| panic!("{command:?}: {error}; cargo xtask zoo installs it"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

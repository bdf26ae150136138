//! The leak zoo: every program of manifest.toml at the same time, under one agent. As root.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "../support/mod.rs"]
mod support;

mod build;
mod judge;
mod manifest;
mod origins;
mod run;

/// The names of the only programs to run, with blanks between them.
const ONLY: &str = "PLUMB_ZOO";

#[test]
#[ignore = "takes six minutes with nothing beside it: cargo xtask zoo"]
fn every_program_is_judged_as_its_label_says() {
    let only = std::env::var(ONLY).unwrap_or_default();
    let only: Vec<&str> = only.split_ascii_whitespace().collect();
    let mut cases = manifest::read();
    let known = |name: &&&str| cases.iter().any(|case| case.name() == **name);
    assert_eq!(only.iter().find(|name| !known(name)), None, "is not in manifest.toml");
    cases.retain(|case| only.is_empty() || only.contains(&case.name()));

    let programs = build::all(&cases);
    let records = run::all(&cases, &programs);
    println!("{}", judge::table(&cases, &records));
    let faults: Vec<String> = judge::faults(&cases, &records);
    assert!(faults.is_empty(), "{} of {} missed:\n{}", faults.len(), cases.len(), faults.join("\n"));
}

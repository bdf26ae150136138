//! Processes that have exited, live in a mount namespace of their own, or load code later.

use std::{fs, os::unix::process::CommandExt, process::Command};

use plumb::symbolise::{RawStack, Symboliser};
use plumb_common::task::ProcKey;

use crate::{
    sampler,
    sources::{brief, compile, marked, own, source, symboliser},
    support::TempDir,
};

/// The first stack of a program: that of `open`.
fn first(symboliser: &mut Symboliser, command: &mut Command) -> (ProcKey, RawStack) {
    let mut found = None;
    sampler::run(command, &mut |process, sample| {
        if found.is_none() {
            symboliser.attach(process);
            found = Some((process, sample.raw));
        }
    });
    found.unwrap()
}

fn assert_named(symboliser: &mut Symboliser, process: ProcKey, raw: &RawStack) {
    let stack = symboliser.unwind(process, std::slice::from_ref(raw)).remove(0);
    let frames = symboliser.symbolise(&stack);
    let expected = ("call_open".to_owned(), "calls.c".to_owned(), marked("calls.c", "open"));
    assert_eq!(own(&frames, "calls").first(), Some(&expected), "{}", brief(&frames));
}

#[test]
fn stacks_have_names_after_the_process_and_its_program_are_gone() {
    let dir = TempDir::new();
    let program = dir.join("calls");
    compile("gcc", &["-g", "-O2"], &source("calls.c"), &program);
    let mut symboliser = symboliser();
    let (process, raw) = first(&mut symboliser, &mut Command::new(&program));
    fs::remove_file(&program).unwrap();
    assert_named(&mut symboliser, process, &raw);
    symboliser.forget(process);
    let stack = symboliser.unwind(process, &[raw]).remove(0);
    assert_eq!(symboliser.symbolise(&stack).len(), 1, "of a forgotten process only the instruction is known");
}

#[test]
fn a_mount_namespace_has_its_own_files() {
    let dir = TempDir::new();
    // The name means another program inside.
    let (program, inside) = (dir.join("outer/calls"), dir.join("inner/calls"));
    fs::create_dir_all(dir.0.join("outer")).unwrap();
    fs::create_dir_all(dir.0.join("inner")).unwrap();
    compile("gcc", &["-g", "-O2"], &source("calls.c"), &inside);
    fs::copy("/bin/true", &program).unwrap();
    let mut command = Command::new(&program);
    let (from, to) = (dir.join("inner"), dir.join("outer"));
    // SAFETY: the calls do not allocate.
    unsafe {
        command.pre_exec(move || {
            rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS)?;
            rustix::mount::mount_change(
                "/",
                rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC,
            )?;
            rustix::mount::mount_bind(&from, &to)?;
            Ok(())
        });
    }
    let mut symboliser = symboliser();
    let (process, raw) = first(&mut symboliser, &mut command);
    assert_named(&mut symboliser, process, &raw);
}

#[test]
fn the_worker_works_when_the_binary_was_replaced() {
    let dir = TempDir::new();
    let program = dir.join("calls");
    compile("gcc", &["-g", "-O2"], &source("calls.c"), &program);
    // The link that every process has to its own binary, of one whose binary is gone.
    let plumb = dir.join("plumb");
    fs::copy(env!("CARGO_BIN_EXE_plumb"), &plumb).unwrap();
    let mut running =
        Command::new(&plumb).arg("symbolise-worker").stdin(std::process::Stdio::piped()).spawn().unwrap();
    let (_socket, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let _ = running.kill();
    let _ = running.wait();
    let mut running = Command::new(&plumb)
        .arg("symbolise-worker")
        .stdin(std::process::Stdio::from(std::os::fd::OwnedFd::from(theirs)))
        .spawn()
        .unwrap();
    fs::remove_file(&plumb).unwrap();
    fs::write(&plumb, "no program").unwrap();
    let mut symboliser = Symboliser::with(format!("/proc/{}/exe", running.id()), "/usr/lib/debug");
    let (process, raw) = first(&mut symboliser, &mut Command::new(&program));
    assert_named(&mut symboliser, process, &raw);
    running.kill().unwrap();
    running.wait().unwrap();
}

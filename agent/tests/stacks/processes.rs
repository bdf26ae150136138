//! Processes that have exited, live in a mount namespace of their own, or load code later.

use std::{
    fs::{self, File},
    os::{
        fd::OwnedFd,
        unix::{fs::FileExt, net::UnixStream, process::CommandExt},
    },
    process::Command,
    time::{Duration, Instant},
};

use plumb::symbolise::{Line, RawStack, Symboliser};
use plumb_common::task::ProcKey;

use crate::{
    sampler,
    sources::{brief, compile, marked, own, source, symboliser, symboliser_with},
    support::{TempDir, copy_program},
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
    copy_program(env!("CARGO_BIN_EXE_plumb"), &plumb);
    let (_socket, theirs) = UnixStream::pair().unwrap();
    let mut running =
        Command::new(&plumb).arg("symbolise-worker").stdin(OwnedFd::from(theirs)).spawn().unwrap();
    fs::remove_file(&plumb).unwrap();
    fs::write(&plumb, "no program").unwrap();
    let mut symboliser = Symboliser::with(format!("/proc/{}/exe", running.id()), "/usr/lib/debug");
    let (process, raw) = first(&mut symboliser, &mut Command::new(&program));
    assert_named(&mut symboliser, process, &raw);
    running.kill().unwrap();
    running.wait().unwrap();
}

#[test]
fn code_that_was_loaded_after_the_attach_is_named() {
    let dir = TempDir::new();
    let program = dir.join("calls");
    compile("gcc", &["-g", "-O2"], &source("calls.c"), &program);
    let symboliser = std::cell::RefCell::new(symboliser());
    let mut samples = 0;
    // Before its first instruction a program has no libc yet.
    let attach = &mut |process| symboliser.borrow_mut().attach(process);
    let status = sampler::run_from_start(&mut Command::new(&program), attach, &mut |process, sample| {
        if sample.phase == 0 {
            assert_named(&mut symboliser.borrow_mut(), process, &sample.raw);
            samples += 1;
        }
    });
    assert!(status.success() && samples == 1);
}

/// A program of a hundred and more MiB, when it has all of its debug information: `PLUMB_BIG` names such a build.
#[test]
fn plumb_itself_is_named() {
    let plumb = std::env::var("PLUMB_BIG").unwrap_or_else(|_| env!("CARGO_BIN_EXE_plumb").to_owned());
    let (_socket, theirs) = UnixStream::pair().unwrap();
    let mut waiting =
        Command::new(plumb).arg("symbolise-worker").stdin(OwnedFd::from(theirs)).spawn().unwrap();
    // It waits for its first message, and the kernel says where.
    let path = format!("/proc/{}", waiting.id());
    let words = loop {
        let text = fs::read_to_string(format!("{path}/syscall")).unwrap();
        match text.strip_prefix("47 ") {
            Some(words) => break words.to_owned(),
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let mut words = words.split_ascii_whitespace().rev();
    let mut word = || u64::from_str_radix(words.next().unwrap().trim_start_matches("0x"), 16).unwrap();
    let (ip, sp) = (word(), word());
    let mut stack = vec![0; 16 << 10];
    let read = File::open(format!("{path}/mem")).unwrap().read_at(&mut stack, sp).unwrap();
    stack.truncate(read);
    let mut symboliser = symboliser();
    let begun = Instant::now();
    let process = sampler::key(waiting.id());
    let stack = symboliser.unwind(process, &[RawStack { ip, sp, bp: 0, stack }]).remove(0);
    let frames = symboliser.symbolise(&stack);
    println!("{:?}, {:?}", begun.elapsed(), symboliser.counters());
    let lines: Vec<_> = frames.iter().flat_map(|frame| frame.lines.iter()).collect();
    let is_in = |line: &Line, file: &str| line.file.as_deref().is_some_and(|path| path.ends_with(file));
    let receives = lines.iter().position(|line| is_in(line, "symbolise/protocol.rs"));
    let main = lines.iter().position(|line| {
        line.function == "plumb::symbolise::child::main" && is_in(line, "symbolise/child/mod.rs")
    });
    // Without optimisation the stack may be longer than its copy.
    assert!(receives.is_some() && receives < main, "{}", brief(&frames));
    waiting.kill().unwrap();
    waiting.wait().unwrap();
}

#[test]
fn a_debug_file_is_found_by_build_id_and_believed_by_it_alone() {
    let dir = TempDir::new();
    let (program, debug) = (dir.join("calls"), dir.join("calls.debug"));
    compile("gcc", &["-g", "-O2", "-Wl,--build-id=0x0123456789abcdef"], &source("calls.c"), &program);
    let run =
        |arguments: &[&str]| assert!(Command::new("objcopy").args(arguments).status().unwrap().success());
    run(&["--only-keep-debug", &program, &debug]);
    run(&["--strip-all", &program]);
    let place = dir.0.join("right/.build-id/01/23456789abcdef.debug");
    fs::create_dir_all(place.parent().unwrap()).unwrap();
    fs::copy(&debug, place).unwrap();
    let mut right = symboliser_with(&dir.join("right"));
    let (process, raw) = first(&mut right, &mut Command::new(&program));
    assert_named(&mut right, process, &raw);

    // Another program's under the same name.
    let place = dir.0.join("wrong/.build-id/01/23456789abcdef.debug");
    fs::create_dir_all(place.parent().unwrap()).unwrap();
    let id = fs::read(&debug).unwrap();
    let at =
        id.windows(8).position(|bytes| bytes == [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef]).unwrap();
    let mut other = id;
    other[at] = 0xff;
    fs::write(place, other).unwrap();
    let mut wrong = symboliser_with(&dir.join("wrong"));
    let (process, raw) = first(&mut wrong, &mut Command::new(&program));
    let stack = wrong.unwind(process, &[raw]).remove(0);
    let frames = wrong.symbolise(&stack);
    let of_program = frames.iter().find(|frame| frame.module.as_deref() == Some(program.as_str())).unwrap();
    assert!(of_program.lines.is_empty(), "{}", brief(&frames));
    assert_eq!(of_program.build_id.as_deref(), Some("0123456789abcdef"));
}

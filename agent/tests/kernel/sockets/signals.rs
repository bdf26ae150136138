//! The signals of followed processes: made, taken, ignored, lost; who kills; and the end for want of memory.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use plumb_common::{
    sockets::{SIGNAL_DELIVERED, SIGNAL_GENERATED, SIGNAL_NO_MEMORY, Signal},
    task::ProcKey,
};

use super::{PATIENCE, Stage, hands::Holder};
use crate::support::{Running, TempDir};

const TERM: u32 = libc::SIGTERM as u32;
const KILL: u32 = libc::SIGKILL as u32;
/// `SI_KERNEL`.
const BY_KERNEL: u32 = 0x80;

impl Stage {
    /// What was told of the signals of a process, until it has been that many.
    fn signals_of(&mut self, target: ProcKey, many: usize) -> Vec<Signal> {
        let end = Instant::now() + PATIENCE;
        loop {
            self.catch_up();
            let of: Vec<Signal> = self.signals.iter().filter(|one| one.target == target).copied().collect();
            if of.len() >= many {
                return of;
            }
            assert!(Instant::now() < end, "{many}: {of:?}");
            sleep(Duration::from_millis(5));
        }
    }
}

/// What of a signal does not depend on who sent it.
fn words(signals: &[Signal]) -> Vec<(u32, u32, u32, u64)> {
    signals.iter().map(|one| (one.what, one.signal, one.result, one.handler.min(2))).collect()
}

/// A shell that is ready, and has done this first.
fn shell(first: &str) -> (Running, TempDir) {
    let dir = TempDir::new();
    let script = format!("{first}; : > {}; while :; do read x; done", dir.join("ready"));
    let child = Command::new("/bin/sh").args(["-c", &script]).stdin(Stdio::piped()).spawn().unwrap();
    let child = Running(child);
    let end = Instant::now() + PATIENCE;
    while !dir.0.join("ready").exists() {
        assert!(Instant::now() < end);
        sleep(Duration::from_millis(2));
    }
    (child, dir)
}

#[test]
fn a_signal_is_made_and_taken_by_a_handler() {
    let mut stage = Stage::new();
    let (child, _dir) = shell("trap : TERM");
    let target = stage.follow_signals(child.pid());
    child.signal(rustix::process::Signal::TERM);
    let told = stage.signals_of(target, 2);
    assert_eq!(words(&told), [(SIGNAL_GENERATED, TERM, 0, 0), (SIGNAL_DELIVERED, TERM, 0, 2)]);
    let [made, taken] = &told[..] else { unreachable!() };
    assert_eq!(made.header.process.tgid, std::process::id(), "who sent it");
    assert_eq!((taken.header.process, made.code), (target, 0));
    stage.is_complete();
}

#[test]
fn an_ignored_signal_is_told_as_such() {
    let mut stage = Stage::new();
    let (child, _dir) = shell("trap '' TERM");
    let target = stage.follow_signals(child.pid());
    child.signal(rustix::process::Signal::TERM);
    assert_eq!(words(&stage.signals_of(target, 1)), [(SIGNAL_GENERATED, TERM, 1, 0)]);
}

#[test]
fn a_signal_that_nothing_handles_ends_the_process_and_is_not_taken() {
    let mut stage = Stage::new();
    let holder = Holder::start(&[]);
    let target = stage.follow_signals(holder.pid());
    holder.signal(libc::SIGTERM);
    assert_eq!(holder.end(), libc::SIGTERM);
    assert_eq!(words(&stage.signals_of(target, 1)), [(SIGNAL_GENERATED, TERM, 0, 0)]);
}

#[test]
fn a_second_signal_while_one_waits_is_told_as_such() {
    let mut stage = Stage::new();
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "read x"]).stdin(Stdio::piped());
    // SAFETY: the calls are allowed between fork and exec.
    unsafe {
        command.pre_exec(|| {
            let mut term: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut term);
            libc::sigaddset(&raw mut term, libc::SIGTERM);
            libc::sigprocmask(libc::SIG_BLOCK, &raw const term, std::ptr::null_mut());
            Ok(())
        });
    }
    let child = Running(command.spawn().unwrap());
    let target = stage.follow_signals(child.pid());
    (0..3).for_each(|_| child.signal(rustix::process::Signal::TERM));
    let told = words(&stage.signals_of(target, 3));
    assert_eq!(told, [0, 2, 2].map(|result| (SIGNAL_GENERATED, TERM, result, 0)));
}

#[test]
fn who_kills_is_named() {
    let mut stage = Stage::new();
    let holder = Holder::start(&[]);
    let target = stage.follow_signals(holder.pid());
    let killer = Command::new("/bin/sh").args(["-c", &format!("kill -9 {}", holder.pid())]).spawn().unwrap();
    let pid = killer.id();
    assert!(Running(killer).0.wait().unwrap().success());
    assert_eq!(holder.end(), libc::SIGKILL);
    let told = stage.signals_of(target, 1);
    assert_eq!(words(&told), [(SIGNAL_GENERATED, KILL, 0, 0)]);
    assert_eq!(told[0].header.process.tgid, pid);
    assert!(told[0].header.comm.starts_with(b"sh\0"), "{:?}", told[0].header.comm);
}

#[test]
fn the_signals_of_others_are_not_told() {
    let mut stage = Stage::new();
    let (ours, theirs) = (Holder::start(&[]), Holder::start(&[]));
    let target = stage.follow_signals(ours.pid());
    theirs.signal(libc::SIGKILL);
    theirs.end();
    ours.signal(libc::SIGTERM);
    ours.end();
    stage.signals_of(target, 1);
    assert!(stage.signals.iter().all(|signal| signal.target == target), "{:?}", stage.signals);
}

/// A cgroup whose memory is limited; nothing where the kernel or this host has no such controller.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(bytes: u64) -> Option<Self> {
        let name = format!("plumb-test-{}", std::process::id());
        let (v1, v2) = (PathBuf::from("/sys/fs/cgroup/memory"), PathBuf::from("/sys/fs/cgroup"));
        let is_v1 = v1.join("memory.limit_in_bytes").exists();
        if !is_v1 {
            let controllers = fs::read_to_string(v2.join("cgroup.controllers")).ok()?;
            controllers.split_whitespace().find(|one| *one == "memory")?;
            fs::write(v2.join("cgroup.subtree_control"), "+memory").ok()?;
        }
        let cgroup = Self(if is_v1 { v1 } else { v2 }.join(name));
        fs::create_dir(&cgroup.0).ok()?;
        let limit = if is_v1 { "memory.limit_in_bytes" } else { "memory.max" };
        fs::write(cgroup.0.join(limit), bytes.to_string()).ok()?;
        Some(cgroup)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let end = Instant::now() + PATIENCE;
        while fs::remove_dir(&self.0).is_err() && Instant::now() < end {
            sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn who_is_killed_for_want_of_memory_is_told_as_such() {
    let Some(cgroup) = Cgroup::new(16 << 20) else {
        eprintln!("no cgroups with memory here: not tried");
        return;
    };
    let mut stage = Stage::new();
    let script = format!(
        "echo $$ > {}/cgroup.procs; read go; x=0123456789abcdef; while :; do x=$x$x; done",
        cgroup.0.display()
    );
    let mut child =
        Running(Command::new("/bin/sh").args(["-c", &script]).stdin(Stdio::piped()).spawn().unwrap());
    let target = stage.follow_signals(child.pid());
    std::io::Write::write_all(child.0.stdin.as_mut().unwrap(), b"\n").unwrap();
    let status = child.0.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL));
    stage.catch_up();
    let is_victim = |one: &&Signal| one.what == SIGNAL_NO_MEMORY && one.target.tgid == target.tgid;
    let victims: Vec<Signal> = stage.signals.iter().filter(is_victim).copied().collect();
    let [victim] = &victims[..] else { panic!("{:?}", stage.signals) };
    // Before 6.9 the kernel tells only its number.
    assert!([target.start_boottime, 0].contains(&victim.target.start_boottime), "{victim:?}");
    let kill: Vec<Signal> = stage.signals.iter().filter(|one| one.target == target).copied().collect();
    let made = kill.iter().find(|one| one.what == SIGNAL_GENERATED).unwrap();
    assert_eq!((made.signal, made.code), (KILL, BY_KERNEL));
    drop(child);
}

//! Takes the registers and the stack of a program at the end of its syscalls, by ptrace: what the kernel programs
//! of plumb see there.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{Error, ErrorKind},
    os::unix::{
        fs::FileExt,
        process::{CommandExt, ExitStatusExt},
    },
    process::{Command, ExitStatus},
};

use plumb::symbolise::RawStack;
use plumb_common::task::ProcKey;

/// The first argument of prctl by which a program says what it does next.
const PHASE: u64 = 0x706c_756d;
/// Bytes of stack in a sample.
const STACK: usize = 16 << 10;
/// Calls whose result is an fd or a thread.
const MAKERS: [i64; 20] = [
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_socket,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_pipe,
    libc::SYS_pipe2,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_eventfd,
    libc::SYS_eventfd2,
    libc::SYS_epoll_create,
    libc::SYS_epoll_create1,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_socketpair,
    libc::SYS_memfd_create,
    libc::SYS_fcntl,
    libc::SYS_timerfd_create,
];

pub(crate) struct Sample {
    /// What the program said.
    pub(crate) phase: i64,
    pub(crate) raw: RawStack,
}

/// What becomes of a sample while its process stands still.
pub(crate) type Take<'a> = &'a mut dyn FnMut(ProcKey, Sample);

/// Runs a program to its end, which is a good one, and samples each first maker of a phase.
pub(crate) fn run(command: &mut Command, take: Take<'_>) {
    let status = run_to_any_end(command, take);
    assert!(status.success(), "{status:?}");
}

#[expect(clippy::zombie_processes, reason = "it is waited for with its threads")]
pub(crate) fn run_to_any_end(command: &mut Command, take: Take<'_>) -> ExitStatus {
    // SAFETY: only async-signal-safe calls between fork and exec.
    unsafe {
        command.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) {
            0 => Ok(()),
            _ => Err(Error::last_os_error()),
        });
    }
    let child = command.spawn().unwrap();
    let leader = i32::try_from(child.id()).unwrap();
    let status = wait_for(leader);
    assert_eq!(status.stopped_signal(), Some(libc::SIGTRAP), "{status:?}");
    let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_EXITKILL;
    trace(libc::PTRACE_SETOPTIONS, leader, u64::try_from(options).unwrap());
    trace(libc::PTRACE_SYSCALL, leader, 0);
    let key = key(child.id());
    let memory = File::open(format!("/proc/{leader}/mem")).unwrap();
    let (mut phase, mut entered) = (-1, BTreeSet::new());
    loop {
        let (thread, status) = match wait() {
            Ok(event) => event,
            Err(error) => panic!("{error}"),
        };
        if status.code().is_some() || status.signal().is_some() {
            if thread == leader {
                return status;
            }
            continue;
        }
        let stopped = status.stopped_signal().unwrap();
        if stopped == libc::SIGTRAP | 0x80 {
            // Entry and exit take turns.
            if entered.insert(thread) {
                trace(libc::PTRACE_SYSCALL, thread, 0);
                continue;
            }
            entered.remove(&thread);
            let registers = registers(thread);
            let syscall = registers.orig_rax.cast_signed();
            if syscall == libc::SYS_prctl && registers.rdi == PHASE {
                phase = registers.rsi.cast_signed();
            }
            if phase >= 0 && MAKERS.contains(&syscall) && registers.rax.cast_signed() >= 0 {
                let mut stack = vec![0; STACK];
                let read = memory.read_at(&mut stack, registers.rsp).unwrap();
                stack.truncate(read);
                let raw = RawStack { ip: registers.rip, sp: registers.rsp, bp: registers.rbp, stack };
                take(key, Sample { phase, raw });
                phase = -1;
            }
        }
        // A new thread begins with a stop of its own, and signals go on to the program.
        let is_event = stopped & 0x7f == libc::SIGTRAP || stopped == libc::SIGSTOP;
        trace(libc::PTRACE_SYSCALL, thread, if is_event { 0 } else { u64::try_from(stopped).unwrap() });
    }
}

/// Identity of a process as plumb has it, to the precision of /proc.
pub(crate) fn key(pid: u32) -> ProcKey {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let ticks: u64 =
        stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().nth(19).unwrap().parse().unwrap();
    ProcKey { start_boottime: ticks * 10_000_000, tgid: pid, reserved: 0 }
}

fn wait() -> Result<(i32, ExitStatus), Error> {
    let mut status = 0;
    // The test binary has other tests with children of their own: only those of this thread.
    // SAFETY: `status` is valid for the call.
    let thread = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL | libc::__WNOTHREAD) };
    if thread < 0 {
        let error = Error::last_os_error();
        return if error.kind() == ErrorKind::Interrupted { wait() } else { Err(error) };
    }
    Ok((thread, ExitStatus::from_raw(status)))
}

fn wait_for(process: i32) -> ExitStatus {
    let mut status = 0;
    // SAFETY: `status` is valid for the call.
    assert_eq!(unsafe { libc::waitpid(process, &raw mut status, libc::__WALL) }, process);
    ExitStatus::from_raw(status)
}

fn trace(request: libc::c_uint, thread: i32, data: u64) {
    // SAFETY: these requests write no memory of this process. A thread may have been killed meanwhile.
    unsafe { libc::ptrace(request, thread, 0, data) };
}

fn registers(thread: i32) -> libc::user_regs_struct {
    // SAFETY: all zeros are a value of this plain struct.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    // SAFETY: the struct is valid for the call.
    unsafe { libc::ptrace(libc::PTRACE_GETREGS, thread, 0, &raw mut registers) };
    registers
}

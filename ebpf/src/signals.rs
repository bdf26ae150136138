//! Who sends which signal to a followed process, and what takes it; and who kills.
#![allow(clippy::needless_pass_by_value, reason = "the attribute macro passes the context by value")]

use aya_ebpf::{EbpfContext, macros::btf_tracepoint, programs::BtfTracePointContext};
use plumb_common::{
    counts,
    event::KIND_SIGNAL,
    offsets,
    sockets::{SIGNAL_DELIVERED, SIGNAL_GENERATED, SIGNAL_NO_MEMORY, Signal},
    task::ProcKey,
};

use crate::{
    emit,
    kernel::{self, Typed},
    maps,
};

const KILL: u32 = 9;
/// In the place of a `siginfo` (include/linux/signal.h): by kill(2) from user space, and by the kernel.
const NO_INFO: u64 = 0;
const PRIVILEGED: u64 = 1;
/// `SI_KERNEL`.
const BY_KERNEL: u32 = 0x80;

/// Whether a process is followed; another one of its number is not.
#[inline(always)]
fn is_followed(process: ProcKey) -> bool {
    // SAFETY: the value is read at once.
    unsafe { maps::TARGETS.get(process.tgid) }.is_some_and(|start| *start == process.start_boottime)
}

/// `void signal_generate(int sig, struct kernel_siginfo *info, struct task_struct *task, int group, int result)`, since
/// 3.3. Runs in the sender.
#[btf_tracepoint(function = "signal_generate")]
pub(crate) fn signal_generate(ctx: BtfTracePointContext) -> i32 {
    let (signal, info, task, result): (u32, Typed, Typed, u32) =
        (ctx.arg(0), ctx.arg(1), ctx.arg(2), ctx.arg(4));
    // SAFETY: the tracepoint's argument is a live task.
    let Some(target) = (unsafe { kernel::process_of(task) }) else { return 0 };
    let is_wanted = signal == KILL && maps::kills() || is_followed(target);
    if !is_wanted {
        return 0;
    }
    let code = match info as u64 {
        NO_INFO => 0,
        PRIVILEGED => BY_KERNEL,
        info => kernel::read::<u32>(info, offsets::SIGINFO_CODE).unwrap_or(0),
    };
    let header = emit::by_anybody(KIND_SIGNAL);
    let what = SIGNAL_GENERATED;
    emit::send(counts::SIGNAL, Signal { header, target, handler: 0, what, signal, code, result });
    0
}

/// `void signal_deliver(int sig, struct kernel_siginfo *info, struct k_sigaction *ka)`, since 3.3. Runs in the thread that
/// takes the signal.
#[btf_tracepoint(function = "signal_deliver")]
pub(crate) fn signal_deliver(ctx: BtfTracePointContext) -> i32 {
    let (signal, action): (u32, u64) = (ctx.arg(0), ctx.arg(2));
    // Nobody takes that one: each thread of a process that ends, for whatever reason, is told so.
    if signal == KILL {
        return 0;
    }
    let tgid = (aya_ebpf::helpers::bpf_get_current_pid_tgid() >> 32) as u32;
    // SAFETY: as above.
    if unsafe { maps::TARGETS.get(tgid) }.is_none() {
        return 0;
    }
    let header = emit::by_anybody(KIND_SIGNAL);
    let target = header.process;
    if !is_followed(target) {
        return 0;
    }
    let handler = kernel::read::<u64>(action, offsets::SIGACTION_HANDLER).unwrap_or(0);
    let what = SIGNAL_DELIVERED;
    emit::send(counts::SIGNAL, Signal { header, target, handler, what, signal, code: 0, result: 0 });
    0
}

/// `void mark_victim(struct task_struct *task, uid_t uid)`, since 4.17; before 6.9 `void mark_victim(int pid)`. Runs in
/// whoever wanted the memory.
#[btf_tracepoint(function = "mark_victim")]
pub(crate) fn mark_victim(ctx: BtfTracePointContext) -> i32 {
    // By the helper: a pointer may not be taken for a number by the verifier.
    let Some(victim) = kernel::read_at::<u64>(ctx.as_ptr() as u64) else { return 0 };
    let tgid = kernel::read::<u32>(victim, offsets::TASK_TGID).unwrap_or(victim as u32);
    let leader = kernel::read::<u64>(victim, offsets::TASK_GROUP_LEADER).unwrap_or(0);
    let start = kernel::read::<u64>(leader, offsets::TASK_START_BOOTTIME).unwrap_or(0);
    let (header, target) = (emit::by_anybody(KIND_SIGNAL), ProcKey::new(tgid, start));
    let what = SIGNAL_NO_MEMORY;
    emit::send(
        counts::SIGNAL,
        Signal { header, target, handler: 0, what, signal: KILL, code: BY_KERNEL, result: 0 },
    );
    0
}

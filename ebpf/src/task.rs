//! Clone, exec, rename and exit. Their hooks cost nothing to whoever does none of it, so they are always
//! attached.
#![allow(clippy::needless_pass_by_value, reason = "the attribute macro passes the context by value")]

use aya_ebpf::{macros::btf_tracepoint, programs::BtfTracePointContext};
use plumb_common::{
    counts,
    event::{self, CLONE_THREAD, KIND_CLONE, KIND_EXEC, KIND_EXIT, KIND_RENAME, Watch},
    limits::COMM_LEN,
    offsets,
    task::ProcKey,
};

use crate::{
    emit,
    kernel::{self, Typed},
    maps, regs, stack,
};

/// `signal_struct.flags`, include/linux/sched/signal.h.
const SIGNAL_GROUP_EXIT: u32 = 4;

/// `void task_newtask(struct task_struct *task, unsigned long clone_flags)`, since 3.8. Runs in the
/// creator, after the child can be seen. Unlike `sched_process_fork` it has the flags.
#[btf_tracepoint(function = "task_newtask")]
pub(crate) fn task_newtask(ctx: BtfTracePointContext) -> i32 {
    let child: Typed = ctx.arg(0);
    let flags: u64 = ctx.arg(1);
    let Some(header) = emit::by_current(counts::CLONE, KIND_CLONE) else { return 0 };
    // SAFETY: the tracepoint's argument is a live task.
    let (process, tid) = unsafe { (kernel::process_of(child), kernel::load(child, offsets::TASK_PID)) };
    let (Some(process), Some(child_tid)) = (process, tid) else {
        emit::count(counts::CLONE, counts::FAULT);
        return 0;
    };
    let is_thread = flags & CLONE_THREAD != 0;
    if is_thread {
        stack::take(&header, child_tid);
    } else if maps::tree() {
        stack::take_of_fork(&header, child_tid, flags);
    }
    // Before it runs, so that nothing it does is missed.
    let left_out = u32::from(maps::tree() && !is_thread && !follow(process));
    emit::send(counts::CLONE, event::Clone { header, child: process, flags, child_tid, left_out });
    0
}

/// Watches one more process of a tree; false when there is no room.
#[inline(always)]
fn follow(process: ProcKey) -> bool {
    let watch = Watch { start_boottime: process.start_boottime, second: 0, taken: 0, stacks: 1 };
    maps::WATCHED.insert(process.tgid, watch, 0).is_ok()
}

/// `void sched_process_exec(struct task_struct *p, pid_t old_pid, struct linux_binprm *bprm)`, since 3.4.
/// Runs in the new image, which is the leader by now, after close-on-exec.
#[btf_tracepoint(function = "sched_process_exec")]
pub(crate) fn sched_process_exec(ctx: BtfTracePointContext) -> i32 {
    let old_tid: u32 = ctx.arg(1);
    if let Some(header) = emit::by_current(counts::EXEC, KIND_EXEC) {
        if maps::tree() {
            stack::table(&header);
        }
        emit::send(counts::EXEC, event::Exec { header, old_tid, reserved: 0 });
    }
    0
}

/// `void task_rename(struct task_struct *task, const char *comm)`, since 3.8; 6.14 adds an argument. The
/// task may be another thread of the writer's process (/proc/PID/task/TID/comm).
#[btf_tracepoint(function = "task_rename")]
pub(crate) fn task_rename(ctx: BtfTracePointContext) -> i32 {
    let task: Typed = ctx.arg(0);
    let new: u64 = ctx.arg(1);
    let mut comm = [0; COMM_LEN];
    kernel::read_str(new, &mut comm);
    // SAFETY: the tracepoint's argument is a live task.
    if let Some(header) = unsafe { emit::about(counts::RENAME, KIND_RENAME, task, comm) } {
        emit::send(counts::RENAME, event::Rename { header });
    }
    0
}

/// `void sched_process_exit(struct task_struct *p)`, since 2.6.24; 6.15 adds `bool group_dead`, which older
/// kernels tell by `signal->live == 0`: it was decremented before. Runs in the exiting thread, before its
/// fd table is released.
#[btf_tracepoint(function = "sched_process_exit")]
pub(crate) fn sched_process_exit(ctx: BtfTracePointContext) -> i32 {
    let task: Typed = ctx.arg(0);
    let Some(header) = emit::by_current(counts::EXIT, KIND_EXIT) else { return 0 };
    // SAFETY: the tracepoint's argument is a live task; its signal struct outlives it.
    let (live, flags, code) = unsafe {
        let signal = kernel::follow(task, offsets::TASK_SIGNAL);
        (
            signal.and_then(|signal| kernel::load::<u32>(signal, offsets::SIGNAL_LIVE)),
            signal.and_then(|signal| kernel::load::<u32>(signal, offsets::SIGNAL_FLAGS)).unwrap_or(0),
            kernel::load::<u32>(task, offsets::TASK_EXIT_CODE),
        )
    };
    let (Some(live), Some(code)) = (live, code) else {
        emit::count(counts::EXIT, counts::FAULT);
        return 0;
    };
    let group_exit = u32::from(flags & SIGNAL_GROUP_EXIT != 0);
    let called = u32::from(maps::tree() && regs::is_exiting_group());
    let process = header.process;
    if maps::tree() && live == 0 {
        stack::table(&header);
    }
    emit::send(
        counts::EXIT,
        event::Exit { header, code, group_dead: u32::from(live == 0), group_exit, called },
    );
    if maps::tree() && live == 0 {
        // Not there any more when another thread, which ended at the same time, was the first to say so.
        let _ = maps::WATCHED.remove(process.tgid);
    }
    0
}

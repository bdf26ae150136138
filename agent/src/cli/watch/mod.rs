//! `plumb watch`: process, thread and fd events as they happen. The fd program is attached for as long
//! as somebody listens.

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use clap::{Args, ValueEnum};
use plumb_common::{limits::COMM_LEN, syscalls};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};
use tokio_util::sync::CancellationToken;

mod printer;
mod sockets;

use self::printer::Printer;
pub(super) use self::sockets::{Followed, SLOT};
use super::{
    Outcome, no_such_process,
    output::{self, Output},
};
use crate::{
    decode::Event,
    failure::{Exit, Failure},
    kernel::{Fds, Filter, Kernel, LoadError, Plan, Seam},
    view,
};

/// How long an event may wait before it is printed.
const TICK: Duration = Duration::from_millis(100);
const BATCH: usize = 4096;
/// Between two looks at the ledger.
const LEDGER_EVERY: Duration = Duration::from_secs(1);

#[derive(Args)]
#[command(after_help = followed())]
pub(super) struct Arguments {
    /// Only this process; ends with it
    #[arg(long, short)]
    pid: Option<u32>,
    /// Only processes of this name (at most 15 bytes, as in `plumb ps`)
    #[arg(long, short, value_parser = comm, conflicts_with = "pid")]
    comm: Option<[u8; COMM_LEN]>,
    /// End after this time, such as 10s or 5m
    #[arg(long = "for", value_name = "DURATION", value_parser = duration)]
    duration: Option<Duration>,
    /// Count events instead of printing them; the sums come at the end
    #[arg(long)]
    count: bool,
    /// Say of each new fd and thread of the process which line of code made it, and at the end where those that
    /// are left came from
    #[arg(long, requires = "pid", conflicts_with = "comm")]
    origins: bool,
    /// Instead, say what becomes of the process's connections, listeners and signals, and those of its descendants: which
    /// requests are lost, and who kills it
    #[arg(long, requires = "pid", conflicts_with_all = ["comm", "origins", "via", "count"])]
    sockets: bool,
    /// Attach the fd programs this way and no other [default: functions, or else sys_exit]
    #[arg(long, value_enum, value_name = "WAY")]
    via: Option<Via>,
    #[command(flatten)]
    output: Output,
}

/// How fds are followed.
#[derive(Clone, Copy, ValueEnum)]
enum Via {
    /// The kernel's own functions: every way an fd comes or goes, free for other syscalls
    Functions,
    /// The results of syscalls: works where the functions cannot be attached
    #[value(name = "sys_exit")]
    SysExit,
}

/// What the stream covers, so that nobody takes silence for absence.
fn followed() -> String {
    let mut names: Vec<&str> = syscalls::TABLE.iter().map(|call| call.name).collect();
    names.dedup();
    format!(
        "Followed fd calls: {}. An fd that comes or goes on another way is seen through the kernel's functions \
         (`--via functions`), else in `plumb fds` only; docs/fd-paths.md lists each. \
         With `-o json`, as with `-o jsonl`, each event is an object on a line of its own.",
        names.join(" ").replace("fcntl fcntl64", "fcntl(F_DUPFD)")
    )
}

fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{error}; such as 10s or 5m"))
}

fn comm(name: &str) -> Result<[u8; COMM_LEN], String> {
    if name.is_empty() || name.len() >= COMM_LEN {
        return Err(format!("a name has 1 to {} bytes", COMM_LEN - 1));
    }
    let mut comm = [0; COMM_LEN];
    comm[..name.len()].copy_from_slice(name.as_bytes());
    Ok(comm)
}

pub(super) fn run(arguments: &Arguments) -> Outcome {
    let target =
        arguments.pid.map(|pid| Target::open(pid).ok_or_else(|| no_such_process(pid))).transpose()?;
    let stop = interrupted()?;
    if let (true, Some(target)) = (arguments.sockets, &target) {
        return sockets::run(arguments, target, &stop);
    }
    let via = arguments.via.map(|via| match via {
        Via::Functions => Seam::Functions,
        Via::SysExit => Seam::SysExit,
    });
    let filter = Filter { tgid: arguments.pid, comm: arguments.comm };
    let loaded =
        Kernel::load_all(Plan { fds: Fds::All(via), stacks: arguments.origins, ..Plan::watch(filter) });
    let mut kernel = loaded.map_err(|error| match (via, &error) {
        (Some(via), LoadError::Required { .. }) => Failure::new(
            Exit::KernelCannot,
            format!("fds cannot be followed through {} here: {error}", via.word()),
            "leave out --via to take the way that this kernel allows",
        ),
        _ => error.into(),
    })?;
    let bug = |error: &dyn std::fmt::Display| {
        Failure::new(Exit::Error, format!("the event stream ended: {error}"), "this is a bug of plumb")
    };
    let mut ring = kernel.ring().map_err(|error| bug(&error))?;
    let (began, cpu) = (Instant::now(), own_cpu());
    let end = arguments.duration.map(|duration| began + duration);
    let mut printer = Printer::new(arguments);
    output::message("plumb: watching; ctrl-c ends it");
    printer.begin()?;
    let (mut told, mut next_look, mut more) = (0, began + LEDGER_EVERY, false);
    let mut events = Vec::with_capacity(BATCH);
    loop {
        if !more {
            ring.wait(TICK).map_err(|error| bug(&error))?;
        }
        // Whatever was sent before the end was asked for, or came, is still printed.
        let has_ended = target.as_ref().is_some_and(|target| !target.is_alive());
        let now = Instant::now();
        let ending = stop.is_cancelled() || end.is_some_and(|end| now >= end);
        events.clear();
        ring.drain_into(&mut events, BATCH);
        let stacks = ring.drain_stacks();
        more = events.len() == BATCH;
        // Also when nothing happens, an empty page asks whether somebody still reads.
        let is_read = printer.take(&events, stacks)? && !output::is_hung_up();
        let ends = |event: &Event| matches!(event, Event::Exit(exit) if exit.group_dead != 0);
        let gone = arguments.pid.is_some() && events.iter().any(ends);
        let is_last = gone || (has_ended && events.is_empty()) || !is_read || (ending && !more);
        if is_last || now >= next_look {
            next_look = now + LEDGER_EVERY;
            let losses = view::lost(&kernel.counts()?) + ring.ledger().rejected + kernel.not_run();
            if losses > told {
                let lost = losses - told;
                output::message(&format!(
                    "plumb: {lost} events were lost: they came faster than they were read, or the kernel skipped them"
                ));
                told = losses;
            }
        }
        if is_last {
            break;
        }
    }
    printer.end(&kernel, ring.ledger().rejected, began.elapsed(), own_cpu().saturating_sub(cpu))?;
    Ok(if stop.is_cancelled() { Exit::Interrupted } else { Exit::Ok })
}

/// Processor time of this process so far.
fn own_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// The process that is watched; its number may be another's after its end, the pidfd is not.
struct Target(OwnedFd);

impl Target {
    /// `None` when there is no such process, or when the number is that of a thread.
    fn open(pid: u32) -> Option<Self> {
        let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
        pidfd_open(pid, PidfdFlags::empty()).ok().map(Self)
    }

    /// A pidfd becomes readable when its process has ended (since 5.3).
    fn is_alive(&self) -> bool {
        let mut ready = [PollFd::new(&self.0, PollFlags::IN)];
        poll(&mut ready, Some(&Timespec::default())).is_ok_and(|ready| ready == 0)
    }
}

/// A token that ctrl-c or SIGTERM cancels.
pub(super) fn interrupted() -> Result<CancellationToken, Failure> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let token = CancellationToken::new();
    let cancel = token.clone();
    let mut signals = {
        let _inside = runtime.enter();
        [signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?]
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            let [interrupt, terminate] = &mut signals;
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        cancel.cancel();
    })?;
    Ok(token)
}

//! Loads the object, resolves its offsets, attaches what was asked for and records each verdict.

use std::{fs, io, path::Path};

use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{Map, PerCpuArray, PerCpuValues},
    programs::{self, ProgramError},
};
use plumb_common::{
    counts::{self, Counts},
    limits::{
        COMM_LEN, MAX_TREE, MAX_WATCHED, RING_BYTES, STACK_RING_BYTES, TREE_RING_BYTES, TREE_STACK_RING_BYTES,
    },
    offsets,
    sockets::{MAX_CLOSED, MAX_CONVERSATIONS},
};

use super::{
    btf::{self, BtfError, KERNEL_BTF},
    fds::FdHooks,
    programs::{Hook, Intent, PROGRAMS, Program, Seam, Status, Verdict},
    ring::{Ring, RingError},
    sockets::SocketHooks,
};
use crate::failure::{Exit, Failure};

/// Names of the maps and globals, as in ebpf/src/maps.rs.
const EVENTS: &str = "EVENTS";
const STACKS: &str = "STACKS";
const WATCHED: &str = "WATCHED";
const COUNTS: &str = "COUNTS";

/// Copied so that it is aligned as an ELF file wants it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("PLUMB_EBPF_OBJECT"));

/// Whose events reach the ring.
#[derive(Clone, Copy, Debug, Default)]
pub struct Filter {
    /// Thread group id; `None` for all.
    pub tgid: Option<u32>,
    /// Name of the process's leader, NUL-padded; `None` for any.
    pub comm: Option<[u8; COMM_LEN]>,
}

/// What to load.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Names out of `PROGRAMS`, without the fd programs; `None` for all.
    pub programs: Option<&'static [&'static str]>,
    /// Whether and how fds can be followed.
    pub fds: Fds,
    pub filter: Filter,
    /// Size of the event ring in bytes; a power of two, at least one page.
    pub ring_bytes: u32,
    /// Whether stacks can be taken: of everybody whose fds are followed at once, else of those that
    /// `Kernel::watch` names.
    pub stacks: bool,
    /// Whether sockets and signals of services can be followed.
    pub sockets: Sockets,
    /// Connections of followed ports of which it can be known whether they are answered; of more it is told from the
    /// kernel's clocks.
    pub connections: u32,
    /// Whether every KILL is told, whoever gets it.
    pub kills: bool,
}

/// Whether and when the socket programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sockets {
    /// They are not loaded.
    Never,
    /// Loaded, to be attached by `Kernel::follow_sockets`.
    OnDemand,
    AtOnce,
}

/// Whether and how fds are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fds {
    /// The fd programs are not loaded.
    Never,
    /// Attached at once, this way, or with `None` the best one there is; everybody's events are sent.
    All(Option<Seam>),
    /// Loaded, to be attached by `Kernel::follow_fds`; only events of watched processes are sent.
    Watched(Option<Seam>),
    /// Attached at once through `sys_exit`, which tells of failed closes too; only events of watched processes and of
    /// what these fork are sent, and whatever is forked is watched from its first instruction on.
    Tree,
}

impl Plan {
    /// Everything the agent follows all the time.
    pub const AGENT: Self = Self {
        programs: Some(&[
            "task_newtask",
            "sched_process_exec",
            "task_rename",
            "sched_process_exit",
            "signal_generate",
            "mark_victim",
            "processes",
            "threads",
            "files",
        ]),
        fds: Fds::Watched(None),
        filter: Filter { tgid: None, comm: None },
        ring_bytes: RING_BYTES,
        stacks: true,
        sockets: Sockets::OnDemand,
        connections: MAX_CONVERSATIONS,
        kills: true,
    };

    /// All there is, for `plumb doctor`.
    pub const DOCTOR: Self = Self { programs: None, ..Self::AGENT };

    /// The live stream.
    #[must_use]
    pub const fn watch(filter: Filter) -> Self {
        Self {
            programs: Some(&["task_newtask", "sched_process_exec", "task_rename", "sched_process_exit"]),
            fds: Fds::All(None),
            filter,
            ring_bytes: RING_BYTES,
            stacks: false,
            sockets: Sockets::Never,
            connections: 1,
            kills: false,
        }
    }

    /// A command and all its descendants.
    pub const TREE: Self = Self {
        programs: Some(&[
            "task_newtask",
            "sched_process_exec",
            "task_rename",
            "sched_process_exit",
            "processes",
            "threads",
            "files",
        ]),
        fds: Fds::Tree,
        ring_bytes: TREE_RING_BYTES,
        sockets: Sockets::Never,
        kills: false,
        ..Self::AGENT
    };

    /// The sockets and signals of some processes.
    pub const SOCKETS: Self = Self {
        programs: Some(&["sched_process_exit", "signal_generate", "mark_victim", "processes"]),
        fds: Fds::Never,
        stacks: false,
        sockets: Sockets::AtOnce,
        kills: false,
        ..Self::AGENT
    };

    /// The same of one process that is asked to stop, and what it begins since.
    pub const STOP: Self = Self {
        programs: Some(&[
            "task_newtask",
            "sched_process_exit",
            "signal_generate",
            "mark_victim",
            "processes",
            "threads",
        ]),
        fds: Fds::Watched(None),
        ..Self::SOCKETS
    };

    /// One pass of these iterators.
    #[must_use]
    pub const fn pass(programs: &'static [&'static str]) -> Self {
        let filter = Filter { tgid: None, comm: None };
        Self {
            programs: Some(programs),
            fds: Fds::Never,
            filter,
            ring_bytes: PAGE,
            stacks: false,
            sockets: Sockets::Never,
            connections: 1,
            kills: false,
        }
    }
}

fn stack_ring_bytes(plan: Plan) -> u32 {
    match plan {
        Plan { stacks: false, .. } => PAGE,
        Plan { fds: Fds::Tree, .. } => TREE_STACK_RING_BYTES,
        _ => STACK_RING_BYTES,
    }
}

/// The smallest ring there can be.
const PAGE: u32 = 4096;

/// Why nothing could be loaded at all.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("missing capability: plumb needs CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN")]
    MissingCapability,
    #[error("this kernel publishes no types: {KERNEL_BTF}: {0}")]
    NoBtf(#[source] io::Error),
    #[error("{KERNEL_BTF}: {0}")]
    BadBtf(#[source] BtfError),
    #[error("the kernel refuses the maps or programs: {0}")]
    Refused(String),
    #[error("{name}, which this depends on, is {verdict}: {why}")]
    Required { name: &'static str, verdict: &'static str, why: String, privilege: bool },
}

impl From<LoadError> for Failure {
    fn from(error: LoadError) -> Self {
        let (exit, remedy) = match &error {
            LoadError::MissingCapability | LoadError::Required { privilege: true, .. } => (
                Exit::MissingPrivilege,
                "run it with sudo, or give the service AmbientCapabilities=CAP_BPF CAP_PERFMON",
            ),
            LoadError::NoBtf(_) | LoadError::BadBtf(_) => {
                (Exit::KernelCannot, "use a kernel from 5.10 on that is built with CONFIG_DEBUG_INFO_BTF=y")
            }
            LoadError::Refused(_) | LoadError::Required { .. } => {
                (Exit::KernelCannot, "`plumb doctor` says what this kernel can do")
            }
        };
        Self::new(exit, error.to_string(), remedy)
    }
}

/// One CPU's part of the ledger.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
struct PerCpu([u64; counts::LEN as usize]);

// SAFETY: plain numbers.
unsafe impl aya::Pod for PerCpu {}

/// The loaded programs. Dropping it detaches everything.
#[derive(Debug)]
pub struct Kernel {
    pub(super) ebpf: Ebpf,
    pub(super) programs: Vec<Status>,
    pub(super) fds: FdHooks,
    pub(super) sockets: SocketHooks,
    pub(super) offsets: [u32; offsets::LEN],
    /// Whether pids of this process's namespace are those of the kernel.
    pub(super) sees_host_pids: bool,
}

impl Kernel {
    /// Loads and attaches the plan's programs. A program that cannot be attached is a verdict in
    /// `programs`, not an error.
    pub fn load(plan: Plan) -> Result<Self, LoadError> {
        require_capabilities()?;
        // Before 5.11 maps are charged to RLIMIT_MEMLOCK. Where the limit cannot be raised it does not
        // matter, or the kernel will say so.
        let unlimited = rustix::process::Rlimit { current: None, maximum: None };
        let _ = rustix::process::setrlimit(rustix::process::Resource::Memlock, unlimited);

        let types = fs::read(KERNEL_BTF).map_err(LoadError::NoBtf)?;
        let facts = btf::facts(&types).map_err(LoadError::BadBtf)?;
        drop(types);
        let btf = Btf::from_sys_fs().map_err(|error| LoadError::Refused(error.to_string()))?;
        let (tgid, comm) = (plan.filter.tgid.unwrap_or(0), plan.filter.comm.unwrap_or_default());
        let watched_only = u32::from(matches!(plan.fds, Fds::Watched(_) | Fds::Tree));
        let tree = u32::from(plan.fds == Fds::Tree);
        let all_stacks = u32::from(plan.stacks && watched_only == 0);
        let has_task_pt_regs = u32::from(facts.has_task_pt_regs);
        let mut ebpf = EbpfLoader::new()
            .btf(Some(&btf))
            .override_global("OFFSETS", &facts.offsets[..], true)
            .override_global("WATCHED_ONLY", &watched_only, true)
            .override_global("ALL_STACKS", &all_stacks, true)
            .override_global("TREE", &tree, true)
            .override_global("HAS_TASK_PT_REGS", &has_task_pt_regs, true)
            .override_global("KILLS", &u32::from(plan.kills), true)
            .override_global("FILTER_TGID", &tgid, true)
            .override_global("FILTER_COMM", &comm[..], true)
            .map_max_entries(EVENTS, plan.ring_bytes)
            .map_max_entries(STACKS, stack_ring_bytes(plan))
            .map_max_entries(
                "CONVERSATIONS",
                if plan.sockets == Sockets::Never { 1 } else { plan.connections },
            )
            .map_max_entries("CLOSED", if plan.sockets == Sockets::Never { 1 } else { MAX_CLOSED })
            .map_max_entries(WATCHED, if plan.fds == Fds::Tree { MAX_TREE } else { MAX_WATCHED })
            .load(OBJECT)
            .map_err(|error| LoadError::Refused(chain(&error)))?;
        let wanted = |program: &&Program| {
            let is_on_demand = program.seam.is_some() || program.sockets;
            !is_on_demand && plan.programs.is_none_or(|names| names.contains(&program.name))
        };
        let mut programs = Vec::new();
        for program in PROGRAMS.iter().filter(wanted) {
            let loaded = load(&mut ebpf, program, &btf, &facts.offsets);
            let done = loaded.and_then(|()| match program.hook {
                // It stays with the object until that is dropped.
                Hook::Tracepoint(_) => {
                    tracepoint(&mut ebpf, program.name)?.attach().map(drop).map_err(refusal)
                }
                _ => Ok(()),
            });
            programs.push(Status {
                program,
                verdict: done.map_or_else(|verdict| verdict, |()| Verdict::Attached),
            });
        }
        let fds = FdHooks::load(plan.fds, &mut ebpf, &btf, &facts.offsets, &mut programs);
        let sockets = SocketHooks::load(plan.sockets, &mut ebpf, &btf, &facts, &mut programs);
        drop(btf);
        // SAFETY: no preconditions. The kernel's types took about 20 MB for a moment; give them back.
        unsafe { libc::malloc_trim(0) };
        let (offsets, sees_host_pids) = (facts.offsets, sees_host_pids());
        Ok(Self { ebpf, programs, fds, sockets, offsets, sees_host_pids })
    }

    /// As `load`, and an error when a required program is not attached.
    pub fn load_required(plan: Plan) -> Result<Self, LoadError> {
        let kernel = Self::load(plan)?;
        kernel.require(|status| status.program.intent == Intent::Required)?;
        Ok(kernel)
    }

    /// As `load`, and an error when any program of the plan is not attached.
    pub fn load_all(plan: Plan) -> Result<Self, LoadError> {
        let kernel = Self::load(plan)?;
        kernel.require(|_| true)?;
        Ok(kernel)
    }

    fn require(&self, needed: impl Fn(&Status) -> bool) -> Result<(), LoadError> {
        match self.programs.iter().find(|status| needed(status) && !status.is_fine()) {
            None => Ok(()),
            Some(status) => Err(LoadError::Required {
                name: status.program.name,
                verdict: status.verdict.word(),
                why: status.verdict.explain(),
                privilege: status.verdict.is_for_want_of_privilege(),
            }),
        }
    }

    /// Each program of the plan with its verdict.
    #[must_use]
    pub fn programs(&self) -> &[Status] {
        &self.programs
    }

    /// Hands out the rings; there is one reader, so a second call is an error.
    pub fn ring(&mut self) -> Result<Ring, RingError> {
        let mut take = |name| self.ebpf.take_map(name).ok_or(RingError::Taken);
        Ring::new(take(EVENTS)?, take(STACKS)?)
    }

    /// The kernel's side of the ledger, summed over CPUs, by `counts::index`.
    pub fn counts(&self) -> io::Result<Counts> {
        let map = self.ebpf.map(COUNTS).ok_or(io::ErrorKind::NotFound)?;
        let array = PerCpuArray::<&_, PerCpu>::try_from(map as &Map).map_err(io::Error::other)?;
        let per_cpu: PerCpuValues<PerCpu> = array.get(&0, 0).map_err(io::Error::other)?;
        let mut sums = Counts::default();
        for (sum, index) in sums.0.iter_mut().zip(0..) {
            *sum = per_cpu.iter().map(|PerCpu(counts)| counts[index]).sum();
        }
        Ok(sums)
    }
}

/// Hands one program to the kernel.
pub(super) fn load(
    ebpf: &mut Ebpf,
    program: &Program,
    btf: &Btf,
    known: &[u32; offsets::LEN],
) -> Result<(), Verdict> {
    if let Some(index) = program.needs.iter().find(|index| known[**index] == offsets::MISSING) {
        let why = format!("this kernel has no field {}", offsets::PATHS[*index]);
        return Err(Verdict::Unsupported { why });
    }
    let loaded = ebpf.program_mut(program.name);
    let loaded = loaded.ok_or(Verdict::Broken { why: "the object has no such program".to_owned() })?;
    match (program.hook, loaded) {
        (Hook::Tracepoint(name), programs::Program::BtfTracePoint(tracepoint)) => tracepoint.load(name, btf),
        (Hook::Iterator(object), programs::Program::Iter(iterator)) => iterator.load(object, btf),
        (Hook::Exit(name), programs::Program::FExit(exit)) => exit.load(name, btf),
        (Hook::Entry(names), programs::Program::FEntry(entry)) => {
            // Each name but the last may be one that this kernel does not have yet.
            let mut tried = names.iter().map(|name| entry.load(name, btf));
            tried.find(|done| !matches!(done, Err(ProgramError::Btf(_)))).unwrap_or_else(|| {
                Err(ProgramError::Btf(aya::BtfError::UnknownBtfTypeName { type_name: names.join(" or ") }))
            })
        }
        _ => return Err(Verdict::Broken { why: "the program has another hook in the object".to_owned() }),
    }
    .map_err(refusal)
}

fn tracepoint<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut programs::BtfTracePoint, Verdict> {
    let gone = || Verdict::Broken { why: "the object has no such program".to_owned() };
    ebpf.program_mut(name).ok_or_else(gone)?.try_into().map_err(refusal)
}

#[allow(clippy::needless_pass_by_value, reason = "the form that map_err wants")]
pub(super) fn refusal(error: ProgramError) -> Verdict {
    match &error {
        ProgramError::Btf(_) => Verdict::Unsupported { why: "this kernel has no such hook".to_owned() },
        ProgramError::LoadError { io_error, verifier_log } => {
            tracing::debug!(%verifier_log, "the verifier refused a program");
            Verdict::of_refusal(io_error, &verifier_log.to_string())
        }
        ProgramError::SyscallError(error) => Verdict::of_refusal(&error.io_error, ""),
        other => Verdict::Broken { why: chain(other) },
    }
}

/// Whether this process is in the initial pid namespace, whose inode is fixed (`PROC_PID_INIT_INO`,
/// include/linux/proc_ns.h).
#[must_use]
pub fn sees_host_pids() -> bool {
    fs::read_link("/proc/self/ns/pid").is_ok_and(|link| link == Path::new("pid:[4026531836]"))
}

/// CAP_SYS_ADMIN (21), or CAP_PERFMON (38) and CAP_BPF (39), since 5.8.
pub fn require_capabilities() -> Result<(), LoadError> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    if effective & (1 << 21) != 0 || effective & (0b11 << 38) == 0b11 << 38 {
        Ok(())
    } else {
        Err(LoadError::MissingCapability)
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_in_a_plan_is_a_program() {
        let passes: &[&str] = &["processes", "threads", "files"];
        for plan in [Plan::AGENT, Plan::STOP, Plan::watch(Filter::default()), Plan::pass(passes)] {
            for name in plan.programs.unwrap_or_default() {
                assert!(PROGRAMS.iter().any(|program| program.name == *name), "{name}");
            }
        }
    }
}

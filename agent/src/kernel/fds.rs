//! The fd programs: which way of attaching this kernel allows, when they are attached, and for whom.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

use aya::{
    Btf, Ebpf,
    maps::{Array, HashMap, MapError},
    programs::{self, fentry::FEntryLink, fexit::FExitLink, tp_btf::BtfTracePointLink},
};
use bytemuck::Zeroable;
use plumb_common::{
    event::{FdControl, Watch},
    offsets,
    task::ProcKey,
};

use super::{
    load::{Fds, Kernel, load, refusal},
    programs::{Hook, PROGRAMS, Program, Seam, Status, Verdict},
};

/// One attached program; dropping it detaches.
#[derive(Debug)]
#[allow(dead_code, reason = "held, not read")]
pub(super) enum Attached {
    Tracepoint(BtfTracePointLink),
    Entry(FEntryLink),
    Exit(FExitLink),
}

/// The fd programs of a kernel handle.
#[derive(Debug, Default)]
pub(super) struct FdHooks {
    seam: Option<Seam>,
    attached: Vec<Attached>,
    /// Once detached they cannot be attached again.
    stays: bool,
}

fn of_seam(seam: Seam) -> impl Iterator<Item = &'static Program> {
    PROGRAMS.iter().filter(move |program| program.seam == Some(seam))
}

impl FdHooks {
    /// Loads the first way that this kernel allows, and adds a verdict for each fd program.
    pub(super) fn load(
        fds: Fds,
        ebpf: &mut Ebpf,
        btf: &Btf,
        known: &[u32; offsets::LEN],
        statuses: &mut Vec<Status>,
    ) -> Self {
        let (wanted, at_once) = match fds {
            Fds::Never => return Self::default(),
            Fds::All(seam) => (seam, true),
            Fds::Watched(seam) => (seam, false),
            Fds::Tree => (Some(Seam::SysExit), true),
        };
        let mut hooks = Self::default();
        let mut verdicts: Vec<(&'static Program, Verdict)> = Vec::new();
        for seam in [Seam::Functions, Seam::SysExit] {
            if hooks.seam.is_some() || wanted.is_some_and(|wanted| wanted != seam) {
                continue;
            }
            // Attached once to see whether that is allowed.
            let tried: Vec<_> = of_seam(seam)
                .map(|program| {
                    (program, load(ebpf, program, btf, known).and_then(|()| attach(ebpf, program)))
                })
                .collect();
            let all = tried.iter().all(|(_, done)| done.is_ok());
            if all && !at_once && seam == Seam::Functions {
                drop(tried);
                let found = hooks.find_out_whether_they_stay(ebpf, btf, known);
                hooks.stays &= found.is_ok();
                let verdict = match &found {
                    Ok(()) if hooks.stays => Verdict::Attached,
                    Ok(()) => Verdict::Loaded,
                    Err(verdict) => verdict.clone(),
                };
                verdicts.extend(of_seam(seam).map(|program| (program, verdict.clone())));
                hooks.seam = found.is_ok().then_some(seam);
                continue;
            }
            for (program, done) in tried {
                let verdict = match done {
                    Ok(link) if all && at_once => {
                        hooks.attached.push(link);
                        Verdict::Attached
                    }
                    Ok(_) if all => Verdict::Loaded,
                    Ok(_) => {
                        let why = "the others of its way cannot be attached".to_owned();
                        Verdict::Unsupported { why }
                    }
                    Err(verdict) => verdict,
                };
                verdicts.push((program, verdict));
            }
            hooks.seam = all.then_some(seam);
        }
        if let Some(chosen) = hooks.seam {
            let by = of_seam(chosen).next().map_or("", |program| program.name);
            // What the other way has to say for itself is of no consequence.
            for (program, verdict) in &mut verdicts {
                if program.seam != Some(chosen) {
                    let why = verdict.cause();
                    *verdict = Verdict::Substituted { by, why };
                }
            }
            let left = PROGRAMS.iter().filter(|program| program.seam.is_some_and(|seam| seam != chosen));
            for program in left {
                if !verdicts.iter().any(|(known, _)| std::ptr::eq(*known, program)) {
                    let why = "one way is enough".to_owned();
                    verdicts.push((program, Verdict::Substituted { by, why }));
                }
            }
        }
        statuses.extend(verdicts.into_iter().map(|(program, verdict)| Status { program, verdict }));
        hooks
    }
}

impl FdHooks {
    /// Before 5.13 a program on a function can be attached once: then it is loaded again and stays attached,
    /// which costs other syscalls nothing. An error means that they cannot be had at all.
    fn find_out_whether_they_stay(
        &mut self,
        ebpf: &mut Ebpf,
        btf: &Btf,
        known: &[u32; offsets::LEN],
    ) -> Result<(), Verdict> {
        self.stays = !of_seam(Seam::Functions).all(|program| attach(ebpf, program).is_ok());
        if !self.stays {
            return Ok(());
        }
        let mut links = Vec::new();
        for program in of_seam(Seam::Functions) {
            unload(ebpf, program)?;
            load(ebpf, program, btf, known)?;
            links.push(attach(ebpf, program)?);
        }
        self.attached = links;
        Ok(())
    }
}

/// So that it can be loaded again.
pub(super) fn unload(ebpf: &mut Ebpf, program: &Program) -> Result<(), Verdict> {
    match ebpf.program_mut(program.name) {
        Some(programs::Program::FEntry(hook)) => hook.unload(),
        Some(programs::Program::FExit(hook)) => hook.unload(),
        _ => Ok(()),
    }
    .map_err(refusal)
}

pub(super) fn attach(ebpf: &mut Ebpf, program: &Program) -> Result<Attached, Verdict> {
    match ebpf.program_mut(program.name) {
        Some(programs::Program::BtfTracePoint(hook)) => {
            hook.attach().and_then(|id| hook.take_link(id)).map(Attached::Tracepoint)
        }
        Some(programs::Program::FEntry(hook)) => {
            hook.attach().and_then(|id| hook.take_link(id)).map(Attached::Entry)
        }
        Some(programs::Program::FExit(hook)) => {
            hook.attach().and_then(|id| hook.take_link(id)).map(Attached::Exit)
        }
        _ => return Err(Verdict::Broken { why: "the object has no such program".to_owned() }),
    }
    .map_err(refusal)
}

/// The value of the kernel's list.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct Watched(Watch);

// SAFETY: plain numbers.
unsafe impl aya::Pod for Watched {}

/// Why a process is not watched.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// `limits::MAX_WATCHED` are watched already. Nobody is dropped for a new one.
    #[error("as many processes are watched as there is room for")]
    Full,
    #[error("the list of watched processes cannot be changed: {0}")]
    Map(#[from] MapError),
}

impl Kernel {
    /// The way in which fds are followed; `None` when this kernel allows none or none was asked for.
    #[must_use]
    pub fn seam(&self) -> Option<Seam> {
        self.fds.seam
    }

    /// Whether the fd programs are attached now.
    #[must_use]
    pub fn follows_fds(&self) -> bool {
        !self.fds.attached.is_empty()
    }

    /// Attaches or detaches the fd programs. Does nothing when that is done already or there is no way.
    pub fn follow_fds(&mut self, on: bool) -> Result<(), Verdict> {
        let Some(seam) = self.fds.seam else { return Ok(()) };
        if on == self.follows_fds() || self.fds.stays {
            return Ok(());
        }
        self.fds.attached.clear();
        let mut refused = None;
        for status in self.programs.iter_mut().filter(|status| status.program.seam == Some(seam)) {
            status.verdict = Verdict::Loaded;
            if on {
                match attach(&mut self.ebpf, status.program) {
                    Ok(link) => {
                        self.fds.attached.push(link);
                        status.verdict = Verdict::Attached;
                    }
                    Err(verdict) => {
                        status.verdict = verdict.clone();
                        refused = Some(verdict);
                    }
                }
            }
        }
        match refused {
            None => Ok(()),
            Some(verdict) => {
                // A part of them would tell half of the truth.
                self.fds.attached.clear();
                Err(verdict)
            }
        }
    }

    /// Whose fd events are sent beside the watched processes'.
    pub fn set_fd_control(&mut self, control: FdControl) -> io::Result<()> {
        let map = self.ebpf.map_mut("FD_CONTROL").ok_or(io::ErrorKind::NotFound)?;
        let mut map = Array::<_, u64>::try_from(map).map_err(io::Error::other)?;
        map.set(0, bytemuck::cast::<FdControl, u64>(control), 0).map_err(io::Error::other)
    }

    /// From now on the fd events of a process are sent, and if wanted the stacks of its threads when they make
    /// an fd or a thread. A number that stands for another process by now sends nothing.
    pub fn watch(&mut self, process: ProcKey, stacks: bool) -> Result<(), WatchError> {
        let (start_boottime, stacks) = (process.start_boottime, u32::from(stacks));
        let watch = Watched(Watch { start_boottime, stacks, ..Watch::zeroed() });
        match self.watched()?.insert(process.tgid, watch, 0) {
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::E2BIG) => {
                Err(WatchError::Full)
            }
            done => Ok(done?),
        }
    }

    /// No longer; nothing to do if it was not watched.
    pub fn unwatch(&mut self, process: ProcKey) -> Result<(), WatchError> {
        let mut watched = self.watched()?;
        match watched.get(&process.tgid, 0) {
            Ok(Watched(watch)) if watch.start_boottime == process.start_boottime => {
                Ok(watched.remove(&process.tgid)?)
            }
            Ok(_) | Err(MapError::KeyNotFound) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn watched(&mut self) -> Result<HashMap<&mut aya::maps::MapData, u32, Watched>, MapError> {
        let missing = || MapError::InvalidName { name: "WATCHED".to_owned() };
        HashMap::try_from(self.ebpf.map_mut("WATCHED").ok_or_else(missing)?)
    }

    /// How often the kernel did not run an attached program because it was running on that CPU already,
    /// summed (`recursion_misses`, since 5.12; 0 before).
    #[must_use]
    pub fn not_run(&self) -> u64 {
        self.not_run_of(|_| true)
    }

    /// As `not_run`, of some programs.
    #[must_use]
    pub fn not_run_of(&self, is_meant: impl Fn(&Program) -> bool) -> u64 {
        // The iterators do not run beside themselves; a program that is detached keeps its count.
        let runs = |status: &&Status| {
            matches!(status.verdict, Verdict::Attached | Verdict::Loaded)
                && !matches!(status.program.hook, Hook::Iterator(_))
                && is_meant(status.program)
        };
        let programs =
            self.programs.iter().filter(runs).filter_map(|status| self.ebpf.program(status.program.name));
        let fds = programs.filter_map(|program| Some(program.fd().ok()?.as_fd().as_raw_fd()));
        fds.filter_map(|fd| std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok())
            .filter_map(|text| recursion_misses(&text))
            .sum()
    }
}

fn recursion_misses(fdinfo: &str) -> Option<u64> {
    fdinfo.lines().find_map(|line| line.strip_prefix("recursion_misses:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_was_not_run_is_told_by_its_fdinfo() {
        let text = "prog_type:\t26\nrun_cnt:\t5\nrecursion_misses:\t12\nverified_insns:\t100\n";
        assert_eq!(recursion_misses(text), Some(12));
        assert_eq!(recursion_misses("prog_type:\t26\n"), None);
    }
}

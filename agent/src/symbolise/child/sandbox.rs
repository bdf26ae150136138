//! What the worker gives up before it reads anything: privileges, files, memory, and almost all syscalls.

use std::{collections::BTreeMap, fs, io};

use rustix::{
    process::{
        DumpableBehavior, Gid, Resource, Rlimit, Signal, Uid, set_dumpable_behavior,
        set_parent_process_death_signal, setrlimit,
    },
    thread::{
        CapabilitySet, CapabilitySets, clear_ambient_capability_set, set_capabilities, set_name,
        set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    },
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

/// Memory beyond what the process has when it starts.
const MEMORY: u64 = 64 << 20;
const STACK: u64 = 8 << 20;
/// The socket, and a file while it is being mapped.
const FILES: u64 = 16;
const NOBODY: u32 = 65534;

/// Enters the sandbox; there is no way back.
pub(super) fn enter() -> io::Result<()> {
    let base = data_size()?;
    set_parent_process_death_signal(Some(Signal::KILL))?;
    set_name(c"plumb-symbolise")?;
    // An agent without the privilege to change its user stays who it is, without capabilities.
    let nobody = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    let _ = set_thread_groups(&[])
        .and_then(|()| set_thread_res_gid(nobody.1, nobody.1, nobody.1))
        .and_then(|()| set_thread_res_uid(nobody.0, nobody.0, nobody.0));
    // A change of user forgets whose death matters.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let _ = clear_ambient_capability_set();
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    set_no_new_privs(true)?;
    // Nobody may trace it, and it leaves no core.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let limits = [
        (Resource::Data, base + MEMORY),
        (Resource::Stack, STACK),
        (Resource::Nofile, FILES),
        (Resource::Core, 0),
        (Resource::Fsize, 0),
        (Resource::Nproc, 0),
    ];
    for (resource, most) in limits {
        setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })?;
    }
    let program: BpfProgram = filter().and_then(TryInto::try_into).map_err(io::Error::other)?;
    apply_filter(&program).map_err(io::Error::other)
}

/// Private writable memory of this process, in bytes.
fn data_size() -> io::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmData:")?.trim().strip_suffix(" kB"));
    let kib = kib.and_then(|kib| kib.parse::<u64>().ok());
    kib.map(|kib| kib << 10).ok_or_else(|| io::Error::other("no VmData in /proc/self/status"))
}

/// Kills the process at any other syscall: no files are opened, nothing is written, no memory is executed.
fn filter() -> Result<SeccompFilter, seccompiler::BackendError> {
    let free = [
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_recvfrom,
        libc::SYS_recvmsg,
        libc::SYS_sendmsg,
        libc::SYS_close,
        libc::SYS_fstat,
        libc::SYS_lseek,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_brk,
        libc::SYS_madvise,
        libc::SYS_getrandom,
        // Where the vDSO cannot read the clock of this machine, such as an HPET, it asks the kernel.
        libc::SYS_clock_gettime,
        libc::SYS_sigaltstack,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_exit,
        libc::SYS_exit_group,
        // To abort when there is no more memory, which is no reason for a line in the kernel's log.
        libc::SYS_getpid,
        libc::SYS_gettid,
    ];
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = free.map(|number| (number, Vec::new())).into();
    for number in [libc::SYS_mmap, libc::SYS_mprotect] {
        let executable = u64::from(libc::PROT_EXEC.cast_unsigned());
        let never = SeccompCondition::new(2, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(executable), 0)?;
        rules.insert(number, vec![SeccompRule::new(vec![never])?]);
    }
    let is = |argument: u8, value: u32| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value.into())
    };
    let abort = vec![is(0, std::process::id())?, is(2, libc::SIGABRT.cast_unsigned())?];
    rules.insert(libc::SYS_tgkill, vec![SeccompRule::new(abort)?]);
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)
}

//! The one table of kernel programs: what each hooks, how much it matters, and what became of it.

use std::io;

use plumb_common::offsets;
use serde::Serialize;

/// The kernel's internal "not supported" (include/linux/errno.h), which reaches user space here.
const ENOTSUPP: i32 = 524;

/// Where a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// A BTF-typed raw tracepoint, attached for as long as the kernel handle lives.
    Tracepoint(&'static str),
    /// The first of these kernel functions that there is, when it is entered (since 5.5).
    Entry(&'static [&'static str]),
    /// A kernel function, when it returns (since 5.5).
    Exit(&'static str),
    /// A BPF iterator; loaded once and attached anew for each pass.
    Iterator(&'static str),
}

/// A way of attaching the fd seam.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seam {
    /// The kernel's own functions that fill and empty slots. Costs other syscalls nothing.
    Functions,
    /// The results of syscalls. Costs every syscall of the host a little.
    SysExit,
}

impl Seam {
    /// For people, with what it means for them.
    #[must_use]
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Functions => "the kernel's own functions, free for other syscalls",
            Self::SysExit => "sys_exit, which costs every syscall a little and is attached only when needed",
        }
    }

    /// The word used in output and metrics.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Functions => "functions",
            Self::SysExit => "sys_exit",
        }
    }
}

/// How much depends on a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Intent {
    /// Without it the agent does not start.
    Required,
    /// Without it the agent runs and says what is missing.
    Optional,
}

/// One kernel program.
#[derive(Debug)]
pub struct Program {
    /// Name of the function in the object.
    pub name: &'static str,
    pub hook: Hook,
    /// Of the fd programs, the way of attaching they belong to. Only one way is attached at a time.
    pub seam: Option<Seam>,
    /// Attached only while sockets are followed.
    pub sockets: bool,
    pub intent: Intent,
    /// What the user goes without when it is not there.
    pub gives: &'static str,
    /// Fields it cannot do without, by `plumb_common::offsets` index.
    pub needs: &'static [usize],
}

impl Program {
    /// Whether it tells what becomes of requests and signals.
    #[must_use]
    pub fn is_evidence(&self) -> bool {
        self.sockets || matches!(self.name, "signal_generate" | "mark_victim")
    }

    /// Whether it tells who has started whom, and how those ended.
    #[must_use]
    pub fn is_of_children(&self) -> bool {
        matches!(self.name, "task_newtask" | "sched_process_exit")
    }
}

/// What every event needs to say who caused it.
const ACTOR: &[usize] = &[
    offsets::TASK_PID,
    offsets::TASK_TGID,
    offsets::TASK_COMM,
    offsets::TASK_GROUP_LEADER,
    offsets::TASK_START_BOOTTIME,
];

/// What an fd event needs to find table, slot and syscall.
const IN_SLOT: &[usize] = &[
    offsets::TASK_GROUP_LEADER,
    offsets::TASK_START_BOOTTIME,
    offsets::TASK_THREAD_STATUS,
    offsets::TASK_STACK,
    offsets::TASK_FILES,
    offsets::FILES_FDT,
    offsets::FDT_MAX_FDS,
    offsets::FDT_FD,
];

/// What is noted when something is sent.
const ANSWERED: &[usize] =
    &[offsets::SOCK_NET, offsets::NET_INUM, offsets::SOCK_NUM, offsets::SOCK_PROTOCOL, offsets::TCP_COPIED];

/// What a packet is read by.
const OF_PACKET: &[usize] = &[
    offsets::NET_INUM,
    offsets::SKB_HEAD,
    offsets::SKB_DATA,
    offsets::SKB_LEN,
    offsets::SKB_TRANSPORT,
    offsets::SKB_NETWORK,
    offsets::SKB_DEVICE,
    offsets::DEVICE_NET,
];

pub static PROGRAMS: [Program; 21] = [
    Program {
        name: "task_newtask",
        hook: Hook::Tracepoint("task_newtask"),
        seam: None,
        sockets: false,
        intent: Intent::Optional,
        gives: "new processes and threads between two passes",
        needs: ACTOR,
    },
    Program {
        name: "sched_process_exec",
        hook: Hook::Tracepoint("sched_process_exec"),
        seam: None,
        sockets: false,
        intent: Intent::Optional,
        gives: "exec events",
        needs: ACTOR,
    },
    Program {
        name: "task_rename",
        hook: Hook::Tracepoint("task_rename"),
        seam: None,
        sockets: false,
        intent: Intent::Optional,
        gives: "thread names as they change",
        needs: ACTOR,
    },
    Program {
        name: "sched_process_exit",
        hook: Hook::Tracepoint("sched_process_exit"),
        seam: None,
        sockets: false,
        intent: Intent::Optional,
        gives: "exits between two passes, with their codes",
        needs: &[
            offsets::TASK_GROUP_LEADER,
            offsets::TASK_START_BOOTTIME,
            offsets::TASK_SIGNAL,
            offsets::SIGNAL_LIVE,
            offsets::TASK_EXIT_CODE,
        ],
    },
    Program {
        name: "fd_install",
        hook: Hook::Entry(&["fd_install"]),
        seam: Some(Seam::Functions),
        sockets: false,
        intent: Intent::Optional,
        gives: "fd events that cost other syscalls nothing: new fds",
        needs: IN_SLOT,
    },
    Program {
        name: "do_dup2",
        hook: Hook::Exit("do_dup2"),
        seam: Some(Seam::Functions),
        sockets: false,
        intent: Intent::Optional,
        gives: "fd events that cost other syscalls nothing: replaced fds",
        needs: IN_SLOT,
    },
    Program {
        name: "filp_flush",
        // From 6.6 on close(2) goes past filp_close, which itself calls filp_flush.
        hook: Hook::Entry(&["filp_flush", "filp_close"]),
        seam: Some(Seam::Functions),
        sockets: false,
        intent: Intent::Optional,
        gives: "fd events that cost other syscalls nothing: closed fds",
        needs: IN_SLOT,
    },
    Program {
        name: "sys_exit",
        hook: Hook::Tracepoint("sys_exit"),
        seam: Some(Seam::SysExit),
        sockets: false,
        intent: Intent::Optional,
        gives: "fd events where the kernel's functions cannot be attached",
        needs: IN_SLOT,
    },
    Program {
        name: "processes",
        hook: Hook::Iterator("task"),
        seam: None,
        sockets: false,
        intent: Intent::Required,
        gives: "the counts of fds and threads of every process",
        needs: &[
            offsets::TASK_PID,
            offsets::TASK_TGID,
            offsets::TASK_COMM,
            offsets::TASK_FLAGS,
            offsets::TASK_GROUP_LEADER,
            offsets::TASK_START_BOOTTIME,
            offsets::TASK_FILES,
            offsets::TASK_SIGNAL,
            offsets::SIGNAL_NR_THREADS,
            offsets::SIGNAL_RLIM,
            offsets::FILES_FDT,
            offsets::FDT_MAX_FDS,
            offsets::FDT_OPEN_FDS,
        ],
    },
    Program {
        name: "threads",
        hook: Hook::Iterator("task"),
        seam: None,
        sockets: false,
        intent: Intent::Optional,
        gives: "the threads of one process by name",
        needs: &[offsets::TASK_PID, offsets::TASK_TGID, offsets::TASK_COMM, offsets::TASK_START_BOOTTIME],
    },
    Program {
        name: "files",
        hook: Hook::Iterator("task_file"),
        seam: None,
        sockets: false,
        intent: Intent::Optional,
        gives: "the open files of one process and what leaks",
        needs: &[
            offsets::TASK_TGID,
            offsets::TASK_GROUP_LEADER,
            offsets::TASK_FILES,
            offsets::FILE_INODE,
            offsets::FILE_FLAGS,
            offsets::FILE_POS,
            offsets::INODE_INO,
            offsets::INODE_MODE,
            offsets::INODE_SB,
            offsets::SB_DEV,
            offsets::SB_MAGIC,
            offsets::FILE_PRIVATE_DATA,
            offsets::DENTRY_NAME,
        ],
    },
    Program {
        name: "signal_generate",
        hook: Hook::Tracepoint("signal_generate"),
        seam: None,
        sockets: false,
        intent: Intent::Optional,
        gives: "who kills, and that a signal was made",
        needs: ACTOR,
    },
    Program {
        name: "mark_victim",
        hook: Hook::Tracepoint("mark_victim"),
        seam: None,
        sockets: false,
        intent: Intent::Optional,
        gives: "that a process was killed for want of memory",
        needs: ACTOR,
    },
    Program {
        name: "signal_deliver",
        hook: Hook::Tracepoint("signal_deliver"),
        seam: None,
        sockets: true,
        intent: Intent::Optional,
        gives: "that a signal was taken, and by a handler",
        needs: &[offsets::TASK_GROUP_LEADER, offsets::TASK_START_BOOTTIME, offsets::SIGACTION_HANDLER],
    },
    Program {
        name: "inet_sock_set_state",
        hook: Hook::Tracepoint("inet_sock_set_state"),
        seam: None,
        sockets: true,
        intent: Intent::Optional,
        gives: "when listeners close, and which connections lose a request",
        needs: &[
            offsets::TASK_GROUP_LEADER,
            offsets::TASK_START_BOOTTIME,
            offsets::SOCK_NET,
            offsets::NET_INUM,
            offsets::SOCK_NUM,
            offsets::SOCK_SOURCE,
            offsets::SOCK_FLAGS,
            offsets::SOCK_SOCKET,
            offsets::SOCK_ERR,
            offsets::SOCK_PROTOCOL,
            offsets::TCP_COPIED,
            offsets::TCP_RECEIVED,
        ],
    },
    Program {
        name: "sock_send_length",
        hook: Hook::Tracepoint("sock_send_length"),
        seam: None,
        sockets: true,
        intent: Intent::Optional,
        gives: "which requests were answered",
        needs: ANSWERED,
    },
    Program {
        name: "tcp_sendmsg",
        hook: Hook::Entry(&["tcp_sendmsg"]),
        seam: None,
        sockets: true,
        intent: Intent::Optional,
        gives: "which requests were answered",
        needs: ANSWERED,
    },
    Program {
        name: "do_tcp_sendpages",
        hook: Hook::Entry(&["do_tcp_sendpages"]),
        seam: None,
        sockets: true,
        intent: Intent::Optional,
        gives: "which requests were answered by sendfile",
        needs: ANSWERED,
    },
    Program {
        name: "tcp_send_reset",
        hook: Hook::Tracepoint("tcp_send_reset"),
        seam: None,
        sockets: true,
        intent: Intent::Optional,
        gives: "which requests come too late, and who is refused",
        needs: OF_PACKET,
    },
    Program {
        name: "tcp_v4_send_reset",
        hook: Hook::Entry(&["tcp_v4_send_reset"]),
        seam: None,
        sockets: true,
        intent: Intent::Optional,
        gives: "which requests come too late, and who is refused",
        needs: OF_PACKET,
    },
    Program {
        name: "tcp_v6_send_reset",
        hook: Hook::Entry(&["tcp_v6_send_reset"]),
        seam: None,
        sockets: true,
        intent: Intent::Optional,
        gives: "which requests come too late over IPv6, and who is refused",
        needs: OF_PACKET,
    },
];

/// What became of a program on this kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Attached or, for an iterator, loaded.
    Attached,
    /// Loaded, to be attached as soon as somebody's fds or sockets are followed.
    Loaded,
    /// Not needed: another program sees the same. `why` says what speaks against this one.
    Substituted { by: &'static str, why: String },
    /// This kernel has no such hook or field.
    Unsupported { why: String },
    /// The kernel has it and does not let us.
    Refused { errno: i32, remedy: &'static str },
    /// It should work and does not: our fault, to be reported.
    Broken { why: String },
}

impl Verdict {
    /// The word used in metrics and JSON.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Attached => "attached",
            Self::Loaded => "loaded",
            Self::Substituted { .. } => "substituted",
            Self::Unsupported { .. } => "unsupported",
            Self::Refused { .. } => "refused",
            Self::Broken { .. } => "broken",
        }
    }

    /// Why, and what to do; empty when there is nothing to say.
    #[must_use]
    pub fn explain(&self) -> String {
        match self {
            Self::Attached => String::new(),
            Self::Loaded => "attached while somebody's fds or sockets are followed".to_owned(),
            Self::Substituted { by, why } => format!("{by} does its work: {why}"),
            Self::Unsupported { why } => why.clone(),
            Self::Refused { errno, remedy } => format!("{}; {remedy}", io::Error::from_raw_os_error(*errno)),
            Self::Broken { why } => {
                format!("{why}; please report this with the output of `plumb doctor -o json`")
            }
        }
    }

    /// What happened, without what to do about it.
    #[must_use]
    pub(super) fn cause(&self) -> String {
        match self {
            Self::Refused { errno, .. } => format!("refused: {}", io::Error::from_raw_os_error(*errno)),
            Self::Unsupported { why } | Self::Broken { why } => format!("{}: {why}", self.word()),
            other => other.word().to_owned(),
        }
    }

    /// Whether more privilege would help.
    #[must_use]
    pub fn is_for_want_of_privilege(&self) -> bool {
        matches!(self, Self::Refused { errno: libc::EPERM | libc::EACCES, .. })
    }

    /// Reads the kernel's answer to a load or an attach.
    pub(super) fn of_refusal(error: &io::Error, log: &str) -> Self {
        match error.raw_os_error() {
            Some(errno @ (libc::EPERM | libc::EACCES)) if log.is_empty() => Self::Refused {
                errno,
                remedy: "run as root, or with CAP_BPF and CAP_PERFMON, on a kernel that is not locked down",
            },
            Some(errno @ libc::ENOMEM) => Self::Refused {
                errno,
                remedy: "raise the memory limit of this cgroup, or RLIMIT_MEMLOCK before 5.11",
            },
            Some(ENOTSUPP | libc::EOPNOTSUPP) => Self::Unsupported { why: error.to_string() },
            _ => {
                // After its complaint the verifier prints statistics.
                let statistics = ["processed", "stack depth", "verification time"];
                let complaint =
                    |line: &&str| !line.is_empty() && !statistics.iter().any(|word| line.starts_with(word));
                let last = log.lines().map(str::trim).rev().find(complaint);
                Self::Broken {
                    why: last.map_or_else(|| error.to_string(), |line| format!("{error}: {line}")),
                }
            }
        }
    }
}

/// A program and its verdict.
#[derive(Clone, Debug)]
pub struct Status {
    pub program: &'static Program,
    pub verdict: Verdict,
}

impl Status {
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.verdict == Verdict::Attached
    }

    /// Whether nothing is missing because of it.
    #[must_use]
    pub fn is_fine(&self) -> bool {
        matches!(self.verdict, Verdict::Attached | Verdict::Loaded | Verdict::Substituted { .. })
    }
}

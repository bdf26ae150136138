//! What a stop signal would do to a process, in words: from what pre-flight looks at.

use serde::Serialize;

use crate::drain::{Facts, Supervisor};

/// What becomes of a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Fate {
    /// A function of the process takes it.
    Handler,
    /// A thread waits for it by sigwait(3) or its like.
    Awaited,
    /// It is blocked, to be read from a signalfd.
    Signalfd,
    /// Nothing takes it: it ends the process.
    Ends,
    Ignored,
    /// By all threads, and it is read from no signalfd.
    Blocked,
    /// It does not reach the first process of a pid namespace, which has no handler for it.
    First,
    /// A thread of the kernel.
    Kernel,
}

impl Fate {
    #[must_use]
    pub(crate) fn of(facts: &Facts, is_kernels: bool) -> Self {
        match facts {
            _ if is_kernels => Self::Kernel,
            Facts { is_awaited: true, .. } => Self::Awaited,
            Facts { blocked: true, has_signalfd: true, .. } => Self::Signalfd,
            Facts { ignored: true, .. } => Self::Ignored,
            Facts { blocked: true, .. } => Self::Blocked,
            Facts { caught: true, .. } => Self::Handler,
            Facts { is_init: true, .. } => Self::First,
            _ => Self::Ends,
        }
    }

    /// Whether the process itself decides how it ends.
    #[must_use]
    pub(crate) fn is_handled(self) -> bool {
        matches!(self, Self::Handler | Self::Awaited | Self::Signalfd)
    }

    /// One sentence.
    #[must_use]
    pub(crate) fn verdict(self, signal: &str) -> String {
        match self {
            Self::Handler => format!("a handler takes {signal}"),
            Self::Awaited => format!("a thread waits for {signal} (sigwait) and takes it"),
            Self::Signalfd => format!("{signal} is blocked, and read from a signalfd"),
            Self::Ends => format!("{signal} ends it at once: it finishes nothing"),
            Self::Ignored => format!("{signal} is ignored: it goes on"),
            Self::Blocked => {
                format!("all its threads block {signal}: nothing happens until one of them unblocks it")
            }
            Self::First => format!(
                "{signal} does not reach it: it is the first process of its pid namespace, without a handler"
            ),
            Self::Kernel => "it is a thread of the kernel, which no signal ends".to_owned(),
        }
    }

    /// What to do; `others` are the signals for which it has a handler.
    #[must_use]
    pub(crate) fn advice(self, signal: &str, others: &[&str]) -> String {
        let instead = match others {
            [] => String::new(),
            others => {
                format!("; it has handlers for {}: see what its manual says of them", others.join(", "))
            }
        };
        match self {
            Self::Handler | Self::Awaited | Self::Signalfd => {
                format!("`--send {signal}` sends it, and shows whether and how it stops")
            }
            Self::Ends => {
                format!("give it a handler that closes its listeners and finishes what is under way{instead}")
            }
            Self::Ignored => {
                format!(
                    "send another signal, or give it a handler; whoever starts it may have it ignored{instead}"
                )
            }
            Self::Blocked => {
                format!("unblock {signal} in one of its threads, or read it there by sigwait{instead}")
            }
            Self::First => {
                format!("give it a handler, or have an init start it (docker run --init, tini){instead}")
            }
            Self::Kernel => "leave it alone".to_owned(),
        }
    }
}

/// Who supervises it, and what that means.
#[must_use]
pub(crate) fn supervision(supervisor: &Supervisor) -> String {
    match supervisor {
        Supervisor::Nobody => "nobody is known who would start it again".to_owned(),
        Supervisor::Unit(unit) => {
            format!("it is of systemd's {unit}, which may start it again: `systemctl stop {unit}` does not")
        }
        Supervisor::UserUnit(unit) => format!(
            "it is of {unit} of a user's systemd, which may start it again: `systemctl --user stop {unit}` does not"
        ),
        Supervisor::Pod => {
            "it is of a Kubernetes pod: the kubelet starts it again, unless the pod is deleted".to_owned()
        }
        Supervisor::Container => {
            "it runs in a container, which may be started again by its restart policy".to_owned()
        }
        Supervisor::Parent(name, pid) => format!("{name} ({pid}) supervises it, and will start it again"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_has_one_fate() {
        let none = Facts::default;
        for (facts, fate) in [
            (none(), Fate::Ends),
            (Facts { caught: true, ..none() }, Fate::Handler),
            (Facts { caught: true, blocked: true, ..none() }, Fate::Blocked),
            (Facts { blocked: true, has_signalfd: true, ..none() }, Fate::Signalfd),
            // Blocked it is kept, also where it would be ignored.
            (Facts { blocked: true, has_signalfd: true, ignored: true, ..none() }, Fate::Signalfd),
            (Facts { is_awaited: true, ..none() }, Fate::Awaited),
            (Facts { ignored: true, ..none() }, Fate::Ignored),
            (Facts { is_init: true, ..none() }, Fate::First),
            (Facts { is_init: true, caught: true, ..none() }, Fate::Handler),
        ] {
            assert_eq!(Fate::of(&facts, false), fate, "{facts:?}");
        }
        assert_eq!(Fate::of(&none(), true), Fate::Kernel);
    }

    #[test]
    fn only_what_the_process_takes_itself_counts_as_handled() {
        let handled = [Fate::Handler, Fate::Awaited, Fate::Signalfd];
        let others = [Fate::Ends, Fate::Ignored, Fate::Blocked, Fate::First, Fate::Kernel];
        assert!(handled.iter().all(|fate| fate.is_handled()) && others.iter().all(|fate| !fate.is_handled()));
        assert!(Fate::Ends.advice("TERM", &["QUIT"]).contains("handlers for QUIT"));
        assert_eq!(Fate::Ends.verdict("TERM"), "TERM ends it at once: it finishes nothing");
    }
}

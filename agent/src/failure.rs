//! What a user is told when something cannot be done: the cause, the remedy, and the exit code.

use std::fmt;

/// The exit codes that `plumb --help` promises. 2, wrong usage, is mostly clap's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    Ok,
    Error,
    Usage,
    Findings,
    MissingPrivilege,
    KernelCannot,
    AgentUnreachable,
    Interrupted,
    /// That of the command that was run.
    Command(u8),
}

impl Exit {
    #[must_use]
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Error => 1,
            Self::Usage => 2,
            Self::Findings => 3,
            Self::MissingPrivilege => 4,
            Self::KernelCannot => 5,
            Self::AgentUnreachable => 6,
            Self::Interrupted => 130,
            Self::Command(code) => code,
        }
    }
}

/// An error for the person at the keyboard, printed as one line.
#[derive(Debug)]
pub(crate) struct Failure {
    pub exit: Exit,
    pub cause: String,
    pub remedy: String,
}

impl Failure {
    #[must_use]
    pub(crate) fn new(exit: Exit, cause: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { exit, cause: cause.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.cause, self.remedy)
    }
}

impl std::error::Error for Failure {}

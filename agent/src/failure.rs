//! What a user is told when something cannot be done: the cause, the remedy, and the exit code.

use std::fmt;

/// The exit codes that `plumb --help` promises. 2, wrong usage, is clap's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    Ok = 0,
    Error = 1,
    MissingPrivilege = 4,
    KernelCannot = 5,
    AgentUnreachable = 6,
    Interrupted = 130,
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

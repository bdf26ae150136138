//! What a command and its descendants leave behind. Pure but for the names of stacks.
//!
//! `tree` follows the processes by their events, `traces` keeps the stacks beside these, `closes` finds closes that hit
//! nothing, `sites` puts together what has one origin, `suppressions` says what of it is meant, `report` says the rest.

mod closes;
mod sites;
mod traces;
mod tree;

pub(crate) use self::{
    sites::{Child, Example, Site, Sites},
    traces::{Namer, Trace, Traces, Wanted},
    tree::{Beside, Drift, Ended, Open, Process, Slot, Through, Tree},
};

/// What a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    /// Fds open at the end of the process that made them.
    Fd,
    /// Fds that another program got by mistake.
    ExecFd,
    /// Threads that ran at the end of their process.
    Thread,
    /// A number closed twice.
    DoubleClose,
    /// A number closed that another thread had opened and still used.
    ForeignClose,
    /// Children that nobody waited for.
    Zombie,
    /// Children that ran when the command had ended.
    Orphan,
}

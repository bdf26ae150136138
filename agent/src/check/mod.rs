//! What a command and its descendants leave behind. Pure but for the names of stacks.
//!
//! `tree` follows the processes by their events, `traces` keeps the stacks beside these, `closes` finds closes that hit
//! nothing, `sites` puts together what has one origin, `rounds` sees what grows from one to the next, `suppress` knows
//! what is meant, `report` says the rest.

mod closes;
mod interpreter;
mod report;
mod rounds;
mod sites;
mod suppress;
mod traces;
mod tree;

pub(crate) use self::{
    report::{Cost, Losses, Report, Subjects},
    rounds::Rounds,
    sites::{Child, Example, Judged, Sites},
    suppress::{Kind, MAX_FILE, Suppressions},
    traces::{Namer, Traces, Wanted},
    tree::{Beside, Drift, Open, Tree},
};

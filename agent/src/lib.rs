//! plumb: finds fd and thread leaks in unmodified processes of a Linux host.
//!
//! In the order in which what the kernel knows becomes something a person reads: `kernel` loads and
//! reads the programs, `decode` makes events of bytes, `observe` runs both, `follow` decides whose fds are
//! followed, `table` holds the processes, `origins` where their fds came from, `detect` judges them, `evidence` and `report` say what leaks, `export`, `api`, `subscribe` and `cli` hand it out.
//! `admission` bounds whom is followed, `state` keeps findings over a restart, `symbolise` gives stacks the names
//! of functions and lines.
//! `daemon` puts the agent together, `supervisor` keeps its workers running.

mod admission;
mod advice;
mod api;
mod ask;
mod audit;
mod canary;
mod census;
mod check;
pub mod cli;
mod clock;
mod config;
mod daemon;
pub mod decode;
mod detail;
mod detect;
mod document;
mod drain;
mod evidence;
mod export;
mod failure;
mod files;
mod follow;
mod group;
mod history;
mod host;
pub mod kernel;
mod left;
mod line;
mod lock;
pub mod losses;
mod observe;
mod origins;
mod peer;
mod pids;
mod procfs;
mod report;
mod say;
mod services;
mod sockets;
mod stacks;
mod state;
mod subscribe;
mod supervisor;
pub mod symbolise;
mod table;
mod text;
mod thread_type;
mod view;
mod watchlist;

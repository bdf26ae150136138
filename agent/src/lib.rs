//! plumb: finds fd and thread leaks in unmodified processes of a Linux host.
//!
//! In the order in which what the kernel knows becomes something a person reads: `kernel` loads and
//! reads the programs, `decode` makes events of bytes, `observe` runs both, `table` holds the processes,
//! `detect` judges them, `evidence` and `report` say what leaks, `export`, `api` and `cli` hand it out.
//! `daemon` puts the agent together, `supervisor` keeps its workers running.

mod api;
pub mod cli;
mod clock;
mod config;
mod daemon;
pub mod decode;
mod detect;
mod document;
mod evidence;
mod export;
mod failure;
mod files;
mod group;
mod host;
pub mod kernel;
mod line;
mod observe;
mod procfs;
mod report;
mod supervisor;
mod table;
mod text;
mod view;

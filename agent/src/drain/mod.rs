//! Drain: registered services stop in order, by a signal, within a deadline, and never the wrong process.
//!
//! `service` says what is registered, `registry` what may be, `order` who waits for whom and `grants` how the time is
//! divided. `machine` is the course of one drain, without IO, `verdict` judges how each service ended, and `report` is what came of it. `driver` is the one task
//! that does what the machine wants: it finds processes (`matching`, `process`) and what they have started (`family`), looks at them (`facts`, judged by
//! `preflight`), signals them (`signaller`) or has systemd stop them (`units`), and keeps the `journal`.

mod actions;
mod active;
mod apply;
mod command;
mod course;
mod driver;
mod facts;
mod family;
mod grants;
mod identity;
mod journal;
mod leaving;
mod machine;
mod matching;
mod order;
mod preflight;
mod process;
mod registrations;
mod registry;
mod report;
mod reports;
mod service;
mod signaller;
mod sockets;
mod systemd;
mod triggers;
mod units;
mod verdict;
mod written;

pub(crate) use self::{
    command::{Asked, Command, Listed, Plan, Preflight, Registration, Settings, View},
    course::{NotSent, signal_name},
    driver::{Driver, Told},
    facts::{Facts, Listener, Supervisor, Tcp, of as facts_of, ports, tcp_of},
    grants::Stage as Grants,
    identity::ticks,
    process::{NoProcess, Process, pid_of, start_ticks},
    registry::{Caller, Refusal},
    report::{Document, ServiceDocument, State},
    service::{NO_NAME, Name, OnDeadline, PRESETS, Service, Signal, Stop, Target, deadline},
    signaller::send,
    triggers::{Shutdown, all, on_usr1, usr1},
    verdict::Verdict,
    written::{Drain, WrittenService},
};

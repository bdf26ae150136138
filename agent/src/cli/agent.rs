//! `plumb agent`: the daemon, in the foreground.

use std::io::{self, IsTerminal, Write};

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use super::Outcome;
use crate::{
    config::{Config, Given, LogFormat},
    daemon,
    failure::{Exit, Failure},
};

#[derive(Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    given: Given,
}

pub(super) fn run(arguments: Arguments) -> Outcome {
    let config = Config::resolve(arguments.given)?;
    log(config.log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let outcome = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut asked = async || {
            tokio::select! {
                _ = terminate.recv() => "TERM",
                _ = interrupt.recv() => "INT",
            }
        };
        let (first, again) = tokio::sync::oneshot::channel();
        let signals = async {
            let name = asked().await;
            // The daemon is gone only when it has failed by itself.
            let _ = first.send(name);
            asked().await;
        };
        let shutdown = async { again.await.unwrap_or("TERM") };
        tokio::select! {
            done = daemon::run(config, shutdown) => done.map(|()| Exit::Ok),
            () = signals => {
                Err(Failure::new(Exit::Interrupted, "stopped at once by a second signal", "nothing stays attached"))
            }
        }
    });
    // A thread that does not stop must not hold up the end of the process.
    runtime.shutdown_background();
    outcome
}

/// Standard error, which loses what cannot be written: its reader may have gone, and the log is told of no error, for it
/// would panic.
struct Lossy;

impl Write for Lossy {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = io::stderr().write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn log(format: LogFormat) {
    let filter = EnvFilter::try_from_env("PLUMB_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| Lossy);
    let builder = builder.log_internal_errors(false).with_target(false);
    match format {
        LogFormat::Json => builder.json().flatten_event(true).init(),
        LogFormat::Text => {
            let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            builder.with_ansi(colour).init();
        }
    }
}

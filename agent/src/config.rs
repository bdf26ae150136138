//! The agent's settings: flag before environment before file before default.

use std::{
    fs, io,
    net::SocketAddr,
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use clap::{Args, ValueEnum};
use serde::Deserialize;
use toml::Spanned;

use crate::{
    admission::DEFAULT_PROCESSES,
    detect::{Detect, Ignore, Settings},
    drain::{self, Drain, Driver, Refusal, Service, Target, WrittenService},
    failure::{Exit, Failure},
    follow::FdEvents,
};

/// Read when it exists and no other file is named.
pub(crate) const DEFAULT_FILE: &str = "/etc/plumb/plumb.toml";
/// Holds the lock and the control socket.
pub(crate) const DEFAULT_RUN_DIR: &str = "/run/plumb";
/// Holds the findings and the reports of drains over a restart.
const DEFAULT_STATE_DIR: &str = "/var/lib/plumb";
const DEFAULT_LISTEN: &str = "127.0.0.1:9469";

/// Form of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    #[default]
    Text,
    Json,
}

/// The settings as given on the command line and in the environment.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Given {
    /// Settings file [default: /etc/plumb/plumb.toml, if it exists]
    #[arg(long, env = "PLUMB_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address of /metrics, /healthz and /readyz [default: 127.0.0.1:9469]
    #[arg(long, env = "PLUMB_LISTEN", value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// Folder of the lock and the control socket [default: /run/plumb]
    #[arg(long, env = "PLUMB_RUN_DIR", value_name = "FOLDER")]
    run_dir: Option<PathBuf>,
    /// Folder where findings and reports of drains are kept over a restart [default: /var/lib/plumb]
    #[arg(long, env = "PLUMB_STATE_DIR", value_name = "FOLDER")]
    state_dir: Option<PathBuf>,
    /// When the fd programs are attached [default: auto]
    #[arg(long, env = "PLUMB_FD_EVENTS", value_name = "WHEN")]
    fd_events: Option<FdEvents>,
    /// Processes followed one by one at most [default: 65536]
    #[arg(long, env = "PLUMB_MAX_PROCESSES", value_name = "COUNT")]
    max_processes: Option<NonZeroUsize>,
    /// Form of the log on stderr [default: text]
    #[arg(long, env = "PLUMB_LOG_FORMAT", value_name = "FORMAT")]
    log_format: Option<LogFormat>,
}

/// The settings as written in the file.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Written {
    listen: Option<SocketAddr>,
    run_dir: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    fd_events: Option<FdEvents>,
    max_processes: Option<NonZeroUsize>,
    log_format: Option<LogFormat>,
    drain_on_sigterm: bool,
    detect: Detect,
    ignore: Vec<Ignore>,
    drain: Drain,
    service: Vec<Spanned<WrittenService>>,
}

/// The settings as meant.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Config {
    pub listen: SocketAddr,
    pub run_dir: PathBuf,
    pub state_dir: PathBuf,
    pub fd_events: FdEvents,
    pub max_processes: usize,
    pub log_format: LogFormat,
    pub settings: Settings,
    /// TERM and INT drain all services before the agent ends.
    pub drain_on_sigterm: bool,
    pub drain: Drain,
    pub services: Vec<Service>,
}

impl Config {
    /// Reads the file and puts what was given before it.
    pub(crate) fn resolve(given: Given) -> Result<Self, Failure> {
        let written = match &given.config {
            Some(path) => read(path)?,
            None if Path::new(DEFAULT_FILE).exists() => read(Path::new(DEFAULT_FILE))?,
            None => Written::default(),
        };
        let listen = given.listen.or(written.listen);
        Ok(Self {
            listen: match listen {
                Some(listen) => listen,
                None => DEFAULT_LISTEN.parse().expect("the default is an address"),
            },
            run_dir: given.run_dir.or(written.run_dir).unwrap_or_else(|| DEFAULT_RUN_DIR.into()),
            state_dir: given.state_dir.or(written.state_dir).unwrap_or_else(|| DEFAULT_STATE_DIR.into()),
            fd_events: given.fd_events.or(written.fd_events).unwrap_or_default(),
            max_processes: given
                .max_processes
                .or(written.max_processes)
                .map_or(DEFAULT_PROCESSES, NonZeroUsize::get),
            log_format: given.log_format.or(written.log_format).unwrap_or_default(),
            settings: Settings { detect: written.detect, ignore: written.ignore },
            drain_on_sigterm: written.drain_on_sigterm,
            drain: written.drain,
            services: written.service.into_iter().map(|service| service.into_inner().0).collect(),
        })
    }
}

/// The control socket below a run folder.
#[must_use]
pub(crate) fn socket(run_dir: &Path) -> PathBuf {
    run_dir.join("plumb.sock")
}

/// The socket below a run folder that everybody may connect to.
#[must_use]
pub(crate) fn open_socket(run_dir: &Path) -> PathBuf {
    run_dir.join("services.sock")
}

/// What to do about a key that nobody knows.
const UNKNOWN: &str = "known keys are listen, run_dir, state_dir, fd_events, max_processes, log_format and drain_on_sigterm, and the tables \
                       [detect], [[ignore]], [drain] and [[service]], whose keys README.md and docs/drain.md list";

fn read(path: &Path) -> Result<Written, Failure> {
    let text = fs::read_to_string(path).map_err(|error| {
        let remedy = match error.kind() {
            io::ErrorKind::NotFound => "create it, or leave out --config to use the defaults",
            io::ErrorKind::PermissionDenied => "make it readable for the user that plumb runs as",
            _ => "it must be a text file",
        };
        Failure::new(Exit::Error, format!("cannot read settings from {}: {error}", path.display()), remedy)
    })?;
    let line_of = |at: usize| 1 + text[..at].matches('\n').count();
    let written: Written = toml::from_str(&text).map_err(|error| {
        let line = error.span().map_or(1, |span| line_of(span.start));
        let message = error.message().replace('\n', " ");
        let remedy = if message.starts_with("unknown field") {
            UNKNOWN
        } else if message.contains("one of unit, cgroup") {
            "give exactly one of them; docs/drain.md has examples"
        } else {
            "correct that line; README.md and docs/drain.md have examples"
        };
        Failure::new(Exit::Error, format!("{}:{line}: {message}", path.display()), remedy)
    })?;
    if let Some(service) = written.service.iter().find(|one| one.get_ref().0.target == Target::Port(0)) {
        let (line, name) = (line_of(service.span().start), &service.get_ref().0.name);
        let cause = format!("{}:{line}: service {name} has port 0, on which nobody listens", path.display());
        return Err(Failure::new(Exit::Error, cause, "name a port from 1 to 65535"));
    }
    let services = written.service.iter().map(|service| service.get_ref().0.clone()).collect();
    check(services).map_err(|why| {
        let (cause, remedy) = why.of_settings();
        Failure::new(Exit::Error, format!("{}: {cause}", path.display()), remedy)
    })?;
    Ok(written)
}

/// Whether services can be registered together.
fn check(services: Vec<Service>) -> Result<(), Refusal> {
    Driver::check(&drain::Settings {
        services,
        deadline: Drain::default().deadline,
        run_dir: PathBuf::new(),
        state_dir: None,
        boot_id: String::new(),
        refused: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(text: &str, given: Given) -> Result<Config, Failure> {
        let file = std::env::temp_dir().join(format!(
            "plumb-config-{}-{:?}-{}",
            std::process::id(),
            std::thread::current().id(),
            text.len()
        ));
        fs::write(&file, text).unwrap();
        let config = Config::resolve(Given { config: Some(file.clone()), ..given });
        fs::remove_file(file).unwrap();
        config
    }

    #[test]
    fn what_is_given_comes_before_what_is_written_and_the_rest_is_default() {
        let given = Given { listen: Some(([127, 0, 0, 1], 1).into()), ..Given::default() };
        let config = resolved("listen = '127.0.0.1:2'\nlog_format = 'json'\n", given).unwrap();
        assert_eq!(config.listen.port(), 1);
        assert_eq!(config.log_format, LogFormat::Json);
        assert_eq!(config.run_dir, Path::new(DEFAULT_RUN_DIR));
    }

    #[test]
    fn what_is_wrong_in_a_table_is_named_with_its_line() {
        for (text, expected) in [
            ("\n[detect]\ngrowht = 9\n", ":3: unknown field `growht`"),
            ("[detect]\nutilisation = 80\n", ":1: utilisation is a part of the limit"),
            ("[detect.groups.'nginx.service']\nseconds = 1\n", "seconds 30 or more"),
            ("\n[[ignore]]\ncomm = 'java'\n", ":2: missing field `reason`"),
            ("[[ignore]]\nreason = 'x'\n", ":1: an [[ignore]] without group"),
            ("[[ignore]]\nreason = 'x'\npath = '/var/[a'\n", ":3: error parsing glob '/var/[a'"),
        ] {
            let failure = resolved(text, Given::default()).unwrap_err();
            assert!(failure.cause.contains(expected), "{text}: {failure}");
        }
        let text = "[detect]\ngrowth = 50\n[detect.groups.'a.service']\nseconds = 200\n";
        let detect = resolved(text, Given::default()).unwrap().settings.detect;
        assert_eq!((detect.of("a.service").growth, detect.of("a.service").seconds), (50, 200));
        assert_eq!((detect.of("b.service").growth, detect.of("b.service").seconds), (50, 105));
    }

    #[test]
    fn what_is_wrong_with_services_is_said_with_words_for_a_file() {
        let service =
            |name: &str, more: &str| format!("[[service]]\nname = '{name}'\nsignal = 'TERM'\n{more}\n");
        let (a, after_a) = (service("a", "port = 1"), service("b", "port = 2\nafter = ['a']"));
        for (text, cause, remedy) in [
            (
                service("a", "port = 1\ncgroup = '/a'"),
                "one of unit, cgroup",
                "exactly one of them; docs/drain.md",
            ),
            (service("a", "port = 1\npreset = 'nginx'"), "give one of the two", "docs/drain.md have"),
            (a.clone() + &service("b", "port = 0"), ":5: service b has port 0", "from 1 to 65535"),
            (a.clone() + &a, "two services have the name a", "a name of its own"),
            (after_a.clone(), "b has to wait for a, which is no service of this file", "add a [[service]]"),
            (
                after_a + &service("a", "port = 1\nafter = ['b']"),
                "they would wait for each other",
                "take one of them out of `after`",
            ),
        ] {
            let failure = resolved(&text, Given::default()).unwrap_err();
            assert!(
                failure.cause.contains(cause) && failure.cause.contains("plumb-config"),
                "{text}: {failure}"
            );
            assert!(failure.remedy.contains(remedy), "{text}: {failure}");
        }
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let failure = resolved("log_format = 'text'\nlisten_addr = 'x'\n", Given::default()).unwrap_err();
        assert!(failure.cause.contains(":2: unknown field `listen_addr`"), "{failure}");
        assert_eq!((failure.exit, failure.remedy.as_str()), (Exit::Error, UNKNOWN));
        let failure = resolved("log_format = 'xml'\n", Given::default()).unwrap_err();
        assert!(failure.remedy.starts_with("correct that line"), "{failure}");
    }
}

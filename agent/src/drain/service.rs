//! A service as it was registered: what it is, how it is asked to stop, and what it waits for.

use std::{collections::BTreeSet, fmt, ops::RangeInclusive, path::PathBuf, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

use super::{grants::Wish, identity::Identity, registry::is_admin};

/// Name of a service: 1 to 64 letters, digits, `_`, `-`, `.` and `@`, of which the first is a letter or a digit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub(crate) struct Name(String);

impl Name {
    /// `None` for what is no name.
    #[must_use]
    pub(crate) fn new(text: &str) -> Option<Self> {
        let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "_-.@".contains(letter);
        let begins = text.starts_with(|letter: char| letter.is_ascii_alphanumeric());
        (begins && text.len() <= 64 && text.chars().all(is_plain)).then(|| Self(text.to_owned()))
    }

    #[must_use]
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        Self::new(&text).ok_or_else(|| D::Error::custom(format!("{text:?} {NO_NAME}")))
    }
}

/// What is said of a name that is none.
pub(crate) const NO_NAME: &str =
    "is not a name: 1 to 64 letters, digits, '_', '-', '.' and '@', beginning with a letter or a digit";

/// A signal by which a service can be asked to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(into = "&'static str")]
pub(crate) struct Signal(i32);

/// KILL and STOP ask for nothing; the others mean something else to everybody.
const SIGNALS: [(&str, i32); 7] = [
    ("TERM", libc::SIGTERM),
    ("INT", libc::SIGINT),
    ("QUIT", libc::SIGQUIT),
    ("HUP", libc::SIGHUP),
    ("USR1", libc::SIGUSR1),
    ("USR2", libc::SIGUSR2),
    ("WINCH", libc::SIGWINCH),
];

impl Signal {
    pub(crate) const TERM: Self = Self(libc::SIGTERM);
    pub(crate) const INT: Self = Self(libc::SIGINT);
    pub(crate) const QUIT: Self = Self(libc::SIGQUIT);
    pub(crate) const USR1: Self = Self(libc::SIGUSR1);
    pub(crate) const WINCH: Self = Self(libc::SIGWINCH);

    /// By name, with or without `SIG`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let upper = text.to_ascii_uppercase();
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        if let Some((_, number)) = SIGNALS.iter().find(|(known, _)| *known == name) {
            return Ok(Self(*number));
        }
        let names: Vec<_> = SIGNALS.iter().map(|(name, _)| *name).collect();
        let why = if name == "KILL" {
            "KILL ends a process without asking: say on_deadline = \"kill\", or --kill, for what does not stop".to_owned()
        } else {
            format!("{text:?} is not a signal that asks to stop: {}", names.join(", "))
        };
        Err(why)
    }

    /// Every signal by which a service can be asked to stop.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        SIGNALS.iter().map(|(_, number)| Self(*number))
    }

    #[must_use]
    pub(crate) fn by_number(number: i32) -> Option<Self> {
        SIGNALS.iter().find(|(_, known)| *known == number).map(|_| Self(number))
    }

    /// As in signal(7) for x86.
    #[must_use]
    pub(crate) fn number(self) -> i32 {
        self.0
    }

    #[must_use]
    pub(crate) fn name(self) -> &'static str {
        SIGNALS.iter().find(|(_, number)| *number == self.0).map_or("?", |(name, _)| name)
    }
}

impl From<Signal> for &'static str {
    fn from(signal: Signal) -> Self {
        signal.name()
    }
}

impl<'de> Deserialize<'de> for Signal {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(from)?).map_err(D::Error::custom)
    }
}

/// How a kind of server is asked to stop so that it finishes what it has accepted.
#[derive(Debug)]
pub(crate) struct Preset {
    pub name: &'static str,
    pub signal: Signal,
    /// Sent when two thirds of its time are over.
    pub late: Option<Signal>,
    pub why: &'static str,
}

/// The signals of their manuals. Nothing else is known of a server by its name.
pub(crate) const PRESETS: [Preset; 9] = [
    Preset { name: "nginx", signal: Signal::QUIT, late: None, why: "finishes requests; TERM drops them" },
    Preset {
        name: "haproxy",
        signal: Signal::USR1,
        late: None,
        why: "closes its listeners and finishes sessions; TERM drops them",
    },
    Preset {
        name: "postgresql",
        signal: Signal::TERM,
        late: Some(Signal::INT),
        why: "waits for its clients to leave; INT ends their transactions",
    },
    Preset {
        name: "gunicorn",
        signal: Signal::TERM,
        late: None,
        why: "finishes requests; INT and QUIT drop them",
    },
    Preset { name: "redis", signal: Signal::TERM, late: None, why: "saves and ends" },
    Preset { name: "apache", signal: Signal::WINCH, late: None, why: "finishes requests; TERM drops them" },
    Preset { name: "php-fpm", signal: Signal::QUIT, late: None, why: "finishes requests; TERM drops them" },
    Preset {
        name: "mariadb",
        signal: Signal::TERM,
        late: None,
        why: "ends connections and writes what is dirty",
    },
    Preset {
        name: "envoy",
        signal: Signal::TERM,
        late: None,
        why: "ends at once: drain it through its API before",
    },
];

/// By what it stops.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stop {
    pub signal: Signal,
    /// Sent when two thirds of its time are over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub late: Option<Signal>,
    /// The preset that it was chosen by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
}

impl Stop {
    /// From what was given; the signal is never guessed.
    pub(crate) fn of(signal: Option<Signal>, preset: Option<&str>) -> Result<Self, String> {
        let names = || PRESETS.each_ref().map(|preset| preset.name).join(", ");
        match (signal, preset) {
            (Some(_), Some(_)) => Err("a preset has its own signal: give one of the two".to_owned()),
            (Some(signal), None) => Ok(Self { signal, late: None, preset: None }),
            (None, Some(name)) => match PRESETS.iter().find(|preset| preset.name == name) {
                Some(preset) => {
                    Ok(Self { signal: preset.signal, late: preset.late, preset: Some(name.to_owned()) })
                }
                None => Err(format!("there is no preset {name:?}: {}", names())),
            },
            (None, None) => Err(format!(
                "which signal asks it to finish its work? plumb does not guess: give a signal, or a preset: {}",
                names()
            )),
        }
    }
}

/// How the processes of a service are found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Target {
    /// A process that was registered, itself.
    Process(Identity),
    /// A systemd unit, by its full name.
    Unit(String),
    /// All processes of a cgroup and below, by its path below the cgroup root.
    Cgroup(String),
    /// The process that wrote its number there.
    Pidfile(PathBuf),
    /// Processes of an executable, by its path, whose arguments begin with these.
    Exe(PathBuf, Vec<String>),
    /// Processes that listen on a TCP port.
    Port(u16),
}

impl Target {
    /// In words.
    #[must_use]
    pub(crate) fn words(&self) -> String {
        match self {
            Self::Process(identity) => format!("process {} ({})", identity.pid, identity.comm),
            Self::Unit(unit) => format!("unit {unit}"),
            Self::Cgroup(path) => format!("cgroup {path}"),
            Self::Pidfile(path) => format!("pidfile {}", path.display()),
            Self::Exe(path, arguments) if arguments.is_empty() => path.display().to_string(),
            Self::Exe(path, arguments) => format!("{} {}", path.display(), arguments.join(" ")),
            Self::Port(port) => format!("port {port}"),
        }
    }
}

/// How long a drain or a service may take: with less than the shortest, there is no time left once the service is found.
const DEADLINES: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_hours(1);

/// Of a drain or of a service.
pub(crate) fn deadline(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(time) if DEADLINES.contains(&time) => Ok(time),
        _ => Err(format!("{text:?} is no deadline: such as 30s, between 100ms and 1h")),
    }
}

/// What happens to a service that is there at its deadline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum OnDeadline {
    /// It goes on running, and the report says so.
    #[default]
    Report,
    /// KILL.
    Kill,
}

/// A registered service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Service {
    pub name: Name,
    pub target: Target,
    /// These must be gone before it is asked to stop. `None`: all that were registered later.
    pub after: Option<BTreeSet<Name>>,
    /// `None` for a unit: systemd knows its signal.
    pub stop: Option<Stop>,
    /// Of the time between its first signal and its end; `None`: its share of what remains.
    pub deadline: Option<Duration>,
    pub on_deadline: OnDeadline,
    /// A shell command that is run before the signal; only from the settings.
    pub prestop: Option<String>,
    /// A shell command that succeeds while new work still comes: the signal waits until it fails; only from the settings.
    #[serde(default)]
    pub ready: Option<String>,
    /// User who registered it.
    pub uid: u32,
}

impl Service {
    /// What it asks for of the time of a drain.
    #[must_use]
    pub(crate) const fn wish(&self) -> Wish {
        Wish { own: self.deadline, is_admin: is_admin(self.uid) }
    }

    /// Whether something is to be awaited before its signal.
    #[must_use]
    pub(crate) const fn has_prestop(&self) -> bool {
        self.prestop.is_some() || self.ready.is_some()
    }

    /// And what.
    #[must_use]
    pub(crate) const fn awaited(&self) -> &'static str {
        match (&self.prestop, &self.ready) {
            (None, Some(_)) => "ready",
            (Some(_), Some(_)) => "prestop with ready",
            _ => "prestop",
        }
    }
}

#[cfg(test)]
impl Service {
    /// A service of root that listens on a port.
    pub(crate) fn example(name: &str) -> Self {
        Self {
            name: Name::new(name).expect("a name"),
            target: Target::Port(80),
            after: None,
            stop: Some(Stop { signal: Signal::TERM, late: None, preset: None }),
            deadline: None,
            on_deadline: OnDeadline::Report,
            prestop: None,
            ready: None,
            uid: 0,
        }
    }

    pub(crate) fn after(mut self, names: &[&str]) -> Self {
        self.after = Some(names.iter().map(|name| Name::new(name).expect("a name")).collect());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain_and_bounded() {
        for good in ["a", "web-1", "nginx@8080.service", &"x".repeat(64)] {
            assert!(Name::new(good).is_some(), "{good}");
        }
        for bad in ["", "-a", ".", "a b", "a/b", "\u{e4}", "a\n", &"x".repeat(65)] {
            assert!(Name::new(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_signal_is_named_and_never_guessed() {
        assert_eq!(Signal::parse("sigterm"), Ok(Signal::TERM));
        assert_eq!(Signal::parse("QUIT").unwrap().name(), "QUIT");
        assert!(Signal::parse("KILL").unwrap_err().contains("on_deadline"));
        assert!(Signal::parse("15").is_err() && Signal::parse("SEGV").is_err() && Signal::parse("").is_err());
        assert!(Stop::of(None, None).unwrap_err().contains("does not guess"));
        assert!(Stop::of(Some(Signal::TERM), Some("nginx")).is_err());
        assert!(Stop::of(None, Some("iis")).unwrap_err().contains("nginx"));
        let stop = Stop::of(None, Some("postgresql")).unwrap();
        assert_eq!((stop.signal, stop.late), (Signal::TERM, Some(Signal::INT)));
    }
}

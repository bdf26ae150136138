//! Services and drains as the settings have them.

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use serde::{Deserialize, Deserializer, de::Error as _};

use super::service::{self, Name, OnDeadline, Service, Signal, Stop, Target};

/// The table `[drain]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Drain {
    /// Of a whole drain.
    #[serde(deserialize_with = "duration")]
    pub deadline: Duration,
}

impl Default for Drain {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(30) }
    }
}

/// One `[[service]]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Fields")]
pub(crate) struct WrittenService(pub Service);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    name: Name,
    unit: Option<String>,
    cgroup: Option<String>,
    pidfile: Option<PathBuf>,
    exe: Option<PathBuf>,
    #[serde(default)]
    args: Vec<String>,
    port: Option<u16>,
    after: Option<BTreeSet<Name>>,
    signal: Option<Signal>,
    preset: Option<String>,
    #[serde(default, deserialize_with = "some_duration")]
    deadline: Option<Duration>,
    #[serde(default)]
    on_deadline: OnDeadline,
    prestop: Option<String>,
    ready: Option<String>,
}

fn duration<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(from)?;
    service::deadline(&text).map_err(D::Error::custom)
}

fn some_duration<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    duration(from).map(Some)
}

impl TryFrom<Fields> for WrittenService {
    type Error = String;

    fn try_from(fields: Fields) -> Result<Self, String> {
        let Fields { name, unit, cgroup, pidfile, exe, args, port, .. } = fields;
        let has_arguments = !args.is_empty();
        let is_exe = exe.is_some();
        let targets = [
            unit.map(Target::Unit),
            cgroup.map(Target::Cgroup),
            pidfile.map(Target::Pidfile),
            exe.map(|exe| Target::Exe(exe, args)),
            port.map(Target::Port),
        ];
        let mut targets = targets.into_iter().flatten();
        let (Some(target), None) = (targets.next(), targets.next()) else {
            return Err(format!("service {name} needs exactly one of unit, cgroup, pidfile, exe and port"));
        };
        if has_arguments && !is_exe {
            return Err(format!("service {name} has args without exe"));
        }
        let wrong = match &target {
            Target::Unit(unit) if !unit.contains('.') => {
                Some("the whole name of a unit, such as nginx.service")
            }
            Target::Cgroup(path) if !path.starts_with('/') || path.len() < 2 || path.ends_with('/') => {
                Some("a path below the cgroup root, such as /system.slice/nginx.service")
            }
            Target::Pidfile(path) | Target::Exe(path, _) if !path.is_absolute() => Some("an absolute path"),
            _ => None,
        };
        if let Some(what) = wrong {
            return Err(format!("service {name} needs {what}"));
        }
        let stop = if let Target::Unit(unit) = &target {
            if fields.signal.is_some() || fields.preset.is_some() {
                return Err(format!(
                    "service {name}: systemd stops {unit} by its own KillSignal=; leave out signal and preset"
                ));
            }
            None
        } else {
            let stop = Stop::of(fields.signal, fields.preset.as_deref());
            Some(stop.map_err(|why| format!("service {name}: {why}"))?)
        };
        Ok(Self(Service {
            name,
            target,
            after: fields.after,
            stop,
            deadline: fields.deadline,
            on_deadline: fields.on_deadline,
            prestop: fields.prestop,
            ready: fields.ready,
            uid: 0,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Service, String> {
        toml::from_str::<WrittenService>(text)
            .map(|written| written.0)
            .map_err(|error| error.message().to_owned())
    }

    #[test]
    fn a_service_is_written_as_it_is_meant() {
        let service = read(
            "name = 'web'\nexe = '/usr/sbin/nginx'\nargs = ['-c', 'a.conf']\nafter = ['edge']\npreset = 'nginx'\n\
             deadline = '10s'\non_deadline = 'kill'\nprestop = 'true'\nready = 'false'\n",
        );
        let service = service.unwrap();
        assert_eq!((service.prestop.as_deref(), service.ready.as_deref()), (Some("true"), Some("false")));
        let arguments = vec!["-c".to_owned(), "a.conf".to_owned()];
        assert_eq!(service.target, Target::Exe("/usr/sbin/nginx".into(), arguments));
        assert_eq!(service.stop.unwrap().signal, Signal::QUIT);
        assert_eq!(
            (service.deadline, service.on_deadline),
            (Some(Duration::from_secs(10)), OnDeadline::Kill)
        );
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, why) in [
            ("name = 'a'\nsignal = 'TERM'\n", "needs exactly one of"),
            ("name = 'a'\nport = 1\nunit = 'a.service'\n", "needs exactly one of"),
            ("name = 'a'\nport = 1\n", "does not guess"),
            ("name = 'a'\nport = 1\nsignal = 'KILL'\n", "on_deadline"),
            ("name = 'a'\nport = 1\nargs = ['x']\nsignal = 'TERM'\n", "without exe"),
            ("name = 'a'\nunit = 'a'\n", "whole name"),
            ("name = 'a'\nunit = 'a.service'\nsignal = 'TERM'\n", "KillSignal"),
            ("name = 'a'\ncgroup = '/'\nsignal = 'TERM'\n", "cgroup root"),
            ("name = 'a'\npidfile = 'a.pid'\nsignal = 'TERM'\n", "absolute"),
            ("name = 'a b'\nport = 1\nsignal = 'TERM'\n", "is not a name"),
            ("name = 'a'\nport = 1\nsignal = 'TERM'\ndeadline = '99ms'\n", "between"),
            ("name = 'a'\nport = 1\nsignal = 'TERM'\nafer = ['x']\n", "unknown field"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}

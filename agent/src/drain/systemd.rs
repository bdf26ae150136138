//! Owns the connections to systemd and to logind: which unit a process belongs to, what is set for it, stopping it,
//! and the host's own shutdown. Hands on values; what to stop and when is decided elsewhere.
//!
//! systemd is asked at its private socket, where root needs no bus daemon: during a shutdown the bus may be gone
//! before the services are. logind is on the system bus alone.

mod private;

use std::{collections::HashMap, future::Future, os::fd::OwnedFd, path::Path, time::Duration};

use futures_util::StreamExt;
use thiserror::Error;
use tokio::{net::UnixStream, sync::watch, time::timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;
use zbus::{
    Connection, ObjectPath, OwnedObjectPath, OwnedVariant, connection::Builder, fdo, proxy::CacheProperties,
};

use self::private::Private;

/// For root alone.
const PRIVATE: &str = "/run/systemd/private";
const BUS: &str = "/run/dbus/system_bus_socket";
const BUS_NAME: &str = "org.freedesktop.systemd1";
/// sd_booted(3): there exactly where systemd is the first process.
const BOOTED: &str = "/run/systemd/system";
/// systemd answers from one thread, which reloading all units of a large host keeps busy for seconds.
const CALL: Duration = Duration::from_secs(15);
/// What systemd answers when it is asked for what is not there.
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";
/// What every shutdown of the host starts.
const SHUTDOWN: &str = "shutdown.target";
/// The state of a host that does so.
pub(crate) const STOPPING: &str = "stopping";
#[cfg(test)]
const NOBODYS: [&str; 2] =
    ["org.freedesktop.systemd1.NoUnitForPID", "org.freedesktop.systemd1.NoSuchProcess"];

/// Why nobody can be asked to stop units, or to hold a shutdown back.
#[derive(Debug, Error)]
pub(crate) enum Unavailable {
    #[error(
        "systemd does not run this host ({BOOTED} is not there), so units cannot be stopped and a shutdown cannot be \
         awaited; register processes with a signal of their own instead"
    )]
    NotBooted,
    #[error(
        "systemd answers neither at {PRIVATE} ({private}) nor on the system bus ({bus}); run plumb as root, and in a \
         container with /run/systemd and /run/dbus of the host"
    )]
    SystemdSilent { private: String, bus: String },
    #[error(
        "logind does not answer on the system bus ({bus}), so a shutdown is not held back; start dbus and \
         systemd-logind, and give a container /run/dbus of the host"
    )]
    LogindSilent { bus: String },
}

/// Why one question or command failed.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error("{said}; `systemctl list-units --all` lists the units there are")]
    NoSuchUnit { said: String },
    #[error("not allowed to {what} ({said}); run plumb as root")]
    Denied { what: String, said: String },
    #[error(
        "could not {what}: no answer within {within:?}; `systemctl list-jobs` shows what systemd waits for"
    )]
    Late { what: String, within: Duration },
    #[error(
        "could not {what}: the connection ended ({said}), as it does when systemd re-executes itself; connect again"
    )]
    Disconnected { what: String, said: String },
    #[error("could not {what}: {said}; the journal of the host may say more")]
    Refused { what: String, said: String },
    #[error("could not {what}: the answer has no valid {property}; this systemd is not one that plumb knows")]
    Property { what: String, property: &'static str },
}

#[zbus::proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
trait Manager {
    #[zbus(name = "GetUnitByPID")]
    fn get_unit_by_pid(&self, pid: u32) -> zbus::Result<OwnedObjectPath>;
    fn load_unit(&self, name: &str) -> zbus::Result<OwnedObjectPath>;
    fn stop_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn subscribe(&self) -> zbus::Result<()>;
    #[zbus(property)]
    fn system_state(&self) -> zbus::Result<String>;
    #[zbus(signal)]
    fn job_removed(&self, id: u32, job: ObjectPath<'_>, unit: &str, result: &str) -> zbus::Result<()>;
    #[zbus(signal)]
    fn job_new(&self, id: u32, job: ObjectPath<'_>, unit: &str) -> zbus::Result<()>;
}

#[zbus::proxy(interface = "org.freedesktop.DBus.Properties", default_service = "org.freedesktop.systemd1")]
trait Properties {
    fn get_all(&self, interface: &str) -> zbus::Result<HashMap<String, OwnedVariant>>;
}

#[zbus::proxy(
    interface = "org.freedesktop.login1.Manager",
    default_service = "org.freedesktop.login1",
    default_path = "/org/freedesktop/login1"
)]
trait Login {
    fn inhibit(&self, what: &str, who: &str, why: &str, mode: &str) -> zbus::Result<zbus::OwnedFd>;
    #[zbus(property, name = "InhibitDelayMaxUSec")]
    fn inhibit_delay_max_usec(&self) -> zbus::Result<u64>;
    #[zbus(property)]
    fn preparing_for_shutdown(&self) -> zbus::Result<bool>;
    #[zbus(signal)]
    fn prepare_for_shutdown(&self, start: bool) -> zbus::Result<()>;
}

/// A connection to the systemd that runs this host. Each call is bounded by 15 s. When systemd re-executes itself
/// the connection ends, and every call says [`Error::Disconnected`].
#[derive(Debug)]
pub(crate) struct Systemd {
    connection: Connection,
    manager: ManagerProxy<'static>,
}

/// What systemd has of a unit at one moment: all of it is from one answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unit {
    /// The unit's own name, also if it was asked for by an alias.
    pub(crate) name: String,
    /// "active", "inactive", "failed", "activating", "deactivating", "reloading", and later ones.
    pub(crate) active_state: String,
    /// Finer, and of the unit's kind: of a service "running", "dead", "stop-sigterm", "auto-restart" and more.
    pub(crate) sub_state: String,
    /// Absent when there is none at present, and for other kinds than services.
    pub(crate) main_pid: Option<u32>,
    /// Below the root of the cgroup hierarchy, with a slash first; empty while the unit has no process.
    pub(crate) control_group: String,
    /// The signal that asks to stop (`KillSignal=`); 15 if the unit does not say. 0 for a kind without processes.
    pub(crate) kill_signal: i32,
    /// `Restart=`: "no", "always", "on-failure" and more; empty for other kinds than services. A stop that systemd was
    /// asked for is not followed by a restart, the end of a process that somebody else signalled is.
    pub(crate) restart: String,
    /// From `KillSignal=` to SIGKILL (`TimeoutStopSec=`). Absent for "infinity" and for a kind without processes.
    pub(crate) timeout_stop: Option<Duration>,
    /// How its last run has ended: "success", "exit-code", "signal", "timeout" (it was killed) and more; empty for
    /// kinds that do not say.
    pub(crate) result: String,
    /// `Type=`: "simple", "notify", "forking", "oneshot" and more; empty for other kinds than services.
    pub(crate) service_type: String,
}

/// A stop that systemd has accepted. systemd goes on with it when this is dropped.
#[derive(Debug)]
pub(crate) struct Job {
    unit: String,
    result: watch::Receiver<Option<String>>,
    _watcher: AbortOnDropHandle<()>,
}

impl Systemd {
    /// # Errors
    /// When this host does not run systemd, or when it does not answer this process.
    pub(crate) async fn connect() -> Result<Self, Unavailable> {
        Self::connect_at(PRIVATE, BUS, BOOTED).await
    }

    async fn connect_at(private: &str, bus: &str, booted: &str) -> Result<Self, Unavailable> {
        let at_private = match Self::on(connect(private, true).await).await {
            Ok(systemd) => return Ok(systemd),
            Err(error) => error.to_string(),
        };
        let on_bus = match Self::on(connect(bus, false).await).await {
            Ok(systemd) => {
                warn!(
                    "systemd is asked over the system bus, which may end before a shutdown does: {at_private}"
                );
                return Ok(systemd);
            }
            Err(error) => error.to_string(),
        };
        // Only now: a container may have been given the socket without this folder.
        if !Path::new(booted).exists() {
            return Err(Unavailable::NotBooted);
        }
        Err(Unavailable::SystemdSilent { private: at_private, bus: on_bus })
    }

    async fn on(connection: Result<Connection, Error>) -> Result<Self, Error> {
        let connection = connection?;
        let manager = ManagerProxy::builder(&connection).cache_properties(CacheProperties::No);
        let manager =
            bounded("connect to systemd", manager.destination(systemd(&connection)).build()).await?;
        if connection.is_bus() {
            // On the private socket everybody is told of jobs, on the bus only who has subscribed.
            bounded("subscribe to systemd's signals", manager.subscribe()).await?;
        }
        let systemd = Self { connection, manager };
        // A socket that accepts may still have nobody behind it.
        systemd.state().await?;
        Ok(systemd)
    }

    /// What systemd says of the host: "running", "degraded" (a unit has failed), "starting", "stopping" and more.
    pub(crate) async fn state(&self) -> Result<String, Error> {
        bounded("read the state of systemd", self.manager.system_state()).await
    }

    /// Resolves when the host goes down, at once if that was before the call. By then systemd has begun to stop units:
    /// those that need not wait for others have their signal. Can be dropped and called again.
    pub(crate) async fn stopping(&self) -> Result<(), Error> {
        let what = "wait for a shutdown";
        // The state is no property that changes are told of; that this job is there, is.
        let mut jobs = bounded(what, self.manager.receive_job_new()).await?;
        if self.state().await? == STOPPING {
            return Ok(());
        }
        while let Some(job) = jobs.next().await {
            if job.args().is_ok_and(|arguments| arguments.unit == SHUTDOWN) && self.state().await? == STOPPING
            {
                return Ok(());
            }
        }
        Err(Error::Disconnected { what: what.to_owned(), said: "no more signals".to_owned() })
    }

    #[cfg(test)]
    /// The name of the unit whose cgroup holds the process; `None` when no unit's does, or when there is no such
    /// process. `pid` is a number of systemd's own pid namespace, and may be another process's by the time of the
    /// answer: whoever acts on it compares the process before and after.
    pub(crate) async fn unit_of(&self, pid: u32) -> Result<Option<String>, Error> {
        // systemd takes 0 for whoever asks.
        if pid == 0 {
            return Ok(None);
        }
        let what = format!("find the unit of process {pid}");
        let path = match timeout(CALL, self.manager.get_unit_by_pid(pid)).await {
            Ok(Ok(path)) => path,
            Ok(Err(zbus::Error::MethodError(name, ..))) if NOBODYS.contains(&name.as_str()) => {
                return Ok(None);
            }
            Ok(Err(error)) => return Err(Error::new(what, error)),
            Err(_) => return Err(Error::Late { what, within: CALL }),
        };
        Ok(Some(self.properties(what, path).await?.text("Id")?))
    }

    /// The unit of this name, with its suffix, such as "nginx.service".
    ///
    /// # Errors
    /// [`Error::NoSuchUnit`] when there is neither a unit file nor a running unit of this name.
    pub(crate) async fn unit(&self, name: &str) -> Result<Unit, Error> {
        let what = format!("read unit {name}");
        // GetUnit knows no unit that is inactive and nobody refers to.
        let path = bounded(&what, self.manager.load_unit(name)).await?;
        let properties = self.properties(what, path).await?;
        if properties.text("LoadState")? == "not-found" && properties.text("ActiveState")? == "inactive" {
            return Err(Error::NoSuchUnit { said: format!("systemd knows no unit {name}") });
        }
        Unit::new(&properties)
    }

    /// All that systemd has of one unit.
    async fn properties(&self, what: String, unit: OwnedObjectPath) -> Result<Values, Error> {
        let proxy = PropertiesProxy::builder(&self.connection).destination(systemd(&self.connection));
        let all = async {
            let proxy = proxy.path(unit).cache_properties(CacheProperties::No).build().await?;
            // No interface means all of them, so that they are of one moment.
            proxy.get_all("").await
        };
        let values = bounded(&what, all).await?;
        Ok(Values { what, values })
    }

    /// Has systemd stop the unit, in place of whatever it was about to do with it. Returns as soon as systemd has
    /// accepted; with a unit that is inactive already, the job is done at once.
    ///
    /// May be dropped at any time: then systemd has been told, or has not.
    pub(crate) async fn stop(&self, name: &str) -> Result<Job, Error> {
        let what = format!("stop {name}");
        // Before the call: a job can be over before its reply is read.
        let mut removed = bounded(&what, self.manager.receive_job_removed()).await?;
        let call = bounded(&what, self.manager.stop_unit(name, "replace"));
        let mut call = std::pin::pin!(call);
        let mut early = HashMap::new();
        // zbus reads no further while a stream is full, so this one is emptied beside the call.
        let job = loop {
            tokio::select! {
                reply = &mut call => break reply?,
                Some(signal) = removed.next() => early.extend(ended(&signal)),
            }
        };
        let (sender, result) = watch::channel(early.remove(job.as_str()));
        let watcher = tokio::spawn(async move {
            while sender.borrow().is_none()
                && let Some(signal) = removed.next().await
            {
                if let Some((_, result)) = ended(&signal).filter(|(ended, _)| ended == job.as_str()) {
                    sender.send_replace(Some(result));
                }
            }
        });
        Ok(Job { unit: name.to_owned(), result, _watcher: AbortOnDropHandle::new(watcher) })
    }
}

impl Job {
    /// Waits until systemd is through with the job. "done" says that the unit has no process any more: its state is
    /// then "failed" if it had to be killed, if its main process ended with an error, or by a signal other than
    /// SIGHUP, SIGINT, SIGTERM and SIGPIPE (`SuccessExitStatus=`), else "inactive". "canceled" (somebody else's job took its place), "timeout" (the job's own,
    /// `JobTimeoutSec=`) and others do not say so. Can be dropped and called again.
    ///
    /// # Errors
    /// [`Error::Late`] leaves the job as it is. After [`Error::Disconnected`], [`Systemd::unit`] of a new connection
    /// tells what became of the unit.
    pub(crate) async fn result(&mut self, within: Duration) -> Result<String, Error> {
        let what = || format!("see the end of stopping {}", self.unit);
        match timeout(within, self.result.wait_for(Option::is_some)).await {
            Ok(Ok(result)) => Ok(result.clone().unwrap_or_default()),
            Ok(Err(_)) => Err(Error::Disconnected { what: what(), said: "no more signals".to_owned() }),
            Err(_) => Err(Error::Late { what: what(), within }),
        }
    }
}

/// The job that has ended, and how.
fn ended(signal: &JobRemoved) -> Option<(String, String)> {
    let arguments = signal.args().ok()?;
    Some((arguments.job.to_string(), arguments.result.to_owned()))
}

/// The properties of one unit, by name.
struct Values {
    /// What they were asked for.
    what: String,
    values: HashMap<String, OwnedVariant>,
}

impl Values {
    /// `None` when this kind of unit has no such property.
    fn find<'a, T: TryFrom<&'a zbus::Variant<'a>>>(
        &'a self,
        property: &'static str,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.values.get(property) else { return Ok(None) };
        let what = || self.what.clone();
        T::try_from(value).map(Some).map_err(|_| Error::Property { what: what(), property })
    }

    fn text(&self, property: &'static str) -> Result<String, Error> {
        let text = self.find(property)?;
        text.ok_or_else(|| Error::Property { what: self.what.clone(), property })
    }
}

impl Unit {
    fn new(values: &Values) -> Result<Self, Error> {
        let text = |property| Ok::<_, Error>(values.find::<String>(property)?.unwrap_or_default());
        Ok(Self {
            name: values.text("Id")?,
            active_state: values.text("ActiveState")?,
            sub_state: values.text("SubState")?,
            main_pid: values.find("MainPID")?.filter(|pid| *pid != 0),
            control_group: text("ControlGroup")?,
            kill_signal: values.find("KillSignal")?.unwrap_or_default(),
            restart: text("Restart")?,
            timeout_stop: values.find("TimeoutStopUSec")?.and_then(finite),
            result: text("Result")?,
            service_type: text("Type")?,
        })
    }
}

/// systemd's largest number of µs is its infinity.
fn finite(micros: u64) -> Option<Duration> {
    (micros != u64::MAX).then(|| Duration::from_micros(micros))
}

/// A connection to the logind of this host, which is asked before the host shuts down.
#[derive(Debug)]
pub(crate) struct Logind {
    login: LoginProxy<'static>,
}

impl Logind {
    /// # Errors
    /// When there is no system bus, or no logind on it that answers this process.
    pub(crate) async fn connect() -> Result<Self, Unavailable> {
        Self::connect_at(BUS).await
    }

    async fn connect_at(bus: &str) -> Result<Self, Unavailable> {
        let connected = async {
            let connection = connect(bus, false).await?;
            let login = LoginProxy::builder(&connection).cache_properties(CacheProperties::No).build();
            let logind = Self { login: bounded("connect to logind", login).await? };
            logind.max_delay().await?;
            Ok::<_, Error>(logind)
        };
        connected.await.map_err(|error| Unavailable::LogindSilent { bus: error.to_string() })
    }

    /// For how long an inhibitor holds a shutdown back at most (`InhibitDelayMaxSec=` of logind.conf, 5 s if it does
    /// not say).
    pub(crate) async fn max_delay(&self) -> Result<Duration, Error> {
        let micros = bounded("read logind's InhibitDelayMaxSec", self.login.inhibit_delay_max_usec()).await?;
        Ok(Duration::from_micros(micros))
    }

    /// Resolves when a shutdown has been asked for, at once if that was before the call. It then waits for those
    /// that hold an [`Inhibitor`], until [`Self::max_delay`] is over. Can be dropped and called again.
    ///
    /// Not every shutdown comes this way: `systemctl reboot --force`, and `systemctl start reboot.target`, go past
    /// logind.
    ///
    /// # Errors
    /// When the bus or this logind has ended. Another logind is asked for an inhibitor anew.
    pub(crate) async fn prepare_for_shutdown(&self) -> Result<(), Error> {
        self.preparing(true).await
    }

    /// Resolves when no shutdown is asked for any more: the last one was called off, or has failed.
    pub(crate) async fn called_off(&self) -> Result<(), Error> {
        self.preparing(false).await
    }

    async fn preparing(&self, wanted: bool) -> Result<(), Error> {
        let what = "wait for a shutdown";
        let mut signals = bounded(what, self.login.receive_prepare_for_shutdown()).await?;
        let mut owners = bounded(what, self.login.inner().receive_owner_changed()).await?;
        if bounded(what, self.login.preparing_for_shutdown()).await? == wanted {
            return Ok(());
        }
        let ended = |said: &str| Error::Disconnected { what: what.to_owned(), said: said.to_owned() };
        loop {
            tokio::select! {
                signal = signals.next() => match signal {
                    Some(signal) if signal.args().is_ok_and(|arguments| arguments.start == wanted) => return Ok(()),
                    Some(_) => {}
                    None => return Err(ended("no more signals")),
                },
                _ = owners.next() => return Err(ended("logind has ended, or was started anew")),
            }
        }
    }
}

/// A shutdown waits while this is held, for [`Logind::max_delay`] at most.
#[derive(Debug)]
pub(crate) struct Inhibitor {
    /// logind keeps the other end, and sees it closed.
    _held: OwnedFd,
}

impl Inhibitor {
    /// `why` is what `systemd-inhibit --list` shows.
    pub(crate) async fn take(logind: &Logind, why: &str) -> Result<Self, Error> {
        let held = logind.login.inhibit("shutdown", "plumb", why, "delay");
        Ok(Self { _held: bounded("take an inhibitor of logind", held).await?.into() })
    }
}

/// `is_private`: systemd itself is at the other end, and no bus.
async fn connect(socket: &str, is_private: bool) -> Result<Connection, Error> {
    let connection = async {
        if is_private {
            let socket = UnixStream::connect(socket).await?;
            return Builder::socket(Private(socket)).p2p().build().await;
        }
        Builder::address(format!("unix:path={socket}").as_str()).build().await
    };
    bounded(&format!("connect to {socket}"), connection).await
}

/// How systemd is addressed on this connection, and how it signs.
fn systemd(connection: &Connection) -> &'static str {
    if connection.is_bus() { BUS_NAME } else { private::SYSTEMD }
}

/// `what` completes "could not".
async fn bounded<T>(what: &str, call: impl Future<Output = zbus::Result<T>>) -> Result<T, Error> {
    match timeout(CALL, call).await {
        Ok(done) => done.map_err(|error| Error::new(what.to_owned(), error)),
        Err(_) => Err(Error::Late { what: what.to_owned(), within: CALL }),
    }
}

impl Error {
    fn new(what: String, error: zbus::Error) -> Self {
        let said = error.to_string();
        match error {
            zbus::Error::MethodError(name, text, _) => {
                let said = text.unwrap_or_else(|| name.to_string());
                match name.as_str() {
                    NO_SUCH_UNIT => Self::NoSuchUnit { said },
                    _ => Self::Refused { what, said },
                }
            }
            zbus::Error::FDO(error) => match *error {
                fdo::Error::AccessDenied(said) | fdo::Error::InteractiveAuthorizationRequired(said) => {
                    Self::Denied { what, said }
                }
                fdo::Error::Disconnected(said) => Self::Disconnected { what, said },
                _ => Self::Refused { what, said },
            },
            zbus::Error::InputOutput(_) => Self::Disconnected { what, said },
            _ => Self::Refused { what, said },
        }
    }
}

#[cfg(test)]
mod tests;

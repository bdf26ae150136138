//! Against a peer that plays systemd at its private socket, on every host; and against a real one (`booted`), which
//! `cargo xtask test` runs in a virtual machine: `cargo xtask vm --systemd` boots one by hand.

use std::{path::PathBuf, sync::atomic::AtomicU32};

use tokio::net::UnixListener;
use zbus::{DynamicType, Guid, Message, MessageStream, Variant, message, names::UniqueName};

use super::*;

const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const JOB: &str = "/org/freedesktop/systemd1/job/7";
/// More than zbus keeps for a stream that nobody reads.
const MANY: u32 = 200;

/// A folder for sockets; removed with all in it.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("plumb-systemd-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

async fn removed(to: &Connection, job: &str, result: &str) {
    let (job, unit) = (ObjectPath::try_from(job).unwrap(), "some.service");
    let body = (7_u32, job, unit, result);
    send(to, Message::signal("/org/freedesktop/systemd1", MANAGER, "JobRemoved"), &body).await;
}

/// Signed as systemd does it, with a name that zbus would not let anybody use.
async fn send(to: &Connection, message: message::Builder<'_>, body: &(impl serde::Serialize + DynamicType)) {
    let message = message.sender(UniqueName::from_str_unchecked(BUS_NAME));
    to.send(&message.build(body).unwrap()).await.unwrap();
}

/// Others' jobs that end.
async fn others(to: &Connection) {
    for number in 1000..1000 + MANY {
        removed(to, &format!("/org/freedesktop/systemd1/job/{number}"), "failed").await;
    }
}

/// Plays systemd to the first who connects. How a stop goes is in the unit's name. Ends with that connection.
async fn play_systemd(listener: UnixListener) {
    let (stream, _) = listener.accept().await.unwrap();
    let stream = stream.into_std().unwrap();
    let connection = Builder::unix_stream(stream).server(Guid::generate()).p2p().build().await.unwrap();
    let mut calls = MessageStream::from(&connection);
    while let Some(Ok(call)) = calls.next().await {
        if answer(&connection, &call).await.is_none() {
            return;
        }
    }
}

async fn answer(connection: &Connection, call: &Message) -> Option<()> {
    let header = call.header();
    let unit = || call.body().deserialize::<(String, String)>().unwrap().0;
    let accept = || {
        let job = ObjectPath::try_from(JOB).unwrap();
        let header = header.clone();
        async move { send(connection, Message::method_return(&header), &job).await }
    };
    match header.member()?.as_str() {
        "Get" => {
            let reply = Message::method_return(&header);
            send(connection, reply, &Variant::from("running")).await;
        }
        "StopUnit" => match unit().as_str() {
            "early.service" => {
                others(connection).await;
                removed(connection, JOB, "done").await;
                others(connection).await;
                accept().await;
            }
            "late.service" => {
                accept().await;
                others(connection).await;
                removed(connection, JOB, "timeout").await;
            }
            "lost.service" => {
                accept().await;
                return None;
            }
            "slow.service" => accept().await,
            other => {
                let text = format!("Unit {other} not loaded.");
                send(connection, Message::error(&header, NO_SUCH_UNIT), &text).await;
            }
        },
        // As systemd: nobody has a name here.
        _ => {
            let unknown = "org.freedesktop.DBus.Error.UnknownMethod";
            send(connection, Message::error(&header, unknown), &"unknown").await;
        }
    }
    Some(())
}

async fn played() -> (Systemd, Folder) {
    let folder = Folder::new();
    let socket = folder.path("private");
    tokio::spawn(play_systemd(UnixListener::bind(&socket).unwrap()));
    let systemd = Systemd::connect_at(&socket, &folder.path("bus"), &folder.path("booted")).await.unwrap();
    (systemd, folder)
}

const SOON: Duration = Duration::from_secs(30);

#[tokio::test]
async fn without_systemd_that_is_what_is_said() {
    let folder = Folder::new();
    let at = |booted: &str| {
        let [private, bus, booted] = ["private", "bus", booted].map(|name| folder.path(name));
        async move { Systemd::connect_at(&private, &bus, &booted).await }
    };
    assert!(matches!(at("none").await, Err(Unavailable::NotBooted)));
    std::fs::create_dir(folder.path("booted")).unwrap();
    let error = at("booted").await.unwrap_err().to_string();
    assert!(error.contains("No such file") && error.contains("run plumb as root"), "{error}");
    let error = Logind::connect_at(&folder.path("bus")).await.unwrap_err().to_string();
    assert!(error.contains("No such file") && error.contains("start dbus"), "{error}");
}

#[tokio::test]
async fn a_socket_that_nobody_answers_at_is_not_systemd() {
    let folder = Folder::new();
    let (private, bus, booted) = (folder.path("private"), folder.path("bus"), folder.path("booted"));
    let listener = UnixListener::bind(&private).unwrap();
    // Whoever connects is hung up on.
    tokio::spawn(async move {
        loop {
            drop(listener.accept().await);
        }
    });
    assert!(matches!(Systemd::connect_at(&private, &bus, &booted).await, Err(Unavailable::NotBooted)));
}

#[tokio::test]
async fn a_job_that_ends_before_or_after_the_reply_is_not_missed() {
    let (systemd, _folder) = played().await;
    assert_eq!(systemd.state().await.unwrap(), "running");
    for (unit, result) in [("early.service", "done"), ("late.service", "timeout")] {
        let mut job = systemd.stop(unit).await.unwrap();
        assert_eq!(job.result(SOON).await.unwrap(), result, "{unit}");
        assert_eq!(job.result(SOON).await.unwrap(), result, "asked again");
    }
}

#[tokio::test]
async fn a_job_that_nobody_asks_about_delays_nothing() {
    let (systemd, _folder) = played().await;
    let slow = systemd.stop("slow.service").await.unwrap();
    let mut job = systemd.stop("early.service").await.unwrap();
    assert_eq!(job.result(SOON).await.unwrap(), "done");
    drop(slow);
    assert_eq!(systemd.state().await.unwrap(), "running");
}

#[tokio::test]
async fn what_keeps_a_stop_from_ending_is_said() {
    let (systemd, _folder) = played().await;
    let error = systemd.stop("none.service").await.unwrap_err();
    assert!(matches!(error, Error::NoSuchUnit { .. }), "{error}");
    assert!(error.to_string().starts_with("Unit none.service not loaded.; "), "{error}");

    let mut job = systemd.stop("slow.service").await.unwrap();
    let within = Duration::from_millis(10);
    assert!(matches!(job.result(within).await, Err(Error::Late { .. })));

    let mut job = systemd.stop("lost.service").await.unwrap();
    let error = job.result(SOON).await.unwrap_err();
    assert!(matches!(error, Error::Disconnected { .. }), "{error}");
    let error = systemd.state().await.unwrap_err();
    assert!(matches!(error, Error::Disconnected { .. }), "{error}");
}

#[test]
fn infinity_is_no_duration() {
    assert_eq!(finite(90_000_000), Some(Duration::from_secs(90)));
    assert_eq!(finite(u64::MAX), None);
}

/// With a real systemd as the first process, and a machine that may be switched off.
mod booted {
    use std::{fs, process::Command, time::Instant};

    use super::*;

    /// Restarts at once, whatever ends it. SIGINT is an end that systemd does not call a failure.
    const STUBBORN: &str = "[Service]\nType=exec\nExecStart=/bin/sleep 1000\nRestart=always\nRestartSec=100ms\n\
                            KillSignal=SIGINT\nTimeoutStopSec=7s\n";
    /// Is asked to stop by a signal that it ignores, as everybody does by default.
    const DEAF: &str =
        "[Service]\nType=exec\nExecStart=/bin/sleep 1000\nRestart=always\nKillSignal=SIGWINCH\n";

    fn run(program: &str, arguments: &[&str]) -> String {
        let output = Command::new(program).args(arguments).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        assert!(output.status.success(), "{program} {arguments:?}: {}", text(output.stderr));
        text(output.stdout)
    }

    fn start(unit: &str, text: &str) {
        fs::create_dir_all("/run/systemd/system").unwrap();
        fs::write(format!("/run/systemd/system/{unit}"), text).unwrap();
        run("systemctl", &["daemon-reload"]);
        run("systemctl", &["start", unit]);
    }

    async fn wait_for(systemd: &Systemd, name: &str, wanted: impl Fn(&Unit) -> bool) -> Unit {
        let start = Instant::now();
        loop {
            let unit = systemd.unit(name).await.unwrap();
            if wanted(&unit) {
                return unit;
            }
            assert!(start.elapsed() < SOON, "{unit:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    #[tokio::test]
    #[ignore = "needs systemd as the first process: cargo xtask test"]
    async fn a_process_has_its_unit() {
        let systemd = Systemd::on(connect(PRIVATE, true).await).await.unwrap();
        assert!(!systemd.connection.is_bus());
        assert_eq!(systemd.state().await.unwrap(), "running");
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own.trim().rsplit('/').next().unwrap().to_owned();
        assert!(own.ends_with(".service"), "{own}");
        assert_eq!(systemd.unit_of(std::process::id()).await.unwrap(), Some(own));
        assert_eq!(systemd.unit_of(1).await.unwrap().as_deref(), Some("init.scope"));
        // A kernel thread, no process at all, and nobody's number.
        for pid in [2, 4_000_000, 0] {
            assert_eq!(systemd.unit_of(pid).await.unwrap(), None, "{pid}");
        }
        run("systemd-run", &["--scope", "--unit=own-scope", "sleep", "0"]);
        run("systemd-run", &["--unit=own-transient", "--property=Type=exec", "sleep", "1000"]);
        let unit = systemd.unit("own-transient.service").await.unwrap();
        let found = systemd.unit_of(unit.main_pid.unwrap()).await.unwrap();
        assert_eq!(found.as_deref(), Some("own-transient.service"));
        assert_eq!(systemd.stop("own-transient.service").await.unwrap().result(SOON).await.unwrap(), "done");
        // A transient unit is gone with its end.
        let error = systemd.unit("own-transient.service").await.unwrap_err();
        assert!(matches!(error, Error::NoSuchUnit { .. }), "{error}");
    }

    #[tokio::test]
    #[ignore = "needs systemd as the first process: cargo xtask test"]
    async fn what_is_set_for_a_unit_is_read() {
        let systemd = Systemd::connect().await.unwrap();
        start("stubborn-set.service", STUBBORN);
        let unit = systemd.unit("stubborn-set.service").await.unwrap();
        let pid = unit.main_pid.unwrap();
        assert_eq!(fs::read_to_string(format!("/proc/{pid}/comm")).unwrap(), "sleep\n");
        assert_eq!(
            unit,
            Unit {
                name: "stubborn-set.service".to_owned(),
                active_state: "active".to_owned(),
                sub_state: "running".to_owned(),
                main_pid: Some(pid),
                control_group: "/system.slice/stubborn-set.service".to_owned(),
                kill_signal: libc::SIGINT,
                restart: "always".to_owned(),
                timeout_stop: Some(Duration::from_secs(7)),
                result: "success".to_owned(),
                service_type: "exec".to_owned(),
            }
        );
        // By an alias, and of a kind that has no signal.
        assert_eq!(
            systemd.unit("dbus-org.freedesktop.login1.service").await.unwrap().name,
            "systemd-logind.service"
        );
        let slice = systemd.unit("system.slice").await.unwrap();
        assert_eq!((slice.active_state.as_str(), slice.kill_signal, slice.main_pid), ("active", 0, None));
        let scope = systemd.unit("init.scope").await.unwrap();
        assert_eq!((scope.control_group.as_str(), scope.restart.as_str()), ("/init.scope", ""));
    }

    /// The end of a process that somebody else signals is followed by a restart, a stop is not.
    async fn stop_stubborn(systemd: &Systemd, name: &str) {
        start(name, STUBBORN);
        let first = systemd.unit(name).await.unwrap().main_pid.unwrap();
        run("systemctl", &["kill", "--signal=INT", name]);
        let is_again =
            |unit: &Unit| unit.active_state == "active" && unit.main_pid.is_some_and(|pid| pid != first);
        wait_for(systemd, name, is_again).await;

        let mut job = systemd.stop(name).await.unwrap();
        assert_eq!(job.result(SOON).await.unwrap(), "done");
        for _ in 0..20 {
            let unit = systemd.unit(name).await.unwrap();
            assert_eq!(
                (unit.active_state.as_str(), unit.main_pid, unit.control_group.as_str()),
                ("inactive", None, "")
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        // What is stopped already is done at once.
        assert_eq!(systemd.stop(name).await.unwrap().result(SOON).await.unwrap(), "done");
    }

    #[tokio::test]
    #[ignore = "needs systemd as the first process: cargo xtask test"]
    async fn what_is_stopped_stays_stopped_whatever_its_restart_says() {
        let systemd = Systemd::connect().await.unwrap();
        stop_stubborn(&systemd, "stubborn-private.service").await;
        let error = systemd.stop("no-such.service").await.unwrap_err();
        assert!(matches!(error, Error::NoSuchUnit { .. }), "{error}");
    }

    #[tokio::test]
    #[ignore = "needs systemd as the first process: cargo xtask test"]
    async fn without_the_private_socket_the_bus_will_do() {
        let systemd = Systemd::connect_at("/nowhere", BUS, BOOTED).await.unwrap();
        assert!(systemd.connection.is_bus());
        stop_stubborn(&systemd, "stubborn-bus.service").await;
    }

    #[tokio::test]
    #[ignore = "needs systemd as the first process: cargo xtask test"]
    async fn a_unit_that_had_to_be_killed_is_done_and_failed() {
        let systemd = Systemd::connect().await.unwrap();
        start("deaf.service", &format!("{DEAF}TimeoutStopSec=2s\n"));
        // Dropped, and asked again: systemd goes on meanwhile.
        drop(systemd.stop("deaf.service").await.unwrap());
        let mut job = systemd.stop("deaf.service").await.unwrap();
        assert!(matches!(job.result(Duration::from_millis(1)).await, Err(Error::Late { .. })));
        assert_eq!(job.result(Duration::from_secs(20)).await.unwrap(), "done");
        let unit = systemd.unit("deaf.service").await.unwrap();
        assert_eq!((unit.active_state.as_str(), unit.sub_state.as_str()), ("failed", "failed"));
        // systemd is "degraded" until somebody has seen it.
        assert_eq!(systemd.state().await.unwrap(), "degraded");
        run("systemctl", &["reset-failed"]);
    }

    #[tokio::test]
    #[ignore = "needs systemd as the first process: cargo xtask test"]
    async fn a_systemd_that_executes_itself_anew_is_connected_to_again() {
        let systemd = Systemd::connect().await.unwrap();
        start("deaf-again.service", &format!("{DEAF}TimeoutStopSec=20s\n"));
        let mut job = systemd.stop("deaf-again.service").await.unwrap();
        run("systemctl", &["daemon-reexec"]);
        let error = job.result(Duration::from_secs(15)).await.unwrap_err();
        assert!(matches!(error, Error::Disconnected { .. }), "{error}");
        let error = systemd.state().await.unwrap_err();
        assert!(matches!(error, Error::Disconnected { .. }), "{error}");
        let systemd = Systemd::connect().await.unwrap();
        wait_for(&systemd, "deaf-again.service", |unit| unit.main_pid.is_none()).await;
        run("systemctl", &["reset-failed"]);
    }

    #[tokio::test]
    #[ignore = "needs systemd as the first process: cargo xtask test"]
    async fn an_inhibitor_is_held_until_it_is_dropped() {
        let logind = Logind::connect().await.unwrap();
        // What Debian's logind.conf leaves as it is.
        assert_eq!(logind.max_delay().await.unwrap(), Duration::from_secs(5));
        let list = || run("systemd-inhibit", &["--list", "--no-pager", "--no-legend"]);
        let inhibitor = Inhibitor::take(&logind, "drains services").await.unwrap();
        let line = list().lines().find(|line| line.contains("drains services")).map(str::to_owned).unwrap();
        assert!(line.starts_with("plumb ") && line.contains("shutdown") && line.ends_with("delay"), "{line}");
        drop(inhibitor);
        // logind hears of it as of a pipe that was closed.
        let start = Instant::now();
        while list().contains("drains services") {
            assert!(start.elapsed() < SOON);
        }
        let waited = timeout(Duration::from_secs(1), logind.prepare_for_shutdown()).await;
        assert!(waited.is_err(), "{waited:?}");
    }

    /// The machine goes down: it runs alone, and last.
    #[tokio::test]
    #[ignore = "switches the machine off: cargo xtask test"]
    async fn a_shutdown_is_told_and_waits_for_the_inhibitor() {
        // An emulated machine is slow.
        std::fs::create_dir_all("/run/systemd/logind.conf.d").unwrap();
        std::fs::write("/run/systemd/logind.conf.d/slow.conf", "[Login]\nInhibitDelayMaxSec=30s\n").unwrap();
        run("systemctl", &["restart", "systemd-logind.service"]);
        let systemd = Systemd::connect().await.unwrap();
        let logind = Logind::connect().await.unwrap();
        let inhibitor = Inhibitor::take(&logind, "drains services").await.unwrap();
        let asked = async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            tokio::task::spawn_blocking(|| run("systemctl", &["poweroff"])).await.unwrap()
        };
        let (told, _) = tokio::join!(timeout(SOON, logind.prepare_for_shutdown()), asked);
        told.unwrap().unwrap();
        // Whoever comes later is told at once.
        timeout(SOON, logind.prepare_for_shutdown()).await.unwrap().unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(systemd.state().await.unwrap(), "running", "held back");
        drop(inhibitor);
        let start = Instant::now();
        while systemd.state().await.unwrap() != "stopping" {
            assert!(start.elapsed() < SOON);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

//! What a drain asks of systemd: the unit of a service, and to stop it.

use std::{
    thread,
    time::{Duration, Instant},
};

use tokio::time;

use super::{
    course::UnitEnd,
    facts::{self, Supervisor},
    grants,
    matching::Match,
    service::{Service, Signal, Stop},
    systemd::{self, Systemd, Unit},
};

/// Time for systemd to answer.
const ANSWER: Duration = Duration::from_secs(5);
/// Between two attempts while it does not, as when it executes itself anew.
const PAUSE: Duration = Duration::from_millis(200);

/// The unit of this name.
pub(super) fn unit(name: &str) -> Result<Unit, String> {
    with_systemd(async |systemd| systemd.unit(name).await)
}

/// The unit of this name, if systemd knows it: it forgets a transient one with its end. One that does not answer is asked
/// again for a while.
pub(super) fn known(name: &str) -> Result<Option<Unit>, String> {
    let end = Instant::now() + ANSWER;
    loop {
        let unit = with_systemd(async |systemd| match systemd.unit(name).await {
            Err(systemd::Error::NoSuchUnit { .. }) => Ok(None),
            unit => unit.map(Some),
        });
        if unit.is_ok() || Instant::now() >= end {
            return unit;
        }
        thread::sleep(PAUSE);
    }
}

/// What has become of a unit that was asked to stop.
pub(super) fn end_of(name: &str) -> UnitEnd {
    match known(name) {
        Ok(Some(unit)) if is_stopped(&unit) => UnitEnd::Stopped(unit.result),
        Ok(None) => UnitEnd::Stopped(String::new()),
        Ok(Some(_)) => UnitEnd::Unknown("is not asked again: its deadline has passed".to_owned()),
        Err(why) => UnitEnd::Unknown(why),
    }
}

/// Whether nothing of it runs or is about to: one between two runs (`Restart=`) is not stopped.
pub(super) fn is_stopped(unit: &Unit) -> bool {
    matches!(unit.active_state.as_str(), "inactive" | "failed")
}

/// The unit whose main process a service is, which systemd would start again if that ended by itself. A user may
/// signal his own process; what systemd stops for root is more than that.
pub(super) fn of_main(service: &Service, found: &[Match]) -> Result<Option<Unit>, String> {
    if service.uid != 0 {
        return Ok(None);
    }
    let mut stopped: Option<Unit> = None;
    let mut others = Vec::new();
    for Match { process, .. } in found.iter().filter(|one| one.is_root) {
        let pid = process.identity.pid;
        match facts::supervisor(process) {
            Supervisor::Unit(name) if stopped.as_ref().is_some_and(|unit| unit.name == name) => {}
            Supervisor::Unit(name) => match unit(&name) {
                Ok(unit) if unit.main_pid == Some(pid) => {
                    if let Some(other) = stopped.replace(unit) {
                        return Err(format!(
                            "it is {} and {name}: name each by its unit, as a service of its own",
                            other.name
                        ));
                    }
                }
                _ => others.push((pid, Some(name))),
            },
            _ => others.push((pid, None)),
        }
    }
    let Some(unit) = stopped else { return Ok(None) };
    match others.iter().find(|(_, of)| of.as_ref() != Some(&unit.name)) {
        Some((pid, _)) => {
            Err(format!("it is {} and process {pid}, which is not in that: name the unit", unit.name))
        }
        None => Ok(Some(unit)),
    }
}

/// The signal by which a process of a service is going to be asked.
pub(super) fn stop_of(service: &Service, unit: Option<&Unit>) -> Option<Stop> {
    match unit {
        Some(unit) => Some(Stop { signal: Signal::by_number(unit.kill_signal)?, late: None, preset: None }),
        None => service.stop.clone(),
    }
}

/// How systemd is going to stop it, for people.
pub(super) fn note(unit: &Unit) -> String {
    let signal = super::course::signal_name(unit.kill_signal);
    let kill = unit.timeout_stop.map_or_else(String::new, |time| {
        format!(", and by KILL {} later (TimeoutStopSec=)", grants::seconds(time))
    });
    format!("systemd stops {} by {signal}{kill}; Restart={}", unit.name, unit.restart)
}

fn with_systemd<T>(work: impl AsyncFnOnce(&Systemd) -> Result<T, systemd::Error>) -> Result<T, String> {
    let asked = async {
        let systemd = Systemd::connect().await.map_err(|error| error.to_string())?;
        work(&systemd).await.map_err(|error| error.to_string())
    };
    let asked = async {
        time::timeout(ANSWER, asked).await.unwrap_or_else(|_| Err("systemd does not answer".to_owned()))
    };
    tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(asked))
}

/// Has systemd stop a unit, and waits until it has. A systemd that goes away meanwhile is asked again: that stops it
/// once.
pub(super) async fn stop(unit: String, within: Duration) -> UnitEnd {
    let (end, mut is_asked) = (Instant::now() + within, false);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let why = match stop_once(&unit, left, &mut is_asked).await {
            Ok(end) => return end,
            Err(why) => why,
        };
        if left < PAUSE {
            return UnitEnd::Unknown(why);
        }
        time::sleep(PAUSE).await;
    }
}

/// `Err` when it may be asked again; whether it was asked already.
async fn stop_once(unit: &str, within: Duration, is_asked: &mut bool) -> Result<UnitEnd, String> {
    let systemd = Systemd::connect().await.map_err(|error| error.to_string())?;
    let mut job = match systemd.stop(unit).await {
        Ok(job) => job,
        // A transient one is forgotten with its end.
        Err(systemd::Error::NoSuchUnit { .. }) if *is_asked => return Ok(UnitEnd::Stopped(String::new())),
        Err(error @ (systemd::Error::NoSuchUnit { .. } | systemd::Error::Denied { .. })) => {
            return Ok(UnitEnd::Refused(error.to_string()));
        }
        Err(error @ systemd::Error::Refused { .. }) => return Ok(UnitEnd::Refused(error.to_string())),
        Err(error) => return Err(error.to_string()),
    };
    *is_asked = true;
    match job.result(within).await {
        Ok(result) if result == "done" => {
            // It may have been a transient one, which is forgotten with its end.
            let result = systemd.unit(unit).await.map(|unit| unit.result);
            Ok(UnitEnd::Stopped(result.unwrap_or_default()))
        }
        // Somebody else's job has taken its place.
        Ok(result) => Ok(UnitEnd::Unknown(format!("systemd says of stopping {unit}: {result}"))),
        Err(error @ systemd::Error::Late { .. }) => Ok(UnitEnd::Unknown(error.to_string())),
        Err(error) => Err(error.to_string()),
    }
}

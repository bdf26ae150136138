//! Whether a service ended well: the judgement of what was seen of it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{
    course::{MemberRun, Phase, Run, signal_name},
    grants,
};

/// What became of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Verdict {
    /// It ended by itself in time, and lost no request.
    Clean,
    /// It ended so that work was lost, or nobody saw how it ended.
    Lossy,
    /// It was there at its deadline.
    Timeout,
    /// KILL ended it.
    Killed,
    /// It ended, and runs again.
    Restarted,
    /// It was not asked to stop.
    Refused,
}

impl Verdict {
    pub(crate) const ALL: [Self; 6] =
        [Self::Clean, Self::Lossy, Self::Timeout, Self::Killed, Self::Restarted, Self::Refused];

    #[must_use]
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::Lossy => "lossy",
            Self::Timeout => "timeout",
            Self::Killed => "killed",
            Self::Restarted => "restarted",
            Self::Refused => "refused",
        }
    }
}
/// The verdict of a service, as soon as there is one, and its reason.
#[must_use]
pub(crate) fn verdict(run: &Run) -> Option<(Verdict, String)> {
    if let Some(why) = &run.refused {
        return Some((Verdict::Refused, why.clone()));
    }
    if let Some(what) = &run.again {
        return Some((Verdict::Restarted, what.clone()));
    }
    if run.is_late {
        if let Some(why) = &run.given_up {
            return Some((Verdict::Timeout, format!("it still ran when it was given up: {why}")));
        }
        let left = run.members.iter().filter(|one| one.gone.is_none()).count();
        let why = match (run.signalled, left) {
            (None, left) if left == 0 || run.phase == Phase::Settled => {
                "no time was left to ask it to stop".to_owned()
            }
            (None, _) => {
                "whom to ask had ended, and what that had started still ran at its deadline".to_owned()
            }
            (_, 0) if run.found.unit.is_some() && !run.unit_stopped => {
                "systemd was not through with its unit at its deadline".to_owned()
            }
            (_, 0 | 1) => "it still ran at its deadline".to_owned(),
            (_, left) => format!("{left} of its processes still ran at its deadline"),
        };
        return Some((Verdict::Timeout, why + ignored(run)));
    }
    if !matches!(run.phase, Phase::Gone | Phase::Settled) {
        return None;
    }
    if run.killed.is_some() && !run.vain.contains(&libc::SIGKILL) {
        let why = format!("it did not stop in time{}{}", ignored(run), lost_too(run));
        return Some((Verdict::Killed, why));
    }
    let end = end(run);
    let verdict = match end {
        // Its main process may have ended well, and another one not at all.
        _ if run.unit_result.as_deref() == Some("timeout") => {
            let why = "systemd sent KILL: it did not stop within its TimeoutStopSec=";
            (Verdict::Killed, format!("{why}{}", lost_too(run)))
        }
        End::Killed => {
            let by = run.seen.killed_by.as_deref().unwrap_or("somebody else");
            (Verdict::Killed, format!("{by} sent KILL{}", lost_too(run)))
        }
        End::Died(signal) => (Verdict::Lossy, format!("it died of {}{}", signal_name(signal), lost_too(run))),
        _ if after_deadline(run) > Duration::ZERO => {
            let after = grants::seconds(after_deadline(run).max(Duration::from_millis(1)));
            (Verdict::Timeout, format!("it ended, but {after} after its deadline{}", lost_too(run)))
        }
        _ if !run.seen.lost.is_empty() => (Verdict::Lossy, lost(run)),
        _ if run.seen.in_flight.is_some_and(|requests| requests > 0) => {
            let requests = run.seen.in_flight.unwrap_or(0);
            (Verdict::Lossy, format!("it said that it worked on {requests} requests, and ended"))
        }
        _ if child_died(run).is_some() => {
            let signal = child_died(run).unwrap_or(0);
            let by = run.seen.killed_by.as_ref().filter(|_| signal == libc::SIGKILL);
            let by = by.map_or_else(String::new, |by| format!(": {by} sent it"));
            (Verdict::Lossy, format!("a process that it had started died of {}{by}", signal_name(signal)))
        }
        _ if run.seen.has_strays || is_asked_by_tcp(run) && !run.seen.unseen.is_empty() => {
            let why = run.seen.unseen.join("; ");
            let what = if run.seen.has_strays { "still run in part" } else { "have lost requests" };
            (Verdict::Lossy, format!("it may {what} that nobody saw: {why}"))
        }
        // It was sent because the first one had left something under way.
        _ if run.sent().count() > 1 => {
            let late = run.sent().last().map_or_else(String::new, signal_name);
            (Verdict::Lossy, format!("it did not stop by itself, and {late} ended what was still under way"))
        }
        End::Asked(signal) => match run.found.connections {
            many @ 1.. if run.found.ports.is_empty() => {
                (Verdict::Lossy, format!("{} ended it with {many} connections", signal_name(signal)))
            }
            _ => (Verdict::Clean, format!("{} ended it, and no request was lost", signal_name(signal))),
        },
        _ if run.members.is_empty() && run.earlier.is_empty() => match &run.found.unit {
            Some(_) => (Verdict::Clean, "it had no process, and its unit is stopped".to_owned()),
            None => (Verdict::Clean, "it did not run".to_owned()),
        },
        // The agent was not there, or the event was lost.
        End::Unseen => {
            // An agent that takes a drain up after the deadline finds it gone, and does not know since when.
            let is_in_time = run.gone.is_some_and(|gone| gone <= run.deadline());
            let whether =
                if is_in_time { " in time, but nobody saw how" } else { ", but nobody saw how or when" };
            (Verdict::Lossy, format!("it ended{whether}: work may be lost"))
        }
        End::Exited(code) => {
            let when = if run.signalled.is_some() { "in time" } else { "before it was asked to stop" };
            let code = if code == 0 { String::new() } else { format!(", with exit code {code}") };
            (Verdict::Clean, format!("it ended {when}{code}"))
        }
    };
    // One that comes back may still do so.
    (run.phase == Phase::Settled).then_some(verdict)
}

/// Whether a signal by which a process ended says that it did not end well.
pub(super) fn is_crash(signal: i32) -> bool {
    [
        libc::SIGKILL,
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGABRT,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGSYS,
        libc::SIGTRAP,
    ]
    .contains(&signal)
}

/// How a service ended: the worst end of its processes, the least bad first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    /// By itself.
    Exited(i32),
    /// By the signal by which it was asked.
    Asked(i32),
    Unseen,
    Died(i32),
    Killed,
}

fn end(run: &Run) -> End {
    let is_asked = |signal| {
        run.signals.contains(&signal) || run.stops.contains(&signal) || run.found.kill_signal == Some(signal)
    };
    let end = |one: &MemberRun| match (one.member.is_root, one.status) {
        (true, None) => End::Unseen,
        (true, Some(status)) => match status & 0x7f {
            0 => End::Exited(status >> 8 & 0xff),
            libc::SIGKILL => End::Killed,
            signal if is_asked(signal) => End::Asked(signal),
            signal => End::Died(signal),
        },
        (false, _) => End::Exited(0),
    };
    run.members.iter().chain(&run.earlier).map(end).max().unwrap_or(End::Exited(0))
}

/// By what a process that it had started crashed, or KILL. Its parent may end it by any other signal.
fn child_died(run: &Run) -> Option<i32> {
    let children = run.members.iter().chain(&run.earlier).filter(|one| !one.member.is_root);
    let signal =
        children.filter_map(|one| one.status).map(|status| status & 0x7f).find(|signal| is_crash(*signal));
    signal.or(run.seen.child_died)
}

/// By how much its last process outlived its deadline, as far as somebody saw that.
fn after_deadline(run: &Run) -> Duration {
    let last = run.members.iter().filter_map(|one| one.exited).max();
    last.map_or(Duration::ZERO, |last| Duration::from_nanos(last.saturating_sub(run.deadline())))
}

/// Whether requests come to it by TCP, as far as is known.
fn is_asked_by_tcp(run: &Run) -> bool {
    !run.found.ports.is_empty() || !run.found.knows_ports
}

/// `3 requests lost: 2 reset in the accept queue, 1 read and not answered`
fn lost(run: &Run) -> String {
    let all: u64 = run.seen.lost.values().sum();
    let by: Vec<String> = run.seen.lost.iter().map(|(class, many)| format!("{many} {class}")).collect();
    let guessed = match run.seen.guessed {
        0 => String::new(),
        many => format!("; {many} of them perhaps"),
    };
    format!("{all} {} lost: {}{guessed}", if all == 1 { "request" } else { "requests" }, by.join(", "))
}

fn ignored(run: &Run) -> &'static str {
    let is_ignored = run.seen.left.iter().any(|left| left.ignored_the_stop == Some(true));
    if is_ignored { ": it ignored the stop" } else { "" }
}

fn lost_too(run: &Run) -> String {
    if run.seen.lost.is_empty() { String::new() } else { format!("; {}", lost(run)) }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use super::{
        super::{
            apply::saw,
            course::{Fact, Found, Member, of_member},
            identity::Identity,
        },
        *,
    };
    use crate::losses::Class;

    /// A process that the service names, or one that it has started.
    fn member(pid: u32, is_root: bool) -> MemberRun {
        let (identity, command) = (Identity::example(pid), String::new());
        of_member(Member { identity, is_root, is_descendant: !is_root, command })
    }

    #[test]
    fn ports_that_could_not_be_read_are_not_taken_for_none() {
        for (knows_ports, expected) in [(true, Verdict::Clean), (false, Verdict::Lossy)] {
            let mut run = Run { grant: Duration::from_nanos(10), ..Run::new() };
            run.members = vec![member(7, true)];
            run.found.knows_ports = knows_ports;
            (run.phase, run.gone) = (Phase::Settled, Some(9));
            saw(&mut run, &Fact::Exit { member: 0, status: 0, time: 8 });
            saw(&mut run, &Fact::Unseen { why: "its ports could not be read".to_owned(), strays: false });
            assert_eq!(verdict(&run).unwrap().0, expected);
        }
    }

    /// A service with a listener that got TERM, ended in time, and is not expected back.
    fn ended(status: i32, facts: Vec<Fact>) -> (Verdict, String) {
        let exit = Fact::Exit { member: 0, status, time: 8 };
        gone(&[vec![exit], facts].concat(), 9)
    }

    /// The same, but that nobody may have seen its end, and of another time.
    fn gone(facts: &[Fact], at: u64) -> (Verdict, String) {
        let mut run = Run { grant: Duration::from_nanos(10), ..Run::new() };
        run.members = vec![member(7, true)];
        run.found = Found { ports: vec![80], connections: 3, ..Found::default() };
        (run.phase, run.gone, run.signals) = (Phase::Settled, Some(at), vec![libc::SIGTERM]);
        facts.iter().for_each(|fact| saw(&mut run, fact));
        verdict(&run).unwrap()
    }

    /// A service without a port that got TERM, of which two named processes and what one of them has started ended so.
    fn all_of([first, second, child]: [Option<i32>; 3]) -> Verdict {
        let mut run = Run { grant: Duration::from_nanos(10), ..Run::new() };
        run.members = [(7, true), (8, true), (9, false)].map(|(pid, is_root)| member(pid, is_root)).into();
        run.found.knows_ports = true;
        (run.phase, run.gone, run.signals) = (Phase::Settled, Some(9), vec![libc::SIGTERM]);
        for (member, status) in [first, second, child].into_iter().enumerate() {
            status.into_iter().for_each(|status| saw(&mut run, &Fact::Exit { member, status, time: 8 }));
        }
        verdict(&run).unwrap().0
    }

    #[test]
    fn the_worst_end_of_its_processes_is_that_of_the_service() {
        let (term, segv, kill) = (Some(libc::SIGTERM), Some(libc::SIGSEGV), Some(libc::SIGKILL));
        for (ends, expected) in [
            ([term, Some(0), Some(0)], Verdict::Clean),
            ([term, segv, Some(0)], Verdict::Lossy),
            ([segv, term, Some(0)], Verdict::Lossy),
            ([term, kill, Some(0)], Verdict::Killed),
            ([segv, kill, Some(0)], Verdict::Killed),
            ([term, None, Some(0)], Verdict::Lossy),
            // Whoever has started it may end it as he likes, or not be told of it.
            ([Some(0), Some(0), Some(libc::SIGQUIT)], Verdict::Clean),
            ([Some(0), Some(0), Some(1 << 8)], Verdict::Clean),
            ([Some(0), Some(0), None], Verdict::Clean),
            ([Some(0), Some(0), segv], Verdict::Lossy),
            ([Some(0), Some(0), kill], Verdict::Lossy),
        ] {
            assert_eq!(all_of(ends), expected, "{ends:?}");
        }
    }

    #[test]
    fn what_ends_after_its_deadline_was_not_in_time_however_late_that_is_told() {
        let exit = |time| vec![Fact::Exit { member: 0, status: 0, time }];
        assert_eq!(gone(&exit(10), 50).0, Verdict::Clean);
        assert_eq!(
            gone(&exit(2_000_011), 50),
            (Verdict::Timeout, "it ended, but 2ms after its deadline".to_owned())
        );
    }

    #[test]
    fn a_process_that_may_be_left_is_not_clean_even_without_a_port() {
        for (strays, expected) in [(false, Verdict::Clean), (true, Verdict::Lossy)] {
            let mut run = Run { phase: Phase::Settled, ..Run::new() };
            run.found.knows_ports = true;
            saw(&mut run, &Fact::Unseen { why: "clones were lost".to_owned(), strays });
            assert_eq!(verdict(&run).unwrap().0, expected);
        }
    }

    fn lost(class: Class, many: u64, guessed: u64) -> Fact {
        Fact::Lost { requests: BTreeMap::from([(class, many)]), guessed, examples: Vec::new() }
    }

    #[test]
    fn a_service_is_clean_only_if_no_request_can_have_been_lost() {
        assert_eq!(ended(0, Vec::new()).0, Verdict::Clean);
        // By TERM itself, with connections, none of which had a request.
        assert_eq!(ended(libc::SIGTERM, Vec::new()).0, Verdict::Clean);
        for class in Class::ALL {
            assert_eq!(ended(0, vec![lost(class, 1, 0)]).0, Verdict::Lossy);
        }
        let (verdict, why) = ended(0, vec![lost(Class::AcceptQueue, 2, 0), lost(Class::Unanswered, 1, 1)]);
        assert_eq!(verdict, Verdict::Lossy);
        assert_eq!(
            why,
            "3 requests lost: 2 reset in the accept queue, 1 read and not answered; 1 of them perhaps"
        );
        let unseen = Fact::Unseen { why: "3 events were lost".to_owned(), strays: false };
        let (verdict, why) = ended(0, vec![unseen]);
        assert!(verdict == Verdict::Lossy && why.contains("3 events were lost"), "{why}");
        let said = |requests| Fact::InFlight { at: 5, requests };
        assert_eq!(ended(0, vec![said(4)]).0, Verdict::Lossy);
        assert_eq!(ended(0, vec![said(4), said(0)]).0, Verdict::Clean);
    }

    #[test]
    fn an_end_that_nobody_saw_is_in_time_only_if_it_was_found_before_the_deadline() {
        let why = |at| gone(&[], at);
        let (before, after) = (why(10), why(11));
        assert_eq!((before.0, after.0), (Verdict::Lossy, Verdict::Lossy));
        assert_eq!(before.1, "it ended in time, but nobody saw how: work may be lost");
        assert_eq!(after.1, "it ended, but nobody saw how or when: work may be lost");
    }

    #[test]
    fn whoever_has_killed_it_is_named() {
        let killed = Fact::Killed { at: 5, by: "pid 9 (bash)".to_owned() };
        assert_eq!(
            ended(libc::SIGKILL, vec![killed.clone()]),
            (Verdict::Killed, "pid 9 (bash) sent KILL".to_owned())
        );
        let (_, why) =
            ended(libc::SIGKILL, vec![killed, Fact::NoMemory { at: 6 }, lost(Class::Unanswered, 2, 0)]);
        assert!(why.contains("want of memory") && why.contains("2 requests lost"), "{why}");
        assert_eq!(ended(libc::SIGKILL, Vec::new()).1, "somebody else sent KILL");
    }
}

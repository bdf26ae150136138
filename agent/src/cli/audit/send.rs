//! `plumb audit --send`: sends the signal, and tells what becomes of the process and what is left of it.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use plumb_common::{
    sockets::{COUNTERS, LISTENER_CLOSED, SIGNAL_DELIVERED, SIGNAL_GENERATED, SIGNAL_NO_MEMORY},
    task::ProcKey,
};
use serde::Serialize;

use super::{
    super::{
        Outcome,
        output::{self, Format},
        watch::{Followed, SLOT, interrupted},
    },
    Arguments, Audit, look,
};
use crate::{
    clock::{self, Calendar},
    decode::Event,
    drain::{self, NotSent, Process, Signal, start_ticks},
    failure::{Exit, Failure},
    kernel::{Kernel, Ring},
    left::{Doings, Left, Since},
    losses::{self, Class, Tally},
    stacks::Names,
    view,
};

const TICK: Duration = Duration::from_millis(50);
const BATCH: usize = 4096;
/// Between two looks for processes that it has forked.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// For its descendants to end after it.
const GRACE: Duration = Duration::from_secs(1);
/// Things that happened, one by one.
const MAX_MOMENTS: usize = 64;
/// Processes whose threads are looked at in the end.
const MAX_PROCESSES: usize = 8;
const KILL: u32 = 9;

/// What became of it.
#[derive(Serialize)]
struct Stop<'a> {
    #[serde(flatten)]
    audit: &'a Audit,
    stop: Course,
}

#[derive(Default, Serialize)]
struct Course {
    /// RFC 3339 in UTC.
    sent: String,
    /// One sentence.
    outcome: String,
    seconds: f64,
    /// `null` when it is there, or nobody saw how it ended.
    exit_code: Option<u32>,
    /// The signal that ended it, by number.
    exit_signal: Option<u32>,
    is_there: bool,
    /// The first 64, in the order of the kernel.
    timeline: Vec<Moment>,
    /// Of its ports, while it was followed.
    connections: BTreeMap<&'static str, u64>,
    lost_requests: BTreeMap<&'static str, u64>,
    guessed: u64,
    /// What is left of it and of its descendants.
    left: Vec<Left>,
    /// It was there when the time was over, and went on as if nobody had asked it to stop; `null` when that is not known.
    ignored_the_stop: Option<bool>,
    /// What may be missing, and why.
    unseen: Vec<String>,
}

#[derive(Serialize)]
struct Moment {
    /// Since the signal.
    seconds: f64,
    what: String,
}

/// What is seen while it stops.
struct Watch {
    target: ProcKey,
    signalled: u64,
    signal: u32,
    followed: Followed,
    tally: Tally,
    doings: HashMap<ProcKey, Doings>,
    moments: Vec<(u64, String)>,
    /// As wait(2) has it, and when.
    exit: Option<(u32, u64)>,
}

pub(super) fn run(
    arguments: &Arguments,
    mut kernel: Kernel,
    mut names: Names,
    (process, audit): (Process, &Audit),
    signal: Signal,
) -> Outcome {
    let bug = |error: &dyn std::fmt::Display| {
        Failure::new(Exit::Error, format!("the event stream ended: {error}"), "this is a bug of plumb")
    };
    let mut course = Course { unseen: missing(&kernel), ..Course::default() };
    let mut ring = kernel.ring().map_err(|error| bug(&error))?;
    let sees_fds = match kernel.follow_fds(true) {
        Ok(()) if kernel.follows_fds() => true,
        Ok(()) => false,
        Err(verdict) => {
            course.unseen.push(format!("what it opens and accepts ({})", verdict.explain()));
            false
        }
    };
    let is_table = arguments.output.format == Format::Table;
    let pid = process.identity.pid;
    let mut followed = Followed::default();
    followed.look(&mut kernel, pid).map_err(|error| bug(&error))?;
    let Some(target) = followed.processes.get(&pid).copied() else {
        return Err(super::no_such_process(pid));
    };
    let mut sees_all = watch(&mut kernel, &followed);
    names.watch(target);
    let stop = interrupted()?;
    if is_table {
        output::data(&audit.text(false))?;
    }
    let before = lost(&kernel, &ring)?;
    let (calendar, signalled, began) = (Calendar::now(), clock::boottime(), Instant::now());
    drain::send(&process, &process.identity, 0, signal.number()).map_err(|why| match why {
        NotSent::Gone => super::no_such_process(pid),
        NotSent::Refused(why) => Failure::new(Exit::Error, why, "nothing was sent"),
    })?;
    course.sent = calendar.format_millis(signalled);
    let mut seen = Watch {
        target,
        signalled,
        signal: u32::try_from(signal.number()).unwrap_or(0),
        followed,
        tally: Tally::default(),
        doings: HashMap::new(),
        moments: vec![(signalled, format!("{} is sent", signal.name()))],
        exit: None,
    };
    let (mut told, mut next_look, mut gone) = (0, began + LOOK_EVERY, None);
    loop {
        ring.wait(TICK).map_err(|error| bug(&error))?;
        // Looked at before the events: what has ended has told of it.
        let now = Instant::now();
        if gone.is_none() && !process.is_alive() {
            gone = Some(now);
        }
        let others = seen.followed.processes.keys().any(|pid| start_ticks(*pid).is_some());
        let is_over = gone.is_some_and(|gone| !others || now >= gone + GRACE);
        let ending = is_over || stop.is_cancelled() || now >= began + arguments.duration;
        while seen.take(&ring.drain(BATCH)) == BATCH {}
        if is_table {
            let more: String = seen.moments[told..].iter().map(|moment| seen.line(moment)).collect();
            told = seen.moments.len();
            output::data(&more)?;
        }
        if ending {
            break;
        }
        if now >= next_look {
            next_look = now + LOOK_EVERY;
            // A worker that was forked since, and the port that it has opened.
            seen.followed.look(&mut kernel, pid).map_err(|error| bug(&error))?;
            sees_all &= watch(&mut kernel, &seen.followed);
        }
    }
    if !sees_all {
        course.unseen.push("what some of its processes open: there are too many".to_owned());
    }
    let missed = lost(&kernel, &ring)?.saturating_sub(before);
    if missed > 0 {
        course.unseen.push(format!("{missed} events were lost"));
    }
    course.is_there = gone.is_none();
    seen.left((&mut kernel, &mut names), (sees_fds && sees_all, missed == 0), &mut course);
    let counts = kernel.socket_counts(SLOT)?;
    course.connections = COUNTERS.into_iter().zip(counts).collect();
    seen.sum(&mut course);
    let exit = course.exit(stop.is_cancelled());
    let text = if is_table { course.text() } else { output::json(&Stop { audit, stop: course })? + "\n" };
    output::data(&text)?;
    Ok(exit)
}

/// What this kernel does not show.
fn missing(kernel: &Kernel) -> Vec<String> {
    let missing = kernel.programs().iter().filter(|status| !status.is_fine());
    let mut words: Vec<String> =
        missing.map(|status| format!("{} ({})", status.program.gives, status.verdict.explain())).collect();
    words.dedup();
    words
}

fn lost(kernel: &Kernel, ring: &Ring) -> Result<u64, Failure> {
    Ok(view::lost(&kernel.counts()?) + ring.ledger().rejected + kernel.not_run())
}

/// Has the fds of these processes followed; false when some are not.
fn watch(kernel: &mut Kernel, followed: &Followed) -> bool {
    let watched = followed.processes.values().map(|process| kernel.watch(*process, false));
    watched.fold(true, |all, one| all & one.is_ok())
}

impl Watch {
    /// Takes events, and returns how many.
    fn take(&mut self, events: &[Event]) -> usize {
        for event in events {
            let at = event.header().time;
            if let Some(what) = self.words(event) {
                self.moment(at, what);
            }
        }
        events.len()
    }

    fn moment(&mut self, at: u64, what: String) {
        if self.moments.len() < MAX_MOMENTS {
            self.moments.push((at, what));
        }
    }

    /// What is told of an event at once.
    fn words(&mut self, event: &Event) -> Option<String> {
        let is_own = |process: &ProcKey| self.followed.processes.get(&process.tgid) == Some(process);
        match event {
            Event::Socket(socket) if socket.what == LISTENER_CLOSED => {
                Some(format!("port {} is closed, {} not accepted", socket.peer.local_port, socket.unread))
            }
            Event::Socket(socket) => {
                let class = self.tally.take(socket)?;
                let is_first = self.tally.lost().get(&class) == Some(&1);
                is_first.then(|| format!("the first request is lost: {class}"))
            }
            Event::Signal(signal) if is_own(&signal.target) => {
                let name = losses::signal_name(signal.signal);
                let pid = signal.target.tgid;
                match signal.what {
                    // Whoever calls exit has the kernel end its other threads by KILL, which nobody sends.
                    SIGNAL_DELIVERED if signal.signal == self.signal => Some(format!(
                        "{pid} takes {name}, {} (thread {})",
                        losses::handler(signal),
                        signal.header.tid
                    )),
                    SIGNAL_GENERATED if signal.signal == KILL => {
                        Some(format!("{} sends KILL to {pid}", losses::sender(signal)))
                    }
                    SIGNAL_GENERATED if signal.signal == self.signal && signal.result == 1 => {
                        Some(format!("{pid} ignores {name}"))
                    }
                    SIGNAL_NO_MEMORY => Some(format!("the kernel ends {pid}: there is no memory")),
                    _ => None,
                }
            }
            Event::Exit(exit) if exit.group_dead != 0 && is_own(&exit.header.process) => {
                let process = exit.header.process;
                if process == self.target {
                    self.exit = Some((exit.code, exit.header.time));
                }
                Some(format!("{} is gone, {}", process.tgid, status(exit.code)))
            }
            Event::Clone(_) | Event::Fd(_) if is_own(&event.header().process) => {
                self.doings.entry(event.header().process).or_default().take(event, self.signalled);
                None
            }
            _ => None,
        }
    }

    fn seconds(&self, at: u64) -> f64 {
        at.saturating_sub(self.signalled) as f64 / 1e9
    }

    fn line(&self, (at, what): &(u64, String)) -> String {
        format!("  {:>8.3} s  {what}\n", self.seconds(*at))
    }

    /// Looks at what is there: the process first, then the others.
    fn left(
        &self,
        (kernel, names): (&mut Kernel, &mut Names),
        (sees_acts, is_whole): (bool, bool),
        course: &mut Course,
    ) {
        let mut pids: Vec<&ProcKey> = self.followed.processes.values().collect();
        pids.sort_by_key(|key| (**key != self.target, key.tgid));
        let there = pids.into_iter().filter_map(|key| Some((key, start_ticks(key.tgid)?)));
        let nothing = Doings::default();
        let mut more = 0;
        for (key, ticks) in there {
            if course.left.len() >= MAX_PROCESSES {
                more += 1;
                continue;
            }
            let doings = self.doings.get(key).unwrap_or(&nothing);
            let since = sees_acts.then_some(Since { signalled: self.signalled, doings, is_whole });
            match look(kernel, names, (key.tgid, ticks), since) {
                // One that has ended, and that its parent has not waited for.
                Ok(left) if left.count == 0 => {}
                Ok(left) => course.left.push(left),
                Err(why) => course.unseen.push(format!("the threads of {}: {why}", key.tgid)),
            }
        }
        if more > 0 {
            course.unseen.push(format!("the threads of {more} more processes"));
        }
        let own = course.left.iter().find(|left| left.pid == self.target.tgid && course.is_there);
        course.ignored_the_stop = own.and_then(|left| left.ignored_the_stop);
    }

    fn sum(self, course: &mut Course) {
        let end = self.exit.map(|(_, at)| at).filter(|_| !course.is_there);
        course.seconds = self.seconds(end.unwrap_or_else(clock::boottime));
        let code = self.exit.map(|(code, _)| code);
        course.exit_signal = code.map(|code| code & 0x7f).filter(|signal| *signal != 0);
        course.exit_code = code.filter(|code| code & 0x7f == 0).map(|code| code >> 8 & 0xff);
        let lost = |class: &Class| self.tally.lost().get(class).copied().unwrap_or(0);
        course.lost_requests = Class::ALL.iter().map(|class| (class.word(), lost(class))).collect();
        course.guessed = self.tally.guessed;
        let moment = |(at, what): &(u64, String)| Moment { seconds: self.seconds(*at), what: what.clone() };
        course.timeline = self.moments.iter().map(moment).collect();
        course.timeline.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
        course.outcome = outcome(course, code);
    }
}

/// `exit code 0`, `ended by signal 15`.
fn status(code: u32) -> String {
    match code & 0x7f {
        0 => format!("exit code {}", code >> 8 & 0xff),
        signal => format!("ended by {}", losses::signal_name(signal)),
    }
}

/// One sentence.
fn outcome(course: &Course, code: Option<u32>) -> String {
    let lost: u64 = course.lost_requests.values().sum();
    let lost = match (lost, course.unseen.is_empty()) {
        (0, true) => "no request was lost".to_owned(),
        (0, false) => "no request was seen to be lost".to_owned(),
        (1, _) => "1 request was lost".to_owned(),
        (many, _) => format!("{many} requests were lost"),
    };
    if !course.is_there {
        let how = code.map_or_else(|| "nobody saw how".to_owned(), status);
        return format!("it ended after {}, {how}; {lost}", output::seconds(course.seconds));
    }
    let how = match course.ignored_the_stop {
        Some(true) => "it ignored the stop",
        Some(false) => "it has begun nothing new of late",
        None => "whether it went on is unknown",
    };
    format!("it is there after {}: {how}; {lost}", output::seconds(course.seconds))
}

impl Course {
    fn exit(&self, interrupted: bool) -> Exit {
        let is_well = self.exit_signal.is_none()
            && self.exit_code.is_some()
            && self.lost_requests.values().all(|many| *many == 0);
        match (interrupted, self.is_there) {
            (true, _) => Exit::Interrupted,
            (_, true) => Exit::Command(124),
            (_, false) if is_well => Exit::Ok,
            (_, false) => Exit::Error,
        }
    }

    fn text(&self) -> String {
        let mut lines = vec![self.outcome.clone()];
        for class in Class::ALL {
            if let Some(many @ 1..) = self.lost_requests.get(class.word()) {
                lines.push(format!("  {many} {class}"));
            }
        }
        if self.guessed > 0 {
            lines.push(format!("  {} of them perhaps: told from the kernel's clocks", self.guessed));
        }
        if !self.is_there && !self.left.is_empty() {
            lines.push("processes that it has left".to_owned());
        }
        lines.extend(self.left.iter().flat_map(Left::lines));
        lines.extend(self.unseen.iter().map(|what| format!("not seen: {what}")));
        lines.join("\n") + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_is_0_only_for_what_ended_by_itself_and_lost_nothing() {
        let ended = || Course { exit_code: Some(3), ..Course::default() };
        assert_eq!(ended().exit(false), Exit::Ok);
        assert_eq!(ended().exit(true), Exit::Interrupted);
        let lost = BTreeMap::from([("unread", 1)]);
        assert_eq!(Course { lost_requests: lost, ..ended() }.exit(false), Exit::Error);
        assert_eq!(Course { exit_signal: Some(15), ..Course::default() }.exit(false), Exit::Error);
        assert_eq!(Course::default().exit(false), Exit::Error, "nobody saw how it ended");
        assert_eq!(Course { is_there: true, ..Course::default() }.exit(false), Exit::Command(124));
    }

    #[test]
    fn the_outcome_says_no_more_than_was_seen() {
        let there =
            Course { is_there: true, seconds: 2.0, unseen: vec!["x".to_owned()], ..Course::default() };
        assert_eq!(
            outcome(&there, None),
            "it is there after 2.0 s: whether it went on is unknown; no request was seen to be lost"
        );
        let gone = Course { seconds: 0.5, ..Course::default() };
        assert_eq!(outcome(&gone, Some(0x100)), "it ended after 0.5 s, exit code 1; no request was lost");
        assert_eq!(outcome(&gone, Some(15)), "it ended after 0.5 s, ended by TERM; no request was lost");
        assert_eq!(outcome(&gone, None), "it ended after 0.5 s, nobody saw how; no request was lost");
    }
}

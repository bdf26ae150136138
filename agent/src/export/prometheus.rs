//! The metrics page, text format 0.0.4.
//!
//! What concerns the host is written straight from the view, so a process that is gone leaves no series.
//! The registry holds only what the agent counts about itself.

use std::{
    collections::BTreeMap,
    fmt::{self, Write},
};

use plumb_common::counts;
use prometheus::{
    Histogram, HistogramOpts, IntCounterVec, IntGauge, Opts, Registry, TextEncoder, core::Collector,
};

use crate::{
    detect::{Finding, News, Rule, State, What},
    drain::{Document, Verdict},
    losses::By,
    supervisor::{self, Workers},
    table::Row,
    view::HostView,
};

/// What the scraper must be told.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Groups with series of their own; the rest is folded into one.
const MAX_GROUPS: usize = 500;
const OTHER: &str = "~other";

/// What the agent counts about itself.
#[derive(Clone, Debug)]
pub(crate) struct Own {
    registry: Registry,
    reports: IntCounterVec,
    drains: IntCounterVec,
    lost_requests: IntCounterVec,
    kills: IntCounterVec,
    drain_seconds: Histogram,
    services: IntGauge,
}

/// Services that have a series of their own; users may register others for as long as the agent runs.
const MAX_SERVICES: usize = 256;
/// In their place.
const OTHERS: &str = "~other";

impl Own {
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        let reports = IntCounterVec::new(
            Opts::new("plumb_leak_reports_total", "Leaks reported since the agent started."),
            &["resource"],
        )?;
        registry.register(Box::new(reports.clone()))?;
        let drains = IntCounterVec::new(
            Opts::new(
                "plumb_drains_total",
                "Services drained since the agent started, by what became of them.",
            ),
            &["service", "outcome"],
        )?;
        registry.register(Box::new(drains.clone()))?;
        let lost_requests = IntCounterVec::new(
            Opts::new(
                "plumb_lost_requests_total",
                "Requests that services have lost while they were drained, by how.",
            ),
            &["service", "class"],
        )?;
        registry.register(Box::new(lost_requests.clone()))?;
        let kills = IntCounterVec::new(
            Opts::new("plumb_kills_total", "KILLs of anybody since the agent started, by their sender."),
            &["by"],
        )?;
        for by in By::ALL {
            kills.with_label_values(&[by.word()]);
        }
        registry.register(Box::new(kills.clone()))?;
        let buckets = vec![0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0];
        let drain_seconds = Histogram::with_opts(
            HistogramOpts::new("plumb_drain_duration_seconds", "Time that drains took.").buckets(buckets),
        )?;
        registry.register(Box::new(drain_seconds.clone()))?;
        let services = IntGauge::new("plumb_registered_services", "Services that are registered.")?;
        registry.register(Box::new(services.clone()))?;
        Ok(Self { registry, reports, drains, lost_requests, kills, drain_seconds, services })
    }

    /// Counts a drain that is over.
    pub(crate) fn drained(&self, drain: &Document) {
        self.drain_seconds.observe(drain.seconds);
        for service in &drain.services {
            let known = self.drains.collect().iter().map(|family| family.get_metric().len()).sum::<usize>();
            let name = if known < MAX_SERVICES { service.name.as_str() } else { OTHERS };
            let outcome = service.verdict.map_or("unknown", Verdict::word);
            self.drains.with_label_values(&[name, outcome]).inc();
            for (class, many) in &service.lost_requests {
                self.lost_requests.with_label_values(&[name, class.word()]).inc_by(*many);
            }
        }
    }

    /// Counts a KILL.
    pub(crate) fn killed(&self, by: By) {
        self.kills.with_label_values(&[by.word()]).inc();
    }

    /// How many services there are.
    pub(crate) fn registered(&self, services: usize) {
        self.services.set(i64::try_from(services).unwrap_or(i64::MAX));
    }

    /// Counts a report of a leak.
    pub(crate) fn reported(&self, news: &News) {
        if news.what == What::Leak {
            self.reports.with_label_values(&[news.finding.resource.word()]).inc();
        }
    }
}

/// Renders the page.
pub(crate) fn page(view: &HostView, workers: &Workers, own: &Own) -> Result<String, prometheus::Error> {
    let mut page = Page(String::with_capacity(16 << 10));
    // Writing to a String does not fail.
    let _ = groups(&mut page, &view.rows)
        .and_then(|()| leaks(&mut page, &view.findings))
        .and_then(|()| collection(&mut page, view))
        .and_then(|()| agent(&mut page, workers));
    TextEncoder::new().encode_utf8(&own.registry.gather(), &mut page.0)?;
    Ok(page.0)
}

#[derive(Default)]
struct Group {
    processes: u64,
    fds: u64,
    worst_fd_ratio: f64,
    threads: u64,
    rss_bytes: u64,
}

impl Group {
    fn add(&mut self, row: &Row) {
        self.processes += 1;
        self.fds += u64::from(row.fds);
        self.worst_fd_ratio = self.worst_fd_ratio.max(row.fd_ratio());
        self.threads += u64::from(row.threads);
        self.rss_bytes += row.rss_bytes;
    }

    fn merge(&mut self, other: &Self) {
        self.processes += other.processes;
        self.fds += other.fds;
        self.worst_fd_ratio = self.worst_fd_ratio.max(other.worst_fd_ratio);
        self.threads += other.threads;
        self.rss_bytes += other.rss_bytes;
    }
}

fn groups(page: &mut Page, rows: &[Row]) -> fmt::Result {
    let mut groups: BTreeMap<&str, Group> = BTreeMap::new();
    for row in rows.iter().filter(|row| !row.exited) {
        groups.entry(&row.info.group).or_default().add(row);
    }
    let folded = fold(&mut groups);
    let series =
        |value: fn(&Group) -> f64| groups.iter().map(move |(name, group)| ([("group", *name)], value(group)));
    page.family(
        "plumb_group_processes",
        GAUGE,
        "Processes of the group, without zombies.",
        series(|group| group.processes as f64),
    )?;
    page.family("plumb_group_open_fds", GAUGE, "Open file descriptors.", series(|group| group.fds as f64))?;
    page.family(
        "plumb_group_fd_limit_ratio_max",
        GAUGE,
        "Open file descriptors over the soft limit, of the worst process of the group.",
        series(|group| group.worst_fd_ratio),
    )?;
    page.family("plumb_group_threads", GAUGE, "Threads.", series(|group| group.threads as f64))?;
    page.family(
        "plumb_group_resident_memory_bytes",
        GAUGE,
        "Resident memory; approximate from Linux 6.2 on, where the kernel counts per CPU.",
        series(|group| group.rss_bytes as f64),
    )?;
    page.family(
        "plumb_groups_folded",
        GAUGE,
        "Groups beyond the bound on series, folded into group ~other.",
        [([("bound", "max_groups")], folded as f64)],
    )
}

/// Keeps the groups with the most fds and folds the rest; returns how many were folded.
fn fold(groups: &mut BTreeMap<&str, Group>) -> usize {
    if groups.len() <= MAX_GROUPS {
        return 0;
    }
    let mut by_fds: Vec<_> =
        groups.iter().map(|(name, group)| (std::cmp::Reverse(group.fds), *name)).collect();
    by_fds.sort_unstable();
    let mut other = Group::default();
    let small: Vec<_> = by_fds.iter().skip(MAX_GROUPS).map(|(_, name)| *name).collect();
    for name in &small {
        if let Some(group) = groups.remove(name) {
            other.merge(&group);
        }
    }
    groups.insert(OTHER, other);
    small.len()
}

fn leaks(page: &mut Page, findings: &[Finding]) -> fmt::Result {
    let mut count: BTreeMap<(&str, &str, &str), u32> = BTreeMap::new();
    let mut soonest: BTreeMap<(&str, &str), f64> = BTreeMap::new();
    // Findings are few; a host with more leaking groups than series allow has other problems.
    let present = findings.iter().filter(|finding| finding.state != State::Resolved);
    for finding in present.take(MAX_GROUPS) {
        let (group, resource) = (&*finding.info.group, finding.resource.word());
        let state = if finding.ignored.is_some() { "ignored" } else { finding.state.word() };
        *count.entry((group, resource, state)).or_default() += 1;
        // A leak may have settled because it is at its limit: the rule of high use still knows.
        let by_use = || finding.rule == Rule::Utilisation && finding.is_full() && !finding.is_sealed();
        if (state == State::Leaking.word() || (state == State::Suspect.word() && by_use()))
            && let Some(seconds) = finding.seconds_to_exhaustion()
        {
            let kept = soonest.entry((group, resource)).or_insert(f64::INFINITY);
            *kept = kept.min(seconds);
        }
    }
    page.family(
        "plumb_leak_findings",
        GAUGE,
        "Processes of the group with a verdict on the resource.",
        count.iter().map(|((group, resource, state), count)| {
            ([("group", *group), ("resource", *resource), ("state", *state)], f64::from(*count))
        }),
    )?;
    page.family(
        "plumb_leak_exhaustion_seconds",
        GAUGE,
        "Time until the first leaking process of the group reaches its limit, at its present rate; 0 at the limit.",
        soonest
            .iter()
            .map(|((group, resource), seconds)| ([("group", *group), ("resource", *resource)], *seconds)),
    )
}

fn collection(page: &mut Page, view: &HostView) -> fmt::Result {
    page.family(
        "plumb_bpf_program_attached",
        GAUGE,
        "Whether the kernel program is attached, with the verdict.",
        view.programs.iter().map(|status| {
            let labels = [("program", status.program.name), ("verdict", status.verdict.word())];
            (labels, f64::from(u8::from(status.is_attached())))
        }),
    )?;
    let sources = || (0..counts::STACK).zip(counts::SOURCES);
    let counted = |source, outcome| view.counts.of(source, outcome) as f64;
    page.family(
        "plumb_events_seen_total",
        COUNTER,
        "Events the kernel programs saw, whatever became of them.",
        sources().map(|(source, name)| {
            let all = (0..counts::OUTCOMES.len() as u32).map(|outcome| counted(source, outcome)).sum();
            ([("source", name)], all)
        }),
    )?;
    for (outcome, name, help) in [
        (counts::FILTERED, "plumb_events_filtered_total", "Events nobody asked for."),
        (counts::FORGED, "plumb_events_forged_total", "Claims of a new fd whose slot was empty, refused."),
        (counts::SENT, "plumb_events_sent_total", "Events written to the ring."),
    ] {
        let series = sources().map(|(source, name)| ([("source", name)], counted(source, outcome)));
        page.family(name, COUNTER, help, series)?;
    }
    page.family(
        "plumb_events_consumed_total",
        COUNTER,
        "Events read from the ring; what was sent and is neither consumed nor lost is still in it.",
        [([], view.ledger.consumed as f64)],
    )?;
    let in_kernel = sources().flat_map(|(source, name)| {
        counts::LOSSES.map(move |outcome| {
            let labels = [("source", name), ("cause", counts::OUTCOMES[outcome as usize])];
            (labels, counted(source, outcome))
        })
    });
    let elsewhere = [("decode", view.ledger.rejected), ("not_run", view.not_run)]
        .map(|(cause, count)| ([("source", "any"), ("cause", cause)], count as f64));
    page.family(
        "plumb_events_lost_total",
        COUNTER,
        "Events lost, by source and cause.",
        in_kernel.chain(elsewhere),
    )?;
    following(page, view)?;
    stacks(page, view)?;
    let of_fds =
        [("fd_open_unseen", view.fd_drift.opens_unseen), ("fd_close_unseen", view.fd_drift.closes_unseen)];
    page.family(
        "plumb_drift_total",
        COUNTER,
        "Differences between the events and the kernel's tables, found and healed by passes.",
        view.drift
            .by_cause()
            .into_iter()
            .chain(of_fds)
            .map(|(cause, count)| ([("cause", cause)], count as f64)),
    )?;
    page.family(
        "plumb_passes_failed_total",
        COUNTER,
        "Passes that failed and were tried again.",
        [([], view.failed as f64)],
    )?;
    let untracked = view.untracked;
    for (name, help, value) in [
        (
            "plumb_untracked_processes",
            "Processes beyond the bound, counted in sum only.",
            untracked.processes,
        ),
        ("plumb_untracked_fds", "Their open file descriptors.", untracked.fds),
        ("plumb_untracked_threads", "Their threads.", untracked.threads),
    ] {
        page.family(name, GAUGE, help, [([], value as f64)])?;
    }
    page.family("plumb_passes_total", COUNTER, "Passes over all processes.", [([], view.passes as f64)])?;
    page.family(
        "plumb_pass_duration_seconds",
        GAUGE,
        "Duration of the last pass over all processes.",
        [([], view.pass_nanos as f64 / 1e9)],
    )
}

fn following(page: &mut Page, view: &HostView) -> fmt::Result {
    let following = view.following;
    if let Some(seam) = following.seam {
        page.family(
            "plumb_fd_events_attached",
            GAUGE,
            "Whether the fd programs are attached, and which they are.",
            [([("via", seam.word())], f64::from(u8::from(following.attached)))],
        )?;
    }
    page.family(
        "plumb_fd_canary_missed",
        GAUGE,
        "Fds of its own that the agent opened and closed, one a second, and did not see; in a row.",
        [([], f64::from(following.canary_missed))],
    )?;
    page.family(
        "plumb_watched_processes",
        GAUGE,
        "Processes whose fds have origins.",
        [([], following.watched as f64)],
    )?;
    page.family(
        "plumb_watch_refused_processes",
        GAUGE,
        "Processes that are to be watched and find no room.",
        [([], (following.refused + view.watch_waiting) as f64)],
    )?;
    page.family("plumb_fd_origins", GAUGE, "Fds whose origin is remembered.", [([], view.origins as f64)])?;
    page.family("plumb_subscribers", GAUGE, "Readers of event streams.", [([], view.subscribers.0 as f64)])?;
    page.family(
        "plumb_subscriber_missed_events_total",
        COUNTER,
        "Events that readers missed because they did not keep up; each was told.",
        [([], view.subscribers.1 as f64)],
    )
}

fn stacks(page: &mut Page, view: &HostView) -> fmt::Result {
    let counted = |outcome| view.counts.of(counts::STACK, outcome);
    let (ledger, losses) = (view.stack_ledger, view.stack_losses);
    page.family(
        "plumb_stacks_taken_total",
        COUNTER,
        "Stacks copied as a watched process made an fd or a thread, and read from their ring.",
        [([], ledger.consumed as f64)],
    )?;
    page.family(
        "plumb_stacks_missing_total",
        COUNTER,
        "Fds and threads of watched processes whose stack could not be had, by cause.",
        [
            ("no_user_registers", counted(counts::FILTERED)),
            ("ring_full", counted(counts::RING_FULL)),
            ("quota", counted(counts::QUOTA)),
            ("decode", ledger.rejected),
            ("not_unwound", losses.not_unwound),
            ("too_many", losses.too_many),
        ]
        .map(|(cause, count)| ([("cause", cause)], count as f64)),
    )?;
    let harm = losses.symboliser;
    page.family(
        "plumb_symboliser_failures_total",
        COUNTER,
        "What went wrong while stacks were unwound and named; what is missing then is told as module and offset.",
        [
            ("timeout", harm.timeouts),
            ("crash", harm.crashes),
            ("refused", harm.refused),
            ("recycled", harm.recycled),
            ("not_started", harm.not_started),
        ]
        .map(|(cause, count)| ([("cause", cause)], count as f64)),
    )
}

fn agent(page: &mut Page, workers: &Workers) -> fmt::Result {
    let workers = workers.list();
    page.family(
        "plumb_worker_state",
        GAUGE,
        "1 for the state the worker is in.",
        workers.iter().flat_map(|(name, worker)| {
            supervisor::State::ALL.map(|state| {
                let labels = [("worker", *name), ("state", state.word())];
                (labels, f64::from(u8::from(state == worker.state)))
            })
        }),
    )?;
    page.family(
        "plumb_worker_restarts_total",
        COUNTER,
        "Times the worker failed and was started again.",
        workers.iter().map(|(name, worker)| ([("worker", *name)], worker.restarts as f64)),
    )?;
    let build = [
        ("version", env!("CARGO_PKG_VERSION")),
        ("revision", env!("PLUMB_REVISION")),
        ("rustc", env!("PLUMB_RUSTC")),
    ];
    page.family("plumb_build_info", GAUGE, "1; the labels say what was built.", [(build, 1.0)])
}

const GAUGE: &str = "gauge";
const COUNTER: &str = "counter";

struct Page(String);

impl Page {
    /// Writes one family. One without series is left out whole.
    fn family<'a, const LABELS: usize>(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        series: impl IntoIterator<Item = ([(&'a str, &'a str); LABELS], f64)>,
    ) -> fmt::Result {
        let mut series = series.into_iter().peekable();
        if series.peek().is_none() {
            return Ok(());
        }
        writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}")?;
        for (labels, value) in series {
            self.0.push_str(name);
            let mut separator = '{';
            for (label, text) in labels {
                write!(self.0, "{separator}{label}=\"")?;
                text.chars().for_each(|char| self.label_char(char));
                self.0.push('"');
                separator = ',';
            }
            if LABELS > 0 {
                self.0.push('}');
            }
            writeln!(self.0, " {value}")?;
        }
        Ok(())
    }

    fn label_char(&mut self, char: char) {
        match char {
            '\\' => self.0.push_str("\\\\"),
            '"' => self.0.push_str("\\\""),
            '\n' => self.0.push_str("\\n"),
            other => self.0.push(other),
        }
    }
}

#[cfg(test)]
#[path = "prometheus_tests.rs"]
mod tests;

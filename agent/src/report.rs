//! How a leak is told in the log: one sentence for people, or one object for machines.

use std::time::Duration;

use crate::{
    clock::Calendar,
    config::LogFormat,
    detect::{Example, Finding, Resource},
    document::{Leak, Origin},
};

/// Logs a leak, once.
pub(crate) fn log(finding: &Finding, format: LogFormat) {
    let calendar = Calendar::now();
    match format {
        LogFormat::Text => tracing::warn!("{}", sentence(finding, calendar)),
        LogFormat::Json => {
            let leak = Leak::new(finding, calendar);
            let examples: Vec<_> = leak.examples.iter().map(|example| example.what.as_str()).collect();
            tracing::warn!(
                id = leak.id,
                resource = leak.resource.word(),
                pid = leak.pid,
                comm = leak.comm,
                group = leak.group,
                live = leak.live,
                baseline = leak.baseline,
                limit = leak.limit,
                growth_per_minute = leak.growth_per_minute,
                seconds_to_exhaustion = leak.seconds_to_exhaustion,
                first_seen = leak.first_seen,
                examples = ?examples,
                from = leak.origins.first().map(Origin::words),
                "leaking"
            );
        }
    }
}

fn sentence(finding: &Finding, calendar: Calendar) -> String {
    let noun = match finding.resource {
        Resource::Fd => "fds",
        Resource::Thread => "threads",
    };
    let limit = finding.limit.map_or_else(|| "no limit".to_owned(), |limit| format!("limit {limit}"));
    let end = finding
        .seconds_to_exhaustion()
        .map_or_else(String::new, |seconds| format!(", reached in {}", rough(seconds)));
    format!(
        "{comm} (pid {pid}, group {group}) leaks {noun}: {live} now, {baseline} before {since}, \
         {growth:+.0} per minute, {limit}{end}; mostly {examples}{from}",
        comm = finding.info.comm,
        pid = finding.key.tgid,
        group = finding.info.group,
        live = finding.live,
        baseline = finding.baseline,
        since = calendar.format(finding.first_seen),
        growth = finding.growth_per_minute,
        examples = list(&finding.examples),
        from = from(finding, calendar),
    )
}

/// Where most of it came from, as far as that is known.
fn from(finding: &Finding, calendar: Calendar) -> String {
    let leak = Leak::new(finding, calendar);
    let known = leak.origins.first().filter(|origin| origin.function.is_some());
    known.map_or_else(String::new, |origin| format!("; from {}", origin.words()))
}

/// Examples in a few words: `/var/log/a (50x), tcp 10.0.0.1:80 (30x)`. What is rare beside the first is left
/// to the JSON.
#[must_use]
pub(crate) fn list(examples: &[Example]) -> String {
    if examples.is_empty() {
        return "unknown".to_owned();
    }
    let most = examples.iter().map(|example| example.count).max().unwrap_or(0);
    let frequent = examples.iter().filter(|example| example.count >= most.div_ceil(10));
    let words = frequent.take(3).map(|example| {
        let quoted =
            if example.kind == "thread" { format!("thread {}", example.what) } else { example.what.clone() };
        if example.count > 1 { format!("{quoted} ({}x)", example.count) } else { quoted }
    });
    words.collect::<Vec<_>>().join(", ")
}

/// A duration in its two largest units: `16m 40s`, `3days 2h`.
#[must_use]
pub(crate) fn rough(seconds: f64) -> String {
    /// A hundred years; beyond that a forecast has no meaning.
    const FOREVER: f64 = 100.0 * 365.0 * 86_400.0;
    if seconds >= FOREVER {
        return "over 100 years".to_owned();
    }
    let whole = Duration::from_secs(seconds.max(0.0) as u64);
    let text = humantime::format_duration(whole).to_string();
    text.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_short_and_bounded() {
        assert_eq!(rough(1000.4), "16m 40s");
        assert_eq!(rough(0.0), "0s");
        assert_eq!(rough(90_061.0), "1day 1h");
        assert_eq!(rough(f64::INFINITY), "over 100 years");
    }
}

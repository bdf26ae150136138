//! How news are told in the log: one sentence for people, or one object for machines.

use std::time::Duration;

use crate::{
    clock::Calendar,
    config::LogFormat,
    detect::{Example, Finding, News, Resource, Rule, What},
    document::Leak,
    text,
};

/// Logs what is new, once.
pub(crate) fn log(news: &News, format: LogFormat) {
    let calendar = Calendar::now();
    match format {
        LogFormat::Text if news.what == What::Resolved => tracing::info!("{}", sentence(news, calendar)),
        LogFormat::Text => tracing::warn!("{}", sentence(news, calendar)),
        LogFormat::Json => object(news, calendar),
    }
}

fn object(news: &News, calendar: Calendar) {
    let leak = Leak::new(&news.finding, calendar);
    let example = |example: &Example| format!("{} ({}x)", example.what, example.count);
    // A field is no array.
    let examples = leak.examples.iter().map(example).collect::<Vec<_>>().join(", ");
    let examples = Some(examples).filter(|examples| !examples.is_empty());
    // The level of an event is a constant.
    macro_rules! event {
        ($log:ident, $message:literal) => {
            tracing::$log!(
                id = leak.id,
                rule = leak.rule.word(),
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
                why = leak.resolved.as_ref().map(|end| end.why.words()),
                examples,
                from = leak.from(),
                $message
            )
        };
    }
    match news.what {
        What::Leak => event!(warn, "leaking"),
        What::Warning => event!(warn, "suspect"),
        What::Full => event!(warn, "full"),
        What::Resolved => event!(info, "resolved"),
    }
}

fn sentence(news: &News, calendar: Calendar) -> String {
    let finding = &news.finding;
    let (live, baseline) = (finding.live, finding.baseline);
    let noun = match finding.resource {
        Resource::Fd => "fds",
        Resource::Thread => "threads",
    };
    let who = format!("{} (pid {}, group {})", finding.info.comm, finding.key.tgid, finding.info.group);
    let examples = list(&finding.examples, &Leak::new(finding, calendar).listed(), usize::MAX);
    let limit = finding.limit.map_or_else(|| "no limit".to_owned(), |limit| format!("limit {limit}"));
    match (news.what, finding.rule) {
        (What::Leak, _) => {
            let end = match finding.seconds_to_exhaustion() {
                Some(_) if finding.is_full() => ", which is reached".to_owned(),
                Some(seconds) => format!(", reached in {}", rough(seconds)),
                None => String::new(),
            };
            format!(
                "{who} leaks {noun}: {live} now, up from {baseline} since {since}, {growth:+.0} per minute, \
                 {limit}{end}; mostly {examples}{from}",
                since = calendar.format(finding.first_seen),
                growth = finding.growth_per_minute,
                from = from(finding, calendar),
            )
        }
        (What::Resolved, _) => {
            let why = finding.resolved.map_or("resolved", |end| end.why.words());
            let reached = if finding.is_at_limit() { ", which is reached" } else { "" };
            format!("{who} leaks {noun} no more: {why}; {live} at last, {limit}{reached}")
        }
        (What::Full, _) | (What::Warning, Rule::Trend | Rule::Utilisation) if finding.is_full() => {
            let most =
                if finding.examples.is_empty() { String::new() } else { format!("; mostly {examples}") };
            format!("{who} is at its limit of {noun}: {live}, {limit}{most}{}", from(finding, calendar))
        }
        (_, Rule::Trend | Rule::Utilisation) => {
            let part = finding.limit.map_or(0.0, |limit| f64::from(live) * 100.0 / limit.max(1) as f64);
            format!(
                "{who} uses {part:.0} % of its limit of {noun}: {live}, {limit}{}",
                from(finding, calendar)
            )
        }
        (_, Rule::ThreadsOverBaseline) => {
            format!("{who} has {live} threads, {baseline} after it had warmed up")
        }
        (_, Rule::ThreadAge) => format!("{who} has threads that are older than they should be: {examples}"),
    }
}

/// Where most of it came from, as far as that is known.
fn from(finding: &Finding, calendar: Calendar) -> String {
    let leak = Leak::new(finding, calendar);
    let is_known = finding.earlier.is_some() || leak.origins.first().is_some_and(|of| of.function.is_some());
    leak.from().filter(|_| is_known).map_or_else(String::new, |from| format!("; from {from}"))
}

/// Examples in a few words: `/var/log/a (50x), tcp 10.0.0.1:80 (30x)`, and then what they are of, within so many letters.
/// What is rare beside the first is left to the JSON.
#[must_use]
pub(crate) fn list(examples: &[Example], of: &str, room: usize) -> String {
    if examples.is_empty() {
        return "unknown".to_owned();
    }
    let most = examples.iter().map(|example| example.count).max().unwrap_or(0);
    let frequent = examples.iter().filter(|example| example.count >= most.div_ceil(10));
    let room = room.saturating_sub(of.chars().count());
    let count =
        |example: &Example| if example.count > 1 { format!(" ({}x)", example.count) } else { String::new() };
    let words = frequent.take(3).map(|example| {
        let kind = if example.kind == "thread" { "thread " } else { "" };
        let count = count(example);
        let room = room.saturating_sub(kind.len() + count.len()).max(1);
        format!("{kind}{}{count}", text::shortened(&example.what, room))
    });
    let mut list = String::new();
    for words in words {
        if list.is_empty() {
            list = words;
        } else if list.chars().count() + 2 + words.chars().count() <= room {
            list = format!("{list}, {words}");
        } else {
            break;
        }
    }
    list + of
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
    use crate::{
        detect::{Detector, HostLimits, Resolution, Settings, State, Why},
        table::Row,
    };

    #[test]
    fn each_kind_of_news_has_its_sentence() {
        let row = Row::example(1_017, 1_024);
        let mut detector = Detector::new(HostLimits { threads: 9_999 }, Settings::default());
        for second in 9_000..9_060 {
            detector.observe(std::slice::from_ref(&row), second * 1_000_000_000);
        }
        let finding = detector.findings().remove(0);
        let said =
            |what, finding: &Finding| sentence(&News { what, finding: finding.clone() }, Calendar::now());
        let full = said(What::Warning, &finding);
        assert_eq!(full, "app (pid 42, group app.service) is at its limit of fds: 1017, limit 1024");
        let high = said(What::Warning, &Finding { live: 840, ..finding.clone() });
        assert!(high.ends_with("uses 82 % of its limit of fds: 840, limit 1024"), "{high}");
        let leak = Finding { rule: Rule::Trend, baseline: 5, listed: None, ..finding };
        let leaks = said(What::Leak, &leak);
        for part in ["leaks fds: 1017 now, up from 5 since 2", "limit 1024, which is reached; mostly unknown"]
        {
            assert!(leaks.contains(part), "{leaks}");
        }
        let resolved = Resolution { at: 0, why: Why::Settled };
        let ended =
            said(What::Resolved, &Finding { state: State::Resolved, resolved: Some(resolved), ..leak });
        assert!(
            ended.ends_with("leaks fds no more: settled; 1017 at last, limit 1024, which is reached"),
            "{ended}"
        );
    }

    #[test]
    fn examples_are_as_many_as_there_is_room_for_with_what_they_are_of() {
        let example = |what: &str| Example { what: what.to_owned(), kind: "file".to_owned(), count: 128 };
        let examples = [example("/etc/passwd"), example("/etc/group")];
        let all = "/etc/passwd (128x), /etc/group (128x) of 256";
        assert_eq!(list(&examples, "", usize::MAX), "/etc/passwd (128x), /etc/group (128x)");
        assert_eq!((list(&examples, " of 256", all.len()).as_str(), all.len()), (all, 44));
        assert_eq!(list(&examples, " of 256", 43), "/etc/passwd (128x) of 256");
        assert_eq!(list(&examples, " of 256", 20), "/etc/… (128x) of 256");
    }

    #[test]
    fn durations_are_short_and_bounded() {
        assert_eq!(rough(1000.4), "16m 40s");
        assert_eq!(rough(0.0), "0s");
        assert_eq!(rough(90_061.0), "1day 1h");
        assert_eq!(rough(f64::INFINITY), "over 100 years");
    }
}

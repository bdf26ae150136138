//! One finding with all that is known of it, for people.

use crate::{
    advice::advise,
    detect::{Resource, Rule},
    document::{BlockedThread, Leak, LeakThreads},
    report,
};

/// Origins, and functions of a stack, that are printed.
const MAX_ORIGINS: usize = 5;
const MAX_FUNCTIONS: usize = 24;
/// Columns and rows of the chart.
const WIDTH: usize = 60;
const HEIGHT: usize = 6;

/// The whole page.
pub(super) fn page(leak: &Leak) -> String {
    let mut lines = vec![title(leak), String::new()];
    lines.extend(facts(leak));
    if let Some(history) = leak.history.as_ref().filter(|history| history.live.len() > 1) {
        let seconds = history.every_seconds * history.live.len() as f64;
        section(&mut lines, &format!("The last {}", lately(seconds)), chart(&history.live));
    }
    section(&mut lines, "Where they came from", origins(leak));
    let listed = Some(leak.listed()).filter(|listed| !listed.is_empty());
    let listed = listed.map_or_else(String::new, |listed| format!(" ({})", listed.trim_start()));
    section(&mut lines, &format!("What they are{listed}"), examples(leak));
    if let Some(threads) = &leak.threads {
        section(&mut lines, "Threads by type", types(threads));
        section(&mut lines, "Where they are now", blocked(threads));
    }
    section(&mut lines, "What to do", advise(leak).into_iter().map(|line| format!("- {line}")).collect());
    lines.join("\n") + "\n"
}

fn section(lines: &mut Vec<String>, title: &str, content: Vec<String>) {
    if !content.is_empty() {
        lines.extend([String::new(), title.to_owned()]);
        lines.extend(content.into_iter().map(|line| format!("  {line}").trim_end().to_owned()));
    }
}

/// `20 seconds`, `minute`, `3 minutes`.
fn lately(seconds: f64) -> String {
    match (seconds / 60.0).round() as u64 {
        0 => format!("{seconds:.0} seconds"),
        1 => "minute".to_owned(),
        minutes => format!("{minutes} minutes"),
    }
}

fn noun(leak: &Leak) -> &'static str {
    match leak.resource {
        Resource::Fd => "fds",
        Resource::Thread => "threads",
    }
}

fn title(leak: &Leak) -> String {
    let state = leak.state.word();
    format!("{}: {} (pid {}, group {}), {} {state}", leak.id, leak.comm, leak.pid, leak.group, noun(leak))
}

fn facts(leak: &Leak) -> Vec<String> {
    let limit = leak.limit.map_or_else(|| "none".to_owned(), |limit| limit.to_string());
    let end = leak.seconds_to_exhaustion.map(|seconds| match leak.is_full() {
        true => ", and it is full".to_owned(),
        false => format!(", reached in {}", report::rough(seconds)),
    });
    let mut facts = vec![
        ("live", live(leak)),
        ("growth", format!("{:+.1} per minute", leak.growth_per_minute)),
        ("limit", limit + end.as_deref().unwrap_or_default()),
        ("rule", leak.rule.word().to_owned()),
    ];
    if let Some(since) = &leak.leaking_since {
        facts.push(("leaking since", since.clone()));
    }
    if let Some(end) = &leak.resolved {
        facts.push(("resolved", format!("{}: {}", end.at, end.why.words())));
    }
    if let Some(reason) = &leak.ignored {
        facts.push(("ignored", reason.clone()));
    }
    if let Some(known) = &leak.acknowledged {
        let reason = known.reason.as_ref().map_or_else(String::new, |reason| format!(": {reason}"));
        facts.push(("acknowledged", format!("{} at {}{reason}", known.at, known.live)));
    }
    if let Some(until) = &leak.silenced_until {
        facts.push(("silenced until", until.clone()));
    }
    if let Some(exe) = &leak.exe {
        facts.push(("program", exe.clone()));
    }
    let module = leak.origins.iter().find_map(|origin| origin.function.as_ref());
    if let Some((path, id)) = module.and_then(|of| Some((of.module.as_ref()?, of.build_id.as_ref()?))) {
        facts.push(("build id", format!("{id} ({path})")));
    }
    facts.into_iter().map(|(name, value)| format!("  {name:<14} {value}")).collect()
}

/// The count now, and what it was when the rule began to look at it.
fn live(leak: &Leak) -> String {
    let Leak { live, baseline, first_seen, .. } = leak;
    match leak.rule {
        // The baseline is the lowest of a window that begins then.
        Rule::Trend => format!("{live}, up from {baseline} since {first_seen}"),
        Rule::ThreadsOverBaseline => {
            format!("{live}, {baseline} after warming up; too many since {first_seen}")
        }
        Rule::Utilisation | Rule::ThreadAge => format!("{live}, {baseline} at {first_seen}"),
    }
}

/// The course of a count as bars, with the highest and lowest at the side.
fn chart(live: &[u32]) -> Vec<String> {
    const EIGHTHS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let columns: Vec<u32> =
        (0..WIDTH.min(live.len())).map(|column| live[column * live.len() / WIDTH.min(live.len())]).collect();
    let [low, high] = [columns.iter().min(), columns.iter().max()].map(|count| count.copied().unwrap_or(0));
    let span = u64::from((high - low).max(1));
    let height = |count: u32| (u64::from(count - low) * (HEIGHT as u64 * 8 - 1) / span) as usize + 1;
    let rows = (0..HEIGHT).rev().map(|row| {
        let label = match row {
            0 => low.to_string(),
            row if row == HEIGHT - 1 => high.to_string(),
            _ => String::new(),
        };
        let bars: String =
            columns.iter().map(|count| EIGHTHS[height(*count).saturating_sub(row * 8).min(8)]).collect();
        format!("{label:>8} {bars}")
    });
    rows.collect()
}

fn origins(leak: &Leak) -> Vec<String> {
    if leak.rule != Rule::Trend && leak.before_watching + leak.since_watching == 0 {
        // Only what rises is watched.
        return Vec::new();
    }
    let mut counts =
        format!("{} made since it is watched, {} before that", leak.since_watching, leak.before_watching);
    if leak.naming > 0 && leak.resolved.is_none() {
        counts += &format!("; {} of the last seconds are looked up just now", leak.naming);
    }
    let mut lines = vec![counts];
    if let Some(earlier) = &leak.origin_before_restart {
        lines.push(format!("{:>6}  before the restart of the agent  {}", earlier.live, earlier.words));
        lines.push(format!("        newest {}", earlier.newest));
    }
    for origin in leak.origins.iter().take(MAX_ORIGINS) {
        let examples: Vec<String> = origin.examples.iter().map(u32::to_string).collect();
        lines.push(format!("{:>6}  {}  {}", origin.live, origin.syscall, origin.words()));
        lines.push(format!(
            "        from {} to {}, newest {}",
            origin.oldest,
            origin.newest,
            examples.join(" ")
        ));
        let functions = origin.stack.iter().take(MAX_FUNCTIONS);
        lines.extend(functions.map(|function| {
            let doubt = if function.uncertain { "  (callers before it may be missing)" } else { "" };
            format!("          {}{doubt}", function.words())
        }));
        let left = origin.stack.len().saturating_sub(MAX_FUNCTIONS);
        if left > 0 {
            lines.push(format!("          and {left} more: -o json has all"));
        } else if !origin.complete && !origin.stack.is_empty() {
            lines.push("          (the rest of the stack could not be had)".to_owned());
        }
    }
    let more = (leak.places as usize).saturating_sub(MAX_ORIGINS);
    if more > 0 {
        let rest = leak.origins.len().saturating_sub(MAX_ORIGINS);
        lines.push(format!("and {more} more places: -o json has {rest} of them"));
    }
    lines
}

fn examples(leak: &Leak) -> Vec<String> {
    let example =
        |example: &crate::detect::Example| format!("{:>6}  {} {}", example.count, example.kind, example.what);
    leak.examples.iter().map(example).collect()
}

fn types(threads: &LeakThreads) -> Vec<String> {
    let kind = |kind: &crate::document::ThreadType| {
        let started = if kind.oldest == kind.newest {
            format!("at {}", kind.oldest)
        } else {
            format!("from {} to {}, half of them before {}", kind.oldest, kind.newest, kind.median)
        };
        format!("{:>6}  {}, started {started}", kind.count, kind.name)
    };
    threads.types.iter().map(kind).collect()
}

fn blocked(threads: &LeakThreads) -> Vec<String> {
    let mut lines = Vec::new();
    let mut left: Vec<&BlockedThread> = threads.blocked.iter().collect();
    while let Some(first) = left.first().copied() {
        let is_there = |thread: &&BlockedThread| {
            thread.wait_channel == first.wait_channel && thread.stack == first.stack
        };
        let (here, elsewhere): (Vec<_>, Vec<_>) = left.into_iter().partition(is_there);
        left = elsewhere;
        let place = if first.wait_channel.is_empty() { "runs" } else { first.wait_channel.as_str() };
        let ids: Vec<String> = here.iter().map(|thread| thread.tid.to_string()).collect();
        lines.push(format!("{} {}: {place}", first.name, ids.join(" ")));
        let functions = first.stack.iter().take(MAX_FUNCTIONS);
        lines.extend(functions.map(|function| format!("          {}", function.words())));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leak(differs: &serde_json::Value) -> Leak {
        let mut leak = serde_json::json!({"id": "fd-7-1", "state": "leaking", "rule": "trend", "resource": "fd",
            "pid": 7, "comm": "a", "group": "a", "live": 1017, "baseline": 7, "limit": 1024, "growth_per_minute": 0.0,
            "seconds_to_exhaustion": 0.0, "first_seen": "T1", "leaking_since": "T2", "resolved": null,
            "ignored": null, "acknowledged": null, "silenced_until": null, "examples": [], "exe": null,
            "history": null, "threads": null, "before_watching": 0, "origins": []});
        leak.as_object_mut().unwrap().extend(differs.as_object().unwrap().clone());
        serde_json::from_value(leak).unwrap()
    }

    #[test]
    fn facts_say_what_is_full_what_people_said_and_only_what_is_true_of_a_time() {
        let has = |differs: serde_json::Value, line: &str| {
            let page = page(&leak(&differs));
            assert!(page.lines().any(|found| found.trim() == line), "{line} is not in\n{page}");
        };
        let none = serde_json::json!({});
        has(none.clone(), "live           1017, up from 7 since T1");
        has(none, "limit          1024, and it is full");
        has(serde_json::json!({"rule": "utilisation", "baseline": 835}), "live           1017, 835 at T1");
        let known = serde_json::json!({"acknowledged": {"at": "T3", "reason": "being fixed", "live": 90}});
        has(known, "acknowledged   T3 at 90: being fixed");
        has(serde_json::json!({"silenced_until": "T4"}), "silenced until T4");
        has(
            serde_json::json!({"examples_of_newest": 256, "examples": [{"what": "a", "kind": "file", "count": 256}]}),
            "What they are (of the newest 256)",
        );
        has(
            serde_json::json!({"examples_of": 263, "examples_listed": "2026-11-29T01:36:16Z",
                "examples": [{"what": "anon_inode:[eventfd]", "kind": "eventfd", "count": 151}]}),
            "What they are (of 263 listed at 01:36:16Z)",
        );
        let earlier = serde_json::json!({"words": "leak (a.c:3)", "live": 497, "newest": "T5"});
        has(
            serde_json::json!({"origin_before_restart": earlier}),
            "497  before the restart of the agent  leak (a.c:3)",
        );
        let of = |newest: &str| {
            let kind = serde_json::json!({"name": "main", "count": 1, "oldest": "T6", "median": "T6", "newest": newest});
            serde_json::json!({"threads": {"types": [kind], "blocked": []}})
        };
        has(of("T6"), "1  main, started at T6");
        has(of("T7"), "1  main, started from T6 to T7, half of them before T6");
    }

    #[test]
    fn the_time_of_a_course_is_in_words() {
        assert_eq!([20.0, 60.0, 89.0, 120.0].map(lately), ["20 seconds", "minute", "minute", "2 minutes"]);
    }

    #[test]
    fn a_chart_has_its_extremes_at_the_side_and_grows_to_the_right() {
        let rows = chart(&(0..600).collect::<Vec<u32>>());
        assert_eq!(rows.len(), HEIGHT);
        assert!(rows[0].trim_start().starts_with("590 ") && rows[HEIGHT - 1].trim_start().starts_with("0 "));
        let filled = |row: &String| row.chars().filter(|bar| !bar.is_ascii()).count();
        assert!(rows.windows(2).all(|pair| filled(&pair[0]) < filled(&pair[1])), "{rows:?}");
        assert_eq!(chart(&[7]).len(), HEIGHT);
    }
}

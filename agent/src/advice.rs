//! What to do about a leak: from what it holds and where it came from to a sentence or two.

use crate::{
    detect::{Resource, Rule, State, Why},
    document::{Leak, Origin},
};

/// An hour is time enough for a remedy; below it, or above this part of the limit, the limit is raised first.
const SOON: f64 = 3_600.0;
const NEAR: f64 = 0.8;

/// The next steps, the most urgent first.
#[must_use]
pub(crate) fn advise(leak: &Leak) -> Vec<String> {
    let mut advice = Vec::new();
    match leak.resolved.as_ref().map(|end| end.why) {
        Some(Why::ProcessEnded | Why::Exec) => {
            advice.push("the process is gone; the next one of this program will leak again".to_owned());
        }
        Some(Why::Settled) if is_most(leak) => {
            return vec![format!(
                "it may have stopped for want of room: look at `plumb leaks {}-use`",
                leak.id
            )];
        }
        Some(_) => return vec!["nothing: it is no leak any more".to_owned()],
        None => advice.extend(at_limit(leak)),
    }
    let all: u32 = leak.examples.iter().map(|example| example.count).sum();
    let with = |is: &dyn Fn(&str) -> bool| -> u32 {
        leak.examples.iter().filter(|example| is(&example.what)).map(|example| example.count).sum()
    };
    let is_half = |part: u32| part > 0 && part * 2 >= all;
    if is_half(with(&|what| what.ends_with(" CLOSE_WAIT"))) {
        advice.push(
            "the other end has closed these connections (CLOSE_WAIT): close them when read() returns 0"
                .to_owned(),
        );
    }
    if is_half(with(&|what| what.ends_with(" (deleted)"))) {
        advice
            .push("these files are deleted, and their space comes back only when they are closed".to_owned());
    }
    match (leak.origins.first(), leak.resource) {
        (Some(origin), Resource::Fd) => match &origin.function {
            Some(function) => advice.push(format!(
                "follow the fd from {} to the end of its use: on the way that is taken here nobody closes it",
                function.words()
            )),
            None => advice.push(format!(
                "no stack could be had of {}: `plumb doctor` and the metric plumb_stacks_missing_total say why",
                origin.syscall
            )),
        },
        (Some(origin), Resource::Thread) => {
            if let Some(function) = &origin.function {
                advice.push(format!(
                    "threads that {} starts do not end: see above what they wait for",
                    function.words()
                ));
            }
        }
        (None, _) if leak.rule == Rule::Trend && leak.resolved.is_none() => advice.extend(without_origin(leak)),
        (None, _) => {}
    }
    advice.extend(leak.origins.first().and_then(|origin| interpreted(leak, origin)).map(str::to_owned));
    if leak.state == State::Suspect {
        advice.extend(of_rule(leak));
    }
    advice
}

/// What to do while nothing of it has been seen to be made.
fn without_origin(leak: &Leak) -> Vec<String> {
    let mut advice = Vec::new();
    if let Some(earlier) = &leak.origin_before_restart {
        advice.push(match leak.resource {
            Resource::Fd => format!(
                "follow the fd from {} to the end of its use, as seen before the agent was restarted: on the way that is \
                 taken there nobody closes it",
                earlier.words
            ),
            Resource::Thread => {
                format!("threads that {} starts do not end, as seen before the agent was restarted", earlier.words)
            }
        });
    }
    match (leak.is_full(), &leak.origin_before_restart) {
        (true, Some(_)) => {
            advice.push("when that is mended, restart it: only that gives back what it has".to_owned());
        }
        (true, None) => advice.push(
            "where they come from is seen when new ones are made, and what is full makes none: raise its limit or \
             restart it, and this page will say it"
                .to_owned(),
        ),
        (false, _) => advice.push(format!(
            "where they come from is known of what is made from now on; `plumb watch --origins --pid {}` shows it live",
            leak.pid
        )),
    }
    advice
}

/// Whether it has most of what it may have.
fn is_most(leak: &Leak) -> bool {
    leak.limit.is_some_and(|limit| f64::from(leak.live) >= limit as f64 * NEAR)
}

/// What gains time where that is short.
fn at_limit(leak: &Leak) -> Option<String> {
    let limit = leak.limit?;
    if leak.rule != Rule::Utilisation
        && !is_most(leak)
        && leak.seconds_to_exhaustion.is_none_or(|seconds| seconds >= SOON)
    {
        return None;
    }
    let what = if leak.is_full() { "it is full" } else { "the limit is near" };
    match leak.resource {
        Resource::Fd => Some(format!(
            "{what}: `prlimit --pid {} --nofile={}` gains time without a restart, if the hard limit allows it",
            leak.pid,
            limit.saturating_mul(4)
        )),
        Resource::Thread if leak.is_full() || leak.rule == Rule::Utilisation => Some(format!(
            "{what}: the least of pids.max of its cgroup (TasksMax= of a service), `ulimit -u` and kernel.threads-max sets it"
        )),
        Resource::Thread => None,
    }
}

/// How functions of an interpreted language get their names, where they have none.
fn interpreted(leak: &Leak, origin: &Origin) -> Option<&'static str> {
    if origin.stack.is_empty() {
        return None;
    }
    let base = |path: &'_ str| path.rsplit('/').next().unwrap_or_default().to_owned();
    let files =
        || origin.stack.iter().filter_map(|function| function.module.as_deref()).chain(leak.exe.as_deref());
    let is_in =
        |names: &[&str]| files().map(base).any(|file| names.iter().any(|name| file.starts_with(name)));
    let is_named = |start: &str| {
        origin.stack.iter().filter_map(|of| of.function.as_deref()).any(|name| name.starts_with(start))
    };
    if is_in(&["python", "libpython"]) && !is_named("py::") {
        return Some(
            "the functions of Python itself have names when it runs with `-X perf` or PYTHONPERFSUPPORT=1 (from 3.12 on)",
        );
    }
    let is_node =
        files().map(base).any(|file| file == "node" || file == "nodejs" || file.starts_with("libnode.so"));
    if is_node && !is_named("JS:") {
        return Some("the functions of JavaScript have names when node runs with `--perf-basic-prof`");
    }
    None
}

/// What to do about a suspect.
fn of_rule(leak: &Leak) -> Vec<String> {
    let (pid, group) = (leak.pid, &leak.group);
    let origins = || format!("`plumb watch --origins --pid {pid}` shows which lines of code make new ones");
    match (leak.rule, leak.resource) {
        (Rule::Trend, _) => vec!["wait: a suspect is not a leak yet".to_owned()],
        (Rule::Utilisation, resource) => {
            let (list, limit) = match resource {
                Resource::Fd => ("fds", "LimitNOFILE= of its service, or `ulimit -n`"),
                Resource::Thread => ("threads", "TasksMax= of its service, or `ulimit -u`"),
            };
            let mut advice = vec![format!("`plumb {list} --pid {pid}` lists what it has")];
            if leak.origins.is_empty() {
                advice.push(origins());
            }
            advice.push(format!(
                "if it needs that many, raise its limit for good ({limit}), or the part of it that is warned of \
                 (utilisation in [detect.groups.\"{group}\"]); if it rises like a leak, that is a finding of its own"
            ));
            advice
        }
        (Rule::ThreadsOverBaseline, _) => vec![
            format!("`plumb threads --pid {pid}` lists them by name and start"),
            origins(),
            format!("if it needs that many, raise threads_over_baseline in [detect.groups.\"{group}\"]"),
        ],
        (Rule::ThreadAge, _) => vec![
            format!(
                "`plumb threads --pid {pid}` lists them by name and start: the oldest wait for something"
            ),
            format!("if they may live that long, raise thread_age in [detect.groups.\"{group}\"]"),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detect::Example;

    fn leak(whats: &[(&str, u32)]) -> Leak {
        let example = |(what, count): &(&str, u32)| Example {
            what: (*what).to_owned(),
            kind: "socket".to_owned(),
            count: *count,
        };
        let text = r#"{"id":"fd-7-1","state":"leaking","rule":"trend","resource":"fd","pid":7,"comm":"a","group":"a",
            "live":900,"baseline":5,"limit":1024,"growth_per_minute":60.0,"seconds_to_exhaustion":124.0,
            "first_seen":"","leaking_since":null,"resolved":null,"ignored":null,"acknowledged":null,
            "silenced_until":null,"exe":null,"examples":[],"before_watching":0,"since_watching":0,"naming":0,"places":0,"origins":[],"history":null,"threads":null}"#;
        let mut leak: Leak = serde_json::from_str(text).unwrap();
        leak.examples = whats.iter().map(example).collect();
        leak
    }

    #[test]
    fn what_the_other_end_has_closed_is_said_when_it_is_most() {
        let half_closed = |leak: &Leak| advise(leak).iter().any(|line| line.contains("CLOSE_WAIT"));
        let [gone, alive] =
            ["tcp 127.0.0.1:1 -> 127.0.0.1:2 CLOSE_WAIT", "tcp 127.0.0.1:1 -> 127.0.0.1:3 ESTABLISHED"];
        assert!(half_closed(&leak(&[(gone, 5), (alive, 5)])));
        assert!(!half_closed(&leak(&[(gone, 4), (alive, 5)])));
        assert!(!half_closed(&leak(&[])));
    }

    #[test]
    fn a_limit_that_is_near_or_reached_comes_first() {
        assert!(
            advise(&leak(&[]))[0].contains("near: `prlimit --pid 7 --nofile=4096"),
            "{:?}",
            advise(&leak(&[]))
        );
        let mut full = leak(&[]);
        (full.live, full.growth_per_minute, full.seconds_to_exhaustion) = (1017, 0.0, Some(0.0));
        assert!(advise(&full)[0].contains("full: `prlimit --pid 7 --nofile=4096"), "{:?}", advise(&full));
        (full.live, full.seconds_to_exhaustion) = (900, None);
        assert!(advise(&full)[0].contains("near: `prlimit"), "it rests at 88 %: {:?}", advise(&full));
        full.live = 100;
        assert!(!advise(&full)[0].contains("prlimit"), "{:?}", advise(&full));
    }

    #[test]
    fn what_is_full_is_not_told_to_watch_for_new_ones() {
        let mut full = leak(&[]);
        assert!(advise(&full).join("\n").contains("watch --origins"));
        full.seconds_to_exhaustion = Some(0.0);
        let advice = advise(&full).join("\n");
        assert!(advice.contains("raise its limit or restart it") && !advice.contains("watch"), "{advice}");
        let earlier = serde_json::json!({"words": "leak (a.c:3)", "live": 497, "newest": ""});
        full.origin_before_restart = serde_json::from_value(earlier).unwrap();
        let advice = advise(&full).join("\n");
        assert!(advice.contains("from leak (a.c:3)") && !advice.contains("watch"), "{advice}");
    }

    #[test]
    fn only_a_suspect_of_the_trend_is_told_to_wait() {
        let mut suspect = leak(&[]);
        let waits = |leak: &Leak| advise(leak).iter().any(|line| line.starts_with("wait"));
        suspect.state = State::Suspect;
        assert!(waits(&suspect));
        for rule in [Rule::Utilisation, Rule::ThreadsOverBaseline, Rule::ThreadAge] {
            suspect.rule = rule;
            let advice = advise(&suspect);
            assert!(!waits(&suspect) && advice.iter().any(|line| line.contains("--pid 7")), "{advice:?}");
        }
    }

    #[test]
    fn an_interpreter_without_names_of_its_language_is_told_how_to_get_them() {
        let stack = |module: &str, function: &str| {
            let function = serde_json::json!({"function": function, "file": null, "line": null, "inlined": false,
                "module": module, "build_id": null, "offset": "1", "uncertain": false});
            let origin = serde_json::json!({"live": 5, "syscall": "openat", "function": function, "caller": null,
                "oldest": "", "newest": "", "examples": [], "stack": [function], "complete": true});
            let mut leak = leak(&[]);
            leak.origins.push(serde_json::from_value(origin).unwrap());
            advise(&leak).join("\n")
        };
        assert!(stack("/usr/bin/python3.11", "os_open").contains("-X perf"));
        assert!(stack("/usr/lib/libpython3.12.so.1.0", "os_open").contains("PYTHONPERFSUPPORT=1"));
        assert!(!stack("/usr/bin/python3.12", "py::leak").contains("-X perf"));
        assert!(stack("/usr/bin/node", "node::fs::Open").contains("--perf-basic-prof"));
        assert!(!stack("/usr/bin/node", "JS:*leak /srv/a.js").contains("--perf-basic-prof"));
        assert!(!stack("/usr/bin/nginx", "ngx_open").contains("functions of"));
    }
}

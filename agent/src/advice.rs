//! What to do about a leak: from what it holds and where it came from to a sentence or two.

use crate::{
    detect::{Resource, State, Why},
    document::Leak,
};

/// An hour is time enough for a remedy; below it the limit is raised first.
const SOON: f64 = 3_600.0;

/// The next steps, the most urgent first.
#[must_use]
pub(crate) fn advise(leak: &Leak) -> Vec<String> {
    let mut advice = Vec::new();
    match leak.resolved.as_ref().map(|end| end.why) {
        Some(Why::ProcessEnded | Why::Exec) => {
            advice.push("the process is gone; the next one of this program will leak again".to_owned());
        }
        Some(_) => return vec!["nothing: it is no leak any more".to_owned()],
        None => {}
    }
    if let (Resource::Fd, Some(seconds), None) = (leak.resource, leak.seconds_to_exhaustion, &leak.resolved)
        && seconds < SOON
    {
        let more = leak.limit.unwrap_or(0).saturating_mul(4);
        advice.push(format!(
            "the limit is near: `prlimit --pid {} --nofile={more}` gains time without a restart, if the hard limit allows it",
            leak.pid
        ));
    }
    let all: u32 = leak.examples.iter().map(|example| example.count).sum();
    let with = |is: &dyn Fn(&str) -> bool| -> u32 {
        leak.examples.iter().filter(|example| is(&example.what)).map(|example| example.count).sum()
    };
    let is_most = |part: u32| part > 0 && part * 2 >= all;
    if is_most(with(&|what| what.ends_with(" CLOSE_WAIT"))) {
        advice.push(
            "the other end has closed these connections (CLOSE_WAIT): close them when read() returns 0"
                .to_owned(),
        );
    }
    if is_most(with(&|what| what.ends_with(" (deleted)"))) {
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
                    "threads that {} starts do not end: see below what they wait for",
                    function.words()
                ));
            }
        }
        (None, _) => advice.push(format!(
            "where they come from is known of what is made from now on; `plumb watch --origins --pid {}` shows it live",
            leak.pid
        )),
    }
    if leak.state == State::Suspect {
        advice.push("wait: a suspect is not a leak yet".to_owned());
    }
    advice
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
    fn a_limit_that_is_near_comes_first() {
        assert!(advise(&leak(&[]))[0].contains("--nofile=4096"), "{:?}", advise(&leak(&[])));
    }
}

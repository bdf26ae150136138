//! A second try, alone, for tests that failed on an emulated machine beside others.
//!
//! Such a machine is ten and more times slower than a host, has two processors of one, and runs beside another: whoever
//! is not served for seconds there fails a test that is right. Alone it has no such reason. That there was one is
//! printed where everything ends, so that who fails again and again is seen.

use super::{Guest, init::Outcome, qemu::End};

/// What the test harness prints before and after the names of those that failed.
const FAILURES: &str = "failures:";
const RESULT: &str = "test result: FAILED.";

/// The same machine with nothing but the tests that failed, and their names. None when anything else failed, or a test
/// whose name has one of `once` in it: another run of it would play something else.
pub(super) fn try_of(guest: &Guest, end: &End, once: &[&str]) -> Option<(Guest, Vec<String>)> {
    if end.cut_short.is_some() || end.reports.len() != guest.commands.len() {
        return None;
    }
    let (mut commands, mut all) = (Vec::new(), Vec::new());
    for (report, _) in &end.reports {
        match report.outcome {
            Outcome::Exit(0) => {}
            Outcome::Exit(_) => {
                let failed = failed(end.lines_of(report.command))?;
                commands.push(alone(&guest.commands[report.command], &failed)?);
                all.extend(failed);
            }
            _ => return None,
        }
    }
    let is_fit = !all.is_empty() && !all.iter().any(|name| once.iter().any(|one| name.contains(one)));
    is_fit.then(|| (Guest { commands, ..guest.clone() }, all))
}

/// The names of the tests that failed, of what a command printed; None when it is not a test harness that came to its
/// end.
fn failed(lines: &[String]) -> Option<Vec<String>> {
    let end = lines.iter().rposition(|line| line.starts_with(RESULT))?;
    let begin = lines[..end].iter().rposition(|line| line == FAILURES)?;
    let names = lines[begin + 1..end].iter().map(|line| line.trim()).filter(|line| !line.is_empty());
    Some(names.map(str::to_owned).collect())
}

fn alone(command: &[String], names: &[String]) -> Option<Vec<String>> {
    let words = ["--ignored", "--test-threads", "1", "--exact"];
    let skipped = usize::from(!command.iter().any(|word| word == words[0]));
    let words = words[skipped..].iter().map(|word| (*word).to_owned());
    Some(command.first().cloned().into_iter().chain(words).chain(names.iter().cloned()).collect())
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Guest, init::Report},
        End, Outcome, try_of,
    };

    const PRINTED: &str = "failures:

---- a::b stdout ----
failures:

failures:
    a::b
    c

test result: FAILED. 1 passed; 2 failed; 0 ignored";

    fn words(words: &str) -> Vec<String> {
        words.split(' ').map(str::to_owned).collect()
    }

    /// The first command passes, the second prints and ends as given.
    fn tried(printed: &str, outcome: Outcome, once: &[&str]) -> Option<(Vec<Vec<String>>, Vec<String>)> {
        let commands = vec![words("/bin/other x"), words("/bin/tests --ignored --skip d")];
        let lines: Vec<String> = PRINTED.lines().chain(printed.lines()).map(str::to_owned).collect();
        let (before, all) = (PRINTED.lines().count(), lines.len());
        let reports = [(0, Outcome::Exit(0), before), (1, outcome, all)];
        let reports = reports.map(|(command, outcome, lines)| (Report { command, outcome }, lines)).into();
        let end = End { reports, lines, ..End::default() };
        let (guest, names) = try_of(&Guest { commands, ..Guest::default() }, &end, once)?;
        Some((guest.commands, names))
    }

    #[test]
    fn only_what_failed_is_tried_once_more() {
        let (commands, names) = tried(PRINTED, Outcome::Exit(101), &["model::"]).unwrap();
        assert_eq!(names, ["a::b", "c"]);
        assert_eq!(commands, [words("/bin/tests --ignored --test-threads 1 --exact a::b c")]);
    }

    #[test]
    fn a_failure_that_another_run_may_not_show_again_is_final() {
        assert!(tried(PRINTED, Outcome::Exit(101), &["a::"]).is_none());
        assert!(tried(PRINTED, Outcome::Signal(9), &[]).is_none());
        assert!(tried("a panic", Outcome::Exit(101), &[]).is_none());
        assert!(tried("", Outcome::Exit(0), &[]).is_none(), "nothing failed");
    }
}

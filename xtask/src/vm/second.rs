//! A second try, alone, for tests that failed on an emulated machine beside others.
//!
//! Such a machine is ten and more times slower than a host, has two processors of one, and runs beside another: whoever
//! is not served for seconds there fails a test that is right. Alone it has no such reason. That there was one is
//! printed where everything ends, so that who fails again and again is seen.

use super::{Guest, init::Outcome, qemu::End};

/// What the test harness prints before and after the names of those that failed.
const FAILURES: &str = "failures:";
const RESULT: &str = "test result: FAILED.";
const THREADS: &str = "--test-threads";

/// The same machine with nothing but the tests that failed, and their names. None when anything else failed, or a test
/// that was alone already.
pub(super) fn try_of(guest: &Guest, end: &End) -> Option<(Guest, Vec<String>)> {
    if end.cut_short.is_some() || end.reports.len() != guest.commands.len() {
        return None;
    }
    let (mut commands, mut all) = (Vec::new(), Vec::new());
    for (report, _) in &end.reports {
        match report.outcome {
            Outcome::Exit(0) => {}
            Outcome::Exit(_) if is_crowd(&guest.commands[report.command]) => {
                let failed = failed(end.lines_of(report.command))?;
                commands.push(alone(&guest.commands[report.command], &failed)?);
                all.extend(failed);
            }
            _ => return None,
        }
    }
    (!all.is_empty()).then(|| (Guest { commands, ..guest.clone() }, all))
}

/// Whether the tests of a command run side by side.
fn is_crowd(command: &[String]) -> bool {
    let threads = command.iter().skip_while(|word| *word != THREADS).nth(1);
    threads.and_then(|threads| threads.parse::<u32>().ok()).is_some_and(|threads| threads > 1)
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
    let words = ["--ignored", THREADS, "1", "--exact"];
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

    const CROWD: &str = " --test-threads 4";

    fn words(words: &str) -> Vec<String> {
        words.split(' ').map(str::to_owned).collect()
    }

    /// The first command passes, the second prints and ends as given.
    fn tried(threads: &str, printed: &str, outcome: Outcome) -> Option<(Vec<Vec<String>>, Vec<String>)> {
        let commands = vec![words("/bin/other x"), words(&format!("/bin/tests --ignored{threads} --skip d"))];
        let lines: Vec<String> = PRINTED.lines().chain(printed.lines()).map(str::to_owned).collect();
        let (before, all) = (PRINTED.lines().count(), lines.len());
        let reports = [(0, Outcome::Exit(0), before), (1, outcome, all)];
        let reports = reports.map(|(command, outcome, lines)| (Report { command, outcome }, lines)).into();
        let end = End { reports, lines, ..End::default() };
        let (guest, names) = try_of(&Guest { commands, ..Guest::default() }, &end)?;
        Some((guest.commands, names))
    }

    #[test]
    fn only_what_failed_is_tried_once_more() {
        let (commands, names) = tried(CROWD, PRINTED, Outcome::Exit(101)).unwrap();
        assert_eq!(names, ["a::b", "c"]);
        assert_eq!(commands, [words("/bin/tests --ignored --test-threads 1 --exact a::b c")]);
    }

    #[test]
    fn who_was_alone_or_did_not_just_fail_gets_no_second_try() {
        for threads in ["", " --test-threads 1"] {
            assert!(tried(threads, PRINTED, Outcome::Exit(101)).is_none(), "{threads}");
        }
        assert!(tried(CROWD, PRINTED, Outcome::Signal(9)).is_none());
        assert!(tried(CROWD, "a panic", Outcome::Exit(101)).is_none());
        assert!(tried(CROWD, "", Outcome::Exit(0)).is_none(), "nothing failed");
    }
}

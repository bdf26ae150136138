//! How far a drain is, on a terminal: a few lines that are written over.

use std::io::{self, IsTerminal, Write};

use rustix::termios;

use super::super::output;
use crate::drain::{Document, ServiceDocument};

/// Columns and rows of a terminal that does not say them.
const SIZE: (usize, usize) = (80, 24);

/// The lengths of the lines that are there.
#[derive(Default)]
pub(super) struct Shown(Vec<usize>);

impl Shown {
    pub(super) fn show(&mut self, drain: &Document) {
        let mut stderr = io::stderr().lock();
        if !stderr.is_terminal() {
            return;
        }
        let size = size();
        let lines = lines(drain, size);
        let up = self.up(size.0);
        self.0 = lines.iter().map(|line| line.chars().count()).collect();
        let text: String = lines.iter().map(|line| format!("\x1b[2K{line}\n")).collect();
        // Nobody is left to be told.
        let _ = write!(stderr, "{up}{text}\x1b[J");
    }

    pub(super) fn clear(&mut self) {
        if !self.0.is_empty() {
            let up = self.up(size().0);
            let _ = write!(io::stderr().lock(), "{up}\x1b[2K\x1b[B\x1b[J\x1b[A");
            self.0.clear();
        }
    }

    /// Up to the first of the lines; in a terminal that was made narrower one takes more rows. Nothing is cleared from there
    /// on: when it is the first row, terminals put what they clear into their scrollback.
    fn up(&self, columns: usize) -> String {
        let rows: usize = self.0.iter().map(|length| length.div_ceil(columns).max(1)).sum();
        if rows > 0 { format!("\x1b[{rows}A\r") } else { String::new() }
    }
}

fn size() -> (usize, usize) {
    let size = termios::tcgetwinsize(io::stderr()).ok().filter(|size| size.ws_col > 0 && size.ws_row > 0);
    size.map_or(SIZE, |size| (usize::from(size.ws_col), usize::from(size.ws_row)))
}

/// A row less than there is: below them is the cursor. What is under way comes first, then what waits.
fn lines(drain: &Document, (columns, rows): (usize, usize)) -> Vec<String> {
    let stages = drain.stages.len();
    let digits = stages.to_string().len();
    let mut services: Vec<&ServiceDocument> = drain.services.iter().collect();
    services.sort_by_key(|one| (rank(one), one.stage));
    let room = rows.saturating_sub(2);
    let shown = if services.len() <= room { services.len() } else { room.saturating_sub(1) };
    let rest = services.split_off(shown);
    let (now, all) = (output::seconds(drain.seconds.floor()), output::seconds(drain.deadline_seconds));
    let mut lines = vec![format!("plumb: drain {}, {} of {all}", drain.id, now.replace(".0 ", " "))];
    lines.extend(
        services
            .iter()
            .map(|one| format!("  {:>digits$}/{stages}  {:<20}  {}", one.stage, one.name, one.progress())),
    );
    if !rest.is_empty() {
        let of = |which: Rank| rest.iter().filter(|one| rank(one) == which).count();
        let counts = [(of(Rank::Stops), "stop"), (of(Rank::Waits), "wait"), (of(Rank::Done), "done")];
        let counts = counts.iter().filter(|(many, _)| *many > 0);
        let words = counts.map(|(many, what)| match (many, *what) {
            (1, "done") => "1 is done".to_owned(),
            (many, "done") => format!("{many} are done"),
            (1, what) => format!("1 more {what}s"),
            (many, what) => format!("{many} more {what}"),
        });
        lines.push(format!("  and {}", words.collect::<Vec<_>>().join(", ")));
    }
    lines.truncate(rows.saturating_sub(1).max(1));
    lines.iter().map(|line| line.chars().take(columns).collect()).collect()
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Stops,
    Waits,
    Done,
}

fn rank(service: &ServiceDocument) -> Rank {
    match service.phase.as_str() {
        "waiting" => Rank::Waits,
        "gone" | "late" | "settled" => Rank::Done,
        _ => Rank::Stops,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// 25 stages with a service each, of which the tenth is under way.
    fn drain() -> Document {
        let service = |stage: usize| {
            let phase = match stage {
                ..10 => "gone",
                10 => "stopping",
                _ => "waiting",
            };
            json!({
                "name": format!("s{stage}"), "stage": stage, "target": "port 80", "phase": phase, "verdict": null,
                "why": "", "signals": ["TERM"], "unit": null, "pids": [7], "left": 1, "granted_seconds": 10.0,
                "seconds": null, "slack_seconds": null, "exit_code": null, "connections": 0,
                "suspected_in_flight": 0, "notes": [], "timeline": [],
            })
        };
        let document = json!({
            "schema": "plumb/v1", "id": "d1-1", "state": "running", "trigger": "user 0", "uid": 0,
            "began": "2030-01-31T12:00:00Z", "deadline_seconds": 20.0, "seconds": 3.7, "slack_seconds": null,
            "cancelled": false, "resumed": 0, "journal": "kept", "stages": vec![["s"]; 25],
            "services": (1..=25).map(service).collect::<Vec<_>>(),
        });
        serde_json::from_value(document).unwrap()
    }

    #[test]
    fn no_more_lines_than_the_terminal_has_and_none_longer() {
        let lines = lines(&drain(), (80, 10));
        assert_eq!(lines.len(), 9);
        assert_eq!(lines[0], "plumb: drain d1-1, 3 s of 20.0 s");
        assert!(lines[1].starts_with("  10/25  s10   ") && lines[1].contains("got TERM"), "{}", lines[1]);
        assert!(lines[2].starts_with("  11/25  s11   ") && lines[2].ends_with("  waits"), "{}", lines[2]);
        assert_eq!(lines[8], "  and 9 more wait, 9 are done");
        assert!(super::lines(&drain(), (30, 10)).iter().all(|line| line.chars().count() <= 30));
        let all = super::lines(&drain(), (80, 27));
        assert!(all.len() == 26 && all[17].starts_with("   1/25  s1   "), "{all:#?}");
        assert_eq!([1, 2, 3].map(|rows| super::lines(&drain(), (80, rows)).len()), [1, 1, 2]);
    }

    #[test]
    fn a_line_takes_more_rows_in_a_narrower_terminal() {
        assert_eq!(Shown(vec![80, 0, 30]).up(80), "\x1b[3A\r");
        assert_eq!(Shown(vec![80, 0, 30]).up(40), "\x1b[4A\r");
        assert_eq!(Shown::default().up(80), "");
    }
}

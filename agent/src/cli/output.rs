//! Where data and messages go, and in what form.

use std::io::{self, IsTerminal, Write};

use clap::{Args, ValueEnum};
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    termios::tcgetwinsize,
};
use serde::Serialize;

use crate::{
    document::SCHEMA,
    failure::{Exit, Failure},
    text::{shortened, shortened_at_word},
};

/// Form of the data on stdout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// Aligned columns, for people
    #[default]
    Table,
    /// One document; a stream of events, as of `plumb watch`, is one object per line here too
    Json,
    /// One object per line
    Jsonl,
}

#[derive(Args, Debug)]
pub(super) struct Output {
    /// Form of the output
    #[arg(short = 'o', long = "output", value_enum, default_value_t, value_name = "FORMAT")]
    pub(super) format: Format,
}

/// One line of `jsonl`: a document of its own.
#[derive(Serialize)]
struct Line<'a, I> {
    schema: &'static str,
    #[serde(flatten)]
    item: &'a I,
}

/// A column's heading and whether it holds numbers.
pub(super) type Column = (&'static str, bool);

impl Output {
    /// Prints a document in the form that was asked for; `items` are its lines in `jsonl`, `rows` in a table.
    pub(super) fn print<D: Serialize, I: Serialize>(
        &self,
        document: &D,
        items: &[I],
        columns: &[Column],
        row: impl Fn(&I) -> Vec<String>,
    ) -> Result<(), Failure> {
        self.print_with_notes(document, items, columns, &[], row)
    }

    /// As `print`, with long texts at the end of each row: on a terminal they are lines of their own below it, after
    /// these headings.
    pub(super) fn print_with_notes<D: Serialize, I: Serialize>(
        &self,
        document: &D,
        items: &[I],
        columns: &[Column],
        notes: &[&'static str],
        row: impl Fn(&I) -> Vec<String>,
    ) -> Result<(), Failure> {
        let text = match self.format {
            Format::Json => json(document)? + "\n",
            Format::Jsonl => {
                let line = |item| {
                    Ok(json(&Line { schema: SCHEMA, item })?
                        + "
")
                };
                items.iter().map(line).collect::<Result<_, Failure>>()?
            }
            Format::Table => {
                let rows = items.iter().map(row).collect();
                match width() {
                    Some(width) => on_terminal(columns, notes, rows, width),
                    None => in_pipe(columns, notes, rows),
                }
            }
        };
        data(&text).map(|_| ())
    }
}

/// A value as one line of JSON.
pub(super) fn json<T: Serialize>(value: &T) -> Result<String, Failure> {
    serde_json::to_string(value).map_err(|error| {
        Failure::new(Exit::Error, format!("cannot write JSON: {error}"), "this is a bug of plumb")
    })
}

/// Writes data to stdout. A reader that has gone away, as in `plumb ps | head`, is no error; false tells
/// who goes on writing to stop.
pub(super) fn data(text: &str) -> Result<bool, Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => {
            Err(Failure::new(Exit::Error, format!("cannot write to stdout: {error}"), "check where it leads"))
        }
    }
}

/// Whether the reader of stdout, if it is a pipe, has gone away.
pub(super) fn is_hung_up() -> bool {
    let stdout = io::stdout();
    let mut ready = [PollFd::new(&stdout, PollFlags::empty())];
    poll(&mut ready, Some(&Timespec::default())).is_ok() && ready[0].revents().contains(PollFlags::ERR)
}

/// Writes a line to stderr.
pub(super) fn message(line: &str) {
    // Nobody is left to be told.
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// Columns of the terminal that stdout is; `None` where it is none.
fn width() -> Option<usize> {
    let stdout = io::stdout();
    let size = || tcgetwinsize(&stdout).ok().map(|size| usize::from(size.ws_col)).filter(|width| *width > 0);
    stdout.is_terminal().then(|| size().unwrap_or(usize::MAX))
}

/// Letters for a note below a row.
pub(super) fn room_for_note() -> usize {
    width().map_or(usize::MAX, |width| width.saturating_sub(NOTE))
}

/// Before a note come so many letters.
const NOTE: usize = 12;
/// What is left of the last column at least.
const LAST: usize = 8;

/// Every row is one line.
fn in_pipe(columns: &[Column], notes: &[&'static str], rows: Vec<Vec<String>>) -> String {
    let columns = [columns, &notes.iter().map(|heading| (*heading, false)).collect::<Vec<_>>()].concat();
    text(table(&columns, rows, ContentArrangement::Disabled))
}

/// Wrapped to the width of the terminal; or with notes below, and then cut to it.
fn on_terminal(
    columns: &[Column],
    notes: &[&'static str],
    mut rows: Vec<Vec<String>>,
    width: usize,
) -> String {
    if notes.is_empty() {
        return text(table(columns, rows, ContentArrangement::Dynamic));
    }
    let below: Vec<Vec<String>> = rows.iter_mut().map(|row| row.split_off(columns.len())).collect();
    cut_last(columns, &mut rows, width);
    let mut lines = table(columns, rows, ContentArrangement::Disabled).into_iter();
    let mut all: Vec<String> = lines.next().into_iter().collect();
    for (line, below) in lines.zip(below) {
        all.push(line);
        let note = |(heading, note): (&&str, String)| {
            let note = shortened_at_word(&note, width.saturating_sub(NOTE));
            format!("    {:<8}{note}", heading.to_lowercase())
        };
        all.extend(notes.iter().zip(below).filter(|(_, note)| note != "-").map(note));
    }
    text(all)
}

/// Gives the last column what the others leave of the width.
fn cut_last(columns: &[Column], rows: &mut [Vec<String>], width: usize) {
    let Some(last) = columns.len().checked_sub(1) else { return };
    let longest = |at: usize| {
        let cells = rows.iter().map(|row| row[at].chars().count());
        cells.chain([columns[at].0.len()]).max().unwrap_or(0) + 2
    };
    let left = width.saturating_sub((0..last).map(longest).sum()).max(LAST);
    rows.iter_mut().for_each(|row| row[last] = shortened(&row[last], left));
}

fn text(lines: Vec<String>) -> String {
    lines.into_iter().flat_map(|line| [line, "\n".to_owned()]).collect()
}

fn table(columns: &[Column], rows: Vec<Vec<String>>, arrangement: ContentArrangement) -> Vec<String> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_content_arrangement(arrangement);
    table.set_header(columns.iter().map(|(heading, _)| *heading));
    for row in rows {
        table.add_row(row);
    }
    for (column, (_, is_number)) in table.column_iter_mut().zip(columns) {
        column.set_padding((0, 2));
        if *is_number {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.lines().map(|line| line.trim_end().to_owned()).collect()
}

/// `1 stage`, `2 stages`.
pub(super) fn count(many: usize, one: &str, more: &str) -> String {
    format!("{many} {}", if many == 1 { one } else { more })
}

/// `9.5 s`, or `20 ms` of what would be none.
pub(super) fn seconds(seconds: f64) -> String {
    if seconds != 0.0 && seconds.abs() < 0.1 {
        format!("{:.0} ms", seconds * 1e3)
    } else {
        format!("{seconds:.1} s")
    }
}

/// Bytes with a binary unit, three figures: `12.3M`.
pub(super) fn bytes(value: u64) -> String {
    const UNITS: [&str; 6] = ["B", "K", "M", "G", "T", "P"];
    let mut scaled = value as f64;
    let mut unit = 0;
    while scaled >= 1024.0 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    if unit == 0 || scaled >= 100.0 {
        format!("{scaled:.0}{}", UNITS[unit])
    } else {
        format!("{scaled:.1}{}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_columns_in_a_pipe_and_lines_on_a_terminal() {
        let rows = || vec![["fd-1", "7", "pipe", "-"].map(str::to_owned).to_vec()];
        let (columns, notes) = ([("ID", false), ("LIVE", true)], ["MOSTLY", "FROM"]);
        assert_eq!(in_pipe(&columns, &notes, rows()), "ID    LIVE  MOSTLY  FROM\nfd-1     7  pipe    -\n");
        assert_eq!(on_terminal(&columns, &notes, rows(), 80), "ID    LIVE\nfd-1     7\n    mostly  pipe\n");
    }

    #[test]
    fn a_table_with_notes_fits_the_terminal() {
        let row = ["fd-1048576-ffffff-use", "silenced 2h", "payments-worker@17.service"];
        let notes =
            ["/etc/hostname (2x)", "do_redirections (redir.c:1180), called by execute (execute_cmd.c:42)"];
        let row = row.iter().chain(&notes).map(|cell| (*cell).to_owned()).collect();
        let columns = [("ID", false), ("STATE", false), ("GROUP", false)];
        let shown = on_terminal(&columns, &["MOSTLY", "FROM"], vec![row], 56);
        let expected = "\
ID                     STATE        GROUP
fd-1048576-ffffff-use  silenced 2h  payments-worker@17.…
    mostly  /etc/hostname (2x)
    from    do_redirections (redir.c:1180), called by…
";
        assert_eq!(shown, expected);
    }

    #[test]
    fn short_times_are_not_none() {
        assert_eq!(
            [0.0, 0.02, -0.003, 0.1, 9.96].map(seconds),
            ["0.0 s", "20 ms", "-3 ms", "0.1 s", "10.0 s"]
        );
        assert_eq!([1, 2].map(|many| count(many, "child", "children")), ["1 child", "2 children"]);
    }

    #[test]
    fn sizes_have_three_figures() {
        assert_eq!([0, 1023, 1536, 123_456_789].map(bytes), ["0B", "1023B", "1.5K", "118M"]);
    }
}

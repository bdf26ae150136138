//! What was seen against what the label says: of the program, which must do what it is labelled with, and of
//! plumb.

use std::{os::unix::process::ExitStatusExt, process::ExitStatus};

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

use crate::{
    manifest::{Case, Label, Leak, Resource},
    origins,
    run::{Record, Verdict},
};

/// How far the measured rate of a leak may be from its label.
const TOLERANCE: f64 = 0.2;
/// Readings among which the lowest is what a program holds at all times, a swing longer.
const FLOOR: usize = 13;

/// One line for each case that missed.
pub(crate) fn faults(cases: &[Case], records: &[Record]) -> Vec<String> {
    let line = |(case, record)| {
        let faults = [misbehaviour(case, record), misjudgement(case, record)].concat();
        (!faults.is_empty()).then(|| format!("{}: {}", Case::name(case), faults.join("; ")))
    };
    cases.iter().zip(records).filter_map(line).collect()
}

/// Whatever the program itself did not do as its label says, by /proc.
fn misbehaviour(case: &Case, record: &Record) -> Vec<String> {
    let mut faults = Vec::new();
    if !record.has_ended_in_time(case.seconds) {
        let how = match record.ended {
            Some((at, status)) => format!("ended after {at:.0} s with {status}"),
            None => "did not end by itself".to_owned(),
        };
        faults.push(format!("the program {how}: {}", record.said));
    }
    match &case.label {
        Label::Leak(leak) => {
            let rate = rate(record, leak);
            if (rate - leak.per_second).abs() > leak.per_second * TOLERANCE {
                faults.push(format!("the program leaks {rate:.2} a second, not {}", leak.per_second));
            }
        }
        Label::Sound(least, most) => {
            let peak = record.counts.iter().map(|(_, count)| *count).max().unwrap_or(0);
            if !(*least..=*most).contains(&peak) {
                faults.push(format!("the program's highest count is {peak}, not {least} to {most}"));
            }
        }
    }
    faults
}

/// Items a second by which the floor rose from the first leaked item on; 0 when that cannot be said.
fn rate(record: &Record, leak: &Leak) -> f64 {
    let since: Vec<_> = record.counts.iter().filter(|(at, _)| *at >= leak.after).collect();
    let lowest = |readings: &[&(f64, u32)]| {
        readings.iter().map(|(at, count)| (*count, *at)).min_by_key(|(count, _)| *count)
    };
    let first = since.get(..FLOOR).and_then(lowest);
    let last = since.len().checked_sub(FLOOR).and_then(|at| lowest(&since[at..]));
    match (first, last) {
        (Some((low, from)), Some((high, to))) if to > from => {
            f64::from(high.saturating_sub(low)) / (to - from)
        }
        _ => 0.0,
    }
}

/// Whatever plumb said too late, or wrongly.
fn misjudgement(case: &Case, record: &Record) -> Vec<String> {
    let mut faults = Vec::new();
    match &case.label {
        Label::Leak(leak) => {
            let verdicts =
                [(Verdict::Suspect, "suspect", leak.suspect), (Verdict::Leaking, "leaking", leak.leaking)];
            for (verdict, word, deadline) in verdicts {
                match first(record, verdict, leak.after) {
                    Some(time) if time <= deadline => {}
                    Some(time) => faults.push(format!("{word} after {time:.0} s, deadline {deadline} s")),
                    None => faults.push(format!("never {word}, deadline {deadline} s")),
                }
            }
            if record.verdicts.iter().any(|(at, verdict)| *at < leak.after && *verdict == Verdict::Leaking) {
                faults.push("leaking before its first leak".to_owned());
            }
            if first(record, Verdict::Leaking, leak.after).is_some() {
                faults.extend(origins::faults(case, leak, &record.origins));
            }
        }
        Label::Sound(..) => {
            faults.extend(
                first(record, Verdict::Leaking, 0.0).map(|time| format!("leaking after {time:.0} s")),
            );
        }
    }
    let other = if case.resource == Resource::Fd { "threads" } else { "fds" };
    faults.extend(record.other.map(|time| format!("its {other} are leaking after {time:.0} s")));
    faults
}

/// Seconds from `after` until plumb said as much or more.
fn first(record: &Record, verdict: Verdict, after: f64) -> Option<f64> {
    let found = record.verdicts.iter().find(|(at, said)| *at >= after && *said >= verdict);
    found.map(|(at, _)| at - after)
}

/// Columns of the table, and whether they hold numbers.
const COLUMNS: [(&str, bool); 12] = [
    ("CASE", false),
    ("LANGUAGE", false),
    ("LABEL", false),
    ("RESOURCE", false),
    ("COUNT", false),
    ("VERDICT", false),
    ("SUSPECT", true),
    ("LEAKING", true),
    ("DEADLINES", false),
    ("ORIGIN", false),
    ("RIGHT", true),
    ("", false),
];

/// Every case with what plumb said, and after how many seconds from the first leaked item.
pub(crate) fn table(cases: &[Case], records: &[Record]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(COLUMNS.map(|(heading, _)| heading));
    for (case, record) in cases.iter().zip(records) {
        table.add_row(row(case, record));
    }
    for (column, (_, is_number)) in table.column_iter_mut().zip(COLUMNS) {
        column.set_padding((0, 2));
        if is_number {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn row(case: &Case, record: &Record) -> [String; COLUMNS.len()] {
    let (label, after, deadlines) = match &case.label {
        Label::Leak(leak) => {
            (format!("leak {}/s", leak.per_second), leak.after, format!("{} {}", leak.suspect, leak.leaking))
        }
        Label::Sound(..) => ("sound".to_owned(), 0.0, "never leaking".to_owned()),
    };
    let seconds = |verdict| first(record, verdict, after).map_or("-".to_owned(), |time| format!("{time:.0}"));
    let count = |reading: Option<&(f64, u32)>| reading.map_or(0, |(_, count)| *count);
    let (origin, right) = match &case.label {
        Label::Leak(leak) => {
            let (all, right) = origins::share(case, leak, &record.origins);
            (origins::headline(&record.origins), format!("{right}/{all}"))
        }
        Label::Sound(..) => Default::default(),
    };
    let missed =
        [misbehaviour(case, record), misjudgement(case, record)].iter().any(|faults| !faults.is_empty());
    [
        case.name().to_owned(),
        case.language().folder().to_owned(),
        label,
        if case.resource == Resource::Fd { "fd" } else { "thread" }.to_owned(),
        format!("{} to {}", count(record.counts.first()), count(record.counts.last())),
        verdict(record).to_owned(),
        seconds(Verdict::Suspect),
        seconds(Verdict::Leaking),
        deadlines,
        origin,
        right,
        if missed { "MISSED" } else { "" }.to_owned(),
    ]
}

/// The gravest, and whether it was taken back.
fn verdict(record: &Record) -> &'static str {
    let said = || record.verdicts.iter().map(|(_, verdict)| *verdict);
    match (said().max(), said().next_back()) {
        (Some(Verdict::Leaking), Some(Verdict::Leaking)) => "leaking",
        (Some(Verdict::Leaking), _) => "leaking, taken back",
        (Some(Verdict::Suspect), Some(Verdict::Suspect)) => "suspect",
        (Some(Verdict::Suspect), _) => "suspect, taken back",
        _ => "quiet",
    }
}

/// A program whose count at each second of its run is given, and which plumb first calls suspect, then leaking.
fn faults_of(name: &str, count: impl Fn(f64) -> f64, suspect: f64, leaking: f64) -> Vec<String> {
    let cases = crate::manifest::read().into_iter().filter(|case| case.name() == name).collect::<Vec<_>>();
    let seconds = cases[0].seconds;
    let times = || (1..seconds as u32).map(f64::from);
    let verdict = |at| match at {
        at if at >= leaking => Verdict::Leaking,
        at if at >= suspect => Verdict::Suspect,
        _ => Verdict::Quiet,
    };
    let record = Record {
        counts: times().map(|at| (at, count(at) as u32)).collect(),
        verdicts: times().map(|at| (at, verdict(at))).collect(),
        origins: origins::tests::right(&cases[0], 40),
        ended: Some((seconds, ExitStatus::from_raw(rustix::process::Signal::ALARM.as_raw()))),
        ..Record::default()
    };
    faults(&cases, &[record])
}

#[test]
fn a_case_misses_when_plumb_or_the_program_does() {
    const NEVER: f64 = f64::INFINITY;
    let none: [&str; 0] = [];
    assert_eq!(faults_of("late_leak", |at| 3.0 + (at - 60.0).max(0.0), 80.0, 170.0), none);
    assert_eq!(
        faults_of("late_leak", |at| 3.0 + (at - 60.0).max(0.0), 40.0, 50.0),
        ["late_leak: leaking before its first leak"]
    );
    assert_eq!(
        faults_of("db_retry", |at| 3.0 + at, 31.0, NEVER),
        ["db_retry: suspect after 31 s, deadline 30 s; never leaking, deadline 120 s"]
    );
    assert_eq!(
        faults_of("db_retry", |_| 3.0, 20.0, 60.0),
        ["db_retry: the program leaks 0.00 a second, not 1"]
    );
    assert_eq!(faults_of("pool_warmup", |at| (3.0 + at).min(53.0), 20.0, NEVER), none);
    assert_eq!(
        faults_of("pool_warmup", |at| 3.0 + at, 20.0, 60.0),
        ["pool_warmup: the program's highest count is 362, not 50 to 62; leaking after 60 s"]
    );
}

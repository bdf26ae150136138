//! What the simulation says of the detector, as a table and as bounds.

use super::{Family, Kind, REPORTING, Run, TUNING, leaks::LEAKS, run, seed, sound::SOUND};

/// Of all leaks so many are to be found in time; and so many wrong verdicts per 10,000 hours of a sound process.
const RECALL: f64 = 0.99;
const WRONG: f64 = 1.0;
/// Cases of each family, in full and in the quick form.
const FULL: usize = 350;
const QUICK: usize = 12;

/// What a family or several came to.
#[derive(Default)]
struct Sum {
    cases: usize,
    leaks: usize,
    found: usize,
    /// Hours of sound processes, and of leaking ones before they leaked.
    hours: f64,
    wrong: u32,
    /// Sound processes that were accused.
    accused: usize,
    suspected: f64,
    suspect: Vec<f64>,
    leaking: Vec<f64>,
    /// The cases that were not.
    late: Vec<usize>,
}

impl Sum {
    fn add(&mut self, case: usize, kind: Kind, run: Run) {
        self.cases += 1;
        self.wrong += run.wrong;
        self.accused += usize::from(run.wrong > 0);
        if kind == Kind::Leak {
            self.leaks += 1;
            self.suspect.extend(run.suspect);
            self.leaking.extend(run.leaking);
            if run.leaking.is_some_and(|second| second <= run.deadline) {
                self.found += 1;
            } else {
                self.late.push(case);
            }
        } else {
            self.hours += run.hours;
            self.suspected += run.suspected;
        }
    }

    fn merge(&mut self, other: &Self) {
        self.cases += other.cases;
        self.leaks += other.leaks;
        self.found += other.found;
        self.hours += other.hours;
        self.wrong += other.wrong;
        self.accused += other.accused;
        self.suspected += other.suspected;
    }

    fn recall(&self) -> f64 {
        self.found as f64 / self.leaks.max(1) as f64
    }

    fn wrong_per_10_000_hours(&self) -> f64 {
        f64::from(self.wrong) * 10_000.0 / self.hours.max(1e-9)
    }
}

fn quantile(values: &[f64], part: f64) -> String {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let index = ((values.len() as f64 * part) as usize).min(values.len().saturating_sub(1));
    values.get(index).map_or_else(|| "-".to_owned(), |value| format!("{value:.0}"))
}

fn play(set: u64, family: &Family, cases: usize) -> Sum {
    let mut sum = Sum::default();
    for case in 0..cases {
        sum.add(case, family.kind, run(family, seed(set, family, case)));
    }
    sum
}

/// Prints a table and returns recall and wrong verdicts of all that is in the totals.
fn table(set: u64, cases: usize) -> Sum {
    let mut total = Sum::default();
    println!("\n| leaks | cases | found in time | suspect after, s (median, 95 %) | leaking after, s |");
    println!("|---|---|---|---|---|");
    for family in LEAKS {
        let sum = play(set, family, cases);
        println!(
            "| {} | {} | {:.3} | {}, {} | {}, {} |",
            family.name,
            sum.cases,
            sum.recall(),
            quantile(&sum.suspect, 0.5),
            quantile(&sum.suspect, 0.95),
            quantile(&sum.leaking, 0.5),
            quantile(&sum.leaking, 0.95)
        );
        if !sum.late.is_empty() {
            eprintln!("late: {:?}", &sum.late[..sum.late.len().min(10)]);
        }
        total.merge(&sum);
    }
    println!("\n| sound | cases | accused | hours | wrong per 10,000 hours | suspect, % of the time |");
    println!("|---|---|---|---|---|---|");
    for family in SOUND {
        let sum = play(set, family, cases);
        let note = if family.kind == Kind::Undecidable { " (not in the totals)" } else { "" };
        println!(
            "| {}{note} | {} | {} | {:.0} | {:.1} | {:.1} |",
            family.name,
            sum.cases,
            sum.accused,
            sum.hours,
            sum.wrong_per_10_000_hours(),
            sum.suspected * 100.0 / sum.cases as f64
        );
        if family.kind == Kind::Sound {
            total.merge(&sum);
        }
    }
    println!(
        "\n{} processes: {:.4} of {} leaks found in time; {} wrong verdicts in {:.0} hours, {:.2} per 10,000",
        total.cases,
        total.recall(),
        total.leaks,
        total.wrong,
        total.hours,
        total.wrong_per_10_000_hours()
    );
    total
}

/// What `cargo xtask bench detect` runs.
#[test]
#[ignore = "takes minutes: cargo xtask bench detect"]
fn bench() {
    let total = table(REPORTING, FULL);
    assert!(total.recall() >= RECALL && total.wrong_per_10_000_hours() <= WRONG);
}

/// For whoever changes the detector: other cases than those that are reported.
#[test]
#[ignore = "takes minutes, and is for tuning"]
fn tuning() {
    table(TUNING, 100);
}

/// Leaks are found and sound processes are not accused, in a few hundred cases.
#[test]
fn quick() {
    // What is reported stays unseen by whoever runs the tests after each change.
    let total = table(TUNING, QUICK);
    assert!(total.recall() >= 0.98, "{}", total.recall());
    // A rate has no meaning in so few hours.
    assert!(total.wrong <= 1, "{} wrong verdicts in {} hours", total.wrong, total.hours);
}

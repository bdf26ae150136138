//! What people are told, and when: a leak once, a warning once for as long as it holds.

use super::{
    Detector,
    case::{Case, SECOND},
    finding::{Finding, Mark, Rule},
};

/// What holds again is told again if it did not hold for this long, in nanoseconds: what swings about a threshold is
/// one thing.
const AGAIN: u64 = 3_600 * SECOND;

/// Something that people are to be told now.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct News {
    pub what: What,
    pub finding: Finding,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// It leaks.
    Leak,
    /// A plain rule has found it.
    Warning,
    /// It is at its limit, by a leak or by the rule of high use.
    Full,
    /// It is no leak any more; only what was told as one.
    Resolved,
}

/// What is told of a count beside that it leaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Topic {
    Rule(Rule),
    Full,
}

impl Detector {
    /// What people have not been told yet and are to be told now. A suspect of the trend is nothing to tell.
    pub(crate) fn tell(&mut self, now: u64) -> Vec<News> {
        let mut news = Vec::new();
        let mut add = |what, finding: &Finding| news.push(News { what, finding: finding.clone() });
        self.resolved.untold.drain(..).for_each(|finding| add(What::Resolved, &finding));
        for (&(key, resource), case) in &mut self.cases {
            let mark = self.marks.get_mut(&(key, resource, Rule::Trend));
            let (outgrown, is_quiet) = heed(mark, &case.finding, now, &mut case.silenced);
            case.told &= !outgrown;
            if !is_leak(case) {
                continue;
            }
            let full = (key, resource, Topic::Full);
            if !case.told && !is_quiet {
                case.told = true;
                add(What::Leak, &case.finding);
                let by_use = (key, resource, Rule::Utilisation);
                if self.plain.contains_key(&by_use) {
                    // That is in it.
                    self.warned.insert((key, resource, Topic::Rule(Rule::Utilisation)), now);
                }
                if case.finding.is_full() {
                    self.warned.insert(full, now);
                }
            } else if case.finding.is_full() && is_new(&mut self.warned, full, is_quiet, now) {
                add(What::Full, &case.finding);
            }
        }
        for (&(key, resource, rule), finding) in &self.plain {
            let topic = (key, resource, Topic::Rule(rule));
            let (outgrown, is_quiet) =
                heed(self.marks.get_mut(&(key, resource, rule)), finding, now, &mut false);
            if outgrown {
                self.warned.remove(&topic);
            }
            let by_use = rule == Rule::Utilisation;
            if finding.ignored.is_some() || (by_use && finding.is_sealed()) {
                continue;
            }
            let mut finding = finding.clone();
            let rising =
                self.cases.get(&(key, resource)).filter(|case| by_use && case.finding.ignored.is_none());
            let mut is_quiet = is_quiet;
            if let Some(case) = rising {
                // People see the trend, and speak of it.
                finding.growth_per_minute = case.finding.growth_per_minute;
                let mark = self.marks.get(&(key, resource, Rule::Trend));
                is_quiet |= mark.is_some_and(|mark| mark.is_quiet(finding.live, now));
            }
            let is_full = by_use && finding.is_full() && !rising.is_some_and(is_leak);
            let full = (key, resource, Topic::Full);
            if is_new(&mut self.warned, topic, is_quiet, now) {
                add(What::Warning, &finding);
                if is_full {
                    self.warned.insert(full, now);
                }
            } else if is_full && is_new(&mut self.warned, full, is_quiet, now) {
                add(What::Full, &finding);
            }
        }
        news
    }
}

/// Whether it is a leak that nobody wants ignored.
fn is_leak(case: &Case) -> bool {
    case.is_leaking() && case.finding.ignored.is_none()
}

/// Whether it has outgrown its acknowledgement, and whether people want to hear nothing of it now; `silenced` for
/// whatever it is.
fn heed(mark: Option<&mut Mark>, finding: &Finding, now: u64, silenced: &mut bool) -> (bool, bool) {
    *silenced = false;
    let Some(mark) = mark else { return (false, false) };
    let outgrown = mark.age(finding.live, now);
    *silenced = mark.silenced_until.is_some();
    (outgrown, mark.is_quiet(finding.live, now))
}

/// Whether something that holds is to be told, and remembers that it was. While people want to hear nothing, what
/// they have not heard yet is put off.
fn is_new<K: Eq + std::hash::Hash>(
    warned: &mut foldhash::HashMap<K, u64>,
    at: K,
    is_quiet: bool,
    now: u64,
) -> bool {
    let is_new = warned.get(&at).is_none_or(|last| now.saturating_sub(*last) >= AGAIN);
    if is_new && is_quiet {
        return false;
    }
    warned.insert(at, now);
    is_new
}

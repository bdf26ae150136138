//! How the time of a drain is divided: nobody gets less than he asked for without its being said, and what users have
//! registered takes the time of the administrator's services only up to half of the whole drain's.

use std::time::Duration;

/// What one service of a stage asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wish {
    /// Its own deadline; `None`: its share.
    pub own: Option<Duration>,
    /// It is the administrator's.
    pub is_admin: bool,
}

/// Time of a stage, and of each of its services; with the words for it when that is less than it asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stage {
    pub time: Duration,
    pub services: Vec<(Duration, Option<String>)>,
}

/// A stage without a wish gets this part of an equal share at least, before the others are shortened.
const LEAST: u32 = 3;
/// Who gets so much less is not told.
const NOTHING: Duration = Duration::from_millis(1);

/// What a stage asks for.
#[derive(Clone, Copy, Debug)]
struct Demand {
    /// The longest of its deadlines.
    own: Duration,
    /// A service of it has none.
    is_open: bool,
}

/// A stage with a service of the administrator is his.
#[must_use]
pub(crate) fn is_admins(stage: &[Wish]) -> bool {
    stage.iter().any(|wish| wish.is_admin)
}

/// All stages of a drain that may take so long, if each uses all of its time.
#[must_use]
pub(crate) fn of_all(stages: &[Vec<Wish>], whole: Duration) -> Vec<Stage> {
    let (mut left, mut of_users) = (whole, whole / 2);
    let grant = |at: usize| {
        let stage = of_stage(&stages[at..], left, of_users);
        left = left.saturating_sub(stage.time);
        if !is_admins(&stages[at]) {
            of_users = of_users.saturating_sub(stage.time);
        }
        stage
    };
    (0..stages.len()).map(grant).collect()
}

/// The same where some do not run, which get nothing and are waited for by nobody.
#[must_use]
pub(crate) fn of_present(stages: &[Vec<Option<Wish>>], whole: Duration) -> Vec<Stage> {
    let present = stages.iter().map(|stage| stage.iter().flatten().copied().collect::<Vec<_>>());
    let present: Vec<Vec<Wish>> = present.filter(|stage| !stage.is_empty()).collect();
    let mut granted = of_all(&present, whole).into_iter();
    let grant = |stage: &Vec<Option<Wish>>| {
        let nothing = Stage { time: Duration::ZERO, services: Vec::new() };
        let is_empty = stage.iter().flatten().next().is_none();
        let Stage { time, services } = if is_empty { nothing } else { granted.next().unwrap_or(nothing) };
        let mut services = services.into_iter();
        let of = |wish: &Option<Wish>| wish.and_then(|_| services.next()).unwrap_or_default();
        Stage { time, services: stage.iter().map(of).collect() }
    };
    stages.iter().map(grant).collect()
}

/// The first of the stages that remain, of `left` in all and `of_users` for those of users as long as the
/// administrator's need the rest.
///
/// Stages whose services all have a deadline of their own get the longest of these; the others share equally what these
/// leave. When that is not enough, the longest are shortened first. In a stage of the administrator the deadlines of
/// users count only when all others have what they asked for.
#[must_use]
pub(crate) fn of_stage(stages: &[Vec<Wish>], left: Duration, of_users: Duration) -> Stage {
    let time = divided(stages, left, of_users).first().copied().unwrap_or_default();
    let share = left / count(stages.len());
    let service = |wish: &Wish| of_service(wish.own, time, share);
    Stage { time, services: stages.first().into_iter().flatten().map(service).collect() }
}

fn of_service(own: Option<Duration>, stage: Duration, share: Duration) -> (Duration, Option<String>) {
    let time = own.map_or(stage, |own| own.min(stage));
    let words = match own {
        Some(own) if own > stage + NOTHING => {
            let [from, to] = apart(own, stage);
            Some(format!("shortened from {from} to {to}"))
        }
        None if share > stage + NOTHING => {
            let [from, to] = apart(share, stage);
            Some(format!("shortened to {to} by what others ask for: an equal share would be {from}"))
        }
        _ => None,
    };
    (time, words)
}

/// Two times that differ, so that it is seen.
fn apart(one: Duration, other: Duration) -> [String; 2] {
    let short = [one, other].map(seconds);
    let exact = |time: Duration| format!("{:.3}s", time.as_secs_f64());
    if short[0] == short[1] { [one, other].map(exact) } else { short }
}

/// Time of each of the stages that remain.
fn divided(stages: &[Vec<Wish>], left: Duration, of_users: Duration) -> Vec<Duration> {
    let demands: Vec<Demand> = stages.iter().map(|stage| demand(stage, left)).collect();
    let mut grants = divide(&demands, left);
    let (admins, users): (Vec<usize>, Vec<usize>) = (0..stages.len()).partition(|at| is_admins(&stages[*at]));
    if !admins.is_empty() {
        let needed = |at: &usize| if demands[*at].is_open { left } else { demands[*at].own };
        let spared = left.saturating_sub(admins.iter().map(needed).sum());
        let fair: Duration = users.iter().map(|at| grants[*at]).sum();
        let theirs = fair.min(of_users.max(spared));
        for (places, time) in [(users, theirs), (admins, left - theirs)] {
            let demands: Vec<Demand> = places.iter().map(|at| demands[*at]).collect();
            for (at, grant) in places.into_iter().zip(divide(&demands, time)) {
                grants[at] = grant;
            }
        }
    }
    let rest = left.saturating_sub(grants.iter().sum());
    let longest = |stage: &Vec<Wish>| stage.iter().map(|wish| wish.own.unwrap_or(left)).max();
    let more = |(stage, grant): (&Vec<Wish>, &Duration)| {
        longest(stage).unwrap_or_default().min(left).saturating_sub(*grant)
    };
    let more: Vec<Duration> = stages.iter().zip(&grants).map(more).collect();
    let more = filled(&more, rest);
    grants.iter().zip(more).map(|(grant, more)| *grant + more).collect()
}

/// Nobody asks for more than there is; in a stage of the administrator only his services ask.
fn demand(stage: &[Wish], left: Duration) -> Demand {
    let is_admins = is_admins(stage);
    let wishes = || stage.iter().filter(|wish| wish.is_admin == is_admins).map(|wish| wish.own);
    Demand {
        own: wishes().flatten().max().unwrap_or_default().min(left),
        is_open: wishes().any(|own| own.is_none()),
    }
}

fn divide(demands: &[Demand], left: Duration) -> Vec<Duration> {
    let least = left / count(demands.len()) / LEAST;
    let wanted = |demand: &Demand| if demand.is_open { demand.own.max(least) } else { demand.own };
    let mut grants = filled(&demands.iter().map(wanted).collect::<Vec<_>>(), left);
    // What is left the open ones share, so that they have equally much if they can.
    let mut open: Vec<usize> = (0..demands.len()).filter(|at| demands[*at].is_open).collect();
    open.sort_by_key(|at| std::cmp::Reverse(grants[*at]));
    let closed = demands.iter().zip(&grants).filter(|(demand, _)| !demand.is_open).map(|(_, grant)| *grant);
    let mut rest = left.saturating_sub(closed.sum());
    for (at, others) in open.iter().zip((1..=open.len()).rev()) {
        grants[*at] = grants[*at].max(rest / count(others));
        rest = rest.saturating_sub(grants[*at]);
    }
    grants
}

/// Everybody gets what he wants or, when that is not enough, nobody more than a level that is the same for all.
fn filled(wanted: &[Duration], left: Duration) -> Vec<Duration> {
    let mut sorted = wanted.to_vec();
    sorted.sort_unstable();
    let (mut rest, mut level) = (left, left);
    for (wish, others) in sorted.into_iter().zip((1..=wanted.len()).rev()) {
        level = rest / count(others);
        if wish > level {
            break;
        }
        rest -= wish;
        level = left;
    }
    wanted.iter().map(|wish| (*wish).min(level)).collect()
}

fn count(many: usize) -> u32 {
    u32::try_from(many).unwrap_or(u32::MAX).max(1)
}

/// `12.5s`, or `20ms` where that would be nothing.
#[must_use]
pub(crate) fn seconds(time: Duration) -> String {
    if let milliseconds @ 1..100 = time.as_millis() {
        return format!("{milliseconds}ms");
    }
    let tenths = (time.as_secs_f64() * 10.0).round() / 10.0;
    format!("{tenths}s")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Rounded in each division.
    const CLOSE: Duration = Duration::from_micros(1);

    const fn admin(own: Option<Duration>) -> Wish {
        Wish { own, is_admin: true }
    }

    const fn user(own: Option<Duration>) -> Wish {
        Wish { own, is_admin: false }
    }

    fn times(stages: &[Vec<Wish>], whole: Duration) -> Vec<Duration> {
        of_all(stages, whole).into_iter().map(|stage| stage.time).collect()
    }

    fn words(stage: &Stage) -> Vec<Option<&str>> {
        stage.services.iter().map(|(_, words)| words.as_deref()).collect()
    }

    #[test]
    fn without_deadlines_of_their_own_stages_share_equally() {
        let stages = vec![vec![admin(None)], vec![admin(None), admin(None)], vec![user(None)]];
        let first = of_stage(&stages, s(30), s(15));
        assert_eq!(first, Stage { time: s(10), services: vec![(s(10), None)] });
        // What the first did not need the others have.
        assert_eq!(of_stage(&stages[1..], s(29), s(15)).time, s(29) / 2);
        assert_eq!(of_stage(&stages[2..], s(25), s(15)).time, s(25));
    }

    #[test]
    fn a_deadline_of_its_own_is_granted_and_the_others_share_the_rest() {
        let stages = vec![vec![admin(Some(s(5))), admin(Some(s(3)))], vec![admin(None)], vec![admin(None)]];
        let first = of_stage(&stages, s(30), s(15));
        assert_eq!(first.services, [(s(5), None), (s(3), None)]);
        assert_eq!(of_stage(&stages[1..], s(30), s(15)).time, s(15));
        let stages = vec![vec![admin(None)], vec![admin(Some(s(20)))]];
        let first = of_stage(&stages, s(30), s(15));
        assert_eq!(first.time, s(10), "the later one gets what it asked for");
        let said = "shortened to 10s by what others ask for: an equal share would be 15s";
        assert_eq!(words(&first), [Some(said)]);
    }

    #[test]
    fn what_is_not_enough_shortens_the_longest_first_and_says_so() {
        let stages = vec![vec![admin(Some(s(30)))], vec![admin(Some(s(30)))]];
        let first = of_stage(&stages, s(30), s(15));
        assert_eq!((first.time, words(&first)), (s(15), vec![Some("shortened from 30s to 15s")]));
        assert_eq!(of_stage(&stages[1..], s(15), s(15)).time, s(15));
        // Also when a tenth of a second does not show it.
        let last = of_stage(&stages[1..], Duration::from_millis(29_990), s(15));
        assert_eq!(words(&last), [Some("shortened from 30.000s to 29.990s")]);
        let greedy = [vec![admin(Some(s(3600)))], vec![admin(Some(s(4)))], vec![admin(None)]];
        assert_eq!(times(&greedy, s(30)), [s(30) - s(4) - s(10) / 3, s(4), s(10) / 3]);
        for own in [None, Some(s(1))] {
            assert_eq!(of_stage(&[vec![admin(own)]], Duration::ZERO, Duration::ZERO).time, Duration::ZERO);
        }
    }

    /// A user's service with an hour once left 0.02 s to each of the administrator's.
    #[test]
    fn a_user_takes_half_of_the_time_at_most() {
        let hour = user(Some(s(3600)));
        let redis = admin(Some(s(5)));
        let stages = [vec![admin(None)], vec![hour], vec![redis], vec![admin(None)]];
        assert_eq!(times(&stages, s(30)), [s(5), s(15), s(5), s(5)]);
        // As many as he likes, one after the other.
        let mut stages = vec![vec![hour]; 64];
        stages.extend([vec![redis], vec![admin(None)]]);
        let grants = times(&stages, s(30));
        let theirs: Duration = grants[..64].iter().sum();
        assert!(theirs <= s(15) && grants[64] == s(5) && grants[65] >= s(10), "{grants:?}");
        // And beside the administrator's.
        let stages = [vec![admin(Some(s(1))), hour], vec![admin(Some(s(27)))]];
        assert_eq!(times(&stages, s(30)), [s(3), s(27)], "the rest, which nobody needs");
        let first = of_stage(&stages, s(30), s(15));
        assert_eq!(words(&first), [None, Some("shortened from 3600s to 3s")]);
        // What nobody else needs is his.
        assert_eq!(times(&[vec![hour], vec![redis]], s(30)), [s(25), s(5)]);
        assert_eq!(times(&[vec![redis], vec![hour]], s(30)), [s(5), s(25)]);
    }

    fn stages() -> impl Strategy<Value = Vec<Vec<Wish>>> {
        let own = proptest::option::weighted(0.6, 1..60_000_u64);
        let is_admin = proptest::bool::weighted(0.5);
        let wish = (own, is_admin)
            .prop_map(|(own, is_admin)| Wish { own: own.map(Duration::from_millis), is_admin });
        proptest::collection::vec(proptest::collection::vec(wish, 1..4), 1..12)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        /// However much of its time each stage uses.
        #[test]
        fn nobody_takes_what_is_not_his(
            stages in stages(),
            whole in 0..60_000_u64,
            used in proptest::collection::vec(prop_oneof![Just(1.0), 0.0..1.0], 12),
        ) {
            let whole = Duration::from_millis(whole);
            let (mut left, mut of_users, mut of_admins) = (whole, whole / 2, whole - whole / 2);
            for at in 0..stages.len() {
                let stages = &stages[at..];
                let all = divided(stages, left, of_users);
                prop_assert!(all.iter().sum::<Duration>() <= left, "{:?} of {:?}", all, left);
                let admins: Vec<usize> = (0..stages.len()).filter(|at| is_admins(&stages[*at])).collect();
                let (users, share) = (stages.len() - admins.len(), left / count(stages.len()));
                // With half of the time for themselves the administrator's would have no more.
                let alone: Vec<_> = admins.iter().map(|at| demand(&stages[*at], of_admins)).collect();
                for (at, alone) in admins.iter().zip(divide(&alone, of_admins)) {
                    prop_assert!(all[*at] + CLOSE >= alone, "{:?}, alone {:?}", all[*at], alone);
                }
                for (at, stage) in stages.iter().enumerate() {
                    let is_admins = is_admins(stage);
                    let own = if is_admins { share } else { share.min(of_users / count(users)) };
                    let asking = stage.iter().filter(|wish| wish.is_admin == is_admins);
                    for modest in asking.filter_map(|wish| wish.own).filter(|wish| *wish <= own) {
                        prop_assert!(all[at] + CLOSE >= modest, "{:?} of {:?}", all[at], modest);
                    }
                }
                let first = of_stage(stages, left, of_users);
                prop_assert_eq!(first.time, all[0]);
                for (wish, (time, words)) in stages[0].iter().zip(&first.services) {
                    prop_assert!(*time <= first.time);
                    let is_less = *time + NOTHING < wish.own.unwrap_or(share);
                    prop_assert!(words.is_some() == is_less, "{:?} {:?} {:?}", wish, time, words);
                }
                let time = first.time.mul_f64(used[at]);
                left = left.saturating_sub(time);
                let whose = if is_admins(&stages[0]) { &mut of_admins } else { &mut of_users };
                *whose = whose.saturating_sub(time);
            }
        }
    }
}

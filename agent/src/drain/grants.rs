//! How the time of a drain is divided: nobody gets less than he asked for without its being said.

use std::time::Duration;

/// What one service of a stage asks for: its own deadline, or its share.
pub(crate) type Wish = Option<Duration>;

/// A stage without a wish gets this part of an equal share at least, before the others are shortened.
const LEAST: u32 = 3;

/// Time for the first of the stages that remain, of `left` in all.
///
/// Stages whose services all have a deadline of their own get the longest of these; the others share equally what these
/// leave. When that is not enough, all are shortened alike.
#[must_use]
pub(crate) fn of_stage(stages: &[Vec<Wish>], left: Duration) -> Duration {
    let all = |stage: &Vec<Wish>| stage.iter().copied().collect::<Option<Vec<_>>>();
    let own = |stage: &Vec<Wish>| all(stage).and_then(|all| all.into_iter().max());
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX).max(1);
    let sharing = stages.iter().filter(|stage| own(stage).is_none()).count();
    let asked: Duration = stages.iter().filter_map(own).sum();
    let least = left / count(stages.len()) / LEAST;
    let first = stages.first().and_then(own);
    let wanted = if sharing == 0 { asked } else { asked + least * count(sharing) };
    if wanted > left {
        // No division by zero: what is wanted is more than something.
        return left.mul_f64(first.unwrap_or(least).as_secs_f64() / wanted.as_secs_f64()).min(left);
    }
    first.unwrap_or_else(|| (left - asked) / count(sharing))
}

/// Time of one service of a stage that has so much, and the words for it when that is less than it asked for.
#[must_use]
pub(crate) fn of_service(wish: Wish, stage: Duration) -> (Duration, Option<String>) {
    match wish {
        Some(own) if own > stage => {
            let words = format!("shortened from {} to {}", seconds(own), seconds(stage));
            (stage, Some(words))
        }
        Some(own) => (own, None),
        None => (stage, None),
    }
}

/// `12.5s`
#[must_use]
pub(crate) fn seconds(time: Duration) -> String {
    let tenths = (time.as_secs_f64() * 10.0).round() / 10.0;
    format!("{tenths}s")
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn without_deadlines_of_their_own_stages_share_equally() {
        let stages = vec![vec![None], vec![None, None], vec![None]];
        assert_eq!(of_stage(&stages, s(30)), s(10));
        // What the first did not need the others have.
        assert_eq!(of_stage(&stages[1..], s(29)), s(29) / 2);
        assert_eq!(of_stage(&stages[2..], s(25)), s(25));
    }

    #[test]
    fn a_deadline_of_its_own_is_granted_and_the_others_share_the_rest() {
        let stages = vec![vec![Some(s(5)), Some(s(3))], vec![None], vec![None]];
        assert_eq!(of_stage(&stages, s(30)), s(5));
        assert_eq!(of_service(Some(s(3)), s(5)), (s(3), None));
        assert_eq!(of_stage(&stages[1..], s(30)), s(15));
        let stages = vec![vec![None], vec![Some(s(20))]];
        assert_eq!(of_stage(&stages, s(30)), s(10), "the later one gets what it asked for");
    }

    #[test]
    fn what_is_not_enough_shortens_all_alike_and_says_so() {
        let stages = vec![vec![Some(s(30))], vec![Some(s(30))]];
        let first = of_stage(&stages, s(30));
        assert_eq!(first, s(15));
        assert_eq!(of_service(Some(s(30)), first), (s(15), Some("shortened from 30s to 15s".to_owned())));
        assert_eq!(of_stage(&stages[1..], s(15)), s(15));
        assert_eq!(of_stage(&[vec![None]], Duration::ZERO), Duration::ZERO);
        assert_eq!(of_stage(&[vec![Some(s(1))]], Duration::ZERO), Duration::ZERO);
    }

    #[test]
    fn no_division_gives_more_than_there_is() {
        for stages in [
            vec![vec![Some(s(50))], vec![None]],
            vec![vec![None], vec![Some(s(50))]],
            vec![vec![Some(s(1))]; 40],
        ] {
            let mut left = s(30);
            for at in 0..stages.len() {
                let grant = of_stage(&stages[at..], left);
                assert!(grant <= left, "{grant:?} of {left:?}");
                left -= grant;
            }
        }
    }
}

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const SECOND: u64 = 1_000_000_000;
const LIMITS: HostLimits = HostLimits { threads: 32_768 };

fn row(fds: u32, threads: u32) -> Row {
    Row {
        key: ProcKey::new(42, 7),
        exec_id: 1,
        fd_limit: 1024,
        nproc_limit: u64::MAX,
        rss_bytes: 0,
        ppid: 1,
        uid: 0,
        fds,
        threads,
        state: 0,
        flags: 0,
        exited: false,
        info: Arc::new(ProcStatic { comm: "test".into(), exe: None, group: "test".into() }),
    }
}

/// Feeds one reading a second of a process that never replaces what it holds, and returns the first second
/// of each state.
fn first_times(series: impl IntoIterator<Item = u32>) -> (Detector, Option<u64>, Option<u64>) {
    run(series.into_iter().map(|fds| (0..u64::from(fds)).collect()))
}

/// The same of a process whose fds have identities.
fn run(series: impl IntoIterator<Item = BTreeSet<u64>>) -> (Detector, Option<u64>, Option<u64>) {
    let mut detector = Detector::new(LIMITS);
    let mut remembered = BTreeSet::new();
    let (mut suspect, mut leaking) = (None, None);
    for (second, held) in series.into_iter().enumerate() {
        let second = second as u64;
        for change in detector.observe(&[row(held.len() as u32, 1)], second * SECOND) {
            match change {
                Change::Suspect(..) => {
                    suspect = suspect.or(Some(second));
                    remembered = held.clone();
                }
                Change::Grown(key, resource, _) => {
                    let survivors = Some(held.intersection(&remembered).count() as u32);
                    let found = Confirmation { survivors, examples: Vec::new() };
                    if detector.confirm(key, resource, found).is_some() {
                        leaking = leaking.or(Some(second));
                    }
                }
                Change::Quiet(..) => remembered.clear(),
            }
        }
    }
    (detector, suspect, leaking)
}

/// A server: connections come at random and live for a random time; one in a second is never closed.
struct Server {
    random: u64,
    next: u64,
    /// Connections with the second in which they end.
    open: BTreeMap<u64, u64>,
}

impl Server {
    fn new(seed: u64) -> Self {
        Self { random: seed, next: 0, open: BTreeMap::new() }
    }

    /// Uniform in 0 to 1, by splitmix64.
    fn uniform(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// One second with `rate` arrivals on average that live for `hold` seconds on average.
    fn second(&mut self, now: u64, rate: f64, hold: f64, leaks: u64) -> BTreeSet<u64> {
        self.open.retain(|_, ends| *ends > now);
        let mut at = -self.uniform().ln() / rate;
        while at < 1.0 {
            let life = -self.uniform().ln() * hold;
            self.open.insert(self.next, now + 1 + life as u64);
            self.next += 1;
            at -= self.uniform().ln() / rate;
        }
        for _ in 0..leaks {
            self.open.insert(self.next, u64::MAX);
            self.next += 1;
        }
        self.open.keys().copied().collect()
    }
}

#[test]
fn a_busy_server_is_no_leak_however_its_load_wanders() {
    const HOURS: u64 = 3;
    let mut accused = Vec::new();
    for (mean, hold) in
        [(20.0, 5.0), (20.0, 300.0), (100.0, 20.0), (100.0, 300.0), (400.0, 60.0), (400.0, 300.0)]
    {
        for seed in 0..4 {
            let mut server = Server::new(seed);
            let warm = hold as u64 * 5;
            (0..warm).for_each(|now| drop(server.second(now, mean / hold, hold, 0)));
            let series = (warm..warm + HOURS * 3600).map(|now| server.second(now, mean / hold, hold, 0));
            if let (_, _, Some(second)) = run(series) {
                accused.push((mean, hold, seed, second));
            }
        }
    }
    assert_eq!(accused, [], "of 24 healthy servers in {HOURS} hours each");
}

#[test]
fn load_that_doubles_with_short_connections_is_no_leak() {
    for seed in 0..4 {
        let mut server = Server::new(seed);
        let series = (0..3600).map(|now| server.second(now, 5.0 + now as f64 / 240.0, 15.0, 0));
        assert_eq!(run(series).2, None, "seed {seed}");
    }
}

#[test]
fn a_leak_is_found_below_the_noise_of_a_busy_server() {
    for (seed, hold) in [(1, 10.0), (2, 20.0), (3, 60.0)] {
        let mut server = Server::new(seed);
        (0..300).for_each(|now| drop(server.second(now, 100.0 / hold, hold, 0)));
        let series = (300..1200).map(|now| server.second(now, 100.0 / hold, hold, 1));
        let (_, _, leaking) = run(series);
        assert!(leaking.is_some_and(|second| second <= 240), "hold {hold}: {leaking:?}");
    }
}

#[test]
fn a_leak_of_one_per_second_is_suspect_in_30_s_and_leaking_in_70_s_with_its_rate() {
    let (detector, suspect, leaking) = first_times((0..80).map(|second| 5 + second));
    assert_eq!((suspect, leaking), (Some(30), Some(60)));
    let finding = &detector.findings()[0];
    assert_eq!(finding.state, State::Leaking);
    assert!((55.0..=65.0).contains(&finding.growth_per_minute), "{}", finding.growth_per_minute);
    let seconds = finding.seconds_to_exhaustion().unwrap();
    let exact = f64::from(1024 - finding.live);
    assert!((seconds - exact).abs() < exact * 0.1, "{seconds} s instead of {exact} s");
}

#[test]
fn the_floor_of_a_noisy_leak_rises_too() {
    let (_, _, leaking) =
        first_times((0..100).map(|second| 50 + second + [0, 30, 7, 19][second as usize % 4]));
    assert!(leaking.is_some_and(|second| second <= 80), "{leaking:?}");
}

#[test]
fn a_slow_leak_is_found_late_but_found() {
    let (_, _, leaking) = first_times((0..1_000).map(|second| 10 + second / 30));
    assert!(leaking.is_some_and(|second| second <= 800), "{leaking:?}");
}

#[test]
fn a_warm_up_a_burst_and_noise_are_not_leaks() {
    let warm_up = (0..600).map(|second: u32| 5 + (second * 10).min(200));
    assert_eq!(first_times(warm_up).2, None);
    let bursts = (0..600).map(|second: u32| if second % 60 < 25 { 300 } else { 12 });
    assert_eq!(first_times(bursts).2, None);
    let noise = (0..2_000).map(|second: u32| 40 + second.wrapping_mul(2_654_435_761) % 30);
    assert_eq!(first_times(noise).2, None);
}

#[test]
fn high_use_alone_is_suspect_and_with_growth_leaking() {
    let (detector, suspect, leaking) = first_times((0..60).map(|_| 900));
    assert_eq!((suspect, leaking), (Some(10), None));
    assert_eq!(detector.findings()[0].growth_per_minute, 0.0);
    let (_, _, leaking) = first_times((0..170).map(|second| 850 + second));
    assert!(leaking.is_some_and(|second| second <= 140), "{leaking:?}: it breaks at 174 s");
}

#[test]
fn what_is_given_back_ends_the_finding_and_so_does_a_long_rest() {
    let leak = || (0..100).map(|second| 5 + second);
    let (detector, _, leaking) = first_times(leak().chain(std::iter::repeat_n(8, 30)));
    assert!(leaking.is_some() && detector.findings().is_empty());
    let (detector, ..) = first_times(leak().chain(std::iter::repeat_n(104, 200)));
    assert_eq!(detector.findings().len(), 1, "it may go on after a rest");
    let (detector, ..) = first_times(leak().chain(std::iter::repeat_n(104, 330)));
    assert!(detector.findings().is_empty());
}

#[test]
fn a_new_image_starts_afresh_and_an_exit_ends_the_finding() {
    let (mut detector, ..) = first_times((0..80).map(|second| 5 + second));
    let replaced = Row { exec_id: 2, ..row(90, 1) };
    assert_eq!(detector.observe(&[replaced], 80 * SECOND), [Change::Quiet(row(0, 0).key, Resource::Fd)]);
    let (mut detector, ..) = first_times((0..80).map(|second| 5 + second));
    assert_eq!(detector.observe(&[], 80 * SECOND), [Change::Quiet(row(0, 0).key, Resource::Fd)]);
    assert!(detector.histories.is_empty());
}

#[test]
fn threads_are_judged_by_their_own_limit() {
    let mut detector = Detector::new(LIMITS);
    let changes: Vec<_> = (0..80)
        .flat_map(|second| detector.observe(&[row(5, 1 + second)], u64::from(second) * SECOND))
        .collect();
    let key = row(0, 0).key;
    assert_eq!(changes, [Change::Suspect(key, Resource::Thread), Change::Grown(key, Resource::Thread, 1)]);
    assert_eq!(detector.findings()[0].state, State::Suspect, "not before it is confirmed");
    assert!(detector.confirm(key, Resource::Thread, Confirmation::default()).is_some());
    assert_eq!(detector.findings()[0].limit, Some(32_768));
    let user = Row { uid: 1000, nproc_limit: 500, ..row(5, 5) };
    assert_eq!(usage(&user, Resource::Thread, LIMITS).1, Some(500));
}

#[test]
fn what_was_replaced_is_no_leak_and_what_it_holds_next_is_remembered_anew() {
    let mut detector = Detector::new(LIMITS);
    let key = row(0, 0).key;
    let refuted = || Confirmation { survivors: Some(0), examples: Vec::new() };
    let mut seen = Vec::new();
    // High use keeps it suspect all the time.
    for second in 0..400 {
        for change in
            detector.observe(&[Row { fd_limit: 600, ..row(500 + second, 1) }], u64::from(second) * SECOND)
        {
            seen.push(match change {
                Change::Suspect(..) => "suspect",
                Change::Quiet(..) => "quiet",
                Change::Grown(..) => {
                    assert_eq!(detector.confirm(key, Resource::Fd, refuted()), None);
                    "grown"
                }
            });
        }
    }
    assert!(detector.findings().iter().all(|finding| finding.state == State::Suspect));
    assert!(seen.len() >= 4, "{seen:?}");
    let asked: Vec<_> = seen.iter().filter(|change| **change != "quiet").collect();
    assert!(
        asked.windows(2).all(|pair| pair[0] != pair[1]),
        "each growth follows a suspicion of its own: {seen:?}"
    );
}

#[test]
fn the_history_of_a_process_stays_within_its_budget() {
    let bytes = size_of::<(ProcKey, History)>();
    // With the row (128 B) and the slack of two hash tables this stays below 512 B per process.
    assert!(bytes <= 192, "{bytes} bytes");
}

proptest! {
    #[test]
    fn whatever_the_series_a_leak_has_grown(series in proptest::collection::vec(0u32..800, 0..600)) {
        let (_, suspect, leaking) = first_times(series.iter().copied());
        let spread = series.iter().max().zip(series.iter().min()).map_or(0, |(max, min)| max - min);
        prop_assert!(suspect.is_none() || spread >= 8, "suspect within {spread}");
        prop_assert!(leaking.is_none() || spread >= 20, "leaking within {spread}");
    }
}

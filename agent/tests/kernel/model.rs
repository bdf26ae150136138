//! Random scripts over real processes: after each pause the model, the kernel and plumb must agree, on every
//! fd and thread and on every event in between. A failure is shrunk and printed as a script, which
//! `cargo xtask soak --script FILE` plays again.

mod check;
mod events;
mod op;
#[path = "../../examples/puppet/protocol.rs"]
mod protocol;
mod run;
mod stage;
mod terms;
mod world;

use std::{
    cell::RefCell,
    env, fs,
    time::{Duration, Instant},
};

use plumb::kernel::Seam;
use run::{Failure, Host, Random, Tally};
use terms::Rules;

/// What does not agree.
#[derive(Debug)]
pub(crate) struct Mismatch(String);

/// Operations of one case, at most.
const LENGTH: usize = 4000;

fn number(variable: &str) -> Option<u64> {
    env::var(variable).ok().map(|text| text.parse().unwrap())
}

/// What is true of this kernel.
fn rules() -> Rules {
    const CLOEXEC: u32 = 4;
    // SAFETY: a range without open fds.
    let marked = unsafe { libc::syscall(libc::SYS_close_range, u32::MAX - 1, u32::MAX - 1, CLOEXEC) };
    Rules { mark_range: marked == 0, dup2_closes: true }
}

fn fail(seed: u64, Failure { ops, why }: &Failure) -> ! {
    panic!("seed {seed}: {why}\nthe script, for `cargo xtask soak --script FILE`:\n{}", op::script(ops))
}

#[test]
fn model_kernel_and_plumb_agree() {
    let ops = number("PLUMB_MODEL_OPS").unwrap_or(20_000);
    let best = Host::new(rules(), None);
    assert!(best.seam() == Seam::Functions || env::var_os("PLUMB_OWN_KERNEL").is_none());
    let mut hosts = vec![best];
    if hosts[0].seam() != Seam::SysExit {
        hosts.push(Host::new(rules(), Some(Seam::SysExit)));
    }
    let each = ops / hosts.len() as u64;
    for host in hosts {
        let (host, mut random) = (RefCell::new(host), Random::new());
        while host.borrow().tally.ops < each {
            random.case(&host, LENGTH).unwrap_or_else(|failure| fail(random.seed, &failure));
        }
    }
}

#[test]
fn a_model_that_forgets_what_dup2_closes_is_caught_and_shrunk() {
    let rules = Rules { dup2_closes: false, ..rules() };
    let (host, mut random) = (RefCell::new(Host::new(rules, None)), Random::new());
    let failure = (0..100).find_map(|_| random.case(&host, 60).err()).expect("a wrong model is caught");
    // Where each attempt takes its time it is made no simpler than the time allows.
    let most = if env::var_os("PLUMB_OWN_KERNEL").is_some() { 40 } else { 4 };
    assert!(failure.ops.len() <= most, "{failure:?}");
    let script = op::script(&failure.ops);
    assert!(script.contains("dup2") || script.contains("dup3"), "{failure:?}");
    // It can be played again, and the true model agrees with it.
    let ops = op::parse(&script).unwrap();
    assert!(host.borrow_mut().case(&ops).is_err(), "{script}");
    Host::new(self::rules(), None).case(&ops).unwrap();
}

/// For PLUMB_SOAK_SECONDS or PLUMB_MODEL_OPS operations, whichever is over first.
#[test]
#[ignore = "takes as long as it is told to: cargo xtask soak"]
fn soak() {
    let (ops, seconds) = (number("PLUMB_MODEL_OPS"), number("PLUMB_SOAK_SECONDS"));
    let (host, mut random) = (RefCell::new(Host::new(rules(), None)), Random::new());
    println!("soak: seed {}, fds through {}", random.seed, host.borrow().seam().word());
    let began = Instant::now();
    let mut told = began;
    let tell = |word: &str, tally: Tally| {
        let rate = tally.ops as f64 / began.elapsed().as_secs_f64();
        let Tally { ops, cases, quiesces, unheard } = tally;
        let events = host.borrow().events();
        println!(
            "soak: {word}{ops} operations, {rate:.0} per second, {cases} scripts, {quiesces} quiesces, \
             {events} events, 0 mismatches, events of {unheard} quiesces skipped by the kernel"
        );
    };
    loop {
        let tally = host.borrow().tally;
        let over = ops.is_some_and(|ops| tally.ops >= ops)
            || seconds.is_some_and(|seconds| began.elapsed().as_secs() >= seconds);
        if over {
            return tell("done: ", tally);
        }
        if told.elapsed() > Duration::from_secs(10) {
            told = Instant::now();
            tell("", tally);
        }
        random.case(&host, LENGTH).unwrap_or_else(|failure| fail(random.seed, &failure));
    }
}

/// Plays the script in the file PLUMB_MODEL_SCRIPT.
#[test]
#[ignore = "needs a script: cargo xtask soak --script FILE"]
fn replay() {
    let text = fs::read_to_string(env::var("PLUMB_MODEL_SCRIPT").unwrap()).unwrap();
    let ops = op::parse(&text).unwrap();
    Host::new(rules(), None).case(&ops).unwrap();
    println!("the model, the kernel and plumb agree on {} operations", ops.len());
}

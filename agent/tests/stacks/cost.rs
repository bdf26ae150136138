//! Prints what unwinding and naming cost: `cargo test --release --test stacks cost -- --ignored --nocapture`.

use std::{process::Command, time::Instant};

use crate::{
    sampler,
    sources::{compile, source, symboliser},
    support::TempDir,
};

/// Samples that are unwound at a time, and repetitions.
const SAMPLES: usize = 1008;
const REPEATED: usize = 31;

fn micros(begun: Instant, count: usize) -> f64 {
    begun.elapsed().as_secs_f64() * 1e6 / count as f64
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[test]
#[ignore = "a measurement"]
fn cost() {
    let dir = TempDir::new();
    let program = dir.join("calls");
    compile("gcc", &["-g", "-O2"], &source("calls.c"), &program);
    let mut raw = Vec::new();
    sampler::run(Command::new(&program).arg("112"), &mut |process, sample| {
        raw.push(sample.raw);
        if raw.len() < SAMPLES {
            return;
        }
        let (mut first, mut new) = (Vec::new(), Vec::new());
        for _ in 0..REPEATED {
            let mut symboliser = symboliser();
            let begun = Instant::now();
            let stacks = symboliser.unwind(process, &raw[..9]);
            first.push(micros(begun, 1));
            // The files have been read when the first stack has its names.
            let mut places: Vec<_> =
                symboliser.symbolise(&stacks[0]).iter().map(|frame| frame.offset).collect();
            let (known, begun) = (places.len(), Instant::now());
            for stack in &stacks[1..] {
                places.extend(symboliser.symbolise(stack).iter().map(|frame| frame.offset));
            }
            let took = micros(begun, 1);
            places.sort_unstable();
            places.dedup();
            new.push(took / (places.len() - known) as f64);
        }
        println!("first stacks of a process, with the start of the worker: {:.0} us", median(first));
        println!("per new symbol in files read before: {:.1} us", median(new));
        let mut symboliser = symboliser();
        let batch = |_| {
            let begun = Instant::now();
            assert_eq!(symboliser.unwind(process, &raw).len(), SAMPLES);
            micros(begun, SAMPLES)
        };
        println!("per stack, {SAMPLES} at a time: {:.1} us", median((0..REPEATED).map(batch).collect()));
        let single = |raw| {
            let begun = Instant::now();
            assert_eq!(symboliser.unwind(process, std::slice::from_ref(raw)).len(), 1);
            micros(begun, 1)
        };
        println!("per stack, one at a time: {:.1} us", median(raw.iter().map(single).collect()));
        let stacks = symboliser.unwind(process, &raw);
        stacks.iter().for_each(|stack| assert!(symboliser.symbolise(stack).len() > 4));
        let begun = Instant::now();
        stacks.iter().for_each(|stack| assert!(symboliser.symbolise(stack).len() > 4));
        println!("per stack whose names are known: {:.2} us", micros(begun, SAMPLES));
    });
    assert_eq!(raw.len(), SAMPLES);
}

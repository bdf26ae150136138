//! Processes that leak.

use std::f64::consts::TAU;

use super::{
    families::{Family, HOUR, Kind, MINUTE, Plan, plan, settled, starts, when},
    world::World,
};

/// Opens `rate` a second for ever, evenly; what is left of a second is carried over.
fn evenly(rate: f64) -> impl FnMut(&mut World) {
    let mut due = 1.0;
    move |world| {
        due += rate;
        let now = due as u32;
        due -= f64::from(now);
        world.keep(now);
    }
}

fn steady(world: &mut World, low: f64, high: f64, deadline: impl Fn(f64) -> f64) -> Plan {
    starts(world);
    let (rate, from) = (world.random.log(low, high), when(world));
    let mut leak = evenly(rate);
    let mut plan = plan(0.0, move |world, second| {
        if second >= from {
            leak(world);
        }
    });
    plan.limit = [1_024, 4_096, 65_536, 1_048_576][(world.random.uniform() * 3.99) as usize];
    plan.leaks(from, deadline(rate))
}

pub(super) static LEAKS: &[Family] = &[
    Family {
        name: "steady, 1 to 200 a second",
        kind: Kind::Leak,
        make: |world| steady(world, 1.0, 200.0, |_| 120.0),
    },
    Family {
        name: "steady, 1 in 10 s to 1 a second",
        kind: Kind::Leak,
        make: |world| steady(world, 0.1, 1.0, |_| 360.0),
    },
    Family {
        name: "steady, 1 in 1 min to 1 in 10 s",
        kind: Kind::Leak,
        make: |world| steady(world, 1.0 / 60.0, 0.1, |rate| 80.0 / rate),
    },
    Family {
        name: "steady, 4 an hour to 1 in 1 min",
        kind: Kind::Leak,
        make: |world| steady(world, 4.0 / HOUR, 1.0 / 60.0, |rate| 80.0 / rate),
    },
    Family {
        name: "one request in so many, random load",
        kind: Kind::Leak,
        make: |world| {
            starts(world);
            let leaked = world.random.log(0.1, 2.0);
            let (rate, hold) = (world.random.log(2.0, 20.0), world.random.log(0.05, 10.0));
            let from = when(world);
            let plan = plan(0.0, move |world, second| {
                world.serve(rate, hold, 0.0);
                if second >= from {
                    let count = world.random.poisson(leaked);
                    world.keep(count);
                }
            });
            plan.leaks(from, 360.0f64.max(120.0 / leaked))
        },
    },
    Family {
        name: "bursts of an error path",
        kind: Kind::Leak,
        make: |world| {
            starts(world);
            let (every, size) = (world.random.log(5.0, 300.0), world.random.log(2.0, 20.0));
            let from = when(world);
            let mut next = from as f64;
            let plan = plan(0.0, move |world, second| {
                while second as f64 >= next {
                    let count = world.random.poisson(size) + 1;
                    world.keep(count);
                    next += world.random.exponential(every);
                }
            });
            plan.leaks(from, 600.0f64.max(40.0 * every))
        },
    },
    Family {
        name: "saw with a rising floor",
        kind: Kind::Leak,
        make: |world| {
            starts(world);
            let (period, net) = (world.random.log(4.0, 30.0) as u64, world.random.within(1.4, 2.0));
            let height = world.random.within(2.0, 6.0);
            let net = (net * period as f64) as u32;
            let from = when(world);
            let plan = plan(0.0, move |world, second| {
                if second >= from {
                    let up = (height * f64::from(net) / period as f64).ceil() as u32;
                    world.fill("saw", up);
                    if (second - from) % period == period - 1 {
                        world.resize("saw", 0);
                        world.keep(net);
                    }
                }
            });
            plan.leaks(from, if period <= 8 { 180.0 } else { 360.0 })
        },
    },
    Family {
        name: "after hours of good behaviour",
        kind: Kind::Leak,
        make: |world| {
            starts(world);
            let (rate, hold) = (world.random.log(0.5, 5.0), world.random.log(0.05, 3.0));
            let mut leak = evenly(world.random.log(1.0, 20.0));
            let from = world.random.within(1.0, 5.0) * HOUR;
            let from = from as u64;
            let plan = plan(0.0, move |world, second| {
                world.serve(rate, hold, 0.0);
                if second >= from {
                    leak(world);
                }
            });
            plan.leaks(from, 120.0)
        },
    },
    Family {
        name: "below busy traffic",
        kind: Kind::Leak,
        make: |world| {
            starts(world);
            let (load, hold) = (world.random.log(20.0, 300.0), world.random.log(2.0, 60.0));
            let leaked = world.random.log(0.5, 5.0);
            settled(world, load / hold, hold);
            let from = world.random.within(60.0, HOUR) as u64;
            let plan = plan(0.0, move |world, second| {
                world.serve(load / hold, hold, 0.0);
                if second >= from {
                    let count = world.random.poisson(leaked);
                    world.keep(count);
                }
            });
            plan.leaks(from, 600.0f64.max(15.0 * hold))
        },
    },
    Family {
        name: "by day, with the load",
        kind: Kind::Leak,
        make: |world| {
            starts(world);
            let (peak, hold) = (world.random.log(1.0, 10.0), world.random.log(0.5, 20.0));
            let (leaked, phase) = (world.random.log(20.0, 200.0) / HOUR, world.random.uniform());
            let plan = plan(0.0, move |world, second| {
                let load = 0.5 - 0.5 * (TAU * (second as f64 / 86_400.0 + phase)).cos();
                world.serve(peak * (0.1 + 0.9 * load), hold, 0.0);
                let count = world.random.poisson(leaked * load);
                world.keep(count);
            });
            plan.leaks(0, 24.0 * HOUR)
        },
    },
    Family {
        name: "slow, in a big noisy server",
        kind: Kind::Leak,
        make: |world| {
            starts(world);
            let (load, hold) = (world.random.log(200.0, 1_000.0), world.random.log(20.0, 200.0));
            let leaked = world.random.log(30.0, 300.0) / HOUR;
            settled(world, load / hold, hold);
            let plan = plan(0.0, move |world, _| {
                world.serve(load / hold, hold, 0.0);
                let count = world.random.poisson(leaked);
                world.keep(count);
            });
            plan.leaks(0, 18.0 * HOUR)
        },
    },
    Family {
        name: "beside connections that live for tens of minutes",
        kind: Kind::Leak,
        make: |world| {
            starts(world);
            let (load, hold) = (world.random.log(50.0, 500.0), world.random.within(10.0, 40.0) * MINUTE);
            let leaked = world.random.log(0.1, 2.0);
            settled(world, load / hold, hold);
            let from = world.random.within(60.0, HOUR) as u64;
            let plan = plan(0.0, move |world, second| {
                world.serve(load / hold, hold, 0.0);
                if second >= from {
                    let count = world.random.poisson(leaked);
                    world.keep(count);
                }
            });
            plan.leaks(from, 20.0 * hold)
        },
    },
];

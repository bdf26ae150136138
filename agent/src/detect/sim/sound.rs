//! Processes that leak nothing.

use std::f64::consts::TAU;

use super::{
    families::{Family, HOUR, Kind, MINUTE, Plan, plan, settled, starts, when},
    world::World,
};

/// Approaches a cap, then replaces what it holds.
fn fill(world: &mut World, cap: f64, constant: f64, hours: f64) -> Plan {
    starts(world);
    let churn = if world.random.chance(0.3) { 0.0 } else { world.random.log(0.01, 5.0) };
    let from = when(world);
    plan(hours, move |world, second| {
        if second < from {
            return;
        }
        let missing = cap - world.size("cache") as f64;
        let count = world.random.poisson(missing.max(0.0) / constant);
        world.fill("cache", count);
        if missing < cap * 0.05 {
            let replaced = world.random.poisson(churn);
            world.drain("cache", replaced);
            world.fill("cache", replaced);
        }
    })
}

/// Load that wanders around its mean: a factor, per step of a second.
fn wander(world: &mut World, log: &mut f64, size: f64, memory: f64) -> f64 {
    *log += -*log / memory + size * (2.0 / memory).sqrt() * world.random.normal();
    log.exp()
}

pub(super) static SOUND: &[Family] = &[
    Family {
        name: "connection pool warms up",
        kind: Kind::Sound,
        make: |world| {
            starts(world);
            let (size, within) = (world.random.log(20.0, 200.0), world.random.within(5.0, 30.0));
            let from = when(world) as f64;
            plan(3.0, move |world, second| {
                let part = ((second as f64 - from) / within).clamp(0.0, 1.0);
                world.resize("pool", (size * part) as usize);
            })
        },
    },
    Family {
        name: "cache fills within 60 to 90 s, then churns",
        kind: Kind::Sound,
        make: |world| {
            let (cap, constant) = (world.random.log(50.0, 2_000.0), world.random.within(20.0, 30.0));
            fill(world, cap, constant, 3.0)
        },
    },
    Family {
        name: "cache fills within 2 to 4 min, then churns",
        kind: Kind::Sound,
        make: |world| {
            let (cap, constant) = (world.random.log(50.0, 2_000.0), world.random.within(30.0, 75.0));
            fill(world, cap, constant, 3.0)
        },
    },
    Family {
        name: "small cache of up to 30 fills within 5 to 30 min",
        kind: Kind::Sound,
        make: |world| {
            let constant = world.random.log(100.0, 600.0);
            let cap = world.random.log(10.0, 30.0);
            fill(world, cap, constant, 6.0)
        },
    },
    Family {
        name: "bursts, given back over 30 s",
        kind: Kind::Sound,
        make: |world| {
            starts(world);
            let (size, every) = (world.random.log(50.0, 1_000.0), world.random.log(100.0, HOUR));
            let mut began = 0.0;
            plan(6.0, move |world, second| {
                let since = second as f64 - began;
                let part = if since < 3.0 { 1.0 } else { (1.0 - (since - 3.0) / 30.0).clamp(0.0, 1.0) };
                world.resize("burst", (size * part) as usize);
                if since > 40.0 && world.random.chance(1.0 / every) {
                    began = second as f64;
                }
            })
        },
    },
    Family {
        name: "batch every 20 s to 10 min",
        kind: Kind::Sound,
        make: |world| {
            starts(world);
            let (size, every) = (world.random.log(20.0, 500.0), world.random.log(20.0, 600.0) as u64);
            let lasts = (every as f64 * world.random.within(0.1, 0.7)).max(8.0) as u64;
            plan(3.0, move |world, second| {
                world.resize("batch", if second % every < lasts { size as usize } else { 0 });
            })
        },
    },
    Family {
        name: "pool is resized up and down",
        kind: Kind::Sound,
        make: |world| {
            starts(world);
            let every = world.random.log(60.0, HOUR);
            let mut size = 8.0;
            plan(6.0, move |world, _| {
                if world.random.chance(1.0 / every) {
                    size = world.random.log(8.0, 256.0);
                }
                let now = world.size("pool");
                let step = (size as usize).clamp(now.saturating_sub(8), now + 8);
                world.resize("pool", step);
            })
        },
    },
    Family {
        name: "plateau just below the limit, within 40 s",
        kind: Kind::Sound,
        make: |world| {
            world.keep(5);
            let (limit, within) = (256.0, world.random.within(5.0, 40.0));
            let from = when(world) as f64;
            let size = world.random.within(0.85, 0.955) * limit;
            let plan = plan(3.0, move |world, second| {
                let part = ((second as f64 - from) / within).clamp(0.0, 1.0);
                world.resize("pool", (size * part) as usize);
            });
            Plan { limit: limit as u64, ..plan }
        },
    },
    Family {
        name: "steady load, lives of any length",
        kind: Kind::Sound,
        make: |world| {
            starts(world);
            let hold = world.random.log(0.1, 300.0);
            let load = world.random.log(5.0, 500.0).min(20.0 * hold);
            let tail = if world.random.chance(0.5) { 0.0 } else { world.random.within(0.5, 1.5) };
            settled(world, load / hold, hold);
            plan(6.0, move |world, _| world.serve(load / hold, hold, tail))
        },
    },
    Family {
        name: "ramps of load, short lives",
        kind: Kind::Sound,
        make: |world| {
            starts(world);
            let (rate, hold) = (world.random.log(1.0, 10.0), world.random.log(0.2, 15.0));
            let (times, takes) = (world.random.within(1.5, 5.0), world.random.log(2.0 * MINUTE, HOUR));
            plan(4.0, move |world, second| {
                let wave = (second as f64 % (4.0 * takes)) / takes;
                let part = (2.0 - (wave - 2.0).abs()).clamp(0.0, 1.0);
                world.serve(rate * (1.0 + (times - 1.0) * part), hold, 0.0);
            })
        },
    },
    Family {
        name: "load by day and night",
        kind: Kind::Sound,
        make: |world| {
            starts(world);
            let hold = world.random.log(1.0, 120.0);
            let (peak, phase) = (world.random.log(20.0, 400.0).min(8.0 * hold), world.random.uniform());
            plan(36.0, move |world, second| {
                let load = 0.5 - 0.5 * (TAU * (second as f64 / 86_400.0 + phase)).cos();
                world.serve(peak / hold * (0.1 + 0.9 * load), hold, 0.0);
            })
        },
    },
    Family {
        name: "load wanders",
        kind: Kind::Sound,
        make: |world| {
            starts(world);
            let hold = world.random.log(0.5, 60.0);
            let load = world.random.log(10.0, 300.0).min(10.0 * hold);
            let (size, memory) = (world.random.within(0.1, 0.6), world.random.log(MINUTE, HOUR));
            let mut log = 0.0;
            plan(8.0, move |world, _| {
                let factor = wander(world, &mut log, size, memory);
                world.serve(load / hold * factor, hold, 0.0);
            })
        },
    },
    Family {
        name: "40 children, started within 10 s and kept",
        kind: Kind::Sound,
        make: |world| {
            starts(world);
            let (count, within) = (world.random.within(20.0, 60.0), world.random.within(2.0, 15.0));
            let from = when(world) as f64;
            plan(3.0, move |world, second| {
                let part = ((second as f64 - from) / within).clamp(0.0, 1.0);
                world.resize("children", 3 * (count * part) as usize);
            })
        },
    },
    Family {
        name: "nightly batch",
        kind: Kind::Sound,
        make: |world| {
            starts(world);
            let (size, at) = (world.random.log(50.0, 1_000.0), world.random.within(0.0, 86_400.0));
            let (takes, lasts) = (world.random.log(2.0, 60.0), world.random.log(5.0 * MINUTE, 2.0 * HOUR));
            plan(30.0, move |world, second| {
                let since = (second as f64 - at).rem_euclid(86_400.0);
                let part = if since < lasts { (since / takes).min(1.0) } else { 0.0 };
                world.resize("batch", (size * part) as usize);
            })
        },
    },
    Family {
        name: "log rotation and reload",
        kind: Kind::Sound,
        make: |world| {
            starts(world);
            let (size, every) = (world.random.log(5.0, 200.0) as usize, world.random.log(600.0, 4.0 * HOUR));
            let lasts = world.random.log(2.0, 120.0) as u64;
            world.fill("old", size as u32);
            let mut since = 0;
            plan(12.0, move |world, second| {
                // The new ones come first, the old ones go when they are done.
                if world.size("new") == 0 && world.random.chance(1.0 / every) {
                    world.fill("new", size as u32);
                    since = second;
                }
                if world.size("new") > 0 && second - since >= lasts {
                    world.swap("old", "new");
                    world.resize("new", 0);
                }
            })
        },
    },
    Family {
        name: "scaled up in steps",
        kind: Kind::Sound,
        make: |world| {
            starts(world);
            let (step, takes) = (world.random.log(10.0, 100.0), world.random.within(1.0, 20.0));
            let every = world.random.log(5.0 * MINUTE, 3.0 * HOUR);
            let mut size = 0.0;
            let mut steps = world.random.within(2.0, 5.9) as u32;
            plan(12.0, move |world, _| {
                if steps > 0 && world.random.chance(1.0 / every) {
                    size += step;
                    steps -= 1;
                }
                let now = world.size("pool");
                world.resize("pool", (size as usize).min(now + (step / takes).ceil() as usize));
            })
        },
    },
    Family {
        name: "connections that live for tens of minutes",
        kind: Kind::Sound,
        make: |world| {
            starts(world);
            let (load, hold) = (world.random.log(20.0, 500.0), world.random.within(10.0, 60.0) * MINUTE);
            let (size, memory) = (world.random.within(0.0, 0.3), world.random.log(600.0, 4.0 * HOUR));
            // All clients come back at once after a start.
            let within = world.random.within(5.0, 60.0);
            let mut log = 0.0;
            plan(8.0, move |world, second| {
                if (second as f64) < within {
                    for _ in 0..world.random.poisson(load / within) {
                        let life = world.random.exponential(hold);
                        world.open(life);
                    }
                }
                let factor = wander(world, &mut log, size, memory);
                world.serve(load / hold * factor, hold, 0.0);
            })
        },
    },
    Family {
        name: "fills evenly to a cap, for 2 min to 3 h",
        kind: Kind::Undecidable,
        make: |world| {
            starts(world);
            let takes = world.random.log(2.0 * MINUTE, 3.0 * HOUR);
            let cap = world.random.log(50.0, 2_000.0);
            plan(6.0, move |world, second| {
                let part = (second as f64 / takes).min(1.0);
                world.resize("cache", (cap * part) as usize);
            })
        },
    },
    Family {
        name: "cache fills ever more slowly, for 5 min to 1 h",
        kind: Kind::Undecidable,
        make: |world| {
            let (cap, constant) = (world.random.log(35.0, 2_000.0), world.random.log(100.0, 1_200.0));
            fill(world, cap, constant, 6.0)
        },
    },
    Family {
        name: "paced batch of 2 to 10 min, again and again",
        kind: Kind::Undecidable,
        make: |world| {
            starts(world);
            let (size, takes) = (world.random.log(100.0, 2_000.0), world.random.within(2.0, 10.0) * MINUTE);
            let every = takes * world.random.within(1.1, 3.0);
            plan(6.0, move |world, second| {
                let since = second as f64 % every;
                let size = size * world.random.within(0.95, 1.05);
                let part = if since < takes { since / takes } else { 0.0 };
                // What it has, it keeps until its end.
                let now = if part > 0.0 { world.size("batch") } else { 0 };
                world.resize("batch", now.max((size * part) as usize));
            })
        },
    },
    Family {
        name: "clients come steadily to stay for tens of minutes",
        kind: Kind::Undecidable,
        make: |world| {
            starts(world);
            let (rate, hold) = (world.random.log(0.1, 3.0), world.random.within(10.0, 60.0) * MINUTE);
            plan(6.0, move |world, _| world.serve(rate, hold, 0.0))
        },
    },
];

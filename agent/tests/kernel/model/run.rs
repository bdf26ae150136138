//! Scripts on the kernel: each case from the stage to nothing left, and cases at random until one fails.

use std::{
    cell::{Cell, RefCell},
    time::{Duration, Instant, SystemTime},
};

use plumb::kernel::{Fds, Filter, Kernel, Plan, Seam, Sockets};
use plumb_common::limits::RING_BYTES;
use proptest::{
    strategy::Strategy,
    test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner},
};

use super::{
    Mismatch,
    check::{self, Addresses},
    events::Watch,
    op::{self, Op, What},
    stage::{Name, Stage},
    terms::Rules,
    world::World,
};

const PROGRAMS: &[&str] =
    &["task_newtask", "sched_process_exec", "task_rename", "sched_process_exit", "processes", "files"];

/// How long a failure is made simpler, in each of two ways.
const SHRINKING: Duration = Duration::from_secs(120);

/// This kernel, plumb on it, and puppets.
pub(crate) struct Host {
    kernel: Kernel,
    watch: Watch,
    name: Name,
    rules: Rules,
    known: Addresses,
    stage: Option<(Stage, World)>,
    /// Programs that the kernel did not run so far.
    skipped: u64,
    pub(crate) tally: Tally,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    /// Those that applied.
    pub(crate) ops: u64,
    pub(crate) cases: u64,
    pub(crate) quiesces: u64,
    /// Quiesces whose events could not be compared, because the kernel had skipped programs.
    pub(crate) unheard: u64,
}

impl Host {
    /// Fds are followed this way, or the best there is.
    pub(crate) fn new(rules: Rules, seam: Option<Seam>) -> Self {
        let name = Name::new();
        let filter = Filter { tgid: None, comm: Some(name.comm()) };
        let plan = Plan {
            programs: Some(PROGRAMS),
            fds: Fds::All(seam),
            filter,
            ring_bytes: RING_BYTES,
            stacks: false,
            sockets: Sockets::Never,
            connections: 1,
            kills: false,
        };
        let mut kernel = Kernel::load_all(plan).unwrap();
        let watch = Watch::new(kernel.ring().unwrap(), kernel.seam().unwrap());
        let known = Addresses::default();
        Self { kernel, watch, name, rules, known, stage: None, skipped: 0, tally: Tally::default() }
    }

    pub(crate) fn seam(&self) -> Seam {
        self.kernel.seam().unwrap()
    }

    pub(crate) fn events(&self) -> u64 {
        self.watch.seen
    }

    /// One script from beginning to end.
    pub(crate) fn case(&mut self, ops: &[Op]) -> Result<(), Mismatch> {
        let (mut stage, mut world) = self.stage.take().unwrap_or_else(|| self.start());
        let done = self.play(ops, &mut stage, &mut world);
        if done.is_ok() {
            self.stage = Some((stage, world));
            self.tally.cases += 1;
        } else {
            stage.end(&self.name);
        }
        done
    }

    fn start(&mut self) -> (Stage, World) {
        let stage = Stage::start(&self.name);
        self.known = Addresses::default();
        self.watch.reset(&mut self.kernel, stage.tids[&0]);
        (stage, World::new(self.rules))
    }

    fn play(&mut self, ops: &[Op], stage: &mut Stage, world: &mut World) -> Result<(), Mismatch> {
        world.begin().iter().for_each(|step| stage.push(step));
        for op in ops {
            if op.what == What::Quiesce || stage.is_full() {
                self.quiesce(stage, world)?;
            }
            let steps = world.apply(*op);
            self.tally.ops += u64::from(!steps.is_empty());
            steps.iter().for_each(|step| stage.push(step));
        }
        self.quiesce(stage, world)?;
        world.end().iter().for_each(|step| stage.push(step));
        self.quiesce(stage, world)
    }

    /// The model, the kernel and plumb agree.
    fn quiesce(&mut self, stage: &mut Stage, world: &mut World) -> Result<(), Mismatch> {
        stage.run()?;
        check::proc_is_model(world, &stage.tids, &self.name)?;
        let (known, kernel) = (&mut self.known, &mut self.kernel);
        let events = self.watch.check(world, &stage.tids, kernel, known);
        let skipped = kernel.not_run();
        let skipped_now = skipped - std::mem::replace(&mut self.skipped, skipped);
        if skipped_now > 0 && events.is_err() {
            // The kernel did not run the programs, as it says: what they missed cannot be known.
            *known = Addresses::default();
            self.tally.unheard += 1;
        } else {
            events?;
        }
        let keys = check::pass_is_model(world, &stage.tids, &self.name, kernel, known)?;
        self.watch.learn(&keys);
        check::listing_is_model(world, &keys, kernel, known)?;
        world.forget_the_dead();
        known.retain(world);
        stage.forget_the_dead(world);
        self.tally.quiesces += 1;
        Ok(())
    }
}

/// The shortest script found that fails, and why.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) ops: Vec<Op>,
    pub(crate) why: String,
}

/// Random cases.
pub(crate) struct Random {
    pub(crate) seed: u64,
    runner: TestRunner,
}

impl Random {
    /// From PLUMB_MODEL_SEED, or another each time.
    pub(crate) fn new() -> Self {
        let seed = super::number("PLUMB_MODEL_SEED").unwrap_or_else(|| {
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64
        });
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let config = Config {
            failure_persistence: None,
            max_shrink_time: SHRINKING.as_millis() as u32,
            max_shrink_iters: u32::MAX,
            ..Config::default()
        };
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
        Self { seed, runner: TestRunner::new_with_rng(config, rng) }
    }

    /// One case, made shorter if it fails.
    pub(crate) fn case(&mut self, host: &RefCell<Host>, length: usize) -> Result<(), Failure> {
        let told = Cell::new(false);
        let tree = op::scripts(length).new_tree(&mut self.runner).unwrap();
        let test = |ops: Vec<Op>| {
            let done = host.borrow_mut().case(&ops);
            done.map_err(|Mismatch(why)| {
                if !told.replace(true) {
                    eprintln!("{} operations fail and are made fewer: {why}", ops.len());
                }
                TestCaseError::fail(why)
            })
        };
        match self.runner.run_one(tree, test) {
            Ok(_) => Ok(()),
            Err(TestError::Fail(why, ops)) => {
                let failure = Failure { ops, why: why.message().to_owned() };
                Err(without_the_needless(failure, &mut host.borrow_mut()))
            }
            Err(TestError::Abort(why)) => panic!("{why}"),
        }
    }
}

/// Leaves out each operation without which it fails all the same, and makes numbers smaller where that helps: what
/// proptest kept for the sake of others that it then made simpler.
fn without_the_needless(mut failure: Failure, host: &mut Host) -> Failure {
    let end = Instant::now() + SHRINKING;
    let mut fails = |ops: Vec<Op>| {
        let mismatch = if Instant::now() < end { host.case(&ops).err() } else { None };
        mismatch.map(|mismatch| Failure { ops, why: mismatch.0 })
    };
    loop {
        let fewer = (0..failure.ops.len()).rev().map(|at| {
            let mut ops = failure.ops.clone();
            ops.remove(at);
            ops
        });
        let simpler = fewer.chain(op::with_smaller_numbers(&failure.ops)).find_map(&mut fails);
        match simpler {
            Some(simpler) => failure = simpler,
            None => return failure,
        }
    }
}

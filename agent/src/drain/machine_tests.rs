use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;

use super::{
    super::{
        actions::next,
        course::Member,
        identity::Identity,
        service::{Service, Stop},
        verdict::{Verdict, verdict},
    },
    *,
};

#[path = "machine_cases.rs"]
mod cases;

const MS: u64 = 1_000_000;

/// What a service does when it is asked to stop.
#[derive(Clone, Debug)]
struct Behaviour {
    /// Time from the signal to the end of each process, in ms; `None`: it goes on.
    stops: Vec<Option<u64>>,
    prestop: Option<u64>,
    kill: bool,
    late: bool,
    deadline: Option<u64>,
    refused: bool,
    absent: bool,
    /// A child that only shows when the others have gone ends after this.
    straggler: Option<u64>,
    again: bool,
    /// systemd stops it, and is through with its unit so long after its last process.
    unit: Option<u64>,
    /// A user has registered it.
    is_users: bool,
}

fn behaviour() -> impl Strategy<Value = Behaviour> {
    let time = || proptest::option::weighted(0.8, 0..8_000_u64);
    (
        proptest::collection::vec(time(), 1..4),
        (proptest::option::weighted(0.2, 0..6_000_u64), any::<bool>(), proptest::bool::weighted(0.2)),
        proptest::option::weighted(0.4, 100..9_000_u64),
        (proptest::bool::weighted(0.1), proptest::bool::weighted(0.1)),
        (
            proptest::option::weighted(0.1, 0..500_u64),
            proptest::bool::weighted(0.1),
            proptest::option::weighted(0.3, 0..3_000_u64),
            any::<bool>(),
        ),
    )
        .prop_map(
            |(
                stops,
                (prestop, kill, late),
                deadline,
                (refused, absent),
                (straggler, again, unit, is_users),
            )| {
                Behaviour {
                    stops,
                    prestop,
                    kill,
                    late,
                    deadline,
                    refused,
                    absent,
                    straggler,
                    again,
                    unit,
                    is_users,
                }
            },
        )
}

/// What is going to happen.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    Dies(usize, usize),
    PrestopEnds(usize),
    UnitEnds(usize),
}

/// Processes, and an agent that may be killed before and after each thing it does.
struct World {
    behaviours: Vec<Behaviour>,
    machine: Machine,
    journal: Vec<Entry>,
    now: u64,
    due: BTreeSet<(u64, Due)>,
    dead: BTreeMap<(usize, usize), u64>,
    watched: BTreeSet<(usize, usize)>,
    /// How often each process got each signal.
    got: BTreeMap<(usize, usize, i32), u32>,
    /// Things that the agent still does before it is killed.
    crashes: VecDeque<Crash>,
    looked: BTreeSet<usize>,
    /// When systemd was asked to stop the unit of a service.
    asked: BTreeMap<usize, u64>,
    /// When the administrator wants something else.
    gives_up: Option<u64>,
}

/// After so many things the agent is killed, and the next one is there after so many ms.
type Crash = (usize, u64);

/// Time that the next agent takes, in ms.
struct Killed(u64);

impl World {
    fn begin(
        behaviours: Vec<Behaviour>,
        stages: Vec<Vec<usize>>,
        deadline: u64,
        crashes: Vec<Crash>,
    ) -> Self {
        let service = |(at, behaviour): (usize, &Behaviour)| Service {
            stop: Some(Stop {
                signal: Signal::TERM,
                late: behaviour.late.then_some(Signal::INT),
                preset: None,
            }),
            deadline: behaviour.deadline.map(Duration::from_millis),
            on_deadline: if behaviour.kill { OnDeadline::Kill } else { OnDeadline::Report },
            prestop: behaviour.prestop.map(|_| "true".to_owned()),
            uid: if behaviour.is_users { 1000 } else { 0 },
            ..Service::example(&format!("s{at}"))
        };
        let began = 1000 * MS;
        let absent = (0..behaviours.len()).filter(|at| behaviours[*at].absent).collect();
        let begun = Begun {
            id: "d".to_owned(),
            boot_id: "b".to_owned(),
            trigger: "test".to_owned(),
            uid: 0,
            began,
            deadline: began + deadline * MS,
            stages,
            services: behaviours.iter().enumerate().map(service).collect(),
            absent,
        };
        let (machine, actions) = Machine::begin(begun);
        let mut world = Self {
            behaviours,
            machine,
            journal: Vec::new(),
            now: began,
            due: BTreeSet::new(),
            dead: BTreeMap::new(),
            watched: BTreeSet::new(),
            got: BTreeMap::new(),
            crashes: crashes.into(),
            looked: BTreeSet::new(),
            asked: BTreeMap::new(),
            gives_up: None,
        };
        world.perform(actions);
        world
    }

    /// Whether the agent is killed now.
    fn tick(&mut self) -> Result<(), Killed> {
        match self.crashes.front_mut() {
            Some((0, away)) => {
                let away = *away;
                self.crashes.pop_front();
                Err(Killed(away))
            }
            Some((left, _)) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn perform(&mut self, actions: Vec<Action>) {
        if let Err(Killed(away)) = self.try_perform(actions) {
            self.restart(away);
        }
    }

    fn restart(&mut self, away: u64) {
        self.watched.clear();
        // What the agent waited for it does not hear; the processes go on.
        self.due.retain(|(_, due)| matches!(due, Due::Dies(..)));
        self.now += away * MS;
        self.pass();
        let Some(machine) = Machine::replay(self.journal.clone()) else {
            // It was killed before anything was written, and nothing was done: somebody asks again.
            assert!(self.journal.is_empty() && self.got.is_empty());
            let begun = Begun { began: self.now, ..self.machine.begun.clone() };
            let (machine, actions) = Machine::begin(begun);
            self.machine = machine;
            return self.perform(actions);
        };
        self.machine = machine;
        let actions = self.machine.step(self.now, Input::Resume);
        self.perform(actions);
    }

    /// Processes die whether an agent is there or not.
    fn pass(&mut self) {
        let over: Vec<_> = self.due.iter().take_while(|(time, _)| *time <= self.now).cloned().collect();
        for (time, due) in over {
            if let Due::Dies(service, member) = due {
                self.due.remove(&(time, Due::Dies(service, member)));
                self.dead.entry((service, member)).or_insert(time);
            }
        }
    }

    fn try_perform(&mut self, actions: Vec<Action>) -> Result<(), Killed> {
        let (mut todo, mut written) = (VecDeque::new(), Vec::new());
        next(actions, &mut todo, &mut written);
        while let Some(action) = todo.pop_front() {
            self.write(&mut written)?;
            self.tick()?;
            let input = self.act(action);
            self.tick()?;
            if let Some(input) = input {
                next(self.machine.step(self.now, input), &mut todo, &mut written);
            }
        }
        self.write(&mut written)
    }

    fn write(&mut self, entries: &mut Vec<Entry>) -> Result<(), Killed> {
        for entry in std::mem::take(entries) {
            self.tick()?;
            self.journal.push(entry);
            self.tick()?;
        }
        Ok(())
    }

    fn act(&mut self, action: Action) -> Option<Input> {
        match action {
            Action::Journal(_) => unreachable!("it is written"),
            Action::Find(service) => {
                let behaviour = &self.behaviours[service];
                if behaviour.refused {
                    return Some(Input::Refused(service, "no".to_owned()));
                }
                let all = 0..behaviour.stops.len();
                let left: Vec<usize> = all.filter(|at| !self.dead.contains_key(&(service, *at))).collect();
                if behaviour.absent || left.is_empty() {
                    return Some(Input::NotRunning(service));
                }
                let root = left.first();
                let members =
                    left.iter().map(|at| Member { is_root: Some(at) == root, ..member(*at) }).collect();
                let unit = behaviour.unit.map(|_| "a.service".to_owned());
                Some(Input::Found(service, Found { members, unit, ..Found::default() }))
            }
            Action::Prestop(service) => {
                let time = self.behaviours[service].prestop.expect("only with a command");
                self.due.insert((self.now + time * MS, Due::PrestopEnds(service)));
                None
            }
            Action::EndPrestop(service) => {
                self.due.retain(|(_, due)| *due != Due::PrestopEnds(service));
                None
            }
            Action::Send { service, members, signal } => {
                assert!(self.machine.given_up.is_none(), "a signal in a drain that was given up");
                self.check_order(service);
                let mut failed = Vec::new();
                for at in members {
                    let number = self.number(service, at);
                    if self.dead.contains_key(&(service, number)) {
                        failed.push((at, NotSent::Gone));
                        continue;
                    }
                    *self.got.entry((service, number, signal)).or_default() += 1;
                    let dies = match signal {
                        libc::SIGKILL => Some(1),
                        _ => self.behaviours[service].stops.get(number).copied().flatten(),
                    };
                    if let Some(dies) = dies {
                        self.due.insert((self.now + dies * MS, Due::Dies(service, number)));
                        // Its children end when it does, or later.
                        for child in 1..self.behaviours[service].stops.len() {
                            if let Some(later) = self.behaviours[service].stops[child] {
                                self.due.insert((self.now + (dies + later) * MS, Due::Dies(service, child)));
                            }
                        }
                    }
                }
                if self.behaviours[service].unit.is_some() {
                    self.due.insert((self.now, Due::UnitEnds(service)));
                }
                Some(Input::Sent(service, failed))
            }
            Action::StopUnit(service, _) => self.stop_unit(service),
            Action::FindUnit(service, _) => {
                let mut all = 0..self.behaviours[service].stops.len();
                let is_stopped = all.all(|number| self.dead.contains_key(&(service, number)));
                let end = if is_stopped {
                    UnitEnd::Stopped("success".to_owned())
                } else {
                    UnitEnd::Unknown("not asked again".to_owned())
                };
                Some(Input::Unit(service, end))
            }
            Action::Watch(service) => {
                for at in 0..self.machine.runs[service].members.len() {
                    let number = self.number(service, at);
                    self.watched.insert((service, number));
                    if let Some(time) = self.dead.get(&(service, number)) {
                        self.due.insert((*time, Due::Dies(service, number)));
                    }
                }
                None
            }
            Action::Look(service) => {
                if let Some(time) = self.behaviours[service].straggler.take() {
                    let number = self.behaviours[service].stops.len();
                    self.behaviours[service].stops.push(Some(0));
                    self.due.insert((self.now + time * MS, Due::Dies(service, number)));
                }
                // Whatever an agent saw that was killed before it had written that, the next one sees as well.
                let known = &self.machine.runs[service].members;
                let is_known = |number: &usize| {
                    known.iter().any(|one| one.member.identity.pid as usize == *number)
                        || self.dead.contains_key(&(service, *number))
                };
                let numbers = 0..self.behaviours[service].stops.len();
                let more = numbers.filter(|number| !is_known(number));
                let members = more.map(|number| Member { is_root: false, ..member(number) }).collect();
                let again = self.behaviours[service].again.then(|| "it".to_owned());
                self.looked.insert(service);
                let rest = Rest { members, again, ..Rest::default() };
                Some(Input::Looked(service, rest))
            }
        }
    }

    /// systemd is asked to stop a unit, which it does once.
    fn stop_unit(&mut self, service: usize) -> Option<Input> {
        self.check_order(service);
        let left = self.machine.runs[service].left(false);
        if left.iter().all(|at| self.dead.contains_key(&(service, self.number(service, *at)))) {
            return Some(Input::Unit(service, UnitEnd::Unknown("gone".to_owned())));
        }
        let is_first = !self.asked.contains_key(&service);
        let asked = *self.asked.entry(service).or_insert(self.now);
        let Behaviour { stops, unit, .. } = &self.behaviours[service];
        for (number, stops) in stops.iter().enumerate() {
            if let Some(stops) = stops.filter(|_| is_first) {
                self.due.insert((asked + stops * MS, Due::Dies(service, number)));
            }
        }
        if let Some(last) = stops.iter().copied().max().flatten().filter(|_| !stops.contains(&None)) {
            let end = asked + (last + unit.unwrap_or_default()) * MS;
            self.due.insert((end.max(self.now), Due::UnitEnds(service)));
        }
        None
    }

    /// The process that a member is.
    fn number(&self, service: usize, member: usize) -> usize {
        self.machine.runs[service].members[member].member.identity.pid as usize
    }

    /// All services of earlier stages are gone, or given up at their deadline.
    fn check_order(&self, service: usize) {
        let stages = &self.machine.begun.stages;
        let own = stages.iter().position(|stage| stage.contains(&service)).expect("it is in a stage");
        for before in stages[..own].iter().flatten() {
            let run = &self.machine.runs[*before];
            let all_dead = (0..self.behaviours[*before].stops.len())
                .all(|number| self.dead.contains_key(&(*before, number)));
            let given_up = run.is_late || run.refused.is_some() || self.behaviours[*before].absent;
            assert!(all_dead || given_up, "{before} is there, and {service} is asked to stop");
        }
    }

    fn run(&mut self) {
        let limit = self.machine.begun.deadline + 60_000 * MS;
        while self.machine.finished.is_none() {
            let due = self.due.first().map(|(time, _)| *time);
            let next = [due, self.machine.next(), self.gives_up].into_iter().flatten().min();
            let next = next.unwrap_or_else(|| panic!("nothing will happen: {:#?}", self.machine.runs));
            self.now = self.now.max(next);
            assert!(self.now < limit, "it does not end: {:#?}", self.machine.runs);
            if self.gives_up.take_if(|time| *time <= self.now).is_some() {
                let actions = self.machine.step(self.now, Input::GiveUp("test".to_owned()));
                self.perform(actions);
                continue;
            }
            let input = match due.filter(|due| *due <= self.now) {
                Some(_) => {
                    let (time, due) = self.due.pop_first().expect("it is due");
                    match due {
                        Due::Dies(service, number) => {
                            self.dead.entry((service, number)).or_insert(time);
                            if !self.watched.contains(&(service, number)) {
                                continue;
                            }
                            let members = &self.machine.runs[service].members;
                            let at =
                                members.iter().position(|one| one.member.identity.pid as usize == number);
                            match at {
                                Some(at) => {
                                    let fact = Fact::Exit { member: at, status: 0, time: 0 };
                                    let actions = self.machine.step(self.now, Input::Seen(service, fact));
                                    self.perform(actions);
                                    if !self.watched.contains(&(service, number)) {
                                        // The agent was killed, and the next one knows.
                                        continue;
                                    }
                                    Input::Gone(service, at)
                                }
                                None => continue,
                            }
                        }
                        Due::PrestopEnds(service) => Input::PrestopEnded(service, None),
                        Due::UnitEnds(service) => {
                            Input::Unit(service, UnitEnd::Stopped("success".to_owned()))
                        }
                    }
                }
                None => Input::Time,
            };
            let is_time = matches!(input, Input::Time);
            let actions = self.machine.step(self.now, input);
            let next = self.machine.next();
            assert!(
                !is_time || !actions.is_empty() || next > Some(self.now),
                "it asks for a time and does nothing"
            );
            self.perform(actions);
        }
    }
}

fn member(number: usize) -> Member {
    let identity = Identity::example(number as u32);
    Member { identity, is_root: number == 0, is_descendant: false, command: String::new() }
}

/// Places in stages, in order.
fn staged(count: usize, cuts: &[bool]) -> Vec<Vec<usize>> {
    let mut stages: Vec<Vec<usize>> = Vec::new();
    for (at, cut) in cuts.iter().enumerate().take(count) {
        match stages.last_mut() {
            Some(stage) if !*cut => stage.push(at),
            _ => stages.push(vec![at]),
        }
    }
    stages
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    /// Whatever services do, whenever the agent is killed and the drain is given up: it ends, in order and in time, and no
    /// process gets a signal twice, nor KILL unless that was asked for.
    #[test]
    fn a_drain_ends_in_order_and_signals_once(
        behaviours in proptest::collection::vec(behaviour(), 1..6),
        cuts in proptest::collection::vec(any::<bool>(), 6),
        deadline in 100..20_000_u64,
        crashes in proptest::collection::vec((0..40_usize, 0..10_000_u64), 0..4),
        gives_up in proptest::option::weighted(0.3, 0..10_000_u64),
    ) {
        let stages = staged(behaviours.len(), &cuts);
        let kills: Vec<bool> = behaviours.iter().map(|behaviour| behaviour.kill).collect();
        let is_killed = !crashes.is_empty();
        let mut world = World::begin(behaviours, stages, deadline, crashes);
        world.gives_up = gives_up.map(|time| world.machine.begun.began + time * MS);
        world.run();
        let is_given_up = world.machine.given_up.is_some();
        for ((service, member, signal), times) in &world.got {
            prop_assert!(*times == 1, "process {} of {} got {} {} times", member, service, signal, times);
            prop_assert!(*signal != libc::SIGKILL || kills[*service]);
        }
        let ended = world.machine.ended.expect("it is finished");
        let kill_grace = nanos(KILL_GRACE) * world.machine.begun.stages.len() as u64;
        prop_assert!(is_killed || ended <= world.machine.begun.deadline + kill_grace, "ended late");
        prop_assert!(is_killed || !is_given_up || Some(ended) == world.machine.cancelled, "not at once");
        // What is told is what happened.
        for (service, run) in world.machine.runs.iter().enumerate() {
            let found = verdict(run);
            prop_assert!(found.is_some(), "{:?}", run);
            // What KILL has ended did not just take too long, however late the agent was.
            let got_kill = |number: &usize| world.got.contains_key(&(service, *number, libc::SIGKILL));
            if !is_given_up && (0..world.behaviours[service].stops.len()).all(|number| got_kill(&number)) {
                prop_assert!(!matches!(found, Some((Verdict::Timeout, _))), "killed, and called late: {:?}", run);
            }
            let is_asked = run.signalled.is_some() || run.refused.is_some();
            // Its time may have passed while no agent was there, or the command before took half of what was next to nothing.
            let is_short = is_killed || run.grant < TOO_LATE * 2;
            let had_no_time = is_short && run.is_late && run.phase == Phase::Settled;
            prop_assert!(run.members.is_empty() || is_asked || had_no_time, "found, and never asked to stop: {:?}", run);
            if let Some((Verdict::Clean, _)) = found {
                let all = 0..world.behaviours[service].stops.len();
                let gone = all.clone().all(|number| world.dead.contains_key(&(service, number)));
                prop_assert!(gone || world.behaviours[service].absent, "clean, and something is left of {}", service);
                let roots = run.members.iter().filter(|one| one.member.is_root);
                prop_assert!(roots.clone().all(|one| one.status == Some(0)), "clean, and nobody saw it");
            }
        }
        // Another agent would read the same.
        let again = Machine::replay(world.journal.clone()).expect("it was written");
        prop_assert_eq!(again.finished, world.machine.finished);
    }
}

fn simple(stop: Option<u64>) -> Behaviour {
    Behaviour {
        stops: vec![stop],
        prestop: None,
        kill: false,
        late: false,
        deadline: None,
        refused: false,
        absent: false,
        straggler: None,
        again: false,
        unit: None,
        is_users: false,
    }
}

#[test]
fn each_stage_begins_as_soon_as_the_one_before_is_gone() {
    let behaviours = vec![simple(Some(300)), simple(Some(200)), simple(Some(100))];
    let mut world = World::begin(behaviours, vec![vec![0], vec![1, 2]], 30_000, Vec::new());
    world.run();
    let machine = &world.machine;
    let ended = machine.ended.unwrap() - machine.begun.began;
    assert_eq!(ended, 500 * MS, "the slowest chain, and nothing more");
    assert_eq!(machine.finished.unwrap() - machine.begun.began, 500 * MS + nanos(SETTLE));
    assert_eq!(machine.runs[1].signalled.unwrap() - machine.begun.began, 300 * MS);
    let verdicts = machine.runs.iter().map(|run| verdict(run).unwrap().0);
    assert!(verdicts.eq([Verdict::Clean; 3]));
    // Nobody saw how it ended.
    let mut run = machine.runs[0].clone();
    run.members[0].status = None;
    assert_eq!(verdict(&run).unwrap().0, Verdict::Lossy);
}

/// What was written was once not in the order in which it had happened: the end before what led to it.
#[test]
fn an_agent_that_is_killed_late_leaves_a_journal_that_is_in_order() {
    for first in 0..40 {
        let kills = Behaviour {
            stops: vec![None, None],
            kill: true,
            late: true,
            deadline: Some(143),
            ..simple(None)
        };
        let behaviours = vec![kills, simple(None)];
        let mut world =
            World::begin(behaviours, vec![vec![0], vec![1]], 5843, vec![(25, 700), (21, 700), (first, 700)]);
        world.run();
        assert!(world.machine.ended.is_some(), "{:#?}", world.journal);
    }
}

#[test]
fn what_does_not_stop_gets_its_late_signal_and_then_its_end() {
    let behaviours = vec![Behaviour { late: true, kill: true, deadline: Some(3_000), ..simple(None) }];
    let mut world = World::begin(behaviours, vec![vec![0]], 30_000, Vec::new());
    world.run();
    let signals = &world.machine.runs[0].signals;
    assert_eq!(signals[..], [libc::SIGTERM, libc::SIGINT, libc::SIGKILL]);
    let began = world.machine.begun.began;
    assert_eq!(world.machine.runs[0].gone.unwrap() - began, 3_001 * MS);
}

#[test]
fn a_cancelled_drain_finishes_its_stage_and_begins_no_other() {
    let behaviours = vec![simple(Some(300)), simple(Some(200))];
    let mut world = World::begin(behaviours, vec![vec![0], vec![1]], 30_000, Vec::new());
    let actions = world.machine.step(world.now, Input::Cancel);
    world.perform(actions);
    world.run();
    assert!(world.machine.runs[0].gone.is_some() && world.machine.runs[1].signalled.is_none());
    assert_eq!(world.machine.runs[1].refused.as_deref(), Some("cancelled before its stage"));
}

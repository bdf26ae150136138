//! A storm in one cgroup: the counts of another stay exact, the ring keeps room for it, and the agent stays within
//! its bounds.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use plumb::{
    decode::Event,
    kernel::{Fds, Filter, Kernel, Plan, Seam},
};
use plumb_common::counts;
use serde_json::Value;

use crate::support::{Agent, Workload, assert_is_proc, proc_truth};

/// A cgroup of the test's own, where there is a hierarchy for it.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> Self {
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let root = mounts.lines().find_map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            (words[2] == "cgroup2").then(|| words[1].to_owned())
        });
        let root = root.unwrap_or_else(|| {
            let root = std::env::temp_dir().join("cgroup2");
            fs::create_dir_all(&root).unwrap();
            let done = Command::new("mount").args(["-t", "cgroup2", "none"]).arg(&root).status().unwrap();
            assert!(done.success());
            root.to_str().unwrap().to_owned()
        });
        let path = PathBuf::from(root).join(format!("plumb-test-{}-{name}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn take(&self, pid: u32) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    /// Starts a workload that is in it with all that it starts.
    fn start_ready(&self, arguments: &[&str]) -> Workload {
        let mut procs = File::create(self.0.join("cgroup.procs")).unwrap();
        let mut command = Command::new(Workload::program());
        command.args(arguments);
        // SAFETY: the child writes and does nothing else. 0 is whoever writes.
        unsafe { command.pre_exec(move || procs.write_all(b"0")) };
        Workload::start_command(&mut command).ready()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Empty once the processes are gone.
        for _ in 0..50 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn a_storm_in_one_cgroup_leaves_room_in_the_ring_to_another() {
    const PAIRS: u64 = 20_000;
    let seams = [Seam::Functions, Seam::SysExit];
    let mut tried = 0;
    for seam in seams {
        // `quiet` first: a cgroup can be removed only when it is empty.
        let (loud, quiet) = (Cgroup::new("loud"), Cgroup::new("quiet"));
        let mut storm = Workload::start_ready(&["fd-storm", &PAIRS.to_string()]);
        let mut other = Workload::start_ready(&["fd-storm", "10"]);
        loud.take(storm.pid());
        quiet.take(other.pid());
        let mut comm = [0; 16];
        comm[..8].copy_from_slice(b"workload");
        let plan = Plan {
            programs: Some(&[]),
            fds: Fds::All(Some(seam)),
            ring_bytes: 64 << 10,
            ..Plan::watch(Filter { tgid: None, comm: Some(comm) })
        };
        let Ok(mut kernel) = Kernel::load_all(plan) else { continue };
        tried += 1;
        let mut ring = kernel.ring().unwrap();
        // Nobody reads meanwhile.
        storm.stage();
        other.stage();
        let of_quiet = |events: Vec<Event>| {
            events.iter().filter(|event| event.header().process.tgid == other.pid()).count()
        };
        let events = ring.drain(usize::MAX);
        let counted = kernel.counts().unwrap();
        let of = |outcome| counted.of(counts::FD, outcome);
        assert_eq!(of_quiet(events), 20, "{seam:?} {counted:?}");
        assert!(of(counts::QUOTA) > PAIRS, "{seam:?} {counted:?}");
        drop((storm, other));
        drop((loud, quiet));
    }
    assert!(tried > 0, "no way of following fds");
}

/// What the agent believes of a process.
fn known(agent: &Agent, pid: u32) -> Option<(u64, u64)> {
    let table: Value = serde_json::from_str(&agent.get_control("/v1/processes").unwrap().1).unwrap();
    let found = table["processes"].as_array().unwrap().iter().find(|process| process["pid"] == pid)?;
    Some((found["fds"].as_u64().unwrap(), found["threads"].as_u64().unwrap()))
}

#[test]
fn a_storm_of_forks_names_and_fds_in_one_cgroup_leaves_the_counts_of_another_exact() {
    // About half of the room is free before the crowd, which takes it however slow the storm is.
    let capacity = 2 * proc_truth().len() + 100;
    let agent = Agent::start(&["--max-processes", &capacity.to_string(), "--fd-events", "always"]);
    let (loud, quiet) = (Cgroup::new("storm"), Cgroup::new("held"));
    let mut fds = loud.start_ready(&["fd-storm", "300000"]);
    let listened = agent.events(&format!("?pid={}", fds.pid()));
    let crowd = loud.start_ready(&["hold-processes", &capacity.to_string()]);
    let storm = loud.start_ready(&["fork-storm", "2000"]);
    agent.wait_metric("plumb_untracked_fds", |untracked| untracked > 0.0);
    let end = Instant::now() + Duration::from_secs(60);
    while !agent.get("/readyz").unwrap().1.contains("are beyond the bound") {
        assert!(Instant::now() < end, "{}", agent.get("/readyz").unwrap().1);
        thread::sleep(Duration::from_millis(100));
    }
    fds.go_on();
    // Its cgroup had nothing when the room was taken.
    let held = Workload::start_ready(&["hold-fds", "123"]);
    let threads = Workload::start_ready(&["hold-threads", "7"]);
    quiet.take(held.pid());
    quiet.take(threads.pid());
    let own_fds = fs::read_dir(format!("/proc/{}/fd", held.pid())).unwrap().count() as u64;
    let began = Instant::now();
    while known(&agent, held.pid()).is_none() || known(&agent, threads.pid()).is_none() {
        // On a slow machine there are up to 4 s between passes.
        assert!(began.elapsed() < Duration::from_secs(60), "they find no room: {}", agent.log());
        thread::sleep(Duration::from_millis(200));
    }
    // As often as that, not for as long: on a slow machine an answer takes seconds.
    for _ in 0..5 {
        thread::sleep(Duration::from_millis(1500));
        assert_eq!(known(&agent, held.pid()), Some((own_fds, 1)));
        assert_eq!(known(&agent, threads.pid()).map(|known| known.1), Some(8));
    }
    let memory = agent.metric("process_resident_memory_bytes");
    assert!(memory < 100e6, "{memory}");
    drop((storm, fds, listened, crowd));
    agent.wait_metric("plumb_untracked_processes", |untracked| untracked == 0.0);
    drop((held, threads));
    drop((loud, quiet));
}

/// Starts in a storm; each must find the truth at once.
#[test]
fn an_agent_that_starts_in_a_fork_storm_knows_every_process_that_stays() {
    let starts = std::env::var("PLUMB_STARTS").map_or(5, |starts| starts.parse::<usize>().unwrap());
    let pid_max = "/proc/sys/kernel/pid_max";
    let usual = fs::read_to_string(pid_max).unwrap();
    // Only on a kernel of the test's own: elsewhere others need their pids.
    let own_kernel = std::env::var_os("PLUMB_OWN_KERNEL").is_some();
    let storm = Workload::start_ready(&["fork-storm", "100"]);
    let held = [10, 100, 1000].map(|fds: u32| Workload::start_ready(&["hold-fds", &fds.to_string()]));
    let threads = Workload::start_ready(&["hold-threads", "20"]);
    if own_kernel {
        fs::write(pid_max, "600").unwrap();
    }
    for start in 0..starts {
        let before = proc_truth();
        let agent = Agent::start(&[]);
        let table: Value = serde_json::from_str(&agent.get_control("/v1/processes").unwrap().1).unwrap();
        assert_eq!(table["schema"], "plumb/v1");
        let compared = assert_is_proc(&before, &table);
        assert!(compared >= 5, "start {start}: only {compared} compared");
        if (start + 1) % 50 == 0 {
            eprintln!("{} starts", start + 1);
        }
    }
    if own_kernel {
        fs::write(pid_max, usual).unwrap();
    }
    drop((storm, held, threads));
}

//! The agent follows fds on demand: who listens gets events, nothing is lost unseen, and it notices when it is
//! blind.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::net::UnixStream,
    },
    thread,
    time::{Duration, Instant},
};

use aya::maps::{HashMap, Map, MapData};
use rustix::process::{Resource, Rlimit};
use serde_json::Value;

use plumb::kernel::{Fds, Filter, Kernel, Plan, Seam};

use plumb_common::event::Watch;

use crate::support::{Agent, TempDir, Workload, kernel_is_before};

const ATTACHED: [&str; 2] =
    ["plumb_fd_events_attached{via=\"functions\"}", "plumb_fd_events_attached{via=\"sys_exit\"}"];

/// Whether the agent's fd programs are attached, whatever they are.
fn is_attached(agent: &Agent) -> bool {
    let page = agent.get("/metrics").unwrap().1;
    ATTACHED.iter().any(|series| page.contains(&format!("{series} 1\n")))
}

fn wait_attached(agent: &Agent, wanted: bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while is_attached(agent) != wanted {
        assert!(Instant::now() < end, "{}", agent.log());
        thread::sleep(Duration::from_millis(100));
    }
}

/// What a stream had to say.
#[derive(Debug, Default)]
struct Heard {
    /// About fds.
    events: u64,
    /// Missing because nobody read.
    missed: u64,
    /// Lost by anybody on the way from the kernel.
    lost: u64,
}

impl Heard {
    fn to_end(stream: BufReader<UnixStream>) -> Self {
        let mut heard = Self::default();
        for line in stream.lines() {
            let event: Value = serde_json::from_str(&line.unwrap()).unwrap();
            match (event["event"].as_str().unwrap(), event["by"].as_str()) {
                ("gap", Some("reader")) => heard.missed += event["lost"].as_u64().unwrap(),
                ("gap", Some("kernel")) => heard.lost += event["lost"].as_u64().unwrap(),
                ("open" | "close", None) => heard.events += 1,
                _ => {}
            }
        }
        heard
    }

    /// All of them, but for those of which the kernel says that it did not run a program.
    fn assert_all(&self, made: u64) {
        assert!(self.events <= made && self.events + self.lost >= made, "{self:?} of {made}");
        assert_eq!(self.missed, 0);
    }
}

#[test]
fn fds_are_followed_while_somebody_listens_and_the_stream_ends_with_the_process() {
    let agent = Agent::start(&["--fd-events", "watched"]);
    // Before 5.13 a program on a function can be attached once, and so it stays.
    let stays = kernel_is_before((5, 13)) && is_attached(&agent);
    assert!(stays || !is_attached(&agent));
    let mut storm = Workload::start_ready(&["fd-storm", "1000"]);
    let stream = agent.events(&format!("?pid={}", storm.pid()));
    let abandoned = agent.events("");
    wait_attached(&agent, true);
    agent.wait_metric("plumb_watched_processes", |watched| watched == 1.0);
    storm.stage();
    storm.end();
    Heard::to_end(stream).assert_all(2000);
    assert!(is_attached(&agent), "one reader is left");
    drop(abandoned);
    wait_attached(&agent, stays);
    agent.wait_metric("plumb_watched_processes", |watched| watched == 0.0);
    let page = agent.get("/metrics").unwrap().1;
    for cause in ["fd_open_unseen", "fd_close_unseen"] {
        assert!(page.contains(&format!("plumb_drift_total{{cause=\"{cause}\"}} 0\n")), "{page}");
    }
    let refused = |query: &str| agent.get_control(&format!("/v1/events{query}")).unwrap();
    assert_eq!(refused("?pid=4194304"), (404, "no process has pid 4194304\n".to_owned()));
    assert_eq!(refused("?pid=x").0, 400);
}

#[test]
fn a_reader_that_does_not_keep_up_is_told_of_each_gap_and_the_ledger_balances() {
    const PAIRS: u64 = 100_000;
    let agent = Agent::start(&["--fd-events", "always"]);
    wait_attached(&agent, true);
    let mut storm = Workload::start_ready(&["fd-storm", &PAIRS.to_string()]);
    let slow = agent.events(&format!("?pid={}", storm.pid()));
    agent.wait_metric("plumb_watched_processes", |watched| watched == 1.0);
    // Nobody reads while it storms; the sockets and the queue hold a part.
    storm.stage();
    let missed = agent.wait_metric("plumb_subscriber_missed_events_total", |missed| missed > 0.0);
    storm.end();
    let heard = Heard::to_end(slow);
    assert!(heard.missed as f64 >= missed, "{heard:?} of {missed}");
    // Its end may be among the missing.
    let told = heard.events + heard.missed;
    assert!(told <= 2 * PAIRS + 1 && told + heard.lost >= 2 * PAIRS, "{heard:?}");

    // What was sent was consumed, and what happened was sent, filtered or lost by a known cause. The agent has events of
    // its own whenever it is asked, so what a page says was sent must be consumed on the next one.
    let end = Instant::now() + Duration::from_secs(20);
    let mut sent_before = f64::INFINITY;
    loop {
        let page = agent.get("/metrics").unwrap().1;
        let sum = |name: &str| -> f64 {
            let lines = page.lines().filter(|line| line.starts_with(name));
            lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
        };
        let (sent, consumed) = (sum("plumb_events_sent_total"), sum("plumb_events_consumed_total"));
        let lost = sum("plumb_events_lost_total");
        // What the kernel did not run no program saw.
        let unseen = sum("plumb_events_lost_total{source=\"any\"");
        let elsewhere = sum("plumb_events_filtered_total") + sum("plumb_events_forged_total") + lost - unseen;
        let is_consumed = (sent_before..=sent).contains(&consumed);
        if is_consumed && sum("plumb_events_seen_total") == sent + elsewhere {
            assert!(sent >= 2.0 * PAIRS as f64 - lost, "{page}");
            break;
        }
        sent_before = sent;
        assert!(Instant::now() < end, "{page}");
        thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn an_agent_whose_fd_events_stay_away_says_that_it_is_blind() {
    let agent = Agent::start(&["--fd-events", "always"]);
    wait_attached(&agent, true);
    thread::sleep(Duration::from_secs(2));
    agent.wait_metric("plumb_fd_canary_missed", |missed| missed == 0.0);
    // From outside, the map that says whose events are wanted is made read-only.
    let map = map_of(agent.child.pid(), BPF_MAP_TYPE_ARRAY, size_of::<u64>());
    freeze(map.fd().as_fd());
    let began = Instant::now();
    let blind = "fd programs are attached but nothing is seen of them";
    while !agent.get("/readyz").unwrap().1.contains(blind) {
        assert!(began.elapsed() < Duration::from_secs(20), "{}", agent.get("/readyz").unwrap().1);
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_watched_process_that_somebody_takes_away_is_watched_again() {
    let agent = Agent::start(&["--fd-events", "watched"]);
    let mut storm = Workload::start_ready(&["fd-storm", "500"]);
    let stream = agent.events(&format!("?pid={}", storm.pid()));
    agent.wait_metric("plumb_watched_processes", |watched| watched == 1.0);
    let map = map_of(agent.child.pid(), BPF_MAP_TYPE_HASH, size_of::<Watch>());
    let mut watched: HashMap<_, u32, [u64; 3]> = HashMap::try_from(Map::HashMap(map)).unwrap();
    watched.remove(&storm.pid()).unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    while watched.get(&storm.pid(), 0).is_err() {
        assert!(Instant::now() < end, "{}", agent.log());
        thread::sleep(Duration::from_millis(20));
    }
    storm.stage();
    storm.end();
    Heard::to_end(stream).assert_all(1000);
}

#[test]
fn a_process_for_which_there_is_no_room_is_not_watched_and_that_is_said() {
    let agent = Agent::start(&["--fd-events", "watched"]);
    let map = map_of(agent.child.pid(), BPF_MAP_TYPE_HASH, size_of::<Watch>());
    let mut watched: HashMap<_, u32, [u64; 3]> = HashMap::try_from(Map::HashMap(map)).unwrap();
    // Beyond any pid.
    let full = (0x4000_0000..).take_while(|pid| watched.insert(*pid, [1, 0, 0], 0).is_ok()).count();
    assert_eq!(full, plumb_common::limits::MAX_WATCHED as usize);
    let storm = Workload::start_ready(&["fd-storm", "1"]);
    let stream = agent.events(&format!("?pid={}", storm.pid()));
    agent.wait_metric("plumb_watch_refused_processes", |refused| refused > 0.0);
    assert_eq!(agent.metric("plumb_watched_processes"), 0.0);
    assert!(agent.get("/readyz").unwrap().1.contains("not watched: there is no room"));
    // Nobody was dropped for it; once there is room it is watched.
    assert_eq!(watched.keys().count(), full);
    watched.remove(&0x4000_0000).unwrap();
    agent.wait_metric("plumb_watched_processes", |watched| watched == 1.0);
    drop(stream);
}

const BPF_MAP_TYPE_HASH: u32 = 1;
const BPF_MAP_TYPE_ARRAY: u32 = 2;

/// The one map of this type and size of value that a process has open, from /proc/PID/fdinfo.
fn map_of(pid: u32, kind: u32, value: usize) -> MapData {
    let infos = fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
    let texts = infos.filter_map(|info| fs::read_to_string(info.unwrap().path()).ok());
    let field = |text: &str, name: &str| -> Option<u32> {
        text.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()
    };
    let is_it = |text: &String| {
        field(text, "map_type:") == Some(kind) && field(text, "value_size:") == Some(value as u32)
    };
    let found: Vec<u32> = texts.filter(is_it).filter_map(|text| field(&text, "map_id:")).collect();
    assert_eq!(found.len(), 1, "{found:?}");
    MapData::from_id(found[0]).unwrap()
}

/// `BPF_MAP_FREEZE`, since 5.2: user space cannot write the map any more.
fn freeze(map: BorrowedFd<'_>) {
    const BPF_MAP_FREEZE: i64 = 22;
    let attributes = [map.as_raw_fd() as u32];
    // SAFETY: the attributes of the command are one fd.
    let done = unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_FREEZE, attributes.as_ptr(), 4) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn a_pass_that_fails_is_counted_and_the_next_one_heals_it() {
    let agent = Agent::start(&[]);
    let pid = rustix::process::Pid::from_raw(agent.child.pid() as i32);
    let whole = rustix::process::prlimit(pid, Resource::Nofile, Rlimit { current: Some(4), maximum: None });
    // Only the soft limit may be changed everywhere.
    let whole = whole.or_else(|_| {
        let now = rustix::process::getrlimit(Resource::Nofile);
        rustix::process::prlimit(pid, Resource::Nofile, Rlimit { current: Some(4), maximum: now.maximum })
    });
    let whole = whole.unwrap();
    // Without a free fd it cannot answer either. On a slow machine there are up to 4 s between passes.
    thread::sleep(Duration::from_secs(5));
    rustix::process::prlimit(pid, Resource::Nofile, whole).unwrap();
    let failed = agent.wait_metric("plumb_passes_failed_total", |failed| failed >= 1.0);
    assert!(failed < 10.0, "{failed}");
    assert!(agent.log().contains("the pass over all processes failed"), "{}", agent.log());
    let passes = agent.metric("plumb_passes_total");
    agent.wait_metric("plumb_passes_total", |later| later > passes);
    assert_eq!(agent.metric("plumb_worker_restarts_total{worker=\"observer\"}"), 0.0);
}

#[test]
fn origins_follow_a_leak_in_an_exec_and_a_fork_heavy_process_without_drift() {
    let agent = Agent::start(&["--fd-events", "always"]);
    let dir = TempDir::new();
    let mut calls = Workload::start_ready(&["fd-calls", &dir.join("")]);
    let _stream = agent.events(&format!("?pid={}", calls.pid()));
    agent.wait_metric("plumb_watched_processes", |watched| watched == 1.0);
    thread::sleep(Duration::from_millis(1200));
    calls.stage();
    thread::sleep(Duration::from_millis(2500));
    let page = agent.get("/metrics").unwrap().1;
    for cause in ["fd_open_unseen", "fd_close_unseen"] {
        assert!(page.contains(&format!("plumb_drift_total{{cause=\"{cause}\"}} 0\n")), "{page}");
    }
    calls.end();
}

/// Runs of all programs that this process has open, from its fdinfo (`kernel.bpf_stats_enabled`, since 5.1).
fn runs() -> u64 {
    let infos = fs::read_dir("/proc/self/fdinfo").unwrap();
    let texts = infos.filter_map(|info| fs::read_to_string(info.ok()?.path()).ok());
    let count = |text: String| -> Option<u64> {
        text.lines().find_map(|line| line.strip_prefix("run_cnt:"))?.trim().parse().ok()
    };
    texts.filter_map(count).sum()
}

#[test]
fn the_functions_cost_other_syscalls_nothing() {
    let filter = Filter { tgid: Some(1), comm: None };
    let plan = Plan { programs: Some(&[]), fds: Fds::All(Some(Seam::Functions)), ..Plan::watch(filter) };
    let kernel = Kernel::load_all(plan);
    if std::env::var_os("PLUMB_OWN_KERNEL").is_none() {
        // Elsewhere others run too, and the functions may be refused.
        assert!(kernel.is_ok() || kernel.unwrap_err().to_string().contains("refused"));
        return;
    }
    let kernel = kernel.unwrap();
    fs::write("/proc/sys/kernel/bpf_stats_enabled", "1").unwrap();
    let mut calls = Workload::start_ready(&["getppid", "1000000"]);
    let mut spent = Vec::new();
    for _ in 0..2 {
        let before = runs();
        calls.stage();
        spent.push(runs() - before);
    }
    fs::write("/proc/sys/kernel/bpf_stats_enabled", "0").unwrap();
    assert!(spent[0] > 0, "reading the count opens files, and that is counted");
    assert_eq!(spent[0], spent[1], "with a million getppid as without");
    drop(kernel);
}

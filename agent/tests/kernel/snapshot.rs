//! The one-shot commands against /proc.

use std::{
    collections::BTreeMap,
    fs,
    os::fd::AsRawFd,
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::Value;

use crate::support::{Workload, assert_ps_is_proc, plumb, plumb_json, truth_of};

fn process(pid: u32) -> Value {
    let document = plumb_json(&["ps"]);
    let found = document["processes"].as_array().unwrap().iter().find(|process| process["pid"] == pid);
    found.unwrap_or_else(|| panic!("{pid} is missing")).clone()
}

#[test]
fn doctor_attaches_every_program() {
    let document = plumb_json(&["doctor"]);
    let programs = document["programs"].as_array().unwrap();
    assert_eq!(programs.len(), 21);
    let verdict = |name: &str| {
        programs.iter().find(|program| program["name"] == name).unwrap()["verdict"].as_str().unwrap()
    };
    let functions = ["fd_install", "do_dup2", "filp_flush"].map(verdict);
    // Before 5.13 they stay attached.
    let by_functions = functions == ["loaded"; 3] || functions == ["attached"; 3];
    // Where the functions are refused, sys_exit stands in for them, and the other way round.
    assert_eq!(verdict("sys_exit"), if by_functions { "substituted" } else { "loaded" });
    assert!(by_functions || functions == ["substituted"; 3], "{functions:?}");
    // The kernels of the test's own all have them.
    assert!(by_functions || std::env::var_os("PLUMB_OWN_KERNEL").is_none());
    // Of each of these the first that this kernel has stands in for the others.
    let sockets = [
        &["sock_send_length", "tcp_sendmsg", "do_tcp_sendpages"][..],
        &["tcp_send_reset", "tcp_v4_send_reset", "tcp_v6_send_reset"],
        &["signal_deliver", "inet_sock_set_state"],
    ];
    for ways in sockets {
        let loaded = ways.iter().filter(|name| verdict(name) == "loaded").count();
        let others = ways.iter().filter(|name| ["substituted", "unsupported"].contains(&verdict(name)));
        assert!(loaded > 0 && loaded + others.count() == ways.len(), "{ways:?}: {document}");
    }
    let others = programs.iter().filter(|program| {
        let is = |names: &[&str]| names.iter().any(|name| program["name"] == *name);
        let gives = program["gives"].as_str().unwrap();
        !gives.starts_with("fd events") && !sockets.iter().any(|ways| is(ways))
    });
    for program in others {
        assert_eq!(program["verdict"], "attached", "{program}");
    }
    for check in document["checks"].as_array().unwrap() {
        assert_eq!(check["ok"], true, "{check}");
    }
}

#[test]
fn ps_is_proc_also_for_many_threads_and_for_a_lowered_limit() {
    let threads = Workload::start_ready(&["hold-threads", "500"]);
    let limited = Workload::start_ready(&["hold-threads", "1"]);
    let pid = Pid::from_raw(limited.pid() as i32);
    prlimit(pid, Resource::Nofile, Rlimit { current: Some(77), maximum: Some(99) }).unwrap();
    assert!(assert_ps_is_proc() > 5);
    assert_eq!(process(threads.pid())["threads"], 501);
    assert_eq!(process(limited.pid())["fd_limit"], 77);
}

#[test]
fn fds_up_to_the_hard_limit_are_counted_right() {
    // 900,000 where the limit allows it (the virtual machines), else all there may be.
    let hard = rustix::process::getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let wanted = if hard > 1_000_000 { 900_000 } else { 0 };
    let holder = Workload::start_ready(&["hold-fds", &wanted.to_string()]);
    let truth = truth_of(holder.pid()).unwrap().fds;
    assert!(if wanted == 0 { truth == hard } else { truth >= wanted }, "{truth} fds, limit {hard}");
    assert_eq!(process(holder.pid())["fds"], truth);
    if truth < 100_000 {
        // Naming each of 900,000 takes an emulated machine many minutes.
        let document = plumb_json(&["fds", "--pid", &holder.pid().to_string()]);
        assert_eq!(document["fds"].as_array().unwrap().len() as u64, truth);
    }
}

#[test]
fn a_process_whose_leader_has_exited_keeps_its_fds() {
    let workload = Workload::start_ready(&["leader-exits"]);
    // The heir says that it is ready while the leader may still be on its way out.
    let end = Instant::now() + Duration::from_secs(30);
    while !truth_of(workload.pid()).unwrap().leaderless {
        assert!(Instant::now() < end, "the leader does not exit");
        thread::sleep(Duration::from_millis(10));
    }
    let heir = fs::read_dir(format!("/proc/{}/task", workload.pid())).unwrap();
    let heir = heir.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let heir = heir.into_iter().find(|tid| *tid != workload.pid().to_string()).unwrap();
    let fds = fs::read_dir(format!("/proc/{}/task/{heir}/fd", workload.pid())).unwrap().count();
    assert!(fds >= 3);
    assert_eq!(truth_of(workload.pid()).map_or(0, |truth| truth.fds), 0, "/proc loses sight of them");
    let shown = process(workload.pid());
    assert_eq!((shown["fds"].as_u64(), shown["threads"].as_u64()), (Some(fds as u64), Some(3)), "{shown}");
    let document = plumb_json(&["fds", "--pid", &workload.pid().to_string()]);
    assert_eq!(document["fds"].as_array().unwrap().len(), fds);
}

#[test]
fn fds_and_threads_are_named_as_in_proc() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
    let file = fs::File::open("/proc/self/status").unwrap();
    let memory = rustix::fs::memfd_create("plumb-test", rustix::fs::MemfdFlags::empty()).unwrap();
    let pid = std::process::id();
    let document = plumb_json(&["fds", "--pid", &pid.to_string()]);
    let shown: BTreeMap<i64, (&str, &str)> = document["fds"]
        .as_array()
        .unwrap()
        .iter()
        .map(|fd| {
            (fd["fd"].as_i64().unwrap(), (fd["kind"].as_str().unwrap(), fd["target"].as_str().unwrap()))
        })
        .collect();
    let of = |fd: i32| shown[&i64::from(fd)];
    let address = listener.local_addr().unwrap();
    assert_eq!(of(listener.as_raw_fd()), ("socket", format!("tcp {address} LISTEN").as_str()));
    assert_eq!(of(pipe.as_raw_fd()).0, "pipe");
    let link = fs::read_link(format!("/proc/self/fd/{}", pipe.as_raw_fd())).unwrap();
    assert_eq!(of(pipe.as_raw_fd()).1, link.to_str().unwrap());
    assert_eq!(of(event.as_raw_fd()), ("eventfd", "anon_inode:[eventfd]"));
    assert_eq!(of(file.as_raw_fd()), ("file", format!("/proc/{pid}/status").as_str()));
    assert_eq!(of(memory.as_raw_fd()), ("file", "/memfd:plumb-test (deleted)"));

    let workload = Workload::start_ready(&["hold-threads", "3"]);
    let document = plumb_json(&["threads", "--pid", &workload.pid().to_string()]);
    let threads = document["threads"].as_array().unwrap().iter();
    let shown: BTreeMap<String, String> = threads
        .map(|thread| (thread["tid"].to_string(), thread["name"].as_str().unwrap().to_owned()))
        .collect();
    let folder = format!("/proc/{}/task", workload.pid());
    let expected: BTreeMap<String, String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let comm = fs::read_to_string(entry.path().join("comm")).unwrap();
            (entry.file_name().into_string().unwrap(), comm.trim_end().to_owned())
        })
        .collect();
    assert_eq!(shown, expected);
    assert!(shown.values().any(|name| name == "held-2"));
}

#[test]
fn a_process_that_is_not_there_is_an_error() {
    for command in ["fds", "threads", "watch"] {
        let output = plumb().args([command, "--pid", "4194304"]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{command}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(stderr, "plumb: there is no process 4194304; `plumb ps` lists them all\n");
    }
}

#[test]
fn what_an_io_uring_keeps_for_itself_is_told_apart() {
    let mut ring = Workload::start_program(&Workload::fd_paths(), &["io-uring-direct-open"]).ready();
    let rings = |pid: u32| -> Vec<String> {
        let document = plumb_json(&["fds", "--pid", &pid.to_string()]);
        let fds = document["fds"].as_array().unwrap().iter();
        let rings = fds.filter(|fd| fd["kind"] == "io_uring");
        rings.map(|fd| fd["target"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(rings(ring.pid()), ["anon_inode:[io_uring]"]);
    let said = ring.stage();
    let held = rings(ring.pid());
    assert_eq!(held, ["anon_inode:[io_uring], files of its own: 1"], "{said:?}");
    ring.end();
}

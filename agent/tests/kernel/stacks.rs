//! The stack of whoever makes an fd or a thread: the right registers, the right bytes, of watched processes only,
//! and each one that is missing is counted.

use std::{
    fs::File,
    net::{TcpListener, TcpStream},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    time::{Duration, Instant},
};

use plumb::{
    decode::{Event, Sample},
    kernel::{Fds, Filter, Kernel, Plan, Ring, Seam},
};
use plumb_common::{
    counts,
    event::{CLONE_THREAD, FD_OPENED},
    limits::{STACK_BYTES, STACKS_PER_SECOND},
    task::ProcKey,
};

use crate::{
    support::Workload,
    uring::{Entry, Uring},
};

/// The word of `workload stacks`.
const WORD: u64 = 0x706c_756d_6221;
const DEEP: usize = STACK_BYTES[1];

/// The ways that this kernel allows; there is a sys_exit everywhere.
fn each_way(mut test: impl FnMut(Seam)) {
    for seam in [Seam::Functions, Seam::SysExit] {
        let filter = Filter { tgid: Some(std::process::id()), comm: None };
        let plan = Plan { programs: Some(&[]), fds: Fds::All(Some(seam)), ..Plan::watch(filter) };
        match Kernel::load_all(plan) {
            Ok(_) => test(seam),
            Err(error) => {
                let is_known = seam == Seam::Functions && std::env::var_os("PLUMB_OWN_KERNEL").is_none();
                assert!(is_known, "{seam:?} {error}");
            }
        }
    }
}

/// What the workload's stack should look like: its word at an address, as far as that is within the copy.
fn assert_copied(sample: &Sample, memory: &File, word: u64) {
    let mut code = [0; 2];
    memory.read_exact_at(&mut code, sample.head.ip - 2).unwrap();
    assert_eq!(code, [0x0f, 0x05], "{:x} is not behind a system call", sample.head.ip);
    if let Some(at) = word.checked_sub(sample.head.sp)
        && let Some(found) = sample.bytes.get(at as usize..at as usize + 8)
    {
        assert_eq!(u64::from_ne_bytes(found.try_into().unwrap()), WORD);
    }
}

#[test]
fn a_new_fd_and_a_new_thread_come_with_the_stack_of_their_maker() {
    each_way(|seam| {
        let mut workload = Workload::start(&["stacks"]);
        let address = workload.lines_until_ready();
        let word: u64 = address[0].parse().unwrap();
        let memory = File::open(format!("/proc/{}/mem", workload.pid())).unwrap();
        let filter = Filter { tgid: Some(workload.pid()), comm: None };
        let plan = Plan {
            programs: Some(&["task_newtask"]),
            fds: Fds::All(Some(seam)),
            stacks: true,
            ..Plan::watch(filter)
        };
        let mut kernel = Kernel::load_all(plan).unwrap();
        let mut ring = kernel.ring().unwrap();
        let made = workload.stage();
        let fds: Vec<u32> = made[0].split(' ').skip(1).map(|fd| fd.parse().unwrap()).collect();
        let events = ring.drain(usize::MAX);
        let samples = ring.drain_stacks();
        let stack_of = |time: u64, tid: u32, made: u32| {
            let of = |sample: &&Sample| {
                let head = &sample.head;
                (head.header.time, head.header.tid, head.made) == (time, tid, made)
            };
            samples.iter().find(of)
        };
        let opened = |fd: u32| {
            let found = events.iter().find_map(|event| match event {
                Event::Fd(change) if change.change == FD_OPENED && change.fd == fd => Some(change),
                _ => None,
            });
            let header = found.unwrap_or_else(|| panic!("{seam:?} {fd} {events:?}")).header;
            stack_of(header.time, header.tid, fd).unwrap_or_else(|| panic!("{seam:?} {fd} has no stack"))
        };
        let [shallow, deep, by_thread] = [fds[0], fds[1], fds[2]].map(opened);
        for sample in [shallow, deep, by_thread] {
            assert_copied(sample, &memory, word);
        }
        assert!((shallow.head.sp..shallow.head.sp + shallow.bytes.len() as u64).contains(&word));
        assert_eq!(deep.bytes.len(), DEEP, "there is more of it than a copy holds");
        assert!(shallow.head.sp - deep.head.sp > 48 << 10);
        assert!(by_thread.bytes.len() >= 512, "{}", by_thread.bytes.len());
        let thread = events.iter().find_map(|event| match event {
            Event::Clone(clone) if clone.flags & CLONE_THREAD != 0 => Some(clone),
            _ => None,
        });
        let thread = thread.unwrap();
        let creator = stack_of(thread.header.time, thread.header.tid, thread.child_tid).unwrap();
        assert_copied(creator, &memory, word);
        assert!((creator.head.sp..creator.head.sp + creator.bytes.len() as u64).contains(&word));
        assert_ledger(&kernel, &ring, samples.len() as u64);
        workload.end();
    });
}

/// Every stack that was sent has come; none was lost.
fn assert_ledger(kernel: &Kernel, ring: &Ring, received: u64) {
    let counted = kernel.counts().unwrap();
    let of = |outcome| counted.of(counts::STACK, outcome);
    assert_eq!((of(counts::SENT), ring.stack_ledger().rejected), (received, 0), "{counted:?}");
    assert_eq!(counts::LOSSES.map(of), [0; 3]);
}

#[test]
fn stacks_are_taken_of_watched_processes_and_no_more_than_their_number() {
    const PAIRS: u64 = 5_000;
    each_way(|seam| {
        let mut storm = Workload::start_ready(&["fd-storm", &PAIRS.to_string()]);
        let plan = Plan {
            programs: Some(&["processes"]),
            fds: Fds::Watched(Some(seam)),
            stacks: true,
            ..Plan::watch(Filter::default())
        };
        let mut kernel = Kernel::load_all(plan).unwrap();
        let find = |kernel: &mut Kernel, pid: u32| -> ProcKey {
            let processes = kernel.processes().unwrap();
            processes.iter().find(|record| record.key.tgid == pid).unwrap().key
        };
        let process = find(&mut kernel, storm.pid());
        let mut ring = kernel.ring().unwrap();
        kernel.follow_fds(true).unwrap();
        kernel.watch(process, false).unwrap();
        storm.stage();
        assert!(!ring.drain(usize::MAX).is_empty());
        assert_eq!(ring.drain_stacks(), [], "nobody asked for stacks");
        kernel.watch(process, true).unwrap();
        let began = std::time::Instant::now();
        storm.stage();
        let seconds = began.elapsed().as_secs() + 2;
        let received = ring.drain_stacks().len() as u64;
        let counted = kernel.counts().unwrap();
        let of = |outcome| counted.of(counts::STACK, outcome);
        assert!(received > 0 && of(counts::QUOTA) > 0, "{received} {counted:?}");
        assert_eq!(of(counts::SENT), received + ring.stack_ledger().rejected);
        // Within each second some may be counted by two processors at once.
        assert!(of(counts::SENT) + of(counts::RING_FULL) <= u64::from(STACKS_PER_SECOND) * seconds);
        let seen = of(counts::SENT) + of(counts::RING_FULL) + of(counts::QUOTA);
        assert!(seen <= PAIRS && seen + kernel.not_run() >= PAIRS, "{counted:?}");
    });
}

#[test]
fn an_fd_that_the_kernel_makes_between_two_calls_of_a_thread_has_no_stack() {
    /// `IORING_OP_ACCEPT`.
    const ACCEPT: u8 = 13;
    let Some(accept) = Uring::new() else { return };
    each_way(|seam| {
        if seam == Seam::SysExit {
            // Which does not see it.
            return;
        }
        let filter = Filter { tgid: Some(std::process::id()), comm: None };
        let fds = Fds::All(Some(seam));
        let plan = Plan { programs: Some(&[]), fds, stacks: true, ..Plan::watch(filter) };
        let mut kernel = Kernel::load_all(plan).unwrap();
        let mut ring = kernel.ring().unwrap();
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let fd = listener.as_raw_fd();
        accept.submit(Entry { opcode: ACCEPT, fd, offset: 0, bytes: &[] }, false);
        assert_eq!(accept.result(), None, "nobody is there yet");
        let address = listener.local_addr().unwrap();
        let client = std::thread::spawn(move || TcpStream::connect(address).unwrap());
        let began = Instant::now();
        let accepted = loop {
            // An interrupt of this is what completes it.
            if let Some(result) = accept.result() {
                break result;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "it is not accepted");
        };
        client.join().unwrap();
        // SAFETY: it has just been accepted, and is nobody else's.
        let accepted = unsafe { OwnedFd::from_raw_fd(accepted) };
        let thread = rustix::thread::gettid().as_raw_nonzero().get() as u32;
        let opened = |event: &Event| match event {
            Event::Fd(change) if change.fd == accepted.as_raw_fd() as u32 && change.header.tid == thread => {
                (change.change == FD_OPENED).then_some(change.header.time)
            }
            _ => None,
        };
        let time = ring.drain(usize::MAX).iter().find_map(opened).expect("it is seen");
        let samples = ring.drain_stacks();
        let of_it = |sample: &&Sample| (sample.head.header.time, sample.head.header.tid) == (time, thread);
        assert_eq!(samples.iter().find(of_it), None);
        assert!(kernel.counts().unwrap().of(counts::STACK, counts::FILTERED) > 0);
    });
}

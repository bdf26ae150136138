//! Every event is accounted for, also when the ring is far too small.

use plumb::kernel::{Fds, Filter, Kernel, Plan, Seam};
use plumb_common::counts;

use crate::support::Workload;

#[test]
fn a_full_ring_loses_events_and_counts_each() {
    const PAIRS: u64 = 5_000;
    let mut storm = Workload::start_ready(&["fd-storm", &PAIRS.to_string()]);
    let filter = Filter { tgid: Some(storm.pid()), comm: None };
    let mut kernel =
        Kernel::load_all(Plan { programs: Some(&[]), filter, ring_bytes: 4096, ..Plan::watch(filter) })
            .unwrap();
    let mut ring = kernel.ring().unwrap();
    assert!(kernel.ring().is_err(), "there is one reader");
    storm.stage();
    let read = ring.drain(usize::MAX).len() as u64;
    let counted = kernel.counts().unwrap();
    let of = |outcome| counted.of(counts::FD, outcome);
    assert!(read > 0 && of(counts::RING_FULL) + of(counts::QUOTA) > 0, "{counted:?}");
    assert_eq!(of(counts::SENT), read + ring.ledger().rejected);
    let seen = of(counts::SENT) + of(counts::RING_FULL) + of(counts::QUOTA);
    // What the kernel did not run nobody saw.
    assert!(seen <= 2 * PAIRS && seen + kernel.not_run() >= 2 * PAIRS, "{counted:?}");
    assert_eq!([counts::FORGED, counts::FAULT].map(of), [0, 0]);
    // The rest of the host was kept out, and that is counted too.
    drop(std::fs::File::open("/proc/self/stat").unwrap());
    let counted = kernel.counts().unwrap();
    assert!(counted.of(counts::FD, counts::FILTERED) > 0, "{counted:?}");
}

#[test]
fn memory_that_cannot_be_read_is_counted_as_a_fault_for_each_fd() {
    // A scheduler that runs one thread for long needs several tries.
    for _ in 0..20 {
        let mut pipes = Workload::start_ready(&["vanishing-pipes"]);
        let filter = Filter { tgid: Some(pipes.pid()), comm: None };
        let fds = Fds::All(Some(Seam::SysExit));
        let plan = Plan { programs: Some(&[]), fds, ring_bytes: 64 << 20, ..Plan::watch(filter) };
        let kernel = Kernel::load_all(plan).unwrap();
        let made: u64 = pipes.stage()[0].parse().unwrap();
        let counted = kernel.counts().unwrap();
        let of = |outcome| counted.of(counts::FD, outcome);
        // Two fds and one close_range each; a page that came back empty names fd 0, which is open, twice.
        let seen = of(counts::SENT) + of(counts::FAULT);
        // What the kernel did not run nobody saw.
        assert!(seen <= 3 * made && seen + kernel.not_run() >= 3 * made, "{made} {counted:?}");
        assert_eq!([counts::RING_FULL, counts::QUOTA, counts::FORGED].map(of), [0; 3]);
        if of(counts::FAULT) > 0 {
            assert_eq!(of(counts::FAULT) % 2, 0, "{counted:?}");
            return;
        }
    }
    panic!("no read failed");
}

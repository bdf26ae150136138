use std::sync::Arc;

use plumb_common::task::ProcKey;

use super::*;
use crate::{
    detect::{Detector, HostLimits, Settings},
    procfs::ProcStatic,
};

fn row(group: &str, fds: u32) -> Row {
    Row {
        key: ProcKey::new(1, 1),
        exec_id: 0,
        fd_limit: 100,
        nproc_limit: 0,
        rss_bytes: 4096,
        ppid: 0,
        uid: 0,
        fds,
        threads: 2,
        state: 0,
        flags: 0,
        exited: false,
        info: Arc::new(ProcStatic { comm: "c".into(), exe: None, group: group.into() }),
    }
}

fn rendered(rows: Vec<Row>) -> String {
    let view = HostView { rows, ..HostView::default() };
    page(&view, &Workers::default(), &Own::new().unwrap()).unwrap()
}

#[test]
fn groups_add_up_and_keep_their_worst_process() {
    let gone = Row { exited: true, ..row("web", 90) };
    let page = rendered(vec![row("web", 10), row("web", 80), gone, row("db", 1)]);
    for line in [
        "plumb_group_processes{group=\"web\"} 2",
        "plumb_group_open_fds{group=\"web\"} 90",
        "plumb_group_fd_limit_ratio_max{group=\"web\"} 0.8",
        "plumb_group_threads{group=\"db\"} 2",
        "plumb_group_resident_memory_bytes{group=\"web\"} 8192",
    ] {
        assert!(page.lines().any(|found| found == line), "{line} is not in\n{page}");
    }
}

#[test]
fn whatever_is_at_its_limit_has_no_time_left() {
    let seconds = |fds: u32| {
        let row = row("web", fds);
        let mut detector = Detector::new(HostLimits { threads: 9_999 }, Settings::default());
        for second in 9_000..9_060 {
            detector.observe(std::slice::from_ref(&row), second * 1_000_000_000);
        }
        let view = HostView { findings: detector.findings(), ..HostView::default() };
        let page = page(&view, &Workers::default(), &Own::new().unwrap()).unwrap();
        assert!(page.contains("plumb_leak_findings{group=\"web\",resource=\"fd\",state=\"suspect\"} 1"));
        let line = page.lines().find(|line| line.starts_with("plumb_leak_exhaustion_seconds{"));
        line.map(|line| line.rsplit(' ').next().unwrap().to_owned())
    };
    assert_eq!(seconds(99), Some("0".to_owned()));
    assert_eq!(seconds(90), None, "it may be meant to have so many");
    assert_eq!(seconds(101), None, "a limit below what it has is");
}

#[test]
fn hostile_names_stay_inside_their_label() {
    let page = rendered(vec![row("a\"} 1\nb\\", 1)]);
    assert!(page.contains("plumb_group_processes{group=\"a\\\"} 1\\nb\\\\\"} 1\n"), "{page}");
}

#[test]
fn too_many_groups_are_folded_and_nothing_is_lost() {
    let rows: Vec<_> = (0..MAX_GROUPS as u32 + 7).map(|i| row(&format!("g{i}"), i)).collect();
    let total: u32 = rows.iter().map(|row| row.fds).sum();
    let page = rendered(rows);
    let fds = page.lines().filter_map(|line| line.strip_prefix("plumb_group_open_fds{"));
    let values: Vec<f64> = fds.map(|rest| rest.rsplit(' ').next().unwrap().parse().unwrap()).collect();
    assert_eq!(values.len(), MAX_GROUPS + 1);
    assert_eq!(values.iter().sum::<f64>(), f64::from(total));
    assert!(page.contains("plumb_groups_folded{bound=\"max_groups\"} 7\n"));
}

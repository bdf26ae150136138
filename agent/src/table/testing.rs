//! Records and events for the tests of the table.

use std::sync::Arc;

use bytemuck::Zeroable;
use plumb_common::{
    event::{Clone as CloneEvent, Exec, Exit},
    task::{ProcKey, TaskRecord},
};

use super::{Drift, Pass, Table};
use crate::{decode::Event, procfs::ProcStatic};

pub(super) const SECOND: u64 = 1_000_000_000;

fn words() -> Arc<ProcStatic> {
    Arc::new(ProcStatic { comm: "test".into(), exe: None, group: "test".into() })
}

pub(super) fn record(
    tgid: u32,
    start: u64,
    time: u64,
    threads: u32,
    fds: u32,
) -> (TaskRecord, Arc<ProcStatic>) {
    let mut record = TaskRecord::zeroed();
    record.key = ProcKey::new(tgid, start);
    (record.time, record.threads, record.fds, record.files) = (time, threads, fds, 1);
    (record, words())
}

pub(super) fn clone(parent: ProcKey, child: ProcKey, tid: u32, time: u64, flags: u64) -> Event {
    let mut event = CloneEvent::zeroed();
    (event.header.process, event.header.time) = (parent, time);
    (event.child, event.child_tid, event.flags) = (child, tid, flags);
    Event::Clone(event)
}

pub(super) fn exit(process: ProcKey, tid: u32, time: u64, group_dead: bool) -> Event {
    let mut event = Exit::zeroed();
    (event.header.process, event.header.tid, event.header.time) = (process, tid, time);
    event.group_dead = u32::from(group_dead);
    Event::Exit(event)
}

pub(super) fn exec(process: ProcKey, old_tid: u32, time: u64) -> Event {
    let mut event = Exec::zeroed();
    (event.header.process, event.header.tid, event.header.time) = (process, process.tgid, time);
    event.old_tid = old_tid;
    Event::Exec(event)
}

pub(super) fn seeded(records: &[(TaskRecord, Arc<ProcStatic>)]) -> Table {
    let mut table = Table::default();
    // The first pass cannot know what happened just before it; the second one does.
    for _ in 0..2 {
        table.reconcile(&Pass { records: records.to_vec(), ..Pass::default() });
    }
    assert_eq!(table.drift(), Drift::default(), "the first passes are no drift");
    table
}

//! The tables: the model against /proc, which is the truth, and plumb against both.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, thread,
    time::{Duration, Instant},
};

use plumb::kernel::Kernel;
use plumb_common::task::{ProcKey, TaskRecord};

use super::{
    Mismatch,
    op::Kind,
    stage::Name,
    terms::{FileId, Process, Table, TableId, Task, Thread},
    world::World,
};

/// The kernel counts a thread for a moment after it has exited; under emulation the moment is longer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What /proc/PID/stat says.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    comm: String,
    zombie: bool,
    ppid: u32,
    threads: usize,
}

fn stat(pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (head, tail) = text.rsplit_once(')')?;
    let fields: Vec<&str> = tail.split_ascii_whitespace().take(18).collect();
    Some(Stat {
        comm: head.split_once('(')?.1.to_owned(),
        zombie: fields[0] == "Z",
        ppid: fields[1].parse().ok()?,
        threads: fields[17].parse().ok()?,
    })
}

fn fds(pid: u32, tid: u32) -> Option<BTreeSet<u32>> {
    let folder = fs::read_dir(format!("/proc/{pid}/task/{tid}/fd")).ok()?;
    let fds = folder.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    Some(fds.collect())
}

/// Waits until /proc says what the model says.
pub(crate) fn proc_is_model(world: &World, tids: &BTreeMap<Task, u32>, name: &Name) -> Result<(), Mismatch> {
    let end = Instant::now() + PATIENCE;
    let mut pause = Duration::from_micros(50);
    loop {
        match compare_with_proc(world, tids, name) {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > end => return Err(error),
            Err(_) => thread::sleep(pause),
        }
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

fn compare_with_proc(world: &World, tids: &BTreeMap<Task, u32>, name: &Name) -> Result<(), Mismatch> {
    for task in &world.ended {
        // The number may be another's by now.
        if stat(tids[task]).is_some_and(|stat| stat.comm == name.0) {
            return Err(Mismatch(format!("process {} has ended and is in /proc", tids[task])));
        }
    }
    for process in world.processes.values() {
        let pid = tids[&process.id];
        let mut expected = Stat {
            comm: name.0.clone(),
            zombie: process.leader().gone,
            ppid: tids[&world.parent(process)],
            threads: process.threads.len(),
        };
        if process.id == 0 {
            expected.ppid = std::process::id();
        }
        let found = stat(pid);
        if found.as_ref() != Some(&expected) {
            return Err(Mismatch(format!("process {pid}: /proc has {found:?}, the model {expected:?}")));
        }
        let mut seen = BTreeSet::new();
        for thread in process.alive().filter(|thread| seen.insert(thread.table)) {
            let expected: BTreeSet<u32> = world.tables[&thread.table].keys().copied().collect();
            let found = fds(pid, tids[&thread.task]);
            if found.as_ref() != Some(&expected) {
                let tid = tids[&thread.task];
                return Err(Mismatch(format!(
                    "fds of thread {tid} of {pid}: /proc has {found:?}, the model {expected:?}"
                )));
            }
        }
    }
    Ok(())
}

/// Counts, parents and shared tables as one pass has them. Returns the keys of the processes.
pub(crate) fn pass_is_model(
    world: &World,
    tids: &BTreeMap<Task, u32>,
    name: &Name,
    kernel: &mut Kernel,
    known: &mut Addresses,
) -> Result<BTreeMap<Task, ProcKey>, Mismatch> {
    let comm = name.comm();
    let ours = |record: &TaskRecord| {
        let length = name.0.len() + 1;
        record.comm[..length] == comm[..length]
    };
    let records: Vec<TaskRecord> = kernel.processes().unwrap().into_iter().filter(ours).collect();
    let mut shown: BTreeMap<u32, &TaskRecord> = BTreeMap::new();
    for record in &records {
        if shown.insert(record.key.tgid, record).is_some() {
            return Err(Mismatch(format!("plumb shows process {} twice", record.key.tgid)));
        }
    }
    let mut keys = BTreeMap::new();
    let mut owners: HashMap<u64, TableId> = HashMap::new();
    for process in world.processes.values() {
        let pid = tids[&process.id];
        let Some(record) = shown.remove(&pid) else {
            return Err(Mismatch(format!("plumb does not show process {pid}")));
        };
        keys.insert(process.id, record.key);
        let ppid = if process.id == 0 { std::process::id() } else { tids[&world.parent(process)] };
        let candidates = tables(process);
        let counts: Vec<usize> = candidates.iter().map(|table| world.tables[table].len()).collect();
        let agrees = counts.contains(&(record.fds as usize))
            && record.threads as usize == process.threads.len()
            && record.ppid == ppid;
        if !agrees {
            let threads = process.threads.len();
            return Err(Mismatch(format!(
                "plumb on process {pid}: {record:?}; the model has {counts:?} fds, {threads} threads, parent {ppid}"
            )));
        }
        if let [table] = candidates[..] {
            known.table(table, record.files)?;
            if *owners.entry(record.files).or_insert(table) != table {
                return Err(Mismatch(format!("process {pid} has the table of another: {record:?}")));
            }
        }
    }
    if let Some((pid, record)) = shown.first_key_value() {
        return Err(Mismatch(format!("plumb shows process {pid}, which has ended: {record:?}")));
    }
    Ok(keys)
}

/// The leader's table or, once that has exited, that of any thread.
fn tables(process: &Process) -> Vec<TableId> {
    let leader = process.leader();
    let tables: BTreeSet<TableId> = if leader.gone {
        process.alive().map(|thread: &Thread| thread.table).collect()
    } else {
        [leader.table].into()
    };
    tables.into_iter().collect()
}

/// Each open file by fd: the numbers, which fds are one file, and what kind it is.
pub(crate) fn listing_is_model(
    world: &World,
    keys: &BTreeMap<Task, ProcKey>,
    kernel: &mut Kernel,
    known: &mut Addresses,
) -> Result<(), Mismatch> {
    let mut owners: HashMap<u64, FileId> = HashMap::new();
    for process in world.processes.values() {
        let candidates = tables(process);
        // Threads with tables of their own and no leader: which one is shown is not defined.
        let [table] = candidates[..] else { continue };
        let table: &Table = &world.tables[&table];
        let key = keys[&process.id];
        let mut shown: BTreeMap<u32, u64> = BTreeMap::new();
        let mut wrong = None;
        kernel
            .files(key, |record| {
                shown.insert(record.fd, record.file);
                let Some(held) = table.get(&record.fd) else { return };
                let Some(kind) = world.kinds.get(&held.file).copied().flatten() else { return };
                let is_socket = matches!(kind, Kind::Socket | Kind::Socketpair);
                if is_socket != (record.is_socket != 0) {
                    wrong = Some(format!("fd {} is a {kind:?}: {record:?}", record.fd));
                }
            })
            .unwrap();
        if let Some(wrong) = wrong {
            return Err(Mismatch(format!("plumb on process {}: {wrong}", key.tgid)));
        }
        if !shown.keys().eq(table.keys()) {
            return Err(Mismatch(format!(
                "plumb lists for process {} fds {:?}, the model has {:?}",
                key.tgid,
                shown.keys(),
                table.keys()
            )));
        }
        for (fd, held) in table {
            let address = shown[fd];
            known.file(held.file, address)?;
            if *owners.entry(address).or_insert(held.file) != held.file {
                return Err(Mismatch(format!(
                    "plumb on process {}: fd {fd} is the file of another fd",
                    key.tgid
                )));
            }
        }
    }
    Ok(())
}

/// Where the kernel has what the model knows: the same address each time it is seen.
#[derive(Default)]
pub(crate) struct Addresses {
    files: HashMap<FileId, u64>,
    tables: HashMap<TableId, u64>,
}

impl Addresses {
    pub(crate) fn file(&mut self, file: FileId, address: u64) -> Result<(), Mismatch> {
        let known = *self.files.entry(file).or_insert(address);
        if known == address {
            return Ok(());
        }
        Err(Mismatch(format!("plumb has file {file} of the model at {address:#x}, before at {known:#x}")))
    }

    pub(crate) fn table(&mut self, table: TableId, address: u64) -> Result<(), Mismatch> {
        let known = *self.tables.entry(table).or_insert(address);
        if known == address {
            return Ok(());
        }
        Err(Mismatch(format!("plumb has table {table} of the model at {address:#x}, before at {known:#x}")))
    }

    /// Forgets what is gone.
    pub(crate) fn retain(&mut self, world: &World) {
        self.files.retain(|file, _| world.kinds.contains_key(file));
        self.tables.retain(|table, _| world.tables.contains_key(table));
    }
}

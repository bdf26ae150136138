//! The puppets of one run: starts the first, gives each its commands in batches, and keeps in order what
//! depends on each other.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    env, fs,
    os::{fd::AsRawFd, unix::fs::symlink},
    path::PathBuf,
    process::{ChildStdin, Command, Stdio},
    ptr,
    sync::atomic::{AtomicU32, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

use plumb_common::limits::COMM_LEN;

use super::{
    Mismatch,
    protocol::{self, QUEUE, SLOTS, STAGE, Shared},
    terms::{Reply, Step, Task, Touch},
    world::World,
};
use crate::support::{Running, TempDir};

/// For one batch; under emulation an exec takes a tenth of a second.
const PATIENCE: Duration = Duration::from_secs(60);

/// All puppets of a driver have this name and nobody else has.
#[derive(Debug)]
pub(crate) struct Name(pub(crate) String);

impl Name {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        Self(format!("pup{}-{}", std::process::id(), NEXT.fetch_add(1, SeqCst)))
    }

    pub(crate) fn comm(&self) -> [u8; COMM_LEN] {
        let mut comm = [0; COMM_LEN];
        comm[..self.0.len()].copy_from_slice(self.0.as_bytes());
        comm
    }
}

/// What was asked of a puppet and is not yet compared.
struct Asked {
    slot: usize,
    number: u32,
    words: [u32; 5],
    reply: Reply,
}

pub(crate) struct Stage {
    child: Running,
    /// Its end is the end of all puppets.
    stdin: Option<ChildStdin>,
    shared: &'static Shared,
    _dir: TempDir,
    /// Commands written and, up to the last batch, done.
    written: [u32; SLOTS],
    done: [u32; SLOTS],
    last: HashMap<Touch, (usize, u32)>,
    asked: Vec<Asked>,
    /// Thread ids, as the puppets have reported them.
    pub(crate) tids: BTreeMap<Task, u32>,
}

impl Stage {
    pub(crate) fn start(name: &Name) -> Self {
        let dir = TempDir::new();
        let file = dir.0.join("commands");
        let commands = fs::File::create_new(&file).unwrap();
        commands.set_len(size_of::<Shared>() as u64).unwrap();
        let commands = fs::File::options().read(true).write(true).open(&file).unwrap();
        let (length, access) = (size_of::<Shared>(), libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: a new mapping of a file that is this long and that nobody cuts.
        let at =
            unsafe { libc::mmap(ptr::null_mut(), length, access, libc::MAP_SHARED, commands.as_raw_fd(), 0) };
        assert_ne!(at, libc::MAP_FAILED);
        // SAFETY: mapped until `drop`, aligned to a page, all zero; every field is atomic.
        let shared: &'static Shared = unsafe { &*at.cast() };
        // The start of the stage is its first command.
        shared.slots[STAGE].filled.store(1, SeqCst);
        // Exec takes the name of the file that it was given.
        let program = dir.0.join(&name.0);
        let puppet = env::var_os("PLUMB_PUPPET").map_or_else(
            || env::current_exe().unwrap().parent().unwrap().join("../examples/puppet"),
            PathBuf::from,
        );
        symlink(puppet.canonicalize().expect("the example `puppet` is built"), &program).unwrap();
        let mut child = Command::new(&program)
            .arg(&file)
            .arg(STAGE.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take();
        let tids = BTreeMap::from([(0, child.id())]);
        let mut stage = Self {
            child: Running(child),
            stdin,
            shared,
            _dir: dir,
            written: [0; SLOTS],
            done: [0; SLOTS],
            last: HashMap::new(),
            asked: Vec::new(),
            tids,
        };
        stage.written[STAGE] = 1;
        stage.wait(STAGE).unwrap();
        stage.done[STAGE] = 1;
        stage
    }

    /// Whether a batch should end before some queue is full.
    pub(crate) fn is_full(&self) -> bool {
        let waiting = self.written.iter().zip(&self.done).map(|(written, done)| written.wrapping_sub(*done));
        waiting.max().unwrap_or(0) as usize > QUEUE - 100
    }

    /// Writes a command, and before it the wait for whatever it depends on.
    pub(crate) fn push(&mut self, step: &Step) {
        for touch in &step.touches {
            if let Some(&(slot, number)) = self.last.get(touch)
                && slot != step.slot
            {
                self.command(slot, number).wakes.store(1, SeqCst);
                self.write(step.slot, [protocol::AWAIT, slot as u32, number, 0, 0]);
            }
        }
        let number = self.write(step.slot, step.words);
        for touch in &step.touches {
            self.last.insert(*touch, (step.slot, number));
        }
        self.asked.push(Asked { slot: step.slot, number, words: step.words, reply: step.reply });
    }

    /// Forgets the thread ids of those who have ended.
    pub(crate) fn forget_the_dead(&mut self, world: &World) {
        let threads = world.processes.values().flat_map(|process| process.threads.values());
        let leaders = world.processes.values().map(|process| process.id);
        let tasks: BTreeSet<Task> = threads.map(|thread| thread.task).chain(leaders).collect();
        self.tids.retain(|task, _| tasks.contains(task));
    }

    fn command(&self, slot: usize, number: u32) -> &protocol::Command {
        &self.shared.slots[slot].queue[number as usize % QUEUE]
    }

    fn write(&mut self, slot: usize, words: [u32; 5]) -> u32 {
        let number = self.written[slot];
        let command = self.command(slot, number);
        command.wakes.store(0, SeqCst);
        for (to, word) in command.words.iter().zip(words) {
            to.store(word, SeqCst);
        }
        self.written[slot] = number.wrapping_add(1);
        number
    }

    /// Lets the puppets do what was written, and compares what the calls returned.
    pub(crate) fn run(&mut self) -> Result<(), Mismatch> {
        let busy: Vec<usize> = (0..SLOTS).filter(|slot| self.written[*slot] != self.done[*slot]).collect();
        for &slot in &busy {
            self.command(slot, self.written[slot].wrapping_sub(1)).wakes.store(1, SeqCst);
        }
        for &slot in &busy {
            let filled = &self.shared.slots[slot].filled;
            filled.store(self.written[slot], SeqCst);
            futex(filled, libc::FUTEX_WAKE, i32::MAX as u32);
        }
        busy.iter().try_for_each(|slot| self.wait(*slot))?;
        self.done = self.written;
        self.last.clear();
        for Asked { slot, number, words, reply } in std::mem::take(&mut self.asked) {
            let command = self.command(slot, number);
            let answer = command.reply.each_ref().map(|word| word.load(SeqCst));
            match reply {
                Reply::Task(task) if answer[0] > 0 => drop(self.tids.insert(task, answer[0] as u32)),
                // A call with one result leaves the other words as they were.
                Reply::Is(expected)
                    if answer[0] == expected[0] && tail_agrees(words[0], answer, expected) => {}
                _ => {
                    return Err(Mismatch(format!(
                        "puppet {slot}: command {words:?} answered {answer:?}, the model says {reply:?}"
                    )));
                }
            }
        }
        Ok(())
    }

    fn wait(&self, slot: usize) -> Result<(), Mismatch> {
        let end = Instant::now() + PATIENCE;
        let (done, wanted) = (&self.shared.slots[slot].done, self.written[slot]);
        loop {
            let now = done.load(SeqCst);
            if now == wanted {
                return Ok(());
            }
            if Instant::now() > end {
                let words = self.command(slot, now).words.each_ref().map(|word| word.load(SeqCst));
                return Err(Mismatch(format!("puppet {slot} does not get done with {words:?}")));
            }
            futex(done, libc::FUTEX_WAIT, now);
        }
    }
}

impl Stage {
    /// Tells all puppets to end and waits until the stage, whose orphans they are, has seen it.
    pub(crate) fn end(self, name: &Name) {
        self.shared.over.store(1, SeqCst);
        for slot in &self.shared.slots {
            futex(&slot.filled, libc::FUTEX_WAKE, i32::MAX as u32);
            futex(&slot.done, libc::FUTEX_WAKE, i32::MAX as u32);
        }
        let is_ours = |entry: std::io::Result<fs::DirEntry>| {
            let entry = entry.ok()?;
            let comm = fs::read_to_string(entry.path().join("comm")).ok()?;
            let is_stage = entry.file_name().to_str() == Some(&self.child.pid().to_string());
            (comm.trim_end() == name.0 && !is_stage).then_some(())
        };
        let end = Instant::now() + PATIENCE;
        while fs::read_dir("/proc").unwrap().find_map(is_ours).is_some() {
            assert!(Instant::now() < end, "puppets do not end");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.stdin = None;
        let _ = self.child.0.kill();
        let at = (&raw const *self.shared).cast_mut().cast();
        // SAFETY: mapped in `start`; no reference outlives the stage.
        unsafe { libc::munmap(at, size_of::<Shared>()) };
    }
}

/// Whether the fds beyond the first word are right, where a command has any.
fn tail_agrees(operation: u32, answer: [i32; 4], expected: [i32; 4]) -> bool {
    let further = match operation {
        protocol::PIPE | protocol::SOCKETPAIR => 2,
        protocol::RECEIVE => answer[0].clamp(0, 3) as usize,
        _ => 0,
    };
    answer[1..=further] == expected[1..=further]
}

/// Wakes who sleeps on the word, or sleeps a second at most while it has the value.
fn futex(word: &AtomicU32, operation: i32, value: u32) {
    let second = libc::timespec { tv_sec: 1, tv_nsec: 0 };
    // SAFETY: a live word and a live timespec.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, value, &raw const second) };
}

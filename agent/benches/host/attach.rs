//! Attaches what is measured, and detaches it: empty programs in this process, everything else by starting
//! and ending it.

use std::{
    env,
    fs::{self, File},
    io::{self, BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use aya::{Btf, Ebpf, programs::BtfTracePoint};

use crate::{
    subjects::{Events, PROCESS_EXPORTER_CONFIG, Program, Ready, Subject, What},
    usage::{Meter, die_with_parent, resident},
    worker::{Operation, Worker},
};

static FLOOR: &[u8] = aya::include_bytes_aligned!(env!("PLUMB_EBPF_FLOOR_OBJECT"));

/// Until a tool is at work, and until it is gone after it was asked to end.
const PATIENCE: Duration = Duration::from_secs(20);
/// A tool's first work on the processes that are there already is over by then; so are the kernel's
/// deferred steps of attaching and detaching.
const SETTLE: Duration = Duration::from_secs(1);
const SETTLE_EMPTY: Duration = Duration::from_millis(50);

/// A subject that can be attached again and again.
pub(crate) struct Toggle {
    subject: &'static Subject,
    empty: Option<Empty>,
    running: Option<Running>,
    attached: bool,
}

impl Toggle {
    pub(crate) fn new(subject: &'static Subject) -> Result<Self> {
        let empty = match subject.what {
            What::Empty(names) => Some(Empty::load(names)?),
            What::Programs(programs) => {
                for program in programs {
                    ensure!(is_installed(program.words[0]), "{} is not installed", program.words[0]);
                }
                None
            }
            What::Nothing => None,
        };
        Ok(Self { subject, empty, running: None, attached: false })
    }

    /// Attaches or detaches, and waits until it is done. The worker makes the events that a tool proves
    /// itself with, and is the process it is told of.
    pub(crate) fn set(&mut self, attached: bool, worker: &mut Worker) -> Result<()> {
        if attached == self.attached {
            return Ok(());
        }
        self.attached = attached;
        if let What::Programs(programs) = self.subject.what {
            match self.running.take() {
                Some(mut running) => running.end()?,
                None => self.running = Some(Running::start(programs, worker, None)?),
            }
            return Ok(());
        }
        if let Some(empty) = &mut self.empty {
            empty.set(attached)?;
        }
        thread::sleep(SETTLE_EMPTY);
        Ok(())
    }
}

fn is_installed(word: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    word.starts_with('{') || env::split_paths(&path).any(|folder| folder.join(word).is_file())
}

/// Programs that do nothing.
struct Empty {
    ebpf: Ebpf,
    names: &'static [&'static str],
    links: Vec<aya::programs::tp_btf::BtfTracePointLink>,
}

impl Empty {
    fn load(names: &'static [&'static str]) -> Result<Self> {
        let btf = Btf::from_sys_fs()?;
        let mut ebpf = Ebpf::load(FLOOR)?;
        for name in names {
            program(&mut ebpf, name)?.load(name, &btf)?;
        }
        Ok(Self { ebpf, names, links: Vec::new() })
    }

    fn set(&mut self, attached: bool) -> Result<()> {
        self.links.clear();
        if attached {
            for name in self.names {
                let program = program(&mut self.ebpf, name)?;
                let link = program.attach()?;
                self.links.push(program.take_link(link)?);
            }
        }
        Ok(())
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut BtfTracePoint> {
    Ok(ebpf.program_mut(name).context("the floor has no such program")?.try_into()?)
}

/// The processes of a subject, at work.
pub(crate) struct Running {
    members: Vec<Member>,
    dir: PathBuf,
}

struct Member {
    program: &'static Program,
    child: Child,
    /// What it prints, stdout and stderr.
    output: PathBuf,
}

impl Running {
    /// Starts them, told of the process of `worker`. The events that they prove themselves with are made by
    /// `another`, if it is given and they see it: what a tool still holds in a buffer is then not of `worker`.
    pub(crate) fn start(
        programs: &'static [Program],
        worker: &mut Worker,
        mut another: Option<&mut Worker>,
    ) -> Result<Self> {
        // In memory: a tool should wait for nothing but its work.
        let dir = Path::new("/dev/shm").join(format!("plumb-bench-{}", std::process::id()));
        fs::create_dir_all(&dir)?;
        fs::write(dir.join("process-exporter.yml"), PROCESS_EXPORTER_CONFIG)?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let words = Words { pid: worker.pid(), port, dir: dir.clone() };
        let mut running = Self { members: Vec::new(), dir };
        for (index, program) in programs.iter().enumerate() {
            let output = running.dir.join(format!("{index}.out"));
            let file = File::create(&output)?;
            let filled = program.words.iter().map(|word| words.fill(word)).collect::<Result<Vec<_>>>()?;
            let mut command = Command::new(&filled[0]);
            command.args(&filled[1..]).stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
            let child = die_with_parent(&mut command).spawn().with_context(|| filled[0].clone())?;
            running.members.push(Member { program, child, output });
            let member = running.members.last_mut().context("just pushed")?;
            let sees_one = program.words.iter().any(|word| word.contains("{pid}"));
            let prover = match &mut another {
                Some(another) if !sees_one => another,
                _ => &mut *worker,
            };
            member.wait_until_ready(prover, &words)?;
        }
        thread::sleep(SETTLE);
        Ok(running)
    }

    /// CPU time of those that count.
    pub(crate) fn meter(&self) -> Result<Meter> {
        Meter::start(self.counted().map(|member| member.child.id()).collect())
    }

    /// Resident bytes of those that count.
    pub(crate) fn resident(&self) -> Result<u64> {
        self.counted().map(|member| resident(member.child.id())).sum()
    }

    fn counted(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|member| member.program.counted)
    }

    /// Waits until no output has grown for a moment: what was buffered has come out.
    pub(crate) fn wait_until_quiet(&self) {
        let size = || self.members.iter().map(Member::printed).sum::<u64>();
        let end = Instant::now() + PATIENCE;
        let mut before = 0;
        while before != size() && Instant::now() < end {
            before = size();
            thread::sleep(Duration::from_secs(1));
        }
    }

    /// The events of `pid` that they have told of so far.
    pub(crate) fn told(&self, pid: u32) -> Result<u64> {
        self.members.iter().map(|member| member.told(pid)).sum()
    }

    /// How many events they should tell of an open and a close; `None` when they tell of none.
    pub(crate) fn events_of_a_pair(&self) -> Option<u64> {
        self.members.iter().find_map(|member| match member.program.events {
            Events::None => None,
            Events::Lines { each, .. } => Some(each),
            Events::Sums { .. } => Some(2),
        })
    }

    /// Ends them as ctrl-c would. What they printed stays until this is dropped.
    pub(crate) fn end(&mut self) -> Result<()> {
        for member in self.members.iter_mut().rev() {
            let pid = rustix::process::Pid::from_child(&member.child);
            // The child was not waited for, so the number is still its own.
            rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
            let end = Instant::now() + PATIENCE;
            while member.child.try_wait()?.is_none() {
                ensure!(Instant::now() < end, "{} does not end", member.program.words[0]);
                thread::sleep(Duration::from_millis(10));
            }
        }
        thread::sleep(SETTLE);
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for member in &mut self.members {
            let _ = member.child.kill();
            let _ = member.child.wait();
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Member {
    fn wait_until_ready(&mut self, worker: &mut Worker, words: &Words) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                bail!("it ended at once ({status}): {}", self.last_words());
            }
            let is_ready = match self.program.ready {
                Ready::Prints(text) => fs::read_to_string(&self.output)?.contains(text),
                Ready::SeesEvents => {
                    worker.batch(Operation::OpenClose, 500)?;
                    self.told(worker.pid())? > 0
                }
                Ready::Listens => TcpStream::connect(("127.0.0.1", words.port)).is_ok(),
                Ready::Runs => true,
            };
            if is_ready {
                return Ok(());
            }
            ensure!(Instant::now() < end, "not at work after {PATIENCE:?}: {}", self.last_words());
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// The events of `pid` in what it has printed so far.
    fn told(&self, pid: u32) -> Result<u64> {
        let words = Words { pid, port: 0, dir: PathBuf::new() };
        self.program.events.count(File::open(&self.output)?, &words)
    }

    fn printed(&self) -> u64 {
        fs::metadata(&self.output).map_or(0, |metadata| metadata.len())
    }

    fn last_words(&self) -> String {
        let said = fs::read_to_string(&self.output).unwrap_or_default();
        said.lines().last().unwrap_or("it said nothing").to_owned()
    }
}

impl Events {
    fn count(&self, output: File, words: &Words) -> Result<u64> {
        let (containing, sums) = match self {
            Self::None => return Ok(0),
            Self::Lines { containing, .. } => (containing, false),
            Self::Sums { containing } => (containing, true),
        };
        let needle = words.fill(containing)?;
        let mut found = 0;
        let mut lines = BufReader::with_capacity(1 << 20, output);
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line)? > 0 {
            let text = String::from_utf8_lossy(&line);
            // 22 is not told of by 122.
            let starts_a_number = needle.starts_with(|first: char| first.is_ascii_digit());
            let is_one = text.match_indices(&needle).any(|(at, _)| {
                !(starts_a_number && text[..at].ends_with(|before: char| before.is_ascii_digit()))
            });
            if is_one {
                let number = || text.trim_end().rsplit(' ').next()?.parse::<u64>().ok();
                found += if sums { number().unwrap_or(0) } else { 1 };
            }
            line.clear();
        }
        Ok(found)
    }
}

/// What stands for the names in braces.
struct Words {
    pid: u32,
    port: u16,
    dir: PathBuf,
}

impl Words {
    fn fill(&self, word: &str) -> Result<String> {
        let own = env::current_exe()?;
        Ok(word
            .replace("{plumb}", env!("CARGO_BIN_EXE_plumb"))
            .replace("{self}", own.to_str().context("the path of the benchmark")?)
            .replace("{pid}", &self.pid.to_string())
            .replace("{port}", &self.port.to_string())
            .replace("{dir}", self.dir.to_str().context("the folder")?))
    }
}

/// Asks for /metrics once a second until it is ended.
pub(crate) fn scrape(address: &str) -> Result<()> {
    loop {
        let mut stream = TcpStream::connect(address)?;
        write!(stream, "GET /metrics HTTP/1.0\r\n\r\n")?;
        io::copy(&mut stream, &mut io::sink())?;
        thread::sleep(Duration::from_secs(1));
    }
}

//! The measured operations, and the process that does them: one thread, bound to one CPU, told what to do
//! line by line.

use std::{
    env,
    io::{self, BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    ptr, thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::{calm::Calm, stats::Median, usage::die_with_parent};

/// The first argument of a worker.
pub(crate) const ROLE: &str = "worker";

/// The stacks of so many opens have room in their ring, and are read within the pause.
pub(crate) const BURST: usize = 20;
const PAUSE: Duration = Duration::from_millis(5);

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// A few at a time, with pauses that are not counted: what is done for each is done for all of them, and not
    /// given up because there are too many. The first, since others leave the rings full.
    OpenCloseInBursts,
    OpenClose,
    DupClose,
    Getppid,
    Thread,
    ForkExec,
    Accept,
}

impl Operation {
    pub(crate) const ALL: [Self; 7] = [
        Self::OpenCloseInBursts,
        Self::OpenClose,
        Self::DupClose,
        Self::Getppid,
        Self::Thread,
        Self::ForkExec,
        Self::Accept,
    ];

    /// As the tables call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::OpenClose => "open+close",
            Self::OpenCloseInBursts => "open+close in bursts of 20",
            Self::DupClose => "dup+close",
            Self::Getppid => "getppid",
            Self::Thread => "thread create+join",
            Self::ForkExec => "fork+exec+wait",
            Self::Accept => "connect+accept+close",
        }
    }
}

/// A process that does operations when it is asked to.
pub(crate) struct Worker {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Worker {
    pub(crate) fn start(cpu: usize) -> Result<Self> {
        let mut command = Command::new(env::current_exe()?);
        command.args([ROLE, &cpu.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = die_with_parent(&mut command).spawn()?;
        let orders = child.stdin.take().context("stdin")?;
        let answers = BufReader::new(child.stdout.take().context("stdout")?);
        let mut worker = Self { child, orders, answers };
        worker.answer()?;
        Ok(worker)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Nanoseconds per operation of a batch.
    pub(crate) fn batch(&mut self, operation: Operation, count: u64) -> Result<f64> {
        writeln!(self.orders, "count {} {count}", operation.name())?;
        let (count, took) = self.answer()?;
        Ok(took.as_secs_f64() * 1e9 / count as f64)
    }

    /// Nanoseconds per operation in slices of `size` operations: the median of the `wanted` calmest.
    pub(crate) fn calmest(&mut self, operation: Operation, size: u64, wanted: usize) -> Result<f64> {
        writeln!(self.orders, "calm {wanted} {} {size}", operation.name())?;
        let (count, took) = self.answer()?;
        Ok(took.as_secs_f64() * 1e9 / count as f64)
    }

    /// Starts operations for a time; `finish` waits for them.
    pub(crate) fn begin(&mut self, operation: Operation, time: Duration) -> Result<()> {
        Ok(writeln!(self.orders, "time {} {}", operation.name(), time.as_millis())?)
    }

    /// How many operations there were, and how long they took.
    pub(crate) fn finish(&mut self) -> Result<(u64, Duration)> {
        self.answer()
    }

    fn answer(&mut self) -> Result<(u64, Duration)> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        let (count, nanos) = line.trim().split_once(' ').context("the worker has ended")?;
        Ok((count.parse()?, Duration::from_nanos(nanos.parse()?)))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The worker itself.
pub(crate) fn run(cpu: &str) -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu.parse()?);
    sched_setaffinity(None, &cpus)?;
    let hands = Hands::new()?;
    let mut calm = Calm::default();
    println!("0 0");
    for line in io::stdin().lock().lines() {
        let line = line?;
        let (mode, rest) = line.split_once(' ').context("no mode")?;
        let (wanted, rest) = match mode {
            "calm" => rest.split_once(' ').context("no number of slices")?,
            _ => ("0", rest),
        };
        let (name, number) = rest.rsplit_once(' ').context("no number")?;
        let operation = Operation::ALL.into_iter().find(|operation| operation.name() == name);
        let operation = operation.with_context(|| format!("no operation {name}"))?;
        let number: u64 = number.parse()?;
        let (done, took) = match mode {
            "count" => (number, hands.times(operation, number)?),
            "calm" => {
                let slices = calm.slices(wanted.parse()?, || hands.times(operation, number))?;
                (number, Duration::from_secs_f64(Median::of(slices).median))
            }
            _ => {
                let start = Instant::now();
                let end = start + Duration::from_millis(number);
                let mut done = 0;
                while Instant::now() < end {
                    hands.times(operation, 64)?;
                    done += 64;
                }
                (done, start.elapsed())
            }
        };
        println!("{done} {}", took.as_nanos());
    }
    Ok(())
}

/// What the operations need.
struct Hands {
    listener: TcpListener,
    address: SocketAddr,
}

impl Hands {
    fn new() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address })
    }

    /// How long they took, without pauses.
    fn times(&self, operation: Operation, count: u64) -> Result<Duration> {
        if operation == Operation::OpenCloseInBursts {
            let mut took = Duration::ZERO;
            for done in (0..count).step_by(BURST) {
                took += self.times(Operation::OpenClose, (BURST as u64).min(count - done))?;
                thread::sleep(PAUSE);
            }
            return Ok(took);
        }
        let start = Instant::now();
        for _ in 0..count {
            match operation {
                Operation::OpenClose | Operation::OpenCloseInBursts => open_close()?,
                Operation::DupClose => dup_close()?,
                // SAFETY: takes nothing and cannot fail.
                Operation::Getppid => drop(unsafe { libc::syscall(libc::SYS_getppid) }),
                Operation::Thread => thread::Builder::new().spawn(|| {})?.join().expect("it does nothing"),
                Operation::ForkExec => fork_exec()?,
                Operation::Accept => self.accept()?,
            }
        }
        Ok(start.elapsed())
    }

    fn accept(&self) -> Result<()> {
        let client = TcpStream::connect(self.address)?;
        let (accepted, _) = self.listener.accept()?;
        // Closed with a reset: a port in TIME_WAIT could not be used again for a minute.
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        // SAFETY: the pointer and the length are those of a live linger.
        let set = unsafe {
            libc::setsockopt(
                client.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_LINGER,
                (&raw const linger).cast(),
                size_of_val(&linger) as libc::socklen_t,
            )
        };
        check(set)?;
        drop((client, accepted));
        Ok(())
    }
}

fn open_close() -> io::Result<()> {
    // SAFETY: the path is a C string; the fd was just made.
    unsafe { check(libc::close(check(libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY))?)).map(drop) }
}

fn dup_close() -> io::Result<()> {
    // SAFETY: dup takes any number; the fd was just made.
    unsafe { check(libc::close(check(libc::dup(0))?)).map(drop) }
}

fn fork_exec() -> Result<()> {
    let path = c"/bin/true";
    let arguments = [path.as_ptr(), ptr::null()];
    // SAFETY: this process has one thread.
    let pid = check(unsafe { libc::fork() })?;
    if pid == 0 {
        // SAFETY: the path is a C string, the arguments end with null, and nothing of the parent runs on.
        unsafe {
            libc::execv(path.as_ptr(), arguments.as_ptr());
            libc::_exit(127);
        }
    }
    let mut status = 0;
    // SAFETY: the child is this function's own, the pointer is to a live int.
    check(unsafe { libc::waitpid(pid, &raw mut status, 0) })?;
    ensure!(status == 0, "/bin/true ended with {status}");
    Ok(())
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

//! What the integration tests share: running plumb, running workloads, and reading /proc as the truth.
#![allow(dead_code, reason = "each test binary uses its part")]

pub(crate) mod followed;

use std::{
    collections::BTreeMap,
    env,
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use serde_json::Value;

/// The binary under test; named by the environment where it is not where it was built.
pub(crate) fn plumb() -> Command {
    Command::new(env::var_os("PLUMB_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_plumb").into()))
}

/// Runs plumb to its end; fails the test unless it succeeds.
pub(crate) fn plumb_ok(arguments: &[&str]) -> Output {
    let output = plumb().args(arguments).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "plumb {arguments:?}: {}: {stderr}", output.status);
    output
}

/// Runs plumb and reads the JSON document that it prints.
pub(crate) fn plumb_json(arguments: &[&str]) -> Value {
    let output = plumb_ok(&[arguments, &["-o", "json"]].concat());
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["schema"], "plumb/v1");
    document
}

/// A folder that is removed again.
pub(crate) struct TempDir(pub(crate) PathBuf);

impl TempDir {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = env::temp_dir().join(format!("plumb-test-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn join(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A child that is killed and waited for when the test is over.
pub(crate) struct Running(pub(crate) Child);

impl Running {
    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Sends a signal to the child, which has not been waited for: its pid cannot be another's.
    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.0);
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        rustix::process::pidfd_send_signal(pidfd, signal).unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A running `workload` example, or `fd_paths`, which speaks the same way.
pub(crate) struct Workload {
    pub(crate) child: Running,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

/// Copies a program by another process: who forks meanwhile would hold it open for writing, and it could not be run.
pub(crate) fn copy_program(from: impl AsRef<OsStr>, to: impl AsRef<OsStr>) {
    assert!(Command::new("cp").arg("--preserve=mode").arg(from).arg(to).status().unwrap().success());
}

impl Workload {
    /// The example `fd_paths`.
    pub(crate) fn fd_paths() -> PathBuf {
        Self::example("fd_paths")
    }

    /// Another program, which lies beside it.
    pub(crate) fn example(name: &str) -> PathBuf {
        Self::program().with_file_name(name)
    }

    pub(crate) fn program() -> PathBuf {
        env::var_os("PLUMB_WORKLOAD").map_or_else(
            || env::current_exe().unwrap().parent().unwrap().join("../examples/workload"),
            PathBuf::from,
        )
    }

    /// A copy under another name: a group that no other test has processes in.
    pub(crate) fn copy(dir: &TempDir, name: &str) -> PathBuf {
        let copy = dir.0.join(name);
        fs::copy(Self::program(), &copy).unwrap();
        copy
    }

    /// Starts it; the leaks do not say `ready`.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::start_program(&Self::program(), arguments)
    }

    pub(crate) fn start_program(program: &Path, arguments: &[&str]) -> Self {
        Self::start_command(Command::new(program).args(arguments))
    }

    pub(crate) fn start_command(command: &mut Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = loop {
            match command.spawn() {
                // Another test forked while this copy was written: until it runs its program it holds the file.
                Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                child => break child.expect("the examples are built by `cargo build --examples`"),
            }
        };
        let (stdin, stdout) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        Self { child: Running(child), stdin, stdout }
    }

    pub(crate) fn start_ready(arguments: &[&str]) -> Self {
        Self::start(arguments).ready()
    }

    /// Waits until its stage is set.
    pub(crate) fn ready(mut self) -> Self {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        self
    }

    /// Lets it go on.
    pub(crate) fn go_on(&mut self) {
        self.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    }

    /// Lets it do the next stage and waits until that is over.
    pub(crate) fn stage(&mut self) -> Vec<String> {
        self.go_on();
        self.lines_until_ready()
    }

    /// The lines it prints before it is ready the next time.
    pub(crate) fn lines_until_ready(&mut self) -> Vec<String> {
        let lines = self.stdout.by_ref().lines().map(Result::unwrap);
        lines.take_while(|line| line != "ready").collect()
    }

    /// Lets it end.
    pub(crate) fn end(mut self) {
        self.stdin = None;
        assert!(self.child.0.wait().unwrap().success());
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.pid()
    }
}

/// A running agent with a run folder and a port of its own.
pub(crate) struct Agent {
    pub(crate) child: Running,
    pub(crate) dir: TempDir,
    pub(crate) address: String,
    log: PathBuf,
}

impl Agent {
    /// Starts an agent and waits until it is ready.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let mut agent = Self::spawn(arguments);
        let deadline = Instant::now() + Duration::from_secs(120);
        while agent.get("/readyz").is_none_or(|(status, _)| status != 200) {
            let ended = agent.child.0.try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < deadline, "not ready: {ended:?} {}", agent.log());
            std::thread::sleep(Duration::from_millis(50));
        }
        let (_, ready) = agent.get("/readyz").unwrap();
        assert!(!ready.contains(" is broken"), "{ready}");
        agent
    }

    pub(crate) fn spawn(arguments: &[&str]) -> Self {
        let dir = TempDir::new();
        let address = format!("127.0.0.1:{}", free_port());
        let log = dir.0.join("log");
        let child = plumb()
            .arg("agent")
            .args(["--listen", &address, "--run-dir", &dir.join("run"), "--state-dir", &dir.join("state")])
            .args(arguments)
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Self { child: Running(child), dir, address, log }
    }

    pub(crate) fn run_dir(&self) -> String {
        self.dir.join("run")
    }

    /// The value of one series of /metrics, as written there.
    pub(crate) fn metric(&self, series: &str) -> f64 {
        let page = self.get("/metrics").unwrap().1;
        let line = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{series} is not in\n{page}")).parse().unwrap()
    }

    /// Waits until a series has the value: on an emulated machine beside others a pass may take seconds.
    pub(crate) fn wait_metric(&self, series: &str, wanted: impl Fn(f64) -> bool) -> f64 {
        let end = Instant::now() + Duration::from_secs(90);
        loop {
            let value = self.metric(series);
            if wanted(value) {
                return value;
            }
            assert!(Instant::now() < end, "{series} is {value}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Opens an event stream; the answer's head has been read.
    pub(crate) fn events(&self, query: &str) -> BufReader<UnixStream> {
        let socket = Path::new(&self.run_dir()).join("plumb.sock");
        let mut stream = BufReader::new(UnixStream::connect(socket).unwrap());
        let request = format!("GET /v1/events{query} HTTP/1.0\r\nHost: plumb\r\n\r\n");
        stream.get_mut().write_all(request.as_bytes()).unwrap();
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert!(stream.read_line(&mut head).unwrap() > 0, "{head}");
        }
        assert!(head.starts_with("HTTP/1.0 200"), "{head}");
        stream
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// GET over TCP: status and body; `None` while nobody listens.
    pub(crate) fn get(&self, path: &str) -> Option<(u16, String)> {
        exchange(TcpStream::connect(&self.address).ok()?, path)
    }

    /// GET over the control socket.
    pub(crate) fn get_control(&self, path: &str) -> Option<(u16, String)> {
        exchange(UnixStream::connect(Path::new(&self.run_dir()).join("plumb.sock")).ok()?, path)
    }

    pub(crate) fn leaks(&self) -> Vec<Value> {
        plumb_json(&["leaks", "--run-dir", &self.run_dir()])["findings"].as_array().unwrap().clone()
    }

    /// Waits for a finding in state `leaking`.
    pub(crate) fn wait_leaking(&self, pid: u32, resource: &str, deadline: Duration) -> Value {
        let end = Instant::now() + deadline;
        loop {
            let found = self.leaks().into_iter().find(|finding| {
                finding["pid"] == pid
                    && finding["resource"] == resource
                    && finding["state"] == "leaking"
                    && finding["examples"] != Value::Array(Vec::new())
            });
            if let Some(found) = found {
                return found;
            }
            assert!(
                Instant::now() < end,
                "no finding on {resource} of {pid}: {:?}\n{}",
                self.leaks(),
                self.log()
            );
            std::thread::sleep(Duration::from_millis(250));
        }
    }
}

fn exchange(mut stream: impl Read + Write, path: &str) -> Option<(u16, String)> {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: plumb\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    // With `Connection: close` a body without length ends with the connection.
    assert!(!head.to_ascii_lowercase().contains("chunked"), "{head}");
    Some((status, body.to_owned()))
}

/// Whether the running kernel is older.
pub(crate) fn kernel_is_before(version: (u32, u32)) -> bool {
    let name = rustix::system::uname();
    let mut numbers = name.release().to_str().unwrap().split(['.', '-']).map(str::parse::<u32>);
    (numbers.next().unwrap().unwrap(), numbers.next().unwrap().unwrap()) < version
}

/// A port that nobody listens on now.
pub(crate) fn free_port() -> u16 {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Below those that the kernel gives to clients and to whoever binds to any, and each of them once in this process.
    let (first, many) = (10_000, 20_000);
    let next = || NEXT.fetch_add(1, Ordering::Relaxed) + std::process::id();
    // Not by a listener: while another test forks, that one would be there a moment longer.
    let sockets =
        ["tcp", "tcp6"].map(|table| fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default());
    loop {
        let port = u16::try_from(first + next() % many).unwrap();
        let has_it = |line: &str| {
            line.split_whitespace().nth(1).is_some_and(|local| local.ends_with(&format!(":{port:04X}")))
        };
        if !sockets.iter().flat_map(|table| table.lines()).any(has_it) {
            return port;
        }
    }
}

/// One process as /proc shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Truth {
    pub(crate) start: u64,
    pub(crate) ppid: u64,
    pub(crate) comm: String,
    /// Those that are taken: what is open, and what a waiting call has reserved.
    pub(crate) fds: u64,
    /// `None` is unlimited.
    pub(crate) fd_limit: Option<u64>,
    pub(crate) threads: u64,
    /// How often its threads were switched in or out: as long as it does not change, it did nothing.
    pub(crate) switches: u64,
    /// The leader has exited and others have not: /proc/PID/fd then shows nothing.
    pub(crate) leaderless: bool,
}

/// Every process of /proc. PID 1 is left out where the iterators do not show it.
pub(crate) fn proc_truth() -> BTreeMap<u32, Truth> {
    let pids =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid: u32| Some((pid, truth_of(pid)?))).collect()
}

pub(crate) fn truth_of(pid: u32) -> Option<Truth> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat).into_owned();
    let (head, tail) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = tail.split_ascii_whitespace().collect();
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let limit = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    Some(Truth {
        start: fields[19].parse().ok()?,
        ppid: fields[1].parse().ok()?,
        comm: head.split_once('(')?.1.to_owned(),
        fds: fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count() as u64 + reserved(pid)?,
        fd_limit: limit.split_ascii_whitespace().next()?.parse().ok(),
        threads: fields[17].parse().ok()?,
        switches: switches(pid)?,
        leaderless: fields[0] == "Z" && fields[17] != "1",
    })
}

/// Fds that are taken and not open yet: accept, and open of a FIFO or of a file that is far away, take a number and
/// then wait.
fn reserved(pid: u32) -> Option<u64> {
    const RESERVE: [&str; 6] = ["2 ", "43 ", "85 ", "257 ", "288 ", "437 "];
    let mut count = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).ok()? {
        let call = fs::read_to_string(task.ok()?.path().join("syscall")).ok()?;
        count += u64::from(RESERVE.iter().any(|number| call.starts_with(number)));
    }
    Some(count)
}

const RUNS: u64 = u64::MAX;

fn switches(pid: u32) -> Option<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).ok()? {
        let status = fs::read_to_string(task.ok()?.path().join("status")).ok()?;
        if status.contains("State:\tR") {
            // While it runs it is not switched.
            return Some(RUNS);
        }
        let counts = status.lines().filter_map(|line| line.split_once("ctxt_switches:"));
        sum += counts.filter_map(|(_, count)| count.trim().parse::<u64>().ok()).sum::<u64>();
    }
    Some(sum)
}

/// `plumb ps` must equal /proc for every process that was the same before and after. Returns how many
/// processes were compared.
pub(crate) fn assert_ps_is_proc() -> usize {
    let before = proc_truth();
    let document = plumb_json(&["ps"]);
    assert_is_proc(&before, &document)
}

/// As `assert_ps_is_proc`, of a document that was taken since `before` was.
pub(crate) fn assert_is_proc(before: &BTreeMap<u32, Truth>, document: &Value) -> usize {
    let after = proc_truth();
    let shown: BTreeMap<u64, &Value> =
        document["processes"].as_array().unwrap().iter().map(|p| (p["pid"].as_u64().unwrap(), p)).collect();
    let mut compared = 0;
    for (&pid, truth) in before {
        // PID 1 of the development machine is hidden from iterators, and kernels may hide it elsewhere.
        let rests = truth.switches != RUNS && after.get(&pid) == Some(truth);
        if !rests || truth.leaderless || (pid == 1 && !shown.contains_key(&1)) {
            continue;
        }
        let process = shown.get(&u64::from(pid)).unwrap_or_else(|| panic!("{pid} is missing: {truth:?}"));
        assert_eq!(process["fds"].as_u64(), Some(truth.fds), "fds of {process}");
        assert_eq!(process["fd_limit"].as_u64(), truth.fd_limit, "limit of {process}");
        assert_eq!(process["threads"].as_u64(), Some(truth.threads), "threads of {process}");
        assert_eq!(process["ppid"].as_u64(), Some(truth.ppid), "parent of {process}");
        compared += 1;
    }
    compared
}

/// The line with the mark of this name.
pub(crate) fn marked(source: &str, mark: &str) -> Option<u32> {
    let wanted = format!("MARK {mark}");
    let is_marked = |line: &str| {
        line.split_once(&wanted)
            .is_some_and(|(_, rest)| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_'))
    };
    let line = (1..).zip(source.lines()).find(|(_, line)| is_marked(line)).map(|(number, _)| number);
    assert!(line.is_some(), "{mark}");
    line
}

//! The processes of a service, found anew each time they are needed.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io::Read,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

use procfs::{
    ProcError, ProcResult,
    net::{self, TcpNetEntry, TcpState},
};

use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::{
    identity::TICKS,
    process::{self, NoProcess, Process, folder},
    service::Target,
};

/// Processes of one service at most: each takes an fd.
const MAX_MEMBERS: usize = 1024;
/// Fds of all processes of a user, but root, that are looked at for who listens on a port: some seconds.
const MAX_LOOKED_AT: usize = 4 << 20;
/// A pidfile is a number and a newline.
const MAX_PIDFILE: u64 = 64;
/// A process may be started up to so long after its pidfile was written, by clocks that are not the same.
const PIDFILE_SLACK: Duration = Duration::from_secs(1);

/// A process of a service.
#[derive(Debug)]
pub(super) struct Match {
    pub(super) process: Process,
    /// Gets the signal: it was started by no other one that the service names.
    pub(super) is_root: bool,
    /// The service does not name it: a process that it names has started it.
    pub(super) is_descendant: bool,
}

/// What runs of a service; nothing when it does not run. A registered process is the one that is held since, never one
/// that has its number now.
pub(super) fn find(target: &Target, held: Option<&Process>) -> Result<Vec<Match>, String> {
    let processes = match target {
        Target::Process(meant) => match held.map(Process::again) {
            Some(Ok(process)) => match meant.differs(&process.identity) {
                None => vec![process],
                Some(why) => return Err(why),
            },
            None | Some(Err(NoProcess::Gone(_))) => Vec::new(),
            Some(Err(why)) => return Err(why.to_string()),
        },
        Target::Pidfile(path) => of_pidfile(path)?.into_iter().collect(),
        Target::Exe(path, arguments) => match fs::metadata(path) {
            Ok(found) => {
                let exe = (found.dev(), found.ino());
                // By a symbolic link it is run by the name of what that is of.
                let real = fs::canonicalize(path).unwrap_or_else(|_| path.clone());
                where_(|pid| (runs(pid, exe) || ran(pid, &real, exe)) && has_arguments(pid, arguments))?
            }
            Err(error) => return Err(format!("{}: {error}", path.display())),
        },
        Target::Cgroup(path) => where_(|pid| is_in_cgroup(pid, path))?,
        Target::Port(port) => {
            let sockets = listening(*port)?;
            let mut budgets = HashMap::new();
            let found = where_(|pid| holds(pid, &sockets, &mut budgets))?;
            if found.is_empty()
                && let Some((uid, _)) = budgets.iter().find(|(_, left)| **left == 0)
            {
                return Err(format!(
                    "user {uid} has more than {MAX_LOOKED_AT} open fds, too many to see whether he listens on port \
                     {port}: name it by its pidfile or exe"
                ));
            }
            if found.is_empty() && !sockets.is_disjoint(&listening(*port)?) {
                return Err(format!("somebody listens on port {port} whom plumb cannot see"));
            }
            found
        }
        Target::Unit(unit) => return Err(format!("no systemd answers here: {unit} cannot be stopped")),
    };
    if processes.len() > MAX_MEMBERS {
        return Err(format!("it has more than {MAX_MEMBERS} processes: name its main process by a pidfile"));
    }
    let named = |process| Match { process, is_root: false, is_descendant: false };
    let mut found: Vec<Match> = processes.into_iter().map(named).collect();
    find_roots(&mut found);
    Ok(found)
}

/// Of the processes that a service names, those that no other one of them has started are its roots.
pub(super) fn find_roots(found: &mut [Match]) {
    let named = found.iter().filter(|one| !one.is_descendant);
    let numbers: HashSet<u32> = named.map(|one| one.process.identity.pid).collect();
    for one in found {
        one.is_root = !one.is_descendant && !numbers.contains(&one.process.ppid);
    }
}

/// All processes for which something holds, before and after they were taken hold of.
fn where_(mut holds: impl FnMut(u32) -> bool) -> Result<Vec<Process>, String> {
    let mut found = Vec::new();
    for pid in process::all().map_err(|error| format!("/proc cannot be read: {error}"))? {
        if !holds(pid) {
            continue;
        }
        match Process::open(pid) {
            Ok(process) => {
                if holds(pid) && process.is_alive() {
                    found.push(process);
                }
            }
            Err(NoProcess::Gone(_)) => {}
            Err(why) => return Err(why.to_string()),
        }
        if found.len() > MAX_MEMBERS {
            break;
        }
    }
    Ok(found)
}

/// By device and inode: the same path in a container is another program.
pub(super) fn runs(pid: u32, exe: (u64, u64)) -> bool {
    fs::metadata(folder(pid).join("exe")).is_ok_and(|found| (found.dev(), found.ino()) == exe)
}

/// Whether it runs what was at a path before: an upgrade has put another file there.
fn ran(pid: u32, path: &Path, exe: (u64, u64)) -> bool {
    // What the kernel says of a file that is there no longer (fs/d_path.c, d_path).
    let is_it = |found: PathBuf| {
        let gone = found.as_os_str().as_bytes().strip_suffix(b" (deleted)");
        gone.is_some_and(|gone| gone == path.as_os_str().as_bytes())
    };
    // In a container the path is another file's; units of the host may have mounts of their own, and the same file.
    fs::read_link(folder(pid).join("exe")).is_ok_and(is_it) && sees(pid, path).is_ok_and(|seen| seen == exe)
}

/// Device and inode of what a process has at a path.
fn sees(pid: u32, path: &Path) -> rustix::io::Result<(u64, u64)> {
    let only_path = OFlags::PATH | OFlags::CLOEXEC;
    let root = rustix::fs::open(folder(pid).join("root"), only_path | OFlags::DIRECTORY, Mode::empty())?;
    // Since 5.6; no link leads out of its root.
    let file = rustix::fs::openat2(root, path, only_path, Mode::empty(), ResolveFlags::IN_ROOT)?;
    let found = rustix::fs::fstat(file)?;
    Ok((found.st_dev, found.st_ino))
}

fn has_arguments(pid: u32, arguments: &[String]) -> bool {
    if arguments.is_empty() {
        return true;
    }
    let given = fs::read(folder(pid).join("cmdline")).unwrap_or_default();
    let mut given = given.split(|byte| *byte == 0).skip(1);
    arguments.iter().all(|argument| given.next() == Some(argument.as_bytes()))
}

fn is_in_cgroup(pid: u32, path: &str) -> bool {
    let text = fs::read(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.lines()
        .filter_map(|line| line.splitn(3, ':').nth(2))
        .any(|own| own.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
}

/// Inodes of the TCP sockets that listen on a port, in the agent's network namespace.
fn listening(port: u16) -> Result<HashSet<u64>, String> {
    let listens = |entry: &TcpNetEntry| entry.state == TcpState::Listen;
    Ok(on_port(port)?.filter(listens).map(|entry| entry.inode).collect())
}

/// Whether somebody has a connection on a port, in the agent's network namespace.
pub(super) fn has_connections(port: u16) -> Result<bool, String> {
    let is_open = |entry: &TcpNetEntry| matches!(entry.state, TcpState::Established | TcpState::CloseWait);
    Ok(on_port(port)?.any(|entry| is_open(&entry) && entry.inode != 0))
}

fn on_port(port: u16) -> Result<impl Iterator<Item = TcpNetEntry>, String> {
    let entries = all_of(net::tcp(), net::tcp6());
    let entries = entries.map_err(|error| format!("the host's TCP sockets cannot be read: {error}"))?;
    Ok(entries.into_iter().filter(move |entry| entry.local_address.port() == port))
}

/// The TCP sockets of a network namespace; a kernel without IPv6 has no table of those.
pub(super) fn all_of(
    tcp: ProcResult<Vec<TcpNetEntry>>,
    tcp6: ProcResult<Vec<TcpNetEntry>>,
) -> ProcResult<Vec<TcpNetEntry>> {
    let tcp6 = match tcp6 {
        Err(ProcError::NotFound(_)) => Vec::new(),
        tcp6 => tcp6?,
    };
    Ok(tcp?.into_iter().chain(tcp6).collect())
}

/// Of the fds of each user only so many are looked at.
fn holds(pid: u32, sockets: &HashSet<u64>, budgets: &mut HashMap<u32, usize>) -> bool {
    let Ok(uid) = fs::metadata(folder(pid)).map(|found| found.uid()) else { return false };
    let left = budgets.entry(uid).or_insert(if uid == 0 { usize::MAX } else { MAX_LOOKED_AT });
    let mut own = || sockets_of(pid, left).unwrap_or_default();
    !sockets.is_empty() && own().iter().any(|inode| sockets.contains(inode))
}

/// Inodes of the sockets that a process has open; nothing where that cannot be read, or when more fds than are left have been
/// looked at.
pub(super) fn sockets_of(pid: u32, left: &mut usize) -> Option<HashSet<u64>> {
    let inode = |entry: std::io::Result<fs::DirEntry>| {
        let target = fs::read_link(entry.ok()?.path()).ok()?;
        target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse::<u64>().ok()
    };
    let mut found = HashSet::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).ok()? {
        *left = left.checked_sub(1)?;
        found.extend(inode(entry));
    }
    Some(found)
}

/// The process that a pidfile names, if the file was written by it or root, and for it: an older process has left
/// it where the number is another's now.
fn of_pidfile(path: &Path) -> Result<Option<Process>, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", path.display());
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = match options.open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let about = file.metadata().map_err(failed)?;
    if !about.is_file() {
        return Err(format!("{} is no file", path.display()));
    }
    if about.mode() & 0o022 != 0 {
        return Err(format!("{} can be written by others: whoever does says whom to signal", path.display()));
    }
    let mut text = String::new();
    file.take(MAX_PIDFILE).read_to_string(&mut text).map_err(failed)?;
    let pid = text.split_whitespace().next().and_then(|word| word.parse::<u32>().ok());
    let Some(pid) = pid else { return Err(format!("{} holds no number", path.display())) };
    let process = match Process::open(pid) {
        Ok(process) => process,
        Err(NoProcess::Gone(_)) => return Ok(None),
        Err(why) => return Err(why.to_string()),
    };
    if about.uid() != 0 && !process.may_be_signalled_by(about.uid()) {
        return Err(format!("{} belongs to user {}, process {pid} does not", path.display(), about.uid()));
    }
    let written = about.modified().map_err(failed)?.duration_since(UNIX_EPOCH).unwrap_or_default();
    if started(&process) > written + PIDFILE_SLACK {
        let comm = &process.identity.comm;
        return Err(format!(
            "{} is older than the process that it names, {pid} ({comm}): it is not of that one",
            path.display()
        ));
    }
    Ok(Some(process))
}

/// When a process was started, since 1970, by the clock as it is now.
fn started(process: &Process) -> Duration {
    let boot = UNIX_EPOCH
        .elapsed()
        .unwrap_or_default()
        .saturating_sub(Duration::from_nanos(crate::clock::boottime()));
    boot + Duration::from_millis(process.identity.start_ticks * 1000 / TICKS)
}

#[cfg(test)]
mod tests {
    use std::{
        fs::Permissions,
        net::TcpListener,
        os::unix::fs::PermissionsExt,
        process::{Child, Command},
    };

    use super::*;

    struct Running(Child);

    impl Drop for Running {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn pids(target: &Target) -> Vec<u32> {
        find(target, None).unwrap().iter().map(|one| one.process.identity.pid).collect()
    }

    #[test]
    fn an_executable_and_its_arguments_are_found_and_the_parent_is_the_root() {
        let time = format!("60.{}", std::process::id());
        let script = format!("sleep {time} & exec sleep {time}");
        let running = Running(Command::new("/bin/sh").args(["-c", &script]).spawn().unwrap());
        let sleep = fs::canonicalize("/bin/sleep").unwrap();
        let target = Target::Exe(sleep, vec![time]);
        let end = std::time::Instant::now() + Duration::from_secs(10);
        while pids(&target).len() < 2 && std::time::Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
        let found = find(&target, None).unwrap();
        let roots: Vec<_> =
            found.iter().filter(|one| one.is_root).map(|one| one.process.identity.pid).collect();
        assert_eq!((found.len(), &roots[..]), (2, &[running.0.id()][..]));
        for one in found.iter().filter(|one| !one.is_root) {
            rustix::process::pidfd_send_signal(one.process.pidfd(), rustix::process::Signal::KILL).unwrap();
        }
    }

    /// Also by the agent of a unit with mounts of its own, as that of the package is, and of such a unit.
    #[test]
    fn what_runs_is_found_by_its_executable_after_an_upgrade_of_that() {
        let base = std::env::temp_dir().join(format!("plumb-upgrade-{}", std::process::id()));
        let [folder, other] = ["host", "image"].map(|name| base.join(name));
        let (path, link) = (folder.join("web"), folder.join("link"));
        let upgrade = |folder: &Path| {
            // By another process: who forks meanwhile would hold it open for writing, and it could not be run.
            let copy = Command::new("cp").arg("/bin/sleep").arg(folder.join("new")).status();
            assert!(copy.unwrap().success());
            fs::rename(folder.join("new"), folder.join("web")).unwrap();
        };
        for folder in [&folder, &other] {
            fs::create_dir_all(folder).unwrap();
            upgrade(folder);
        }
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let start = |script: &str| {
            let mut command = Command::new("unshare");
            command.args(["--mount", "/bin/sh", "-c", script]);
            command.env("HOST", &folder).env("IMAGE", &other);
            Running(command.spawn().unwrap())
        };
        let plain = Running(Command::new(&path).arg("30").spawn().unwrap());
        let apart = start("exec \"$HOST/web\" 30");
        // In a container the same path is another file's.
        let container = start("mount --bind \"$IMAGE\" \"$HOST\" && exec \"$HOST/web\" 30");
        let mut all = [plain.0.id(), apart.0.id()];
        all.sort_unstable();
        let found = || {
            let by = |path: &PathBuf| {
                let mut found = pids(&Target::Exe(path.clone(), vec!["30".to_owned()]));
                found.sort_unstable();
                found
            };
            assert_eq!(by(&path), by(&link));
            by(&path)
        };
        let exe = |running: &Running| fs::read_link(super::folder(running.0.id()).join("exe")).unwrap();
        let end = std::time::Instant::now() + Duration::from_secs(10);
        // A child of vfork is on its own a moment before its arguments are in place.
        let runs = |one: &Running| exe(one) == path && has_arguments(one.0.id(), &["30".to_owned()]);
        while ![&plain, &apart, &container].into_iter().all(runs) {
            assert!(std::time::Instant::now() < end, "{:?} {:?}", exe(&apart), exe(&container));
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(found(), all);
        [&folder, &other].into_iter().for_each(|folder| upgrade(folder));
        let gone = |running: &Running| exe(running).to_string_lossy().into_owned();
        assert!([&plain, &apart, &container].map(gone).iter().all(|path| path.ends_with("web (deleted)")));
        assert_eq!(found(), all);
        fs::remove_dir_all(&base).unwrap();
    }

    #[test]
    fn a_pidfile_counts_only_if_its_process_wrote_it_and_nobody_else_could() {
        let running = Running(Command::new("sleep").arg("30").spawn().unwrap());
        let path = std::env::temp_dir().join(format!("plumb-pidfile-{}", std::process::id()));
        let target = Target::Pidfile(path.clone());
        let _ = fs::remove_file(&path);
        assert!(pids(&target).is_empty());
        fs::write(&path, format!("{}\n", running.0.id())).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        assert_eq!(pids(&target), [running.0.id()]);
        // Left from a process that was there long before.
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(std::time::SystemTime::now() - Duration::from_secs(3600)).unwrap();
        assert!(find(&target, None).unwrap_err().contains("is older"));
        file.set_modified(std::time::SystemTime::now()).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        assert!(find(&target, None).unwrap_err().contains("written by others"));
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        for (text, why) in [("", "no number"), ("-1", "no number"), ("1", "first process")] {
            fs::write(&path, text).unwrap();
            assert!(find(&target, None).unwrap_err().contains(why), "{text}");
        }
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        assert!(find(&target, None).is_err());
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_registered_process_is_the_one_that_is_held_whoever_has_its_number_now() {
        let mut first = Running(Command::new("sleep").arg("30").spawn().unwrap());
        let held = Process::open(first.0.id()).unwrap();
        assert_eq!(find(&Target::Process(held.identity.clone()), Some(&held)).unwrap().len(), 1);
        first.0.kill().unwrap();
        first.0.wait().unwrap();
        // One that nothing in /proc tells from it.
        let other = Running(Command::new("sleep").arg("30").spawn().unwrap());
        let target = Target::Process(Process::open(other.0.id()).unwrap().identity);
        assert!(find(&target, Some(&held)).unwrap().is_empty());
        assert!(find(&target, None).unwrap().is_empty());
    }

    #[test]
    fn a_port_is_that_of_the_process_that_listens() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        // It is plumb's own here, which is found and refused.
        assert!(find(&Target::Port(port), None).unwrap_err().contains("plumb itself"));
        let sockets = |mut left| sockets_of(std::process::id(), &mut left);
        assert!(!sockets(1 << 20).unwrap().is_empty());
        assert_eq!(sockets(1), None, "there are more");
        drop(listener);
        assert!(pids(&Target::Port(port)).is_empty());
    }

    #[test]
    fn a_cgroup_holds_what_is_below_it_and_not_what_only_begins_like_it() {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let path = own.lines().filter_map(|line| line.splitn(3, ':').nth(2)).find(|path| path.len() > 1);
        if let Some(path) = path {
            assert!(is_in_cgroup(std::process::id(), path));
            assert!(!is_in_cgroup(std::process::id(), &path[..path.len() - 1]));
        }
        assert!(!is_in_cgroup(std::process::id(), "/nonexistent"));
    }
}

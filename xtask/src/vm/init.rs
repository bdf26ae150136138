//! The first process of the virtual machine: makes it look like a host, runs the commands, powers off. Where systemd
//! is the first process, a service of it, which finds a host.
//!
//! The kernel's own messages go to the first serial port. Commands print on the second one, where the
//! kernel never writes, so a report cannot be torn apart by a kernel message.

use std::{
    collections::BTreeMap,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result};
use rustix::{
    fs::{Mode, OFlags},
    mount::{MountFlags, mount},
    process::{Resource, Rlimit, WaitOptions},
    system::RebootCommand,
    termios::{OptionalActions, tcdrain, tcgetattr, tcsetattr},
};
use serde::{Deserialize, Serialize};

use super::debian;

/// Where the image holds the manifest.
pub(super) const MANIFEST: &str = "/manifest.json";
/// Begins a report. No program prints this control character by chance.
pub(super) const REPORT_MARK: &str = "\u{1e}plumb-vm ";
/// Set for the service that runs the commands.
pub(super) const SERVICE: (&str, &str) = ("PLUMB_VM", "service");
const OUTPUT: &str = "/dev/ttyS1";
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Enough descriptors for the largest test; the kernel's default is half of it.
const MAX_DESCRIPTORS: u64 = 2_000_000;

/// What the guest shall do.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Manifest {
    pub(super) env: Vec<(String, String)>,
    pub(super) commands: Vec<Vec<String>>,
}

/// How one command ended.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Report {
    /// Its index in the manifest.
    pub(super) command: usize,
    pub(super) outcome: Outcome,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Outcome {
    Exit(i32),
    Signal(i32),
    NotStarted(String),
}

struct Mount {
    kind: &'static str,
    target: &'static str,
    required: bool,
}

const fn mount_point(kind: &'static str, target: &'static str, required: bool) -> Mount {
    Mount { kind, target, required }
}

/// In mounting order. The optional ones are absent from some kernel configurations.
const MOUNTS: [Mount; 10] = [
    mount_point("proc", "/proc", true),
    mount_point("sysfs", "/sys", true),
    mount_point("devtmpfs", "/dev", true),
    mount_point("tmpfs", "/tmp", true),
    mount_point("tmpfs", "/run", true),
    mount_point("tmpfs", "/dev/shm", false),
    mount_point("devpts", "/dev/pts", false),
    mount_point("tracefs", "/sys/kernel/tracing", false),
    mount_point("bpf", "/sys/fs/bpf", false),
    mount_point("cgroup2", "/sys/fs/cgroup", false),
];

/// Whether this process runs the commands of a virtual machine that [`super::run`] made.
pub(crate) fn is_init() -> bool {
    (std::process::id() == 1 || is_service()) && Path::new(MANIFEST).exists()
}

fn is_service() -> bool {
    std::env::var_os(SERVICE.0).is_some_and(|value| value == SERVICE.1)
}

/// Does everything and powers off. Returns only when even that fails, which the kernel answers with a panic.
pub(crate) fn main() {
    if let Err(error) = work() {
        eprintln!("init: {error:#}");
    }
    // Output that is still in the port's queue would be lost.
    let _ = tcdrain(rustix::stdio::stdout());
    if let Err(error) = rustix::system::reboot(RebootCommand::PowerOff) {
        eprintln!("init: cannot power off: {error}");
    }
}

fn work() -> Result<()> {
    if is_service() {
        open_output()?;
        debian::await_boot()?;
    } else {
        furnish()?;
    }
    let manifest: Manifest =
        serde_json::from_slice(&fs::read(MANIFEST)?).context("cannot read the manifest")?;
    let mut env =
        BTreeMap::from([("PATH".to_owned(), PATH.to_owned()), ("HOME".to_owned(), "/root".to_owned())]);
    env.extend(manifest.env);
    for (command, words) in manifest.commands.iter().enumerate() {
        let outcome = execute(words, &env).unwrap_or_else(|error| Outcome::NotStarted(format!("{error:#}")));
        println!("{REPORT_MARK}{}", serde_json::to_string(&Report { command, outcome })?);
    }
    Ok(())
}

/// Does what a distribution does when it boots.
fn furnish() -> Result<()> {
    let failed = mount_all()?;
    open_output()?;
    for failure in failed {
        eprintln!("init: {failure}");
    }
    rustix::system::sethostname(b"plumb-vm").context("cannot set the host name")?;
    // The flag is IFF_UP; the kernel then gives the interface its address 127.0.0.1 by itself.
    fs::write("/sys/class/net/lo/flags", "0x1").context("cannot bring up the loopback interface")?;
    raise_descriptor_limit()?;
    Ok(fs::create_dir_all("/root")?)
}

/// Mounts everything and returns what could not be mounted of the optional ones.
fn mount_all() -> Result<Vec<String>> {
    let mut failed = Vec::new();
    for Mount { kind, target, required } in MOUNTS {
        // A folder below /sys that cannot be made is reported by the mount itself.
        let _ = fs::create_dir_all(target);
        let filled = fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_some());
        if kind == "tmpfs" && filled {
            // Programs built below /tmp are in the image at that path; a mount would hide them.
            continue;
        }
        let mounted = mount(kind, target, kind, MountFlags::empty(), None)
            .with_context(|| format!("cannot mount {kind} at {target}"));
        match mounted {
            Err(error) if required => return Err(error),
            Err(error) => failed.push(format!("{error:#}")),
            Ok(()) => {}
        }
    }
    for (folder, mode) in [("/tmp", 0o1777), ("/run", 0o755)] {
        fs::set_permissions(folder, Permissions::from_mode(mode))?;
    }
    Ok(failed)
}

/// Makes the second serial port stdout and stderr, byte for byte, and /dev/null stdin.
fn open_output() -> Result<()> {
    let port = rustix::fs::open(OUTPUT, OFlags::RDWR | OFlags::NOCTTY, Mode::empty())
        .with_context(|| format!("cannot print to {OUTPUT}"))?;
    let mut settings = tcgetattr(&port)?;
    settings.make_raw();
    tcsetattr(&port, OptionalActions::Now, &settings)?;
    rustix::stdio::dup2_stdin(fs::File::open("/dev/null")?)?;
    rustix::stdio::dup2_stdout(&port)?;
    rustix::stdio::dup2_stderr(&port)?;
    Ok(())
}

/// Raises the hard limit only: a program that needs more than the usual 1024 must ask, as on a host.
fn raise_descriptor_limit() -> Result<()> {
    fs::write("/proc/sys/fs/nr_open", MAX_DESCRIPTORS.to_string()).context("cannot raise fs.nr_open")?;
    let limit = rustix::process::getrlimit(Resource::Nofile);
    rustix::process::setrlimit(Resource::Nofile, Rlimit { maximum: Some(MAX_DESCRIPTORS), ..limit })
        .context("cannot raise the limit of open descriptors")
}

/// Runs one command to its end. The first process inherits orphans, so it reaps them meanwhile.
fn execute(words: &[String], env: &BTreeMap<String, String>) -> Result<Outcome> {
    let (program, arguments) = words.split_first().context("the command is empty")?;
    let child = Command::new(program).args(arguments).env_clear().envs(env).stdin(Stdio::null()).spawn()?;
    loop {
        let reaped = rustix::process::wait(WaitOptions::empty()).context("cannot wait for the command")?;
        let (pid, status) = reaped.context("the command has vanished")?;
        if pid.as_raw_nonzero().get().unsigned_abs() != child.id() {
            continue;
        }
        let exit = status.exit_status().map(Outcome::Exit);
        return exit
            .or(status.terminating_signal().map(Outcome::Signal))
            .context("the command has no exit status");
    }
}

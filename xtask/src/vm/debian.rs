//! A whole Debian 12 for the machines whose first process is systemd: made once from the archive of this machine's
//! apt, kept in target/debian, and laid below the files of each run.
//!
//! The programs of the host bring their libraries along, which replace those of this Debian: the host is a Debian 12
//! too, with the same C library.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use super::{archive, initramfs::Image};
use crate::{cmd, setup, workspace};

const SUITE: &str = "bookworm";
/// Beside what is essential. The list is the name of what is kept: another one is made anew.
const PACKAGES: [&str; 3] = ["systemd", "systemd-sysv", "dbus"];
/// All is in the machine's memory, and nobody reads these.
const LEFT_OUT: [&str; 3] = ["/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/man/*"];
/// What the kernel starts. Nobody logs in, and without udev systemd would wait 90 s for the console's device.
pub(super) const KERNEL_ARGUMENTS: &str = "rdinit=/usr/lib/systemd/systemd systemd.getty_auto=no";
/// Where the machine has xtask.
const RUNNER: &str = "/usr/lib/plumb-vm";

/// The unit that runs the commands. It is no part of the boot, so that the host is "running" meanwhile, and no part of
/// a shutdown, so that a command can watch one: not stopped with the other units, and by the @ in its name spared when
/// systemd ends what is left.
const UNIT: &str = "\
[Unit]
Description=The commands of this virtual machine
DefaultDependencies=no
Wants=sysinit.target
After=sysinit.target
FailureAction=poweroff-immediate
[Service]
Type=exec
ExecStart=@/usr/lib/plumb-vm @plumb-vm
Environment=PLUMB_VM=service
TasksMax=infinity
";

/// Puts Debian below `image`, and xtask into it as a service.
pub(super) fn add_to(image: &mut Image, xtask: &Path) -> Result<()> {
    image.lay_upon(base()?);
    image.add_file(xtask, RUNNER.as_ref())?;
    for (file, text) in [
        ("/etc/systemd/system/plumb-vm.service", UNIT),
        ("/etc/systemd/system/multi-user.target.d/plumb-vm.conf", "[Unit]\nWants=plumb-vm.service\n"),
        // Programs built below /tmp are in the image at that path: it is not emptied, but open to all again.
        ("/etc/tmpfiles.d/tmp.conf", "d /tmp 1777 root root -\nd /var/tmp 1777 root root -\n"),
        ("/etc/hostname", "plumb-vm\n"),
        // A machine without one asks questions when it boots.
        ("/etc/machine-id", "706c756d622d766d2d6d616368696e65\n"),
    ] {
        image.add_bytes(file.as_ref(), text.as_bytes().to_vec());
    }
    Ok(())
}

/// The archive of the whole system; makes it unless it was made before.
fn base() -> Result<PathBuf> {
    let folder = workspace().join("target/debian");
    fs::create_dir_all(&folder)?;
    let lock = File::create(folder.join("lock"))?;
    lock.lock().context("cannot lock the folder of Debian")?;
    let base = folder.join(format!("{SUITE}+{}.cpio", PACKAGES.join("+")));
    if !base.exists() {
        setup::require_root("making a Debian for virtual machines")?;
        setup::for_debian()?;
        eprintln!("xtask: makes a Debian {SUITE} with {} (a minute or two)", PACKAGES.join(", "));
        // What was interrupted is not there.
        let partial = base.with_extension("partial");
        make(&partial).with_context(|| format!("cannot make a Debian {SUITE}"))?;
        fs::rename(&partial, &base)?;
    }
    Ok(base)
}

fn make(to: &Path) -> Result<()> {
    let mut debootstrap = Command::new("mmdebstrap");
    debootstrap.args(["--quiet", "--variant=minbase"]).arg(format!("--include={}", PACKAGES.join(",")));
    for pattern in LEFT_OUT {
        debootstrap.arg(format!("--dpkgopt=path-exclude={pattern}"));
    }
    // Such as a proxy.
    let settings = cmd::output(Command::new("apt-config").args(["--no-empty", "dump"]))?;
    for setting in settings.lines().filter(|line| line.starts_with("Acquire::http")) {
        debootstrap.arg(format!("--aptopt={setting}"));
    }
    debootstrap.args([SUITE, "-"]);
    for suite in [SUITE.to_owned(), format!("{SUITE}-security")] {
        debootstrap.arg(archive::source(&suite, "")?);
    }
    let mut debootstrap =
        debootstrap.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot start mmdebstrap")?;
    let tar = debootstrap.stdout.take().context("mmdebstrap has no stdout")?;
    let packed =
        cmd::run(Command::new("bsdtar").args(["--format", "newc", "-cf"]).arg(to).arg("@-").stdin(tar));
    // Its failure is the cause of the other's.
    let status = debootstrap.wait()?;
    ensure!(status.success(), "mmdebstrap failed: {status}");
    packed
}

/// Waits until all that belongs to the boot has been started.
pub(super) fn await_boot() -> Result<()> {
    let mut systemctl = Command::new("systemctl");
    let output =
        systemctl.args(["is-system-running", "--wait"]).output().context("cannot start systemctl")?;
    let state = String::from_utf8_lossy(&output.stdout);
    if state.trim() != "running" {
        let failed = cmd::output(Command::new("systemctl").args(["list-units", "--failed", "--no-legend"]))?;
        eprintln!("init: the system is {}: {}", state.trim(), failed.trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{RUNNER, UNIT};
    use crate::vm::init::SERVICE;

    #[test]
    fn the_unit_starts_xtask_as_the_runner() {
        assert!(UNIT.contains(&format!("\nExecStart=@{RUNNER} @")));
        assert!(UNIT.contains(&format!("\nEnvironment={}={}\n", SERVICE.0, SERVICE.1)));
    }
}

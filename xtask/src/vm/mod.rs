//! Runs programs on other kernels, each in a virtual machine that lives only for that run.
//!
//! The machine has no disk and no distribution: an initramfs holds the programs, the libraries they
//! link to, and `xtask` itself as `/init`. `qemu` boots it by emulation, so no hardware support is
//! needed, and everything is several times slower than on the host.
//!
//! A guest that asks for it has a whole Debian with systemd instead, also unpacked into memory.

mod archive;
mod cli;
mod debian;
pub(crate) mod init;
mod initramfs;
mod kernels;
mod qemu;
mod queue;
mod second;

use std::{fs::File, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};

pub(crate) use self::{
    cli::Arguments,
    kernels::{Kernel, refresh, select},
    queue::{Machine, run_all},
};
use self::{
    init::{Manifest, Outcome},
    initramfs::Image,
    qemu::End,
};

/// What a virtual machine contains and does.
#[derive(Clone)]
pub(crate) struct Guest {
    /// Path on the host, absolute path in the guest. Shared libraries come along by themselves.
    pub(crate) files: Vec<(PathBuf, PathBuf)>,
    /// Environment of every command, besides PATH and HOME.
    pub(crate) env: Vec<(String, String)>,
    /// Run in this order as root, each to its end, whether or not the one before succeeded.
    pub(crate) commands: Vec<Vec<String>>,
    /// A Debian 12 with systemd, whose service the commands are. Takes 20 s to boot.
    pub(crate) systemd: bool,
    /// The initramfs counts against it.
    pub(crate) memory_mb: u32,
    /// From power-on to power-off.
    pub(crate) deadline: Duration,
}

impl Default for Guest {
    fn default() -> Self {
        Self {
            files: Vec::new(),
            env: Vec::new(),
            commands: Vec::new(),
            systemd: false,
            memory_mb: 2048,
            deadline: Duration::from_secs(600),
        }
    }
}

/// [`run`] on one kernel after the other. A failure on one does not keep the others from being tried.
pub(crate) fn run_on(kernels: &[Kernel], guest: &Guest) -> Result<()> {
    let mut failed = 0;
    for kernel in kernels {
        if let Err(error) = run(kernel, guest) {
            eprintln!("xtask: {error:#}");
            failed += 1;
        }
    }
    ensure!(failed == 0, "{failed} of {} kernels failed", kernels.len());
    Ok(())
}

/// Boots `kernel` and runs the commands of `guest`; what they print appears on stdout behind the series, and
/// is returned by lines.
///
/// # Errors
/// When the kernel cannot be had, when the machine does not end by itself before the deadline, and when
/// any command did not report exit status 0.
pub(crate) fn run(kernel: &Kernel, guest: &Guest) -> Result<Vec<String>> {
    let end = boot(kernel, guest)?;
    end.judge(kernel, guest)?;
    Ok(end.lines)
}

/// Boots `kernel` and runs the commands of `guest`, whatever becomes of them.
fn boot(kernel: &Kernel, guest: &Guest) -> Result<End> {
    let folder = kernel.folder()?;
    // A second run of the same series would overwrite the image and the log of this one.
    let lock = File::create(folder.join("lock"))?;
    lock.lock().context("cannot lock the folder of the kernel")?;
    let vmlinuz = kernel.fetch()?;

    let initrd = folder.join("initramfs.cpio");
    let manifest = Manifest { env: guest.env.clone(), commands: guest.commands.clone() };
    let mut image = Image::default();
    // Not the path of this executable: a build that ran in between may have replaced the file.
    let xtask = PathBuf::from(format!("/proc/{}/exe", std::process::id()));
    if guest.systemd {
        debian::add_to(&mut image, &xtask)?;
    } else {
        image.add_file(&xtask, "/init".as_ref())?;
    }
    image.add_bytes(init::MANIFEST.as_ref(), serde_json::to_vec(&manifest)?);
    for (host, guest) in &guest.files {
        image.add_file(host, guest)?;
    }
    image.write(&initrd)?;

    let machine = qemu::Machine { vmlinuz, initrd, console: folder.join("console.log"), guest };
    let end = machine.boot(&kernel.series)?;
    // A command that failed has said why; a machine that broke off has only the kernel's log.
    if end.cut_short.is_some() {
        machine.show_console_tail(&kernel.series);
    }
    Ok(end)
}

impl End {
    fn judge(&self, kernel: &Kernel, guest: &Guest) -> Result<()> {
        let problems = problems(&guest.commands, self);
        let Kernel { series, version, .. } = kernel;
        ensure!(problems.is_empty(), "kernel {series} ({version}): {}", problems.join("; "));
        eprintln!("xtask: kernel {series} ({version}): passed in {:.1?}", self.took);
        Ok(())
    }

    /// What a command printed.
    fn lines_of(&self, command: usize) -> &[String] {
        let Some(at) = self.reports.iter().position(|(report, _)| report.command == command) else {
            return &[];
        };
        let begin = at.checked_sub(1).map_or(0, |before| self.reports[before].1);
        &self.lines[begin..self.reports[at].1]
    }
}

/// Why a run did not succeed; empty for success, which takes a report of every command and a power-off.
fn problems(commands: &[Vec<String>], end: &End) -> Vec<String> {
    let mut problems = Vec::new();
    let mut missing = None;
    for (index, command) in commands.iter().enumerate() {
        let command = command.join(" ");
        let mut reports = end.reports.iter().map(|(report, _)| report);
        match reports.find(|report| report.command == index).map(|report| &report.outcome) {
            Some(Outcome::Exit(0)) => {}
            Some(Outcome::Exit(status)) => problems.push(format!("`{command}` exited with {status}")),
            Some(Outcome::Signal(signal)) => {
                problems.push(format!("`{command}` was killed by signal {signal}"));
            }
            Some(Outcome::NotStarted(why)) => problems.push(format!("`{command}` did not start: {why}")),
            None => {
                missing = Some(command);
                break;
            }
        }
    }
    match (missing, &end.cut_short) {
        (Some(command), Some(cause)) => problems.push(format!("{cause} before `{command}` ended")),
        (Some(command), None) => problems.push(format!("the report of `{command}` is missing")),
        (None, Some(cause)) => problems.push(format!("{cause} after the last command")),
        (None, None) => {}
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::{
        init::{Outcome, Report},
        problems,
        qemu::End,
    };

    fn end(outcomes: Vec<Outcome>, cut_short: Option<&str>) -> End {
        let reports = outcomes.into_iter().enumerate();
        let reports = reports.map(|(command, outcome)| (Report { command, outcome }, 0)).collect();
        End { reports, cut_short: cut_short.map(ToOwned::to_owned), ..End::default() }
    }

    #[test]
    fn only_a_report_of_every_command_and_a_power_off_is_success() {
        let commands = [vec!["a".to_owned()], vec!["b".to_owned(), "1".to_owned()]];
        let problems = |end| problems(&commands, &end);
        let none: [&str; 0] = [];
        assert_eq!(problems(end(vec![Outcome::Exit(0), Outcome::Exit(0)], None)), none);
        assert_eq!(problems(end(vec![Outcome::Exit(0)], None)), ["the report of `b 1` is missing"]);
        assert_eq!(
            problems(end(vec![Outcome::Exit(0), Outcome::Exit(0)], Some("a panic"))),
            ["a panic after the last command"]
        );
        assert_eq!(
            problems(end(vec![Outcome::Signal(11)], Some("a panic"))),
            ["`a` was killed by signal 11", "a panic before `b 1` ended"]
        );
    }
}

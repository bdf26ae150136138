//! Boots one virtual machine, passes its output on line by line, and collects the reports of its init.

use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    path::PathBuf,
    process::{Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use super::{
    Guest, debian,
    init::{REPORT_MARK, Report},
};

/// An oops must end the run as a panic does: the kernel is not the one under test any more.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 panic=-1 oops=panic";
/// The last message of a kernel that init has told to power off.
const POWER_OFF: &str = "reboot: Power down";
const TAIL_LINES: usize = 40;

pub(super) struct Machine<'a> {
    pub(super) vmlinuz: PathBuf,
    pub(super) initrd: PathBuf,
    /// Receives the kernel's messages.
    pub(super) console: PathBuf,
    pub(super) guest: &'a Guest,
}

/// How a machine ended and what it reported until then.
#[derive(Default)]
pub(super) struct End {
    /// In the order of the commands, each with how many lines had been printed by then.
    pub(super) reports: Vec<(Report, usize)>,
    /// What the commands printed.
    pub(super) lines: Vec<String>,
    /// What happened instead of the power-off that init asks for.
    pub(super) cut_short: Option<String>,
    pub(super) took: Duration,
}

impl Machine<'_> {
    /// Runs the machine until it powers off, panics or exceeds its deadline.
    pub(super) fn boot(&self, series: &str) -> Result<End> {
        let start = Instant::now();
        let deadline = start + self.guest.deadline;
        let mut qemu = self.command().spawn().context("cannot start qemu-system-x86_64")?;
        let output = qemu.stdout.take().context("qemu has no stdout")?;
        let (sender, lines) = mpsc::channel();
        // Ends with qemu, which closes the pipe.
        thread::spawn(move || send_lines(output, &sender));

        let (mut reports, mut printed) = (Vec::new(), Vec::new());
        let mut timed_out = false;
        loop {
            let line = match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => line,
                Err(RecvTimeoutError::Disconnected) => break,
                // The loop goes on for what is still in the pipe, and ends with it.
                Err(RecvTimeoutError::Timeout) => {
                    qemu.kill().context("cannot kill qemu")?;
                    timed_out = true;
                    continue;
                }
            };
            let (text, report) = split_report(&line);
            if let Some(text) = text {
                // The verdict is the exit status; a reader that has left does not change it.
                let _ = writeln!(io::stdout(), "{series} | {text}");
                printed.push(text.to_owned());
            }
            reports.extend(report.map(|report| (report, printed.len())));
        }
        let status = qemu.wait()?;
        let cut_short = if timed_out {
            Some(format!("the deadline of {:?} passed", self.guest.deadline))
        } else if !status.success() {
            Some(format!("qemu failed ({status})"))
        } else if !self.log().contains(POWER_OFF) {
            // After a panic qemu exits with success, too.
            Some("the kernel stopped".to_owned())
        } else {
            None
        };
        Ok(End { reports, lines: printed, cut_short, took: start.elapsed() })
    }

    /// The last words of the kernel, on stderr.
    pub(super) fn show_console_tail(&self, series: &str) {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        for line in &lines[lines.len().saturating_sub(TAIL_LINES)..] {
            eprintln!("{series} console | {line}");
        }
        eprintln!("xtask: the whole log of this kernel is {}", self.console.display());
    }

    /// Empty when qemu did not come as far as to write it.
    fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).into_owned()
    }

    fn command(&self) -> Command {
        let mut kernel_arguments = KERNEL_ARGUMENTS.to_owned();
        if self.guest.systemd {
            kernel_arguments += &format!(" {}", debian::KERNEL_ARGUMENTS);
        }
        // qemu must not outlive xtask, whatever ends xtask.
        let mut command = Command::new("nice");
        command
            // Emulation takes a whole core: what runs on this kernel goes first, but not alone, as guests count time, too.
            .args(["-n", "5", "setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"])
            // Emulation works everywhere, also inside another virtual machine.
            .args(["-accel", "tcg,thread=single", "-cpu", "max", "-smp", "2"])
            .args(["-m", &self.guest.memory_mb.to_string()])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            .arg("-serial")
            .arg(format!("file:{}", self.console.display()))
            .args(["-serial", "stdio"])
            .arg("-kernel")
            .arg(&self.vmlinuz)
            .arg("-initrd")
            .arg(&self.initrd)
            .args(["-append", &kernel_arguments])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        command
    }
}

fn send_lines(output: impl Read, to: &mpsc::Sender<String>) {
    let mut output = BufReader::new(output);
    let mut line = Vec::new();
    while output.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
        let text = String::from_utf8_lossy(line.strip_suffix(b"\n").unwrap_or(&line)).into_owned();
        line.clear();
        if to.send(text).is_err() {
            return;
        }
    }
}

/// Separates a report from what a command printed before it without an end of line. A torn report is text.
fn split_report(line: &str) -> (Option<&str>, Option<Report>) {
    let split = line
        .split_once(REPORT_MARK)
        .and_then(|(text, report)| Some((text, serde_json::from_str(report).ok()?)));
    match split {
        Some((text, report)) => ((!text.is_empty()).then_some(text), Some(report)),
        None => (Some(line), None),
    }
}

#[cfg(test)]
mod tests {
    use super::{REPORT_MARK, split_report};
    use crate::vm::init::{Outcome, Report};

    #[test]
    fn a_report_is_found_behind_an_unfinished_line() {
        let report = serde_json::to_string(&Report { command: 2, outcome: Outcome::Exit(3) }).unwrap();
        let line = format!("50 %{REPORT_MARK}{report}");
        let (text, report) = split_report(&line);
        assert_eq!(text, Some("50 %"));
        let report = report.unwrap();
        assert_eq!((report.command, report.outcome), (2, Outcome::Exit(3)));

        let torn = &line[..line.len() - 1];
        let (text, report) = split_report(torn);
        assert!(text == Some(torn) && report.is_none());
    }
}

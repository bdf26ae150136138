//! `plumb doctor`: what this kernel lets plumb see.

use std::path::Path;

use clap::Args;

use super::{
    Outcome,
    output::{self, Format, Output},
};
use crate::{
    canary::Canary,
    document::{Check, Doctor},
    failure::Exit,
    kernel::{self, Intent, Kernel, LoadError, Plan, Status},
};

#[derive(Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    output: Output,
}

pub(super) fn run(arguments: &Arguments) -> Outcome {
    let mut checks = vec![kernel_release(), types(), pid_namespace()];
    let privilege = kernel::require_capabilities();
    checks.push(Check {
        name: "capabilities",
        ok: privilege.is_ok(),
        detail: privilege
            .as_ref()
            .map_or_else(ToString::to_string, |()| "CAP_BPF and CAP_PERFMON".to_owned()),
    });
    let mut loaded = Kernel::load(Plan::DOCTOR);
    if let Ok(kernel) = &mut loaded {
        checks.push(fd_events(kernel));
    }
    let programs = loaded.as_ref().map(Kernel::programs).unwrap_or_default();
    let mut exit = match &loaded {
        Ok(_) => Exit::Ok,
        Err(LoadError::MissingCapability) => Exit::MissingPrivilege,
        Err(error) => {
            checks.push(Check { name: "load", ok: false, detail: error.to_string() });
            Exit::KernelCannot
        }
    };
    let required = |status: &&Status| status.program.intent == Intent::Required && !status.is_fine();
    if let Some(status) = programs.iter().find(required) {
        exit = if status.verdict.is_for_want_of_privilege() {
            Exit::MissingPrivilege
        } else {
            Exit::KernelCannot
        };
    }
    let document = Doctor::new(checks, programs);
    if arguments.output.format == Format::Table {
        output::data(&text(&document, exit))?;
    } else {
        output::data(&(output::json(&document)? + "\n"))?;
    }
    Ok(exit)
}

fn text(document: &Doctor, exit: Exit) -> String {
    let mut lines: Vec<String> = Vec::new();
    for check in &document.checks {
        lines.push(format!("{} {}: {}", mark(check.ok), check.name, check.detail));
    }
    for program in &document.programs {
        let mut line = format!("{} program {}: {}", mark(program.ok), program.name, program.verdict);
        if !program.detail.is_empty() {
            line += &format!(" ({})", program.detail);
        }
        if !program.ok {
            line += &format!("; without it there is no {}", program.gives);
        }
        lines.push(line);
    }
    lines.push(
        match exit {
            Exit::Ok => "plumb can run here.",
            Exit::MissingPrivilege => "plumb cannot run here without more privilege: run it with sudo.",
            _ => "plumb cannot run on this kernel: see the lines marked NO.",
        }
        .to_owned(),
    );
    lines.join("\n") + "\n"
}

fn mark(ok: bool) -> &'static str {
    if ok { "ok" } else { "NO" }
}

/// Attaches the fd programs for a moment and looks whether an fd of our own is seen.
fn fd_events(kernel: &mut Kernel) -> Check {
    let name = "fd events";
    let Some(seam) = kernel.seam() else {
        return Check {
            name,
            ok: false,
            detail: "no way of following fds; counts are not affected".to_owned(),
        };
    };
    let seen = kernel.ring().map_err(|error| error.to_string()).and_then(|mut ring| {
        kernel.follow_fds(true).map_err(|verdict| verdict.explain())?;
        let seen = Canary::proves(kernel, &mut ring).map_err(|error| error.to_string());
        kernel.follow_fds(false).map_err(|verdict| verdict.explain())?;
        seen
    });
    let (ok, detail) = match seen {
        Ok(true) => (true, format!("seen through {}", seam.describe())),
        Ok(false) => {
            (false, format!("{} is attached, but an fd of plumb's own was not seen", seam.describe()))
        }
        Err(error) => (false, error),
    };
    Check { name, ok, detail }
}

fn kernel_release() -> Check {
    let name = rustix::system::uname();
    Check { name: "kernel", ok: true, detail: name.release().to_string_lossy().into_owned() }
}

fn types() -> Check {
    let path = Path::new(kernel::KERNEL_BTF);
    let ok = path.exists();
    let detail = if ok {
        path.display().to_string()
    } else {
        format!("{} is missing; use a kernel built with CONFIG_DEBUG_INFO_BTF=y", path.display())
    };
    Check { name: "kernel types (BTF)", ok, detail }
}

fn pid_namespace() -> Check {
    let ok = kernel::sees_host_pids();
    let detail = if ok {
        "the host's".to_owned()
    } else {
        "not the host's: the pids that the kernel reports are not those seen here; run with hostPID"
            .to_owned()
    };
    Check { name: "pid namespace", ok, detail }
}

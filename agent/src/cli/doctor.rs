//! `plumb doctor`: what this kernel lets plumb see.

use std::path::Path;

use clap::Args;

use super::{
    Outcome,
    output::{self, Format, Output},
};
use crate::{
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
    let loaded = Kernel::load(Plan::DOCTOR);
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

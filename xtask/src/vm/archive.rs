//! Debian's archive, as this machine's apt knows it: its address, which kernel packages there are, and their files.
//!
//! The addresses come from the machine's own configuration, so that its mirror and its proxy are used.
//! Suites that the machine does not use are read into lists of our own; the machine's stay as they are.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, bail};

use super::Kernel;
use crate::cmd;

const APT_HELPER: &str = "/usr/lib/apt/apt-helper";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// For apt-get and apt-helper: a file below a home folder is not readable for apt's own user.
const UNCONFINED: [&str; 4] = ["-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3"];

/// Downloads the file at `path` of the archive that holds `suite`. The caller checks what it got.
pub(super) fn download(suite: &str, path: &str, to: &Path) -> Result<()> {
    let address = format!("{}/{path}", base(suite)?);
    let mut helper = Command::new(APT_HELPER);
    helper.args(UNCONFINED).args(["download-file", &address]).arg(to);
    let output = helper.output().with_context(|| format!("cannot start {APT_HELPER}"))?;
    if !output.status.success() {
        let messages = String::from_utf8_lossy(&output.stderr);
        bail!("{}", messages.lines().find(|line| line.starts_with("E: ")).unwrap_or("apt-helper failed"));
    }
    Ok(())
}

/// The line of a sources.list that stands for `suite`.
pub(super) fn source(suite: &str, options: &str) -> Result<String> {
    Ok(format!("deb [signed-by={KEYRING}{options}] {} {suite} main", base(suite)?))
}

/// Every kernel image for clouds in these suites. `series` is still empty.
pub(super) fn kernel_packages(folder: &Path, suites: &[&str]) -> Result<Vec<Kernel>> {
    let apt = folder.join("apt");
    fs::create_dir_all(apt.join("lists/partial"))?;
    fs::create_dir_all(apt.join("cache/archives/partial"))?;
    let mut sources = String::new();
    for suite in suites {
        sources += &(source(suite, " target=Packages")? + "\n");
    }
    fs::write(apt.join("sources.list"), sources)?;
    let apt_get = || {
        let mut command = Command::new("apt-get");
        command.args(UNCONFINED).args(["-o", "Dir::Etc::sourceparts=-"]);
        for (option, file) in [
            ("Dir::Etc::sourcelist", "sources.list"),
            ("Dir::State::Lists", "lists"),
            ("Dir::Cache", "cache"),
        ] {
            command.arg("-o").arg(format!("{option}={}", apt.join(file).display()));
        }
        command
    };
    eprintln!("xtask: reads the package lists of {}", suites.join(", "));
    cmd::run(apt_get().args(["update", "-qq", "--error-on=any"]))?;
    let indexes = cmd::output(apt_get().args(["indextargets", "--format", "$(RELEASE) $(FILENAME)"]))?;
    let mut packages = Vec::new();
    for (suite, file) in indexes.lines().filter_map(|line| line.split_once(' ')) {
        let index = cmd::output(Command::new(APT_HELPER).args(["cat-file", file]))?;
        packages.extend(index.split("\n\n").filter_map(|stanza| parse(suite, stanza)));
    }
    Ok(packages)
}

/// Compares as Debian does, where "1~bpo" comes before "1".
pub(super) fn is_newer(version: &str, than: &str) -> bool {
    Command::new("dpkg")
        .args(["--compare-versions", version, "gt", than])
        .status()
        .is_ok_and(|status| status.success())
}

/// Reads one package's description, if it is a kernel image for clouds.
fn parse(suite: &str, stanza: &str) -> Option<Kernel> {
    let field = |name: &str| {
        let value = stanza.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        value.map(ToOwned::to_owned)
    };
    let package = field("Package")?;
    let kind = package.strip_prefix("linux-image-").or_else(|| package.strip_prefix("linux-binary-"))?;
    if !kind.starts_with(|first: char| first.is_ascii_digit()) || !kind.ends_with("-cloud-amd64") {
        return None;
    }
    Some(Kernel {
        series: String::new(),
        version: field("Version")?,
        suite: suite.to_owned(),
        path: field("Filename")?,
        sha256: field("SHA256")?,
        package,
    })
}

/// The address of the archive that holds `suite`: security updates have their own.
fn base(suite: &str) -> Result<String> {
    let name = if suite.ends_with("-security") { "debian-security" } else { "debian" };
    // Without release info apt answers even when its lists were removed to save space.
    let mut apt = Command::new("apt-get");
    let addresses = cmd::output(apt.args(["indextargets", "--no-release-info", "--format", "$(REPO_URI)"]))?;
    let mut bases = addresses.lines().map(|address| address.trim_end_matches('/'));
    let base = bases.find(|base| base.rsplit('/').next() == Some(name));
    Ok(base.with_context(|| format!("apt of this machine has no repository /{name}"))?.to_owned())
}

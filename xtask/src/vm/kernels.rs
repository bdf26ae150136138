//! The kernels to test on: which ones are pinned, and their images on this machine.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::archive;
use crate::{cmd, workspace};

const HEADER: &str = "\
# The kernels that `cargo xtask vm` boots, of Debian's archive. `cargo xtask kernels` writes this file anew
# with the newest of each series; `path` is relative to the archive, for *-security to the security archive.

";

/// A line of kernels, and the suites that may hold it: the first one that does gives its newest.
struct Series {
    name: &'static str,
    /// Of the version in the package's name; the dot at its end keeps 6.1 apart from 6.12.
    prefix: &'static str,
    suites: &'static [&'static str],
}

/// The oldest kernel that plumb supports, those of the Debian releases since then, and the newest.
const SERIES: [Series; 4] = [
    Series { name: "5.10", prefix: "5.10.", suites: &["bullseye-security", "bullseye"] },
    Series { name: "6.1", prefix: "6.1.", suites: &["bookworm-security", "bookworm"] },
    Series { name: "6.12", prefix: "6.12.", suites: &["trixie-security", "trixie"] },
    Series { name: "7.x", prefix: "7.", suites: &["trixie-backports", "sid"] },
];

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Lock {
    kernel: Vec<Kernel>,
}

/// One pinned kernel package.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Kernel {
    pub(crate) series: String,
    pub(crate) package: String,
    pub(crate) version: String,
    /// Where it was found.
    pub(crate) suite: String,
    /// Of the package file, below the base of the archive.
    pub(crate) path: String,
    /// Of the package file.
    pub(crate) sha256: String,
}

/// The pinned kernels of these series, in their order; all pinned kernels when none is named.
pub(crate) fn select(series: &[String]) -> Result<Vec<Kernel>> {
    let lock = lock_file();
    let text = fs::read_to_string(&lock).with_context(|| format!("cannot read {}", lock.display()))?;
    let pinned = parse(&text).with_context(|| format!("{} is not valid", lock.display()))?;
    if series.is_empty() {
        return Ok(pinned);
    }
    let find = |name: &String| {
        pinned.iter().find(|kernel| kernel.series == *name).cloned().with_context(|| {
            let known: Vec<_> = pinned.iter().map(|kernel| kernel.series.as_str()).collect();
            format!("no kernel {name} is pinned, only {}", known.join(", "))
        })
    };
    series.iter().map(find).collect()
}

/// Pins the newest kernel of each series.
pub(crate) fn refresh() -> Result<()> {
    let suites: Vec<_> = SERIES.iter().flat_map(|series| series.suites).copied().collect();
    let offers = archive::kernel_packages(&folder(), &suites)?;
    let mut kernel = Vec::new();
    for series in SERIES {
        let found = series.suites.iter().find_map(|suite| {
            let offers = offers.iter().filter(|offer| offer.suite == *suite);
            newest(offers.filter(|offer| version_in_name(&offer.package).starts_with(series.prefix)))
        });
        let found =
            found.with_context(|| format!("{} has no kernel {}", series.suites.join(", "), series.name))?;
        eprintln!("xtask: kernel {} is {} of {}", series.name, found.version, found.suite);
        kernel.push(Kernel { series: series.name.to_owned(), ..found.clone() });
    }
    let text = HEADER.to_owned() + &toml::to_string(&Lock { kernel })?;
    Ok(fs::write(lock_file(), text)?)
}

impl Kernel {
    /// Where everything about this series is kept, inside target/.
    pub(super) fn folder(&self) -> Result<PathBuf> {
        let folder = folder().join(&self.series);
        fs::create_dir_all(&folder)?;
        Ok(folder)
    }

    /// The kernel image; downloads the package unless this very one was unpacked before.
    pub(super) fn fetch(&self) -> Result<PathBuf> {
        // The name says what is inside, so an image of another pin is never taken for this one.
        let image = self.folder()?.join(format!("vmlinuz-{}", self.sha256));
        if !image.exists() {
            self.download(&image).with_context(|| {
                format!(
                    "kernel {} cannot be had (`cargo xtask kernels` pins the newest of each series): {} {}",
                    self.series, self.package, self.version
                )
            })?;
        }
        Ok(image)
    }

    fn download(&self, image: &Path) -> Result<()> {
        eprintln!("xtask: downloads kernel {}: {} {}", self.series, self.package, self.version);
        let scratch = self.folder()?.join("download");
        // Leftovers of a run that failed: apt would take the old file for the new one.
        if scratch.exists() {
            fs::remove_dir_all(&scratch)?;
        }
        let (package, unpacked) = (scratch.join("package.deb"), scratch.join("unpacked"));
        fs::create_dir(&scratch)?;
        archive::download(&self.suite, &self.path, &package)?;
        let sum = cmd::output(Command::new("sha256sum").arg("--binary").arg(&package))?;
        let sum = sum.split(' ').next().unwrap_or_default();
        if sum != self.sha256 {
            bail!("its sha256 is {sum}, pinned is {}", self.sha256);
        }
        cmd::run(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(&unpacked))?;
        fs::rename(find_image(&unpacked)?, image)?;
        Ok(fs::remove_dir_all(&scratch)?)
    }
}

/// `boot/vmlinuz-*`, or `usr/lib/modules/*/vmlinuz` in packages since Linux 7.
fn find_image(package: &Path) -> Result<PathBuf> {
    let list = |folder: &str| fs::read_dir(package.join(folder)).into_iter().flatten().flatten();
    let boot = list("boot").filter(|entry| entry.file_name().to_string_lossy().starts_with("vmlinuz-"));
    let modules = list("usr/lib/modules").map(|entry| entry.path().join("vmlinuz"));
    let mut images = boot.map(|entry| entry.path()).chain(modules.filter(|path| path.exists()));
    images.next().context("there is no kernel image inside")
}

fn newest<'a>(offers: impl Iterator<Item = &'a Kernel>) -> Option<&'a Kernel> {
    offers.reduce(|best, offer| {
        // At the same version, linux-image-* is an empty package beside linux-binary-*.
        let same_but_real = offer.version == best.version && offer.package.starts_with("linux-binary-");
        if same_but_real || archive::is_newer(&offer.version, &best.version) { offer } else { best }
    })
}

/// "6.1.0-56-cloud-amd64" of "linux-image-6.1.0-56-cloud-amd64".
fn version_in_name(package: &str) -> &str {
    package.splitn(3, '-').nth(2).unwrap_or_default()
}

fn parse(text: &str) -> Result<Vec<Kernel>> {
    let Lock { kernel } = toml::from_str(text)?;
    for kernel in &kernel {
        let hex = kernel.sha256.len() == 64 && kernel.sha256.bytes().all(|byte| byte.is_ascii_hexdigit());
        ensure!(hex, "the sha256 of kernel {} is not 64 hexadecimal digits", kernel.series);
    }
    Ok(kernel)
}

fn lock_file() -> PathBuf {
    workspace().join("xtask/kernels.lock")
}

fn folder() -> PathBuf {
    workspace().join("target/kernels")
}

#[cfg(test)]
mod tests {
    use super::{Kernel, SERIES, newest, parse, select, version_in_name};

    fn kernel(package: &str, version: &str) -> Kernel {
        let package = package.to_owned();
        Kernel { package, version: version.to_owned(), ..select(&[]).unwrap().swap_remove(0) }
    }

    #[test]
    fn the_lock_file_pins_every_series() {
        let pinned: Vec<_> = select(&[]).unwrap().into_iter().map(|kernel| kernel.series).collect();
        assert_eq!(pinned, SERIES.map(|series| series.name));
        let error = select(&["4.19".to_owned()]).unwrap_err();
        assert_eq!(error.to_string(), "no kernel 4.19 is pinned, only 5.10, 6.1, 6.12, 7.x");
    }

    #[test]
    fn a_lock_file_without_a_whole_checksum_is_refused() {
        let lock = |sum: &str| {
            format!("[[kernel]]\nseries='1'\npackage='p'\nversion='1'\nsuite='s'\npath='p'\nsha256='{sum}'\n")
        };
        assert_eq!(parse(&lock(&"0a".repeat(32))).unwrap().len(), 1);
        assert!(parse(&lock(&"0a".repeat(31))).is_err());
        assert!(parse(&lock(&"0g".repeat(32))).is_err());
    }

    #[test]
    fn a_series_ends_at_its_dot() {
        assert!(version_in_name("linux-image-6.12.117+deb13-cloud-amd64").starts_with("6.12."));
        assert!(!version_in_name("linux-image-6.12.117+deb13-cloud-amd64").starts_with("6.1."));
        assert!(version_in_name("linux-image-6.1.0-56-cloud-amd64").starts_with("6.1."));
    }

    #[test]
    fn the_package_with_the_image_is_taken() {
        let offers = [kernel("linux-binary-7.3.4", "7.3.4-1"), kernel("linux-image-7.3.4", "7.3.4-1")];
        assert_eq!(newest(offers.iter()).unwrap().package, "linux-binary-7.3.4");
        assert_eq!(newest(offers.iter().rev()).unwrap().package, "linux-binary-7.3.4");
    }
}

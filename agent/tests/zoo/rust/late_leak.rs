//! Works without fault for a minute. Then leaks a file a second, into a history that nobody empties.

mod common;

use std::{
    fs::{self, File},
    io::{self, Read},
    thread,
    time::{Duration, Instant},
};

use common::{Result, end_after_argument};

const STEADY: Duration = Duration::from_secs(60);

fn main() -> Result<()> {
    end_after_argument()?;
    work()
}

#[inline(never)]
fn work() -> Result<()> {
    let began = Instant::now();
    let mut history = Vec::new();
    loop {
        for path in ["/proc/loadavg", "/proc/meminfo", "/proc/uptime", "/proc/stat", "/etc/hostname"] {
            fs::read(path)?;
        }
        if began.elapsed() >= STEADY {
            history.push(archive("/etc/hostname")?);
        }
        thread::sleep(Duration::from_secs(1));
    }
}

#[inline(never)]
fn archive(path: &str) -> io::Result<File> {
    let mut file = File::open(path)?; // leak
    file.read_exact(&mut [0])?;
    Ok(file)
}

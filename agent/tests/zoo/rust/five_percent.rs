//! Indexes twenty documents a second. Leaks the file of one in twenty, whose fd outlives its owner.

mod common;

use std::{
    fs::File,
    io::{self, Read},
    os::fd::IntoRawFd,
    thread,
    time::Duration,
};

use common::{Random, Result, end_after_argument};

const LARGE: f64 = 0.05;

fn main() -> Result<()> {
    end_after_argument()?;
    let mut random = Random(1);
    loop {
        index_document(random.uniform() < LARGE)?;
        thread::sleep(Duration::from_millis(50));
    }
}

#[inline(never)]
fn index_document(large: bool) -> io::Result<usize> {
    let mut file = open_document("/etc/hostname")?;
    if large {
        // To be mapped, which takes a number.
        let fd = file.into_raw_fd();
        return Ok(fd as usize);
    }
    file.read(&mut [0; 64])
}

#[inline(never)]
fn open_document(path: &str) -> io::Result<File> {
    File::open(path) // leak
}

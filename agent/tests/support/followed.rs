//! Following a program from before its first instruction, and the address spaces that follow from what the kernel told.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write, pipe},
    os::{fd::AsRawFd, unix::process::CommandExt},
    process::Command,
    thread::{JoinHandle, spawn},
};

use plumb::kernel::{MapEvent, Mappings};

const PAGE: u64 = 4096;

/// Where a page of code comes from. Memory has no offset.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Origin {
    pub(crate) offset: u64,
    pub(crate) device: (u32, u32),
    pub(crate) inode: u64,
    pub(crate) path: String,
}

/// Executable pages by address.
pub(crate) type Space = BTreeMap<u64, Origin>;

/// Lets a command, once it is started, wait before its exec until it is followed.
pub(crate) fn follow(command: &mut Command) -> JoinHandle<Mappings> {
    let (mut says, said) = pipe().unwrap();
    let (waits, mut go) = pipe().unwrap();
    // SAFETY: only async-signal-safe calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            let (pid, mut byte) = (libc::getpid(), 0_u8);
            libc::write(said.as_raw_fd(), (&raw const pid).cast(), size_of::<libc::pid_t>());
            libc::read(waits.as_raw_fd(), (&raw mut byte).cast(), 1);
            Ok(())
        });
    }
    spawn(move || {
        let mut pid = [0; size_of::<libc::pid_t>()];
        says.read_exact(&mut pid).unwrap();
        let mappings = Mappings::follow(u32::from_ne_bytes(pid)).unwrap();
        go.write_all(b"!").unwrap();
        mappings
    })
}

/// Address spaces by process, after one event more.
pub(crate) fn replay(spaces: &mut BTreeMap<u32, Space>, event: MapEvent) {
    match event {
        MapEvent::Exec { tgid, .. } => {
            spaces.insert(tgid, Space::new());
        }
        MapEvent::Forked { parent, child, .. } => {
            let copy = spaces.get(&parent).cloned().unwrap_or_default();
            spaces.insert(child, copy);
        }
        MapEvent::Mapped { tgid, mapping, .. } => {
            let path = String::from_utf8(mapping.path).unwrap();
            let at = (mapping.start, mapping.end, mapping.offset);
            put(spaces.entry(tgid).or_default(), at, mapping.device, mapping.inode, &path);
        }
    }
}

/// What /proc has of a process.
pub(crate) fn space(pid: u32) -> Space {
    let mut space = Space::new();
    for line in fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines() {
        let mut words = line.splitn(6, ' ');
        let mut word = || words.next().unwrap();
        let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
        let ((start, end), access, offset) = (word().split_once('-').unwrap(), word(), hex(word()));
        let (major, minor) = word().split_once(':').unwrap();
        let device = (hex(major).try_into().unwrap(), hex(minor).try_into().unwrap());
        let inode = word().parse().unwrap();
        let path = words.next().unwrap_or_default().trim_start();
        // That one belongs to the kernel, at the same address everywhere.
        if access.contains('x') && path != "[vsyscall]" {
            put(&mut space, (hex(start), hex(end), offset), device, inode, path);
        }
    }
    space
}

fn put(space: &mut Space, at: (u64, u64, u64), device: (u32, u32), inode: u64, path: &str) {
    let (start, end, offset) = at;
    for address in (start..end).step_by(PAGE as usize) {
        let offset = if inode == 0 { 0 } else { offset + address - start };
        let path = path.trim_start_matches("//anon").to_owned();
        space.insert(address, Origin { offset, device, inode, path });
    }
}

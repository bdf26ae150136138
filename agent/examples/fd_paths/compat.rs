//! The 32-bit entry of a 64-bit program: other numbers, and pointers below 4 GiB.

use std::io;

use crate::{
    Path, Result, Stage,
    create::{connected, one},
    path,
    sys::{self, dup_above},
    table::{HIGH, replace},
};

pub(crate) const PATHS: &[Path] = &[
    path("compat-open", "open through the 32-bit entry", |stage| {
        let root = low(b"/\0")?;
        one(stage, || call(5, [root, 0, 0]))
    }),
    path("compat-creat", "creat through the 32-bit entry", |stage| {
        let name = format!("/tmp/fd_paths-{}\0", sys::pid());
        let file = low(name.as_bytes())?;
        one(stage, || {
            let fd = call(8, [file, 0o600, 0])?;
            call(10, [file, 0, 0])?;
            Ok(fd)
        })
    }),
    path("compat-openat", "openat through the 32-bit entry", |stage| {
        let root = low(b"/\0")?;
        one(stage, || call(295, [libc::AT_FDCWD as u32, root, 0]))
    }),
    path("compat-pipe", "pipe through the 32-bit entry", |stage| compat_pair(stage, |ends| [42, ends, 0, 0])),
    path("compat-pipe2", "pipe2 through the 32-bit entry", |stage| {
        compat_pair(stage, |ends| [331, ends, 0, 0])
    }),
    path("compat-memfd-create", "memfd_create through the 32-bit entry", |stage| {
        let name = low(b"fd_paths\0")?;
        one(stage, || call(356, [name, 0, 0]))
    }),
    path("compat-eventfd2", "eventfd through the 32-bit entry", |stage| one(stage, || call(328, [0, 0, 0]))),
    path("compat-socket", "socket through the 32-bit entry", |stage| {
        one(stage, || call(359, [libc::AF_UNIX as u32, libc::SOCK_STREAM as u32, 0]))
    }),
    path("compat-socketcall", "socket through socketcall(2), which only the 32-bit entry has", |stage| {
        const SOCKET: u32 = 1;
        let arguments = low_words(&[libc::AF_UNIX as u32, libc::SOCK_STREAM as u32, 0])?;
        one(stage, || call(102, [SOCKET, arguments, 0]))
    }),
    path("compat-socketcall-accept", "accept through socketcall(2)", |stage| {
        const ACCEPT: u32 = 5;
        let arguments = low_words(&[connected()? as u32, 0, 0])?;
        one(stage, || call(102, [ACCEPT, arguments, 0]))
    }),
    path("compat-dup", "dup through the 32-bit entry", |stage| one(stage, || call(41, [0; 3]))),
    path("compat-dup2-over", "dup2 over an open fd through the 32-bit entry", |stage| {
        let over = dup_above(0, HIGH)?;
        replace(stage, over, || call(63, [1, over as u32, 0]))
    }),
    path("compat-fcntl", "fcntl F_DUPFD through the 32-bit entry", |stage| {
        one(stage, || call(55, [0, libc::F_DUPFD as u32, HIGH as u32]))
    }),
    path("compat-fcntl64", "fcntl64 F_DUPFD, which only the 32-bit entry has", |stage| {
        one(stage, || call(221, [0, libc::F_DUPFD as u32, HIGH as u32]))
    }),
    path("compat-close", "close through the 32-bit entry", |stage| {
        let fd = dup_above(0, HIGH)?;
        stage.begin()?;
        call(6, [fd as u32, 0, 0])?;
        stage.closed(fd);
        Ok(())
    }),
    path("compat-close-range", "close_range through the 32-bit entry", |stage| {
        let fd = dup_above(0, HIGH)?;
        stage.begin()?;
        call(436, [fd as u32, fd as u32, 0])?;
        stage.closed(fd);
        Ok(())
    }),
];

fn compat_pair(stage: &mut Stage, words: impl FnOnce(u32) -> [u32; 4]) -> Result<()> {
    let ends = low_words(&[0; 2])?;
    let [number, first, second, third] = words(ends);
    stage.begin()?;
    call(number, [first, second, third])?;
    // SAFETY: the two words just made.
    let fds: [i32; 2] =
        unsafe { std::ptr::with_exposed_provenance::<[i32; 2]>(ends as usize).read_volatile() };
    fds.into_iter().for_each(|fd| stage.opened(fd));
    Ok(())
}

/// A copy of some bytes at an address that 32 bits can hold.
fn low(bytes: &[u8]) -> Result<u32> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT;
    let at = sys::map(4096, flags, -1, 0)?;
    // SAFETY: the mapping is new and larger than what is copied.
    unsafe { at.cast::<u8>().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len().min(4096)) };
    u32::try_from(at.expose_provenance()).map_err(io::Error::other)
}

fn low_words(words: &[u32]) -> Result<u32> {
    low(&words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>())
}

/// A call by its number in the 32-bit table.
fn call(number: u32, [first, second, third]: [u32; 3]) -> Result<i32> {
    let result: u64;
    // SAFETY: pointers among the words are to memory from `low`. The instruction changes nothing but the
    // result; r8 to r11 may be zeroed on the way.
    unsafe {
        std::arch::asm!(
            "push rbx",
            "mov ebx, {first:e}",
            "int 0x80",
            "pop rbx",
            first = in(reg) first,
            inout("rax") u64::from(number) => result,
            in("ecx") second,
            in("edx") third,
            inout("esi") 0 => _,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    match result as i32 {
        errno @ -4095..0 => Err(io::Error::from_raw_os_error(-errno)),
        result => Ok(result),
    }
}

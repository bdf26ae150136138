//! The one table of syscalls that change an fd table and are followed by name.
//!
//! The kernel handler, the names in the output and the tests all derive from it. Numbers: 64-bit from
//! arch/x86/entry/syscalls/syscall_64.tbl, 32-bit (compat) from syscall_32.tbl; they never change.

/// How a syscall tells which fds it made or removed.
pub const RETURNS: u32 = 1;
/// As `RETURNS`; what was open at the returned number is closed.
pub const REPLACES: u32 = 2;
/// Two fds in user memory, at the address in the first argument.
pub const PAIR: u32 = 3;
/// Closes the first argument.
pub const CLOSES: u32 = 4;
/// Closes, or marks, first argument to second argument.
pub const CLOSES_RANGE: u32 = 5;
/// As `RETURNS` when the second argument is `F_DUPFD` or `F_DUPFD_CLOEXEC`.
pub const FCNTL: u32 = 6;

/// One syscall.
#[derive(Clone, Copy, Debug)]
pub struct Syscall {
    pub name: &'static str,
    /// Number on x86_64.
    pub nr: u32,
    /// Number through the 32-bit entry.
    pub nr_compat: u32,
    /// `RETURNS`, `REPLACES`, …
    pub shape: u32,
}

const fn call(name: &'static str, nr: u32, nr_compat: u32, shape: u32) -> Syscall {
    Syscall { name, nr, nr_compat, shape }
}

/// No such call through that entry.
pub const NONE: u32 = u32::MAX;

pub const TABLE: [Syscall; 16] = [
    call("open", 2, 5, RETURNS),
    call("openat", 257, 295, RETURNS),
    call("openat2", 437, 437, RETURNS),
    call("creat", 85, 8, RETURNS),
    call("close", 3, 6, CLOSES),
    call("close_range", 436, 436, CLOSES_RANGE),
    call("socket", 41, 359, RETURNS),
    call("accept", 43, NONE, RETURNS),
    call("accept4", 288, 364, RETURNS),
    call("pipe", 22, 42, PAIR),
    call("pipe2", 293, 331, PAIR),
    call("dup", 32, 41, RETURNS),
    call("dup2", 33, 63, REPLACES),
    call("dup3", 292, 330, REPLACES),
    call("fcntl", 72, 55, FCNTL),
    // The 32-bit entry has a second fcntl, for large files.
    call("fcntl64", NONE, 221, FCNTL),
];

/// In `BY_NUMBER`: not followed.
pub const UNKNOWN: u8 = u8::MAX;

/// Every number in `TABLE` is below this.
pub const NUMBERS: usize = 512;

/// Index into `TABLE` by number: native in the low byte, through the 32-bit entry in the high byte.
pub static BY_NUMBER: [u16; NUMBERS] = {
    let mut slots = [u16::MAX; NUMBERS];
    let mut i = 0;
    while i < TABLE.len() {
        let index = i as u16;
        if TABLE[i].nr != NONE {
            let slot = &mut slots[TABLE[i].nr as usize];
            *slot = (*slot & 0xff00) | index;
        }
        if TABLE[i].nr_compat != NONE {
            let slot = &mut slots[TABLE[i].nr_compat as usize];
            *slot = (*slot & 0x00ff) | (index << 8);
        }
        i += 1;
    }
    slots
};

/// Shape of each call by index into `TABLE`; a table of its own so that no string reaches the kernel.
pub static SHAPES: [u32; TABLE.len()] = {
    let mut shapes = [0; TABLE.len()];
    let mut i = 0;
    while i < TABLE.len() {
        shapes[i] = TABLE[i].shape;
        i += 1;
    }
    shapes
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_finds_its_call_and_no_other() {
        for nr in 0..NUMBERS as u32 {
            let entry = BY_NUMBER[nr as usize];
            let native = TABLE.iter().position(|c| c.nr == nr).map_or(UNKNOWN, |i| i as u8);
            let compat = TABLE.iter().position(|c| c.nr_compat == nr).map_or(UNKNOWN, |i| i as u8);
            assert_eq!((entry as u8, (entry >> 8) as u8), (native, compat), "number {nr}");
        }
    }
}

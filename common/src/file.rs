//! Open files as `iter/task_file` reports them.

use bytemuck::{Pod, Zeroable};

use crate::limits::NAME_LEN;

/// `s_magic` of the file system that holds every socket's inode (`SOCKFS_MAGIC`, linux/magic.h).
pub const SOCKFS_MAGIC: u64 = 0x534F_434B;

/// One slot of an fd table.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct FdRecord {
    /// Address of the `struct file`: the identity of an open file description, never dereferenced.
    pub file: u64,
    pub inode: u64,
    /// Read and write position in bytes.
    pub pos: u64,
    pub tgid: u32,
    pub fd: u32,
    /// `i_mode`; the type bits (`S_IFMT`) are 0 for anonymous inodes.
    pub mode: u32,
    /// `f_flags` as given to open(2), kernel encoding.
    pub flags: u32,
    /// `s_dev` of the file system, kernel encoding (12 bits major, 20 bits minor).
    pub dev: u32,
    /// 1 when `socket` is filled in, else 0.
    pub is_socket: u32,
    pub socket: SocketRecord,
    /// Last path component, or the name of an anonymous inode such as `[eventfd]`; NUL-terminated.
    pub name: [u8; NAME_LEN],
}

/// The addresses of a socket (`struct sock_common`). All zero for a family without them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct SocketRecord {
    /// Local and remote address; IPv4 uses the first four bytes. Network byte order.
    pub local: [u8; 16],
    pub remote: [u8; 16],
    /// Host byte order.
    pub local_port: u16,
    /// Host byte order.
    pub remote_port: u16,
    /// Address family (`AF_*`).
    pub family: u16,
    /// `SOCK_STREAM` and so on (`struct socket.type`).
    pub kind: u16,
    /// TCP state (`TCP_*`, 1 is established), meaningful for connection-oriented sockets.
    pub state: u32,
    /// Always 0.
    pub reserved: u32,
}

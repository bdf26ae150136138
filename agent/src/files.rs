//! What an open fd is, in words: kind and target.

use std::{
    fs::{self, File},
    io::Read,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::ffi::OsStrExt,
    path::Path,
};

use bytemuck::Zeroable;
use plumb_common::{
    event::FdChange,
    file::{FdRecord, SocketRecord},
};

use crate::text;

const S_IFMT: u32 = 0o170_000;

/// Text read of a ring's fdinfo at most, in bytes.
const FDINFO_LIMIT: u64 = 1 << 20;

/// An open fd of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OpenFile {
    pub fd: u32,
    /// `file`, `directory`, `socket`, `pipe`, `character device`, …, or the anonymous kind: `eventfd`, …
    pub kind: String,
    /// Path, addresses, or the inode for what has neither.
    pub target: String,
}

impl OpenFile {
    /// Puts a record into words. The full path is asked of /proc and believed only if its end is the name
    /// that the kernel reported, so that a pid reused in between cannot lend its paths.
    #[must_use]
    pub(crate) fn describe(record: &FdRecord) -> Self {
        let link = format!("/proc/{}/fd/{}", record.tgid, record.fd);
        let path = fs::read_link(Path::new(&link)).ok();
        let mut file = Self::from_parts(record, path.as_deref().map(|path| path.as_os_str().as_bytes()));
        if file.kind == "io_uring"
            && let Ok(info) = File::open(format!("/proc/{}/fdinfo/{}", record.tgid, record.fd))
            && let Some(held @ 1..) = ring_files(info)
        {
            // They are open and in no fd table.
            file.target += &format!(", files of its own: {held}");
        }
        file
    }

    /// Puts an event's file into words, as `describe`.
    #[must_use]
    pub(crate) fn of_event(event: &FdChange) -> Self {
        Self::describe(&record_of(event))
    }

    /// As `of_event`, without asking /proc: of a path there is only the last part.
    #[must_use]
    pub(crate) fn of_name(event: &FdChange) -> Self {
        Self::from_parts(&record_of(event), None)
    }

    fn from_parts(record: &FdRecord, link: Option<&[u8]>) -> Self {
        let name = text::terminated(&record.name);
        let (kind, target) = match record.mode & S_IFMT {
            _ if record.is_socket != 0 => ("socket".to_owned(), socket(&record.socket, record.inode)),
            0o140_000 if name.is_empty() => ("socket".to_owned(), numbered(record, link, "socket:[")),
            0o010_000 if name.is_empty() => ("pipe".to_owned(), numbered(record, link, "pipe:[")),
            // Anonymous inodes have no type; some names come in brackets, some do not.
            0 => (name.trim_matches(['[', ']']).to_owned(), format!("anon_inode:{name}")),
            mode => (mode_word(mode).to_owned(), path(record, link).unwrap_or(name)),
        };
        Self { fd: record.fd, kind, target }
    }
}

fn record_of(event: &FdChange) -> FdRecord {
    let mut record = FdRecord::zeroed();
    (record.tgid, record.fd) = (event.header.process.tgid, event.fd);
    (record.mode, record.name) = (event.mode, event.name);
    record
}

/// Files that an io_uring keeps for itself: direct descriptors and registered files, as its fdinfo lists them.
fn ring_files(info: impl Read) -> Option<usize> {
    let mut text = String::new();
    info.take(FDINFO_LIMIT).read_to_string(&mut text).ok()?;
    let mut lines = text.lines().skip_while(|line| !line.starts_with("UserFiles:"));
    lines.next()?;
    let slot = |line: &str| {
        let (number, name) = line.split_once(':')?;
        number.trim().parse::<u32>().ok()?;
        Some(name.trim() != "<none>")
    };
    Some(lines.map_while(slot).filter(|is_used| *is_used).count())
}

/// A name with the inode in brackets, as /proc writes it. An event does not carry the inode.
fn numbered(record: &FdRecord, link: Option<&[u8]>, prefix: &str) -> String {
    match link {
        Some(link) if record.inode == 0 && link.starts_with(prefix.as_bytes()) => text::printable(link),
        _ if record.inode == 0 => prefix.trim_end_matches(":[").to_owned(),
        _ => format!("{prefix}{}]", record.inode),
    }
}

fn mode_word(mode: u32) -> &'static str {
    match mode {
        0o010_000 => "fifo",
        0o020_000 => "character device",
        0o040_000 => "directory",
        0o060_000 => "block device",
        0o100_000 => "file",
        0o120_000 => "symbolic link",
        0o140_000 => "socket",
        _ => "unknown",
    }
}

fn path(record: &FdRecord, link: Option<&[u8]>) -> Option<String> {
    let link = link?;
    let name = record.name.split(|byte| *byte == 0).next().unwrap_or_default();
    let bare = link.strip_suffix(b" (deleted)").unwrap_or(link);
    let last = bare.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    // A name that fills the field has been cut. The root directory is called "/".
    let cut = name.len() + 1 >= record.name.len();
    let same = last == name || (cut && last.starts_with(name)) || (name == b"/" && last.is_empty());
    (same || bare.starts_with(b"/memfd:")).then(|| text::printable(link))
}

fn socket(socket: &SocketRecord, inode: u64) -> String {
    let kind = match socket.kind {
        1 => "stream",
        2 => "dgram",
        3 => "raw",
        5 => "seqpacket",
        _ => "other",
    };
    let (Some(local), Some(remote)) = (address(socket, true), address(socket, false)) else {
        let family = match socket.family {
            1 => "unix",
            16 => "netlink",
            17 => "packet",
            40 => "vsock",
            other => return format!("family {other} {kind} socket:[{inode}]"),
        };
        return format!("{family} {kind} socket:[{inode}]");
    };
    match (socket.kind, socket.state) {
        (1, 10) => format!("tcp {local} LISTEN"),
        (1, state) => format!("tcp {local} -> {remote} {}", tcp_state(state)),
        (2, _) if remote.port() == 0 => format!("udp {local}"),
        (2, _) => format!("udp {local} -> {remote}"),
        _ => format!("ip {kind} {local} -> {remote}"),
    }
}

/// include/net/tcp_states.h.
fn tcp_state(state: u32) -> &'static str {
    const NAMES: [&str; 13] = [
        "UNKNOWN",
        "ESTABLISHED",
        "SYN_SENT",
        "SYN_RECV",
        "FIN_WAIT1",
        "FIN_WAIT2",
        "TIME_WAIT",
        "CLOSE",
        "CLOSE_WAIT",
        "LAST_ACK",
        "LISTEN",
        "CLOSING",
        "NEW_SYN_RECV",
    ];
    NAMES.get(state as usize).copied().unwrap_or(NAMES[0])
}

fn address(socket: &SocketRecord, local: bool) -> Option<SocketAddr> {
    let (bytes, port) =
        if local { (socket.local, socket.local_port) } else { (socket.remote, socket.remote_port) };
    let ip: IpAddr = match socket.family {
        2 => Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into(),
        10 => Ipv6Addr::from(bytes).to_canonical(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(mode: u32, name: &[u8]) -> FdRecord {
        let mut record = FdRecord::zeroed();
        (record.mode, record.inode) = (mode, 77);
        record.name[..name.len()].copy_from_slice(name);
        record
    }

    #[test]
    fn the_files_of_a_ring_are_those_in_its_slots() {
        let info = "SqMask:\t0x7\nUserFiles:\t4\n    0: hosts\n    1: <none>\n    3: [eventfd]\nUserBufs:\t1\n    0: 0x7f/4096\n";
        assert_eq!(ring_files(info.as_bytes()), Some(2));
        assert_eq!(ring_files(&b"SqMask:\t0x7\n"[..]), None);
    }

    #[test]
    fn a_path_is_believed_only_if_it_ends_in_the_name_the_kernel_gave() {
        let file = record(0o100_644, b"app.log");
        let target = |link: &[u8]| OpenFile::from_parts(&file, Some(link)).target;
        assert_eq!(target(b"/var/log/app.log"), "/var/log/app.log");
        assert_eq!(target(b"/var/log/app.log (deleted)"), "/var/log/app.log (deleted)");
        assert_eq!(target(b"/etc/shadow"), "app.log");
        let long = record(0o100_644, &[b'x'; 31]);
        let whole = [b"/tmp/".as_slice(), &[b'x'; 60]].concat();
        assert_eq!(OpenFile::from_parts(&long, Some(&whole)).target.len(), 65);
    }

    #[test]
    fn anonymous_inodes_pipes_and_devices_have_their_kind() {
        let kind = |mode, name: &[u8]| OpenFile::from_parts(&record(mode, name), None).kind;
        assert_eq!(kind(0o600, b"[eventfd]"), "eventfd");
        assert_eq!(kind(0o600, b"inotify"), "inotify");
        assert_eq!(kind(0o010_600, b""), "pipe");
        assert_eq!(kind(0o010_600, b"queue"), "fifo");
        assert_eq!(kind(0o020_666, b"null"), "character device");
    }

    #[test]
    fn sockets_name_their_ends() {
        let mut record = record(0o140_777, b"");
        record.is_socket = 1;
        (record.socket.family, record.socket.kind, record.socket.state) = (2, 1, 8);
        record.socket.local[..4].copy_from_slice(&[127, 0, 0, 1]);
        record.socket.remote[..4].copy_from_slice(&[10, 0, 0, 9]);
        (record.socket.local_port, record.socket.remote_port) = (8080, 443);
        let target = |record: &FdRecord| OpenFile::from_parts(record, None).target;
        assert_eq!(target(&record), "tcp 127.0.0.1:8080 -> 10.0.0.9:443 CLOSE_WAIT");
        record.socket.state = 10;
        assert_eq!(target(&record), "tcp 127.0.0.1:8080 LISTEN");
        record.socket.family = 1;
        assert_eq!(target(&record), "unix stream socket:[77]");
    }
}

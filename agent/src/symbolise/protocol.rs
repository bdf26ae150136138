//! What the agent and its worker say to each other: messages with a length in front, and files beside them.

use std::{
    io::{self, IoSlice, IoSliceMut, Read},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{How, RawStack};

/// Longest message of the agent: a batch of stacks with the mappings of their process.
pub(super) const MAX_REQUEST: usize = 2 << 20;
/// Longest message of the worker.
pub(super) const MAX_ANSWER: usize = 1 << 20;
/// Frames kept of one stack, as many as perf keeps.
pub(super) const MAX_FRAMES: usize = 127;
/// Functions at one address at most: the one that is there, and those inlined into it.
pub(super) const MAX_LINES: usize = 32;

/// An executable mapping of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mapping {
    pub(super) start: u64,
    pub(super) end: u64,
    /// Of the file, at `start`.
    pub(super) offset: u64,
    pub(super) content: Content,
}

/// What the worker may know of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Content {
    File(u32),
    /// Written by the process itself, such as compiled code.
    Anonymous,
    /// A file that cannot be had, or must not be parsed any more.
    Sealed,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum ToWorker {
    /// With the page that says what is being parsed.
    Hello,
    Unwind {
        mappings: Vec<Mapping>,
        stacks: Vec<RawStack>,
    },
    /// Names of places in one file, by offset.
    Name {
        module: u32,
        debug: bool,
        offsets: Vec<u64>,
    },
    /// Names of addresses by a perf map, which comes with the message.
    PerfMap {
        addresses: Vec<u64>,
    },
    /// The file that was asked for; without one there is none.
    File,
    /// The bytes that were asked for; empty if they cannot be had.
    Code(#[serde(with = "serde_bytes")] Vec<u8>),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum FromWorker {
    Ready,
    /// Asks for a file.
    NeedModule(u32),
    /// Asks for the debug file of a module.
    NeedDebug {
        #[serde(with = "serde_bytes")]
        build_id: Vec<u8>,
        #[serde(with = "serde_bytes")]
        link: Vec<u8>,
    },
    /// Asks for a few bytes of the process at an address in anonymous memory.
    NeedCode(u64),
    Walked(Vec<Walk>),
    Named {
        #[serde(with = "serde_bytes")]
        build_id: Vec<u8>,
        /// For each offset or address, innermost first.
        places: Vec<Vec<RawLine>>,
    },
}

/// A stack as far as it could be walked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Walk {
    /// Addresses to look up: the syscall instruction, then the calls.
    pub(super) frames: Vec<(u64, How)>,
    /// The outermost function was reached.
    pub(super) complete: bool,
    /// The walk came to an address that is in no mapping.
    pub(super) lost: bool,
}

/// A function as the file names it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RawLine {
    #[serde(with = "serde_bytes")]
    pub(super) function: Vec<u8>,
    #[serde(with = "serde_bytes")]
    pub(super) file: Vec<u8>,
    /// 0 if it is not known.
    pub(super) line: u32,
    pub(super) inlined: bool,
}

pub(super) fn send(
    socket: &UnixStream,
    message: &impl Serialize,
    file: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut bytes = vec![0; size_of::<u32>()];
    bytes = postcard::to_extend(message, bytes).map_err(io::Error::other)?;
    let body = u32::try_from(bytes.len() - size_of::<u32>()).map_err(io::Error::other)?;
    bytes[..size_of::<u32>()].copy_from_slice(&body.to_le_bytes());
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    let files: Vec<_> = file.into_iter().collect();
    if !files.is_empty() {
        beside.push(SendAncillaryMessage::ScmRights(&files));
    }
    let mut sent = 0;
    while sent < bytes.len() {
        let rest = [IoSlice::new(&bytes[sent..])];
        match sendmsg(socket.as_fd(), &rest, &mut beside, SendFlags::NOSIGNAL) {
            Ok(count) => sent += count,
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        // The file went with the first bytes.
        beside = SendAncillaryBuffer::default();
    }
    Ok(())
}

/// Receives a message without files: what the worker sends beside it is closed by the kernel.
pub(super) fn receive<T: DeserializeOwned>(mut socket: &UnixStream, most: usize) -> io::Result<T> {
    let mut length = [0; size_of::<u32>()];
    socket.read_exact(&mut length)?;
    body(socket, length, most)
}

/// Receives a message with the file that came beside it.
pub(super) fn receive_with_file<T: DeserializeOwned>(
    socket: &UnixStream,
    most: usize,
) -> io::Result<(T, Option<OwnedFd>)> {
    let mut length = [0; size_of::<u32>()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(&mut length)];
    let received = recvmsg(socket.as_fd(), &mut into, &mut beside, RecvFlags::CMSG_CLOEXEC)?.bytes;
    let mut files = beside.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    let file = files.next().and_then(|mut files| files.next());
    if received == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut rest = socket;
    rest.read_exact(&mut length[received..])?;
    Ok((body(socket, length, most)?, file))
}

fn body<T: DeserializeOwned>(
    mut socket: &UnixStream,
    length: [u8; size_of::<u32>()],
    most: usize,
) -> io::Result<T> {
    let length = u32::from_le_bytes(length) as usize;
    if length > most {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the message is too long"));
    }
    let mut bytes = vec![0; length];
    socket.read_exact(&mut bytes)?;
    postcard::from_bytes(&bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// What the worker writes into the page that it shares: the module it reads, since when, and the one that had
/// taken most time before, with how much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Marks([u32; 4]);

impl Marks {
    pub(super) const SIZE: usize = size_of::<[u32; 4]>();

    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let words = bytes.as_chunks::<4>().0.first_chunk::<4>()?;
        Some(Self(words.map(u32::from_ne_bytes)))
    }

    /// The module being read; `None` between two.
    pub(super) fn current(self) -> Option<u32> {
        Some(self.0[0]).filter(|id| *id != 0)
    }

    /// The module that has taken most time.
    pub(super) fn slowest(self, now: u32) -> Option<u32> {
        let [current, since, worst, took] = self.0;
        let id = if current != 0 && now.wrapping_sub(since) >= took { current } else { worst };
        Some(id).filter(|id| *id != 0)
    }
}

/// Milliseconds of a clock that agent and worker share.
pub(super) fn milliseconds() -> u32 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // Only differences matter.
    (now.tv_sec.wrapping_mul(1000) + now.tv_nsec / 1_000_000) as u32
}

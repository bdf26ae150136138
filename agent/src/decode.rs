//! Bytes of the ring become events. Total: what is not understood is an error, never a guess.

use bytemuck::Pod;
use plumb_common::event::{
    CLONE_THREAD, Clone as CloneEvent, Exec, Exit, FD_OPENED, FD_REPLACED, FdChange, Header, KIND_CLONE,
    KIND_EXEC, KIND_EXIT, KIND_FD, KIND_RENAME, KIND_SIGNAL, KIND_SOCKET, KIND_STACK, KIND_TABLE, Rename,
    Stack,
};
use plumb_common::sockets::{Signal, Socket};

/// One event of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    Clone(CloneEvent),
    Exec(Exec),
    Rename(Rename),
    Exit(Exit),
    Fd(FdChange),
    Signal(Signal),
    Socket(Socket),
}

impl Event {
    /// Who caused it, and when.
    #[must_use]
    pub fn header(&self) -> &Header {
        match self {
            Self::Clone(event) => &event.header,
            Self::Exec(event) => &event.header,
            Self::Rename(event) => &event.header,
            Self::Exit(event) => &event.header,
            Self::Fd(event) => &event.header,
            Self::Signal(event) => &event.header,
            Self::Socket(event) => &event.header,
        }
    }
}

impl Event {
    /// Whether it tells of a new fd or thread.
    #[must_use]
    pub(crate) fn is_made(&self) -> bool {
        match self {
            Self::Clone(clone) => clone.flags & CLONE_THREAD != 0,
            Self::Fd(change) => matches!(change.change, FD_OPENED | FD_REPLACED),
            _ => false,
        }
    }
}

/// The user stack of a thread as it made an fd or a thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    pub head: Stack,
    /// From `head.sp` up; empty when nothing could be read.
    pub bytes: Vec<u8>,
}

/// Why bytes are not an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    #[error("{0} bytes are too few for any event")]
    TooShort(usize),
    #[error("unknown kind {0}")]
    UnknownKind(u32),
    #[error("kind {kind} has {expected} bytes, not {found}")]
    WrongLength { kind: u32, expected: usize, found: usize },
}

/// Reads one record of the ring of events.
pub fn event(bytes: &[u8]) -> Result<Event, Rejected> {
    let head = bytes.get(..4).ok_or(Rejected::TooShort(bytes.len()))?;
    match bytemuck::pod_read_unaligned::<u32>(head) {
        kind @ KIND_CLONE => exactly(kind, bytes).map(Event::Clone),
        kind @ KIND_EXEC => exactly(kind, bytes).map(Event::Exec),
        kind @ KIND_RENAME => exactly(kind, bytes).map(Event::Rename),
        kind @ KIND_EXIT => exactly(kind, bytes).map(Event::Exit),
        kind @ KIND_FD => exactly(kind, bytes).map(Event::Fd),
        kind @ KIND_SIGNAL => exactly(kind, bytes).map(Event::Signal),
        kind @ KIND_SOCKET => exactly(kind, bytes).map(Event::Socket),
        kind => Err(Rejected::UnknownKind(kind)),
    }
}

/// Reads the head of one record of the ring of stacks.
pub fn sample_head(record: &[u8]) -> Result<Stack, Rejected> {
    let short = Rejected::TooShort(record.len());
    let head: Stack = bytemuck::pod_read_unaligned(record.get(..size_of::<Stack>()).ok_or(short)?);
    if !matches!(head.header.kind, KIND_STACK | KIND_TABLE) {
        return Err(Rejected::UnknownKind(head.header.kind));
    }
    Ok(head)
}

/// Reads one record of the ring of stacks.
pub fn sample(record: &[u8]) -> Result<Sample, Rejected> {
    let head = sample_head(record)?;
    let bytes = record[size_of::<Stack>()..].get(..head.len as usize);
    let expected = size_of::<Stack>().saturating_add(head.len as usize);
    let wrong = Rejected::WrongLength { kind: head.header.kind, expected, found: record.len() };
    Ok(Sample { head, bytes: bytes.ok_or(wrong)?.to_vec() })
}

fn exactly<T: Pod>(kind: u32, bytes: &[u8]) -> Result<T, Rejected> {
    bytemuck::try_pod_read_unaligned(bytes).map_err(|_| Rejected::WrongLength {
        kind,
        expected: size_of::<T>(),
        found: bytes.len(),
    })
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_an_event_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = event(&bytes);
            let _ = sample(&bytes);
        }

        #[test]
        fn a_stack_is_what_was_read_of_it(len in 0u32..100, room in 0usize..100, kind in 5u32..8) {
            let mut head = Stack::zeroed();
            (head.header.kind, head.len) = (kind, len);
            let mut record = bytemuck::bytes_of(&head).to_vec();
            record.extend((0..room).map(|byte| byte as u8));
            let bytes: Vec<u8> = (0..len as u8).collect();
            let whole = matches!(kind, KIND_STACK | KIND_TABLE) && len as usize <= room;
            prop_assert_eq!(sample(&record).ok(), whole.then_some(Sample { head, bytes }));
        }

        #[test]
        fn a_record_comes_back_as_it_was(time in any::<u64>(), fd in any::<u32>(), change in any::<u32>()) {
            let mut sent = FdChange::zeroed();
            (sent.header.kind, sent.header.time, sent.fd, sent.change) = (KIND_FD, time, fd, change);
            prop_assert_eq!(event(bytemuck::bytes_of(&sent)), Ok(Event::Fd(sent)));
        }
    }

    #[test]
    fn a_cut_or_grown_record_is_rejected() {
        let mut sent = Exit::zeroed();
        sent.header.kind = KIND_EXIT;
        let bytes = bytemuck::bytes_of(&sent);
        let expected = bytes.len();
        for found in 4..expected {
            let error = Rejected::WrongLength { kind: KIND_EXIT, expected, found };
            assert_eq!(event(&bytes[..found]), Err(error));
        }
        assert_eq!(event(&bytes[..3]), Err(Rejected::TooShort(3)));
        assert_eq!(event(&[99, 0, 0, 0]), Err(Rejected::UnknownKind(99)));
    }
}

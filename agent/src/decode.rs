//! Bytes of the ring become events. Total: what is not understood is an error, never a guess.

use bytemuck::Pod;
use plumb_common::event::{
    Clone as CloneEvent, Exec, Exit, FdChange, Header, KIND_CLONE, KIND_EXEC, KIND_EXIT, KIND_FD,
    KIND_RENAME, Rename,
};

/// One event of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    Clone(CloneEvent),
    Exec(Exec),
    Rename(Rename),
    Exit(Exit),
    Fd(FdChange),
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
        }
    }
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

/// Reads one record of the ring.
pub fn event(bytes: &[u8]) -> Result<Event, Rejected> {
    let head = bytes.get(..4).ok_or(Rejected::TooShort(bytes.len()))?;
    match bytemuck::pod_read_unaligned::<u32>(head) {
        kind @ KIND_CLONE => exactly(kind, bytes).map(Event::Clone),
        kind @ KIND_EXEC => exactly(kind, bytes).map(Event::Exec),
        kind @ KIND_RENAME => exactly(kind, bytes).map(Event::Rename),
        kind @ KIND_EXIT => exactly(kind, bytes).map(Event::Exit),
        kind @ KIND_FD => exactly(kind, bytes).map(Event::Fd),
        kind => Err(Rejected::UnknownKind(kind)),
    }
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
        assert_eq!(event(&[9, 0, 0, 0]), Err(Rejected::UnknownKind(9)));
    }
}

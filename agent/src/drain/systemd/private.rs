//! Owns the socket to systemd itself, where there is no bus, and makes of what comes there what zbus accepts.
//!
//! systemd (sd_bus_set_sender(3)) signs what it sends there with the name that it has on the bus. The specification
//! allows a unique name alone in that place, and zbus refuses the message. So the name is overwritten in the header of
//! each message with a unique one of the same length.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixStream, unix},
};
use zbus::{
    connection::socket::{ReadHalf, Socket, Split, WriteHalf},
    export::async_trait::async_trait,
};

/// With what systemd signs.
const SIGNATURE: &[u8; 24] = b"org.freedesktop.systemd1";
/// What is read in its place: the name to call systemd by on such a socket, which itself cares for no name.
pub(super) const SYSTEMD: &str = ":plumb.private.systemd.1";
const _: () = assert!(SYSTEMD.len() == SIGNATURE.len());

/// Before the fields of a header: the byte order, three bytes more, and three numbers of four bytes.
const FIXED: usize = 16;
/// The specification's, for a whole message.
const MAX_MESSAGE: usize = 128 << 20;

#[derive(Debug)]
pub(super) struct Private(pub(super) UnixStream);

impl Socket for Private {
    type ReadHalf = Reader;
    type WriteHalf = Writer;

    fn split(self) -> Split<Reader, Writer> {
        let (read, write) = self.0.into_split();
        Split::new(Reader { socket: read, received: Vec::new(), ready: 0 }, Writer(write))
    }
}

#[derive(Debug)]
pub(super) struct Reader {
    socket: unix::OwnedReadHalf,
    received: Vec<u8>,
    /// How much of it, from its start, may be handed on.
    ready: usize,
}

#[async_trait]
impl ReadHalf for Reader {
    async fn recvmsg(&mut self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        while self.ready == 0 {
            if self.socket.read_buf(&mut self.received).await? == 0 {
                return Ok((0, Vec::new()));
            }
            self.ready = sign(&mut self.received)?;
        }
        let length = buffer.len().min(self.ready);
        buffer[..length].copy_from_slice(&self.received[..length]);
        self.received.drain(..length);
        self.ready -= length;
        if self.ready == 0 {
            self.ready = sign(&mut self.received)?;
        }
        Ok((length, Vec::new()))
    }
}

#[derive(Debug)]
pub(super) struct Writer(unix::OwnedWriteHalf);

#[async_trait]
impl WriteHalf for Writer {
    /// No fds: neither half says that it can pass them, so zbus gives none.
    async fn sendmsg(&mut self, buffer: &[u8], _fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        self.0.write(buffer).await
    }

    async fn flush(&mut self) -> io::Result<()> {
        self.0.flush().await
    }

    async fn close(&mut self) -> io::Result<()> {
        self.0.shutdown().await
    }
}

/// Overwrites the sender of the first message if that is there as a whole, and says how long it is, or 0.
fn sign(received: &mut [u8]) -> io::Result<usize> {
    let number = |at: usize, big: bool| -> Option<usize> {
        let bytes = received.get(at..at + 4)?.try_into().ok()?;
        Some(if big { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) } as usize)
    };
    let big = match received.first() {
        Some(b'l') => false,
        Some(b'B') => true,
        // The lines of the handshake, which begin with other letters. They are over before the first message.
        _ => return Ok(received.len()),
    };
    let (Some(body), Some(fields)) = (number(4, big), number(12, big)) else { return Ok(0) };
    let total = FIXED + fields.next_multiple_of(8) + body;
    if total > MAX_MESSAGE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a message of {total} bytes")));
    }
    if received.len() < total {
        return Ok(0);
    }
    // Code 7, a variant of signature "s", and the string with its length and its end.
    let length = SIGNATURE.len() as u32;
    let length = if big { length.to_be_bytes() } else { length.to_le_bytes() };
    let sender = [&[7, 1, b's', 0][..], &length, SIGNATURE, &[0]].concat();
    let header = &mut received[FIXED..FIXED + fields];
    // A field begins at a multiple of 8, and no string in it holds a 0.
    let at = (0..fields).step_by(8).find(|at| header[*at..].starts_with(&sender));
    if let Some(name) = at.and_then(|at| header.get_mut(at + 8..at + 8 + SYSTEMD.len())) {
        name.copy_from_slice(SYSTEMD.as_bytes());
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use zbus::{Message, names::UniqueName};

    use super::*;

    fn message(body: &str) -> Vec<u8> {
        let sender = UniqueName::from_str_unchecked("org.freedesktop.systemd1");
        let message = Message::signal("/a", "b.c", "d").sender(sender);
        message.build(&body).unwrap().data().to_vec()
    }

    #[test]
    fn a_message_is_signed_once_it_is_there_as_a_whole() {
        // The body says the same, and stays as it is.
        let body = "\u{7}\u{1}s org.freedesktop.systemd1";
        let whole = message(body);
        for length in 1..whole.len() {
            assert_eq!(sign(&mut whole[..length].to_vec()).unwrap(), 0);
        }
        let mut received = [whole.clone(), whole.clone()].concat();
        assert_eq!(sign(&mut received).unwrap(), whole.len());
        assert_eq!(received[whole.len()..], whole);
        let changed: Vec<u8> =
            (received.iter().zip(&whole)).filter(|(new, old)| new != old).map(|(new, _)| *new).collect();
        assert!(!changed.is_empty() && changed.len() <= SYSTEMD.len());
        let text = String::from_utf8_lossy(&received[..whole.len()]).into_owned();
        assert_eq!((text.matches(SYSTEMD).count(), text.matches("org.freedesktop.systemd1").count()), (1, 1));
    }

    #[test]
    fn what_is_no_message_goes_through_and_what_is_too_long_ends_it() {
        for line in ["OK 0123\r\n", "AGREE_UNIX_FD\r\n", "REJECTED\r\n", ""] {
            assert_eq!(sign(&mut line.as_bytes().to_vec()).unwrap(), line.len());
        }
        let mut long = [&b"l\x04\x00\x01"[..], &[0xff; 12]].concat();
        assert!(sign(&mut long).is_err());
    }
}

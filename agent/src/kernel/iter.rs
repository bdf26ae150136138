//! One pass of an iterator: the list of what is there now.

use std::io::{self, Read};

use aya::{maps::Array, programs};
use bytemuck::Pod;
use plumb_common::{
    file::FdRecord,
    task::{TaskRecord, ThreadRecord},
};

use super::load::Kernel;

/// Several of the kernel's own 32 KiB buffers at once.
const BUFFER: usize = 128 << 10;

impl Kernel {
    /// One record per process of the host, kernel threads included. A process may appear more than once
    /// when its leader has exited (`task::FLAG_STAND_IN`).
    pub fn processes(&mut self) -> io::Result<Vec<TaskRecord>> {
        self.pass("processes", 0)
    }

    /// The threads of one process.
    pub fn threads(&mut self, tgid: u32) -> io::Result<Vec<ThreadRecord>> {
        self.pass("threads", tgid)
    }

    /// The open files of one process, by fd.
    pub fn files(&mut self, tgid: u32) -> io::Result<Vec<FdRecord>> {
        self.pass("files", tgid)
    }

    fn pass<T: Pod>(&mut self, program: &str, tgid: u32) -> io::Result<Vec<T>> {
        let focus = self.ebpf.map_mut("ITER_TGID").ok_or(io::ErrorKind::NotFound)?;
        let mut focus = Array::<_, u32>::try_from(focus).map_err(io::Error::other)?;
        focus.set(0, tgid, 0).map_err(io::Error::other)?;
        let program = self.ebpf.program_mut(program).ok_or(io::ErrorKind::NotFound)?;
        let iterator = <&mut programs::Iter>::try_from(program).map_err(io::Error::other)?;
        let link = iterator.attach().and_then(|id| iterator.take_link(id)).map_err(io::Error::other)?;
        records(&mut link.into_file().map_err(io::Error::other)?)
    }
}

/// Reads fixed-size records to the end. A read may end inside a record.
fn records<T: Pod>(from: &mut impl Read) -> io::Result<Vec<T>> {
    let size = size_of::<T>();
    let mut buffer = vec![0; BUFFER];
    let mut kept = 0;
    let mut records = Vec::new();
    loop {
        let read = match from.read(&mut buffer[kept..]) {
            Ok(0) => break,
            Ok(read) => read,
            // The kernel gives up its turn after a million objects without output.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => continue,
            Err(error) => return Err(error),
        };
        let filled = kept + read;
        let whole = filled - filled % size;
        records.extend(buffer[..whole].chunks_exact(size).map(bytemuck::pod_read_unaligned::<T>));
        buffer.copy_within(whole..filled, 0);
        kept = filled - whole;
    }
    if kept > 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the pass ended inside a record"));
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives its bytes in pieces of a fixed size.
    struct Pieces<'a>(&'a [u8], usize);

    impl Read for Pieces<'_> {
        fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
            let piece = self.1.min(self.0.len()).min(to.len());
            to[..piece].copy_from_slice(&self.0[..piece]);
            self.0 = &self.0[piece..];
            Ok(piece)
        }
    }

    #[test]
    fn records_survive_any_cut_and_a_torn_end_is_an_error() {
        let bytes: Vec<u8> = (0..30u32).flat_map(u32::to_ne_bytes).collect();
        for piece in 1..20 {
            let read: Vec<u32> = records(&mut Pieces(&bytes, piece)).unwrap();
            assert_eq!(read, (0..30).collect::<Vec<_>>(), "pieces of {piece}");
        }
        assert!(records::<u32>(&mut Pieces(&bytes[..7], 3)).is_err());
    }
}

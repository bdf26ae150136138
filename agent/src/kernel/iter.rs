//! One pass of an iterator: the list of what is there now.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use aya::{maps::Array, programs};
use bytemuck::Pod;
use plumb_common::{
    file::FdRecord,
    task::{FLAG_STAND_IN, ProcKey, TaskRecord, ThreadRecord},
};

use super::load::Kernel;

/// Several of the kernel's own 32 KiB buffers at once.
const BUFFER: usize = 128 << 10;

impl Kernel {
    /// One record per process of the host, kernel threads included.
    pub fn processes(&mut self) -> io::Result<Vec<TaskRecord>> {
        let mut records = Vec::new();
        self.pass("processes", ProcKey::new(0, 0), |record| records.push(record))?;
        Ok(one_per_process(records))
    }

    /// The threads of one process. Start 0 takes whatever process has the number.
    pub fn threads(&mut self, process: ProcKey) -> io::Result<Vec<ThreadRecord>> {
        let mut records = Vec::new();
        self.pass("threads", process, |record| records.push(record))?;
        Ok(records)
    }

    /// Hands out the open files of one process, by fd. Start 0 takes whatever process has the number.
    pub fn files(&mut self, process: ProcKey, mut each: impl FnMut(&FdRecord)) -> io::Result<()> {
        let mut last = None;
        let mut repeats = false;
        self.pass("files", process, |record: FdRecord| {
            // Once the leader has exited the kernel lists the shared table again for each other thread.
            repeats |= last.is_some_and(|last| record.fd <= last);
            if !repeats {
                last = Some(record.fd);
                each(&record);
            }
        })
    }

    fn pass<T: Pod>(&mut self, program: &str, process: ProcKey, mut each: impl FnMut(T)) -> io::Result<()> {
        let focus = self.ebpf.map_mut("ITER_PROCESS").ok_or(io::ErrorKind::NotFound)?;
        let mut focus = Array::<_, [u64; 2]>::try_from(focus).map_err(io::Error::other)?;
        focus.set(0, bytemuck::cast::<ProcKey, [u64; 2]>(process), 0).map_err(io::Error::other)?;
        let program = self.ebpf.program_mut(program).ok_or(io::ErrorKind::NotFound)?;
        let iterator = <&mut programs::Iter>::try_from(program).map_err(io::Error::other)?;
        if process.tgid != 0 && self.sees_host_pids {
            match of_process(iterator.fd().map_err(io::Error::other)?.as_fd(), process.tgid) {
                Ok(mut pass) => {
                    let mut any = false;
                    records(&mut pass, |record| {
                        any = true;
                        each(record);
                    })?;
                    // 6.1 shows nothing of a process whose leader has exited: then all are walked.
                    if any {
                        return Ok(());
                    }
                }
                Err(error) if is_unknown(&error) => {}
                Err(error) => return Err(error),
            }
        }
        let link = iterator.attach().and_then(|id| iterator.take_link(id)).map_err(io::Error::other)?;
        records(&mut link.into_file().map_err(io::Error::other)?, each)
    }
}

/// Whether the kernel does not know iterators over one process, which exist since 6.1.
fn is_unknown(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::E2BIG))
}

/// Starts a pass that the kernel limits to one process: without it all tasks of the host are walked, and
/// the program leaves out the others. aya passes nothing to an iterator, so this speaks to the kernel itself.
fn of_process(program: BorrowedFd<'_>, tgid: u32) -> io::Result<File> {
    const BPF_LINK_CREATE: libc::c_long = 28;
    const BPF_ITER_CREATE: libc::c_long = 33;
    const BPF_TRACE_ITER: u32 = 28;
    /// `union bpf_iter_link_info`, as for tasks.
    #[repr(C)]
    #[derive(bytemuck::Pod, bytemuck::Zeroable, Clone, Copy)]
    struct Info {
        tid: u32,
        pid: u32,
        pid_fd: u32,
        rest: u32,
    }
    /// The beginning of `union bpf_attr`, as for `BPF_LINK_CREATE`.
    #[repr(C)]
    struct LinkCreate {
        program: u32,
        target: u32,
        attach_type: u32,
        flags: u32,
        info: u64,
        info_len: u32,
        reserved: u32,
    }
    let info = Info { tid: 0, pid: tgid, pid_fd: 0, rest: 0 };
    let link = LinkCreate {
        program: program.as_raw_fd() as u32,
        target: 0,
        attach_type: BPF_TRACE_ITER,
        flags: 0,
        info: (&raw const info) as u64,
        info_len: size_of::<Info>() as u32,
        reserved: 0,
    };
    let link = bpf(BPF_LINK_CREATE, (&raw const link).cast(), size_of::<LinkCreate>())?;
    let create = [link.as_raw_fd() as u32, 0];
    bpf(BPF_ITER_CREATE, create.as_ptr().cast(), size_of_val(&create)).map(File::from)
}

/// bpf(2) with a command that returns a new fd.
fn bpf(command: libc::c_long, attributes: *const u8, size: usize) -> io::Result<OwnedFd> {
    // SAFETY: the callers pass attributes of that size, and what those point to lives as long.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call returned a new fd, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Gives a leader that has exited the fd table that another thread of its process still holds, and drops
/// the records of those threads.
fn one_per_process(mut records: Vec<TaskRecord>) -> Vec<TaskRecord> {
    let stand_ins: Vec<TaskRecord> =
        records.extract_if(.., |record| record.flags & FLAG_STAND_IN != 0).collect();
    if stand_ins.is_empty() {
        return records;
    }
    let mut tables: HashMap<ProcKey, TaskRecord> = HashMap::new();
    for stand_in in stand_ins {
        tables.entry(stand_in.key).or_insert(stand_in);
    }
    for record in &mut records {
        if let Some(stand_in) = tables.get(&record.key)
            && record.files == 0
        {
            (record.files, record.fds, record.rss_pages) = (stand_in.files, stand_in.fds, stand_in.rss_pages);
            record.flags |= stand_in.flags;
        }
    }
    records
}

/// Reads fixed-size records to the end. A read may end inside a record.
fn records<T: Pod>(from: &mut impl Read, mut each: impl FnMut(T)) -> io::Result<()> {
    let size = size_of::<T>();
    let mut buffer = vec![0; BUFFER];
    let mut kept = 0;
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
        buffer[..whole].chunks_exact(size).map(bytemuck::pod_read_unaligned::<T>).for_each(&mut each);
        buffer.copy_within(whole..filled, 0);
        kept = filled - whole;
    }
    if kept > 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the pass ended inside a record"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;

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
    fn a_leader_that_has_exited_is_given_the_table_of_its_heirs_and_they_are_left_out() {
        let record = |tgid, files, fds, flags| TaskRecord {
            key: ProcKey::new(tgid, 1),
            files,
            fds,
            flags,
            ..TaskRecord::zeroed()
        };
        // Thread ids start over, so an heir's may be the lower one.
        let heir = record(7, 99, 5, FLAG_STAND_IN);
        let others = [record(8, 1, 3, 0), record(9, 0, 0, 0)];
        for records in [[heir, record(7, 0, 0, 0), heir], [record(7, 0, 0, 0), heir, heir]] {
            let records = records.into_iter().chain(others).collect();
            let expected = [record(7, 99, 5, FLAG_STAND_IN), others[0], others[1]];
            assert_eq!(one_per_process(records), expected);
        }
    }

    #[test]
    fn records_survive_any_cut_and_a_torn_end_is_an_error() {
        let bytes: Vec<u8> = (0..30u32).flat_map(u32::to_ne_bytes).collect();
        for piece in 1..20 {
            let mut read: Vec<u32> = Vec::new();
            records(&mut Pieces(&bytes, piece), |record| read.push(record)).unwrap();
            assert_eq!(read, (0..30).collect::<Vec<_>>(), "pieces of {piece}");
        }
        assert!(records(&mut Pieces(&bytes[..7], 3), |_: u32| {}).is_err());
    }
}

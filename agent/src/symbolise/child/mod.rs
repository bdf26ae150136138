//! The worker's end: a process without rights that reads what foreign files claim.
//!
//! It is started as `plumb symbolise-worker` and is killed when a file makes it slow. Before it looks into a file
//! it says which one, in a page that it shares with the agent.

mod cfi;
mod golang;
mod image;
mod names;
mod perf_map;
mod sandbox;
mod walk;

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use foldhash::{HashMap, HashMapExt};
use rustix::mm::{MapFlags, ProtFlags, mmap};

use self::{cfi::Cfi, golang::Go, image::Image, walk::Walker};
use super::protocol::{self, FromWorker, MAX_REQUEST, ToWorker};

/// Entries of tables that the worker indexes by itself, of all files: 16 bytes each.
const MAX_INDEXED: usize = 1 << 20;

/// Serves the agent on standard input until it hangs up.
pub(crate) fn main() -> io::Result<()> {
    let socket = UnixStream::from(rustix::io::fcntl_dupfd_cloexec(io::stdin().as_fd(), 3)?);
    let (hello, page) = protocol::receive_with_file(&socket, MAX_REQUEST)?;
    let (ToWorker::Hello, Some(page)) = (hello, page) else { return Err(io::ErrorKind::InvalidData.into()) };
    let marks = Marks::map(&page)?;
    drop(page);
    let mut modules =
        Modules { socket, marks, loaded: HashMap::new(), code: HashMap::new(), room: MAX_INDEXED };
    sandbox::enter()?;
    protocol::send(&modules.socket, &FromWorker::Ready, None)?;
    loop {
        let (request, file) = match protocol::receive_with_file(&modules.socket, MAX_REQUEST) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            received => received?,
        };
        let answer = modules.answer(request, file)?;
        modules.marks.clear();
        protocol::send(&modules.socket, &answer, None)?;
    }
}

/// Says which module is being read, and which has taken most time of this request; see `protocol::Marks`.
struct Marks {
    words: &'static [AtomicU32; 4],
    current: u32,
    since: Instant,
    spent: HashMap<u32, Duration>,
    most: Duration,
}

impl Marks {
    fn map(page: &OwnedFd) -> io::Result<Self> {
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, chosen by the kernel; nothing else is there.
        let start = unsafe { mmap(std::ptr::null_mut(), 4096, flags, MapFlags::SHARED, page, 0)? };
        // SAFETY: it is mapped for as long as the process lives, aligned to a page, and accessed atomically only.
        let words = unsafe { &*start.cast::<[AtomicU32; 4]>() };
        // The clock sets itself up at its first use, which the sandbox would not allow.
        words[1].store(protocol::milliseconds(), Ordering::Relaxed);
        Ok(Self { words, current: 0, since: Instant::now(), spent: HashMap::new(), most: Duration::ZERO })
    }

    /// From now on this module is being read; 0 is none.
    fn reading(&mut self, id: u32) {
        if id == self.current {
            return;
        }
        let now = Instant::now();
        if self.current != 0 {
            let spent = self.spent.entry(self.current).or_default();
            *spent += now - self.since;
            if *spent > self.most {
                self.most = *spent;
                self.words[2].store(self.current, Ordering::Relaxed);
                self.words[3].store(u32::try_from(spent.as_millis()).unwrap_or(u32::MAX), Ordering::Relaxed);
            }
        }
        (self.current, self.since) = (id, now);
        self.words[1].store(protocol::milliseconds(), Ordering::Relaxed);
        self.words[0].store(id, Ordering::Relaxed);
    }

    /// The next request is reckoned by itself.
    fn clear(&mut self) {
        self.reading(0);
        self.spent.clear();
        self.most = Duration::ZERO;
        self.words[2..].iter().for_each(|word| word.store(0, Ordering::Relaxed));
    }
}

/// One file and what has been made of it.
struct Module {
    image: Image,
    cfi: Option<Cfi>,
    go: Option<Go>,
    /// Debug information has been looked for.
    asked: bool,
    debug: Option<names::Debug>,
    debug_image: Option<Image>,
}

/// All that the worker knows.
struct Modules {
    socket: UnixStream,
    marks: Marks,
    loaded: HashMap<u32, Option<Module>>,
    /// Code of the process asked for in this request.
    code: HashMap<u64, Vec<u8>>,
    /// See `MAX_INDEXED`.
    room: usize,
}

impl Modules {
    fn answer(&mut self, request: ToWorker, file: Option<OwnedFd>) -> io::Result<FromWorker> {
        self.code.clear();
        match request {
            ToWorker::Unwind { mappings, stacks } => {
                let mut walker = Walker { mappings: &mappings, modules: self };
                Ok(FromWorker::Walked(stacks.iter().map(|stack| walker.walk(stack)).collect()))
            }
            ToWorker::Name { module, debug, offsets } => {
                if debug {
                    self.find_debug(module)?;
                }
                let places =
                    |module: &mut Module| (module.image.build_id(), names::of(module, &offsets, debug));
                let (build_id, places) = self.get(module).map(places).unwrap_or_default();
                Ok(FromWorker::Named { build_id: build_id.to_vec(), places })
            }
            ToWorker::PerfMap { addresses } => {
                let places = file.map(|map| perf_map::names(map, &addresses)).unwrap_or_default();
                Ok(FromWorker::Named { build_id: Vec::new(), places })
            }
            ToWorker::Hello | ToWorker::File | ToWorker::Code(_) => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// A module, asked for if this is the first time. Says that it is being read.
    fn get(&mut self, id: u32) -> Option<&mut Module> {
        self.marks.reading(id);
        if !self.loaded.contains_key(&id) {
            let file = self.ask_for_file(&FromWorker::NeedModule(id)).ok()?;
            let module = file.and_then(|file| Module::load(&file, &mut self.room));
            self.loaded.insert(id, module);
        }
        self.loaded.get_mut(&id)?.as_mut()
    }

    fn find_debug(&mut self, id: u32) -> io::Result<()> {
        let Some(module) = self.get(id).filter(|module| !module.asked) else { return Ok(()) };
        module.asked = true;
        module.debug = names::debug_of(&mut module.image);
        let build_id = module.image.build_id();
        // A debug file is believed by its build id alone.
        if module.debug.is_some() || build_id.is_empty() {
            return Ok(());
        }
        let link = module.image.section(b".gnu_debuglink").map(|(bytes, _)| bytes).unwrap_or_default();
        let link = link.split(|byte| *byte == 0).next().unwrap_or_default();
        let need =
            FromWorker::NeedDebug { build_id: build_id.to_vec(), link: link[..link.len().min(255)].to_vec() };
        let file = self.ask_for_file(&need)?;
        let image = file.and_then(|file| Image::map(&file)).filter(|image| image.build_id() == build_id);
        if let (Some(mut image), Some(module)) = (image, self.get(id)) {
            module.debug = names::debug_of(&mut image);
            module.debug_image = Some(image);
        }
        Ok(())
    }

    fn ask_for_file(&self, need: &FromWorker) -> io::Result<Option<OwnedFd>> {
        protocol::send(&self.socket, need, None)?;
        match protocol::receive_with_file(&self.socket, MAX_REQUEST)? {
            (ToWorker::File, file) => Ok(file),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Code of the process in anonymous memory; empty if it cannot be had.
    fn code(&mut self, address: u64) -> Vec<u8> {
        if let Some(code) = self.code.get(&address) {
            return code.clone();
        }
        self.marks.reading(0);
        let asked = protocol::send(&self.socket, &FromWorker::NeedCode(address), None);
        let received = asked.and_then(|()| protocol::receive_with_file(&self.socket, MAX_REQUEST));
        let code = match received {
            Ok((ToWorker::Code(code), _)) => code,
            _ => Vec::new(),
        };
        self.code.insert(address, code.clone());
        code
    }
}

impl Module {
    fn load(file: &OwnedFd, room: &mut usize) -> Option<Self> {
        let image = Image::map(file)?;
        let (cfi, go) = (Cfi::of(&image, room), Go::of(&image));
        Some(Self { image, cfi, go, asked: false, debug: None, debug_image: None })
    }
}

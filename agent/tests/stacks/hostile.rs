//! Files made to do harm: each costs a bounded time and the agent no memory, and everything else keeps its names.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use plumb::symbolise::{Frame, RawStack, Symboliser};
use plumb_common::task::ProcKey;

use crate::{
    sampler,
    sources::{brief, compile, marked, own, source, symboliser},
    support::TempDir,
};

/// What one request may take on a host that stalls for some time, and the memory of the agent.
const TIME: Duration = Duration::from_secs(3);
const MEMORY: u64 = 64 << 20;

/// A section header: type, flags, offset and size.
struct Section {
    at: usize,
}

impl Section {
    fn find(bytes: &[u8], name: &str) -> Self {
        let word = |at: usize, size: usize| {
            let mut word = [0; 8];
            word[..size].copy_from_slice(&bytes[at..at + size]);
            usize::try_from(u64::from_le_bytes(word)).unwrap()
        };
        let (table, count, names) = (word(0x28, 8), word(0x3c, 2), word(0x3e, 2));
        let strings = word(table + names * 64 + 0x18, 8);
        let headers = (0..count).map(|index| table + index * 64);
        let is_named =
            |at: &usize| bytes[strings + word(*at, 4)..].starts_with(format!("{name}\0").as_bytes());
        Self { at: headers.into_iter().find(is_named).expect(name) }
    }

    fn set(&self, bytes: &mut [u8], field: usize, value: u64) {
        bytes[self.at + field..self.at + field + 8].copy_from_slice(&value.to_le_bytes());
    }

    fn get(&self, bytes: &[u8], field: usize) -> u64 {
        u64::from_le_bytes(bytes[self.at + field..self.at + field + 8].try_into().unwrap())
    }
}

const FLAGS: usize = 0x08;
const OFFSET: usize = 0x18;
const SIZE: usize = 0x20;

fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

/// One stack of a program, at the moment it is taken; `then` is called while the process stands still.
fn once(program: &str, then: &mut dyn FnMut(ProcKey, &RawStack)) {
    let mut taken = 0;
    sampler::run(&mut Command::new(program), &mut |process, sample| {
        if taken == 0 {
            then(process, &sample.raw);
        }
        taken += 1;
    });
    assert!(taken > 0);
}

/// Unwinds and names within the bounds, once more where the host had stalled.
fn named(symboliser: &mut Symboliser, process: ProcKey, raw: &RawStack) -> Vec<Frame> {
    let timeouts = symboliser.counters().timeouts;
    let frames = named_once(symboliser, process, raw);
    let is_late = symboliser.counters().timeouts > timeouts;
    if is_late { named_once(symboliser, process, raw) } else { frames }
}

fn named_once(symboliser: &mut Symboliser, process: ProcKey, raw: &RawStack) -> Vec<Frame> {
    let (begun, before) = (Instant::now(), resident());
    let stack = symboliser.unwind(process, std::slice::from_ref(raw)).remove(0);
    let unwound = begun.elapsed();
    let frames = symboliser.symbolise(&stack);
    let grown = resident().saturating_sub(before);
    println!(
        "  unwound in {unwound:?}, named after {:?}, {grown} bytes; {:?}",
        begun.elapsed(),
        symboliser.counters()
    );
    assert!(begun.elapsed() < TIME && grown < MEMORY, "{:?} {grown}", begun.elapsed());
    frames
}

fn call_open() -> (String, String, u32) {
    ("call_open".to_owned(), "calls.c".to_owned(), marked("calls.c", "open"))
}

/// A program spoiled in a way.
fn spoiled(dir: &TempDir, name: &str, flags: &[&str], spoil: impl FnOnce(&Path, Vec<u8>)) -> String {
    let program = dir.join(name);
    compile("gcc", flags, &source("calls.c"), &program);
    let bytes = fs::read(&program).unwrap();
    spoil(Path::new(&program), bytes);
    program
}

/// The bytes of a section.
fn content(bytes: &[u8], section: &Section) -> Vec<u8> {
    let start = usize::try_from(section.get(bytes, OFFSET)).unwrap();
    bytes[start..start + usize::try_from(section.get(bytes, SIZE)).unwrap()].to_vec()
}

/// Makes the first unit of a table reach to its end.
fn extended(table: &mut [u8]) {
    let length = u32::try_from(table.len() - 4).unwrap();
    table[..4].copy_from_slice(&length.to_le_bytes());
}

/// A compressed section that claims a size; what is in it are zeros, compressed a thousand times smaller.
fn bomb(bytes: &mut Vec<u8>, section: &Section, claimed: u64, real: usize) {
    let mut compressed = Vec::new();
    compressed.extend(1u32.to_le_bytes());
    compressed.extend(0u32.to_le_bytes());
    compressed.extend(claimed.to_le_bytes());
    compressed.extend(1u64.to_le_bytes());
    let script = format!("import sys, zlib; sys.stdout.buffer.write(zlib.compress(bytes({real}), 9))");
    compressed.extend(Command::new("/usr/bin/python3").args(["-c", &script]).output().unwrap().stdout);
    while !bytes.len().is_multiple_of(8) {
        bytes.push(0);
    }
    let at = bytes.len() as u64;
    let flags = section.get(bytes, FLAGS);
    section.set(bytes, FLAGS, flags | 0x800);
    section.set(bytes, OFFSET, at);
    section.set(bytes, SIZE, compressed.len() as u64);
    bytes.extend(compressed);
}

#[test]
fn every_hostile_file_is_survived_and_others_keep_their_names() {
    const FLAGS: [&str; 2] = ["-g", "-O2"];
    let dir = TempDir::new();
    let mut symboliser = symboliser();
    let honest = dir.join("calls");
    compile("gcc", &FLAGS, &source("calls.c"), &honest);
    let mut check = |what: &str, program: &str, is_right: &dyn Fn(&[Frame]) -> bool| {
        println!("{what}");
        once(program, &mut |process, raw| {
            let frames = named(&mut symboliser, process, raw);
            assert!(is_right(&frames), "{what}: {}", brief(&frames));
        });
        once(&honest, &mut |process, raw| {
            let stack = symboliser.unwind(process, std::slice::from_ref(raw)).remove(0);
            let frames = symboliser.symbolise(&stack);
            assert_eq!(own(&frames, "calls").first(), Some(&call_open()), "after {what}: {}", brief(&frames));
        });
    };
    // The function is known by its symbol, and the walk goes on.
    let function_only = |name: &'static str| {
        move |frames: &[Frame]| {
            own(frames, name).first().is_some_and(|first| first.0 == "call_open" && first.2 == 0)
        }
    };

    for (name, claimed, real) in [
        ("bomb-liar", 1 << 40, 1 << 20),
        ("bomb-large", 2 << 30, 2 << 30),
        ("bomb-small", 39 << 20, 39 << 20),
    ] {
        let program = spoiled(&dir, name, &FLAGS, |path, mut bytes| {
            let section = Section::find(&bytes, ".debug_info");
            bomb(&mut bytes, &section, claimed, real);
            fs::write(path, bytes).unwrap();
        });
        check(name, &program, &function_only(name));
    }

    // A line table of millions of rows, more than the worker's memory: without debug information, then.
    let program = spoiled(&dir, "rows", &FLAGS, |path, mut bytes| {
        let section = Section::find(&bytes, ".debug_line");
        let mut table = content(&bytes, &section);
        table.extend(vec![0x20; 16 << 20]);
        extended(&mut table);
        let at = bytes.len() as u64;
        section.set(&mut bytes, OFFSET, at);
        section.set(&mut bytes, SIZE, table.len() as u64);
        bytes.extend(table);
        fs::write(path, bytes).unwrap();
    });
    check("rows", &program, &function_only("rows"));

    // A unit of a billion empty entries, which takes longer than it may.
    let program = spoiled(&dir, "entries", &FLAGS, |path, mut bytes| {
        let section = Section::find(&bytes, ".debug_info");
        let (mut unit, at) = (content(&bytes, &section), (bytes.len() as u64).next_multiple_of(4096));
        unit[..4].copy_from_slice(&((3u32 << 30) - 4).to_le_bytes());
        section.set(&mut bytes, OFFSET, at);
        section.set(&mut bytes, SIZE, 3 << 30);
        fs::write(path, bytes).unwrap();
        let file = File::options().write(true).open(path).unwrap();
        file.set_len(at + (3 << 30)).unwrap();
        file.write_all_at(&unit, at).unwrap();
    });
    check("entries", &program, &function_only("entries"));

    let program = spoiled(&dir, "offsets", &FLAGS, |path, mut bytes| {
        for name in [".debug_info", ".debug_line", ".eh_frame", ".symtab", ".strtab", ".dynsym"] {
            Section::find(&bytes, name).set(&mut bytes, OFFSET, u64::MAX - 7);
        }
        fs::write(path, bytes).unwrap();
    });
    // Segments still have the tables to unwind by.
    check("offsets", &program, &|frames| frames.len() >= 5 && own(frames, "offsets").is_empty());

    let program = spoiled(&dir, "headers", &FLAGS, |path, mut bytes| {
        bytes[0x28..0x30].copy_from_slice(&(u64::MAX - 63).to_le_bytes());
        fs::write(path, bytes).unwrap();
    });
    check("headers", &program, &|frames| frames.len() >= 5 && own(frames, "headers").is_empty());

    let program = spoiled(&dir, "symbols", &["-O2"], |path, mut bytes| {
        let section = Section::find(&bytes, ".symtab");
        let at = (bytes.len() as u64).next_multiple_of(4096);
        section.set(&mut bytes, OFFSET, at);
        section.set(&mut bytes, SIZE, 1 << 30);
        fs::write(path, bytes).unwrap();
        File::options().write(true).open(path).unwrap().set_len(at + (1 << 30)).unwrap();
    });
    check("symbols", &program, &|frames| frames.len() >= 5);

    // A table of Go that claims everything.
    let table = dir.join("table");
    let mut header = vec![0xf1, 0xff, 0xff, 0xff, 0, 0, 1, 8];
    for word in [u64::MAX >> 4, u64::MAX, 0x1000, 72, 72, 72, 72, 72] {
        header.extend(u64::to_le_bytes(word));
    }
    header.resize(1 << 20, 0x80);
    fs::write(&table, &header).unwrap();
    let with_table = |name: &str, table: &str| {
        spoiled(&dir, name, &FLAGS, |path, _| {
            let output = Command::new("objcopy")
                .args([
                    "--add-section",
                    &format!(".gopclntab={table}"),
                    "--set-section-flags",
                    ".gopclntab=readonly",
                ])
                .arg(path)
                .output()
                .unwrap();
            assert!(output.status.success(), "{output:?}");
        })
    };
    let program = with_table("go-counts", &table);
    check("go-counts", &program, &|frames| own(frames, "go-counts").first() == Some(&call_open()));
    // One function over everything, whose tables never end: 64 MiB of steps of one byte.
    let mut header = vec![0xf1, 0xff, 0xff, 0xff, 0, 0, 1, 8];
    for word in [1, 1, 0x1000, 200, 200, 200, 200, 72] {
        header.extend(u64::to_le_bytes(word));
    }
    header.extend([0u32, 16, 0x1000_0000].iter().flat_map(|word| word.to_le_bytes()));
    header.extend([0u32; 1].iter().flat_map(|word| word.to_le_bytes()));
    header.extend([0u32, 0, 0, 0, 4, 4, 4, 0, 0, 0, 0].iter().flat_map(|word| word.to_le_bytes()));
    header.resize(200, 0);
    header.resize(200 + (64 << 20), 1);
    (4..header.len() - 200).step_by(2).for_each(|at| header[200 + at + 1] = 0);
    fs::write(&table, &header).unwrap();
    let program = with_table("go-values", &table);
    check("go-values", &program, &|frames| !frames.is_empty());

    // The expression of the frame jumps to itself.
    let text = fs::read_to_string(source("calls.c")).unwrap();
    let looped = text.replace(
        "int fd = open(\"/dev/null\", O_RDONLY);",
        "__asm__ volatile(\".cfi_escape 0x0f,0x03,0x2f,0xfd,0xff\"); int fd = open(\"/dev/null\", O_RDONLY);",
    );
    assert_ne!(looped, text);
    let changed = dir.0.join("calls.c");
    fs::write(&changed, looped).unwrap();
    let program = dir.join("expression");
    compile("gcc", &FLAGS, &changed, &program);
    check("expression", &program, &|frames| {
        frames.len() == 2 && own(frames, "expression").first() == Some(&call_open())
    });

    let counters = symboliser.counters();
    println!("{counters:?}");
    // The rows and the entries did it.
    assert!(counters.crashes >= 1 && counters.timeouts >= 1 && counters.not_started == 0, "{counters:?}");
}

#[test]
fn a_library_truncated_while_it_is_mapped_kills_only_the_worker() {
    let dir = TempDir::new();
    let (library, program) = (dir.join("libpool.so"), dir.join("pool"));
    compile("g++", &["-g", "-O2", "-shared", "-fPIC"], &source("pool.cpp"), &library);
    let main = source("pool_main.cpp");
    let search = format!("-Wl,-rpath,{}", dir.0.display());
    let mut command = Command::new("g++");
    assert!(command.arg(main).args([&library, &search, "-o", &program]).status().unwrap().success());
    let mut symboliser = symboliser();
    let mut taken = 0;
    // The program does not survive it either.
    sampler::run_to_any_end(&mut Command::new(&program), &mut |process, sample| {
        taken += 1;
        if taken > 1 {
            return;
        }
        let stack = symboliser.unwind(process, &[sample.raw]).remove(0);
        File::options().write(true).open(&library).unwrap().set_len(4096).unwrap();
        let begun = Instant::now();
        let frames = symboliser.symbolise(&stack);
        assert!(begun.elapsed() < TIME);
        assert!(own(&frames, "libpool.so").is_empty(), "{}", brief(&frames));
        let main = own(&frames, "pool");
        assert_eq!(main.first().map(|first| first.0.as_str()), Some("main"), "{}", brief(&frames));
    });
    assert!(taken > 0);
    let counters = symboliser.counters();
    assert!(counters.recycled + counters.crashes > 0, "{counters:?}");
}

#[test]
fn a_perf_map_is_bounded_and_must_be_a_file() {
    let dir = TempDir::new();
    let program = dir.join("jit");
    compile("gcc", &["-g", "-O2"], &source("jit.c"), &program);
    let mut symboliser = symboliser();
    for what in ["sparse", "long", "link", "fifo", "device"] {
        println!("{what}");
        once(&program, &mut |process, raw| {
            let map = format!("/tmp/perf-{}.map", process.tgid);
            fs::remove_file(&map).unwrap();
            match what {
                "sparse" => File::create(&map).unwrap().set_len(1 << 30).unwrap(),
                "long" => {
                    fs::write(&map, format!("0 ffffffffffffffff {}\n", "x".repeat(31 << 20))).unwrap();
                }
                "link" => {
                    fs::write(dir.0.join("names"), "0 ffffffffffffffff elsewhere\n").unwrap();
                    std::os::unix::fs::symlink(dir.0.join("names"), &map).unwrap();
                }
                "fifo" => assert!(Command::new("mkfifo").arg(&map).status().unwrap().success()),
                _ => assert!(Command::new("mknod").args([&map, "c", "1", "5"]).status().unwrap().success()),
            }
            let frames = named(&mut symboliser, process, raw);
            assert_eq!(frames[1].lines[0].function, "leak", "{}", brief(&frames));
            let name = frames[2].lines.first().map(|line| line.function.len());
            assert_eq!(name, (what == "long").then_some(256), "{}", brief(&frames));
        });
    }
}

#[test]
fn a_perf_map_names_code_for_the_stacks_of_its_time_and_is_no_older_than_its_process() {
    let dir = TempDir::new();
    let program = dir.join("jit");
    compile("gcc", &["-g", "-O2"], &source("jit.c"), &program);
    let mut symboliser = symboliser();
    once(&program, &mut |process, raw| {
        let map = format!("/tmp/perf-{}.map", process.tgid);
        let mut name = || {
            let frames = named(&mut symboliser, process, raw);
            frames[2].lines.first().map(|line| line.function.clone())
        };
        assert_eq!(name().as_deref(), Some("py::Pool.get"));
        fs::write(&map, "0 ffffffffffffffff py::another:/srv/app.py\n").unwrap();
        assert_eq!(name().as_deref(), Some("py::another"), "the code is another's by now");
    });
    once(&program, &mut |process, raw| {
        let map = format!("/tmp/perf-{}.map", process.tgid);
        File::open(&map).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
        assert!(named(&mut symboliser, process, raw)[2].lines.is_empty());
    });
}

#[test]
fn the_worker_has_no_rights() {
    let mut symboliser = symboliser();
    let process = sampler::key(std::process::id());
    assert_eq!(symboliser.unwind(process, &[RawStack::default()]).len(), 1);
    let own = format!("PPid:\t{}", std::process::id());
    let entries = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    let confined = entries.filter(|path| {
        let status = fs::read_to_string(path.join("status")).unwrap_or_default();
        let limits = fs::read_to_string(path.join("limits")).unwrap_or_default();
        let nobody = "Uid:\t65534\t65534\t65534\t65534";
        let wanted =
            [&own, nobody, "CapPrm:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2", "Groups:\t \n"];
        let data = limits.lines().find_map(|line| line.strip_prefix("Max data size")).unwrap_or_default();
        let data = data.split_ascii_whitespace().next().and_then(|bytes| bytes.parse::<u64>().ok());
        wanted.iter().all(|line| status.contains(*line)) && data.is_some_and(|bytes| bytes < 2 * MEMORY)
    });
    assert!(confined.count() > 0);
}

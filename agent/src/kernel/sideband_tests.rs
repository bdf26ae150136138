use super::*;

const MMAP2: u32 = RecordType::MMAP2.0;
const COMM: u32 = RecordType::COMM.0;
const FORK: u32 = RecordType::FORK.0;
const LOST: u32 = RecordType::LOST.0;
const COMM_EXEC: u16 = 1 << 13;

/// A record as the kernel writes it, with its time behind.
fn record(kind: u32, misc: u16, body: &[u8], time: u64) -> Vec<u8> {
    let size = u16::try_from(HEADER + body.len() + TRAILER).unwrap();
    let header = [&kind.to_ne_bytes()[..], &misc.to_ne_bytes(), &size.to_ne_bytes()].concat();
    [&header, body, &time.to_ne_bytes()].concat()
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

fn mmap2(pid: u32, start: u64, length: u64, path: &[u8]) -> Vec<u8> {
    let name = [path, &[0; 8][path.len() % 8..]].concat();
    let place = longs(&[start, length, 0x2000]);
    [words(&[pid, pid]), place, words(&[8, 1]), longs(&[42, 7]), words(&[5, 2]), name].concat()
}

fn all(bytes: RawData<'_>) -> Vec<Told> {
    Records(Some(bytes)).collect()
}

fn mapping(start: u64, path: &[u8]) -> Mapping {
    Mapping { start, end: start + 0x1000, offset: 0x2000, device: (8, 1), inode: 42, path: path.to_vec() }
}

/// One of each kind, and what they say.
fn sample() -> (Vec<u8>, Vec<Told>) {
    let name = b"x y\0\0\0\0\0".to_vec();
    let records = [
        record(FORK, 0, &[words(&[8, 7, 8, 7]), longs(&[11])].concat(), 12),
        record(FORK, 0, &[words(&[7, 7, 9, 7]), longs(&[11])].concat(), 13),
        record(COMM, COMM_EXEC, &[words(&[8, 8]), name.clone()].concat(), 14),
        record(COMM, 0, &[words(&[8, 8]), name].concat(), 15),
        record(MMAP2, 0, &mmap2(8, 0x1000, 0x1000, b"/lib/a b"), 16),
        record(LOST, 0, &longs(&[1, 5]), 17),
        record(RecordType::EXIT.0, 0, &[words(&[8, 7, 8, 7]), longs(&[11])].concat(), 18),
        record(4711, 0, b"", 19),
    ];
    let says = vec![
        Told::Event(MapEvent::Forked { time: 12, parent: 7, child: 8 }),
        Told::Other,
        Told::Event(MapEvent::Exec { time: 14, tgid: 8 }),
        Told::Other,
        Told::Event(MapEvent::Mapped { time: 16, tgid: 8, mapping: mapping(0x1000, b"/lib/a b") }),
        Told::Lost(5),
        Told::Other,
        Told::Other,
    ];
    (records.concat(), says)
}

#[test]
fn records_say_what_the_kernel_wrote() {
    let (bytes, says) = sample();
    assert_eq!(all(RawData::Single(&bytes)), says);
    assert!(all(RawData::Single(&[])).is_empty());
}

#[test]
fn records_go_over_the_end_of_the_ring_anywhere() {
    let (bytes, says) = sample();
    for begin in 0..1024_u64 {
        let mut ring = vec![0xaa; 1024];
        for (at, byte) in (begin..).zip(&bytes) {
            ring[usize::try_from(at % 1024).unwrap()] = *byte;
        }
        // The position counts on and on.
        for position in [begin, (1 << 40) + begin] {
            assert_eq!(all(window(&ring, position, bytes.len())), says, "{position}");
        }
    }
}

#[test]
fn a_ring_may_be_full() {
    let ring: Vec<u8> = (0..64).collect();
    assert_eq!(window(&ring, 0, 64), RawData::Single(&ring));
    assert_eq!(window(&ring, 60, 64), RawData::Split(&ring[60..], &ring[..60]));
    assert_eq!(window(&ring, 60, 4), RawData::Single(&ring[60..]));
}

#[test]
fn what_is_cut_is_damage_and_ends_the_batch() {
    let (bytes, says) = sample();
    for length in 0..bytes.len() {
        let got = all(RawData::Single(&bytes[..length]));
        let whole = got.iter().zip(&says).take_while(|(got, says)| got == says).count();
        assert!(got.len() - whole <= 1 && got[whole..].iter().all(|told| *told == Told::Damaged));
    }
}

#[test]
fn an_impossible_length_is_damage() {
    let (bytes, _) = sample();
    for size in [0_u16, 1, 7, 9, 0x7fff, u16::MAX] {
        let mut bad = bytes.clone();
        bad[6..8].copy_from_slice(&size.to_ne_bytes());
        let got = all(RawData::Single(&bad));
        assert_eq!(got[0], Told::Damaged, "{size}");
    }
    // Too short for what it is, in a record of its own length: what follows is read.
    for body in 0..40 {
        let short = [record(MMAP2, 0, &vec![1; body], 1), record(LOST, 0, &longs(&[1, 5]), 17)].concat();
        assert_eq!(all(RawData::Single(&short)), [Told::Damaged, Told::Lost(5)], "{body}");
    }
    let empty = [&MMAP2.to_ne_bytes()[..], &[0, 0, 8, 0]].concat();
    assert_eq!(all(RawData::Single(&empty)), [Told::Damaged]);
}

#[test]
fn what_cannot_be_is_damage() {
    let told_of = |body: &[u8], misc| all(RawData::Single(&record(MMAP2, misc, body, 1))).remove(0);
    assert_eq!(told_of(&mmap2(8, u64::MAX - 5, 0x1000, b"x"), 0), Told::Damaged, "it goes over the end");
    assert_eq!(told_of(&mmap2(8, 0x1000, 0, b"x"), 0), Told::Damaged, "it is empty");
    assert_eq!(told_of(&mmap2(0, 0x1000, 0x1000, b"x"), 0), Told::Damaged, "it is nobody's");
    assert_eq!(told_of(&mmap2(u32::MAX, 0x1000, 0x1000, b"x"), 0), Told::Damaged, "its process is gone");
    let with_build_id = PERF_RECORD_MISC_MMAP_BUILD_ID;
    assert_eq!(told_of(&mmap2(8, 0x1000, 0x1000, b"x"), with_build_id), Told::Damaged, "not asked for");
}

#[test]
fn a_path_is_whatever_bytes_it_has() {
    let long = vec![b'/'; 5000];
    for path in [&b""[..], b"\xff\n\x1b[2J", b"//anon", &long] {
        let body = mmap2(8, 0x1000, 0x1000, path);
        let expected = MapEvent::Mapped { time: 1, tgid: 8, mapping: mapping(0x1000, path) };
        assert_eq!(all(RawData::Single(&record(MMAP2, 0, &body, 1))), [Told::Event(expected)]);
    }
    // Without an end it ends before the time.
    let mut body = mmap2(8, 0x1000, 0x1000, b"");
    let end = body.len() - 8;
    body.truncate(end);
    body.extend_from_slice(b"no end..");
    let expected = MapEvent::Mapped { time: 1, tgid: 8, mapping: mapping(0x1000, b"no end..") };
    assert_eq!(all(RawData::Single(&record(MMAP2, 0, &body, 1))), [Told::Event(expected)]);
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_read_to_their_end(bytes: Vec<u8>, split: proptest::sample::Index) {
        let (left, right) = bytes.split_at(split.index(bytes.len() + 1));
        let parts = if right.is_empty() { RawData::Single(left) } else { RawData::Split(left, right) };
        assert_eq!(all(parts), all(RawData::Single(&bytes)));
    }
}

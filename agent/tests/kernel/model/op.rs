//! The language of the model: what a puppet may be told to do, as a script, and at random.

use std::{fmt, str::FromStr};

use proptest::prelude::*;

/// What a new fd is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Socket,
    Eventfd,
    Memfd,
    Epoll,
    Pipe,
    Socketpair,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Make {
        kind: Kind,
        cloexec: bool,
    },
    Dup {
        fd: u32,
    },
    Dup2 {
        fd: u32,
        to: u32,
    },
    Dup3 {
        fd: u32,
        to: u32,
        cloexec: bool,
    },
    DupFd {
        fd: u32,
        from: u32,
        cloexec: bool,
    },
    Close {
        fd: u32,
    },
    CloseRange {
        first: u32,
        last: u32,
    },
    MarkRange {
        first: u32,
        last: u32,
    },
    UnshareRange {
        first: u32,
        last: u32,
    },
    SetCloexec {
        fd: u32,
        on: bool,
    },
    /// `count` fds from `fd` on, into the mailbox.
    Send {
        fd: u32,
        count: u32,
    },
    Receive {
        cloexec: bool,
    },
    Thread {
        own_table: bool,
    },
    /// Another thread than the one that acts.
    End {
        thread: u32,
    },
    Pass {
        thread: u32,
    },
    Rename,
    Fork {
        share: bool,
    },
    Unshare,
    Exec,
    Exit {
        code: u32,
    },
    /// Another puppet.
    Kill {
        puppet: u32,
    },
    /// Wait until all is done, and compare.
    Quiesce,
}

/// One line of a script. Puppets and threads are counted among those that can be meant, and around: with
/// three puppets 4 is the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Op {
    pub(crate) by: u32,
    pub(crate) what: What,
}

const KINDS: [(&str, Kind); 7] = [
    ("file", Kind::File),
    ("socket", Kind::Socket),
    ("eventfd", Kind::Eventfd),
    ("memfd", Kind::Memfd),
    ("epoll", Kind::Epoll),
    ("pipe", Kind::Pipe),
    ("socketpair", Kind::Socketpair),
];

impl What {
    fn words(self) -> (&'static str, Vec<u32>) {
        match self {
            Self::Make { kind, cloexec } => {
                let name = KINDS.iter().find(|(_, other)| *other == kind).map_or("", |(name, _)| name);
                (name, vec![cloexec.into()])
            }
            Self::Dup { fd } => ("dup", vec![fd]),
            Self::Dup2 { fd, to } => ("dup2", vec![fd, to]),
            Self::Dup3 { fd, to, cloexec } => ("dup3", vec![fd, to, cloexec.into()]),
            Self::DupFd { fd, from, cloexec } => ("dupfd", vec![fd, from, cloexec.into()]),
            Self::Close { fd } => ("close", vec![fd]),
            Self::CloseRange { first, last } => ("close-range", vec![first, last]),
            Self::MarkRange { first, last } => ("mark-range", vec![first, last]),
            Self::UnshareRange { first, last } => ("unshare-range", vec![first, last]),
            Self::SetCloexec { fd, on } => ("cloexec", vec![fd, on.into()]),
            Self::Send { fd, count } => ("send", vec![fd, count]),
            Self::Receive { cloexec } => ("receive", vec![cloexec.into()]),
            Self::Thread { own_table } => ("thread", vec![own_table.into()]),
            Self::End { thread } => ("end", vec![thread]),
            Self::Pass { thread } => ("pass", vec![thread]),
            Self::Rename => ("rename", vec![]),
            Self::Fork { share } => ("fork", vec![share.into()]),
            Self::Unshare => ("unshare", vec![]),
            Self::Exec => ("exec", vec![]),
            Self::Exit { code } => ("exit", vec![code]),
            Self::Kill { puppet } => ("kill", vec![puppet]),
            Self::Quiesce => ("quiesce", vec![]),
        }
    }

    fn parse(word: &str, numbers: &[u32]) -> Option<Self> {
        Some(match (word, numbers) {
            ("dup", &[fd]) => Self::Dup { fd },
            ("dup2", &[fd, to]) => Self::Dup2 { fd, to },
            ("dup3", &[fd, to, cloexec]) => Self::Dup3 { fd, to, cloexec: cloexec != 0 },
            ("dupfd", &[fd, from, cloexec]) => Self::DupFd { fd, from, cloexec: cloexec != 0 },
            ("close", &[fd]) => Self::Close { fd },
            ("close-range", &[first, last]) => Self::CloseRange { first, last },
            ("mark-range", &[first, last]) => Self::MarkRange { first, last },
            ("unshare-range", &[first, last]) => Self::UnshareRange { first, last },
            ("cloexec", &[fd, on]) => Self::SetCloexec { fd, on: on != 0 },
            ("send", &[fd, count]) => Self::Send { fd, count },
            ("receive", &[cloexec]) => Self::Receive { cloexec: cloexec != 0 },
            ("thread", &[own_table]) => Self::Thread { own_table: own_table != 0 },
            ("end", &[thread]) => Self::End { thread },
            ("pass", &[thread]) => Self::Pass { thread },
            ("rename", []) => Self::Rename,
            ("fork", &[share]) => Self::Fork { share: share != 0 },
            ("unshare", []) => Self::Unshare,
            ("exec", []) => Self::Exec,
            ("exit", &[code]) => Self::Exit { code },
            ("kill", &[puppet]) => Self::Kill { puppet },
            ("quiesce", []) => Self::Quiesce,
            (name, &[cloexec]) => {
                let (_, kind) = KINDS.iter().find(|(known, _)| *known == name)?;
                Self::Make { kind: *kind, cloexec: cloexec != 0 }
            }
            _ => return None,
        })
    }
}

impl fmt::Display for Op {
    fn fmt(&self, to: &mut fmt::Formatter) -> fmt::Result {
        let (word, numbers) = self.what.words();
        write!(to, "{} {word}", self.by)?;
        numbers.iter().try_for_each(|number| write!(to, " {number}"))
    }
}

impl FromStr for Op {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let mut words = line.split_ascii_whitespace();
        let mut parsed = || {
            let by = words.next()?.parse().ok()?;
            let word = words.next()?;
            let numbers: Vec<u32> = words.by_ref().map(str::parse).collect::<Result<_, _>>().ok()?;
            Some(Self { by, what: What::parse(word, &numbers)? })
        };
        parsed().ok_or_else(|| format!("not an operation: {line}"))
    }
}

/// A script as text: one operation a line.
pub(crate) fn script(ops: &[Op]) -> String {
    ops.iter().map(|op| format!("{op}\n")).collect()
}

/// Reads a script; what follows a # is a remark.
pub(crate) fn parse(text: &str) -> Result<Vec<Op>, String> {
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    lines.filter(|line| !line.is_empty()).map(str::parse).collect()
}

/// The same operations with one number smaller, in every way; of large numbers with the smallest.
pub(crate) fn with_smaller_numbers(ops: &[Op]) -> Vec<Vec<Op>> {
    const MOST: u32 = 16;
    let mut all = Vec::new();
    for (at, op) in ops.iter().enumerate() {
        let line = op.to_string();
        let words: Vec<&str> = line.split_whitespace().collect();
        for (index, word) in words.iter().enumerate() {
            for less in 0..word.parse::<u32>().unwrap_or(0).min(MOST) {
                let (mut words, less) = (words.clone(), less.to_string());
                words[index] = &less;
                let mut ops = ops.to_vec();
                ops[at] = words.join(" ").parse().unwrap();
                all.push(ops);
            }
        }
    }
    all
}

/// Mostly a number that is in use; some that make the table grow.
fn fd() -> impl Strategy<Value = u32> {
    prop_oneof![16 => 5..16u32, 6 => 0..40u32, 1 => 60..68u32, 1 => 250..260u32, 1 => 500..1000u32]
}

fn range() -> impl Strategy<Value = (u32, u32)> {
    (fd(), prop_oneof![6 => 0..6u32, 1 => 0..300u32, 1 => Just(u32::MAX)])
        .prop_map(|(first, more)| (first, first.saturating_add(more)))
}

fn what() -> impl Strategy<Value = What> {
    let kinds = proptest::sample::select(KINDS.map(|(_, kind)| kind).to_vec());
    let cloexec = || proptest::bool::weighted(0.3);
    prop_oneof![
        180 => (kinds, cloexec()).prop_map(|(kind, cloexec)| What::Make { kind, cloexec }),
        60 => fd().prop_map(|fd| What::Dup { fd }),
        60 => (fd(), fd()).prop_map(|(fd, to)| What::Dup2 { fd, to }),
        30 => (fd(), fd(), cloexec()).prop_map(|(fd, to, cloexec)| What::Dup3 { fd, to, cloexec }),
        40 => (fd(), fd(), cloexec()).prop_map(|(fd, from, cloexec)| What::DupFd { fd, from, cloexec }),
        280 => fd().prop_map(|fd| What::Close { fd }),
        12 => range().prop_map(|(first, last)| What::CloseRange { first, last }),
        8 => range().prop_map(|(first, last)| What::MarkRange { first, last }),
        4 => range().prop_map(|(first, last)| What::UnshareRange { first, last }),
        20 => (fd(), any::<bool>()).prop_map(|(fd, on)| What::SetCloexec { fd, on }),
        40 => (fd(), 1..4u32).prop_map(|(fd, count)| What::Send { fd, count }),
        40 => cloexec().prop_map(|cloexec| What::Receive { cloexec }),
        25 => proptest::bool::weighted(0.1).prop_map(|own_table| What::Thread { own_table }),
        20 => (0..8u32).prop_map(|thread| What::End { thread }),
        25 => (0..8u32).prop_map(|thread| What::Pass { thread }),
        6 => Just(What::Rename),
        14 => proptest::bool::weighted(0.3).prop_map(|share| What::Fork { share }),
        4 => Just(What::Unshare),
        3 => Just(What::Exec),
        5 => (0..3u32).prop_map(|code| What::Exit { code }),
        4 => (0..8u32).prop_map(|puppet| What::Kill { puppet }),
        2 => Just(What::Quiesce),
    ]
}

/// Scripts of at most `length` operations. A puppet mostly does several in a row: whoever waits for another
/// sleeps.
pub(crate) fn scripts(length: usize) -> impl Strategy<Value = Vec<Op>> {
    const ROW: usize = 40;
    let row = (0..8u32, proptest::collection::vec(what(), 1..=ROW));
    let rows = proptest::collection::vec(row, 1..=length.div_ceil(ROW));
    rows.prop_map(|rows| {
        let ops = |(by, row): (u32, Vec<What>)| row.into_iter().map(move |what| Op { by, what });
        rows.into_iter().flat_map(ops).collect()
    })
}

proptest! {
    #[test]
    fn a_script_is_read_as_it_was_written(ops in scripts(50)) {
        prop_assert_eq!(parse(&script(&ops)), Ok(ops));
    }
}

#[test]
fn each_number_is_made_smaller() {
    let ops = parse("0 file 0\n1 dup2 2 1\n").unwrap();
    let smaller: Vec<String> =
        with_smaller_numbers(&ops).iter().map(|ops| script(ops).replace('\n', ";")).collect();
    let expected = ["0 dup2 2 1", "1 dup2 0 1", "1 dup2 1 1", "1 dup2 2 0"];
    assert_eq!(smaller, expected.map(|second| format!("0 file 0;{second};")));
}

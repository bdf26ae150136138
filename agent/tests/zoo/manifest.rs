//! What manifest.toml says about each program, and the rules that hold for all of them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;

/// A program and what is expected of it.
#[derive(Debug)]
pub(crate) struct Case {
    /// Relative to this folder.
    program: PathBuf,
    pub(crate) resource: Resource,
    /// Run time.
    pub(crate) seconds: f64,
    pub(crate) label: Label,
}

#[derive(Debug)]
pub(crate) enum Label {
    Leak(Leak),
    /// With the least and the most that its highest count may be.
    Sound(u32, u32),
}

/// Times are in seconds; deadlines count from the first leaked item.
#[derive(Debug)]
pub(crate) struct Leak {
    pub(crate) per_second: f64,
    pub(crate) after: f64,
    pub(crate) suspect: f64,
    pub(crate) leaking: f64,
    pub(crate) stack: Vec<String>,
    /// What must be in the stack where nothing of `stack` can be; else empty.
    pub(crate) native: Vec<String>,
}

/// A line of a source.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Without its folder.
    pub(crate) file: String,
    pub(crate) line: u32,
}

/// Ends the line of a source that makes what is leaked.
const MARK: &str = "// leak";

/// As in the documents of plumb.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Resource {
    Fd,
    Thread,
}

/// The folder of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Language {
    C,
    Cpp,
    Rust,
    Go,
    Python,
    Shell,
}

impl Language {
    const ALL: [Self; 6] = [Self::C, Self::Cpp, Self::Rust, Self::Go, Self::Python, Self::Shell];

    pub(crate) fn folder(self) -> &'static str {
        match self {
            Self::C => "c",
            Self::Cpp => "cpp",
            Self::Rust => "rust",
            Self::Go => "go",
            Self::Python => "python",
            Self::Shell => "shell",
        }
    }
}

impl Case {
    pub(crate) fn name(&self) -> &str {
        self.program.file_stem().unwrap().to_str().unwrap()
    }

    pub(crate) fn language(&self) -> Language {
        let is_its = |language: &Language| self.program.starts_with(language.folder());
        Language::ALL.into_iter().find(is_its).unwrap()
    }

    pub(crate) fn source(&self) -> PathBuf {
        folder().join(&self.program)
    }

    /// The names of its own sources: the program, and what it shares with others of its language.
    pub(crate) fn files(&self) -> [String; 2] {
        self.sources().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
    }

    fn sources(&self) -> [PathBuf; 2] {
        let common = match self.language() {
            Language::C | Language::Cpp => "c/common.h",
            Language::Rust => "rust/common.rs",
            Language::Go => "go/common.go",
            Language::Python => "python/common.py",
            // Nothing is shared.
            Language::Shell => return [self.source(), self.source()],
        };
        [self.source(), folder().join(common)]
    }

    /// Where its innermost function makes what is leaked: the first line with the mark behind that function's name.
    pub(crate) fn place(&self, leak: &Leak) -> Option<Place> {
        let own = leak.stack[0].rsplit("::").next()?;
        let named = format!("{own}(");
        self.sources().iter().find_map(|path| {
            let text = fs::read_to_string(path).unwrap();
            let lines = (1..).zip(text.lines()).skip_while(|(_, line)| !line.contains(&named));
            let line = lines.into_iter().find(|(_, line)| line.ends_with(MARK))?.0;
            Some(Place { file: path.file_name()?.to_str()?.to_owned(), line })
        })
    }
}

/// This folder.
pub(crate) fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/zoo"))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    leak: Vec<WrittenLeak>,
    sound: Vec<WrittenSound>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenLeak {
    program: PathBuf,
    resource: Resource,
    per_second: f64,
    #[serde(default)]
    after: f64,
    suspect: f64,
    leaking: f64,
    seconds: f64,
    stack: Vec<String>,
    #[serde(default)]
    native: Vec<String>,
    #[serde(rename = "why")]
    _why: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenSound {
    program: PathBuf,
    resource: Resource,
    peak: (u32, u32),
    seconds: f64,
    #[serde(rename = "why")]
    _why: String,
}

/// Every program, in the order of the manifest.
pub(crate) fn read() -> Vec<Case> {
    let written: Written =
        toml::from_str(&fs::read_to_string(folder().join("manifest.toml")).unwrap()).unwrap();
    let leaks = written.leak.into_iter().map(|leak| Case {
        program: leak.program,
        resource: leak.resource,
        seconds: leak.seconds,
        label: Label::Leak(Leak {
            per_second: leak.per_second,
            after: leak.after,
            suspect: leak.suspect,
            leaking: leak.leaking,
            stack: leak.stack,
            native: leak.native,
        }),
    });
    let sound = written.sound.into_iter().map(|sound| Case {
        program: sound.program,
        resource: sound.resource,
        seconds: sound.seconds,
        label: Label::Sound(sound.peak.0, sound.peak.1),
    });
    leaks.chain(sound).collect()
}

/// The longest run: with building, a run of the zoo takes six and a half minutes.
const LONGEST: f64 = 370.0;
/// The shortest run of a sound program.
const SHORTEST: f64 = 180.0;
/// Deadlines by rate, the fastest first: at least so many a second, suspect, leaking.
const DEADLINES: [(f64, f64, f64); 5] =
    [(100.0, 30.0, 90.0), (1.0, 30.0, 120.0), (0.5, 60.0, 180.0), (0.2, 120.0, 270.0), (0.1, 180.0, 360.0)];
/// The leak whose floor rises below a swing, with its deadlines.
const SAWTOOTH: (&str, f64, f64) = ("sawtooth", 30.0, 180.0);

#[test]
fn deadlines_follow_from_the_rate_and_fit_into_the_run() {
    for case in read() {
        let name = case.name();
        assert!(case.seconds <= LONGEST, "{name}");
        match &case.label {
            Label::Leak(leak) => {
                let by_rate = DEADLINES.iter().find(|(rate, ..)| leak.per_second >= *rate).unwrap();
                let (_, suspect, leaking) =
                    if name == SAWTOOTH.0 { (0.0, SAWTOOTH.1, SAWTOOTH.2) } else { *by_rate };
                assert_eq!((leak.suspect, leak.leaking), (suspect, leaking), "{name}");
                assert!(leak.after + leak.leaking + 10.0 <= case.seconds, "{name}");
            }
            Label::Sound(least, most) => assert!(case.seconds >= SHORTEST && least < most, "{name}"),
        }
    }
}

#[test]
fn the_manifest_and_the_programs_are_complete() {
    let cases = read();
    let leaks = cases.iter().filter(|case| matches!(case.label, Label::Leak(_))).count();
    assert!(cases.len() >= 34 && (cases.len() * 2 / 5..=cases.len() * 3 / 5).contains(&leaks));
    let mut found = Vec::new();
    for language in Language::ALL {
        let files = fs::read_dir(folder().join(language.folder())).unwrap();
        let files = files.map(|file| Path::new(language.folder()).join(file.unwrap().file_name()));
        found
            .extend(files.filter(|file| file.file_stem().unwrap() != "common" && file.extension().is_some()));
    }
    found.sort();
    let mut listed: Vec<_> = cases.iter().map(|case| case.program.clone()).collect();
    listed.sort();
    assert_eq!(found, listed);
    let mut names: Vec<_> = cases.iter().map(Case::name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), cases.len(), "two programs have the same name");
}

#[test]
fn the_functions_that_leak_are_in_the_sources() {
    for case in read() {
        let Label::Leak(leak) = &case.label else { continue };
        let source = fs::read_to_string(case.source()).unwrap();
        assert!(!leak.stack.is_empty(), "{}", case.name());
        for function in &leak.stack {
            let own = function.rsplit("::").next().unwrap();
            assert!(source.contains(&format!("{own}(")), "{function} is not in {}", case.name());
        }
        // Either has a line that can be looked for.
        assert_eq!(case.place(leak).is_none(), !leak.native.is_empty(), "{}", case.name());
        let is_interpreted = matches!(case.language(), Language::Python | Language::Shell);
        assert!(!is_interpreted || !leak.native.is_empty(), "{}", case.name());
    }
}

#[test]
fn the_mark_is_looked_for_behind_the_function() {
    let place = |name: &str| {
        let case = read().into_iter().find(|case| case.name() == name).unwrap();
        let Label::Leak(leak) = &case.label else { return None };
        case.place(leak)
    };
    let at = |file: &str, words: &str| {
        let text = fs::read_to_string(folder().join(file)).unwrap();
        let line = text.lines().position(|line| line.contains(words)).unwrap() + 1;
        Some(Place { file: file.split('/').next_back()?.to_owned(), line: line as u32 })
    };
    assert_eq!(place("db_retry"), at("c/db_retry.c", "fd = socket("));
    assert_eq!(place("slow_reader"), at("c/common.h", "check(open(path"));
    assert_eq!(place("condvar_threads"), at("c/common.h", "= pthread_create("));
    assert_eq!(place("sockets_list"), None);
}

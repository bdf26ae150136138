//! Code that its process made: named by a perf map, walked by how the function ends or by the frame pointer.

use std::process::Command;

use plumb::symbolise::{How, origin_frame};

use crate::{
    sampler,
    sources::{brief, compile, marked, source, symboliser},
    support::TempDir,
};

#[test]
fn code_in_memory_is_named_by_the_perf_map() {
    let dir = TempDir::new();
    let program = dir.join("jit");
    compile("gcc", &["-g", "-O2"], &source("jit.c"), &program);
    let mut symboliser = symboliser();
    let (mut samples, mut late) = (0, 0);
    sampler::run(Command::new(&program).arg("100"), &mut |process, sample| {
        samples += 1;
        let timeouts = symboliser.counters().timeouts;
        let stack = symboliser.unwind(process, std::slice::from_ref(&sample.raw)).remove(0);
        let frames = symboliser.symbolise(&stack);
        // On a host that stalls.
        if symboliser.counters().timeouts > timeouts {
            late += 1;
            return;
        }
        let (name, file, line, how) = match sample.phase {
            0 => ("py::Pool.get", "/srv/app.py", None, How::Epilogue),
            _ => ("JS:*handle", "/srv/app.js", Some(12), How::FramePointer),
        };
        let own = |index: usize| {
            let line = &frames[index].lines[0];
            (line.function.clone(), line.line)
        };
        assert_eq!(own(1), ("leak".to_owned(), Some(marked("jit.c", "leak"))), "{}", brief(&frames));
        let made = &frames[2];
        assert_eq!((made.module.as_deref(), made.lines.len()), (None, 1), "{}", brief(&frames));
        let found = &made.lines[0];
        assert_eq!((found.function.as_str(), found.file.as_deref(), found.line), (name, Some(file), line));
        assert_eq!(frames[3].how, how, "{}", brief(&frames));
        assert_eq!(own(3), ("main".to_owned(), Some(marked("jit.c", "call"))), "{}", brief(&frames));
        assert!(stack.complete, "{}", brief(&frames));
        assert_eq!(origin_frame(&frames), Some((1, 0)));
    });
    assert!(samples == 200 && late <= 2, "{late} of {samples}");
}

/// Debian's Python has no debug information, and its functions are not all exported.
#[test]
fn the_frames_of_an_interpreter_are_walked_to_the_end() {
    let script = "import ctypes, os\nc = ctypes.CDLL(None)\n\
        for _ in range(100):\n    c.syscall(157, 0x706c756d, 0, 0, 0, 0)\n    os.close(os.open('/etc/hostname', 0))\n";
    let mut symboliser = symboliser();
    let mut samples = 0;
    sampler::run(Command::new("/usr/bin/python3").args(["-c", script]), &mut |process, sample| {
        let stack = symboliser.unwind(process, std::slice::from_ref(&sample.raw)).remove(0);
        let frames = symboliser.symbolise(&stack);
        let named =
            |name: &str| frames.iter().position(|frame| frame.lines.iter().any(|line| line.function == name));
        assert!(frames[0].module.as_deref().unwrap().contains("libc"), "{}", brief(&frames));
        assert!(frames[1].module.as_deref().unwrap().contains("python3"), "{}", brief(&frames));
        assert!(frames[1..].iter().all(|frame| frame.how == How::Tables), "{}", brief(&frames));
        let (evaluates, main) = (named("_PyEval_EvalFrameDefault"), named("Py_BytesMain"));
        assert!(evaluates.is_some() && evaluates < main && stack.complete, "{}", brief(&frames));
        samples += 1;
    });
    assert_eq!(samples, 100);
}

/// Names one of its functions, and that one's callers.
#[test]
#[ignore = "needs Python 3.12 or later, which Debian 12 does not have: PLUMB_PYTHON names one"]
fn python_names_its_own_functions() {
    let script = "import ctypes, os\nc = ctypes.CDLL(None)\n\
        def leak():\n    return os.open('/etc/hostname', 0)\n\
        def main():\n    for _ in range(100):\n        c.syscall(157, 0x706c756d, 0, 0, 0, 0)\n        os.close(leak())\n\
        main()\n";
    let python = std::env::var("PLUMB_PYTHON").expect("PLUMB_PYTHON names a Python of 3.12 or later");
    let dir = TempDir::new();
    let file = dir.join("leak.py");
    std::fs::write(&file, script).unwrap();
    let mut symboliser = symboliser();
    let mut samples = 0;
    sampler::run(Command::new(python).args(["-X", "perf", &file]), &mut |process, sample| {
        let stack = symboliser.unwind(process, std::slice::from_ref(&sample.raw)).remove(0);
        let frames = symboliser.symbolise(&stack);
        let lines = frames.iter().flat_map(|frame| frame.lines.iter());
        let python: Vec<_> = lines.filter(|line| line.function.starts_with("py::")).collect();
        let names: Vec<_> = python.iter().map(|line| line.function.as_str()).collect();
        assert_eq!(names, ["py::leak", "py::main", "py::<module>"], "{}", brief(&frames));
        assert_eq!(python[0].file.as_deref(), Some(file.as_str()));
        assert!(stack.complete, "{}", brief(&frames));
        let (frame, line) = origin_frame(&frames).unwrap();
        assert_eq!(frames[frame].lines[line].function, "py::leak", "{}", brief(&frames));
        samples += 1;
    });
    assert_eq!(samples, 100);
}

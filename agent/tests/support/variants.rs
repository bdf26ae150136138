//! How agent/tests/stacks/programs/calls.c is built for the kernel tests, by these or by xtask for virtual machines.

/// Names of programs, and the options of gcc. Nothing can say a line of one without `-g`.
pub(crate) const C_PROGRAMS: [(&str, &[&str]); 4] = [
    ("calls-omit", &["-g", "-O2", "-fomit-frame-pointer"]),
    ("calls-keep", &["-g", "-O2", "-fno-omit-frame-pointer"]),
    ("calls-static", &["-g", "-O2", "-static"]),
    ("calls-bare", &["-O2"]),
];

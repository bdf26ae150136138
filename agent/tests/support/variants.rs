//! How agent/tests/stacks/programs/calls.c is built for the kernel tests, by these or by xtask for virtual machines.

/// Names of programs, and the options of gcc.
pub(crate) const C_PROGRAMS: [(&str, &[&str]); 2] =
    [("calls-omit", &["-g", "-O2", "-fomit-frame-pointer"]), ("calls-static", &["-g", "-O2", "-static"])];

//! How programs in C are built for the kernel tests, by these or by xtask for virtual machines.
#![allow(dead_code, reason = "each user needs its part")]

/// Variants of agent/tests/stacks/programs/calls.c, and the options of gcc.
pub(crate) const C_PROGRAMS: [(&str, &[&str]); 2] =
    [("calls-omit", &["-g", "-O2", "-fomit-frame-pointer"]), ("calls-static", &["-g", "-O2", "-static"])];

/// The program that leaks in each way, and its source below agent/.
pub(crate) const LEAKS: (&str, &[&str]) = ("leaks", &["-g", "-O2", "-pthread"]);
pub(crate) const LEAKS_SOURCE: &str = "tests/check/programs/leaks.c";

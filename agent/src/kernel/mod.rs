//! The only importer of aya: loads the kernel programs, attaches them, and reads what they say.

mod btf;
mod iter;
mod load;
mod programs;
mod ring;

pub(crate) use btf::KERNEL_BTF;
pub(crate) use load::{Filter, Kernel, LoadError, Plan, require_capabilities};
#[cfg(test)]
pub(crate) use programs::PROGRAMS;
pub(crate) use programs::{Intent, Status, Verdict};
pub(crate) use ring::Ring;

//! The only importer of aya: loads the kernel programs, attaches them, and reads what they say.

mod btf;
mod iter;
mod load;
mod programs;
mod ring;

pub use load::{Filter, Kernel, LoadError, Plan, require_capabilities};
pub use programs::{Hook, Intent, PROGRAMS, Program, Status, Verdict};
pub(crate) use btf::KERNEL_BTF;
pub use ring::{Ring, RingError};

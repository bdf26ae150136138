//! The only importer of aya: loads the kernel programs, attaches them, and reads what they say.

mod btf;
mod iter;
mod load;
mod programs;
mod ring;

pub use btf::BtfError;
pub(crate) use btf::KERNEL_BTF;
pub use load::{Filter, Kernel, LoadError, Plan, require_capabilities};
pub use programs::{Intent, PROGRAMS, Status, Verdict};
pub use ring::{Ring, RingError};

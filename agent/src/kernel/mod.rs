//! The only importer of aya: loads the kernel programs, attaches them, and reads what they say.

mod btf;
mod fds;
mod iter;
mod load;
mod mappings;
mod programs;
mod ring;
mod sideband;
mod sockets;

pub use btf::BtfError;
pub(crate) use btf::KERNEL_BTF;
pub use fds::WatchError;
pub use load::{Fds, Filter, Kernel, LoadError, Plan, Sockets, require_capabilities, sees_host_pids};
pub use mappings::{FollowError, MapEvent, Mapping, Mappings};
pub use programs::{Intent, PROGRAMS, Program, Seam, Status, Verdict};
pub use ring::{Ledger, Ring, RingError};
pub use sockets::SocketCounts;

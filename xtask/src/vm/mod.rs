//! Runs programs on other kernels, each in a virtual machine that lives only for that run.

mod archive;
mod initramfs;
mod kernels;

pub(crate) use self::kernels::{Kernel, refresh};

//! What other systems read.

pub(crate) mod prometheus;

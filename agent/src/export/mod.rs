//! What other systems read.

pub mod prometheus;

//! Draining: what stands between a service and its end.

#[cfg_attr(not(test), expect(dead_code, reason = "the drain that asks it is not written yet"))]
pub(crate) mod systemd;

//! The atomics of `rate.rs` and `permit.rs`. `tests/loom.rs` compiles the same two files against loom's instead.

pub(super) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

//! The atomics of `rate.rs`, `permit.rs` and `live.rs`. `tests/loom.rs` compiles the same three files against
//! loom's instead.

pub(super) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

pub(super) use atomic_waker::AtomicWaker;

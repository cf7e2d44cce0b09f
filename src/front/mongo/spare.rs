//! Buffers between requests. Each request needs four: what came, what is sent on, what comes back, what the client gets.
//! They belong to the thread and not to clients, so that a sleeping one owns none; what was in them is cleared.

use std::cell::RefCell;

/// Buffers that a thread keeps: for some requests at a time.
const COUNT_MAX: usize = 16;

/// Largest buffer that is kept in bytes: beyond it, asking for it anew is nothing beside filling it.
const KEPT_MAX_BYTES: usize = 64 << 10;

thread_local! {
    static SPARE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// An empty buffer with room for so many bytes.
pub fn take(bytes: usize) -> Vec<u8> {
    let mut buffer = SPARE.with_borrow_mut(Vec::pop).unwrap_or_default();
    buffer.reserve(bytes);
    buffer
}

/// Gives a buffer back.
pub fn give(mut buffer: Vec<u8>) {
    if buffer.capacity() == 0 || buffer.capacity() > KEPT_MAX_BYTES {
        return;
    }
    buffer.clear();
    SPARE.with_borrow_mut(|spare| {
        if spare.len() < COUNT_MAX {
            spare.push(buffer);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_empty_and_none_is_kept_without_bound() {
        give(vec![7; 100]);
        let again = take(50);
        assert!(again.is_empty() && again.capacity() >= 100, "it is the one of before");
        give(vec![7; KEPT_MAX_BYTES + 1]);
        assert_eq!(take(0).capacity(), 0);
        (0..2 * COUNT_MAX).for_each(|_| give(vec![7; 10]));
        assert_eq!(SPARE.with_borrow(Vec::len), COUNT_MAX);
    }
}

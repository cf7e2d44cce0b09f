//! JSON on its way into bounded room: a byte is counted before it is held.

/// The room is used up: what was written is the beginning of something longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// Bytes that grow up to a length and not beyond; nor does the memory that they are kept in.
#[derive(Debug)]
pub struct Sink<'a> {
    out: &'a mut Vec<u8>,
    max_bytes: usize,
}

impl<'a> Sink<'a> {
    /// Writes behind what is there, until there are `max_bytes` altogether.
    pub fn new(out: &'a mut Vec<u8>, max_bytes: usize) -> Self {
        Self { out, max_bytes }
    }

    /// Bytes that are there.
    pub fn written(&self) -> usize {
        self.out.len()
    }

    /// Takes back what came after the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        self.out.truncate(len);
    }

    /// Appends `bytes`.
    ///
    /// # Errors
    /// They don't fit; none of them was written.
    pub fn put(&mut self, bytes: &[u8]) -> Result<(), Full> {
        let wanted = self.out.len().saturating_add(bytes.len());
        if wanted > self.max_bytes {
            return Err(Full);
        }
        if wanted > self.out.capacity() {
            // Twice as much as before, as a vector takes by itself, but no more than may be used.
            let room = self.out.capacity().saturating_mul(2).clamp(wanted, self.max_bytes);
            self.out.reserve_exact(room - self.out.len());
        }
        self.out.extend_from_slice(bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_the_bytes_nor_their_memory_go_beyond_the_room() {
        let mut out = b"head".to_vec();
        let mut sink = Sink::new(&mut out, 1000);
        while sink.put(b"abc").is_ok() {}
        assert_eq!(sink.written(), 1000);
        assert_eq!((sink.put(b""), sink.put(b"x")), (Ok(()), Err(Full)));
        assert!(out.capacity() <= 1000 && out.starts_with(b"headabc"), "{}", out.capacity());
    }
}

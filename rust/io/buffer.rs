//! A reusable byte buffer that begins on a page boundary.
//!
//! Direct writes need memory that is aligned like the file. An aligned allocation would need
//! unsafe code; a vector that is one page longer than asked for, used from its first page boundary
//! on, needs none and costs at most 4 KiB. The memory comes zeroed from the kernel, so that what
//! is never touched never becomes resident.

use std::fmt;

use super::PAGE;

/// A page-aligned buffer of a fixed capacity that only [`AlignedBuffer::grow`] changes.
#[derive(Default)]
pub struct AlignedBuffer {
    storage: Vec<u8>,
    /// Where the first page boundary is in `storage`, whose memory never moves.
    offset: usize,
    capacity: usize,
}

impl AlignedBuffer {
    /// A buffer of `capacity` zero bytes.
    pub fn new(capacity: usize) -> Self {
        if capacity == 0 {
            return Self::default();
        }
        let storage = vec![0; capacity + PAGE];
        let offset = storage.as_ptr().addr().wrapping_neg() % PAGE;
        Self { storage, offset, capacity }
    }

    /// Bytes it holds.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Makes it hold at least `capacity` bytes. When that needs new memory, the old content is
    /// gone, and the old memory is freed first.
    pub fn grow(&mut self, capacity: usize) {
        if capacity > self.capacity {
            *self = Self::default();
            *self = Self::new(capacity);
        }
    }

    /// All of it.
    pub fn as_slice(&self) -> &[u8] {
        &self.storage[self.offset..self.offset + self.capacity]
    }

    /// All of it, to write to.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.storage[self.offset..self.offset + self.capacity]
    }
}

impl fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuffer").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

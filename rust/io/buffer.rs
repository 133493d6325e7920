//! A reusable byte buffer that begins on a page boundary.
//!
//! Direct writes need memory that is aligned like the file. An anonymous map is, needs no unsafe
//! code, is zeroed by the kernel (so that what is never touched never becomes resident), and goes
//! back to the kernel when it is dropped. An allocator would keep large blocks that threads freed,
//! and the resident set of a process that merges more than once would grow past what was planned.

use std::fmt;

use memmap2::MmapMut;

/// A page-aligned buffer of a fixed capacity that only [`AlignedBuffer::grow`] changes.
#[derive(Default)]
pub struct AlignedBuffer {
    /// None when it holds nothing: there is no empty map.
    map: Option<MmapMut>,
}

impl AlignedBuffer {
    /// A buffer of `capacity` zero bytes.
    ///
    /// # Panics
    ///
    /// When the system has no such memory.
    pub fn new(capacity: usize) -> Self {
        let map = || MmapMut::map_anon(capacity).expect("memory for a buffer");
        Self { map: (capacity > 0).then(map) }
    }

    /// Bytes it holds.
    pub fn capacity(&self) -> usize {
        self.map.as_ref().map_or(0, |map| map.len())
    }

    /// Makes it hold at least `capacity` bytes. When that needs new memory, the old content is
    /// gone, and the old memory is freed first.
    pub fn grow(&mut self, capacity: usize) {
        if capacity > self.capacity() {
            *self = Self::default();
            *self = Self::new(capacity);
        }
    }

    /// All of it.
    pub fn as_slice(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }

    /// All of it, to write to.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        self.map.as_deref_mut().unwrap_or_default()
    }
}

impl fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuffer").field("capacity", &self.capacity()).finish_non_exhaustive()
    }
}

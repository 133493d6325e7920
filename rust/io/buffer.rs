//! A reusable byte buffer that begins on a page boundary.
//!
//! Direct writes need memory that is aligned like the file, and are faster from huge pages:
//! the kernel pins each page that a write comes from, and the device takes each contiguous stretch
//! as one request. So the memory is an anonymous map with a wish for huge pages. It comes zeroed,
//! and what is never touched never becomes resident.

use std::fmt;

use memmap2::{Advice, MmapMut};

use crate::error::{Error, Result};

/// From this size on a buffer is made of huge pages, where the system has them.
const HUGE_PAGE: usize = 2 << 20;

/// A page-aligned buffer of a fixed capacity that only [`AlignedBuffer::grow`] changes.
#[derive(Default)]
pub struct AlignedBuffer {
    memory: Option<MmapMut>,
    capacity: usize,
}

impl AlignedBuffer {
    /// A buffer of `capacity` zero bytes.
    pub fn new(capacity: usize) -> Result<Self> {
        if capacity == 0 {
            return Ok(Self::default());
        }
        let memory = MmapMut::map_anon(Self::resident(capacity))
            .map_err(|error| Error::io("get memory for a buffer", error))?;
        if capacity >= HUGE_PAGE {
            // A wish: a system without huge pages is only slower.
            let _ = memory.advise(Advice::HugePage);
        }
        Ok(Self { memory: Some(memory), capacity })
    }

    /// Bytes that a buffer of `capacity` bytes may have resident.
    pub fn resident(capacity: usize) -> usize {
        let page = if capacity >= HUGE_PAGE { HUGE_PAGE } else { super::PAGE };
        capacity.next_multiple_of(page)
    }

    /// Bytes it holds.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Makes it hold at least `capacity` bytes. When that needs new memory, the old content is
    /// gone, and the old memory is freed first.
    pub fn grow(&mut self, capacity: usize) -> Result<()> {
        if capacity > self.capacity {
            *self = Self::default();
            *self = Self::new(capacity)?;
        }
        Ok(())
    }

    /// All of it.
    pub fn as_slice(&self) -> &[u8] {
        self.memory.as_ref().map_or(&[], |memory| &memory[..self.capacity])
    }

    /// All of it, to write to.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        let capacity = self.capacity;
        self.memory.as_mut().map_or(&mut [], |memory| &mut memory[..capacity])
    }
}

impl fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuffer").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

//! Words that all workers read and write, in memory that is given back when they are done with.
//!
//! The allocator keeps much of what is freed, for each thread apart, and a memory budget cannot
//! count on what it keeps. An anonymous map goes back to the system whole. It comes zeroed, and
//! what is never touched never becomes resident.

#![expect(unsafe_code, reason = "a map is bytes, and these are atomics")]

use std::sync::atomic::AtomicU32;

use memmap2::{MmapOptions, MmapRaw};

/// Zeros at first.
#[derive(Debug)]
pub(crate) struct SharedWords {
    memory: MmapRaw,
    count: usize,
}

impl SharedWords {
    /// So many words; none if the system has no memory for them.
    pub(crate) fn new(count: usize) -> Option<Self> {
        let bytes = (count * size_of::<AtomicU32>()).max(1);
        let memory = MmapOptions::new().len(bytes).map_anon().ok()?;
        Some(Self { memory: memory.into(), count })
    }

    /// The words.
    #[expect(clippy::cast_ptr_alignment, reason = "a map begins on a page boundary")]
    pub(crate) fn as_slice(&self) -> &[AtomicU32] {
        let start = self.memory.as_mut_ptr().cast::<AtomicU32>();
        // SAFETY: the map begins on a page boundary, has room for `count` words, and any bytes are
        // words. It lives as long as `self`, and nothing else ever points into it, so that there
        // is no access but by these atomics.
        unsafe { std::slice::from_raw_parts(start, self.count) }
    }
}

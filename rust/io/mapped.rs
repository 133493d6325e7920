//! Mapped reads: the page cache's own memory, used in place.
//!
//! A map makes every byte of a file look like memory, which is one copy and one buffer less than
//! reading it. Left to itself it has three faults for a merge; each has its remedy here.
//!
//! 1. *Page faults are slow, one at a time.* [`MappedFile::populate`] maps a whole piece with one
//!    `MADV_POPULATE_READ`, which also waits for the disk.
//! 2. *The resident set grows to the size of the file.* [`MappedFile::release`] drops the pages
//!    behind the cursor, and the ones around them: when the kernel maps a page it may also map
//!    the cached pages beside it, up to the 2 MiB that one page table covers. A release that
//!    stopped at the piece's own ends would leave some of them behind at every seam between
//!    pieces; for files with large folios that was a sixth of all that was read. A piece next door
//!    that another thread is using loses pages by this and gets them back from the page cache at
//!    its next touch, 64 KiB or more at a time: dropping pages of a shared file map drops no data.
//! 3. *A failure of the file is a signal, not an error.* Populating reports it as an error
//!    instead, and a positioned read of the same piece then says what it was.
//!
//! **What remains.** A file that is truncated after its piece was populated and before it was used
//! raises SIGBUS, and the process dies; one that is truncated within its last page reads as zeros,
//! which the comparison of sizes before the commit finds. Nothing that finishes can be wrong by
//! this, and no output was renamed into place. Whoever must live with files that are truncated
//! under them takes the positioned path.

#![expect(unsafe_code, reason = "a file map is memory that other processes can change")]

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use memmap2::{Advice, Mmap, MmapOptions, MmapRaw, UncheckedAdvice};

use super::open_read_only;
use crate::error::{Error, Result};
use crate::plan::InputFile;

/// A mapped piece may make so many bytes on either side of it resident: what one page table
/// covers.
pub const MAP_MARGIN: usize = 2 << 20;

/// A read-only map of a whole file.
#[derive(Debug)]
pub(super) struct MappedFile {
    map: Mmap,
}

impl MappedFile {
    /// Maps `size` bytes of `file`. None when this kernel or file system cannot do it, or cannot
    /// populate (before Linux 5.14): the caller then reads by position.
    pub(super) fn new(file: &File, size: u64) -> Option<Self> {
        if size == 0 {
            return None;
        }
        // SAFETY: the map is read-only and shared, and its bytes are only ever used as plain
        // numbers, for which every value is valid. A process that rewrites the file meanwhile can
        // make two reads differ, which no code here relies on; see above for truncation.
        let map = unsafe { MmapOptions::new().len(size as usize).map(file) }.ok()?;
        let mapped = Self { map };
        // The header was just read, so that its page costs nothing. But the kernel may map the
        // 2 MiB around it, which a model of many files must not have resident from the start.
        let populates = mapped.populate(0, 1);
        mapped.release(0, 1);
        populates.then_some(mapped)
    }

    /// Maps and reads the pages of `start..start + len`; false when that fails.
    pub(super) fn populate(&self, start: u64, len: usize) -> bool {
        self.map.advise_range(Advice::PopulateRead, start as usize, len).is_ok()
    }

    /// The bytes `start..start + len`.
    pub(super) fn slice(&self, start: u64, len: usize) -> &[u8] {
        &self.map[start as usize..start as usize + len]
    }

    /// Unmaps the pages of `start..start + len`.
    pub(super) fn release(&self, start: u64, len: usize) {
        // Page tables are aligned in memory, not in the file.
        let base = self.map.as_ptr().addr();
        let begin = base + start as usize;
        let first = (begin / MAP_MARGIN * MAP_MARGIN).max(base) - base;
        let end = (begin + len).next_multiple_of(MAP_MARGIN).min(base + self.map.len()) - base;
        // SAFETY: the map is shared and has a file behind it, so that a dropped page is read again
        // from that file with the same bytes; no memory is lost or changed.
        let released = unsafe {
            self.map.unchecked_advise_range(
                UncheckedAdvice::DontNeed,
                first,
                end.saturating_sub(first),
            )
        };
        debug_assert!(released.is_ok(), "releasing {first}..{end}: {released:?}");
    }
}

/// Beginnings and ends of the maps that are lent to others.
static LENT: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());

/// A map of a whole file, to be used by others as long as they like. The file is never written to.
#[derive(Debug)]
pub struct LentMap {
    map: MmapRaw,
    is_writable: bool,
}

impl LentMap {
    /// Maps `input`, which must still be the file whose header was read. What is written to a map
    /// that `is_writable` stays in memory.
    pub fn new(input: &InputFile, is_writable: bool) -> Result<Self> {
        let file = open_read_only(&input.path)?;
        input.check_same(&InputFile::of(&file, &input.path)?)?;
        let mut options = MmapOptions::new();
        options.len(input.size as usize);
        let map = if is_writable {
            // Memory is taken for pages that are written to alone, so none is set aside for all.
            options.no_reserve_swap();
            // SAFETY: as for a `MappedFile`: plain numbers. Nobody has a reference to them here.
            unsafe { options.map_copy(&file) }.map(MmapRaw::from)
        } else {
            // SAFETY: as for a `MappedFile`.
            unsafe { options.map(&file) }.map(MmapRaw::from)
        };
        let map = map.map_err(|error| Error::io("map the file", error).file(&input.path))?;
        let start = map.as_ptr().addr();
        lent(|maps| maps.insert(start, start + map.len()));
        Ok(Self { map, is_writable })
    }

    /// Where the bytes of the file are, how many, and whether they may be written to.
    pub fn memory(&self) -> (*mut u8, usize, bool) {
        (self.map.as_mut_ptr(), self.map.len(), self.is_writable)
    }
}

impl Drop for LentMap {
    fn drop(&mut self) {
        lent(|maps| maps.remove(&self.map.as_ptr().addr()));
    }
}

/// Whether some of `places`, given by addresses, lie in a map that is lent. To read there may wait for
/// a disk, or for a machine elsewhere.
pub fn are_mapped(mut places: impl Iterator<Item = Range<usize>>) -> bool {
    lent(|maps| {
        !maps.is_empty()
            && places.any(|place| {
                maps.range(..place.end).next_back().is_some_and(|(_, &end)| end > place.start)
            })
    })
}

fn lent<R>(act: impl FnOnce(&mut BTreeMap<usize, usize>) -> R) -> R {
    act(&mut LENT.lock().unwrap_or_else(PoisonError::into_inner))
}

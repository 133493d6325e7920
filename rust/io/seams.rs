//! The pages in which two pieces meet.
//!
//! A direct write takes whole pages, but pieces end where tensors and blocks end. The page that
//! two or more pieces share is collected here until its last byte arrives. When pieces are taken
//! up in file order by W workers, about 2·W such pages are open at a time; the worst order opens
//! one a piece.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use super::PAGE;
use crate::error::Result;

/// Partly filled pages, by page number.
#[derive(Debug, Default)]
pub(super) struct Seams {
    pages: Mutex<HashMap<u64, Seam>>,
}

#[derive(Debug)]
struct Seam {
    bytes: Box<[u8]>,
    filled: usize,
}

impl Default for Seam {
    fn default() -> Self {
        Self { bytes: vec![0; PAGE].into_boxed_slice(), filled: 0 }
    }
}

impl Seams {
    /// Puts `bytes` at `offset` into `page`. Gives the page back, padded with zeros, when `full`
    /// bytes of it have arrived.
    pub(super) fn put(
        &self,
        page: u64,
        offset: usize,
        bytes: &[u8],
        full: usize,
    ) -> Option<Box<[u8]>> {
        // A thread that died while it held the lock left at worst a count that `finish` finds.
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let seam = pages.entry(page).or_default();
        seam.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
        seam.filled += bytes.len();
        if seam.filled < full {
            return None;
        }
        pages.remove(&page).map(|seam| seam.bytes)
    }

    /// Calls `write` with each page that waits for more bytes, as it is now. No page can be completed
    /// meanwhile, so what is written so never replaces a whole one.
    pub(super) fn each(&self, mut write: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        let pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let mut pages: Vec<_> = pages.iter().collect();
        pages.sort_unstable_by_key(|(page, _)| **page);
        pages.into_iter().try_for_each(|(page, seam)| write(*page, &seam.bytes))
    }
}

//! Asks the CPU to fetch bytes that will soon be read.
//!
//! Formulas run chunk by chunk, so each input is read in steps of a page or so with others in
//! between. The hardware's own prefetcher starts anew at every page and would be late each time;
//! a hint one chunk ahead hides the memory's latency behind the arithmetic of the chunk in hand.

#![cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "the prefetch instruction takes a raw pointer")
)]

/// Bytes that one hint fetches.
const CACHE_LINE: usize = 64;

/// Hints that all of `bytes` will be read soon.
#[inline]
pub fn prefetch(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes.chunks(CACHE_LINE) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch is a hint that never faults, and the pointer is that of a slice.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (bytes, CACHE_LINE);
}

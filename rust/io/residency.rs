//! Asks the kernel how much of a file is in the page cache.
//!
//! Bytes that are there are best copied out of it; bytes that are not, and will be read only once,
//! are best read past it. `cachestat` (Linux 6.5) tells which, at the cost of a walk over the
//! cache's tree. No crate wraps it yet.

#![expect(unsafe_code, reason = "a system call that no crate wraps")]

use std::fs::File;
use std::os::fd::AsRawFd;

/// The number of `cachestat` on every architecture that numbers its calls by the common table.
const CACHESTAT: libc::c_long = 451;

#[repr(C)]
struct Range {
    start: u64,
    length: u64,
}

#[repr(C)]
#[derive(Default)]
struct Statistics {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Pages of `start..start + len` that are in the page cache; `None` if the kernel cannot say.
pub(super) fn cached_pages(file: &File, start: u64, len: u64) -> Option<u64> {
    let (range, mut statistics) = (Range { start, length: len }, Statistics::default());
    // SAFETY: both structures have the layout of the kernel's, and live through the call; a kernel
    // without the call returns an error and touches neither.
    let outcome = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), &range, &mut statistics, 0) };
    (outcome == 0).then_some(statistics.cached)
}

//! Begins to bring to the disk what was written to the page cache.
//!
//! Left alone, the kernel gathers gigabytes, and the flush at the end of a shard, which nothing can
//! interrupt, has to wait for all of them.

#![expect(unsafe_code, reason = "a system call that no crate wraps")]

use std::fs::File;
use std::os::fd::AsRawFd;

/// Begins to write back `start..start + len`; waits for nothing.
pub(super) fn begin_write_back(file: &File, start: u64, len: usize) {
    let flags = libc::SYNC_FILE_RANGE_WRITE;
    // SAFETY: the call takes no memory. Where it fails, the flush at the end does all of it.
    unsafe { libc::sync_file_range(file.as_raw_fd(), start as i64, len as i64, flags) };
}

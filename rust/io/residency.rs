//! Asks the kernel how much of a file is in the page cache.
//!
//! Bytes that are there are best copied out of it; bytes that are not, and will be read only once,
//! are best read past it. There are two ways to ask.
//!
//! - `cachestat` (Linux 6.5) counts pages, at the cost of a walk over the cache's tree. It answers
//!   only who owns the file or may write to it: what others have read is a secret. No crate wraps it
//!   yet.
//! - A read that must not wait (`RWF_NOWAIT`) fails where the byte is not there, for anyone who may
//!   read. But then the kernel begins to read its page, so that the next answer would be another.
//!   Each place is asked about once, therefore, and the answer kept; and which page of the place it
//!   is differs from run to run, since the pages that an earlier run asked about are there now.

#![expect(unsafe_code, reason = "a system call that no crate wraps")]

use std::collections::BTreeMap;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::IoSliceMut;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, PoisonError};

use rustix::io::{Errno, ReadWriteFlags, preadv2};

use super::PAGE;

/// How far the places lie apart at which the page cache is probed, and the bytes that are counted.
const PROBED_EVERY: u64 = 1 << 20;
const PROBED_BYTES: u64 = 64 << 10;
/// Places that are read from for one answer, at the most: each costs a request to the disk.
const MOST_READ: u64 = 8;

/// What is known of one file.
#[derive(Debug, Default)]
pub(super) struct Residency {
    /// Whether a place, by its number, was there when it was asked about first.
    found: Mutex<BTreeMap<u64, bool>>,
    random: RandomState,
}

impl Residency {
    /// Whether most of `start..start + len` is in the page cache. What cannot be known counts so.
    pub(super) fn is_cached(&self, file: &File, start: u64, len: u64) -> bool {
        most_by_count(file, start, len).or_else(|| self.most_by_reading(file, start, len))
            != Some(false)
    }

    /// Whether most of a few places are there, by reading a byte of each.
    fn most_by_reading(&self, file: &File, start: u64, len: u64) -> Option<bool> {
        if len == 0 {
            return None;
        }
        let places = start / PROBED_EVERY..=(start + len - 1) / PROBED_EVERY;
        let step = (places.end() - places.start() + 1).div_ceil(MOST_READ);
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut cached, mut asked) = (0, 0);
        for place in places.step_by(step as usize) {
            let is_there = if let Some(&known) = found.get(&place) {
                known
            } else {
                let first = start.max(place * PROBED_EVERY) / PAGE as u64;
                let last = (start + len).min((place + 1) * PROBED_EVERY).div_ceil(PAGE as u64);
                let page = first + self.random.hash_one(place) % (last - first);
                let is_there = is_there(file, start.max(page * PAGE as u64))?;
                found.insert(place, is_there);
                is_there
            };
            cached += u64::from(is_there);
            asked += 1;
        }
        Some(2 * cached >= asked)
    }
}

/// Whether byte `at` is in the page cache; `None` if the kernel or the file system cannot say.
fn is_there(file: &File, at: u64) -> Option<bool> {
    let mut byte = [0];
    loop {
        let mut bytes = [IoSliceMut::new(&mut byte)];
        return match preadv2(file, &mut bytes, at, ReadWriteFlags::NOWAIT) {
            Ok(_) => Some(true),
            Err(Errno::AGAIN) => Some(false),
            Err(Errno::INTR) => continue,
            Err(_) => None,
        };
    }
}

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

/// Whether half of the pages at a few places are there.
fn most_by_count(file: &File, start: u64, len: u64) -> Option<bool> {
    let probe = PROBED_BYTES.min(len);
    let (mut cached, mut pages) = (0, 0);
    for place in (0..=len - probe).step_by(PROBED_EVERY as usize) {
        cached += cached_pages(file, start + place, probe)?;
        pages += probe / PAGE as u64;
    }
    Some(cached >= pages / 2)
}

/// Pages of `start..start + len` that are in the page cache; `None` if the kernel does not say.
fn cached_pages(file: &File, start: u64, len: u64) -> Option<u64> {
    let (range, mut statistics) = (Range { start, length: len }, Statistics::default());
    // SAFETY: both structures have the layout of the kernel's, and live through the call; a kernel
    // without the call returns an error and touches neither.
    let outcome = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), &range, &mut statistics, 0) };
    (outcome == 0).then_some(statistics.cached)
}

//! An output file: its room on the disk, and whether the page cache can be bypassed.
//!
//! Room is reserved whole before anything is computed, so that a full disk shows in the first
//! second and not in the last hour; and blocks that are reserved together lie together.
//!
//! Direct writes halve the time of a large output on the machines measured. Which file systems
//! take them, and at which alignment, cannot be known from their names; one aligned write of the
//! header's first page finds out.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::Errno;

use super::write_back::begin_write_back;
use super::{AlignedBuffer, OutputFolder, PAGE, volume};
use crate::error::{Error, Result};
use crate::plan::InputFile;

/// A file that is written directly where that works.
#[derive(Debug)]
pub(super) struct OutputFile {
    file: File,
    path: PathBuf,
    direct: bool,
}

impl OutputFile {
    /// Creates the file `name` in `folder`, where it must not exist.
    pub(super) fn create(folder: &OutputFolder, name: &str) -> Result<Self> {
        Ok(Self { file: folder.create(name)?, path: folder.path_of(name), direct: false })
    }

    /// Opens the file `name` that an earlier run left in `folder`, if there is one.
    pub(super) fn reopen(folder: &OutputFolder, name: &str) -> Result<Option<Self>> {
        let file = folder.reopen(name)?;
        Ok(file.map(|file| Self { file, path: folder.path_of(name), direct: false }))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn is_direct(&self) -> bool {
        self.direct
    }

    /// Gives the file its size, with blocks behind it where the file system can reserve them.
    pub(super) fn reserve(&self, size: u64) -> Result<()> {
        // Asked first, for a file system may take every free block before it finds them too few,
        // and everybody else on that disk would fail meanwhile.
        let missing = size.saturating_sub(self.reserved());
        if self.free_space().is_some_and(|free| free < missing) {
            let error = Errno::NOSPC.into();
            return Err(self.failed("reserve space for the shard", error, size));
        }
        let reserved = match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, size) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => self.file.set_len(size),
            other => other.map_err(io::Error::from),
        };
        reserved.map_err(|error| self.failed("reserve space for the shard", error, size))
    }

    /// From here on past the page cache, if writing the first page as it is shows that it works.
    pub(super) fn probe_direct(&mut self, scratch: &mut AlignedBuffer) {
        let page = &mut scratch.as_mut_slice()[..PAGE];
        // A file that an earlier run left has something there; a new one need not be readable.
        let _ = self.file.read_at(page, 0);
        self.direct = self.set_direct(true) && self.file.write_all_at(page, 0).is_ok();
        if !self.direct {
            self.set_direct(false);
        }
    }

    /// Writes `bytes` at `start`. A direct file takes whole pages in aligned memory only.
    pub(super) fn write(&self, bytes: &[u8], start: u64) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let left = &bytes[done..];
            match self.file.write_at(left, start + done as u64) {
                Ok(count) if count == left.len() => break,
                Ok(count) if self.usable(count) == 0 => {
                    let error = io::ErrorKind::WriteZero.into();
                    return Err(self.failed("write", error, left.len() as u64));
                }
                Ok(count) => done += self.usable(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed("write", error, left.len() as u64)),
            }
        }
        if !self.direct {
            begin_write_back(&self.file, start, bytes.len());
        }
        Ok(())
    }

    /// Waits until what was written is on the disk.
    pub(super) fn flush(&self) -> Result<()> {
        self.file.sync_data().map_err(|error| self.failed("flush the shard", error, 0))
    }

    /// Bytes that it has on the disk already.
    fn reserved(&self) -> u64 {
        self.file.metadata().map_or(0, |state| state.blocks() * 512)
    }

    /// Cuts the file to `size` and flushes it to the disk.
    pub(super) fn finish(&self, size: u64) -> Result<()> {
        self.file
            .set_len(size)
            .and_then(|()| self.file.sync_all())
            .map_err(|error| self.failed("flush the shard", error, size))
    }

    /// Which file it is, and its size and time of modification now.
    pub(super) fn state(&self) -> Result<InputFile> {
        InputFile::of(&self.file, &self.path)
    }

    /// How much of a write that was cut short counts: a direct one goes on at a page boundary.
    fn usable(&self, count: usize) -> usize {
        if self.direct { count / PAGE * PAGE } else { count }
    }

    /// Sets the flag on the open file: to open with it would leave an empty file behind where it
    /// is refused.
    fn set_direct(&self, on: bool) -> bool {
        rustix::fs::fcntl_getfl(&self.file)
            .and_then(|mut flags| {
                flags.set(OFlags::DIRECT, on);
                rustix::fs::fcntl_setfl(&self.file, flags)
            })
            .is_ok()
    }

    /// Bytes free on the disk, if that can be asked.
    fn free_space(&self) -> Option<u64> {
        volume::free_space(&self.file).ok()
    }

    /// An error of the operating system, with what a user can do about the usual ones.
    fn failed(&self, doing: &str, error: io::Error, needed: u64) -> Error {
        let kind = error.kind();
        let failure = Error::io(doing, error).file(&self.path);
        match kind {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => failure
                .expected(format_args!("room for {needed} bytes"))
                .found(format_args!("{} bytes free", self.free_space().unwrap_or(0)))
                .advice("free some space or write to another disk"),
            io::ErrorKind::FileTooLarge => failure
                .expected(format_args!("room for {needed} bytes in one file"))
                .advice("choose a smaller shard size"),
            _ => failure,
        }
    }
}

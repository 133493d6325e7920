//! The directory that output files are created in.
//!
//! It is held open, and files are created through that and not by its path: should the path be given
//! to another directory meanwhile, everything still goes into one.

use std::fs::File;
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, openat};

use super::volume;
use crate::error::{Error, Result};

/// An open directory.
#[derive(Debug)]
pub struct OutputFolder {
    folder: OwnedFd,
    path: PathBuf,
}

impl OutputFolder {
    /// Opens the directory at `path`.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_as(path, path)
    }

    /// The directory that this process has open as `descriptor`; `path` is what messages call it.
    pub fn of_descriptor(descriptor: RawFd, path: &Path) -> Result<Self> {
        // By the name that the kernel has for it, which needs no `unsafe`.
        Self::open_as(Path::new(&format!("/proc/self/fd/{descriptor}")), path)
    }

    fn open_as(place: &Path, path: &Path) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = openat(CWD, place, flags, Mode::empty())
            .map_err(|error| Error::io("open the directory", error.into()).file(path))?;
        Ok(Self { folder, path: path.to_owned() })
    }

    /// The path of a file in it, for messages.
    pub fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Whether it lies on a network or FUSE mount.
    pub fn is_remote(&self) -> bool {
        volume::is_remote(&self.folder)
    }

    /// Creates a file, which must not exist.
    pub(super) fn create(&self, name: &str) -> Result<File> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        openat(&self.folder, name, flags, Mode::from_raw_mode(0o666))
            .map(File::from)
            .map_err(|error| Error::io("create the file", error.into()).file(self.path_of(name)))
    }
}

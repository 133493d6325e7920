//! The directory that output files are created in.
//!
//! It is held open, and files are created through that and not by its path: should the path be given
//! to another directory meanwhile, everything still goes into one.

use std::fs::File;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, openat};
use rustix::io::Errno;

use super::volume;
use crate::error::{Error, ErrorKind, Result};

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

    /// Opens a file that an earlier run left, to read it and to write to it; nothing if there is none.
    pub(super) fn reopen(&self, name: &str) -> Result<Option<File>> {
        self.open_own(name, OFlags::RDWR)
    }

    /// The same, to read it.
    pub fn open_to_read(&self, name: &str) -> Result<Option<File>> {
        self.open_own(name, OFlags::RDONLY)
    }

    /// Removes a file, if it is there.
    pub fn remove(&self, name: &str) -> Result<()> {
        match rustix::fs::unlinkat(&self.folder, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(Error::io("remove the file", error.into()).file(self.path_of(name))),
        }
    }

    /// Gives a file another name, also where there is one of that name.
    pub fn rename(&self, name: &str, to: &str) -> Result<()> {
        rustix::fs::renameat(&self.folder, name, &self.folder, to)
            .map_err(|error| Error::io("rename the file", error.into()).file(self.path_of(name)))?;
        self.flush()
    }

    /// Waits until the names of its files are on the disk.
    pub(super) fn flush(&self) -> Result<()> {
        rustix::fs::fsync(&self.folder)
            .map_err(|error| Error::io("flush the directory", error.into()).file(&self.path))
    }

    /// Opens a file that can only be a run's own: no link, and no second name of another one.
    fn open_own(&self, name: &str, flags: OFlags) -> Result<Option<File>> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let failed = |doing: &str, error| Error::io(doing, error).file(self.path_of(name));
        match openat(&self.folder, name, flags, Mode::empty()).map(File::from) {
            Ok(file) => {
                let state =
                    file.metadata().map_err(|error| failed("read the file's state", error))?;
                if state.is_file() && state.nlink() == 1 {
                    return Ok(Some(file));
                }
            }
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP) => (), // a link
            Err(error) => return Err(failed("open the file", error.into())),
        }
        Err(Error::new(ErrorKind::Output, "this is no file that an interrupted run left here")
            .file(self.path_of(name))
            .advice("move it away, or start over with `--fresh`"))
    }
}

//! Which file is which, and whether it is still the same.
//!
//! A merge reads its inputs for minutes after it trusted their headers. A file that is rewritten
//! meanwhile gives an output that is a mix of two models and looks sound. So size, modification
//! time and inode are taken from the file that was opened, never from a path, and are compared
//! when the file is opened again and before the output is committed. The device number is left
//! out: it changes when a network mount comes back.

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::plan::InputFile;

impl InputFile {
    /// The file at `path`, links followed, as it is now.
    pub fn stat(path: &Path) -> Result<Self> {
        let metadata = fs::metadata(path)
            .map_err(|error| Error::io("read the file's state", error).file(path))?;
        Ok(Self::from_metadata(path, &metadata))
    }

    /// The open `file`; `path` is what it was opened as.
    pub fn of(file: &File, path: &Path) -> Result<Self> {
        let metadata = file
            .metadata()
            .map_err(|error| Error::io("read the file's state", error).file(path))?;
        Ok(Self::from_metadata(path, &metadata))
    }

    fn from_metadata(path: &Path, metadata: &Metadata) -> Self {
        let seconds = metadata.mtime().saturating_mul(1_000_000_000);
        Self {
            path: path.to_owned(),
            size: metadata.size(),
            modified_ns: seconds.saturating_add(metadata.mtime_nsec()),
            device: metadata.dev(),
            inode: metadata.ino(),
            remote: None,
        }
    }

    /// The file where it lies now, by its label, if it was not here; itself if it is, or still is not.
    pub(crate) fn place(&self, places: &HashMap<String, PathBuf>) -> Result<Self> {
        let path = self.remote.as_ref().and_then(|remote| places.get(&remote.label));
        let Some(path) = path else { return Ok(self.clone()) };
        let here = Self::stat(path)?;
        if here.size == self.size {
            return Ok(here);
        }
        Err(changed(path, "the file is another than the one that was planned with")
            .expected(format_args!("{} bytes", self.size))
            .found(format_args!("{} bytes", here.size)))
    }

    /// Fails with [`ErrorKind::Changed`] when `now` is not the same file in the same state.
    pub(crate) fn check_same(&self, now: &Self) -> Result<()> {
        let differences = self.differences(now);
        if differences.is_empty() {
            return Ok(());
        }
        let list = |pick: fn(&(String, String)) -> &str| {
            differences.iter().map(pick).collect::<Vec<_>>().join(", ")
        };
        Err(changed(&self.path, "the file changed after it was first read")
            .expected(list(|(before, _)| before))
            .found(list(|(_, after)| after)))
    }

    /// What differs, as it was and as it is.
    fn differences(&self, now: &Self) -> Vec<(String, String)> {
        let time = |file: &Self| format!("modified at {} ns", file.modified_ns);
        let size = |file: &Self| format!("{} bytes", file.size);
        let inode = |file: &Self| format!("inode {}", file.inode);
        let mut differences = Vec::new();
        if self.size != now.size {
            differences.push((size(self), size(now)));
        }
        if self.modified_ns != now.modified_ns {
            differences.push((time(self), time(now)));
        }
        if self.inode != now.inode {
            differences.push((inode(self), inode(now)));
        }
        differences
    }
}

/// Fails with [`ErrorKind::Changed`] at the first of `files` that is no longer what it was. One that
/// is not here was not read.
pub fn check_unchanged(files: &[InputFile]) -> Result<()> {
    files.iter().filter(|file| file.remote.is_none()).try_for_each(|file| {
        match InputFile::stat(&file.path) {
            Ok(now) => file.check_same(&now),
            Err(error) if error.kind() == ErrorKind::Io(io::ErrorKind::NotFound) => {
                Err(changed(&file.path, "the file is gone since it was first read"))
            }
            Err(error) => Err(error),
        }
    })
}

/// Whether both are one file, by device and inode.
pub(super) fn same_file(a: &File, b: &File) -> bool {
    let identity = |file: &File| file.metadata().map(|of| (of.dev(), of.ino())).ok();
    identity(a).is_some_and(|a| Some(a) == identity(b))
}

fn changed(path: &Path, message: &str) -> Error {
    Error::new(ErrorKind::Changed, message)
        .file(path)
        .advice("start again once nothing writes to the inputs")
}

//! The table of tensors of one file, whatever its format: names, types, shapes, and where they lie.
//!
//! The format is told by the first bytes, not by the file's name.

use std::fs::File;
use std::path::Path;

use super::header::Header;
use super::{Absent, DOWNLOAD_AGAIN, TensorInfo, conversion, torch_file};
use crate::error::{Error, ErrorKind, Result};
use crate::io::read_exact_at;

/// How an archive of zip begins.
const ZIP: &[u8] = b"PK\x03\x04";
/// How the oldest files of torch begin: a pickle of version 2, of a number that says so.
const OLD_TORCH: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
/// What to do about a file that is not here and cannot be planned with.
const DOWNLOAD_FIRST: &str =
    "download the model first (of the Hub, by `hf download NAME`), and name its folder";
/// What is in an archive of tar, and where.
const TAR: (usize, &[u8]) = (257, b"ustar");

/// The tensors of a file.
#[derive(Debug)]
pub(super) struct Table {
    /// The tensors, by offset. They may share bytes.
    pub(super) tensors: Vec<TensorInfo>,
    /// What was passed over, for people to read.
    pub(super) notes: Vec<String>,
}

impl Table {
    /// Reads the table of `file`, which is at `path`, has `size` bytes and is number `index` of its
    /// checkpoint.
    pub(super) fn read(file: &File, path: &Path, size: u64, index: usize) -> Result<Self> {
        let mut start = vec![0; size.min((TAR.0 + TAR.1.len()) as u64) as usize];
        read_exact_at(file, 0, &mut start).map_err(|error| error.file(path))?;
        let table = if start.starts_with(ZIP) {
            torch_file::read(file, path, size, index)
        } else if start.starts_with(OLD_TORCH) {
            let message = "the file is in the format of torch before 1.6";
            Err(Error::new(ErrorKind::Unsupported, message).advice(conversion::torch_file(path)))
        } else if start.get(TAR.0..) == Some(TAR.1) {
            let message = "the file is a tar archive, as torch wrote before 0.2";
            Err(Error::new(ErrorKind::Unsupported, message).advice(conversion::TAR))
        } else {
            let header = Header::read(file, path, size, index);
            header.map(|header| Self { tensors: header.tensors, notes: Vec::new() })
        };
        table.map_err(|error| error.file(path).or_else_advice(DOWNLOAD_AGAIN))
    }

    /// Reads the table of a file that is not here.
    pub(super) fn of_absent(file: &Absent, path: &Path, index: usize) -> Result<Self> {
        let Absent { start, size, .. } = file;
        if let (true, Some(rest)) = (start.starts_with(ZIP), &file.rest) {
            let read = torch_file::read(&**rest, path, *size, index);
            return read.map_err(|error| match error.kind() {
                ErrorKind::Unsupported => error.file(path).advice(DOWNLOAD_FIRST),
                _ => error.file(path).or_else_advice(DOWNLOAD_AGAIN),
            });
        }
        if start.starts_with(ZIP) || start.starts_with(OLD_TORCH) {
            let message = "the tensors of such a file of torch are not told by ranges of it";
            return Err(Error::new(ErrorKind::Unsupported, message)
                .file(path)
                .advice(DOWNLOAD_FIRST));
        }
        let header = Header::of_start(start, path, *size, index)?;
        Ok(Self { tensors: header.tensors, notes: Vec::new() })
    }
}

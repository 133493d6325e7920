//! A file of records, one a line, each with a check of its own: what a run tells the next one.
//!
//! A record is flushed before the next one is begun. So a death leaves at most one record that is not
//! whole, and it is the last: that one is cut off. A record that is not whole before one that is was
//! damaged later, and then nothing in the file can be trusted.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::OutputFolder;
use crate::error::{Error, Result};

/// Letters of a check: those of a BLAKE3 hash, of which so many tell damage.
const CHECK: usize = 16;
/// Bytes of a line at the most. Records are far shorter; a file by someone else need not be.
const LONGEST_LINE: u64 = 16 << 20;
/// Bytes of a file at the most: no plan has so many tensors.
const LARGEST_FILE: u64 = 1 << 30;

/// A file that records are appended to.
#[derive(Debug)]
pub struct JournalFile {
    file: File,
    path: PathBuf,
    /// Where the last record ends.
    end: u64,
}

impl JournalFile {
    /// Creates the file `name` in `folder`, with its first record.
    pub fn create(folder: &OutputFolder, name: &str, first: &str) -> Result<Self> {
        let mut created = Self { file: folder.create(name)?, path: folder.path_of(name), end: 0 };
        created.append(first)?;
        folder.flush()?;
        Ok(created)
    }

    /// Opens the file `name` in `folder` and calls `take` with each record. What a death left behind
    /// the last whole record is cut off. Nothing where there is no file, or no whole record in it.
    pub fn open(
        folder: &OutputFolder,
        name: &str,
        mut take: impl FnMut(&str) -> Result<()>,
    ) -> Result<Option<Self>> {
        let path = folder.path_of(name);
        let Some(file) = folder.reopen(name)? else { return Ok(None) };
        let mut opened = Self { file, path, end: 0 };
        let size = opened.file.metadata().map_err(|error| opened.failed("read", error))?.len();
        if size > LARGEST_FILE {
            return Err(damaged().file(&opened.path).found(format_args!("{size} bytes")));
        }
        opened.end = opened.read(&mut take)?;
        if opened.end < size {
            let cut = opened.file.set_len(opened.end).and_then(|()| opened.file.sync_data());
            cut.map_err(|error| opened.failed("cut off the end", error))?;
        }
        Ok((opened.end > 0).then_some(opened))
    }

    /// Writes a record, and waits until it is on the disk.
    pub fn append(&mut self, record: &str) -> Result<()> {
        let line = format!("{} {record}\n", check(record));
        let written = self.file.write_all_at(line.as_bytes(), self.end);
        if let Err(error) = written.and_then(|()| self.file.sync_data()) {
            // Nothing that is not whole may come before another record.
            let _ = self.file.set_len(self.end);
            return Err(self.failed("write", error));
        }
        self.end += line.len() as u64;
        Ok(())
    }

    /// Calls `take` with each record; where the last whole one ends.
    fn read(&self, take: &mut dyn FnMut(&str) -> Result<()>) -> Result<u64> {
        let mut lines = BufReader::new(&self.file);
        let (mut line, mut start, mut whole, mut number) = (Vec::new(), 0, 0, 0);
        loop {
            line.clear();
            let read = (&mut lines).take(LONGEST_LINE).read_until(b'\n', &mut line);
            let length = read.map_err(|error| self.failed("read", error))? as u64;
            if length == 0 {
                return Ok(whole);
            }
            number += 1;
            if let Some(record) = record(&line) {
                if whole < start {
                    let before = format_args!("line {} or one before it", number - 1);
                    return Err(damaged().file(&self.path).found(before));
                }
                take(record).map_err(|error| error.file(&self.path))?;
                whole = start + length;
            }
            start += length;
        }
    }

    fn failed(&self, doing: &str, error: io::Error) -> Error {
        Error::io(&format!("{doing} what was finished"), error).file(&self.path)
    }
}

/// The record in a line, if it is whole.
fn record(line: &[u8]) -> Option<&str> {
    let line = std::str::from_utf8(line.strip_suffix(b"\n")?).ok()?;
    let (found, record) = line.split_at_checked(CHECK)?;
    let record = record.strip_prefix(' ')?;
    (found == check(record)).then_some(record)
}

fn check(record: &str) -> String {
    blake3::hash(record.as_bytes()).to_hex()[..CHECK].to_owned()
}

#[cold]
pub(crate) fn damaged() -> Error {
    Error::new(
        crate::error::ErrorKind::Output,
        "what an interrupted run wrote down of its work is damaged",
    )
    .advice("start over with `--fresh`, or remove what is there with `oxmerge clean`")
}

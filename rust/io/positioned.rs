//! Positioned reads: no shared cursor, so any number of threads read one file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::PAGE;
use crate::error::{Error, ErrorKind, Result};

/// Fills `bytes` from `start` on. A file that ends before is [`ErrorKind::Changed`]: callers ask
/// only for what the file had when its size was taken.
pub(crate) fn read_exact_at(file: &File, start: u64, bytes: &mut [u8]) -> Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], start + done as u64) {
            Ok(0) => return Err(shrank(start, bytes.len(), done)),
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io("read", error)),
        }
    }
    Ok(())
}

/// Fills whole pages of memory from the page boundary `start` on; at least `wanted` bytes have to
/// come, since the last page may reach past the end of the file.
///
/// A direct read that was cut short goes on from the last whole page it filled.
pub(crate) fn read_pages_at(
    file: &File,
    start: u64,
    pages: &mut [u8],
    wanted: usize,
) -> Result<()> {
    let mut done = 0;
    while done < wanted {
        match file.read_at(&mut pages[done..], start + done as u64) {
            Ok(count) if done + count >= wanted => break,
            Ok(count) if count < PAGE => return Err(shrank(start, wanted, done + count)),
            Ok(count) => done += count / PAGE * PAGE,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io("read", error)),
        }
    }
    Ok(())
}

fn shrank(start: u64, len: usize, done: usize) -> Error {
    Error::new(ErrorKind::Changed, "the file shrank while it was read")
        .expected(format_args!("{len} bytes from byte {start}"))
        .found(format_args!("{done}"))
        .advice("start again once nothing writes to the inputs")
}

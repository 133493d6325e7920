//! The directory of a zip archive, and where the bytes of an entry lie in the file.
//!
//! Torch stores tensors in an archive without compression, so that an entry is a range of the file.
//! The directory at the end says what entries there are; each is preceded by a header of its own,
//! whose length only that header tells. Offsets and sizes above 4 GiB are in the fields of zip64.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Place;
use std::sync::OnceLock;

use super::ReadAt;
use super::bytes::Bytes;
use super::header::MAX_HEADER;
use crate::error::{Error, ErrorKind, Result};

/// The record at the end of an archive, and the longest comment behind it.
const END: [u8; 4] = *b"PK\x05\x06";
const END_BYTES: usize = 22;
const LONGEST_COMMENT: usize = 0xffff;
/// Where the record of zip64 is, which is said right before the end.
const LOCATOR: [u8; 4] = *b"PK\x06\x07";
const LOCATOR_BYTES: usize = 20;
const END_64: [u8; 4] = *b"PK\x06\x06";
const END_64_BYTES: usize = 56;
/// An entry in the directory, and the header before its bytes.
const ENTRY: [u8; 4] = *b"PK\x01\x02";
const LOCAL: [u8; 4] = *b"PK\x03\x04";
const LOCAL_BYTES: usize = 30;
/// The extra field of an entry that has its numbers of 64 bits, which stand for these of 32.
const EXTRA_64: u16 = 1;
const FULL: u64 = 0xffff_ffff;

/// Torch fills a header up by a field of its own, so that the bytes begin at a multiple of this.
const FILL_BYTES: usize = 4;
const ALIGNMENT: u64 = 64;
/// What follows the bytes of an entry that is flagged so: its checksum and sizes, of 32 or 64 bits.
const DESCRIPTOR_BYTES: u64 = 16;
const DESCRIPTOR_64_BYTES: u64 = 24;

const IS_ENCRYPTED: u16 = 1;
const HAS_DESCRIPTOR: u16 = 8;
const STORED: u16 = 0;

/// The directory of an archive as it is in the file.
#[derive(Debug)]
pub(super) struct Directory {
    bytes: Vec<u8>,
    /// Where in the file it begins, which is where entries end.
    start: u64,
    count: u64,
    /// Where the headers of entries are, in order, and the directory.
    headers: OnceLock<Vec<u64>>,
}

/// What the directory says of an entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry<'a> {
    name: &'a [u8],
    flags: u16,
    method: u16,
    stored_size: u64,
    /// Bytes of its content.
    pub(super) size: u64,
    /// Where the header before its bytes is.
    header: u64,
}

impl Directory {
    /// Reads the directory of `file`, which has `size` bytes.
    pub(super) fn read(file: &dyn ReadAt, size: u64) -> Result<Self> {
        let length = size.min((END_BYTES + LONGEST_COMMENT + LOCATOR_BYTES) as u64);
        let mut tail = vec![0; length as usize];
        file.read_at(size - length, &mut tail)?;
        let at = (0..=tail.len().saturating_sub(END_BYTES)).rev().find(|&at| is_end(&tail[at..]));
        let at = at.ok_or_else(|| {
            Error::checkpoint("the zip archive has no directory at its end")
                .advice("it looks like a truncated download: download it again")
        })?;
        let end_64 = at.checked_sub(LOCATOR_BYTES).and_then(|at| end_64(&tail[at..]));
        let (end, (count, bytes, start)) = if let Some(place) = end_64 {
            let mut record = [0; END_64_BYTES];
            if place.checked_add(record.len() as u64).is_none_or(|end| end > size) {
                return Err(wrong("the zip archive's end lies past the end of the file"));
            }
            file.read_at(place, &mut record)?;
            let numbers = numbers_64(&record);
            (place, numbers.ok_or_else(|| wrong("the zip archive's zip64 end is damaged"))?)
        } else {
            let numbers = numbers(&tail[at..]);
            let end = size - length + at as u64;
            (end, numbers.ok_or_else(|| wrong("the zip archive is a part of several"))?)
        };
        if start.checked_add(bytes).is_none_or(|directory_end| directory_end > end) {
            return Err(wrong("the zip archive's directory does not lie before its end")
                .expected(format_args!("at most byte {end}"))
                .found(format_args!("{bytes} bytes from byte {start}")));
        }
        if bytes > MAX_HEADER {
            return Err(wrong("the zip archive's directory is too long")
                .expected(format_args!("at most {MAX_HEADER} bytes"))
                .found(bytes));
        }
        let mut text = vec![0; bytes as usize];
        file.read_at(start, &mut text)?;
        Ok(Self { bytes: text, start, count, headers: OnceLock::new() })
    }

    /// The entries by name.
    pub(super) fn entries(&self) -> Result<HashMap<&[u8], Entry<'_>>> {
        let mut entries = HashMap::new();
        let mut rest = Bytes(&self.bytes);
        while !rest.0.is_empty() {
            let entry =
                entry(&mut rest).ok_or_else(|| wrong("the zip archive's directory is damaged"))?;
            match entries.entry(entry.name) {
                Place::Vacant(place) => place.insert(entry),
                Place::Occupied(_) => {
                    return Err(wrong("the zip archive has two entries of one name")
                        .found(format_args!("`{}`", entry.name.escape_ascii())));
                }
            };
        }
        if entries.len() as u64 != self.count {
            return Err(wrong("the zip archive has not as many entries as it says")
                .expected(self.count)
                .found(entries.len()));
        }
        Ok(entries)
    }

    /// Where the bytes of `entry` begin in `file`.
    pub(super) fn locate(&self, file: &dyn ReadAt, entry: &Entry<'_>) -> Result<u64> {
        let name = entry.name.escape_ascii();
        if entry.flags & IS_ENCRYPTED != 0 || entry.method != STORED {
            let what = if entry.method == STORED { "encrypted" } else { "compressed" };
            let message = format!("the entry `{name}` of the zip archive is {what}");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        if entry.stored_size != entry.size {
            let message = format!("the entry `{name}` of the zip archive has two sizes");
            return Err(wrong(&message).expected(entry.size).found(entry.stored_size));
        }
        if let (true, Some(start)) = (file.is_far(), self.place_as_written(entry)) {
            return Ok(start);
        }
        let mut header = vec![0; LOCAL_BYTES + entry.name.len()];
        let past =
            || wrong(&format!("the entry `{name}` lies past the entries of the zip archive"));
        let head = entry.header.checked_add(header.len() as u64).filter(|&end| end <= self.start);
        let head = head.ok_or_else(past)?;
        file.read_at(entry.header, &mut header)?;
        let extra = extra_of(&header, entry.name).ok_or_else(|| {
            wrong(&format!("the entry `{name}` of the zip archive has another header"))
        })?;
        let start = head + u64::from(extra);
        let end = start.checked_add(entry.size).filter(|&end| end <= self.start);
        end.map(|_| start).ok_or_else(past)
    }

    /// Where the bytes of `entry` begin if torch wrote the archive, which saves a look at its header.
    /// Torch fills a header up so that they begin at a multiple of 64, and the next header follows.
    /// Nothing if the next one is not there: then another program wrote it.
    fn place_as_written(&self, entry: &Entry<'_>) -> Option<u64> {
        let headers = self.headers.get_or_init(|| {
            let entries = self.entries().unwrap_or_default();
            let mut headers: Vec<u64> = entries.values().map(|entry| entry.header).collect();
            headers.push(self.start);
            headers.sort_unstable();
            headers
        });
        let (long_size, long_header) = (entry.size >= FULL, entry.header >= FULL);
        let is_long = long_size || long_header;
        // The field of zip64 has both sizes, where one is long, and the header's place, where that is.
        let field = 4 * u64::from(is_long) + 16 * u64::from(long_size) + 8 * u64::from(long_header);
        let fixed = (LOCAL_BYTES + entry.name.len() + FILL_BYTES) as u64 + field;
        let start = entry.header.checked_add(fixed)?.checked_next_multiple_of(ALIGNMENT)?;
        let descriptor = match (entry.flags & HAS_DESCRIPTOR != 0, is_long) {
            (false, _) => 0,
            (true, false) => DESCRIPTOR_BYTES,
            (true, true) => DESCRIPTOR_64_BYTES,
        };
        let end = start.checked_add(entry.size)?.checked_add(descriptor)?;
        let next = headers.get(headers.partition_point(|&at| at <= entry.header))?;
        (end == *next).then_some(start)
    }
}

/// Whether the end of an archive begins here: its comment reaches to the end of the file.
fn is_end(tail: &[u8]) -> bool {
    let mut rest = Bytes(tail);
    rest.take(4) == Some(&END)
        && rest.take(16).is_some()
        && rest.u16().is_some_and(|comment| usize::from(comment) == rest.0.len())
}

/// Entries, bytes and start of the directory; `None` if it is on several disks.
fn numbers(end: &[u8]) -> Option<(u64, u64, u64)> {
    let mut rest = Bytes(end);
    rest.take(4)?;
    let (disk, first, here, count) = (rest.u16()?, rest.u16()?, rest.u16()?, rest.u16()?);
    let (bytes, start) = (rest.u32()?, rest.u32()?);
    let is_one = disk == 0 && first == 0 && here == count;
    is_one.then_some((count.into(), bytes.into(), start.into()))
}

/// Where the end of zip64 is, if this says so.
fn end_64(locator: &[u8]) -> Option<u64> {
    let mut rest = Bytes(locator);
    (rest.take(4)? == LOCATOR).then_some(())?;
    rest.u32()?;
    rest.u64()
}

/// As [`numbers`], of zip64.
fn numbers_64(record: &[u8]) -> Option<(u64, u64, u64)> {
    let mut rest = Bytes(record);
    (rest.take(4)? == END_64).then_some(())?;
    rest.take(12)?;
    let (disk, first, here, count) = (rest.u32()?, rest.u32()?, rest.u64()?, rest.u64()?);
    let (bytes, start) = (rest.u64()?, rest.u64()?);
    (disk == 0 && first == 0 && here == count).then_some((count, bytes, start))
}

/// The next entry of a directory.
fn entry<'a>(rest: &mut Bytes<'a>) -> Option<Entry<'a>> {
    (rest.take(4)? == ENTRY).then_some(())?;
    rest.take(4)?;
    let (flags, method) = (rest.u16()?, rest.u16()?);
    rest.take(8)?;
    let (stored, size) = (rest.u32()?, rest.u32()?);
    let lengths = [rest.u16()?, rest.u16()?, rest.u16()?].map(usize::from);
    rest.take(8)?;
    let header = rest.u32()?;
    let [name, extra, comment] = lengths;
    let (name, extra) = (rest.take(name)?, rest.take(extra)?);
    rest.take(comment)?;
    let mut wide = Bytes(extra_64(extra));
    let mut number = |narrow: u32| match u64::from(narrow) {
        FULL => wide.u64(),
        narrow => Some(narrow),
    };
    // The extra field has, in this order, those numbers that did not fit.
    let (size, stored_size, header) = (number(size)?, number(stored)?, number(header)?);
    Some(Entry { name, flags, method, stored_size, size, header })
}

/// The numbers of 64 bits among the extra fields of an entry.
fn extra_64(fields: &[u8]) -> &[u8] {
    let mut rest = Bytes(fields);
    while let (Some(kind), Some(length)) = (rest.u16(), rest.u16()) {
        match rest.take(length.into()) {
            Some(field) if kind == EXTRA_64 => return field,
            Some(_) => {}
            None => break,
        }
    }
    &[]
}

/// Bytes of the extra fields behind a header, if that is the header of `name`.
fn extra_of(header: &[u8], name: &[u8]) -> Option<u16> {
    let mut rest = Bytes(header);
    (rest.take(4)? == LOCAL).then_some(())?;
    rest.take(22)?;
    let (length, extra) = (rest.u16()?, rest.u16()?);
    (usize::from(length) == name.len() && rest.0 == name).then_some(extra)
}

#[cold]
fn wrong(message: &str) -> Error {
    Error::checkpoint(message)
}

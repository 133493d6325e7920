//! Writing one output shard, from all workers at once.
//!
//! Every byte's place is known before the first is computed, so pieces are written the moment
//! they are done, wherever they go. With direct writes the disk takes whole pages at page-aligned
//! places from page-aligned memory. Hence three rules:
//!
//! 1. The header is padded so that the data begin on a page boundary.
//! 2. The caller lays a piece into its buffer at [`ShardWriter::buffer_offset`], so that the whole
//!    pages inside it are aligned in memory as they are in the file and go out without a copy.
//! 3. The broken pages at a piece's ends wait in `Seams` for the neighbours that complete them.
//!    The file's last page is written padded, and the padding is cut off at the end.
//!
//! Where direct writes are refused, pieces are written as they are, through the page cache.

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::direct::OutputFile;
use super::seams::Seams;
use super::{AlignedBuffer, OutputFolder, PAGE, read_exact_at};
use crate::error::{Error, Result};
use crate::plan::InputFile;

const PAGE_BYTES: u64 = PAGE as u64;
/// Bytes of a header that are held at once: whole pages.
const HEADER_PART: usize = 256 << 10;

/// Whether to bypass the page cache. The bytes are the same either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirectMode {
    /// Where the file system takes it.
    #[default]
    Auto,
    /// Through the page cache.
    Never,
}

/// One output file that is being written.
///
/// Dropped before [`ShardWriter::finish`] it leaves the file as it is, under its temporary name.
#[derive(Debug)]
pub struct ShardWriter {
    output: OutputFile,
    size: u64,
    seams: Seams,
    /// Bytes that have arrived, the header's among them.
    arrived: AtomicU64,
}

impl ShardWriter {
    /// Creates the file `name` in `folder`, where it must not exist, reserves `size` bytes for it
    /// and writes the length and text of the header: `header_bytes` of them, with spaces where
    /// `text` ends earlier. Whoever named the file removes it after a failure.
    pub fn create(
        folder: &OutputFolder,
        name: &str,
        header_bytes: u64,
        text: impl FnOnce(&mut dyn fmt::Write) -> fmt::Result,
        size: u64,
        mode: DirectMode,
    ) -> Result<Self> {
        check_header(header_bytes, size).map_err(|error| error.file(folder.path_of(name)))?;
        let output = OutputFile::create(folder, name)?;
        Self::begin(output, header_bytes, text, size, mode)
    }

    /// Goes on with the file `name` that an earlier run left in `folder`, or creates it: the rest is
    /// as for [`ShardWriter::create`]. What is in it and shall stay is told to [`ShardWriter::keep`].
    pub fn resume(
        folder: &OutputFolder,
        name: &str,
        header_bytes: u64,
        text: impl FnOnce(&mut dyn fmt::Write) -> fmt::Result,
        size: u64,
        mode: DirectMode,
    ) -> Result<Self> {
        check_header(header_bytes, size).map_err(|error| error.file(folder.path_of(name)))?;
        match OutputFile::reopen(folder, name)? {
            Some(output) => Self::begin(output, header_bytes, text, size, mode),
            None => Self::create(folder, name, header_bytes, text, size, mode),
        }
    }

    fn begin(
        mut output: OutputFile,
        header_bytes: u64,
        text: impl FnOnce(&mut dyn fmt::Write) -> fmt::Result,
        size: u64,
        mode: DirectMode,
    ) -> Result<Self> {
        let mut buffer = AlignedBuffer::new((header_bytes as usize).min(HEADER_PART))?;
        output.reserve(size)?;
        if mode == DirectMode::Auto {
            output.probe_direct(&mut buffer);
        }
        let length = header_bytes - size_of::<u64>() as u64;
        buffer.as_mut_slice()[..size_of::<u64>()].copy_from_slice(&length.to_le_bytes());
        let filled = size_of::<u64>();
        let prologue = Prologue {
            output: &output,
            buffer,
            filled,
            start: 0,
            size: header_bytes,
            failure: None,
        };
        prologue.write(text)?;
        let arrived = AtomicU64::new(header_bytes);
        Ok(Self { output, size, seams: Seams::default(), arrived })
    }

    /// Whether the page cache is bypassed.
    pub fn is_direct(&self) -> bool {
        self.output.is_direct()
    }

    /// Where in an [`AlignedBuffer`] the piece must begin that goes to `start` in the file. The
    /// buffer needs up to a page more than the piece.
    pub fn buffer_offset(&self, start: u64) -> usize {
        (start % PAGE_BYTES) as usize
    }

    /// Writes `buffer[range]` to `start` in the file. From any thread, in any order, each byte of
    /// the file once.
    ///
    /// # Panics
    ///
    /// When `range` does not begin at [`ShardWriter::buffer_offset`] or whole pages after it.
    pub fn write(&self, start: u64, buffer: &AlignedBuffer, range: Range<usize>) -> Result<()> {
        let place = self.buffer_offset(start);
        assert_eq!(range.start % PAGE, place, "a piece lies askew in its buffer");
        let piece = &buffer.as_slice()[range];
        self.check_range(start, piece.len())?;
        if self.is_direct() {
            self.write_in_pages(start, piece)?;
        } else {
            self.output.write(piece, start)?;
        }
        self.arrived.fetch_add(piece.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Takes `start..start + len` as written: an earlier run has done so, and `file` is the same file,
    /// open for reading.
    pub fn keep(&self, file: &File, start: u64, len: u64) -> Result<()> {
        self.check_range(start, len as usize)?;
        if self.is_direct() {
            // The pages that it shares with others wait for those.
            let end = start + len;
            let front = start.next_multiple_of(PAGE_BYTES).min(end);
            let back = (end / PAGE_BYTES * PAGE_BYTES).max(front);
            let mut page = [0; PAGE];
            for (from, to) in [(start, front), (back, end)] {
                let part = &mut page[..(to - from) as usize];
                read_exact_at(file, from, part).map_err(|error| error.file(self.output.path()))?;
                self.write_seam(from, part)?;
            }
        }
        self.arrived.fetch_add(len, Ordering::Relaxed);
        Ok(())
    }

    /// Brings to the disk what was written so far, also the pages that are not yet whole.
    pub fn flush(&self) -> Result<()> {
        self.seams.each(|page, bytes| self.write_page(page, bytes))?;
        self.output.flush()
    }

    /// Cuts the file to its size and flushes it to the disk. Every byte must have been written.
    /// Returns which file it is and the state that it is left in.
    pub fn finish(&self) -> Result<InputFile> {
        let arrived = self.arrived.load(Ordering::Relaxed);
        if arrived != self.size {
            return Err(Error::internal("the shard's bytes were not each written once")
                .file(self.output.path())
                .expected(format_args!("{} bytes", self.size))
                .found(arrived));
        }
        self.output.finish(self.size)?;
        self.output.state()
    }

    /// The broken page at the front, the whole pages, and the broken page at the back.
    fn write_in_pages(&self, start: u64, piece: &[u8]) -> Result<()> {
        let to_boundary = (start.next_multiple_of(PAGE_BYTES) - start) as usize;
        let (front, rest) = piece.split_at(to_boundary.min(piece.len()));
        let (pages, back) = rest.split_at(rest.len() / PAGE * PAGE);
        let pages_start = start + front.len() as u64;
        self.write_seam(start, front)?;
        self.output.write(pages, pages_start)?;
        self.write_seam(pages_start + pages.len() as u64, back)
    }

    fn write_seam(&self, start: u64, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let page = start / PAGE_BYTES;
        let page_start = page * PAGE_BYTES;
        let full = (self.size - page_start).min(PAGE_BYTES) as usize;
        let Some(bytes) = self.seams.put(page, (start - page_start) as usize, bytes, full) else {
            return Ok(());
        };
        self.write_page(page, &bytes)
    }

    fn write_page(&self, page: u64, bytes: &[u8]) -> Result<()> {
        let mut aligned = AlignedBuffer::new(PAGE)?;
        aligned.as_mut_slice().copy_from_slice(bytes);
        self.output.write(aligned.as_slice(), page * PAGE_BYTES)
    }

    fn check_range(&self, start: u64, len: usize) -> Result<()> {
        match start.checked_add(len as u64) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(Error::internal("a piece lies past the end of its shard")
                .file(self.output.path())
                .expected(format_args!("at most {} bytes", self.size))
                .found(format_args!("{len} bytes from byte {start}"))),
        }
    }
}

fn check_header(bytes: u64, size: u64) -> Result<()> {
    let fits = bytes.is_multiple_of(PAGE_BYTES) && bytes <= size && bytes > 0;
    if fits { Ok(()) } else { Err(misplaced(bytes, size)) }
}

/// The header of a file on its way there: whole pages go out as they are filled.
struct Prologue<'a> {
    output: &'a OutputFile,
    buffer: AlignedBuffer,
    filled: usize,
    /// Where in the file the buffer goes.
    start: u64,
    /// Bytes of the header in all.
    size: u64,
    failure: Option<Error>,
}

impl Prologue<'_> {
    /// Writes all of `text`, and spaces behind it up to the header's end.
    fn write(mut self, text: impl FnOnce(&mut dyn fmt::Write) -> fmt::Result) -> Result<()> {
        let written = text(&mut self);
        while written.is_ok() && self.start + (self.filled as u64) < self.size {
            let left = (self.size - self.start) as usize - self.filled;
            self.put(&[b' '; 256][..left.min(256)])?;
        }
        match (self.failure, written) {
            (Some(failure), _) => Err(failure),
            (None, Err(_)) => Err(Error::internal("the header of a shard cannot be written")),
            (None, Ok(())) => Ok(()),
        }
    }

    fn put(&mut self, mut bytes: &[u8]) -> Result<()> {
        if self.start + (self.filled + bytes.len()) as u64 > self.size {
            return Err(misplaced(self.start + (self.filled + bytes.len()) as u64, self.size));
        }
        while !bytes.is_empty() {
            let left = self.size - self.start;
            let most = self.buffer.capacity().min(left as usize);
            let (now, rest) = bytes.split_at(bytes.len().min(most - self.filled));
            self.buffer.as_mut_slice()[self.filled..self.filled + now.len()].copy_from_slice(now);
            self.filled += now.len();
            bytes = rest;
            if self.filled == most {
                self.output.write(&self.buffer.as_slice()[..most], self.start)?;
                self.start += most as u64;
                self.filled = 0;
            }
        }
        Ok(())
    }
}

impl fmt::Write for Prologue<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.put(text.as_bytes()).map_err(|failure| {
            self.failure.get_or_insert(failure);
            fmt::Error
        })
    }
}

#[cold]
fn misplaced(header: u64, size: u64) -> Error {
    Error::internal("the shard's header does not end on a page boundary in its file")
        .found(format_args!("{header} of {size} bytes"))
}

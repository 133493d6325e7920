//! Moving bytes: reads from input shards and writes to output shards.
//!
//! A merge is bound by the disk, so this layer decides how fast it is; and it meets everything
//! that can go wrong outside the program: files that shrink while they are read, disks that fill
//! up, file systems that refuse what others allow.
//!
//! **Reading.** [`InputReader`] has three ways to the same bytes.
//!
//! - *Positioned*: `pread` into the caller's buffer. In steps that fit the second-level cache the
//!   copy costs less than setting up and tearing down page tables does, every failure of the
//!   medium is an error, and memory is bounded by the buffers. So this is the way unless told
//!   otherwise.
//! - *Direct*: past the page cache, for bytes that are not in it and are read only once. On a
//!   virtual disk this reads cold files much faster.
//! - *Mapped*: the page range of a piece is populated with one system call and then used in place,
//!   without a copy; behind the cursor the pages are given back. It has to be asked for.
//!
//! **Writing.** [`ShardWriter`] takes the pieces of one output file from any thread, in any order,
//! past the page cache where the file system allows it. Nothing is buffered but the 4 KiB pages
//! in which two pieces meet.

mod buffer;
mod direct;
mod folder;
mod identity;
mod journal;
mod mapped;
mod positioned;
mod residency;
mod seams;
mod shared_words;
mod spool;
mod volume;
mod write_back;
mod writer;

use std::fs::File;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::{Advice, FileType, Mode, OFlags};

use crate::error::{Error, Result};
use crate::plan::InputFile;

pub use buffer::AlignedBuffer;
pub use folder::OutputFolder;
pub use identity::check_unchanged;
use identity::same_file;
pub use journal::JournalFile;
pub(crate) use journal::damaged;
pub(crate) use positioned::read_exact_at;
use residency::Residency;
pub(crate) use shared_words::SharedWords;
pub use spool::{Fetch, Needs, Spool};
pub use volume::raise_open_file_limit;
pub use writer::{DirectMode, ShardWriter};

use mapped::MappedFile;
pub use mapped::{LentMap, MAP_MARGIN, are_mapped};

/// The unit of direct writes and of [`AlignedBuffer`]'s alignment.
pub const PAGE: usize = 4096;

/// Pieces shorter than this are read with `pread` even from a mapped file.
pub const MAPPED_FROM: usize = 1 << 20;

/// How input bytes are read. The bytes are the same in every case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadPath {
    /// Positioned; direct where bytes are read once and are not in the page cache, unless the file
    /// lies on a network or FUSE mount.
    #[default]
    Auto,
    /// Mapped wherever the kernel can populate a map.
    Mapped,
    /// Positioned always.
    Positioned,
    /// Direct for all that is read once, wherever the file system allows it.
    Direct,
}

/// One open input file, read from by all workers at once.
#[derive(Debug)]
pub struct InputReader {
    file: File,
    path: PathBuf,
    size: u64,
    read_path: ReadPath,
    map: Option<MappedFile>,
    residency: Residency,
    /// The same file, opened to be read past the page cache when that is first wanted.
    direct: OnceLock<Option<File>>,
}

impl InputReader {
    /// Opens `input`, which must still be the file whose header was read.
    pub fn open(input: &InputFile, read_path: ReadPath) -> Result<Self> {
        let file = open_read_only(&input.path)?;
        input.check_same(&InputFile::of(&file, &input.path)?)?;
        let map =
            if read_path == ReadPath::Mapped { MappedFile::new(&file, input.size) } else { None };
        let (path, size) = (input.path.clone(), input.size);
        let (residency, direct) = (Residency::default(), OnceLock::new());
        Ok(Self { file, path, size, read_path, map, residency, direct })
    }

    fn direct(&self) -> Option<&File> {
        let open = || {
            let wanted = match self.read_path {
                ReadPath::Auto => !volume::is_remote(&self.file),
                ReadPath::Direct => true,
                ReadPath::Mapped | ReadPath::Positioned => false,
            };
            let direct = wanted.then(|| open_direct(&self.path)).flatten()?;
            // Another file may have got the name since.
            same_file(&direct, &self.file).then_some(direct)
        };
        self.direct.get_or_init(open).as_ref()
    }

    /// Whether most of `start..start + len` is in the page cache, as far as the kernel can say.
    ///
    /// It is asked about a few places only: counting every page took a tenth of a merge's CPU time.
    pub fn is_cached(&self, start: u64, len: usize) -> bool {
        self.read_path != ReadPath::Direct
            && self.residency.is_cached(&self.file, start, len as u64)
    }

    /// The bytes `start..start + len` in `scratch`, read past the page cache where that is possible.
    pub fn read_direct<'a>(
        &'a self,
        start: u64,
        len: usize,
        scratch: &'a mut AlignedBuffer,
    ) -> Result<&'a [u8]> {
        self.check_range(start, len)?;
        let Some(direct) = self.direct() else { return self.read(start, len, scratch) };
        // Whole pages around the piece; the last one may reach past the end of the file.
        let skip = (start % PAGE as u64) as usize;
        let window = (skip + len).next_multiple_of(PAGE);
        scratch.grow(window)?;
        let first = start - skip as u64;
        let pages = &mut scratch.as_mut_slice()[..window];
        let wanted = window.min((self.size - first) as usize);
        if positioned::read_pages_at(direct, first, pages, wanted).is_err() {
            // A file system may open a file so and then refuse to read it, or the file shrank: a
            // positioned read of the same bytes succeeds, or says what is wrong.
            return self.read(start, len, scratch);
        }
        Ok(&scratch.as_slice()[skip..skip + len])
    }

    /// Whether long pieces are used in place instead of being copied.
    pub fn is_mapped(&self) -> bool {
        self.map.is_some()
    }

    /// The bytes `start..start + len`, in place where that is possible, else in `scratch`, which
    /// grows to `len` when it is smaller.
    ///
    /// For a caller that bounds its memory: a piece that is used in place makes at most `len` and
    /// a [`MAP_MARGIN`] on either side resident, until it is released, and empties `scratch`. One
    /// that is shorter than [`MAPPED_FROM`] takes `len` bytes of `scratch` even when the file is
    /// mapped.
    pub fn read<'a>(
        &'a self,
        start: u64,
        len: usize,
        scratch: &'a mut AlignedBuffer,
    ) -> Result<&'a [u8]> {
        self.check_range(start, len)?;
        if len >= MAPPED_FROM
            && let Some(map) = &self.map
            && map.populate(start, len)
        {
            *scratch = AlignedBuffer::default();
            return Ok(map.slice(start, len));
        }
        // Here too when a populate failed: that says nothing about the reason, and a positioned
        // read of the same bytes either gives the true error or succeeds.
        scratch.grow(len)?;
        let piece = &mut scratch.as_mut_slice()[..len];
        read_exact_at(&self.file, start, piece).map_err(|error| error.file(&self.path))?;
        Ok(piece)
    }

    /// Reads the bytes from `start` on that fill `memory`.
    pub fn read_into(&self, start: u64, memory: &mut [u8]) -> Result<()> {
        self.check_range(start, memory.len())?;
        read_exact_at(&self.file, start, memory).map_err(|error| error.file(&self.path))
    }

    /// Asks the kernel to start reading `start..start + len`. A hint; never fails.
    pub fn prefetch(&self, start: u64, len: usize) {
        if let Some(length) = NonZeroU64::new(len as u64) {
            // The same page cache serves both read paths, so one call does for both.
            let _ = rustix::fs::fadvise(&self.file, start, Some(length), Advice::WillNeed);
        }
    }

    /// Gives back the memory of a piece that is done with. Must not be called while this thread
    /// still uses the piece, for speed only: the bytes stay valid and would be mapped again.
    pub fn release(&self, start: u64, len: usize) {
        if let Some(map) = &self.map
            && len >= MAPPED_FROM
        {
            map.release(start, len);
        }
    }

    fn check_range(&self, start: u64, len: usize) -> Result<()> {
        match start.checked_add(len as u64) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(Error::internal("a source lies past the end of its file")
                .file(&self.path)
                .expected(format_args!("at most {} bytes", self.size))
                .found(format_args!("{len} bytes from byte {start}"))),
        }
    }
}

/// Opens an input, which must be a regular file. Inputs are never opened for writing.
pub(crate) fn open_read_only(path: &Path) -> Result<File> {
    // To open a pipe would wait for who writes to it. Regular files do not know the flag.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).map(File::from);
    let file = file.map_err(|errno| Error::io("open the file", errno.into()).file(path))?;
    let kind = FileType::from_raw_mode(
        rustix::fs::fstat(&file)
            .map_err(|errno| Error::io("read the file's state", errno.into()).file(path))?
            .st_mode,
    );
    if kind == FileType::RegularFile {
        return Ok(file);
    }
    Err(Error::checkpoint("this is no file that holds data")
        .file(path)
        .expected("a regular file")
        .found(match kind {
            FileType::Directory => "a folder",
            FileType::Fifo => "a pipe",
            FileType::Socket => "a socket",
            _ => "a device",
        })
        .advice("put the file itself there, or a link to it"))
}

/// Opens an input to be read past the page cache, if its file system allows that.
fn open_direct(path: &Path) -> Option<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map(File::from).ok()
}

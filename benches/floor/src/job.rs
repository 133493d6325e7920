//! The loop: take a piece, read it from every model, write the first one's copy.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::hint::black_box;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use memmap2::{Advice, Mmap, MmapMut, UncheckedAdvice};
use rustix::fs::{FallocateFlags, OFlags, fallocate};

use crate::options::{Options, Read, Write};

const PAGE: usize = 4096;
const LINE: usize = 64;
/// What `pread` fetches at once of a model that is only looked at: it stays in the L2 cache.
const GLANCE: usize = 256 << 10;

/// One shard of the output and the shards of the models that it is made from.
struct Shard {
    bytes: usize,
    inputs: Vec<Input>,
    output: File,
    path: PathBuf,
}

enum Input {
    Map(Mmap),
    File(File),
}

/// A piece of work: a range of one shard.
struct Piece {
    shard: usize,
    offset: usize,
    bytes: usize,
}

/// Runs the loop and returns its report as a line of JSON.
pub fn run(options: &Options) -> Result<String, String> {
    let lists =
        options.models.iter().map(|model| shard_files(model)).collect::<Result<Vec<_>, _>>()?;
    fs::create_dir_all(&options.out).map_err(|e| at(&options.out, &e))?;
    let start = Instant::now();
    let shards = open_shards(options, &lists)?;
    let pieces = cut(&shards, options.piece);
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        let work = || worker(options, &shards, &pieces, &next);
        let workers: Vec<_> = (0..options.threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|w| {
            w.join().map_err(|_| "a worker panicked".to_owned())?.map_err(|e| e.to_string())
        })
    })?;
    for shard in &shards {
        finish(shard).map_err(|e| at(&shard.path, &e))?;
    }
    let seconds = start.elapsed().as_secs_f64();
    let written: usize = shards.iter().map(|s| s.bytes).sum();
    let read = written * options.models.len();
    let peak = peak_rss().map_err(|e| format!("/proc/self/status: {e}"))?;
    Ok(format!(
        r#"{{"seconds": {seconds:.6}, "bytes_read": {read}, "bytes_written": {written}, "peak_rss": {peak}}}"#
    ))
}

fn at(path: &Path, error: &io::Error) -> String {
    format!("{}: {error}", path.display())
}

fn shard_files(model: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(model).map_err(|e| at(model, &e))?;
    let mut files: Vec<_> = entries
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension() == Some(OsStr::new("safetensors")))
        .collect();
    files.sort();
    if files.is_empty() {
        return Err(format!("{}: no safetensors files", model.display()));
    }
    Ok(files)
}

fn open_shards(options: &Options, lists: &[Vec<PathBuf>]) -> Result<Vec<Shard>, String> {
    let first = &lists[0];
    if lists.iter().any(|list| list.len() != first.len()) {
        return Err("the models have different numbers of shards".into());
    }
    let open_one = |(index, path): (usize, &PathBuf)| {
        let bytes = file_bytes(path)?;
        let inputs = lists
            .iter()
            .map(|list| open_input(options.read, &list[index], bytes))
            .collect::<Result<_, _>>()?;
        let path = options.out.join(path.file_name().unwrap_or_default());
        let output = open_output(options.write, &path, bytes).map_err(|e| at(&path, &e))?;
        Ok(Shard { bytes, inputs, output, path })
    };
    first.iter().enumerate().map(open_one).collect()
}

fn file_bytes(path: &Path) -> Result<usize, String> {
    let bytes = fs::metadata(path).map_err(|e| at(path, &e))?.len();
    usize::try_from(bytes).map_err(|e| e.to_string())
}

fn open_input(read: Read, path: &Path, bytes: usize) -> Result<Input, String> {
    if file_bytes(path)? != bytes {
        return Err(format!("{}: not as long as the first model's shard", path.display()));
    }
    let mut open = OpenOptions::new();
    open.read(true);
    if read == Read::Direct {
        open.custom_flags(direct_flag());
    }
    let file = open.open(path).map_err(|e| at(path, &e))?;
    if read != Read::Mmap {
        return Ok(Input::File(file));
    }
    // SAFETY: the bench owns its inputs; nothing changes or cuts them while it runs.
    let map = unsafe { Mmap::map(&file) }.map_err(|e| at(path, &e))?;
    Ok(Input::Map(map))
}

fn open_output(write: Write, path: &Path, bytes: usize) -> io::Result<File> {
    let mut open = OpenOptions::new();
    open.write(true).create(true).truncate(true);
    if write == Write::Direct {
        open.custom_flags(direct_flag());
    }
    let file = open.open(path)?;
    // A file system without fallocate still gives a floor, so its refusal is no error.
    let _ = fallocate(&file, FallocateFlags::empty(), 0, bytes.next_multiple_of(PAGE) as u64);
    Ok(file)
}

fn direct_flag() -> i32 {
    OFlags::DIRECT.bits().cast_signed()
}

fn cut(shards: &[Shard], piece: usize) -> Vec<Piece> {
    let of_shard = |(shard, s): (usize, &Shard)| {
        let total = s.bytes;
        (0..total)
            .step_by(piece)
            .map(move |offset| Piece { shard, offset, bytes: piece.min(total - offset) })
            .collect::<Vec<_>>()
    };
    shards.iter().enumerate().flat_map(of_shard).collect()
}

fn worker(
    options: &Options,
    shards: &[Shard],
    pieces: &[Piece],
    next: &AtomicUsize,
) -> io::Result<()> {
    let mut copy = buffer(options.piece)?;
    let mut glance = match options.read {
        Read::Mmap => buffer(PAGE)?,
        Read::Pread => buffer(GLANCE)?,
        Read::Direct => buffer(options.piece)?,
    };
    while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
        let shard = &shards[piece.shard];
        for (index, input) in shard.inputs.iter().enumerate() {
            match (input, index) {
                (Input::Map(map), 0) => {
                    with_mapped(map, piece, |b| copy[..b.len()].copy_from_slice(b))?;
                }
                (Input::Map(map), _) => with_mapped(map, piece, touch)?,
                (Input::File(file), 0) => read_file(file, piece.offset, &mut copy, piece.bytes)?,
                (Input::File(file), _) => glance_at(file, piece, &mut glance)?,
            }
        }
        // A direct write must be whole pages; the file is cut to its length at the end.
        let bytes = match options.write {
            Write::Direct => piece.bytes.next_multiple_of(PAGE),
            Write::Buffered => piece.bytes,
        };
        shard.output.write_all_at(&copy[..bytes], piece.offset as u64)?;
    }
    Ok(())
}

/// A page-aligned buffer whose pages are there already.
fn buffer(bytes: usize) -> io::Result<MmapMut> {
    let mut map = MmapMut::map_anon(bytes)?;
    // Huge pages are a wish: without them the buffer is only slower.
    let _ = map.advise(Advice::HugePage);
    map.fill(0);
    Ok(map)
}

/// Brings a piece of a map in with one call, uses it and drops it from the resident set.
fn with_mapped(map: &Mmap, piece: &Piece, mut use_it: impl FnMut(&[u8])) -> io::Result<()> {
    map.advise_range(Advice::PopulateRead, piece.offset, piece.bytes)?;
    use_it(&map[piece.offset..piece.offset + piece.bytes]);
    // SAFETY: the map is of a file and read-only: a dropped page comes back as it was.
    unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, piece.offset, piece.bytes) }
}

fn glance_at(file: &File, piece: &Piece, scratch: &mut MmapMut) -> io::Result<()> {
    let step = scratch.len();
    for done in (0..piece.bytes).step_by(step) {
        let bytes = step.min(piece.bytes - done);
        read_file(file, piece.offset + done, scratch, bytes)?;
        touch(&scratch[..bytes]);
    }
    Ok(())
}

/// Reads `bytes` bytes at `offset`, asking for whole pages, as direct reads must.
fn read_file(file: &File, offset: usize, into: &mut MmapMut, bytes: usize) -> io::Result<()> {
    let mut done = 0;
    while done < bytes {
        let end = bytes.next_multiple_of(PAGE);
        match file.read_at(&mut into[done..end], (offset + done) as u64)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => done += n,
        }
    }
    Ok(())
}

/// Loads one byte of every cache line.
fn touch(bytes: &[u8]) {
    let mut seen = 0;
    for line in bytes.chunks(LINE) {
        seen |= line[0];
    }
    black_box(seen);
}

fn finish(shard: &Shard) -> io::Result<()> {
    shard.output.set_len(shard.bytes as u64)?;
    shard.output.sync_all()
}

/// The high-water mark of the resident set, in bytes.
fn peak_rss() -> io::Result<usize> {
    let status = fs::read_to_string("/proc/self/status")?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = kib.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<usize>().ok());
    kib.map(|kib| kib << 10).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

//! Readers and writers against plain files, on a real disk and in memory.

use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;

use oxmerge::error::{Error, ErrorKind};
use oxmerge::io::{
    AlignedBuffer, DirectMode, InputReader, MAP_MARGIN, MAPPED_FROM, OutputFolder, PAGE, ReadPath,
    ShardWriter, check_unchanged,
};
use oxmerge::plan::InputFile;
use proptest::prelude::*;
use tempfile::TempDir;

const READ_PATHS: [ReadPath; 3] = [ReadPath::Auto, ReadPath::Mapped, ReadPath::Positioned];
const MODES: [DirectMode; 2] = [DirectMode::Auto, DirectMode::Never];

/// A directory on a real disk, and one in memory where there is such a mount.
fn directories() -> Vec<TempDir> {
    let shm = Path::new("/dev/shm");
    let memory = shm.exists().then(|| tempfile::tempdir_in(shm).unwrap());
    std::iter::once(disk()).chain(memory).collect()
}

fn disk() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Bytes that differ from their neighbours at every distance that matters.
fn noise(len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// A writer of a new file at `path`.
fn create(path: &Path, header: &str, size: u64, mode: DirectMode) -> Result<ShardWriter, Error> {
    let folder = OutputFolder::open(path.parent().unwrap())?;
    let name = path.file_name().unwrap().to_str().unwrap();
    let bytes = (8 + header.len()) as u64;
    ShardWriter::create(&folder, name, bytes, |out| out.write_str(header), size, mode)
}

fn header(pages: usize) -> String {
    " ".repeat(pages * PAGE - 8)
}

fn expected_file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// The pieces between `cuts`, in an order that depends on `seed`.
fn pieces(len: usize, cuts: &[usize], seed: u64) -> Vec<Range<usize>> {
    let mut cuts: Vec<_> = cuts.iter().map(|cut| cut % (len + 1)).chain([0, len]).collect();
    cuts.sort_unstable();
    let mut pieces: Vec<_> = cuts.windows(2).map(|pair| pair[0]..pair[1]).collect();
    pieces.sort_by_key(|piece| (piece.start as u64 ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    pieces
}

fn write_piece(writer: &ShardWriter, start: u64, bytes: &[u8]) -> oxmerge::error::Result<()> {
    let offset = writer.buffer_offset(start);
    let range = offset..offset + bytes.len();
    let mut buffer = AlignedBuffer::new(range.end).unwrap();
    buffer.as_mut_slice()[range.clone()].copy_from_slice(bytes);
    writer.write(start, &buffer, range)
}

/// Writes `data` in pieces from four threads.
fn write_in_threads(writer: &ShardWriter, data: &[u8], start: u64, pieces: Vec<Range<usize>>) {
    let pieces = Mutex::new(pieces);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some(piece) = { pieces.lock().unwrap().pop() } {
                    write_piece(writer, start + piece.start as u64, &data[piece]).unwrap();
                }
            });
        }
    });
}

fn round_trip(directory: &Path, mode: DirectMode, len: usize, cuts: &[usize], seed: u64) {
    let path = directory.join("shard.partial");
    let (header, data) = (header(1 + (seed % 3) as usize), noise(len));
    let expected = expected_file(&header, &data);
    let writer = create(&path, &header, expected.len() as u64, mode).unwrap();
    let start = (expected.len() - len) as u64;
    write_in_threads(&writer, &data, start, pieces(len, cuts, seed));
    writer.finish().unwrap();
    assert!(fs::read(&path).unwrap() == expected, "{mode:?} in {}", directory.display());
    fs::remove_file(path).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn pieces_make_the_file(
        len in prop_oneof![0..3 * PAGE, (0_usize..80).prop_map(|pages| pages * PAGE), 0..300_000_usize],
        cuts in prop::collection::vec(any::<usize>(), 0..60),
        seed in any::<u64>(),
    ) {
        for directory in directories() {
            for mode in MODES {
                round_trip(directory.path(), mode, len, &cuts, seed);
            }
        }
    }

    #[test]
    fn a_file_that_is_gone_on_with_has_the_bytes_of_one_run(
        len in 0..100_000_usize,
        cuts in prop::collection::vec(any::<usize>(), 0..40),
        seed in any::<u64>(),
        kept in any::<u64>(),
    ) {
        for (before, after) in [(0, 0), (0, 1), (1, 0)] {
            interrupted(disk().path(), [MODES[before], MODES[after]], len, &cuts, seed, kept);
        }
    }
}

/// Writes some pieces and flushes them, one after the other; then a second writer keeps those and
/// writes the rest.
fn interrupted(
    folder: &Path,
    [before, after]: [DirectMode; 2],
    len: usize,
    cuts: &[usize],
    seed: u64,
    kept: u64,
) {
    let (header, data) = (header(2), noise(len));
    let (start, path) = (2 * PAGE as u64, folder.join("interrupted"));
    let size = start + len as u64;
    let (old, new): (Vec<_>, Vec<_>) = pieces(len, cuts, seed)
        .into_iter()
        .enumerate()
        .partition(|(at, _)| kept >> (at % 64) & 1 == 1);
    let place = |piece: &Range<usize>| (start + piece.start as u64, piece.len() as u64);
    let writer = create(&path, &header, size, before).unwrap();
    for (_, piece) in &old {
        write_piece(&writer, place(piece).0, &data[piece.clone()]).unwrap();
        writer.flush().unwrap();
        let written = fs::read(&path).unwrap();
        assert_eq!(written[2 * PAGE..][piece.clone()], data[piece.clone()]);
    }
    drop(writer);
    let opened = OutputFolder::open(folder).unwrap();
    let text = |out: &mut dyn std::fmt::Write| out.write_str(&header);
    let writer = ShardWriter::resume(&opened, "interrupted", start, text, size, after).unwrap();
    let file = opened.open_to_read("interrupted").unwrap().unwrap();
    for (_, piece) in &old {
        let (start, bytes) = place(piece);
        writer.keep(&file, start, bytes).unwrap();
    }
    for (_, piece) in &new {
        write_piece(&writer, place(piece).0, &data[piece.clone()]).unwrap();
    }
    writer.finish().unwrap();
    assert_eq!(fs::read(&path).unwrap(), expected_file(&header, &data));
}

/// Many pieces in one page, and pieces of one byte.
#[test]
fn tiny_pieces_share_pages() {
    let cuts: Vec<_> = (0..2 * PAGE).collect();
    for mode in MODES {
        round_trip(disk().path(), mode, 2 * PAGE - 5, &cuts, 7);
    }
}

#[test]
fn direct_writes_are_taken_where_a_plain_program_can_make_them() {
    let directory = disk();
    let path = directory.path().join("shard");
    let writer = create(&path, &header(1), PAGE as u64, DirectMode::Auto).unwrap();
    let dd = std::process::Command::new("dd")
        .args(["if=/dev/zero", "bs=4096", "count=1", "oflag=direct"])
        .arg(format!("of={}", directory.path().join("probe").display()))
        .output();
    let Ok(dd) = dd else { return };
    assert_eq!(writer.is_direct(), dd.status.success());
    let never = directory.path().join("never");
    let writer = create(&never, &header(1), PAGE as u64, DirectMode::Never).unwrap();
    assert!(!writer.is_direct());
}

#[test]
fn an_existing_file_is_neither_replaced_nor_removed() {
    let directory = disk();
    let path = directory.path().join("shard");
    fs::write(&path, "precious").unwrap();
    let error = create(&path, &header(1), PAGE as u64, DirectMode::Auto).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io(io::ErrorKind::AlreadyExists));
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn a_full_disk_shows_at_once() {
    for directory in directories() {
        let path = directory.path().join("shard");
        let volume = rustix::fs::statvfs(directory.path()).unwrap();
        let size = volume.f_bavail * volume.f_frsize * 2 + PAGE as u64;
        let error = create(&path, &header(1), size, DirectMode::Auto).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io(io::ErrorKind::StorageFull));
        assert_eq!(error.parts().expected, Some(&*format!("room for {size} bytes")));
        assert!(error.parts().found.unwrap().ends_with("bytes free"));
    }
}

#[test]
fn an_error_of_the_system_says_everything_that_is_known() {
    let error = Error::io("read", io::Error::from_raw_os_error(5))
        .file("model.safetensors")
        .tensor("x")
        .found("nothing")
        .advice("look");
    let without_file =
        "tensor `x`: failed to read: Input/output error (os error 5): found nothing; look";
    assert_eq!(error.without_file().to_string(), without_file);
    assert_eq!(error.to_string(), format!("`model.safetensors`: {without_file}"));
}

#[test]
fn a_header_that_ends_inside_a_page_is_refused() {
    let directory = disk();
    let path = directory.path().join("shard");
    for (header, size) in [("{}".to_owned(), 100), (header(2), PAGE as u64)] {
        let error = create(&path, &header, size, DirectMode::Auto).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Internal);
        assert!(!path.exists());
    }
}

#[test]
fn a_shard_must_be_written_whole_and_once() {
    for mode in MODES {
        let directory = disk();
        let path = directory.path().join("shard");
        let size = 3 * PAGE as u64 + 10;
        let writer = create(&path, &header(1), size, mode).unwrap();
        let data = noise(2 * PAGE + 10);
        write_piece(&writer, PAGE as u64, &data[..100]).unwrap();
        let message = "the shard's bytes were not each written once";
        assert_eq!(writer.finish().unwrap_err().message(), message);
        write_piece(&writer, PAGE as u64 + 100, &data[100..]).unwrap();
        writer.finish().unwrap();
        let error = write_piece(&writer, size - 1, &[1, 2]).unwrap_err();
        assert_eq!(error.message(), "a piece lies past the end of its shard");
        write_piece(&writer, PAGE as u64, &data[..PAGE]).unwrap();
        assert_eq!(writer.finish().unwrap_err().message(), message);
    }
}

#[test]
#[should_panic(expected = "a piece lies askew in its buffer")]
fn a_piece_that_lies_askew_is_a_bug() {
    let directory = disk();
    let path = directory.path().join("shard");
    let writer = create(&path, &header(1), 8192, DirectMode::Never).unwrap();
    let _ = writer.write(PAGE as u64 + 1, &AlignedBuffer::new(10).unwrap(), 0..10);
}

#[test]
fn buffers_begin_on_a_page_and_grow_when_told() {
    for capacity in [1, 100, PAGE, PAGE + 1, 1 << 20] {
        let mut buffer = AlignedBuffer::new(capacity).unwrap();
        assert_eq!(buffer.capacity(), capacity);
        assert_eq!(buffer.as_slice().as_ptr().addr() % PAGE, 0);
        buffer.grow(capacity - 1).unwrap();
        assert_eq!(buffer.capacity(), capacity);
        buffer.grow(capacity * 3).unwrap();
        assert_eq!(buffer.as_mut_slice().len(), capacity * 3);
        assert_eq!(buffer.as_slice().as_ptr().addr() % PAGE, 0);
    }
    assert!(AlignedBuffer::new(0).unwrap().as_slice().is_empty());
}

/// A file of `len` bytes of noise.
fn input(directory: &TempDir, len: usize) -> (InputFile, Vec<u8>) {
    let path = directory.path().join("input");
    let data = noise(len);
    fs::write(&path, &data).unwrap();
    (InputFile::stat(&path).unwrap(), data)
}

fn truncate(path: &Path, size: u64) {
    File::options().write(true).open(path).unwrap().set_len(size).unwrap();
}

#[test]
fn every_read_path_gives_the_same_bytes() {
    for directory in directories() {
        let (input, data) = input(&directory, 5 * MAPPED_FROM + 123);
        for path in READ_PATHS {
            let reader = InputReader::open(&input, path).unwrap();
            assert_eq!(reader.is_mapped(), path == ReadPath::Mapped);
            let mut scratch = AlignedBuffer::default();
            for (start, len) in [
                (0, 0),
                (data.len(), 0),
                (1, 1),
                (4095, 2),
                (777, MAPPED_FROM - 1),
                (777, MAPPED_FROM),
                (4096, MAPPED_FROM * 2),
                (MAPPED_FROM + 3, 4 * MAPPED_FROM + 120),
                (0, data.len()),
            ] {
                reader.prefetch(start as u64, len);
                let bytes = reader.read(start as u64, len, &mut scratch).unwrap();
                assert!(bytes == &data[start..start + len], "{path:?} {start}+{len}");
                let bytes = reader.read_direct(start as u64, len, &mut scratch).unwrap();
                assert!(bytes == &data[start..start + len], "direct {path:?} {start}+{len}");
                reader.release(start as u64, len);
            }
        }
    }
}

/// Mapped pieces must not touch the scratch: budgets count on it.
#[test]
fn long_mapped_pieces_need_no_scratch() {
    let directory = disk();
    let (input, data) = input(&directory, 2 * MAPPED_FROM);
    let reader = InputReader::open(&input, ReadPath::Mapped).unwrap();
    let mut scratch = AlignedBuffer::default();
    reader.read(0, data.len(), &mut scratch).unwrap();
    assert_eq!(scratch.capacity(), 0);
}

#[test]
fn reads_past_the_end_are_refused() {
    let directory = disk();
    let (input, _) = input(&directory, 100);
    let reader = InputReader::open(&input, ReadPath::Auto).unwrap();
    for (start, len) in [(0, 101), (100, 1), (u64::MAX, 2)] {
        let error = reader.read(start, len, &mut AlignedBuffer::default()).unwrap_err();
        assert_eq!(error.message(), "a source lies past the end of its file");
    }
    reader.prefetch(u64::MAX, 2);
    reader.release(0, 100);
}

#[test]
fn an_empty_file_can_be_opened() {
    let directory = disk();
    let (input, _) = input(&directory, 0);
    let reader = InputReader::open(&input, ReadPath::Mapped).unwrap();
    assert!(!reader.is_mapped());
    assert!(reader.read(0, 0, &mut AlignedBuffer::default()).unwrap().is_empty());
}

/// The file is cut after it was opened and before the piece is read, on both paths.
#[test]
fn a_file_that_shrinks_is_an_error_and_not_a_signal() {
    for path in READ_PATHS {
        let directory = disk();
        let (input, data) = input(&directory, 4 * MAPPED_FROM);
        let reader = InputReader::open(&input, path).unwrap();
        truncate(&input.path, MAPPED_FROM as u64 + 10);
        let mut scratch = AlignedBuffer::default();
        let error = reader.read(100, 2 * MAPPED_FROM, &mut scratch).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Changed);
        assert_eq!(error.message(), "the file shrank while it was read");
        assert_eq!(error.parts().expected, Some("2097152 bytes from byte 100"));
        assert_eq!(error.parts().found, Some("1048486"));
        assert_eq!(error.parts().file, Some(&*input.path));
        let bytes = reader.read(5, MAPPED_FROM, &mut scratch).unwrap();
        assert!(bytes == &data[5..5 + MAPPED_FROM]);
    }
}

/// Bytes of `path` that are mapped into this process and resident, as the kernel counts them.
fn resident(path: &Path) -> u64 {
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = smaps.lines();
    let found = lines.by_ref().any(|line| line.ends_with(path.to_str().unwrap()));
    assert!(found, "the file is not mapped");
    let rss = lines.find(|line| line.starts_with("Rss:")).unwrap();
    rss.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Pieces that begin and end inside pages, each released before the next is read, must not leave
/// their seams resident.
#[test]
fn the_resident_set_stays_flat() {
    for directory in directories() {
        let piece = MAPPED_FROM + 54_321;
        let (input, data) = input(&directory, 40 * piece);
        let reader = InputReader::open(&input, ReadPath::Mapped).unwrap();
        let mut scratch = AlignedBuffer::default();
        let mut most = 0;
        for start in (0..data.len()).step_by(piece) {
            reader.read(start as u64, piece, &mut scratch).unwrap();
            most = most.max(resident(&input.path));
            reader.release(start as u64, piece);
        }
        assert!(most <= (piece + 2 * MAP_MARGIN) as u64, "{most} bytes were resident");
        let left = resident(&input.path);
        assert_eq!(left, 0, "bytes stay resident");
    }
}

#[test]
fn one_reader_serves_many_threads() {
    for path in READ_PATHS {
        let directory = disk();
        let (input, data) = input(&directory, 16 * MAPPED_FROM);
        let reader = InputReader::open(&input, path).unwrap();
        let pieces = Mutex::new(pieces(data.len(), &[5_000_000, 3, 9_999_999, 12_345_678], 3));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut scratch = AlignedBuffer::default();
                    while let Some(piece) = { pieces.lock().unwrap().pop() } {
                        let (start, len) = (piece.start as u64, piece.len());
                        assert!(reader.read(start, len, &mut scratch).unwrap() == &data[piece]);
                        reader.release(start, len);
                    }
                });
            }
        });
    }
}

#[test]
fn a_changed_input_is_named_with_what_changed() {
    let directory = disk();
    let (input, _) = input(&directory, 100);
    check_unchanged(std::slice::from_ref(&input)).unwrap();

    truncate(&input.path, 60);
    for error in [
        check_unchanged(std::slice::from_ref(&input)).unwrap_err(),
        InputReader::open(&input, ReadPath::Auto).unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Changed);
        assert_eq!(error.message(), "the file changed after it was first read");
        assert_eq!(error.parts().file, Some(&*input.path));
        assert!(error.parts().expected.unwrap().starts_with("100 bytes, modified at "));
        assert!(error.parts().found.unwrap().starts_with("60 bytes, modified at "));
    }
    fs::remove_file(&input.path).unwrap();
    let error = check_unchanged(std::slice::from_ref(&input)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Changed);
    assert_eq!(error.message(), "the file is gone since it was first read");
}

/// Same size and time, another inode: what an atomic replacement leaves.
#[test]
fn a_replaced_input_is_changed() {
    let directory = disk();
    let (input, data) = input(&directory, 100);
    let other = directory.path().join("other");
    let mut file = File::create(&other).unwrap();
    file.write_all(&data).unwrap();
    file.set_modified(fs::metadata(&input.path).unwrap().modified().unwrap()).unwrap();
    fs::rename(&other, &input.path).unwrap();
    let error = check_unchanged(std::slice::from_ref(&input)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Changed);
    assert_eq!(error.parts().expected, Some(&*format!("inode {}", input.inode)));
}

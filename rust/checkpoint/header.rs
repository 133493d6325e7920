//! One safetensors file's header, checked whole.
//!
//! The format is eight bytes of length, so many bytes of JSON, and the tensors. Its promise, that
//! the tensors fill the rest of the file without overlap or hole, is checked here for every
//! tensor, since later code computes addresses from it. The length is compared with the format's
//! own limit and with the file before any memory is taken for it.

use std::cmp::Ordering;
use std::collections::HashSet;
use std::fs::File;
use std::path::Path;

use super::json::{self, RawEntry};
use super::{DOWNLOAD_AGAIN, TensorInfo, conversion, quantised};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::io::read_exact_at;

/// The longest header that the format allows, in bytes.
pub const MAX_HEADER: u64 = 100_000_000;

/// Bytes of the length before the header.
const PREFIX: u64 = 8;

/// What files that are not safetensors begin with, what they are, and what to do.
const IMPOSTORS: [(&[u8], &str, Advice); 4] = [
    (b"version ", "a Git LFS pointer, not the weights", |_| {
        "fetch the weights with `git lfs pull`".to_owned()
    }),
    (b"\x80", "a pickle, and no file of torch", |_| {
        "save the tensors with `torch.save` or `safetensors.torch.save_file`".to_owned()
    }),
    (b"GGUF", "a GGUF file", conversion::from_gguf),
    (b"<", "a web page, not the weights", |_| "download it again".to_owned()),
];

/// What to do about a file.
type Advice = fn(&Path) -> String;

/// A header that passed every check.
#[derive(Clone, Debug)]
pub struct Header {
    /// The tensors, by offset; their offsets count from the file's first byte.
    pub tensors: Vec<TensorInfo>,
}

impl Header {
    /// Reads the header of `file`, which is at `path`, has `size` bytes and is number `index` of its
    /// checkpoint.
    pub fn read(file: &File, path: &Path, size: u64, index: usize) -> Result<Self> {
        Self::read_checked(file, path, size, index)
            .map_err(|error| error.file(path).or_else_advice(DOWNLOAD_AGAIN))
    }

    fn read_checked(file: &File, path: &Path, size: u64, index: usize) -> Result<Self> {
        if size < PREFIX {
            return Err(too_short(size));
        }
        let mut prefix = [0; PREFIX as usize];
        read_exact_at(file, 0, &mut prefix)?;
        let len = header_len(prefix, path, size)?;
        let mut text = vec![0; len as usize];
        read_exact_at(file, PREFIX, &mut text)?;
        Self::parse(&text, size, index)
    }

    /// Reads the header of a file that is not here, of which the first bytes are.
    pub fn of_start(start: &[u8], path: &Path, size: u64, index: usize) -> Result<Self> {
        let read = || {
            let (prefix, rest) =
                start.split_first_chunk().ok_or_else(|| too_short(start.len() as u64))?;
            let len = header_len(*prefix, path, size)?;
            let text = rest.get(..len as usize).ok_or_else(|| {
                truncated("the header did not come whole")
                    .expected(format_args!("{len} bytes"))
                    .found(rest.len())
            })?;
            Self::parse(text, size, index)
        };
        read().map_err(|error: Error| error.file(path).or_else_advice(DOWNLOAD_AGAIN))
    }

    /// Checks the header `text` of a file of `size` bytes.
    pub fn parse(text: &[u8], size: u64, index: usize) -> Result<Self> {
        let utf8 = std::str::from_utf8(text)
            .map_err(|_| Error::checkpoint("the header is not valid UTF-8"))?;
        let mut entries = json::read_header(utf8)?;
        check_names(&entries)?;
        // Stable, and empty tensors first, so that what shares an offset keeps the header's order.
        entries.sort_by_key(|(_, entry)| (entry.begin, entry.end));
        let data_start = PREFIX + text.len() as u64;
        let mut cursor = 0;
        let mut tensors = Vec::with_capacity(entries.len());
        for (name, entry) in entries {
            let (dtype, start) = check_entry(&entry, cursor, data_start)
                .map_err(|error| error.tensor(name.as_str()))?;
            cursor = entry.end;
            let (shape, strides) = (entry.shape, None);
            tensors.push(TensorInfo { name, dtype, shape, file: index, start, strides });
        }
        // Cannot overflow: `check_entry` added the same numbers.
        check_size(data_start + cursor, size)?;
        Ok(Self { tensors })
    }
}

fn too_short(size: u64) -> Error {
    Error::checkpoint("the file is too short to be a safetensors file")
        .expected("at least 8 bytes")
        .found(size)
}

/// The header's length, once it is plausible.
fn header_len(prefix: [u8; PREFIX as usize], path: &Path, size: u64) -> Result<u64> {
    let len = u64::from_le_bytes(prefix);
    if len > MAX_HEADER {
        let impostor = IMPOSTORS.iter().find(|(magic, ..)| prefix.starts_with(magic));
        return Err(match impostor {
            Some((_, what, advice)) => {
                Error::checkpoint("not a safetensors file").found(what).advice(advice(path))
            }
            None if prefix.iter().all(|byte| matches!(byte, b'\t'..=b'\r' | b' '..=b'~')) => {
                Error::checkpoint("not a safetensors file")
                    .found("text")
                    .advice("name a folder of a model, or its file of weights")
            }
            None => Error::checkpoint("not a safetensors file, or its header is too long")
                .expected(format_args!("at most {MAX_HEADER} bytes of header"))
                .found(len),
        });
    }
    if len > size - PREFIX {
        return Err(truncated("the file ends inside its header")
            .found(format_args!("{size} bytes"))
            .expected(format_args!("at least {} bytes", PREFIX + len)));
    }
    Ok(len)
}

fn check_names(entries: &[(String, RawEntry)]) -> Result<()> {
    let mut seen = HashSet::with_capacity(entries.len());
    match entries.iter().find(|(name, _)| !seen.insert(name.as_str())) {
        Some((name, _)) => {
            Err(Error::checkpoint("the header has two tensors of this name").tensor(name.as_str()))
        }
        None => Ok(()),
    }
}

/// The type of a tensor and its first byte in the file; `cursor` is where the one before ended.
fn check_entry(entry: &RawEntry, cursor: u64, data_start: u64) -> Result<(DType, u64)> {
    let RawEntry { begin, end, .. } = *entry;
    let dtype =
        DType::from_name(&entry.dtype).ok_or_else(|| quantised::refuse_dtype(&entry.dtype))?;
    let bytes = checked_bytes(dtype, &entry.shape)?;
    let span = end.checked_sub(begin).ok_or_else(|| {
        Error::checkpoint("the tensor ends before it begins")
            .found(format_args!("[{begin}, {end}]"))
    })?;
    if span != bytes {
        return Err(Error::checkpoint("the tensor's offsets do not fit its shape")
            .expected(format_args!("{bytes} bytes for {dtype} {:?}", entry.shape))
            .found(span));
    }
    if begin != cursor {
        let what =
            if begin < cursor { "overlaps the tensor" } else { "leaves a hole after what is" };
        return Err(Error::checkpoint(format!("the tensor {what} before it"))
            .expected(format_args!("offset {cursor}"))
            .found(begin));
    }
    match data_start.checked_add(end) {
        Some(_) => Ok((dtype, data_start + begin)),
        None => Err(Error::checkpoint("the tensor's offsets overflow").found(end)),
    }
}

/// The bytes of a tensor, unless they overflow.
pub(super) fn checked_bytes(dtype: DType, shape: &[u64]) -> Result<u64> {
    let size = dtype.size() as u64;
    shape.iter().try_fold(size, |bytes, &extent| bytes.checked_mul(extent)).ok_or_else(|| {
        Error::checkpoint("the tensor's size overflows").found(format_args!("{dtype} {shape:?}"))
    })
}

fn check_size(expected: u64, size: u64) -> Result<()> {
    let error = match size.cmp(&expected) {
        Ordering::Equal => return Ok(()),
        Ordering::Less => truncated("the file is shorter than its header says"),
        Ordering::Greater => Error::checkpoint("the file is longer than its header says"),
    };
    Err(error.expected(format_args!("{expected} bytes")).found(format_args!("{size} bytes")))
}

fn truncated(message: &str) -> Error {
    Error::checkpoint(message).advice("it looks like a truncated download: download it again")
}

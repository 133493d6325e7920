//! From a list of tensors to output shards, with every offset known before anything is read.
//!
//! The header comes first in a file and holds all offsets; were they not known, the header could
//! only be written last. Tensors fill shards in the donor's order. Within a shard they are sorted
//! by element size, largest first and stably, so that none is misaligned: each begins at a
//! multiple of its own element size, and the data begin on a page boundary, for which the header
//! is padded with spaces. The same tensors and shard size give the same bytes always.

use std::collections::{BTreeMap, HashSet};
use std::fmt::{self, Write};

use serde::Serialize;

use super::header::{MAX_HEADER, checked_bytes};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::io::PAGE;
use crate::plan::{OutputShard, Plan};

/// What a header says of a tensor: name, type, shape.
type Described<'a> = (&'a str, DType, &'a [u64]);

/// Bytes of the length of a header.
const PREFIX: usize = size_of::<u64>();

/// Output shards and the place of each tensor in them.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The files, in order.
    pub shards: Vec<OutputShard>,
    /// For each tensor, in the order given, its shard and its first byte in that file.
    pub places: Vec<(usize, u64)>,
}

/// Lays `tensors` (name, type, shape), given in the donor's order, into shards of at most `shard_size` bytes of tensor
/// data (0 for one shard). A tensor that is larger gets a shard of its own.
///
/// One shard is named `{base_name}.safetensors`, several `{base_name}-00001-of-00003.safetensors`.
pub fn lay_out<N: AsRef<str>, S: AsRef<[u64]>>(
    tensors: &[(N, DType, S)],
    shard_size: u64,
    base_name: &str,
) -> Result<Layout> {
    check_names(tensors.iter().map(|(name, ..)| name.as_ref()))?;
    let sizes = tensors
        .iter()
        .map(|(name, dtype, shape)| {
            checked_bytes(*dtype, shape.as_ref()).map_err(|error| error.tensor(name.as_ref()))
        })
        .collect::<Result<Vec<_>>>()?;
    let groups = fill(&sizes, shard_size)?;
    let mut places = vec![(0, 0); tensors.len()];
    let mut shards = Vec::with_capacity(groups.len());
    for (number, mut group) in groups.into_iter().enumerate() {
        group.sort_by_key(|&tensor| std::cmp::Reverse(tensors[tensor].1.size()));
        let described = group.iter().map(|&tensor| {
            let (name, dtype, shape) = &tensors[tensor];
            (name.as_ref(), *dtype, shape.as_ref())
        });
        let header_bytes = measure(described)?;
        let mut end = header_bytes;
        for tensor in group {
            places[tensor] = (number, end);
            end += sizes[tensor];
        }
        shards.push(OutputShard { file_name: String::new(), header_bytes, size: end });
    }
    name_shards(&mut shards, base_name);
    Ok(Layout { shards, places })
}

/// The index of a sharded checkpoint, from each tensor's name, shard file name and bytes.
pub fn index_json<'a>(tensors: impl IntoIterator<Item = (&'a str, &'a str, u64)>) -> String {
    #[derive(Serialize)]
    struct Metadata {
        total_size: u64,
    }
    #[derive(Serialize)]
    struct Index<'a> {
        metadata: Metadata,
        weight_map: BTreeMap<&'a str, &'a str>,
    }
    let mut total_size = 0;
    let mut weight_map = BTreeMap::new();
    for (name, file_name, bytes) in tensors {
        total_size += bytes;
        weight_map.insert(name, file_name);
    }
    let index = Index { metadata: Metadata { total_size }, weight_map };
    let mut text = serde_json::to_string_pretty(&index).expect("strings and a number serialise");
    text.push('\n');
    text
}

fn check_names<'a>(mut names: impl ExactSizeIterator<Item = &'a str>) -> Result<()> {
    let mut seen = HashSet::with_capacity(names.len());
    match names.find(|&name| name == "__metadata__" || !seen.insert(name)) {
        Some(name) => Err(Error::plan("the output cannot have this tensor name, or not twice")
            .tensor(name)
            .advice("rename the tensor in the models")),
        None => Ok(()),
    }
}

/// Which tensors go into which shard.
fn fill(sizes: &[u64], shard_size: u64) -> Result<Vec<Vec<usize>>> {
    let limit = if shard_size == 0 { u64::MAX } else { shard_size };
    // Leaves room for a header before every offset, so that no later sum overflows.
    let most = u64::MAX - 2 * MAX_HEADER;
    let mut shards = Vec::new();
    let mut shard = Vec::new();
    let mut bytes = 0_u64;
    for (tensor, &size) in sizes.iter().enumerate() {
        if !shard.is_empty() && bytes.saturating_add(size) > limit {
            shards.push(std::mem::take(&mut shard));
            bytes = 0;
        }
        shard.push(tensor);
        bytes = bytes.saturating_add(size);
        if bytes > most {
            return Err(Error::plan("the output's size overflows").advice("merge fewer layers"));
        }
    }
    shards.push(shard);
    Ok(shards)
}

/// Writes the text of the header of output shard `index` of `plan`.
pub fn put_header(plan: &Plan, index: usize, out: &mut dyn Write) -> fmt::Result {
    put(out, parts_of(plan, index))
}

/// Bytes of the length and the header of output shard `index` of `plan`.
pub fn header_bytes(plan: &Plan, index: usize) -> Result<u64> {
    measure(parts_of(plan, index))
}

/// The header of a shard that holds `tensors` in that order, without a gap.
pub fn header<'a>(tensors: impl Iterator<Item = Described<'a>> + Clone) -> Result<String> {
    let bytes = measure(tensors.clone())?;
    let mut text = String::new();
    put(&mut text, tensors).map_err(|_| Error::internal("a text cannot be written to"))?;
    text.extend(std::iter::repeat_n(' ', bytes as usize - PREFIX - text.len()));
    Ok(text)
}

fn parts_of(plan: &Plan, index: usize) -> impl Iterator<Item = Described<'_>> {
    plan.tensors_of_shard(index).map(|tensor| (tensor.name(), tensor.dtype(), tensor.shape()))
}

/// Bytes of the length and the header of a shard, which end on a page boundary.
fn measure<'a>(tensors: impl Iterator<Item = Described<'a>>) -> Result<u64> {
    let mut counted = Counted(0);
    put(&mut counted, tensors).map_err(|_| {
        Error::checkpoint("the tensor's size overflows").advice("merge fewer layers")
    })?;
    let bytes = (PREFIX as u64 + counted.0).next_multiple_of(PAGE as u64);
    if bytes - PREFIX as u64 > MAX_HEADER {
        return Err(Error::plan("a shard's header is longer than the format allows")
            .expected(format_args!("at most {MAX_HEADER} bytes"))
            .found(bytes - PREFIX as u64)
            .advice("choose a smaller shard size"));
    }
    Ok(bytes)
}

/// Counts the bytes of a text.
struct Counted(u64);

impl Write for Counted {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0 += text.len() as u64;
        Ok(())
    }
}

/// Writes the header of a shard that holds `tensors`; fails where their sizes overflow.
fn put<'a>(
    out: &mut (impl Write + ?Sized),
    tensors: impl Iterator<Item = Described<'a>>,
) -> fmt::Result {
    out.write_str(r#"{"__metadata__":{"format":"pt"}"#)?;
    let mut begin: u64 = 0;
    for (name, dtype, shape) in tensors {
        let bytes = checked_bytes(dtype, shape).map_err(|_| fmt::Error)?;
        let end = begin.checked_add(bytes).ok_or(fmt::Error)?;
        write!(out, ",{}:{{\"dtype\":\"{dtype}\",\"shape\":[", JsonText(name))?;
        for (at, extent) in shape.iter().enumerate() {
            write!(out, "{}{extent}", if at == 0 { "" } else { "," })?;
        }
        write!(out, "],\"data_offsets\":[{begin},{end}]}}")?;
        begin = end;
    }
    out.write_char('}')
}

/// A text as JSON has it.
struct JsonText<'a>(&'a str);

impl fmt::Display for JsonText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string(self.0).map_err(|_| fmt::Error)?)
    }
}

fn name_shards(shards: &mut [OutputShard], base_name: &str) {
    let count = shards.len();
    for (number, shard) in shards.iter_mut().enumerate() {
        shard.file_name = if count == 1 {
            format!("{base_name}.safetensors")
        } else {
            format!("{base_name}-{:05}-of-{count:05}.safetensors", number + 1)
        };
    }
}

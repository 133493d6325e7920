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
        let header_bytes = (PREFIX + header(described)?.len()) as u64;
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

/// The text of the header of output shard `index` of `plan`.
pub fn header_text(plan: &Plan, index: usize) -> Result<String> {
    let tensors = plan.tensors_of_shard(index);
    header(tensors.map(|tensor| (tensor.name(), tensor.dtype(), tensor.shape())))
}

/// The header of a shard that holds `tensors` in that order, without a gap.
pub fn header<'a>(tensors: impl Iterator<Item = (&'a str, DType, &'a [u64])>) -> Result<String> {
    let mut text = String::from(r#"{"__metadata__":{"format":"pt"}"#);
    let mut begin = 0;
    for (name, dtype, shape) in tensors {
        let end = begin + checked_bytes(dtype, shape)?;
        push_entry(&mut text, name, dtype, shape, [begin, end]);
        begin = end;
    }
    text.push('}');
    let padded = (PREFIX + text.len()).next_multiple_of(PAGE) - PREFIX;
    text.extend(std::iter::repeat_n(' ', padded - text.len()));
    if text.len() as u64 > MAX_HEADER {
        return Err(Error::plan("a shard's header is longer than the format allows")
            .expected(format_args!("at most {MAX_HEADER} bytes"))
            .found(text.len())
            .advice("choose a smaller shard size"));
    }
    Ok(text)
}

fn push_entry(text: &mut String, name: &str, dtype: DType, shape: &[u64], [begin, end]: [u64; 2]) {
    // A string cannot refuse what is written to it.
    let _ = write!(text, ",{}:", JsonText(name));
    let _ = write!(text, r#"{{"dtype":"{dtype}","shape":["#);
    for (at, extent) in shape.iter().enumerate() {
        let _ = write!(text, "{}{extent}", if at == 0 { "" } else { "," });
    }
    let _ = write!(text, r#"],"data_offsets":[{begin},{end}]}}"#);
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

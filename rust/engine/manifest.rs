//! The output tensors as the manifest lists them: JSON, a line each, written as it is made.

use std::io::{self, Write};

use serde::Serialize;

use super::digest::TensorDigest;
use crate::dtype::DType;
use crate::kernels::Comparison;
use crate::plan::{Plan, Tensor};

/// Bytes of a line at the most, besides what the header of the tensor's file has of it as well.
const LINE_BYTES: u64 = 384;

/// A tensor as the manifest has it.
#[derive(Serialize)]
struct Line<'a> {
    name: &'a str,
    file: &'a str,
    dtype: DType,
    shape: &'a [u64],
    /// Which of the plan's.
    settings: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    blake3: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    statistics: Option<Statistics>,
}

#[derive(Serialize)]
struct Statistics {
    nan: u64,
    infinite: u64,
    saturated: u64,
    changed: Option<u64>,
    relative_change: Option<f64>,
}

impl From<Comparison> for Statistics {
    fn from(found: Comparison) -> Self {
        Self {
            nan: found.nan,
            infinite: found.infinite,
            saturated: found.saturated,
            changed: (found.compared > 0).then_some(found.changed),
            relative_change: found.relative_change(),
        }
    }
}

/// Writes the list of the tensors of `plan`, in its order, with what is known of each.
pub fn put_tensors(
    plan: &Plan,
    digests: Option<&[Option<TensorDigest>]>,
    out: &mut impl Write,
) -> io::Result<()> {
    out.write_all(b"[")?;
    for (index, tensor) in plan.tensors().enumerate() {
        out.write_all(if index == 0 { b"\n" } else { b",\n" })?;
        let known = digests.and_then(|digests| digests[index].as_ref());
        serde_json::to_writer(&mut *out, &line(plan, tensor, known))?;
    }
    out.write_all(b"\n]")
}

/// Bytes that the list of the tensors of `plan` takes at the most.
pub fn most_bytes(plan: &Plan) -> u64 {
    let headers: u64 = plan.shards.iter().map(|shard| shard.header_bytes).sum();
    headers + plan.len() as u64 * LINE_BYTES
}

fn line<'a>(plan: &'a Plan, tensor: Tensor<'a>, known: Option<&TensorDigest>) -> Line<'a> {
    Line {
        name: tensor.name(),
        file: &plan.shards[tensor.shard()].file_name,
        dtype: tensor.dtype(),
        shape: tensor.shape(),
        settings: tensor.settings_index(),
        blake3: known.map(|known| blake3::Hash::from(known.blake3).to_hex().to_string()),
        statistics: known.and_then(|known| known.statistics).map(Statistics::from),
    }
}

//! The plan: what the engine executes, and what `plan`, `merge` and a later verifier share.
//!
//! Python resolves recipe, names and parameters into a plan; the engine knows no YAML, no layer
//! numbers and no model names. A plan is plain data, serialised as JSON with a version number.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::dtype::DType;

/// The version of the plan's schema.
pub const PLAN_VERSION: u32 = 1;

/// Parameter values by name, resolved for one tensor.
pub type Parameters = Map<String, Value>;

/// A whole merge: every output tensor, where its sources lie, and where it goes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// [`PLAN_VERSION`].
    pub version: u32,
    /// The merge method's name.
    pub method: String,
    /// The seed of random masks.
    pub seed: u64,
    /// Every file that must stay as it is: those that sources lie in, then configs and indexes.
    pub files: Vec<InputFile>,
    /// The output tensors, in the donor's order.
    pub tensors: Vec<OutputTensor>,
    /// The output shards, in order.
    pub shards: Vec<OutputShard>,
    /// Whether arithmetic is in f64 whatever the types are.
    #[serde(default)]
    pub in_f64: bool,
}

/// A file as it was when it was first read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InputFile {
    /// The path it was opened at.
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
    /// Modification time, nanoseconds since the epoch.
    pub modified_ns: i64,
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
}

/// One output tensor.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutputTensor {
    /// Its name.
    pub name: String,
    /// Its shape, which is also the shape of every source.
    pub shape: Vec<u64>,
    /// Its element type.
    pub dtype: DType,
    /// Index into [`Plan::shards`].
    pub shard: usize,
    /// First byte in the shard file.
    pub start: u64,
    /// The tensors it is made of, in listed order.
    pub sources: Vec<SourceTensor>,
    /// Which source is the base model's.
    pub base: Option<usize>,
    /// The method's shared parameters.
    pub parameters: Parameters,
}

/// One input of an output tensor.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceTensor {
    /// The model it belongs to, as the recipe writes it; for messages.
    pub model: String,
    /// The name it has there.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Index into [`Plan::files`].
    pub file: usize,
    /// First byte in that file.
    pub start: u64,
    /// The method's parameters for this input.
    pub parameters: Parameters,
}

/// One output file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutputShard {
    /// Its final name.
    pub file_name: String,
    /// The JSON header, padded with spaces so that the data begin on a 4 KiB boundary.
    pub header: String,
    /// Bytes of the whole file.
    pub size: u64,
}

impl OutputTensor {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

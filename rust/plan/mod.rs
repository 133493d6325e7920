//! The plan: what the engine executes, and what `plan`, `merge` and a later verifier share.
//!
//! Python resolves recipe, names and parameters into a plan; the engine knows no YAML, no layer
//! numbers and no model names. A plan is one table, held once: a model with experts has 100,000
//! tensors, so a row is some fifty bytes. Names, models, shapes and the few distinct settings are
//! interned, and a row refers to them. What a tensor is made of are nodes of a source tree: ranges of
//! bytes, as they are or with an adapter's product added, and rows by token of several such ranges.

mod adapted;
mod build;
mod names;
mod rows;
mod saved;

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub(crate) use adapted::MAX_DIMENSIONS;
pub use adapted::{Adapted, Factor, Magnitude, Replaced, Strides, Term};
pub use build::{Builder, ByToken, Input};
pub use names::Names;
pub use rows::{MOST_ROWS, Origin, RowMap};
pub use saved::{load, save, save_effects};

use crate::dtype::DType;
use crate::error::Result;

/// The version of the plan's schema.
pub const PLAN_VERSION: u32 = 6;

/// Parameter values by name, resolved for one tensor.
pub type Parameters = Map<String, Value>;

/// A whole merge: every output tensor, where its sources lie, and where it goes.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// The merge method's name.
    pub method: String,
    /// Where the method is written, if it is none of the crate's own.
    pub source: Option<MethodSource>,
    /// The seed of random masks.
    pub seed: u64,
    /// Every file that must stay as it is: those that sources lie in, then configs and indexes.
    pub files: Vec<InputFile>,
    /// The models, as the recipe writes them; for messages.
    pub models: Vec<String>,
    /// The output shards, in order.
    pub shards: Vec<OutputShard>,
    /// Whether arithmetic is in f64 whatever the types are.
    pub in_f64: bool,
    names: Names,
    shapes: Vec<Vec<u64>>,
    settings: Vec<Settings>,
    kinds: Vec<Kind>,
    formulas: Vec<Formula>,
    nodes: Vec<Node>,
    /// What rows by token are taken from; those of each node one after the other.
    parts: Vec<Part>,
    maps: Vec<Arc<RowMap>>,
    /// What adapters make of tensors.
    adapted: Vec<Arc<Adapted>>,
    /// Nodes that are inputs of tensors, those of each tensor one after the other.
    inputs: Vec<u32>,
    /// The output tensors, in the donor's order.
    rows: Vec<Row>,
    /// The rows as they lie in the files. They differ within a shard, by their sizes of element.
    by_place: Vec<u32>,
}

/// The parameters of some tensors, and where each of them comes from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    /// The method's shared parameters.
    pub shared: Arc<Parameters>,
    /// The method's parameters for each input.
    pub own: Vec<Arc<Parameters>>,
    /// Where in the recipe they come from; for people.
    pub origin: Value,
}

/// Where a merge method is written that is none of the crate's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MethodSource {
    /// The module that it is in.
    pub module: String,
    /// Its name there.
    pub function: String,
    /// A digest of its source, in hexadecimal.
    pub digest: String,
}

/// A function of numbers that the author of a formula wrote.
pub type HostFunction = Arc<dyn Fn(&[f64]) -> Vec<f64> + Send + Sync>;

/// A formula as plain data, as a method that is none of the crate's own hands it over.
#[derive(Clone)]
pub struct Formula {
    /// Its nodes as JSON; `formula::listing` reads them.
    pub nodes: Arc<str>,
    /// What its `compute` nodes call.
    pub functions: Vec<HostFunction>,
    /// What makes the output instead, of a method that the language of formulas has no words for.
    pub arrays: Option<ArrayFunction>,
}

impl fmt::Debug for Formula {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.nodes)?;
        let calls = self.functions.len() + usize::from(self.arrays.is_some());
        (0..calls).try_for_each(|function| write!(f, " f{function}()"))
    }
}

/// A function that makes elements of the output of the same elements of every input.
#[derive(Clone)]
pub struct ArrayFunction {
    /// Makes them.
    pub call: Arc<dyn Fn(&mut ArrayCall<'_>) + Send + Sync>,
    /// Whether it has to have the whole tensor at once, and not some rows of it.
    pub whole: bool,
}

impl fmt::Debug for ArrayFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.whole { "of a tensor" } else { "of rows" })
    }
}

/// What an [`ArrayFunction`] gets, and where its result goes.
#[derive(Debug)]
pub struct ArrayCall<'a> {
    /// The shape of each array.
    pub shape: &'a [u64],
    /// Type and bytes of each input.
    pub inputs: &'a [(DType, &'a [u8])],
    /// Whether to compute in f64.
    pub double: bool,
    /// Type and bytes of the output.
    pub output: (DType, &'a mut [u8]),
}

/// All that the formula of a tensor depends on: a method makes one of it, however many tensors are of
/// that kind.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Kind {
    settings: u32,
    shape: u32,
    dtype: DType,
    base: Option<u32>,
    inputs: Vec<DType>,
    /// The formula, where the method is none of the crate's own.
    formula: Option<u32>,
}

/// A node of a source tree: elements of a type and shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    Bytes(ByteRange),
    Rows(Gathered),
}

/// A tensor of a file, as it is or adapted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ByteRange {
    model: u32,
    name: u32,
    file: u32,
    shape: u32,
    dtype: DType,
    start: u64,
    adapted: Option<u32>,
}

/// Rows by token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Gathered {
    model: u32,
    name: u32,
    shape: u32,
    dtype: DType,
    map: u32,
    /// The first of its parts, how many there are, and which of them is the model's own.
    parts: u32,
    count: u32,
    own: u32,
}

/// A tensor that rows are taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Part {
    /// Index into [`Plan::files`].
    pub file: u32,
    /// First byte in that file.
    pub start: u64,
    /// Its element type; where it is adapted, that of the result.
    pub dtype: DType,
    /// How many rows it has.
    pub rows: u64,
    /// What an adapter makes of it; see [`Builder::add_adapted`].
    pub adapted: Option<u32>,
}

/// An output tensor.
#[derive(Clone, Copy, Debug)]
struct Row {
    name: u32,
    kind: u32,
    /// The first of its inputs.
    inputs: u32,
    shard: u32,
    start: u64,
}

/// An output tensor of a plan.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    plan: &'a Plan,
    row: &'a Row,
}

/// Which rows an input takes, and from where.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rows<'a> {
    /// Which they are.
    pub map: &'a Arc<RowMap>,
    /// What they are taken from.
    pub parts: &'a [Part],
    /// What adapters make of these, by number.
    pub adapted: &'a [Arc<Adapted>],
}

/// An input that an output tensor is made of: a range of bytes, as it is or adapted, or rows by token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Source<'a> {
    /// The model it belongs to, as an index into [`Plan::models`].
    pub model: usize,
    /// The name it has there.
    pub name: &'a str,
    /// Its element type; where it is adapted, that of the result.
    pub dtype: DType,
    /// Index into [`Plan::files`].
    pub file: usize,
    /// First byte in that file.
    pub start: u64,
    /// What an adapter makes of that range.
    pub adapted: Option<&'a Arc<Adapted>>,
    /// The rows, where they are not those of that range.
    pub rows: Option<Rows<'a>>,
}

impl<'a> Source<'a> {
    /// Bytes of an element in the file.
    pub fn width(&self) -> u64 {
        self.stored().size() as u64
    }

    /// The element type in the file; of rows, that in which they are handed on.
    pub fn stored(&self) -> DType {
        self.adapted.map_or(self.dtype, |adapted| adapted.dtype)
    }

    /// What adapters make of it, or of parts of it.
    pub fn all_adapted(self) -> impl Iterator<Item = &'a Arc<Adapted>> + use<'a> {
        let of_part = |rows: Rows<'a>| {
            rows.parts.iter().filter_map(move |part| Some(&rows.adapted[part.adapted? as usize]))
        };
        self.adapted.into_iter().chain(self.rows.into_iter().flat_map(of_part))
    }

    /// The files that it lies in.
    pub fn files(self) -> impl Iterator<Item = usize> + use<'a> {
        let parts = self.rows.map_or(&[][..], |rows| rows.parts);
        let adapted = self.all_adapted().flat_map(|adapted| adapted.files());
        let others = parts.iter().map(|part| part.file).chain(adapted);
        std::iter::once(self.file).chain(others.map(|file| file as usize))
    }
}

impl Plan {
    /// A plan without tensors.
    pub fn new(method: String, seed: u64, files: Vec<InputFile>, models: Vec<String>) -> Self {
        Self { method, seed, files, models, ..Self::default() }
    }

    /// The same plan, of which files that were not here lie at these paths now, by their labels.
    pub fn placed(&self, places: &HashMap<String, PathBuf>) -> Result<Self> {
        let files = self.files.iter().map(|file| file.place(places)).collect::<Result<_>>()?;
        Ok(Self { files, ..self.clone() })
    }

    /// The files that these tensors are made of, in the order of their first use.
    pub fn files_of<'a>(&self, tensors: impl Iterator<Item = Tensor<'a>>) -> Vec<usize> {
        let mut is_new = vec![true; self.files.len()];
        let files = tensors.flat_map(Tensor::sources).flat_map(Source::files);
        files.filter(|&file| std::mem::take(&mut is_new[file])).collect()
    }

    /// How many output tensors there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Output tensor `index`, in the donor's order.
    pub fn tensor(&self, index: usize) -> Tensor<'_> {
        Tensor { plan: self, row: &self.rows[index] }
    }

    /// The output tensors in the donor's order, which is that of the shards.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = Tensor<'_>> {
        self.rows.iter().map(|row| Tensor { plan: self, row })
    }

    /// The indices of the tensors as they lie in the files.
    pub fn by_place(&self) -> &[u32] {
        &self.by_place
    }

    /// The tensors of output shard `index`, as they lie there.
    pub fn tensors_of_shard(&self, index: usize) -> impl ExactSizeIterator<Item = Tensor<'_>> {
        self.by_place_in(index).map(|row| self.tensor(row))
    }

    /// The indices of the tensors of output shard `index`, as they lie there.
    pub fn by_place_in(&self, index: usize) -> impl ExactSizeIterator<Item = usize> {
        let shard = |&row: &u32| self.rows[row as usize].shard as usize;
        let first = self.by_place.partition_point(|row| shard(row) < index);
        let end = self.by_place.partition_point(|row| shard(row) <= index);
        self.by_place[first..end].iter().map(|&row| row as usize)
    }

    /// Bytes of all sources; no more than a number can say, whatever a saved plan claims.
    pub fn bytes_read(&self) -> u64 {
        self.tensors().map(Tensor::source_bytes).fold(0, u64::saturating_add)
    }

    /// Bytes of all output tensors.
    pub fn bytes_written(&self) -> u64 {
        self.tensors().map(Tensor::bytes).fold(0, u64::saturating_add)
    }

    /// What an adapter makes of a tensor, by its number.
    pub(crate) fn adapted(&self, number: u32) -> &Adapted {
        &self.adapted[number as usize]
    }

    /// The distinct settings.
    pub fn settings(&self) -> &[Settings] {
        &self.settings
    }

    /// For each input of each of the [settings](Self::settings), the model that it is of, if all tensors
    /// with those settings take it from the same one.
    pub fn models_of_settings(&self) -> Vec<Vec<Option<usize>>> {
        let mut models: Vec<Vec<Option<usize>>> = vec![Vec::new(); self.settings.len()];
        for tensor in self.tensors() {
            let known = &mut models[tensor.settings_index()];
            if known.is_empty() {
                known.extend(tensor.sources().map(|source| Some(source.model)));
            }
            for (known, source) in known.iter_mut().zip(tensor.sources()) {
                *known = known.filter(|&model| model == source.model);
            }
        }
        models
    }

    /// How many kinds of tensors there are.
    pub(crate) fn kinds(&self) -> usize {
        self.kinds.len()
    }
}

impl<'a> Tensor<'a> {
    /// Its name.
    pub fn name(self) -> &'a str {
        self.plan.names.get(self.row.name)
    }

    /// Its shape, which is also the shape of every source.
    pub fn shape(self) -> &'a [u64] {
        &self.plan.shapes[self.kind_of().shape as usize]
    }

    /// Its element type.
    pub fn dtype(self) -> DType {
        self.kind_of().dtype
    }

    /// Number of elements.
    pub fn elements(self) -> u64 {
        self.shape().iter().product()
    }

    /// Bytes of the output.
    pub fn bytes(self) -> u64 {
        self.elements() * self.dtype().size() as u64
    }

    /// Bytes of all sources.
    pub fn source_bytes(self) -> u64 {
        let elements = self.elements();
        // Models that differ by their adapters alone read the same bytes.
        let mut seen = Vec::new();
        let bytes = self.sources().map(|source| {
            let place = (source.file, source.start);
            let is_again = source.rows.is_none() && seen.contains(&place);
            seen.push(place);
            let own = if is_again { 0 } else { elements.saturating_mul(source.width()) };
            own.saturating_add(source.adapted.map_or(0, |adapted| adapted.bytes(elements)))
        });
        bytes.fold(0, u64::saturating_add)
    }

    /// Index into [`Plan::shards`].
    pub fn shard(self) -> usize {
        self.row.shard as usize
    }

    /// First byte in the shard file.
    pub fn start(self) -> u64 {
        self.row.start
    }

    /// Which source is the base model's.
    pub fn base(self) -> Option<usize> {
        self.kind_of().base.map(|base| base as usize)
    }

    /// The parameters.
    pub fn settings(self) -> &'a Settings {
        &self.plan.settings[self.kind_of().settings as usize]
    }

    /// Which of [`Plan::settings`] those are.
    pub fn settings_index(self) -> usize {
        self.kind_of().settings as usize
    }

    /// The tensors it is made of, in listed order.
    pub fn sources(self) -> impl ExactSizeIterator<Item = Source<'a>> {
        let plan = self.plan;
        let first = self.row.inputs as usize;
        plan.inputs[first..first + self.kind_of().inputs.len()].iter().map(|&node| {
            match plan.nodes[node as usize] {
                Node::Bytes(range) => Source {
                    model: range.model as usize,
                    name: plan.names.get(range.name),
                    dtype: range.dtype,
                    file: range.file as usize,
                    start: range.start,
                    adapted: range.adapted.map(|number| &plan.adapted[number as usize]),
                    rows: None,
                },
                Node::Rows(rows) => {
                    let parts = &plan.parts[rows.parts as usize..][..rows.count as usize];
                    let own = parts[rows.own as usize];
                    Source {
                        model: rows.model as usize,
                        name: plan.names.get(rows.name),
                        dtype: rows.dtype,
                        file: own.file as usize,
                        start: own.start,
                        adapted: None,
                        rows: Some(Rows {
                            map: &plan.maps[rows.map as usize],
                            parts,
                            adapted: &plan.adapted,
                        }),
                    }
                }
            }
        })
    }

    /// Whether its inputs are the bytes of files as they are.
    pub fn is_plain(self) -> bool {
        self.sources().all(|source| source.rows.is_none() && source.adapted.is_none())
    }

    /// The formula, where the method is none of the crate's own.
    pub fn formula(self) -> Option<&'a Formula> {
        self.kind_of().formula.map(|formula| &self.plan.formulas[formula as usize])
    }

    /// Its kind: tensors of one kind are made by one formula.
    pub(crate) fn kind(self) -> usize {
        self.row.kind as usize
    }

    fn kind_of(self) -> &'a Kind {
        &self.plan.kinds[self.row.kind as usize]
    }

    /// It with everything that it refers to, as a method reads it.
    pub fn to_owned(self) -> OutputTensor {
        let settings = self.settings();
        let source = |(source, own): (Source<'_>, &Arc<Parameters>)| SourceTensor {
            model: self.plan.models[source.model].clone(),
            name: source.name.to_owned(),
            dtype: source.dtype,
            file: source.file,
            start: source.start,
            parameters: Parameters::clone(own),
        };
        OutputTensor {
            name: self.name().to_owned(),
            shape: self.shape().to_vec(),
            dtype: self.dtype(),
            shard: self.shard(),
            start: self.start(),
            sources: self.sources().zip(&settings.own).map(source).collect(),
            base: self.base(),
            parameters: Parameters::clone(&settings.shared),
            formula: self.formula().cloned(),
        }
    }
}

/// A file as it was when it was first read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InputFile {
    /// The path it was opened at; of one that is not here, where it would be.
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
    /// Modification time, nanoseconds since the epoch.
    pub modified_ns: i64,
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Of a file that is not here, of which only the header was read: what it is elsewhere. Before
    /// its bytes are read, it has to be [placed](InputFile::place).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<Remote>,
}

/// A file elsewhere: on the Hub, or in a store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Remote {
    /// What it is called, by a name that no other file has.
    pub label: String,
    /// What the server calls its content.
    pub etag: String,
}

/// One output tensor with everything that a row refers to: what a method makes a formula of.
#[derive(Clone, Debug)]
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
    /// The formula, where the method is none of the crate's own.
    pub formula: Option<Formula>,
}

/// One input of an output tensor.
#[derive(Clone, Debug)]
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputShard {
    /// Its final name.
    pub file_name: String,
    /// Bytes of the length and the header, which end on a 4 KiB boundary. The text of the header
    /// follows from the tensors.
    pub header_bytes: u64,
    /// Bytes of the whole file.
    pub size: u64,
}

impl OutputTensor {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

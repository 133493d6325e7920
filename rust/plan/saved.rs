//! A plan as a file: JSON, which is checked when it is read, since anyone may have written it.
//!
//! An input of a tensor is an expression, `["bytes", model, name, type, shape, file, start]`, so that
//! further kinds of nodes need no other format.

use std::collections::HashSet;
use std::io::{self, Write};

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use super::{
    Builder, Input, InputFile, Node, OutputShard, PLAN_VERSION, Parameters, Plan, Settings, Tensor,
};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// What to do about a plan that is not as it should be.
const MAKE_ANEW: &str = "make the plan anew from its recipe";

/// A saved plan, and what belongs to it besides the table, which is large: it stays text until its
/// version is known.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved<'a> {
    oxmerge_plan: Value,
    output: Value,
    #[serde(borrow)]
    table: &'a RawValue,
}

/// The table as it is saved.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    method: String,
    seed: u64,
    in_f64: bool,
    files: Vec<InputFile>,
    models: Vec<String>,
    names: Vec<String>,
    shapes: Vec<Vec<u64>>,
    settings: Vec<SavedSettings>,
    shards: Vec<SavedShard>,
    tensors: Vec<SavedTensor>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedSettings {
    shared: Parameters,
    own: Vec<Parameters>,
    origin: Value,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedShard {
    file_name: String,
    size: u64,
}

/// Name, type, shape, shard, first byte, settings, base, inputs.
#[derive(Deserialize)]
struct SavedTensor(usize, DType, usize, usize, u64, usize, Option<usize>, Vec<SavedNode>);

/// A node of a source tree.
struct SavedNode {
    model: usize,
    name: usize,
    dtype: DType,
    shape: usize,
    file: usize,
    start: u64,
}

impl<'de> Deserialize<'de> for SavedNode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        type Bytes = (String, usize, usize, DType, usize, usize, u64);
        let (kind, model, name, dtype, shape, file, start) = Bytes::deserialize(deserializer)?;
        if kind != "bytes" {
            return Err(D::Error::custom(format_args!("there is no kind of input `{kind}`")));
        }
        Ok(Self { model, name, dtype, shape, file, start })
    }
}

/// Writes the table of `plan`: the same plan gives the same bytes.
pub fn save(plan: &Plan, out: &mut impl Write) -> io::Result<()> {
    let settings: Vec<_> = plan
        .settings
        .iter()
        .map(|settings| {
            let own: Vec<&Parameters> = settings.own.iter().map(|own| &**own).collect();
            serde_json::json!({
                "shared": &*settings.shared, "own": own, "origin": settings.origin,
            })
        })
        .collect();
    let shards: Vec<_> = plan
        .shards
        .iter()
        .map(|shard| serde_json::json!({ "file_name": shard.file_name, "size": shard.size }))
        .collect();
    out.write_all(b"{\"method\":")?;
    put(out, &plan.method)?;
    write!(out, ",\"seed\":{},\"in_f64\":{},\"files\":", plan.seed, plan.in_f64)?;
    put_lines(out, plan.files.iter())?;
    out.write_all(b",\"models\":")?;
    put(out, &plan.models)?;
    out.write_all(b",\"shapes\":")?;
    put(out, &plan.shapes)?;
    out.write_all(b",\"settings\":")?;
    put_lines(out, settings.iter())?;
    out.write_all(b",\"shards\":")?;
    put_lines(out, shards.iter())?;
    out.write_all(b",\"names\":")?;
    put_lines(out, plan.names.iter())?;
    out.write_all(b",\"tensors\":")?;
    put_lines(out, plan.tensors().map(described))?;
    out.write_all(b"}")
}

fn described(tensor: Tensor<'_>) -> impl Serialize {
    let Tensor { plan, row } = tensor;
    let kind = &plan.kinds[row.kind as usize];
    let first = row.inputs as usize;
    let nodes = &plan.inputs[first..first + kind.inputs.len()];
    let inputs: Vec<_> = nodes
        .iter()
        .map(|&node| {
            let Node::Bytes(range) = plan.nodes[node as usize];
            ("bytes", range.model, range.name, range.dtype, range.shape, range.file, range.start)
        })
        .collect();
    let place = (row.shard, row.start);
    (row.name, kind.dtype, kind.shape, place.0, place.1, kind.settings, kind.base, inputs)
}

fn put(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(out, value).map_err(io::Error::other)
}

/// A list with a line for each item.
fn put_lines(out: &mut impl Write, items: impl Iterator<Item = impl Serialize>) -> io::Result<()> {
    out.write_all(b"[")?;
    for (at, item) in items.enumerate() {
        out.write_all(if at == 0 { b"\n" } else { b",\n" })?;
        put(out, &item)?;
    }
    out.write_all(b"\n]")
}

/// Reads a saved plan, and what was saved with it. Nothing in it is believed before it was compared
/// with everything else.
pub fn load(
    text: &str,
    header_bytes: impl Fn(&Plan, usize) -> Result<u64>,
) -> Result<(Plan, Value)> {
    read(text, header_bytes).map_err(|error| error.advice(MAKE_ANEW))
}

fn read(text: &str, header_bytes: impl Fn(&Plan, usize) -> Result<u64>) -> Result<(Plan, Value)> {
    let saved: Saved<'_> = serde_json::from_str(text)
        .map_err(|error| Error::plan(format!("this is no plan that oxmerge saved: {error}")))?;
    if saved.oxmerge_plan != PLAN_VERSION {
        return Err(Error::plan("the plan was saved by another version of oxmerge")
            .expected(format_args!("plan version {PLAN_VERSION}"))
            .found(saved.oxmerge_plan));
    }
    let table: Table = serde_json::from_str(saved.table.get())
        .map_err(|error| Error::plan(format!("the plan's table cannot be read: {error}")))?;
    let plan = check_shards(build(table)?, header_bytes)?;
    Ok((plan, saved.output))
}

/// The plan that a table describes, when all that it refers to is there.
fn build(table: Table) -> Result<Plan> {
    let Table { method, seed, in_f64, files, models, names, shapes, settings, shards, tensors } =
        table;
    check_file_names(&shards)?;
    let mut builder = Builder::new(Plan::new(method, seed, files, models));
    let owners: Vec<usize> = settings.iter().map(|settings| settings.own.len()).collect();
    for SavedSettings { shared, own, origin } in settings {
        let own = own.into_iter().map(Into::into).collect();
        builder.add_settings(Settings { shared: shared.into(), own, origin });
    }
    let name_of = |number: usize| known("name", &names, number).map(String::as_str);
    let mut places = Vec::with_capacity(tensors.len());
    for (at, tensor) in tensors.into_iter().enumerate() {
        let SavedTensor(name, dtype, shape, shard, start, settings, base, inputs) = tensor;
        let name = name_of(name).map_err(|error| error.found(format!("in tensor {at}")))?;
        let place = || -> Result<()> {
            known("shard", &shards, shard)?;
            let own = *known("settings", &owners, settings)?;
            if own != inputs.len() || inputs.is_empty() {
                return Err(wrong("a tensor has parameters for other inputs than it has")
                    .expected(format_args!("{own} inputs"))
                    .found(inputs.len()));
            }
            if let Some(base) = base.filter(|&base| base >= inputs.len()) {
                return Err(wrong("a tensor's base is none of its inputs").found(base));
            }
            let shape = known("shape", &shapes, shape)?;
            for input in &inputs {
                check_input(builder.plan(), input, dtype, shape, &shapes)?;
                name_of(input.name)?;
            }
            Ok(())
        };
        place().map_err(|error| error.tensor(name))?;
        if !builder.take_name(name) || name == "__metadata__" {
            return Err(wrong("the output cannot have this tensor name, or not twice").tensor(name));
        }
        let inputs = inputs.iter().map(|input| Input {
            model: input.model,
            name: &names[input.name],
            dtype: input.dtype,
            file: input.file,
            start: input.start,
        });
        builder.push(name, dtype, &shapes[shape], settings as u32, base, inputs);
        places.push((shard, start));
    }
    if places.is_empty() {
        return Err(wrong("the plan has no tensors"));
    }
    let mut plan = builder.place(&places)?;
    plan.in_f64 = in_f64;
    let shard = |SavedShard { file_name, size }| OutputShard { file_name, header_bytes: 0, size };
    plan.shards = shards.into_iter().map(shard).collect();
    Ok(plan)
}

/// Checks that an input is there, and that its elements can become the output's.
fn check_input(
    plan: &Plan,
    input: &SavedNode,
    dtype: DType,
    shape: &[u64],
    shapes: &[Vec<u64>],
) -> Result<()> {
    known("model", &plan.models, input.model)?;
    let file = known("file", &plan.files, input.file)?;
    if known("shape", shapes, input.shape)? != shape {
        return Err(wrong("an input has another shape than the tensor")
            .expected(format_args!("{shape:?}"))
            .found(format_args!("{:?}", shapes[input.shape])));
    }
    let fits = if dtype.is_float() { input.dtype.is_float() } else { input.dtype == dtype };
    if !fits {
        return Err(wrong("an input's type cannot become the tensor's")
            .expected(if dtype.is_float() { "a float type" } else { dtype.name() })
            .found(input.dtype));
    }
    let end = bytes(input.dtype, shape).and_then(|bytes| input.start.checked_add(bytes));
    if end.is_none_or(|end| end > file.size) {
        return Err(wrong("an input lies past the end of its file")
            .file(&file.path)
            .expected(format_args!("at most {} bytes", file.size))
            .found(format_args!("{} {shape:?} from byte {}", input.dtype, input.start)));
    }
    Ok(())
}

/// Checks that the tensors fill the shards without overlap or hole, behind their headers.
fn check_shards(
    mut plan: Plan,
    header_bytes: impl Fn(&Plan, usize) -> Result<u64>,
) -> Result<Plan> {
    for index in 0..plan.shards.len() {
        let header = header_bytes(&plan, index)?;
        if plan.tensors_of_shard(index).next().is_none() {
            let file_name = &plan.shards[index].file_name;
            return Err(wrong("an output file has no tensors").file(file_name));
        }
        let mut end = header;
        for tensor in plan.tensors_of_shard(index) {
            if tensor.start() != end {
                let what = if tensor.start() < end { "overlaps" } else { "leaves a hole after" };
                let message = format!("an output tensor {what} what is before it in its file");
                return Err(wrong(message)
                    .tensor(tensor.name())
                    .expected(format_args!("byte {end}"))
                    .found(tensor.start()));
            }
            let bytes = bytes(tensor.dtype(), tensor.shape());
            end = bytes
                .and_then(|bytes| end.checked_add(bytes))
                .ok_or_else(|| wrong("an output tensor's size overflows").tensor(tensor.name()))?;
        }
        let shard = &mut plan.shards[index];
        if shard.size != end {
            return Err(wrong("an output file has another size than its tensors")
                .file(&shard.file_name)
                .expected(format_args!("{end} bytes"))
                .found(shard.size));
        }
        shard.header_bytes = header;
    }
    Ok(plan)
}

/// Checks that output files have plain names of their own.
fn check_file_names(shards: &[SavedShard]) -> Result<()> {
    let mut seen = HashSet::new();
    for SavedShard { file_name, .. } in shards {
        let is_plain = !file_name.contains(['/', '\\', '\0']) && !file_name.starts_with('.');
        if !is_plain || !file_name.ends_with(".safetensors") {
            return Err(wrong("an output file must have a plain name that ends in `.safetensors`")
                .found(format_args!("`{}`", file_name.escape_debug())));
        }
        if !seen.insert(file_name) {
            return Err(wrong("two output files have one name").found(format!("`{file_name}`")));
        }
    }
    Ok(())
}

fn bytes(dtype: DType, shape: &[u64]) -> Option<u64> {
    shape.iter().try_fold(dtype.size() as u64, |bytes, &extent| bytes.checked_mul(extent))
}

fn known<'a, T>(what: &str, all: &'a [T], number: usize) -> Result<&'a T> {
    all.get(number).ok_or_else(|| {
        wrong(format!("the plan has no {what} of that number"))
            .expected(format_args!("less than {}", all.len()))
            .found(number)
    })
}

#[cold]
fn wrong(message: impl Into<String>) -> Error {
    Error::plan(message)
}

//! A plan as a file: JSON, which is checked when it is read, since anyone may have written it.
//!
//! An input of a tensor is an expression, `["bytes", model, name, type, shape, file, start]`,
//! `["adapted", model, name, type, shape, file, start, adapted]` or
//! `["rows", model, name, type, shape, map, own part, parts]`, so that further kinds of nodes need no
//! other format.

use std::collections::HashSet;
use std::fmt;
use std::io::{self, Write};

use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use super::{
    Adapted, Builder, ByToken, ByteRange, Gathered, Input, InputFile, MethodSource, Node, Origin,
    OutputShard, PLAN_VERSION, Parameters, Part, Plan, RowMap, Settings, Tensor,
};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// What to do about a plan that is not as it should be.
const MAKE_ANEW: &str = "make the plan anew from its recipe";

/// The most values that a table has. One of 100,000 tensors of three models each has four million.
const MOST_VALUES: usize = 24 << 20;
/// The most values of settings, and of what is saved beside a table. They may be of any kind, and
/// take more memory than those of a table.
const MOST_LOOSE: usize = 4 << 20;

/// A saved plan, and what belongs to it besides the table. Both stay text until the version is known.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved<'a> {
    oxmerge_plan: Value,
    #[serde(borrow)]
    output: &'a RawValue,
    #[serde(borrow)]
    table: &'a RawValue,
}

/// The table as it is saved.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table<'a> {
    method: String,
    source: Option<MethodSource>,
    seed: u64,
    in_f64: bool,
    files: Vec<InputFile>,
    models: Vec<String>,
    names: Vec<String>,
    shapes: Vec<Vec<u64>>,
    #[serde(borrow)]
    settings: &'a RawValue,
    shards: Vec<SavedShard>,
    maps: Vec<Vec<(u32, Origin)>>,
    adapted: Vec<Adapted>,
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

/// A node of a source tree: kind, model, name, type, shape; and what the kind asks for.
struct SavedNode {
    model: usize,
    name: usize,
    dtype: DType,
    shape: usize,
    content: Content,
}

enum Content {
    /// File, first byte; what an adapter makes of it.
    Bytes(usize, u64, Option<usize>),
    /// Map, the model's own part, parts.
    Rows(usize, usize, Vec<SavedPart>),
}

/// File, first byte, type, rows; what an adapter makes of it.
#[derive(Deserialize)]
struct SavedPart(usize, u64, DType, u64, Option<usize>);

impl<'de> Deserialize<'de> for SavedNode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Parts;

        impl<'de> Visitor<'de> for Parts {
            type Value = SavedNode;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an input as a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<SavedNode, A::Error> {
                fn next<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(
                    list: &mut A,
                ) -> Result<T, A::Error> {
                    list.next_element()?.ok_or_else(|| A::Error::custom("an input ends early"))
                }
                let kind: String = next(&mut list)?;
                let (model, name) = (next(&mut list)?, next(&mut list)?);
                let (dtype, shape) = (next(&mut list)?, next(&mut list)?);
                let content = match &*kind {
                    "bytes" => Content::Bytes(next(&mut list)?, next(&mut list)?, None),
                    "adapted" => {
                        let (file, start) = (next(&mut list)?, next(&mut list)?);
                        Content::Bytes(file, start, Some(next(&mut list)?))
                    }
                    "rows" => Content::Rows(next(&mut list)?, next(&mut list)?, next(&mut list)?),
                    _ => {
                        let message = format_args!("there is no kind of input `{kind}`");
                        return Err(A::Error::custom(message));
                    }
                };
                Ok(SavedNode { model, name, dtype, shape, content })
            }
        }

        deserializer.deserialize_seq(Parts)
    }
}

/// Writes the table of `plan`: the same plan gives the same bytes.
pub fn save(plan: &Plan, out: &mut impl Write) -> io::Result<()> {
    write_table(plan, out, true)
}

/// Writes what of the table of `plan` decides the output: of files only their names and sizes, so that
/// it is the same on any machine, and not where in the recipe settings come from.
pub fn save_effects(plan: &Plan, out: &mut impl Write) -> io::Result<()> {
    write_table(plan, out, false)
}

fn write_table(plan: &Plan, out: &mut impl Write, whole: bool) -> io::Result<()> {
    let settings: Vec<_> = plan
        .settings
        .iter()
        .map(|settings| {
            let own: Vec<&Parameters> = settings.own.iter().map(|own| &**own).collect();
            let origin = if whole { &settings.origin } else { &Value::Null };
            serde_json::json!({ "shared": &*settings.shared, "own": own, "origin": origin })
        })
        .collect();
    let shards: Vec<_> = plan
        .shards
        .iter()
        .map(|shard| serde_json::json!({ "file_name": shard.file_name, "size": shard.size }))
        .collect();
    out.write_all(b"{\"method\":")?;
    put(out, &plan.method)?;
    if let Some(source) = &plan.source {
        out.write_all(b",\"source\":")?;
        put(out, source)?;
    }
    write!(out, ",\"seed\":{},\"in_f64\":{},\"files\":", plan.seed, plan.in_f64)?;
    if whole {
        put_lines(out, plan.files.iter())?;
    } else {
        let name = |file: &InputFile| file.path.file_name().map(|name| name.display().to_string());
        put_lines(out, plan.files.iter().map(|file| (name(file), file.size)))?;
    }
    out.write_all(b",\"models\":")?;
    put(out, &plan.models)?;
    out.write_all(b",\"shapes\":")?;
    put(out, &plan.shapes)?;
    out.write_all(b",\"settings\":")?;
    put_lines(out, settings.iter())?;
    out.write_all(b",\"shards\":")?;
    put_lines(out, shards.iter())?;
    out.write_all(b",\"maps\":")?;
    let runs = |map: &RowMap| -> Vec<(u64, Origin)> {
        map.runs().map(|(rows, origin)| (rows.end - rows.start, origin.clone())).collect()
    };
    put_lines(out, plan.maps.iter().map(|map| runs(map)))?;
    out.write_all(b",\"adapted\":")?;
    put_lines(out, plan.adapted.iter().map(|adapted| &**adapted))?;
    out.write_all(b",\"names\":")?;
    put_lines(out, plan.names.iter())?;
    out.write_all(b",\"tensors\":")?;
    put_lines(out, plan.tensors().map(described))?;
    out.write_all(b"}")
}

/// A node as it is saved.
#[derive(Serialize)]
#[serde(untagged)]
enum Described {
    Bytes(&'static str, u32, u32, DType, u32, u32, u64),
    Adapted(&'static str, u32, u32, DType, u32, u32, u64, u32),
    Rows(&'static str, u32, u32, DType, u32, u32, u32, Vec<DescribedPart>),
}

type DescribedPart = (u32, u64, DType, u64, Option<u32>);

fn described(tensor: Tensor<'_>) -> impl Serialize {
    let Tensor { plan, row } = tensor;
    let kind = &plan.kinds[row.kind as usize];
    let first = row.inputs as usize;
    let nodes = &plan.inputs[first..first + kind.inputs.len()];
    let inputs: Vec<_> = nodes
        .iter()
        .map(|&node| match plan.nodes[node as usize] {
            Node::Bytes(ByteRange { model, name, file, shape, dtype, start, adapted }) => {
                match adapted {
                    None => Described::Bytes("bytes", model, name, dtype, shape, file, start),
                    Some(adapted) => {
                        let kind = "adapted";
                        Described::Adapted(kind, model, name, dtype, shape, file, start, adapted)
                    }
                }
            }
            Node::Rows(Gathered { model, name, shape, dtype, map, parts, count, own }) => {
                let parts = &plan.parts[parts as usize..][..count as usize];
                let parts = parts
                    .iter()
                    .map(|part| (part.file, part.start, part.dtype, part.rows, part.adapted));
                Described::Rows("rows", model, name, dtype, shape, map, own, parts.collect())
            }
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
    let output = parsed("what is saved with the table", saved.output, MOST_LOOSE)?;
    let plan = build(parsed("the plan's table", saved.table, MOST_VALUES)?)?;
    Ok((check_shards(plan, header_bytes)?, output))
}

/// A part of a plan, unless it has more values than any real one: each value but the first has one of
/// three letters before it.
fn parsed<'a, T: Deserialize<'a>>(what: &str, text: &'a RawValue, most: usize) -> Result<T> {
    let values = text.get().bytes().filter(|byte| b",[{".contains(byte)).count();
    if values > most {
        let message = format!("{what} with more values than any plan has");
        return Err(Error::plan(message).expected(format_args!("at most {most}")).found(values));
    }
    serde_json::from_str(text.get())
        .map_err(|error| Error::plan(format!("{what} cannot be read: {error}")))
}

/// The plan that a table describes, when all that it refers to is there.
fn build(table: Table<'_>) -> Result<Plan> {
    let Table {
        method,
        source,
        seed,
        in_f64,
        files,
        models,
        names,
        shapes,
        settings,
        shards,
        maps,
        adapted,
        tensors,
    } = table;
    let settings: Vec<SavedSettings> = parsed("the plan's settings", settings, MOST_LOOSE)?;
    check_file_names(&shards)?;
    if files.iter().any(|file| file.path.as_os_str().as_encoded_bytes().contains(&0)) {
        return Err(wrong("no path of a file has a zero byte"));
    }
    let mut builder = Builder::new(Plan::new(method, seed, files, models));
    let owners: Vec<usize> = settings.iter().map(|settings| settings.own.len()).collect();
    for SavedSettings { shared, own, origin } in settings {
        if !is_origin(&origin, own.len()) {
            return Err(wrong("what says where parameters come from is not as it should be"));
        }
        let own = own.into_iter().map(Into::into).collect();
        builder.add_settings(Settings { shared: shared.into(), own, origin });
    }
    for runs in maps {
        builder.add_map(RowMap::of(runs.into_iter().map(Ok))?);
    }
    for adapted in adapted {
        builder.add_adapted(adapted);
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
                check_input(&builder, input, dtype, shape, &shapes)?;
                name_of(input.name)?;
            }
            // Of an input that fits its file, a wider output may still be too large for a number.
            bytes(dtype, shape).ok_or_else(|| wrong("an output tensor's size overflows"))?;
            Ok(())
        };
        place().map_err(|error| error.tensor(name))?;
        if !builder.take_name(name) || name == "__metadata__" {
            return Err(wrong("the output cannot have this tensor name, or not twice").tensor(name));
        }
        let parts: Vec<Vec<Part>> = inputs.iter().map(SavedNode::parts).collect();
        let inputs = inputs.iter().zip(&parts).map(|(input, parts)| {
            let (file, start, adapted, rows) = match input.content {
                Content::Bytes(file, start, adapted) => (file, start, adapted, None),
                Content::Rows(map, own, _) => {
                    let rows = ByToken { map: map as u32, parts, own };
                    (parts[own].file as usize, parts[own].start, None, Some(rows))
                }
            };
            let SavedNode { model, dtype, .. } = *input;
            let adapted = adapted.map(|number| number as u32);
            Input { model, name: &names[input.name], dtype, file, start, adapted, rows }
        });
        builder.push(name, dtype, &shapes[shape], settings as u32, base, inputs);
        places.push((shard, start));
    }
    if places.is_empty() {
        return Err(wrong("the plan has no tensors"));
    }
    let mut plan = builder.place(&places)?;
    (plan.in_f64, plan.source) = (in_f64, source);
    let shard = |SavedShard { file_name, size }| OutputShard { file_name, header_bytes: 0, size };
    plan.shards = shards.into_iter().map(shard).collect();
    Ok(plan)
}

/// Checks that an input is there, and that its elements can become the output's.
fn check_input(
    builder: &Builder,
    input: &SavedNode,
    dtype: DType,
    shape: &[u64],
    shapes: &[Vec<u64>],
) -> Result<()> {
    let plan = builder.plan();
    known("model", &plan.models, input.model)?;
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
    match &input.content {
        Content::Bytes(file, start, adapted) => {
            check_range(plan, *file, *start, input.dtype, *adapted, shape)
        }
        Content::Rows(map, own, parts) => {
            let map = known("map", &plan.maps, *map)?;
            known("part", parts, *own)?;
            let (rows, rest) = shape.split_first().unwrap_or((&0, &[]));
            if map.rows() != *rows || shape.is_empty() || shape.contains(&0) {
                return Err(wrong("an input has other rows than the tensor")
                    .expected(format_args!("{} rows that are not empty", map.rows()))
                    .found(format_args!("{shape:?}")));
            }
            for &SavedPart(file, start, dtype, rows, adapted) in parts {
                if !dtype.is_float() {
                    return Err(wrong("rows can be taken of floats only").found(dtype));
                }
                if rows == 0 {
                    return Err(wrong("rows are taken of a tensor that has none"));
                }
                let shape = [&[rows], rest].concat();
                check_range(plan, file, start, dtype, adapted, &shape)?;
            }
            let (types, rows): (Vec<_>, Vec<_>) =
                parts.iter().map(|&SavedPart(_, _, dtype, rows, _)| (dtype, rows)).unzip();
            map.check(&rows)?;
            bytes(input.dtype, shape).ok_or_else(|| wrong("an input's size overflows"))?;
            if map.dtype(&types) != input.dtype {
                return Err(wrong("an input has another type than its rows")
                    .expected(map.dtype(&types))
                    .found(input.dtype));
            }
            Ok(())
        }
    }
}

/// Checks that a tensor lies within its file, and that an adapter can do what it is to do to it.
fn check_range(
    plan: &Plan,
    file: usize,
    start: u64,
    result: DType,
    adapted: Option<usize>,
    shape: &[u64],
) -> Result<()> {
    let file = known("file", &plan.files, file)?;
    let adapted =
        adapted.map(|number| known("adapted tensor", &plan.adapted, number)).transpose()?;
    let dtype = adapted.map_or(result, |adapted| adapted.dtype);
    let elements = shape.iter().try_fold(1_u64, |all, &extent| all.checked_mul(extent));
    let span = match adapted {
        Some(adapted) => {
            elements.and_then(|elements| adapted.span(elements).checked_mul(dtype.size() as u64))
        }
        None => bytes(dtype, shape),
    };
    let end = span.and_then(|bytes| start.checked_add(bytes));
    let placed = elements.zip(end).filter(|&(_, end)| end <= file.size);
    let Some((elements, _)) = placed else {
        return Err(wrong("an input lies past the end of its file")
            .file(&file.path)
            .expected(format_args!("at most {} bytes", file.size))
            .found(format_args!("{dtype} {shape:?} from byte {start}")));
    };
    let Some(adapted) = adapted else { return Ok(()) };
    if ![adapted.result(false), adapted.result(true)].contains(&result) {
        return Err(wrong("an adapted tensor has another type than it is computed in")
            .expected(adapted.result(false))
            .found(result));
    }
    adapted.check(elements, &plan.files)
}

impl SavedNode {
    /// What its rows are taken from, when that was checked.
    fn parts(&self) -> Vec<Part> {
        let part = |&SavedPart(file, start, dtype, rows, adapted): &SavedPart| Part {
            file: file as u32,
            start,
            dtype,
            rows,
            adapted: adapted.map(|number| number as u32),
        };
        match &self.content {
            Content::Bytes(..) => Vec::new(),
            Content::Rows(_, _, parts) => parts.iter().map(part).collect(),
        }
    }
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
            end = end
                .checked_add(tensor.bytes())
                .ok_or_else(|| wrong("an output file's size overflows").tensor(tensor.name()))?;
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

/// Whether a value says where the parameters of some tensors come from: as a recipe's places, with
/// filters, and points of gradients. Explanations show it.
fn is_origin(value: &Value, inputs: usize) -> bool {
    let is_point = |point: &Value| point.is_number() || point.is_boolean();
    let is_choice = |choice: &Value| {
        choice.as_object().is_some_and(|parts| {
            parts.contains_key("gradient") == parts.contains_key("position")
                && parts.iter().all(|(key, value)| match &**key {
                    "where" | "filter" => value.is_string(),
                    "gradient" => value.as_array().is_some_and(|all| all.iter().all(is_point)),
                    "position" => value.is_number(),
                    _ => false,
                })
        })
    };
    let are_choices =
        |value: &Value| value.as_object().is_some_and(|all| all.values().all(is_choice));
    let is_part = |(key, value): (&String, &Value)| match &**key {
        "slice" => value.is_string(),
        "shared" => are_choices(value),
        "own" => {
            value.as_array().is_some_and(|own| own.len() == inputs && own.iter().all(are_choices))
        }
        _ => false,
    };
    value.is_null() || value.as_object().is_some_and(|parts| parts.iter().all(is_part))
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

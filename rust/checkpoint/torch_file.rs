//! Files that `torch.save` wrote: the tensors of a state dict, as ranges of the file.
//!
//! Since torch 1.6 they are zip archives. `data.pkl` is a pickle of the dictionary (see `pickle`), in
//! which a tensor is a view of a storage, and `data/KEY` are the bytes of a storage, not compressed.
//! So a tensor is a range of the file, also if others share its storage; one whose elements do not
//! lie one after the other says how they lie.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::header::{MAX_HEADER, checked_bytes};
use super::index::list;
use super::pickle::{Dict, ELEMENTS, Pickle, RawStorage, RawTensor, Value};
use super::table::Table;
use super::zip::{Directory, Entry};
use super::{ReadAt, TensorInfo, conversion, quantised};
use crate::dtype::DType;
use crate::error::{Error, ErrorKind, Result};
use crate::plan::{MAX_DIMENSIONS, Strides};

/// What training scripts call the dictionary of the model in what they save.
const WRAPPERS: [&str; 4] = ["state_dict", "model_state_dict", "model", "module"];
/// How many dictionaries the model's may be in.
const DEEPEST: usize = 4;

const PICKLE: &str = "/data.pkl";
const BYTE_ORDER: &str = "byteorder";
/// What only archives of `TorchScript` have.
const OF_SCRIPTS: [&str; 2] = ["constants.pkl", "code/"];

/// Reads the table of tensors of `file`, which is at `path`, has `size` bytes and is number `index`
/// of its checkpoint; and what was passed over.
pub(super) fn read(file: &dyn ReadAt, path: &Path, size: u64, index: usize) -> Result<Table> {
    read_archive(file, path, size, index).map_err(|error| {
        // What cannot be read here may be readable by torch, which then writes it anew.
        let is_told = error.parts().advice.is_some() || error.kind() != ErrorKind::Unsupported;
        if is_told { error } else { error.advice(conversion::torch_file(path)) }
    })
}

fn read_archive(file: &dyn ReadAt, path: &Path, size: u64, index: usize) -> Result<Table> {
    let directory = Directory::read(file, size)?;
    let archive = Archive::open(file, &directory)?;
    archive.check_kind(path)?;
    let (entry, _) = archive.entry(&PICKLE[1..])?;
    let text = archive.content(&entry)?;
    let pickle = Pickle::read(&text)?;
    let (dict, note) = find_model(&pickle)?;
    let mut places = Places { archive, pickle: &pickle, known: HashMap::new() };
    let (mut tensors, mut left_out, mut seen) = (Vec::new(), Vec::new(), HashSet::new());
    for &(key, value) in dict {
        let name = pickle.text(key);
        let Value::Tensor(number) = value else {
            left_out.push(name.unwrap_or("a key that is no text"));
            continue;
        };
        let Some(name) = name else {
            return Err(Error::checkpoint("a tensor of the file has a name that is no text"));
        };
        if !seen.insert(name) {
            return Err(Error::checkpoint("the file has two tensors of this name").tensor(name));
        }
        let raw = &pickle.tensors[number as usize];
        let (dtype, shape, start, strides) =
            places.find(raw).map_err(|error| error.tensor(name))?;
        let name = name.to_owned();
        tensors.push(TensorInfo { name, dtype, shape, file: index, start, strides });
    }
    let left_out = (!left_out.is_empty())
        .then(|| format!("what is no tensor is left out: {}", list(&left_out)));
    // Stable, so that tensors that share their bytes keep their order.
    tensors.sort_by_key(|tensor| tensor.start);
    Ok(Table { tensors, notes: note.into_iter().chain(left_out).collect() })
}

/// The dictionary that is the model's, and a note if it is in another.
fn find_model<'a>(pickle: &'a Pickle<'_>) -> Result<(&'a Dict, Option<String>)> {
    let unsupported = |message| Error::new(ErrorKind::Unsupported, message);
    let no_dict = || {
        unsupported("the file holds no dictionary of tensors by name")
            .advice("save the model with `torch.save(model.state_dict(), FILE)`")
    };
    let mut dict = pickle.dict(pickle.root).ok_or_else(no_dict)?;
    let (mut way, mut left_out) = (Vec::new(), Vec::new());
    loop {
        let keys = dict.iter().filter_map(|&(key, _)| pickle.text(key));
        match wrapped(pickle, dict)[..] {
            [(key, inner)] if way.len() < DEEPEST => {
                left_out.extend(keys.filter(|&other| other != key));
                way.push(key);
                dict = inner;
            }
            [(one, _), (other, _), ..] => {
                return Err(unsupported(
                    "it is not clear which dictionary of the file is the model",
                )
                .found(format_args!("`{one}` and `{other}`"))
                .advice("save the one that is with `torch.save(DICTIONARY, FILE)`"));
            }
            _ if has_tensors(dict) => break,
            _ => {
                let keys: Vec<_> = keys.collect();
                let found = |error: Error| error.found(format_args!("the keys {}", list(&keys)));
                return Err(if keys.is_empty() { no_dict() } else { found(no_dict()) });
            }
        }
    }
    let way = way.join(".");
    let note = (!left_out.is_empty()).then(|| {
        format!("the model is what is under `{way}`; left out beside it: {}", list(&left_out))
    });
    Ok((dict, note))
}

/// The dictionaries in another that may be the model's, or have it in them, by their keys.
fn wrapped<'a>(pickle: &'a Pickle<'_>, dict: &'a Dict) -> Vec<(&'a str, &'a Dict)> {
    let inner = |dict: &'a Dict| {
        dict.iter().filter_map(|&(key, value)| {
            let key = pickle.text(key).filter(|key| WRAPPERS.contains(key))?;
            Some((key, pickle.dict(value)?))
        })
    };
    // A name may stand there again and again, each time for a long dictionary.
    let some = inner(dict).take(2 * WRAPPERS.len());
    some.filter(|(_, dict)| has_tensors(dict) || inner(dict).next().is_some()).collect()
}

fn has_tensors(dict: &Dict) -> bool {
    dict.iter().any(|(_, value)| matches!(value, Value::Tensor(_)))
}

/// An archive that torch wrote.
struct Archive<'a> {
    file: &'a dyn ReadAt,
    directory: &'a Directory,
    entries: HashMap<&'a [u8], Entry<'a>>,
    /// What all names begin with.
    folder: String,
}

impl<'a> Archive<'a> {
    fn open(file: &'a dyn ReadAt, directory: &'a Directory) -> Result<Self> {
        let entries = directory.entries()?;
        let mut folders = entries.keys().filter_map(|name| {
            let name = std::str::from_utf8(name).ok()?.strip_suffix(PICKLE)?;
            (!name.contains('/')).then_some(name)
        });
        let (Some(folder), None) = (folders.next(), folders.next()) else {
            return Err(Error::checkpoint("the zip archive is no file of torch")
                .expected("one entry `FOLDER/data.pkl`")
                .advice("name a folder of a model, or its file of weights"));
        };
        let folder = format!("{folder}/");
        Ok(Self { file, directory, entries, folder })
    }

    /// Refuses programs, and bytes that are the other way around.
    fn check_kind(&self, path: &Path) -> Result<()> {
        let is_script = |name: &&[u8]| {
            let name = name.strip_prefix(self.folder.as_bytes());
            name.is_some_and(|name| OF_SCRIPTS.iter().any(|of| name.starts_with(of.as_bytes())))
        };
        if self.entries.keys().any(is_script) {
            let message = "the file is a program (TorchScript), not a state dict";
            return Err(
                Error::new(ErrorKind::Unsupported, message).advice(conversion::script(path))
            );
        }
        let Ok((entry, _)) = self.entry(BYTE_ORDER) else { return Ok(()) };
        match &self.content(&entry)?[..] {
            b"little" => Ok(()),
            b"big" => {
                let message = "the file was written on a big-endian machine";
                Err(Error::new(ErrorKind::Unsupported, message))
            }
            other => Err(Error::checkpoint("the file has an unknown order of bytes")
                .found(format_args!("`{}`", other.escape_ascii()))),
        }
    }

    /// The entry of that name in the archive's folder, and where its bytes begin.
    fn entry(&self, name: &str) -> Result<(Entry<'a>, u64)> {
        let name = format!("{}{name}", self.folder);
        let entry = self.entries.get(name.as_bytes()).copied().ok_or_else(|| {
            Error::checkpoint("the zip archive lacks an entry")
                .expected(format_args!("`{}`", name.escape_debug()))
        })?;
        Ok((entry, self.directory.locate(self.file, &entry)?))
    }

    /// The bytes of a small entry.
    fn content(&self, entry: &Entry<'_>) -> Result<Vec<u8>> {
        if entry.size > MAX_HEADER {
            return Err(Error::checkpoint(
                "an entry of the zip archive is too long to be a pickle",
            )
            .expected(format_args!("at most {MAX_HEADER} bytes"))
            .found(entry.size));
        }
        let mut bytes = vec![0; entry.size as usize];
        self.file.read_at(self.directory.locate(self.file, entry)?, &mut bytes)?;
        Ok(bytes)
    }
}

/// Finds where tensors lie.
struct Places<'a> {
    archive: Archive<'a>,
    pickle: &'a Pickle<'a>,
    /// Start and bytes of the storages that were looked up, by key.
    known: HashMap<&'a [u8], (u64, u64)>,
}

impl Places<'_> {
    /// Type and shape of a tensor, its first byte in the file, and how it lies from there on.
    fn find(&mut self, tensor: &RawTensor) -> Result<(DType, Vec<u64>, u64, Option<Strides>)> {
        let storage = self.pickle.storages[tensor.storage as usize];
        let element = tensor
            .element
            .or(storage.element)
            .ok_or_else(|| Error::checkpoint("the tensor has no type"))?;
        let name = ELEMENTS[usize::from(element)].0;
        let dtype = DType::from_name(name).ok_or_else(|| quantised::refuse_dtype(name))?;
        if tensor.is_changed {
            let message = "the tensor is conjugated or negated only when it is used";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let layout = self.pickle.layout(tensor).filter(|layout| layout.len() <= MAX_DIMENSIONS);
        let layout = layout.ok_or_else(|| Error::checkpoint("the tensor's shape is none"))?;
        let shape: Vec<u64> = layout.iter().map(|&(extent, _)| extent).collect();
        let bytes = checked_bytes(dtype, &shape)?;
        let (start, size) = self.storage(&storage)?;
        let strides = (bytes > 0 && !is_contiguous(&layout)).then(|| Strides(joined(&layout)));
        if strides.as_ref().is_some_and(|view| view.elements().is_none()) {
            return Err(Error::checkpoint(
                "the tensor shows what it lies in more often than any view",
            )
            .found(format_args!("{dtype} {shape:?}")));
        }
        let bytes = match &strides {
            Some(view) => view.span().and_then(|span| span.checked_mul(dtype.size() as u64)),
            None => Some(bytes),
        };
        let bytes = bytes.unwrap_or(u64::MAX); // which no storage has
        let skipped = u64::try_from(tensor.offset)
            .ok()
            .and_then(|offset| offset.checked_mul(dtype.size() as u64));
        let end = skipped.and_then(|skipped| skipped.checked_add(bytes));
        match (skipped, end) {
            (Some(skipped), Some(end)) if end <= size => {
                Ok((dtype, shape, start + skipped, strides))
            }
            _ if bytes == 0 => Ok((dtype, shape, start, None)),
            _ => Err(Error::checkpoint("the tensor lies past the end of its storage")
                .expected(format_args!("at most {size} bytes"))
                .found(format_args!("{dtype} {shape:?} from element {}", tensor.offset))),
        }
    }

    /// Start and bytes of a storage in the file.
    fn storage(&mut self, storage: &RawStorage) -> Result<(u64, u64)> {
        let key = self.pickle.bytes(storage.key);
        let (start, size) = if let Some(&place) = self.known.get(key) {
            place
        } else {
            let name = std::str::from_utf8(key)
                .map_err(|_| Error::checkpoint("a storage has a key that is no text"))?;
            let (entry, start) = self.archive.entry(&format!("data/{name}"))?;
            self.known.insert(key, (start, entry.size));
            (start, entry.size)
        };
        let width = match storage.element.map(|element| ELEMENTS[usize::from(element)].0) {
            Some(name) => {
                DType::from_name(name).ok_or_else(|| quantised::refuse_dtype(name))?.size()
            }
            None => 1,
        };
        let bytes = u64::try_from(storage.count).ok().and_then(|n| n.checked_mul(width as u64));
        if bytes != Some(size) {
            return Err(Error::checkpoint("a storage has another size than its entry")
                .expected(format_args!("{size} bytes"))
                .found(format_args!("{} elements of {width} bytes", storage.count)));
        }
        Ok((start, size))
    }
}

/// A layout with as few dimensions as say the same, by extents and strides.
fn joined(layout: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut few: Vec<(u64, u64)> = Vec::new();
    for &(extent, stride) in layout.iter().filter(|(extent, _)| *extent != 1) {
        match few.last_mut() {
            Some(before) if Some(before.1) == stride.checked_mul(extent) => {
                *before = (before.0 * extent, stride);
            }
            _ => few.push((extent, stride)),
        }
    }
    few
}

/// Whether elements lie one after the other, by extents and strides; an extent of one takes no step.
fn is_contiguous(layout: &[(u64, u64)]) -> bool {
    let mut step: u64 = 1;
    layout.iter().rev().filter(|(extent, _)| *extent != 1).all(|&(extent, stride)| {
        let follows = stride == step;
        step = step.saturating_mul(extent);
        follows
    })
}

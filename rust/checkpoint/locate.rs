//! Which files are the weights.
//!
//! The usual names come first: `model.safetensors.index.json`, then `model.safetensors`. Without
//! them the only index or the only file of another name will do (diffusers has its own names).
//! With several nothing is guessed. What is passed over is told in a warning, since an extra file
//! of weights beside the ones in use is often the one that was meant. Files of torch are looked at
//! only if there are none of safetensors: where a model is there in both formats, they are the same.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use super::index::{Index, list};
use super::{Elsewhere, conversion, find_absent, quantised};
use crate::error::{Error, ErrorKind, Result};

const INDEX: &str = ".index.json";
const WEIGHTS: &str = ".safetensors";

/// Where the tensor table is.
#[derive(Debug)]
pub(super) enum Weights {
    File(PathBuf),
    Index(PathBuf, Index),
}

/// The weights at `path`, and warnings on what was passed over; files called `absent` are not here.
pub(super) fn locate(path: &Path, absent: &Elsewhere) -> Result<(Weights, Vec<String>)> {
    if find_absent(path, absent).is_some() {
        return Ok((Weights::File(path.to_owned()), Vec::new()));
    }
    let metadata =
        fs::metadata(path).map_err(|error| Error::io("open the checkpoint", error).file(path))?;
    if metadata.is_dir() {
        quantised::refuse_config(path)?;
        return locate_in(path, absent).map_err(|error| error.file(path));
    }
    let is_index = path.file_name().and_then(OsStr::to_str).is_some_and(|n| n.ends_with(INDEX));
    let path = path.to_owned();
    let weights = if is_index {
        Weights::Index(path.clone(), Index::read(&path)?)
    } else {
        Weights::File(path)
    };
    Ok((weights, Vec::new()))
}

fn locate_in(directory: &Path, absent: &Elsewhere) -> Result<(Weights, Vec<String>)> {
    let mut names = file_names(directory)?;
    names.extend(absent.keys().cloned());
    names.sort_unstable();
    names.dedup();
    let indexes = indexes(&names, &[WEIGHTS]);
    let files = names.iter().map(String::as_str).filter(|name| name.ends_with(WEIGHTS)).collect();
    if let Some(found) = locate_among(directory, "model.safetensors", indexes, files)? {
        return Ok(found);
    }
    let indexes = self::indexes(&names, &conversion::TORCH);
    let found =
        locate_among(directory, "pytorch_model.bin", indexes, conversion::of_torch(&names))?;
    found.ok_or_else(|| no_weights(directory, &names))
}

/// The weights among the indexes and files of a format, whose file has usually that name.
fn locate_among(
    directory: &Path,
    usual: &str,
    indexes: Vec<&str>,
    files: Vec<&str>,
) -> Result<Option<(Weights, Vec<String>)>> {
    if let Some(used) = pick(&format!("{usual}{INDEX}"), usual, &indexes)? {
        let path = directory.join(used);
        let index = Index::read(&path)?;
        let strangers = files.into_iter().filter(|name| !index.names(name));
        let warnings = passed_over(used, indexes.into_iter().chain(strangers));
        return Ok(Some((Weights::Index(path, index), warnings)));
    }
    let Some(file) = pick(usual, usual, &files)? else { return Ok(None) };
    refuse_part(file, usual)?;
    let warnings = passed_over(file, files.iter().copied());
    Ok(Some((Weights::File(directory.join(file)), warnings)))
}

/// The preferred candidate, or the only one.
fn pick<'a>(preferred: &str, usual: &str, candidates: &[&'a str]) -> Result<Option<&'a str>> {
    let preferred = candidates.iter().find(|&&name| name == preferred);
    match (preferred, candidates) {
        (None, []) => Ok(None),
        (Some(name), _) | (None, [name]) => Ok(Some(name)),
        (None, [first, ..]) if is_shard(first) => Err(no_index(usual, candidates)),
        (None, _) => Err(Error::checkpoint("it is not clear which file holds the weights")
            .found(list(candidates))
            .advice("give the path of the file instead of the directory")),
    }
}

/// Refuses a file that is only a part of a model.
fn refuse_part(file_name: &str, usual: &str) -> Result<()> {
    if is_shard(file_name) {
        return Err(no_index(usual, &[file_name]));
    }
    if file_name.starts_with("adapter_model.") {
        return Err(Error::new(ErrorKind::Unsupported, "this is an adapter (LoRA), not a model")
            .found(format_args!("`{file_name}`"))
            .advice(
                "write it behind its model: `model+adapter`; to make one adapter of several, list \
                      adapters alone, and use `oxmerge merge`",
            ));
    }
    Ok(())
}

/// Whether a name looks like `model-00001-of-00002.safetensors`.
fn is_shard(file_name: &str) -> bool {
    let numbered = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let stem = file_name.rsplit_once('.').map_or(file_name, |(stem, _)| stem);
    stem.rsplit_once("-of-").is_some_and(|(front, total)| {
        numbered(total) && front.rsplit_once('-').is_some_and(|(_, number)| numbered(number))
    })
}

#[cold]
fn no_index(usual: &str, shards: &[&str]) -> Error {
    Error::checkpoint("the checkpoint has shards but no index")
        .expected(format_args!("`{usual}{INDEX}`"))
        .found(list(shards))
        .advice("download the index too")
}

#[cold]
fn no_weights(directory: &Path, names: &[String]) -> Error {
    let others = conversion::foreign(names);
    if others.is_empty() {
        return Error::checkpoint("the directory holds no weights")
            .expected("`model.safetensors` or `model.safetensors.index.json`")
            .advice("name the directory that they are in, or download them");
    }
    Error::new(ErrorKind::Unsupported, "the weights are in a format that is not read")
        .found(list(&others))
        .advice(conversion::advice(directory, &others))
}

/// A warning on the weights beside the ones in use.
fn passed_over<'a>(used: &str, names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let names: Vec<_> = names.filter(|&name| name != used).collect();
    if names.is_empty() {
        return Vec::new();
    }
    vec![format!("`{used}` is used; other weights beside it are left out: {}", list(&names))]
}

/// Of the names those of indexes of files with such an ending.
fn indexes<'a>(names: &'a [String], endings: &[&str]) -> Vec<&'a str> {
    let is_one = |name: &&str| {
        let file = name.strip_suffix(INDEX);
        file.is_some_and(|file| endings.iter().any(|ending| file.ends_with(ending)))
    };
    names.iter().map(String::as_str).filter(is_one).collect()
}

/// The names in a directory, sorted; hidden ones (such as macOS's `._` twins) left out.
fn file_names(directory: &Path) -> Result<Vec<String>> {
    let read = |error| Error::io("list the directory", error);
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).map_err(read)? {
        let name = entry.map_err(read)?.file_name();
        names.extend(name.into_string().ok().filter(|name| !name.starts_with('.')));
    }
    names.sort_unstable();
    Ok(names)
}

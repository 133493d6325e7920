//! The index of a sharded checkpoint: which tensor is in which file.
//!
//! The index decides. A tensor that it places elsewhere, or does not name, is left out of a shard
//! with a warning; one that it promises and the shard lacks is an error. Its file names are joined
//! to the checkpoint's directory, so that they must be plain names: a path would let a stranger's
//! checkpoint reach any file.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use super::{DOWNLOAD_AGAIN, TensorInfo, json, read_text};
use crate::error::{Error, Result};
use crate::plan::InputFile;

/// How many names a warning or error spells out.
const SHOWN: usize = 3;

/// The names that the index places in one shard.
#[derive(Debug, Default)]
pub(super) struct Wanted(HashSet<String>);

/// An index that passed every check which needs no other file.
#[derive(Debug)]
pub(super) struct Index {
    /// The file that it is, as it was when it was read.
    pub(super) file: InputFile,
    shards: BTreeMap<String, Wanted>,
}

impl Index {
    /// Reads and checks the index at `path`.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let (text, file) = read_text(path)?;
        let shards =
            Self::parse(&text).map_err(|error| error.file(path).or_else_advice(DOWNLOAD_AGAIN))?;
        Ok(Self { file, shards })
    }

    fn parse(text: &str) -> Result<BTreeMap<String, Wanted>> {
        let pairs = json::read_weight_map(text)?;
        if pairs.is_empty() {
            return Err(Error::checkpoint("the index names no tensor"));
        }
        let mut seen = HashSet::with_capacity(pairs.len());
        let mut shards = BTreeMap::<_, Wanted>::new();
        for (tensor, file_name) in pairs {
            check_file_name(&file_name).map_err(|error| error.tensor(tensor.as_str()))?;
            if !seen.insert(tensor.clone()) {
                return Err(Error::checkpoint("the index names the tensor twice").tensor(tensor));
            }
            shards.entry(file_name).or_default().0.insert(tensor);
        }
        Ok(shards)
    }

    /// Fails when shards are missing in `directory`, naming them.
    pub(super) fn check_present(&self, directory: &Path) -> Result<()> {
        let missing: Vec<_> = self
            .shards
            .keys()
            .map(String::as_str)
            .filter(|file_name| !directory.join(file_name).exists())
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(Error::checkpoint("shards that the index names are missing")
            .found(format_args!("no {}", list(&missing)))
            .advice("download the checkpoint again, whole"))
    }

    /// The shards by file name, in order.
    pub(super) fn shards(&self) -> impl Iterator<Item = (&str, &Wanted)> {
        self.shards.iter().map(|(file_name, wanted)| (file_name.as_str(), wanted))
    }

    /// Whether the index names that file.
    pub(super) fn names(&self, file_name: &str) -> bool {
        self.shards.contains_key(file_name)
    }
}

impl Wanted {
    /// Of a shard's tensors those that belong to it, and a note on the others.
    pub(super) fn select(
        &self,
        tensors: Vec<TensorInfo>,
    ) -> Result<(Vec<TensorInfo>, Option<String>)> {
        let (kept, left): (Vec<_>, Vec<_>) =
            tensors.into_iter().partition(|tensor| self.0.contains(&tensor.name));
        if kept.len() < self.0.len() {
            return Err(self.missing(&kept));
        }
        let left: Vec<_> = left.iter().map(|tensor| tensor.name.as_str()).collect();
        let note = (!left.is_empty()).then(|| {
            format!("tensors that the index does not place here are left out: {}", list(&left))
        });
        Ok((kept, note))
    }

    #[cold]
    fn missing(&self, kept: &[TensorInfo]) -> Error {
        let present: HashSet<_> = kept.iter().map(|tensor| tensor.name.as_str()).collect();
        let mut missing: Vec<_> =
            self.0.iter().map(String::as_str).filter(|name| !present.contains(name)).collect();
        missing.sort_unstable();
        Error::checkpoint("the shard lacks tensors that the index places in it")
            .found(format_args!("no {}", list(&missing)))
            .advice("index and shards are not of one checkpoint: download it again")
    }
}

/// The first few of `names`, and how many more there are.
pub(super) fn list(names: &[&str]) -> String {
    let shown: Vec<_> = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect();
    let shown = shown.join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

fn check_file_name(file_name: &str) -> Result<()> {
    let plain = !file_name.contains(['/', '\\', '\0']) && !matches!(file_name, "" | "." | "..");
    if plain {
        return Ok(());
    }
    Err(Error::checkpoint("the index names a file that is not a plain name in its directory")
        .found(format_args!("`{}`", file_name.escape_debug()))
        .advice("get the checkpoint from where it was first published"))
}

//! The index of a sharded checkpoint: which tensor is in which file.
//!
//! The index decides. A tensor that it places elsewhere, or does not name, is left out of a shard
//! with a warning; one that it promises and the shard lacks is an error. Its file names are joined
//! to the checkpoint's directory, so that they must be plain names: a path would let a stranger's
//! checkpoint reach any file.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use super::{DOWNLOAD_AGAIN, Elsewhere, TensorInfo, json, read_text};
use crate::error::{Error, Result};
use crate::plan::InputFile;

/// How many names a warning or error spells out.
const SHOWN: usize = 3;

/// An index that passed every check which needs no other file.
#[derive(Debug)]
pub(super) struct Index {
    /// The file that it is, as it was when it was read.
    pub(super) file: InputFile,
    table: Table,
}

/// Which tensor is in which shard.
#[derive(Debug, Default)]
struct Table {
    /// The shards by file name, with their numbers.
    shards: BTreeMap<String, usize>,
    /// The number of each tensor's shard.
    places: HashMap<String, usize>,
    /// How many tensors each shard has.
    counts: Vec<usize>,
}

/// The tensors that the index places in one shard.
#[derive(Debug)]
pub(super) struct Wanted<'a> {
    table: &'a Table,
    shard: usize,
}

impl Index {
    /// Reads and checks the index at `path`.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let (text, file) = read_text(path)?;
        let table =
            Table::parse(&text).map_err(|error| error.file(path).or_else_advice(DOWNLOAD_AGAIN))?;
        Ok(Self { file, table })
    }

    /// Fails when shards are missing in `directory`, naming them.
    pub(super) fn check_present(&self, directory: &Path, absent: &Elsewhere) -> Result<()> {
        let shards = &self.table.shards;
        let missing: Vec<_> = shards
            .keys()
            .map(String::as_str)
            .filter(|&name| !absent.contains_key(name) && !directory.join(name).exists())
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(Error::checkpoint("shards that the index names are missing")
            .found(format_args!("no {}", list(&missing)))
            .advice("download the checkpoint again, whole"))
    }

    /// The shards by file name, in order.
    pub(super) fn shards(&self) -> impl Iterator<Item = (&str, Wanted<'_>)> {
        let table = &self.table;
        table.shards.iter().map(|(name, &shard)| (name.as_str(), Wanted { table, shard }))
    }

    /// Whether the index names that file.
    pub(super) fn names(&self, file_name: &str) -> bool {
        self.table.shards.contains_key(file_name)
    }
}

impl Table {
    fn parse(text: &str) -> Result<Self> {
        let mut table = Self::default();
        json::read_weight_map(text, &mut |tensor, file_name| table.add(tensor, file_name))?;
        if table.places.is_empty() {
            return Err(Error::checkpoint("the index names no tensor"));
        }
        Ok(table)
    }

    fn add(&mut self, tensor: String, file_name: &str) -> Result<()> {
        let shard = if let Some(&shard) = self.shards.get(file_name) {
            shard
        } else {
            check_file_name(file_name).map_err(|error| error.tensor(tensor.as_str()))?;
            self.shards.insert(file_name.to_owned(), self.counts.len());
            self.counts.push(0);
            self.counts.len() - 1
        };
        self.counts[shard] += 1;
        match self.places.entry(tensor) {
            Entry::Vacant(place) => {
                place.insert(shard);
                Ok(())
            }
            Entry::Occupied(place) => {
                Err(Error::checkpoint("the index names the tensor twice")
                    .tensor(place.key().as_str()))
            }
        }
    }
}

impl Wanted<'_> {
    fn has(&self, tensor: &str) -> bool {
        self.table.places.get(tensor) == Some(&self.shard)
    }

    /// Of a shard's tensors those that belong to it, and a note on the others.
    pub(super) fn select(
        &self,
        tensors: Vec<TensorInfo>,
    ) -> Result<(Vec<TensorInfo>, Option<String>)> {
        let (kept, left): (Vec<_>, Vec<_>) =
            tensors.into_iter().partition(|tensor| self.has(&tensor.name));
        if kept.len() < self.table.counts[self.shard] {
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
        let names = self.table.places.keys().map(String::as_str);
        let mut missing: Vec<_> =
            names.filter(|name| self.has(name) && !present.contains(name)).collect();
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

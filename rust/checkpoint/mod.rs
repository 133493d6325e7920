//! Checkpoints on disk: files of safetensors or torch, alone or in shards behind an index.
//!
//! A checkpoint comes from the network, often from a stranger, sometimes from a download that
//! broke off. The engine will map these files and compute addresses from their headers, and a
//! merge of a wrong table gives a model that looks sound. So everything that the headers can show
//! is checked when a checkpoint is opened, and not one byte of tensor data is read for it: an open
//! costs a few reads a shard, for a model of any size.
//!
//! - `adapted`: a checkpoint with what adapters make of it;
//! - `locate`: which files of a directory are the weights;
//! - `index`: the shard index;
//! - `table`: the table of tensors of one file, whatever its format;
//! - `header`: a safetensors file's header, its tensors checked against each other and the file's size;
//! - `torch_file`: what `torch.save` wrote, read where it lies; `zip` and `pickle`, without running it;
//! - `json`: the JSON visitors of both;
//! - `conversion`: what to do about weights in other formats;
//! - `quantised`: checkpoints that hold packed numbers, recognised and refused by name;
//! - `lead`: the part of a name up to its layer's number;
//! - `vocabulary`: which token each row of two models stands for;
//! - `token_rows`: which row of each model stands for which token of the output;
//! - `layout`: the way out, from tensors to shards with all offsets known.

mod adapted;
mod bytes;
mod conversion;
mod header;
mod index;
mod json;
mod layout;
mod lead;
mod locate;
mod pickle;
mod quantised;
mod table;
pub mod token_rows;
mod torch_file;
pub mod vocabulary;
mod zip;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::dtype::DType;
use crate::error::{Error, ErrorKind, Result};
use crate::io;
use crate::plan::{Adapted, InputFile, Names, Remote, Strides};

pub use adapted::{Change, Changes, Given, GivenFactor, GivenTerm};
pub use header::{Header, MAX_HEADER};
pub use layout::{Layout, header, header_bytes, index_json, lay_out, put_header};
pub use lead::lead;

use index::Index;
use locate::Weights;
use table::Table;

/// What to do about a file that is not as it should be.
const DOWNLOAD_AGAIN: &str = "the file is damaged: download it again, or save the model anew";

/// A checkpoint of which only the headers were read.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// The file or directory that was opened.
    pub path: PathBuf,
    /// The files, in the order of their names.
    pub files: Vec<InputFile>,
    /// The index that says which file a tensor is in, if there is one.
    pub index: Option<InputFile>,
    /// What was passed over, for people to read.
    pub warnings: Vec<String>,
    /// The tensors' names, by number in file order.
    names: Names,
    /// The names in the files, if the tensors are called otherwise here.
    written: Option<Arc<Names>>,
    rows: Vec<Row>,
    /// The distinct shapes.
    shapes: Vec<Vec<u64>>,
    shape_numbers: HashMap<Vec<u64>, u32>,
    /// What adapters make of tensors, and how those lie that do not lie one after the other; by index.
    adapted: HashMap<u32, Arc<Adapted>>,
}

/// A tensor but for its name. There may be 100,000.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Row {
    dtype: DType,
    shape: u32,
    file: u32,
    start: u64,
}

/// One tensor of a [`Checkpoint`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tensor<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its name in the file, which is another where the checkpoint was renamed.
    pub written: &'a str,
    /// Its element type.
    pub dtype: DType,
    /// Its shape; empty for a single number.
    pub shape: &'a [u64],
    /// Index into [`Checkpoint::files`].
    pub file: usize,
    /// First byte in that file.
    pub start: u64,
}

impl Tensor<'_> {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Bytes in the file.
    pub fn bytes(&self) -> u64 {
        self.elements() * self.dtype.size() as u64
    }
}

/// One tensor of a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Its shape; empty for a single number.
    pub shape: Vec<u64>,
    /// Index into [`Checkpoint::files`].
    pub file: usize,
    /// First byte in that file.
    pub start: u64,
    /// Where its elements lie from there on, unless that is one after the other.
    pub strides: Option<Strides>,
}

/// A file that is read by ranges, wherever it is.
pub trait ReadAt: std::fmt::Debug + Send + Sync {
    /// Reads the bytes from `start` on that fill `memory`.
    fn read_at(&self, start: u64, memory: &mut [u8]) -> Result<()>;

    /// Whether each range takes a while.
    fn is_far(&self) -> bool {
        true
    }
}

impl ReadAt for std::fs::File {
    fn read_at(&self, start: u64, memory: &mut [u8]) -> Result<()> {
        io::read_exact_at(self, start, memory)
    }

    fn is_far(&self) -> bool {
        false
    }
}

/// A file of a checkpoint that is not here.
#[derive(Clone, Debug)]
pub struct Absent {
    /// Bytes.
    pub size: u64,
    /// What it is elsewhere.
    pub remote: Remote,
    /// Its first bytes, which have the header; none of a file that is not opened.
    pub start: Vec<u8>,
    /// Reads the others, of a file that has no header.
    pub rest: Option<Arc<dyn ReadAt>>,
}

/// The files of a checkpoint that are not here, by their names in its directory.
pub type Elsewhere = BTreeMap<String, Absent>;

/// The names of the files that hold the weights at `path`, where the files called `absent` are not
/// here.
pub fn weight_files(path: &Path, absent: &Elsewhere) -> Result<Vec<String>> {
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    Ok(match locate::locate(path, absent)?.0 {
        Weights::File(file) => name(&file).into_iter().collect(),
        Weights::Index(_, index) => index.shards().map(|(name, _)| name.to_owned()).collect(),
    })
}

impl Checkpoint {
    /// Opens a file of weights, an index, or a directory that holds weights.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, &Elsewhere::new())
    }

    /// Opens what [`open`](Self::open) does, where some files are not here.
    pub fn open_with(path: impl AsRef<Path>, absent: &Elsewhere) -> Result<Self> {
        let path = path.as_ref();
        if path.to_str().is_none() {
            return Err(Error::new(ErrorKind::Unsupported, "the path is not valid UTF-8")
                .file(path)
                .advice("rename what it names, or make a link to it whose path is"));
        }
        let (weights, warnings) = locate::locate(path, absent)?;
        let mut checkpoint = Self {
            path: path.to_owned(),
            files: Vec::new(),
            index: None,
            warnings,
            names: Names::default(),
            written: None,
            rows: Vec::new(),
            shapes: Vec::new(),
            shape_numbers: HashMap::new(),
            adapted: HashMap::new(),
        };
        match weights {
            Weights::File(file) => checkpoint.add_file(&file, absent)?,
            Weights::Index(file, index) => {
                checkpoint.add_shards(&file, &index, absent)?;
                checkpoint.index = Some(index.file);
            }
        }
        quantised::refuse_tensors(&checkpoint)?;
        checkpoint.names.shrink();
        checkpoint.rows.shrink_to_fit();
        Ok(checkpoint)
    }

    /// How many tensors there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Tensor `index`, in file order: by shard, then by offset.
    pub fn tensor(&self, index: usize) -> Tensor<'_> {
        let Row { dtype, shape, file, start } = self.rows[index];
        let (name, shape) = (self.names.get(index as u32), &self.shapes[shape as usize]);
        let written = self.written.as_ref().map_or(name, |names| names.get(index as u32));
        Tensor { name, written, dtype, shape, file: file as usize, start }
    }

    /// The tensors in file order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = Tensor<'_>> {
        (0..self.len()).map(|index| self.tensor(index))
    }

    /// The index of the tensor of that name.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.names.find(name).map(|number| number as usize)
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<Tensor<'_>> {
        self.find(name).map(|index| self.tensor(index))
    }

    /// How many tensors have a name that `other` has too.
    pub fn shared_names(&self, other: &Self) -> usize {
        self.names.iter().filter(|name| other.find(name).is_some()).count()
    }

    /// The same tensors under these names, in file order.
    pub fn renamed<'a>(&self, names: impl ExactSizeIterator<Item = &'a str>) -> Result<Self> {
        if names.len() != self.len() {
            return Err(Error::internal("a checkpoint needs a name for each tensor"));
        }
        let mut renamed = Names::default();
        for name in names {
            if !renamed.intern(name).1 {
                let message = "two tensors of a checkpoint cannot have one name";
                return Err(Error::checkpoint(message).file(&self.path).tensor(name));
            }
        }
        renamed.shrink();
        let written = self.written.clone().unwrap_or_else(|| Arc::new(self.names.clone()));
        Ok(Self { names: renamed, written: Some(written), ..self.clone() })
    }

    /// The other tensors that are the same bytes as tensor `index`, as tied weights are in files of
    /// torch.
    pub fn twins(&self, index: usize) -> impl Iterator<Item = usize> + '_ {
        let place = |at: usize| (self.rows[at], self.adapted.get(&(at as u32)));
        let is_same = move |&other: &usize| other != index && place(other) == place(index);
        (0..self.len()).filter(is_same)
    }

    /// The checkpoint without the tensors at some places of the file order.
    pub fn without(&self, left_out: &[usize]) -> Self {
        let kept: Vec<usize> = (0..self.len()).filter(|at| !left_out.contains(at)).collect();
        let names_of = |names: &Names| {
            let mut few = Names::default();
            for &at in &kept {
                few.intern(names.get(at as u32));
            }
            few
        };
        let names = names_of(&self.names);
        let written = self.written.as_ref().map(|written| Arc::new(names_of(written)));
        let rows = kept.iter().map(|&at| self.rows[at]).collect();
        let change = |(at, &was): (usize, &usize)| {
            Some((at as u32, Arc::clone(self.adapted.get(&(was as u32))?)))
        };
        let adapted = kept.iter().enumerate().filter_map(change).collect();
        Self { names, written, rows, adapted, ..self.clone() }
    }

    /// The same checkpoint, of which files that were not here lie at these paths now, by their labels.
    pub fn placed(&self, places: &HashMap<String, PathBuf>) -> Result<Self> {
        let files = self.files.iter().map(|file| file.place(places)).collect::<Result<_>>()?;
        Ok(Self { files, ..self.clone() })
    }

    /// The bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.tensors().map(|tensor| tensor.bytes()).sum()
    }

    fn add_file(&mut self, path: &Path, absent: &Elsewhere) -> Result<()> {
        let tensors = self.read_table(path, absent)?;
        self.add_tensors(tensors);
        Ok(())
    }

    fn add_shards(&mut self, index_path: &Path, index: &Index, absent: &Elsewhere) -> Result<()> {
        let directory = index_path.parent().unwrap_or(Path::new(""));
        index.check_present(directory, absent).map_err(|error| error.file(index_path))?;
        for (file_name, wanted) in index.shards() {
            let path = directory.join(file_name);
            let tensors = self.read_table(&path, absent)?;
            let (tensors, left_out) = wanted.select(tensors).map_err(|e| e.file(&path))?;
            self.add_tensors(tensors);
            self.warnings.extend(left_out.map(|names| format!("`{file_name}`: {names}")));
        }
        Ok(())
    }

    /// Opens a file, adds it to the list, and reads its tensors.
    fn read_table(&mut self, path: &Path, absent: &Elsewhere) -> Result<Vec<TensorInfo>> {
        if let Some(absent) = find_absent(path, absent) {
            let table = Table::of_absent(absent, path, self.files.len())?;
            self.note(path, table.notes);
            let (path, size, remote) = (path.to_owned(), absent.size, Some(absent.remote.clone()));
            self.files.push(InputFile { path, size, modified_ns: 0, device: 0, inode: 0, remote });
            return Ok(table.tensors);
        }
        let file = io::open_read_only(path)?;
        let input = InputFile::of(&file, path)?;
        let Table { tensors, notes } = Table::read(&file, path, input.size, self.files.len())?;
        self.note(path, notes);
        self.files.push(input);
        Ok(tensors)
    }

    /// Takes down what is odd about a file.
    fn note(&mut self, path: &Path, notes: Vec<String>) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        self.warnings.extend(notes.into_iter().map(|note| format!("`{name}`: {note}")));
    }

    fn shape_number(&mut self, shape: Vec<u64>) -> u32 {
        *self.shape_numbers.entry(shape).or_insert_with_key(|shape| {
            self.shapes.push(shape.clone());
            self.shapes.len() as u32 - 1
        })
    }

    /// Adds tensors, none of which is there yet: a header and an index have no name twice.
    fn add_tensors(&mut self, tensors: Vec<TensorInfo>) {
        for tensor in tensors {
            let TensorInfo { name, dtype, shape, file, start, strides } = tensor;
            if let Some(strides) = strides {
                let view = Adapted::view(dtype, &shape, strides);
                self.adapted.insert(self.rows.len() as u32, Arc::new(view));
            }
            let shape = self.shape_number(shape);
            let (number, is_new) = self.names.intern(&name);
            debug_assert!(is_new && number as usize == self.rows.len(), "`{name}` is there twice");
            self.rows.push(Row { dtype, shape, file: file as u32, start });
        }
    }
}

/// The file of that name, if it is not here.
fn find_absent<'a>(path: &Path, absent: &'a Elsewhere) -> Option<&'a Absent> {
    let found = absent.get(path.file_name()?.to_str()?)?;
    (!path.exists()).then_some(found)
}

/// A small text file of a checkpoint, read whole, and what it was then.
fn read_text(path: &Path) -> Result<(String, InputFile)> {
    let file = io::open_read_only(path)?;
    let input = InputFile::of(&file, path)?;
    let size = input.size;
    if size > MAX_HEADER {
        return Err(Error::checkpoint("the file is too long for what it should be")
            .file(path)
            .expected(format_args!("at most {MAX_HEADER} bytes"))
            .found(size)
            .advice(DOWNLOAD_AGAIN));
    }
    let mut bytes = vec![0; size as usize];
    io::read_exact_at(&file, 0, &mut bytes).map_err(|error| error.file(path))?;
    let text = String::from_utf8(bytes);
    text.map(|text| (text, input)).map_err(|_| {
        Error::checkpoint("the file is not valid UTF-8").file(path).advice(DOWNLOAD_AGAIN)
    })
}

//! Checkpoints in.

#![expect(unsafe_code, reason = "the memory of a map is exported by a function of C")]

use std::collections::HashMap;
use std::os::fd::RawFd;
use std::os::raw::c_int;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::PyIndexError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::arrays::source;
use super::enter::{enter, take_part};
use super::error::raise;
use super::exported::{Given, Held, export_all};
use super::to_python;
use crate::checkpoint;
use crate::engine::source::Source;
use crate::error::{Error, Result};
use crate::io::{AlignedBuffer, DirectMode, LentMap, OutputFolder, ShardWriter};
use crate::plan::Remote;

/// A checkpoint that was opened from its headers only.
#[pyclass(frozen, module = "oxmerge._core")]
pub(super) struct Checkpoint(Arc<checkpoint::Checkpoint>);

/// One tensor of a checkpoint, as its header describes it.
#[pyclass(frozen, get_all, module = "oxmerge._core")]
pub(super) struct TensorInfo {
    /// Its name.
    name: String,
    /// Its name in the file.
    written: String,
    /// Its element type, by its safetensors name.
    dtype: &'static str,
    /// Its shape.
    shape: Py<PyTuple>,
    /// Index into the checkpoint's files.
    file: usize,
    /// First byte in that file.
    start: u64,
}

/// A file that is not here: its name, bytes, label and tag, its first bytes, and what reads others.
type Absent = (String, u64, String, String, Vec<u8>, Option<Py<PyAny>>);

/// What went wrong in Python while ranges of a file were read.
type Failure = Arc<Mutex<Option<PyErr>>>;

/// Ranges of a file that a function of Python reads.
#[derive(Debug)]
struct Ranges {
    read: Py<PyAny>,
    failure: Failure,
}

impl checkpoint::ReadAt for Ranges {
    fn read_at(&self, start: u64, memory: &mut [u8]) -> Result<()> {
        let read = Python::attach(|py| -> PyResult<Vec<u8>> {
            self.read.call1(py, (start, start + memory.len() as u64))?.extract(py)
        });
        match read {
            Ok(bytes) if bytes.len() == memory.len() => {
                memory.copy_from_slice(&bytes);
                Ok(())
            }
            Ok(_) => Err(Error::internal("a range has another length than was asked for")),
            Err(error) => {
                *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                Err(Error::internal("a range could not be read"))
            }
        }
    }
}

fn elsewhere(absent: Vec<Absent>) -> (checkpoint::Elsewhere, Failure) {
    let failure = Failure::default();
    let file = |(name, size, label, etag, start, read): Absent| {
        let rest = read.map(|read| -> Arc<dyn checkpoint::ReadAt> {
            Arc::new(Ranges { read, failure: Arc::clone(&failure) })
        });
        (name, checkpoint::Absent { size, remote: Remote { label, etag }, start, rest })
    };
    (absent.into_iter().map(file).collect(), failure)
}

/// The names of the files that hold the weights at `path`, where some files are not here.
#[pyfunction]
pub(super) fn weight_files(
    py: Python<'_>,
    path: PathBuf,
    absent: Vec<Absent>,
) -> PyResult<Vec<String>> {
    let (absent, _) = elsewhere(absent);
    let found = py.detach(|| checkpoint::weight_files(&path, &absent));
    found.map_err(|error| raise(py, &error))
}

/// Opens the checkpoint at `path`: a file of safetensors or torch, or a directory that holds one, or
/// shards with an index. Some of its files may not be here.
#[pyfunction]
#[pyo3(signature = (path, absent=Vec::new()))]
pub(super) fn open_checkpoint(
    py: Python<'_>,
    path: PathBuf,
    absent: Vec<Absent>,
) -> PyResult<Checkpoint> {
    let (absent, failure) = elsewhere(absent);
    let opened = py.detach(|| checkpoint::Checkpoint::open_with(&path, &absent));
    opened.map(|opened| Checkpoint(Arc::new(opened))).map_err(|error| {
        let failed = failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        failed.unwrap_or_else(|| raise(py, &error))
    })
}

/// What a tensor becomes, as [`checkpoint::Change`] has it.
type GivenChange = (
    u64,
    Vec<checkpoint::GivenTerm>,
    Option<(checkpoint::Given, bool)>,
    Option<(checkpoint::Given, Vec<(u64, u64)>)>,
);

impl TensorInfo {
    fn of(py: Python<'_>, tensor: checkpoint::Tensor<'_>) -> PyResult<Self> {
        Ok(Self {
            name: tensor.name.to_owned(),
            written: tensor.written.to_owned(),
            dtype: tensor.dtype.name(),
            shape: PyTuple::new(py, tensor.shape)?.unbind(),
            file: tensor.file,
            start: tensor.start,
        })
    }
}

impl Checkpoint {
    /// The checkpoint itself.
    pub(super) fn shared(&self) -> Arc<checkpoint::Checkpoint> {
        Arc::clone(&self.0)
    }
}

#[pymethods]
impl Checkpoint {
    /// The path it was opened at.
    #[getter]
    fn path(&self) -> String {
        self.0.path.display().to_string()
    }

    /// Its files: path, size, modification time in nanoseconds, device, inode.
    #[getter]
    fn files<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, &self.0.files)
    }

    /// Its index, described as its files are; none if it is a single file.
    #[getter]
    fn index<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, &self.0.index)
    }

    /// Its tensors in file order.
    #[getter]
    fn tensors(&self, py: Python<'_>) -> PyResult<Vec<TensorInfo>> {
        self.0.tensors().map(|tensor| TensorInfo::of(py, tensor)).collect()
    }

    /// How many tensors it has.
    fn __len__(&self) -> usize {
        self.0.len()
    }

    /// The tensor of that name, if there is one.
    fn get(&self, py: Python<'_>, name: &str) -> PyResult<Option<TensorInfo>> {
        self.0.get(name).map(|tensor| TensorInfo::of(py, tensor)).transpose()
    }

    /// The tensor at that place of the file order.
    fn tensor(&self, py: Python<'_>, index: usize) -> PyResult<TensorInfo> {
        if index >= self.0.len() {
            return Err(PyIndexError::new_err(format!("there is no tensor {index}")));
        }
        TensorInfo::of(py, self.0.tensor(index))
    }

    /// The names in file order.
    fn names(&self) -> Vec<&str> {
        self.0.tensors().map(|tensor| tensor.name).collect()
    }

    /// The same checkpoint, of which files that were not here lie at these paths now, by their labels.
    fn placed(&self, py: Python<'_>, places: HashMap<String, PathBuf>) -> PyResult<Self> {
        let moved = self.0.placed(&places);
        moved.map(|moved| Self(Arc::new(moved))).map_err(|error| raise(py, &error))
    }

    /// How many tensors have a name that another checkpoint has too.
    fn shared_names(&self, py: Python<'_>, other: PyRef<'_, Self>) -> usize {
        let other = other.shared();
        py.detach(|| self.0.shared_names(&other))
    }

    /// The same tensors under these names, in file order.
    fn renamed(&self, py: Python<'_>, names: Vec<String>) -> PyResult<Self> {
        let renamed = self.0.renamed(names.iter().map(String::as_str));
        renamed.map(|renamed| Self(Arc::new(renamed))).map_err(|error| raise(py, &error))
    }

    /// The names of the other tensors that are the same bytes as the one of that name.
    fn twins(&self, name: &str) -> Vec<&str> {
        let twins = self.0.find(name).into_iter().flat_map(|index| self.0.twins(index));
        twins.map(|other| self.0.tensor(other).name).collect()
    }

    /// The checkpoint without the tensors of these names.
    fn without(&self, names: Vec<String>) -> Self {
        let left_out: Vec<usize> = names.iter().filter_map(|name| self.0.find(name)).collect();
        Self(Arc::new(self.0.without(&left_out)))
    }

    /// The same with what adapters make of it. `copied` are tensors with a further name: that, and the
    /// old one. `replaced` are tensors that are an adapter's: name, and the adapter with the name there.
    /// `changed` are tensors with: elements of a row; terms (rows, rank, scale, left factor, right
    /// factor or none, a factor being a tensor, its first element, and the elements between lines and
    /// between steps of the rank); magnitudes and whether they are of rows; rows that are put in.
    fn adapted(
        &self,
        py: Python<'_>,
        adapters: Vec<PyRef<'_, Self>>,
        copied: Vec<(String, String)>,
        replaced: Vec<(String, checkpoint::Given)>,
        changed: Vec<(String, GivenChange)>,
    ) -> PyResult<Self> {
        let adapters: Vec<_> = adapters.iter().map(|adapter| adapter.shared()).collect();
        let change = |(name, (columns, terms, magnitude, replaced))| {
            (name, checkpoint::Change { columns, terms, magnitude, replaced })
        };
        let changed = changed.into_iter().map(change).collect();
        let all = checkpoint::Changes { copied, replaced, changed };
        let adapted = py.detach(|| self.0.adapted(&adapters, all));
        adapted.map(|adapted| Self(Arc::new(adapted))).map_err(|error| raise(py, &error))
    }

    /// Whether an adapter changes the tensor at that place of the file order.
    fn is_changed(&self, index: usize) -> bool {
        self.0.change_of(index).is_some()
    }

    /// The tensors in file order, in runs whose names begin alike up to the layer's number: that
    /// beginning, the first of them, and how many follow each other.
    fn runs(&self) -> Vec<(&str, usize, usize)> {
        let mut runs: Vec<(&str, usize, usize)> = Vec::new();
        for (at, tensor) in self.0.tensors().enumerate() {
            let lead = checkpoint::lead(tensor.name);
            match runs.last_mut() {
                Some((last, _, count)) if *last == lead => *count += 1,
                _ => runs.push((lead, at, 1)),
            }
        }
        runs
    }

    /// Maps one of its files, by its index: an object with the buffer protocol. It must still be the
    /// file whose header was read. What is written to a map that is writable stays in memory.
    fn map(&self, py: Python<'_>, file: usize, writable: bool) -> PyResult<FileMap> {
        let Some(input) = self.0.files.get(file) else {
            return Err(PyIndexError::new_err(format!("the checkpoint has no file {file}")));
        };
        let map = py.detach(|| LentMap::new(input, writable));
        map.map(FileMap).map_err(|error| raise(py, &error))
    }

    /// What is odd about it, in plain words.
    #[getter]
    fn warnings(&self) -> Vec<String> {
        self.0.warnings.clone()
    }
}

/// A file in memory. Views of it keep it there.
#[pyclass(frozen, module = "oxmerge._core")]
pub(super) struct FileMap(LentMap);

#[pymethods]
impl FileMap {
    /// # Safety
    ///
    /// Python calls it, with room for what it writes.
    unsafe fn __getbuffer__(
        map: &Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let (start, length, is_writable) = map.get().0.memory();
        let (start, length) = (start.cast(), length as ffi::Py_ssize_t);
        let read_only = c_int::from(!is_writable);
        // SAFETY: the bytes stay where they are while the object lives, which the view holds.
        let outcome =
            unsafe { ffi::PyBuffer_FillInfo(view, map.as_ptr(), start, length, read_only, flags) };
        if outcome == 0 { Ok(()) } else { Err(PyErr::fetch(map.py())) }
    }
}

/// An output file that is written array by array.
#[pyclass(frozen, module = "oxmerge._core")]
pub(super) struct Shard(ShardWriter);

/// Bytes that are written at once.
const WRITTEN: usize = 4 << 20;

#[pymethods]
impl Shard {
    /// Creates the file `name`, of `size` bytes that begin with the length and text of `header`, in the
    /// directory that is open as `descriptor`; messages call that `path`.
    #[new]
    fn create(
        py: Python<'_>,
        descriptor: RawFd,
        path: PathBuf,
        name: &str,
        header: &str,
        size: u64,
    ) -> PyResult<Self> {
        let create = || {
            let folder = OutputFolder::of_descriptor(descriptor, &path)?;
            let bytes = (size_of::<u64>() + header.len()) as u64;
            let text = |out: &mut dyn std::fmt::Write| out.write_str(header);
            ShardWriter::create(&folder, name, bytes, text, size, DirectMode::Auto)
        };
        py.detach(create).map(Self).map_err(|error| raise(py, &error))
    }

    /// Writes the elements of an array from byte `start` of the file on.
    fn write(&self, py: Python<'_>, start: u64, array: Given<'_>) -> PyResult<()> {
        let arrays = export_all(vec![array])?;
        let held = Held::of(&arrays)?;
        let (source, bytes) = (source(&arrays[0]), arrays[0].bytes);
        let size = arrays[0].dtype.size();
        let written = take_part(py, false, |control| {
            let (mut buffer, mut unused) = (AlignedBuffer::default(), AlignedBuffer::default());
            for first in (0..bytes).step_by(WRITTEN) {
                control.check()?;
                let (end, place) = (bytes.min(first + WRITTEN), start + first as u64);
                let part = source.read((first / size) as u64..(end / size) as u64, &mut unused)?;
                let offset = self.0.buffer_offset(place);
                buffer.grow(offset + part.len())?;
                buffer.as_mut_slice()[offset..offset + part.len()].copy_from_slice(part);
                self.0.write(place, &buffer, offset..offset + part.len())?;
            }
            Ok(())
        });
        drop(held);
        written
    }

    /// Flushes the file, of which every byte was written; what it is then: device, inode, size,
    /// modification time in nanoseconds.
    fn finish(&self, py: Python<'_>) -> PyResult<(u64, u64, u64, i64)> {
        let file = py.detach(|| self.0.finish()).map_err(|error| raise(py, &error))?;
        Ok((file.device, file.inode, file.size, file.modified_ns))
    }
}

/// The text of an index file for tensors (name, shard file, bytes).
#[pyfunction]
pub(super) fn index_json(tensors: Vec<(String, String, u64)>) -> String {
    checkpoint::index_json(tensors.iter().map(|(name, file, size)| (&**name, &**file, *size)))
}

/// How the vocabularies in two lists of files differ in the ids below `rows`; none if they do not.
#[pyfunction]
pub(super) fn compare_vocabularies(
    py: Python<'_>,
    one: Vec<PathBuf>,
    other: Vec<PathBuf>,
    rows: u64,
) -> PyResult<Bound<'_, PyAny>> {
    let difference = enter(py, None, |_| checkpoint::vocabulary::compare(&one, &other, rows))?;
    to_python(py, &difference)
}

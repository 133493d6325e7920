//! Checkpoints in.

use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use std::sync::Arc;

use super::enter::enter;
use super::error::raise;
use super::to_python;
use crate::checkpoint;

/// A checkpoint that was opened from its headers only.
#[pyclass(frozen, module = "oxmerge._core")]
pub(super) struct Checkpoint(Arc<checkpoint::Checkpoint>);

/// One tensor of a checkpoint, as its header describes it.
#[pyclass(frozen, get_all, module = "oxmerge._core")]
pub(super) struct TensorInfo {
    /// Its name.
    name: String,
    /// Its element type, by its safetensors name.
    dtype: &'static str,
    /// Its shape.
    shape: Py<PyTuple>,
    /// Index into the checkpoint's files.
    file: usize,
    /// First byte in that file.
    start: u64,
}

/// Opens the checkpoint at `path`: a safetensors file, or a directory that holds one, or shards
/// with an index.
#[pyfunction]
pub(super) fn open_checkpoint(py: Python<'_>, path: std::path::PathBuf) -> PyResult<Checkpoint> {
    let opened = py.detach(|| checkpoint::Checkpoint::open(&path));
    opened.map(|opened| Checkpoint(Arc::new(opened))).map_err(|error| raise(py, &error))
}

impl TensorInfo {
    fn of(py: Python<'_>, tensor: checkpoint::Tensor<'_>) -> PyResult<Self> {
        Ok(Self {
            name: tensor.name.to_owned(),
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

    /// What is odd about it, in plain words.
    #[getter]
    fn warnings(&self) -> Vec<String> {
        self.0.warnings.clone()
    }
}

/// How the vocabularies in two lists of files differ in the ids below `rows`; none if they do not.
#[pyfunction]
pub(super) fn compare_vocabularies(
    py: Python<'_>,
    one: Vec<std::path::PathBuf>,
    other: Vec<std::path::PathBuf>,
    rows: u64,
) -> PyResult<Bound<'_, PyAny>> {
    let difference = enter(py, None, |_| checkpoint::vocabulary::compare(&one, &other, rows))?;
    to_python(py, &difference)
}

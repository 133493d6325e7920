//! Checkpoints in, shard layouts out.

#![expect(unsafe_code, reason = "the memory of a map is exported by a function of C")]

use std::os::raw::c_int;

use pyo3::exceptions::PyIndexError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::error::raise;
use super::to_python;
use crate::checkpoint;
use crate::dtype::DType;
use crate::error::Error;
use crate::io::LentMap;

/// A checkpoint that was opened from its headers only.
#[pyclass(frozen, module = "oxmerge._core")]
pub(super) struct Checkpoint(checkpoint::Checkpoint);

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
    opened.map(Checkpoint).map_err(|error| raise(py, &error))
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
        let info = |tensor: &checkpoint::TensorInfo| {
            Ok(TensorInfo {
                name: tensor.name.clone(),
                dtype: tensor.dtype.name(),
                shape: PyTuple::new(py, &tensor.shape)?.unbind(),
                file: tensor.file,
                start: tensor.start,
            })
        };
        self.0.tensors.iter().map(info).collect()
    }

    /// Maps one of its files, by its index: an object with the buffer protocol. It must still be the
    /// file whose header was read.
    fn map(&self, py: Python<'_>, file: usize) -> PyResult<FileMap> {
        let Some(input) = self.0.files.get(file) else {
            return Err(PyIndexError::new_err(format!("the checkpoint has no file {file}")));
        };
        py.detach(|| LentMap::new(input)).map(FileMap).map_err(|error| raise(py, &error))
    }

    /// What is odd about it, in plain words.
    #[getter]
    fn warnings(&self) -> Vec<String> {
        self.0.warnings.clone()
    }
}

/// A file in memory, read-only. Views of it keep it there.
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
        let bytes = map.get().0.bytes();
        let (start, length) = (bytes.as_ptr().cast_mut().cast(), bytes.len() as ffi::Py_ssize_t);
        // SAFETY: the bytes stay where they are while the object lives, which the view holds; they are
        // exported as read-only.
        let outcome =
            unsafe { ffi::PyBuffer_FillInfo(view, map.as_ptr(), start, length, 1, flags) };
        if outcome == 0 { Ok(()) } else { Err(PyErr::fetch(map.py())) }
    }
}

type Places = Vec<(usize, u64)>;

/// Divides tensors (name, dtype, shape) among shards of at most `shard_size` bytes.
///
/// Returns the shards, and for each tensor its shard and its first byte in that file.
#[pyfunction]
pub(super) fn lay_out(
    py: Python<'_>,
    tensors: Vec<(String, String, Vec<u64>)>,
    shard_size: u64,
) -> PyResult<(Bound<'_, PyAny>, Places)> {
    let with_dtype =
        |(name, dtype, shape): (String, String, Vec<u64>)| match DType::from_name(&dtype) {
            Some(known) => Ok((name, known, shape)),
            None => Err(Error::plan(format!("there is no element type `{dtype}`")).tensor(name)),
        };
    let tensors: Result<Vec<_>, _> = tensors.into_iter().map(with_dtype).collect();
    let layout = tensors.and_then(|tensors| checkpoint::lay_out(&tensors, shard_size, "model"));
    let layout = layout.map_err(|error| raise(py, &error))?;
    Ok((to_python(py, &layout.shards)?, layout.places))
}

/// The text of an index file for tensors (name, shard file, bytes).
#[pyfunction]
pub(super) fn index_json(tensors: Vec<(String, String, u64)>) -> String {
    checkpoint::index_json(tensors.iter().map(|(name, file, size)| (&**name, &**file, *size)))
}

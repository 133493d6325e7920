//! The spool, for Python, which fetches what goes into it.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::error::raise;
use super::plan::Plan;
use crate::engine::files::Merges;
use crate::error::Result;
use crate::io::{self, Needs, ReadPath};
use crate::plan;

/// Bytes that are handed out at once, at the most.
const MOST_PEEKED: u64 = 4 << 20;

/// A bounded file for what is read of files that are not here.
#[pyclass(frozen, module = "oxmerge._core")]
pub(super) struct Spool(Arc<io::Spool>);

impl Spool {
    pub(super) fn shared(&self) -> Arc<io::Spool> {
        Arc::clone(&self.0)
    }
}

/// What merges of the same tensors read of files that are not here; or some `tensors` of them, or those of
/// some `shards`. If they are `whole`, numbers over the model are found from all tensors nevertheless.
fn needs(
    plans: &[Arc<plan::Plan>],
    bytes: u64,
    tensors: Option<&HashSet<usize>>,
    shards: Option<&[usize]>,
    whole: bool,
) -> Result<Needs> {
    let plans: Vec<&plan::Plan> = plans.iter().map(|plan| &**plan).collect();
    let is_made = |at: usize, in_sweep: bool| {
        let shard = plans[0].tensor(at).shard();
        let is_one = tensors.is_none_or(|some| some.contains(&at));
        (in_sweep && whole) || (is_one && shards.is_none_or(|some| some.contains(&shard)))
    };
    Merges::open(plans.clone(), ReadPath::Auto, None)?.0.remote_needs(bytes, is_made)
}

#[pymethods]
impl Spool {
    /// Creates a spool of at most `size` bytes in `folder`, for merges of the same tensors; or for some
    /// `tensors` of them, or for those of some `shards`. If they are `whole`, numbers over the model are
    /// found from all tensors nevertheless. Fails if a tensor needs more.
    #[new]
    #[pyo3(signature = (plans, size, folder, tensors=None, shards=None, whole=false))]
    fn create(
        py: Python<'_>,
        plans: Vec<PyRef<'_, Plan>>,
        size: u64,
        folder: PathBuf,
        tensors: Option<HashSet<usize>>,
        shards: Option<Vec<usize>>,
        whole: bool,
    ) -> PyResult<Self> {
        let plans: Vec<_> = plans.iter().map(|plan| plan.table()).collect();
        let needs = || needs(&plans, size, tensors.as_ref(), shards.as_deref(), whole);
        let create = || io::Spool::create(&folder, size, needs()?);
        py.detach(create).map(|spool| Self(Arc::new(spool))).map_err(|error| raise(py, &error))
    }

    /// Bytes that a spool of at most `size` would take, and that would be fetched at the most.
    #[staticmethod]
    fn predict(py: Python<'_>, plans: Vec<PyRef<'_, Plan>>, size: u64) -> PyResult<(u64, u64)> {
        let plans: Vec<_> = plans.iter().map(|plan| plan.table()).collect();
        let needs = py
            .detach(|| needs(&plans, size, None, None, false))
            .map_err(|error| raise(py, &error))?;
        Ok((needs.room().min(size), needs.fetched(size)))
    }

    /// What is to be fetched next, when there is room: its number, the file, and from where to where;
    /// None when the work is over.
    fn next(&self, py: Python<'_>) -> Option<(u32, u32, u64, u64)> {
        let io::Fetch { extent, file, bytes } = py.detach(|| self.0.next())?;
        Some((extent, file, bytes.start, bytes.end))
    }

    /// Puts in bytes of an extent, which begin at `start` of its file. Raises `KeyboardInterrupt` when
    /// nobody wants them any more.
    fn put(&self, py: Python<'_>, extent: u32, start: u64, piece: &[u8]) -> PyResult<()> {
        py.detach(|| self.0.put(extent, start, piece)).map_err(|error| raise(py, &error))
    }

    /// Bytes of an extent that were put in.
    fn peek<'py>(
        &self,
        py: Python<'py>,
        extent: u32,
        start: u64,
        stop: u64,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let mut bytes = vec![0; stop.saturating_sub(start).min(MOST_PEEKED) as usize];
        py.detach(|| self.0.peek(extent, start, &mut bytes)).map_err(|error| raise(py, &error))?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// All bytes of an extent are in.
    fn arrived(&self, extent: u32) {
        self.0.arrived(extent);
    }

    /// Ends all waiting.
    fn stop(&self) {
        self.0.stop();
    }

    /// Bytes that are fetched at the most.
    #[getter]
    fn to_fetch(&self) -> u64 {
        self.0.to_fetch()
    }

    /// Bytes that were fetched.
    #[getter]
    fn fetched(&self) -> u64 {
        self.0.fetched()
    }
}

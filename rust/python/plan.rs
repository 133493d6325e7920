//! The plan's table, for Python to look at and to hand on.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::sync::Arc;

use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyDict, PyList, PyTuple};

use super::digests::Digests;
use super::error::raise;
use super::formula::Raised;
use super::to_python;
use crate::checkpoint;
use crate::engine::{files, manifest, verifying};
use crate::methods;
use crate::plan;
use crate::plan::{MethodSource, Parameters};

/// Hands what is written to a function of Python.
struct Parts<'a, 'py> {
    write: &'a Bound<'py, PyAny>,
    failure: Option<PyErr>,
}

impl std::io::Write for Parts<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self.write.call1((PyBytes::new(self.write.py(), bytes),)) {
            Ok(_) => Ok(bytes.len()),
            Err(failure) => {
                self.failure = Some(failure);
                Err(std::io::Error::other("the caller cannot take it"))
            }
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Hands what `put` writes to `write`, part by part.
fn in_parts(
    write: &Bound<'_, PyAny>,
    put: impl FnOnce(&mut std::io::BufWriter<&mut Parts<'_, '_>>) -> std::io::Result<()>,
) -> PyResult<()> {
    let mut parts = Parts { write, failure: None };
    let mut out = std::io::BufWriter::with_capacity(64 << 10, &mut parts);
    let done = put(&mut out).and_then(|()| std::io::Write::flush(&mut out));
    drop(out);
    match (parts.failure, done) {
        (Some(failure), _) => Err(failure),
        (None, done) => Ok(done?),
    }
}

/// The table of a plan.
#[pyclass(frozen, module = "oxmerge._core")]
pub(super) struct Plan(Arc<plan::Plan>, Raised);

impl Plan {
    /// The table itself.
    pub(super) fn table(&self) -> Arc<plan::Plan> {
        Arc::clone(&self.0)
    }

    /// Where the functions of its formulas leave their exceptions.
    pub(super) fn raised(&self) -> Raised {
        self.1.clone()
    }
}

impl From<plan::Plan> for Plan {
    fn from(plan: plan::Plan) -> Self {
        Self(Arc::new(plan), Raised::default())
    }
}

#[pymethods]
impl Plan {
    /// The merge method's name.
    #[getter]
    fn method(&self) -> &str {
        &self.0.method
    }

    /// Module, name and digest of the Python function that is the merge method, if it is one.
    #[getter]
    fn source(&self) -> Option<(&str, &str, &str)> {
        let source = self.0.source.as_ref()?;
        Some((&source.module, &source.function, &source.digest))
    }

    /// The same plan, whose method is a Python function: `source` says which. `write` returns the
    /// formula of each distinct setting, or of `each` tensor.
    ///
    /// It is called with the number of inputs, the base, the shared parameters and those of each input;
    /// and, for `each` tensor, with its name, shape and element type.
    fn with_formulas(
        &self,
        source: (String, String, String),
        write: Bound<'_, PyAny>,
        each: bool,
    ) -> PyResult<Self> {
        let (py, raised) = (write.py(), Raised::default());
        let (module, function, digest) = source;
        let mut table = plan::Plan::clone(&self.0);
        table.source = Some(MethodSource { module, function, digest });
        let table = table.written(each, |tensor| {
            let settings = tensor.settings();
            if methods::keeps(&settings.shared) {
                return Ok(None);
            }
            let own: Vec<&Parameters> = settings.own.iter().map(|own| &**own).collect();
            let shared = to_python(py, &without_modifiers(&settings.shared))?;
            let own = to_python(py, &own)?;
            let about = each.then(|| (tensor.name(), tensor.shape(), tensor.dtype().name()));
            let inputs = tensor.sources().len();
            let written = write.call1((inputs, tensor.base(), shared, own, about))?;
            raised.checked(&written, inputs).map(Some)
        });
        Ok(Self(Arc::new(table?), raised))
    }

    /// The seed of random masks.
    #[getter]
    fn seed(&self) -> u64 {
        self.0.seed
    }

    /// The input files: path, size, modification time in nanoseconds, device, inode.
    #[getter]
    fn files<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, &self.0.files)
    }

    /// The files that some tensors are made of, by their numbers, or that all are: as indices, in the
    /// order of their first use.
    #[pyo3(signature = (tensors=None))]
    fn files_of(&self, tensors: Option<Vec<usize>>) -> PyResult<Vec<usize>> {
        let Some(tensors) = tensors else { return Ok(self.0.files_of(self.0.tensors())) };
        if tensors.iter().any(|&at| at >= self.0.len()) {
            return Err(PyIndexError::new_err("there is no tensor of that number"));
        }
        Ok(self.0.files_of(tensors.into_iter().map(|at| self.0.tensor(at))))
    }

    /// Whether making any tensor takes numbers over all of them.
    fn needs_all(&self, py: Python<'_>) -> PyResult<bool> {
        py.detach(|| verifying::needs_all(&self.0)).map_err(|error| raise(py, &error))
    }

    /// The same plan, of which files that were not here lie at these paths now, by their labels.
    fn placed(&self, py: Python<'_>, places: HashMap<String, PathBuf>) -> PyResult<Self> {
        let moved = self.0.placed(&places).map_err(|error| raise(py, &error))?;
        Ok(Self(Arc::new(moved), self.1.clone()))
    }

    /// The output files: final name and bytes.
    #[getter]
    fn shards(&self) -> Vec<(&str, u64)> {
        self.0.shards.iter().map(|shard| (&*shard.file_name, shard.size)).collect()
    }

    /// Bytes of all sources.
    #[getter]
    fn bytes_read(&self) -> u64 {
        self.0.bytes_read()
    }

    /// Bytes of all output tensors.
    #[getter]
    fn bytes_written(&self) -> u64 {
        self.0.bytes_written()
    }

    /// How many output tensors there are.
    fn __len__(&self) -> usize {
        self.0.len()
    }

    /// The names of the output tensors, in the donor's order.
    fn names(&self) -> Vec<&str> {
        self.0.tensors().map(plan::Tensor::name).collect()
    }

    /// The index of each name, in file order.
    fn by_place<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let found = PyDict::new(py);
        for &index in self.0.by_place() {
            found.set_item(self.0.tensor(index as usize).name(), index)?;
        }
        Ok(found)
    }

    /// The place of the tensor of that name, if there is one.
    fn find(&self, name: &str) -> Option<usize> {
        self.0.tensors().position(|tensor| tensor.name() == name)
    }

    /// Bytes of the output by element type.
    fn bytes_by_dtype<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let mut sizes = std::collections::BTreeMap::<_, u64>::new();
        let mut order = Vec::new();
        for tensor in self.0.tensors() {
            let size = sizes.entry(tensor.dtype()).or_insert_with(|| {
                order.push(tensor.dtype());
                0
            });
            *size += tensor.bytes();
        }
        let by_name = PyDict::new(py);
        for dtype in order {
            by_name.set_item(dtype.name(), sizes[&dtype])?;
        }
        Ok(by_name)
    }

    /// Bytes of the sources of each tensor that has more of them than `least`, together.
    fn bytes_of_sources_above(&self, least: u64) -> u64 {
        let sizes = self.0.tensors().map(plan::Tensor::source_bytes);
        sizes.filter(|&size| size > least).sum()
    }

    /// Whether the name of any tensor ends so.
    fn has_name_ending(&self, ending: &str) -> bool {
        self.0.tensors().any(|tensor| tensor.name().ends_with(ending))
    }

    /// The text of the index of the output files.
    fn index_json(&self) -> String {
        let shards = &self.0.shards;
        checkpoint::index_json(
            self.0
                .tensors()
                .map(|tensor| (tensor.name(), &*shards[tensor.shard()].file_name, tensor.bytes())),
        )
    }

    /// A row: name, shape, element type, shard, first byte, base, shared parameters, where they
    /// come from; and for each source model, name, element type, file, first byte, parameters,
    /// whether its rows are taken by token, and whether an adapter changes it.
    fn row<'py>(&self, py: Python<'py>, index: usize) -> PyResult<Bound<'py, PyTuple>> {
        if index >= self.0.len() {
            return Err(PyIndexError::new_err(format!("the plan has no tensor {index}")));
        }
        let tensor = self.0.tensor(index);
        let settings = tensor.settings();
        let sources = PyList::empty(py);
        for (source, own) in tensor.sources().zip(&settings.own) {
            sources.append((
                &self.0.models[source.model],
                source.name,
                source.stored().name(),
                source.file,
                source.start,
                to_python(py, &**own)?,
                source.rows.is_some(),
                source.all_adapted().any(|change| !change.is_view()),
            ))?;
        }
        (
            tensor.name(),
            PyTuple::new(py, tensor.shape())?,
            tensor.dtype().name(),
            tensor.shard(),
            tensor.start(),
            tensor.base(),
            to_python(py, &*settings.shared)?,
            to_python(py, &settings.origin)?,
            sources,
        )
            .into_pyobject(py)
    }

    /// The kinds of tensors: what each is made by, as text, with its shared parameters and those of
    /// each input. Equal texts are equal formulas, but for what is in a function of numbers that are
    /// found on the way: `f0(...)`.
    fn kinds<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let kinds = py.detach(|| files::formulas(&self.0)).map_err(|error| raise(py, &error))?;
        let described: Vec<_> = kinds
            .iter()
            .map(|(formula, settings)| {
                let own: Vec<&Parameters> = settings.own.iter().map(|own| &**own).collect();
                serde_json::json!([formula, &*settings.shared, own])
            })
            .collect();
        to_python(py, &described)
    }

    /// Hands to `write` what decides each tensor: name, type, base, sources, and what its kind is
    /// said to be.
    fn write_effects(&self, kinds: Vec<String>, write: Bound<'_, PyAny>) -> PyResult<()> {
        for tensor in self.0.tensors() {
            let place = |each: plan::Source<'_>| {
                let adapted: Vec<_> = each.all_adapted().collect();
                let changes = (!adapted.is_empty()).then(|| format!("{adapted:?}"));
                (each.file, each.start, digest(each.rows), changes)
            };
            let places: Vec<_> = tensor.sources().map(place).collect();
            let kind = kinds.get(tensor.kind());
            let of_tensor = (tensor.name(), tensor.dtype(), tensor.base(), places, kind);
            write.call1((PyBytes::new(write.py(), format!("{of_tensor:?}").as_bytes()),))?;
        }
        Ok(())
    }

    /// Whether arithmetic is in float64 whatever the types are.
    #[getter]
    fn in_f64(&self) -> bool {
        self.0.in_f64
    }

    /// Hands the table as JSON to `write`, part by part.
    fn write(&self, write: Bound<'_, PyAny>) -> PyResult<()> {
        in_parts(&write, |out| plan::save(&self.0, out))
    }

    /// Hands what of the table decides the output to `write`, part by part: the same on any machine.
    fn write_portable(&self, write: Bound<'_, PyAny>) -> PyResult<()> {
        in_parts(&write, |out| plan::save_effects(&self.0, out))
    }

    /// For each model, the files that its tensors are read from, as indices.
    fn files_of_models(&self) -> Vec<Vec<usize>> {
        let mut files = vec![std::collections::BTreeSet::new(); self.0.models.len()];
        for source in self.0.tensors().flat_map(plan::Tensor::sources) {
            let of_adapters = source.adapted.into_iter().flat_map(|adapted| adapted.files());
            files[source.model].insert(source.file);
            files[source.model].extend(of_adapters.map(|file| file as usize));
        }
        files.into_iter().map(|files| files.into_iter().collect()).collect()
    }

    /// Hands the list of the output tensors as JSON to `write`, part by part, with what is known of
    /// each.
    #[pyo3(signature = (write, digests=None))]
    fn write_tensors(
        &self,
        write: Bound<'_, PyAny>,
        digests: Option<PyRef<'_, Digests>>,
    ) -> PyResult<()> {
        in_parts(&write, |out| match digests {
            Some(digests) => digests.look(|known| manifest::put_tensors(&self.0, Some(known), out)),
            None => manifest::put_tensors(&self.0, None, out),
        })
    }

    /// Bytes that the list of the output tensors takes at the most.
    #[getter]
    fn tensors_bytes(&self) -> u64 {
        manifest::most_bytes(&self.0)
    }

    /// Reads a plan that was saved, from its text; and what was saved with the table, as JSON.
    #[staticmethod]
    fn load(py: Python<'_>, text: &str) -> PyResult<(Self, String)> {
        let loaded = py.detach(|| plan::load(text, checkpoint::header_bytes));
        let (plan, output) = loaded.map_err(|error| raise(py, &error))?;
        Ok((plan.into(), output.to_string()))
    }

    /// The distinct settings: shared parameters, and those of each input.
    fn settings<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let settings: Vec<_> = self
            .0
            .settings()
            .iter()
            .map(|settings| {
                let own: Vec<&Parameters> = settings.own.iter().map(|own| &**own).collect();
                serde_json::json!([&*settings.shared, own])
            })
            .collect();
        to_python(py, &settings)
    }

    /// For each input of each of the settings, its model, unless it is now of one and now of another.
    fn models_of_settings(&self) -> Vec<Vec<Option<usize>>> {
        self.0.models_of_settings()
    }

    /// What the merge method finds wrong with the tensors.
    fn problems<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let problems = py.detach(|| files::problems(&self.0));
        let described: Vec<_> = problems
            .iter()
            .map(|error| {
                let parts = error.parts();
                serde_json::json!({
                    "message": error.message(),
                    "tensor": parts.tensor,
                    "expected": parts.expected,
                    "found": parts.found,
                    "advice": parts.advice,
                })
            })
            .collect();
        to_python(py, &described)
    }
}

/// A number that tells apart which rows are taken.
fn digest(rows: Option<plan::Rows<'_>>) -> u64 {
    let mut hasher = DefaultHasher::new();
    rows.map(|rows| (rows.map, rows.parts)).hash(&mut hasher);
    hasher.finish()
}

/// The parameters that are a method's own.
fn without_modifiers(all: &Parameters) -> Parameters {
    let mut own = all.clone();
    own.retain(|name, _| methods::MODIFIERS.iter().all(|modifier| modifier.name != name));
    own
}

/// Numbers and switches by name, as a plan has them.
pub(super) fn parameters(given: &Bound<'_, PyDict>) -> PyResult<Parameters> {
    let mut parameters = Parameters::new();
    for (name, value) in given {
        let value = if let Ok(switch) = value.cast::<PyBool>() {
            switch.is_true().into()
        } else if let Ok(whole) = value.extract::<i64>() {
            whole.into()
        } else {
            value.extract::<f64>()?.into()
        };
        parameters.insert(name.extract()?, value);
    }
    Ok(parameters)
}

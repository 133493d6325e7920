//! Putting a plan together from Python, run by run.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::checkpoint::Checkpoint;
use super::enter::enter;
use super::error::raise;
use super::plan::{Plan, parameters};
use crate::assembly::{self, Column, Fate, Keeping};
use crate::checkpoint;
use crate::checkpoint::token_rows::{self, Filling};
use crate::dtype::DType;
use crate::error::Error;
use crate::plan::{InputFile, Settings};

/// A plan that is put together from models.
#[pyclass(module = "oxmerge._core")]
pub(super) struct Assembly(Option<assembly::Assembly>);

/// Tensors that are treated alike but for filters.
#[pyclass(module = "oxmerge._core")]
pub(super) struct Run {
    run: assembly::Run,
    /// Positions of tensors that need a look, and whether the output has such a name already.
    #[pyo3(get)]
    odd: Vec<(usize, bool)>,
}

/// Which row of each model stands for which token of the output.
#[pyclass(module = "oxmerge._core")]
pub(super) struct TokenRows(Option<token_rows::TokenRows>);

/// What becomes of every tensor of a model.
#[pyclass(frozen, module = "oxmerge._core")]
pub(super) struct Fates {
    model: Arc<checkpoint::Checkpoint>,
    fates: Vec<Fate>,
}

impl Assembly {
    fn inner(&mut self) -> PyResult<&mut assembly::Assembly> {
        self.0.as_mut().ok_or_else(|| PyValueError::new_err("the plan is finished"))
    }
}

#[pymethods]
impl Assembly {
    /// Begins a plan of models, each with what the recipe calls it.
    #[new]
    fn new(
        py: Python<'_>,
        method: String,
        seed: u64,
        models: Vec<(String, PyRef<'_, Checkpoint>)>,
        other_files: &str,
        dtype: Option<&str>,
        in_f64: bool,
    ) -> PyResult<Self> {
        let other_files: Vec<InputFile> = serde_json::from_str(other_files)
            .map_err(|error| PyValueError::new_err(error.to_string()))?;
        let dtype = dtype.map(|name| {
            let unknown = || Error::plan(format!("there is no element type `{name}`"));
            DType::from_name(name).ok_or_else(unknown).map_err(|error| raise(py, &error))
        });
        let models = models.into_iter().map(|(label, model)| (label, model.shared())).collect();
        let dtype = dtype.transpose()?;
        Ok(Self(Some(assembly::Assembly::new(method, seed, models, other_files, dtype, in_f64))))
    }

    /// Takes the rows of the tensors of these names by token.
    fn align(
        &mut self,
        mut tokens: PyRefMut<'_, TokenRows>,
        names: HashSet<String>,
    ) -> PyResult<()> {
        tokens.inner()?;
        if let Some(tokens) = tokens.0.take() {
            self.inner()?.align(tokens, names);
        }
        Ok(())
    }

    /// Takes down the shapes in the layers of the model that gives the config.
    fn like_layers_of(&mut self, donor: usize, prefixes: HashSet<String>) -> PyResult<()> {
        self.inner()?.like_layers_of(donor, &prefixes);
        Ok(())
    }

    /// The shapes that the layers of that model have at a tensor's place.
    fn shapes_in_layers(
        &mut self,
        run: PyRef<'_, Run>,
        at: usize,
        donor_lead: &str,
    ) -> PyResult<Vec<Vec<u64>>> {
        let inner = self.inner()?;
        Ok(inner.shapes_in_layers(&run.run, at, donor_lead))
    }

    /// Finds the tensors of a run: of the donor (the first, and how many from there on), in the output,
    /// and in each column's model. Of the columns, `keeping` says how many are inputs, which tensors are
    /// made of one column alone, and of which those that an input lacks or has in another shape.
    #[expect(clippy::too_many_arguments, reason = "what a run is")]
    fn find(
        &mut self,
        donor: usize,
        tensors: Vec<(usize, usize)>,
        donor_lead: &str,
        lead: &str,
        columns: Vec<(usize, String)>,
        is_like: bool,
        quantised: Vec<bool>,
        keeping: (usize, HashMap<usize, usize>, Option<usize>),
    ) -> PyResult<Run> {
        let (inputs, kept, otherwise) = keeping;
        let known = |&column: &usize| column < columns.len();
        if inputs > columns.len() || !kept.values().chain(&otherwise).all(known) {
            return Err(PyIndexError::new_err("a tensor is kept from a column that is not there"));
        }
        let keeping = Keeping { inputs, kept, otherwise };
        let tensors = tensors.into_iter().flat_map(|(first, count)| first..first + count).collect();
        let columns = columns.into_iter().map(|(model, lead)| Column { model, lead }).collect();
        let inner = self.inner()?;
        let (run, odd) =
            inner.find(donor, tensors, donor_lead, lead, columns, is_like, &quantised, keeping);
        Ok(Run { run, odd: odd.into_iter().map(|odd| (odd.at, odd.is_twice)).collect() })
    }

    /// Puts the tensors of a run that the same filters choose into groups: a tensor of each, and
    /// whether parameters matter to it.
    fn group(
        &mut self,
        mut run: PyRefMut<'_, Run>,
        filters: Vec<Vec<String>>,
    ) -> PyResult<Vec<(usize, bool)>> {
        Ok(self.inner()?.group(&mut run.run, &filters))
    }

    /// The names of a tensor: in the output, and in each column's model, if it is there.
    fn names(&mut self, run: PyRef<'_, Run>, at: usize) -> PyResult<(String, Vec<Option<String>>)> {
        if at >= run.run.len() {
            return Err(PyIndexError::new_err(at));
        }
        let inner = self.inner()?;
        let columns = 0..run.run.columns();
        let name = |column| inner.source(&run.run, at, column).map(|tensor| tensor.name.to_owned());
        Ok((run.run.name(at).to_owned(), columns.map(name).collect()))
    }

    /// Adds settings that no others equal; their number.
    fn add_settings(
        &mut self,
        shared: &Bound<'_, PyDict>,
        own: Vec<Bound<'_, PyDict>>,
        origin: &str,
    ) -> PyResult<u32> {
        let origin = serde_json::from_str(origin)
            .map_err(|error| PyValueError::new_err(error.to_string()))?;
        let own = own.iter().map(|own| parameters(own).map(Arc::new)).collect::<PyResult<_>>()?;
        let shared = Arc::new(parameters(shared)?);
        Ok(self.inner()?.add_settings(Settings { shared, own, origin }))
    }

    /// Adds the tensors of a run, but for those left out, with the settings of each group.
    fn add(
        &mut self,
        py: Python<'_>,
        run: PyRef<'_, Run>,
        settings: Vec<Option<u32>>,
        base: Option<usize>,
        left_out: HashSet<usize>,
    ) -> PyResult<()> {
        let added = self.inner()?.add(&run.run, &settings, base, &left_out);
        added.map_err(|error| raise(py, &error))
    }

    /// Lays out the output: the plan, and what becomes of the tensors of each model.
    fn finish(&mut self, py: Python<'_>, shard_size: u64) -> PyResult<(Plan, Vec<Fates>)> {
        let Some(inner) = self.0.take() else {
            return Err(PyValueError::new_err("the plan is finished"));
        };
        let models = inner.models().to_vec();
        let finished = py.detach(|| inner.finish(shard_size));
        let (plan, fates) = finished.map_err(|error| raise(py, &error))?;
        let fates = models.into_iter().zip(fates).map(|(model, fates)| Fates { model, fates });
        Ok((plan.into(), fates.collect()))
    }
}

#[pymethods]
impl Run {
    /// How many tensors it has.
    fn __len__(&self) -> usize {
        self.run.len()
    }

    /// The tensors that are made of one column alone, and which it is.
    fn kept(&self) -> HashMap<usize, usize> {
        self.run.kept().clone()
    }

    /// The tensor's index in the donor.
    fn tensor(&self, at: usize) -> usize {
        self.run.tensor(at)
    }

    /// The tensors of a group.
    fn members(&self, group: usize) -> Vec<usize> {
        self.run.members(group).collect()
    }
}

#[pymethods]
impl Fates {
    /// How many tensors have a fate: `merged`, `copied` or `dropped`.
    fn count(&self, fate: &str) -> PyResult<usize> {
        let fate = fate_of(fate)?;
        Ok(self.fates.iter().filter(|&&each| each == fate).count())
    }

    /// Their names, in file order.
    fn names(&self, fate: &str) -> PyResult<Vec<&str>> {
        let fate = fate_of(fate)?;
        let named = self.model.tensors().zip(&self.fates);
        Ok(named.filter(|(_, each)| **each == fate).map(|(tensor, _)| tensor.name).collect())
    }
}

impl TokenRows {
    fn inner(&mut self) -> PyResult<&mut token_rows::TokenRows> {
        self.0.as_mut().ok_or_else(|| PyValueError::new_err("the tokens are in a plan"))
    }
}

#[pymethods]
impl TokenRows {
    /// Reads the tokens of the output, whose ids are below `limit`, and those of models, each with how
    /// many rows it has; `base` is the base among them.
    #[new]
    fn new(
        py: Python<'_>,
        output: Vec<PathBuf>,
        limit: u64,
        models: Vec<(Vec<PathBuf>, u64)>,
        base: Option<usize>,
    ) -> PyResult<Self> {
        let read = enter(py, None, |_| token_rows::TokenRows::read(&output, limit, &models, base))?;
        Ok(Self(Some(read)))
    }

    /// How many rows the output has.
    #[getter]
    fn rows(&mut self) -> PyResult<u64> {
        Ok(self.inner()?.rows())
    }

    /// Gives the output so many rows; those behind its tokens are the mean of the others, or matched
    /// by number.
    fn resize(&mut self, py: Python<'_>, rows: u64, with_mean: bool) -> PyResult<()> {
        self.inner()?.resize(rows, with_mean).map_err(|error| raise(py, &error))
    }

    /// The id of a token of the output.
    fn find(&mut self, token: &str) -> PyResult<Option<u64>> {
        Ok(self.inner()?.find(token))
    }

    /// How many tokens of the output a model lacks.
    fn lacking(&mut self, model: usize) -> PyResult<usize> {
        Ok(self.inner()?.lacking(model))
    }

    /// How many tokens of a model the output lacks.
    fn foreign(&mut self, model: usize) -> PyResult<usize> {
        Ok(self.inner()?.foreign(model))
    }

    /// Whether a model has the token of row `row` of the output.
    fn has(&mut self, model: usize, row: u64) -> PyResult<bool> {
        Ok(self.inner()?.row(model, row).is_some())
    }

    /// Says what models are given that lack row `row` of the output, or all with `force`: zeros, the
    /// row of the token in `model`, or row `of` there; without a kind, what is usual.
    #[pyo3(signature = (row, kind, model=0, of=0, *, force))]
    fn fill(
        &mut self,
        row: u64,
        kind: Option<&str>,
        model: usize,
        of: u32,
        force: bool,
    ) -> PyResult<()> {
        let filling = match kind {
            None => Filling::Usual,
            Some("zero") => Filling::Zero,
            Some("model") => Filling::Model(model),
            Some("row") => Filling::Row(model, of),
            Some(kind) => {
                return Err(PyValueError::new_err(format!("a row cannot be filled with `{kind}`")));
            }
        };
        self.inner()?.fill(row, filling, force);
        Ok(())
    }
}

/// The tokens that have these ids in the vocabulary of `files`.
#[pyfunction]
pub(super) fn tokens_of(
    py: Python<'_>,
    files: Vec<PathBuf>,
    ids: Vec<u64>,
) -> PyResult<BTreeMap<u64, String>> {
    enter(py, None, |_| token_rows::tokens_of(&files, &ids))
}

/// The largest id in the vocabulary of `files`, if it has any token.
#[pyfunction]
pub(super) fn largest_token(py: Python<'_>, files: Vec<PathBuf>) -> PyResult<Option<u64>> {
    enter(py, None, |_| token_rows::largest_id(&files))
}

/// The id of a token in the vocabulary of `files`.
#[pyfunction]
pub(super) fn find_token(
    py: Python<'_>,
    files: Vec<PathBuf>,
    token: &str,
) -> PyResult<Option<u64>> {
    enter(py, None, |_| token_rows::find_token(&files, token))
}

fn fate_of(name: &str) -> PyResult<Fate> {
    match name {
        "merged" => Ok(Fate::Merged),
        "copied" => Ok(Fate::Copied),
        "dropped" => Ok(Fate::Dropped),
        other => {
            Err(PyValueError::new_err(format!("nothing becomes of a tensor called `{other}`")))
        }
    }
}

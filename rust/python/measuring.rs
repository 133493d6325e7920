//! What is found out about checkpoints: numbers about tensors, their hashes, whether they are what a plan
//! makes.

use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use serde_json::Value;

use super::checkpoint::Checkpoint;
use super::enter::enter;
use super::error::raise;
use super::merge::worker_count;
use super::spool::Spool;
use crate::checkpoint;
use crate::dtype::DType;
use crate::engine::{Settings, measuring, verifying};
use crate::io::ReadPath;
use crate::kernels::Level;
use crate::methods::measures::Measure;
use crate::plan::{self, Adapted, Builder, Input, Plan};

/// Measures rows of tensors: of each checkpoint in `columns` the tensor of that number, or none. What
/// a measure is of stands in `rust/methods/measures.rs`. The numbers of each row one after the other,
/// as bytes of float64.
#[pyfunction]
#[pyo3(signature = (measure, columns, rows, *, memory, threads=None, progress=None))]
pub(super) fn measure<'py>(
    py: Python<'py>,
    measure: &str,
    columns: Vec<(String, PyRef<'py, Checkpoint>)>,
    rows: Vec<Vec<Option<usize>>>,
    memory: u64,
    threads: Option<usize>,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyBytes>> {
    let measure = Measure::named(measure)
        .ok_or_else(|| PyValueError::new_err(format!("there is no measure `{measure}`")))?;
    let columns: Vec<(String, Arc<checkpoint::Checkpoint>)> =
        columns.into_iter().map(|(label, column)| (label, column.shared())).collect();
    let plan = plan_of(Some(measure), columns, &rows)?;
    drop(rows);
    let settings = settings(py, memory, threads)?;
    let numbers = enter(py, progress.as_ref(), |control| {
        measuring::measure(measure, &plan, ReadPath::Auto, &settings, control)
    })?;
    Ok(PyBytes::new(py, bytemuck::cast_slice(&numbers)))
}

/// The BLAKE3 hash of tensors of a checkpoint, one after the other.
#[pyfunction]
#[pyo3(signature = (checkpoint, tensors, *, memory, threads=None, progress=None))]
pub(super) fn hash_tensors<'py>(
    py: Python<'py>,
    checkpoint: PyRef<'py, Checkpoint>,
    tensors: Vec<usize>,
    memory: u64,
    threads: Option<usize>,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyBytes>> {
    let columns = vec![(String::new(), checkpoint.shared())];
    let rows: Vec<_> = tensors.into_iter().map(|at| vec![Some(at)]).collect();
    let plan = plan_of(None, columns, &rows)?;
    let settings = settings(py, memory, threads)?;
    let hashes =
        enter(py, progress.as_ref(), |control| verifying::hash(&plan, &settings, control))?;
    Ok(PyBytes::new(py, hashes.as_flattened()))
}

/// A tensor that differs: which it is, the first element, how many, and its bytes as they should be and
/// as they are.
type Differing<'py> = (usize, u64, u64, Bound<'py, PyBytes>, Bound<'py, PyBytes>);

/// Makes some tensors of a plan again, and compares each with one of a checkpoint, of the same type and
/// shape: pairs of their numbers. Of those that differ the number in the plan, the first element that
/// does, how many do, and that element's bytes as they should be and as they are. Inputs that are not here
/// come by `spool`; who fetches them may have `beside` bytes resident.
#[pyfunction]
#[pyo3(signature = (plan, checkpoint, pairs, *, memory, threads=None, progress=None, spool=None,
                    beside=0))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python function")]
pub(super) fn compare_outputs<'py>(
    py: Python<'py>,
    plan: PyRef<'py, super::plan::Plan>,
    checkpoint: PyRef<'py, Checkpoint>,
    pairs: Vec<(usize, usize)>,
    memory: u64,
    threads: Option<usize>,
    progress: Option<Bound<'py, PyAny>>,
    spool: Option<PyRef<'py, Spool>>,
    beside: u64,
) -> PyResult<Vec<Differing<'py>>> {
    let spool = spool.map(|spool| (spool.shared(), beside));
    let (table, raised, checkpoint) = (plan.table(), plan.raised(), checkpoint.shared());
    let fits = |&(output, at): &(usize, usize)| {
        output < table.len() && at < checkpoint.len() && {
            let (output, there) = (table.tensor(output), checkpoint.tensor(at));
            output.shape() == there.shape && output.dtype() == there.dtype
        }
    };
    if !pairs.iter().all(fits) {
        return Err(PyValueError::new_err("a pair is not of two tensors of one type and shape"));
    }
    let mut places = vec![None; table.len()];
    for (output, at) in pairs {
        let tensor = checkpoint.tensor(at);
        places[output] = Some(verifying::Place { file: tensor.file, start: tensor.start });
    }
    let settings = settings(py, memory, threads)?;
    let compared = enter(py, progress.as_ref(), |control| {
        if let Some((spool, _)) = spool.clone() {
            control.on_end(move || spool.stop());
        }
        verifying::compare(&table, &checkpoint.files, places, spool, &settings, control)
    });
    let deviations = raised.or(compared)?;
    let told = |(at, found): (usize, verifying::Deviation)| {
        let bytes = |bytes: &[u8]| PyBytes::new(py, bytes);
        (at, found.first, found.elements, bytes(&found.expected), bytes(&found.found))
    };
    Ok(deviations.into_iter().map(told).collect())
}

fn settings(py: Python<'_>, memory: u64, threads: Option<usize>) -> PyResult<Settings> {
    let level = Level::from_environment().map_err(|error| raise(py, &error))?;
    Ok(Settings { level, workers: worker_count(threads, 1), memory, largest_piece: None })
}

/// A plan whose tensors are made of the rows, in that order, and are called as in their first column:
/// for a measure, or else copies of the only one in a row.
fn plan_of(
    measure: Option<Measure>,
    columns: Vec<(String, Arc<checkpoint::Checkpoint>)>,
    rows: &[Vec<Option<usize>>],
) -> PyResult<Plan> {
    let (labels, models): (Vec<_>, Vec<_>) = columns.into_iter().unzip();
    let mut files = Vec::new();
    let mut first_files = Vec::new();
    for model in &models {
        first_files.push(files.len());
        files.extend_from_slice(&model.files);
    }
    let mut builder = Builder::new(Plan::new(String::new(), 0, files, labels));
    let inputs = models.len();
    let own = vec![Arc::default(); inputs];
    let shared: plan::Parameters = [("keep".to_owned(), true.into())].into_iter().collect();
    let shared = Arc::new(shared);
    let settings = builder.add_settings(plan::Settings { shared, own, origin: Value::Null });
    let (mut places, mut end) = (Vec::new(), 0_u64);
    for row in rows {
        let of = |(column, at): (usize, &Option<usize>)| Some((column, (*at)?));
        let found: Vec<_> = row.iter().enumerate().filter_map(of).collect();
        let known = |&(column, at): &(usize, usize)| {
            models.get(column).is_some_and(|model| at < model.len())
        };
        let tensors = found.iter().map(|&(column, at)| (column, models[column].tensor(at)));
        let (true, Some((_, first))) = (found.iter().all(known), tensors.clone().next()) else {
            return Err(PyValueError::new_err("a row names tensors that are not there"));
        };
        let types: Vec<DType> = tensors.clone().map(|(_, tensor)| tensor.dtype).collect();
        let has_shape = tensors.clone().all(|(_, tensor)| tensor.shape == first.shape);
        if !has_shape || !measure.map_or(types.len() == 1, |of| of.is_of(&types)) {
            let message = format!("`{}` is not to be measured so", first.name);
            return Err(PyValueError::new_err(message));
        }
        // What is adapted comes in the type that all is computed in.
        let working = types.iter().copied().fold(DType::F32, DType::promote);
        let mut inputs = Vec::new();
        for (model, at) in found {
            let (tensor, before) = (models[model].tensor(at), first_files[model]);
            let change = models[model].change_of(at);
            let is_changed = change.is_some_and(|change| !change.is_view());
            let adapted = change.map(|change| {
                let change = Adapted::clone(change).in_files(|file| before as u32 + file);
                builder.add_adapted(change)
            });
            inputs.push(Input {
                model,
                name: tensor.name,
                dtype: if is_changed { working } else { tensor.dtype },
                file: before + tensor.file,
                start: tensor.start,
                adapted,
                rows: None,
            });
        }
        let inputs = inputs.into_iter();
        builder.push(first.name, first.dtype, first.shape, settings, None, inputs);
        places.push((0, end));
        end = end.saturating_add(first.bytes());
    }
    builder.place(&places).map_err(|error| PyValueError::new_err(error.to_string()))
}

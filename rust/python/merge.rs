//! Plans in, merges out.

use std::path::{Path, PathBuf};

use pyo3::prelude::*;

use super::enter::enter;
use super::error::raise;
use super::to_python;
use crate::engine::files::{self, FileModes};
use crate::engine::memory::{self, MemoryPlan};
use crate::engine::{self, Settings};
use crate::error::{Error, Result};
use crate::io::{self, DirectMode, ReadPath};
use crate::kernels::Level;
use crate::methods::METHODS;
use crate::plan::{InputFile, PLAN_VERSION, Plan};

pub(super) fn parse(plan: &str) -> Result<Plan> {
    let plan: Plan = serde_json::from_str(plan)
        .map_err(|error| Error::plan(format!("the plan cannot be read: {error}")))?;
    if plan.version != PLAN_VERSION {
        return Err(Error::plan("the plan was made by another version of oxmerge")
            .expected(format!("plan version {PLAN_VERSION}"))
            .found(plan.version));
    }
    Ok(plan)
}

/// Every merge method: name, formula, inputs, parameters.
#[pyfunction]
pub(super) fn methods(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    let descriptions: Vec<_> = METHODS.iter().map(|method| method.description()).collect();
    to_python(py, &descriptions)
}

/// What the merge method finds wrong with the tensors of a plan.
#[pyfunction]
pub(super) fn check_plan<'py>(py: Python<'py>, plan: &str) -> PyResult<Bound<'py, PyAny>> {
    let plan = parse(plan).map_err(|error| raise(py, &error))?;
    let problems = plan.tensors.iter().filter_map(|tensor| files::work(&plan, tensor).err());
    let described: Vec<_> = problems
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

/// Raises `InputChangedError` if one of the files is not what it was.
#[pyfunction]
pub(super) fn check_unchanged(py: Python<'_>, files: &str) -> PyResult<()> {
    let files: Vec<InputFile> = serde_json::from_str(files)
        .map_err(|error| pyo3::exceptions::PyValueError::new_err(error.to_string()))?;
    io::check_unchanged(&files).map_err(|error| raise(py, &error))
}

/// How `memory` bytes would be shared out by merges that are made together: predicted peak, workers,
/// bytes a worker; and whether an input is read more than once.
#[pyfunction]
pub(super) fn predict(
    py: Python<'_>,
    plans: Vec<String>,
    memory: u64,
    threads: Option<usize>,
) -> PyResult<Bound<'_, PyAny>> {
    let plans: Result<Vec<Plan>> = plans.iter().map(|plan| parse(plan)).collect();
    let planned = plans.and_then(|plans| {
        let needs = files::needs(&plans.iter().collect::<Vec<_>>(), ReadPath::Auto)?;
        let resident = memory::resident();
        let memory = MemoryPlan::new(&needs, memory, worker_count(threads), resident)?;
        Ok((memory, needs.iter().any(|need| !need.reads_once())))
    });
    let (planned, rereads) = planned.map_err(|error| raise(py, &error))?;
    let mut described = describe_memory(&planned);
    described["rereads"] = rereads.into();
    to_python(py, &described)
}

/// Executes merges of the same tensors, as pairs of a plan and a directory: reads the inputs once,
/// and writes the shards of each, under partial names, into its directory.
///
/// Calls `progress(bytes_read, bytes_written, tensors, current, peak_memory)` ten times a second.
#[pyfunction]
#[pyo3(signature = (merges, *, memory, threads=None, read_path="auto", direct=true,
                    largest_piece=None, progress=None))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python function")]
pub(super) fn execute<'py>(
    py: Python<'py>,
    merges: Vec<(String, PathBuf)>,
    memory: u64,
    threads: Option<usize>,
    read_path: &str,
    direct: bool,
    largest_piece: Option<u64>,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let read = match read_path {
        "auto" => ReadPath::Auto,
        "mapped" => ReadPath::Mapped,
        "positioned" => ReadPath::Positioned,
        "direct" => ReadPath::Direct,
        other => {
            let message =
                format!("`{other}` is no read path: use auto, mapped, positioned or direct");
            return Err(pyo3::exceptions::PyValueError::new_err(message));
        }
    };
    let write = if direct { DirectMode::Auto } else { DirectMode::Never };
    let report = enter(py, progress.as_ref(), |control| {
        let parse = |(plan, directory)| Ok((parse(plan)?, Path::new(directory)));
        let merges: Vec<(Plan, &Path)> = merges
            .iter()
            .map(|(plan, directory)| parse((plan, directory)))
            .collect::<Result<_>>()?;
        let plans: Vec<&Plan> = merges.iter().map(|(plan, _)| plan).collect();
        let level = Level::from_environment()?;
        let workers = worker_count(threads);
        let settings = Settings { level, workers, memory, largest_piece };
        // Before any space is taken: what cannot fit is refused.
        MemoryPlan::new(&files::needs(&plans, read)?, memory, workers, memory::resident())?;
        let tasks = files::tasks(&merges, FileModes { read, write })?;
        let report = engine::run(tasks, &settings, control)?;
        io::check_unchanged(&plans[0].files)?;
        Ok(report)
    })?;
    let described = serde_json::json!({
        "seconds": report.seconds,
        "bytes_read": report.bytes_read,
        "bytes_written": report.bytes_written,
        "peak_memory": report.peak_memory,
        "simd": report.level.name(),
        "memory": describe_memory(&report.memory),
    });
    to_python(py, &described)
}

/// Unless asked otherwise, six more than cores: they wait for the disk while others compute.
fn worker_count(threads: Option<usize>) -> usize {
    threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from) + 6)
}

fn describe_memory(plan: &MemoryPlan) -> serde_json::Value {
    serde_json::json!({
        "budget": plan.budget,
        "baseline": plan.baseline,
        "predicted": plan.predicted,
        "workers": plan.workers,
        "worker_bytes": plan.worker_bytes,
    })
}

//! Plans in, merges out.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;

use super::digests::Digests;
use super::enter::enter;
use super::error::raise;
use super::formula::Raised;
use super::plan::Plan;
use super::spool::Spool;
use super::to_python;
use super::torch::Device;
use crate::engine::backend::Backend;
use crate::engine::digest;
use crate::engine::files::{self, FileModes};
use crate::engine::journal::{self, JOURNAL_EVERY, Journals};
use crate::engine::memory::{self, MemoryPlan};
use crate::engine::simd::Simd;
use crate::engine::{self, Exchange, Part, Settings, Surroundings, rehearsal};
use crate::error::{Error, Result};
use crate::io::{self, DirectMode, OutputFolder, ReadPath};
use crate::kernels::Level;
use crate::methods::{Description, METHODS, MODIFIERS, Method};
use crate::plan::{self, InputFile};

const MOST_WORKERS: usize = 1024;

/// The most bytes of this process that were ever resident.
#[pyfunction]
pub(super) fn peak_memory() -> u64 {
    memory::peak_resident()
}

/// The name that an output file has until it is complete.
#[pyfunction]
pub(super) fn partial_name(file_name: &str) -> String {
    files::partial_name(file_name)
}

/// Every merge method: name, formula, inputs, parameters.
#[pyfunction]
pub(super) fn methods(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    #[derive(serde::Serialize)]
    struct Row {
        #[serde(flatten)]
        description: Description,
        differs: &'static str,
    }
    let row =
        |method: &&dyn Method| Row { description: method.description(), differs: method.differs() };
    to_python(py, &METHODS.iter().map(row).collect::<Vec<_>>())
}

/// The parameters that every merge method has besides its own.
#[pyfunction]
pub(super) fn modifiers(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    to_python(py, &MODIFIERS)
}

/// Raises `InputChangedError` if one of the files is not what it was.
#[pyfunction]
pub(super) fn check_unchanged(py: Python<'_>, files: &str) -> PyResult<()> {
    let files: Vec<InputFile> = serde_json::from_str(files)
        .map_err(|error| pyo3::exceptions::PyValueError::new_err(error.to_string()))?;
    py.detach(|| io::check_unchanged(&files)).map_err(|error| raise(py, &error))
}

/// How `memory` bytes would be shared out by merges that are made together: predicted peak, workers,
/// bytes a worker; and whether an input is read more than once. So many bytes may be resident
/// `beside`.
#[pyfunction]
#[pyo3(signature = (plans, memory, threads, device=None, beside=0))]
pub(super) fn predict<'py>(
    py: Python<'py>,
    plans: Vec<PyRef<'py, Plan>>,
    memory: u64,
    threads: Option<usize>,
    device: Option<Device<'py>>,
    beside: u64,
) -> PyResult<Bound<'py, PyAny>> {
    let offload = device.as_ref().map(Device::offload).transpose()?;
    let raised: Vec<Raised> = plans.iter().map(|plan| plan.raised()).collect();
    let plans: Vec<Arc<plan::Plan>> = plans.iter().map(|plan| plan.table()).collect();
    let plan = || {
        let plans: Vec<&plan::Plan> = plans.iter().map(|plan| &**plan).collect();
        let workers = worker_count(threads, plans.len());
        engine::predict(&plans, FileModes::default(), offload, memory, workers, beside)
    };
    let planned = py.detach(plan).map_err(|error| raise(py, &error));
    let (planned, rereads) = first_raised(&raised, planned)?;
    let mut described = describe_memory(&planned);
    described["rereads"] = rereads.into();
    to_python(py, &described)
}

/// Bytes a second, in and out, that a device computes of the largest tensor of a plan, from memory.
#[pyfunction]
pub(super) fn rehearse(
    py: Python<'_>,
    plan: PyRef<'_, Plan>,
    threads: Option<usize>,
    device: Option<Device<'_>>,
) -> PyResult<f64> {
    let (plan, raised) = (plan.table(), plan.raised());
    let level = Level::from_environment().map_err(|error| raise(py, &error))?;
    let rate = with_backend(py, device, level, |backend| {
        enter(py, None, |control| {
            let workers = worker_count(threads, 1);
            rehearsal::rate(backend, &plan, level, workers, control)
        })
    });
    raised.or(rate)
}

/// `result`; or of a failure, the exception that a function of a formula raised, if one did.
fn first_raised<R>(raised: &[Raised], result: PyResult<R>) -> PyResult<R> {
    raised.iter().fold(result, |result, raised| raised.or(result))
}

/// Calls `run` with what computes on `device`, or with the engine's own kernels. An exception of
/// torch becomes the cause of the one that `run` raises.
fn with_backend<R>(
    py: Python<'_>,
    device: Option<Device<'_>>,
    level: Level,
    run: impl FnOnce(&dyn Backend) -> PyResult<R>,
) -> PyResult<R> {
    let Some(device) = device else { return run(&Simd(level)) };
    let torch = device.open(level)?;
    run(&torch).inspect_err(|error| {
        if let Some(cause) = torch.take_failure() {
            error.set_cause(py, Some(cause));
        }
    })
}

/// Which part of a plan to execute; see `engine::part`.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(super) struct PartOf {
    /// The numbers of its shards.
    shards: Vec<usize>,
    /// The folder that the runs share, open, and what messages call it.
    descriptor: RawFd,
    folder: PathBuf,
    /// The name of each part's file of numbers, which of them is this one's, and how many seconds to
    /// wait for the others.
    names: Vec<String>,
    own: usize,
    wait: f64,
}

impl PartOf {
    /// Bytes of the sources of its tensors.
    fn bytes_read(&self, plan: &plan::Plan) -> u64 {
        let own = plan.tensors().filter(|tensor| self.shards.contains(&tensor.shard()));
        own.map(plan::Tensor::source_bytes).sum()
    }

    fn open(&self, plans: &[Arc<plan::Plan>], key: &str) -> Result<Part> {
        let plan = &plans[0];
        let shards = |plan: &plan::Plan| plan.tensors().map(plan::Tensor::shard).collect();
        let first: Vec<usize> = shards(plan);
        if plans.iter().any(|plan| first != shards(plan)) {
            return Err(Error::internal("a part is of plans that are not cut alike"));
        }
        let makes = (0..plan.shards.len()).map(|shard| self.shards.contains(&shard)).collect();
        let exchange = Exchange {
            folder: OutputFolder::of_descriptor(self.descriptor, &self.folder)?,
            key: key.to_owned(),
            names: self.names.clone(),
            own: self.own,
            wait: Duration::from_secs_f64(self.wait),
        };
        Part::new(makes, exchange, plan.len())
    }
}

/// Executes merges of the same tensors, as pairs of a plan and a directory: reads the inputs once,
/// and writes the shards of each, under partial names, into its directory: the one that is open as
/// the descriptor in `descriptors`, if they are given. Tells which files it wrote; with `digests`, also
/// what is known of the tensors of each. Files that are not here come by `spool`; who fetches them may
/// have `beside` bytes resident.
///
/// With `keys`, one for each, it goes on with what interrupted runs with those keys have finished, and
/// writes down what it finishes, `journal_every` so many seconds.
///
/// Of a `part` of the plans, which have keys, it writes only the shards that are its own, and always a
/// journal. All plans have the same tensors in the same shards.
///
/// Calls `progress(bytes_read, bytes_written, tensors, current, peak_memory)` ten times a second.
#[pyfunction]
#[pyo3(signature = (merges, *, memory, threads=None, read_path="auto", direct=true,
                    largest_piece=None, progress=None, device=None, descriptors=None, planned=0,
                    digests=false, keys=None, journal_every=None, spool=None, beside=0,
                    part=None))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python function")]
pub(super) fn execute<'py>(
    py: Python<'py>,
    merges: Vec<(PyRef<'py, Plan>, PathBuf)>,
    memory: u64,
    threads: Option<usize>,
    read_path: &str,
    direct: bool,
    largest_piece: Option<u64>,
    progress: Option<Bound<'py, PyAny>>,
    device: Option<Device<'py>>,
    descriptors: Option<Vec<RawFd>>,
    planned: u64,
    digests: bool,
    keys: Option<Vec<String>>,
    journal_every: Option<f64>,
    spool: Option<PyRef<'py, Spool>>,
    beside: u64,
    part: Option<PartOf>,
) -> PyResult<Bound<'py, PyAny>> {
    let spool = spool.map(|spool| spool.shared());
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
    let level = Level::from_environment().map_err(|error| raise(py, &error))?;
    let tables: Vec<Arc<plan::Plan>> = merges.iter().map(|(plan, _)| plan.table()).collect();
    let raised: Vec<Raised> = merges.iter().map(|(plan, _)| plan.raised()).collect();
    let directories: Vec<PathBuf> = merges.into_iter().map(|(_, directory)| directory).collect();
    let workers = worker_count(threads, tables.len());
    let settings = Settings { level, workers, memory, largest_piece };
    let tensors = tables.first().map_or(0, |plan| plan.len());
    let digests = digests.then(|| Arc::new(digest::Digests::new(tables.len(), tensors)));
    let input_bytes = part.as_ref().zip(tables.first()).map(|(part, plan)| part.bytes_read(plan));
    let done = with_backend(py, device, level, |backend| {
        enter(py, progress.as_ref(), |control| {
            let open = |(index, path): (usize, &PathBuf)| {
                let descriptor = descriptors.as_ref().and_then(|all| all.get(index));
                match descriptor {
                    Some(descriptor) => OutputFolder::of_descriptor(*descriptor, path),
                    None => OutputFolder::open(path),
                }
            };
            let folders = directories.iter().enumerate().map(open).collect::<Result<Vec<_>>>()?;
            let plans = tables.iter().map(|plan| &**plan);
            let merges: Vec<(&plan::Plan, OutputFolder)> = plans.zip(folders).collect();
            let modes = FileModes { read, write };
            let keys: Option<Vec<&str>> =
                keys.as_ref().map(|keys| keys.iter().map(|key| &**key).collect());
            let every = journal_every.map_or(JOURNAL_EVERY, Duration::from_secs_f64);
            let journals = keys.as_ref().map(|keys| Journals { keys, every });
            let key = journals.as_ref().and_then(|journals| journals.keys.first());
            let part = part.as_ref().zip(key).map(|(part, key)| part.open(&tables, key));
            let (digests, part) = (digests.as_ref(), part.transpose()?);
            let around = Surroundings { planned, spool, beside, digests, journals, part };
            engine::merge(backend, &merges, modes, &settings, around, control)
        })
    });
    let (report, files) = first_raised(&raised, done)?;
    let described = serde_json::json!({
        "seconds": report.seconds,
        "bytes_read": report.bytes_read,
        "bytes_written": report.bytes_written,
        "tensors": report.tensors,
        "kept": report.tensors_kept,
        "peak_memory": report.peak_memory,
        "simd": report.level.name(),
        "memory": describe_memory(&report.memory),
        "files": describe_files(files),
    });
    let described = to_python(py, &described)?;
    if let Some(input_bytes) = input_bytes {
        described.set_item("input_bytes", input_bytes)?;
    }
    if let Some(all) = digests {
        let each = tables.into_iter().enumerate();
        let each = each.map(|(merge, plan)| Digests::new(plan, Arc::clone(&all), merge));
        described.set_item("digests", each.collect::<Vec<_>>())?;
    }
    Ok(described)
}

/// What the journal of an interrupted run says in its first record, if there is one in the directory
/// that is open as `descriptor`.
#[pyfunction]
pub(super) fn journal_key(
    py: Python<'_>,
    descriptor: RawFd,
    path: PathBuf,
) -> PyResult<Option<String>> {
    let read = || journal::journal_key(&OutputFolder::of_descriptor(descriptor, &path)?);
    py.detach(read).map_err(|error| raise(py, &error))
}

/// Whether a directory lies on a network or FUSE mount, or cannot be asked.
#[pyfunction]
pub(super) fn is_remote(py: Python<'_>, path: PathBuf) -> bool {
    py.detach(|| OutputFolder::open(&path).map_or(true, |folder| folder.is_remote()))
}

/// Without their paths, which need not be Unicode.
fn describe_files(written: Vec<Vec<InputFile>>) -> serde_json::Value {
    let describe = |file: InputFile| {
        serde_json::json!({
            "device": file.device,
            "inode": file.inode,
            "size": file.size,
            "modified_ns": file.modified_ns,
        })
    };
    let merge = |files: Vec<InputFile>| files.into_iter().map(describe).collect::<Vec<_>>();
    written.into_iter().map(merge).collect()
}

/// Unless asked otherwise, six more than cores: they wait for the disk while others compute. With
/// several outputs each of them writes more at a time, and fewer leave room for larger pieces. More
/// than [`MOST_WORKERS`] gain nothing anywhere.
pub(super) fn worker_count(threads: Option<usize>, outputs: usize) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    threads.unwrap_or_else(|| cores() + (6 / outputs.max(1)).max(1)).min(MOST_WORKERS)
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

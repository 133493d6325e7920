//! Arrays in, arrays and numbers out.
//!
//! Python says what an array is (`oxmerge/arrays.py`) and hands over where its elements lie; it
//! holds on to the arrays while a function here runs.

#![expect(unsafe_code, reason = "borrows the memory of Python arrays for the time of a call")]

use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::enter::take_part;
use super::error::raise;
use super::plan::{Plan, parameters};
use crate::dtype::DType;
use crate::engine::arrays::{self, ArraySink, ArraySource};
use crate::engine::files;
use crate::engine::source::{Nowhere, Sink, Source};
use crate::engine::task::{Task, Work};
use crate::formula::{Scalar, Value};
use crate::io::ReadPath;
use crate::kernels::Level;
use crate::methods::pieces;
use crate::plan::{OutputTensor, SourceTensor};

/// Work on fewer bytes is over before another Python thread would have had its turn.
const DETACHED_FROM: u64 = 64 << 10;

/// Where the elements of an array lie: address, bytes, element type.
#[derive(Clone, Copy)]
pub(super) struct Array {
    address: usize,
    bytes: usize,
    dtype: DType,
}

impl<'py> FromPyObject<'_, 'py> for Array {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let (address, bytes, name): (usize, usize, &str) = object.extract()?;
        let dtype = DType::from_name(name)
            .ok_or_else(|| PyValueError::new_err(format!("there is no element type `{name}`")))?;
        Ok(Self { address, bytes, dtype })
    }
}

impl Array {
    fn elements(&self) -> u64 {
        (self.bytes / self.dtype.size()) as u64
    }

    fn end(&self) -> usize {
        self.address + self.bytes
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.address < other.end() && other.address < self.end()
    }

    fn source(&self) -> Arc<dyn Source> {
        let start = std::ptr::with_exposed_provenance(self.address);
        // SAFETY: Python holds on to the array for the time of the call, which the source does not
        // outlive. That no one writes to it meanwhile is for the caller to see to, as with NumPy.
        Arc::new(unsafe { ArraySource::new(start, self.bytes, self.dtype) })
    }
}

/// The instruction set to use. It is read while the GIL is held: another thread of Python may change
/// the environment, which is no place for two.
fn level(py: Python<'_>) -> PyResult<Level> {
    Level::from_environment().map_err(|error| raise(py, &error))
}

/// How a call is to be done.
struct Call<'a> {
    name: &'a str,
    seed: u64,
    shape: Vec<u64>,
    threads: Option<usize>,
}

impl Call<'_> {
    /// Checks that an array has as many bytes as the shape says: the engine relies on it.
    fn check(&self, array: &Array) -> PyResult<()> {
        let elements: u64 = self.shape.iter().product();
        if array.bytes as u64 == elements * array.dtype.size() as u64 {
            return Ok(());
        }
        let message = format!(
            "an array of {} has {} bytes, not {elements} elements",
            array.dtype, array.bytes
        );
        Err(PyValueError::new_err(message))
    }

    fn task(&self, inputs: &[Array], sink: Arc<dyn Sink>, work: Work) -> Task {
        let sources = inputs.iter().map(Array::source).collect();
        let labels = (0..inputs.len()).map(|index| format!("input {index}")).collect();
        Task::new(self.name, self.seed, &self.shape, sources, labels, vec![sink], work)
    }

    /// Runs `work` into `out`.
    fn fill(&self, py: Python<'_>, inputs: &[Array], out: Array, work: Work) -> PyResult<()> {
        inputs.iter().chain([&out]).try_for_each(|array| self.check(array))?;
        let shared: Vec<&Array> = inputs.iter().filter(|input| input.overlaps(&out)).collect();
        let is_same = |input: &&Array| input.address == out.address && input.bytes == out.bytes;
        if !shared.iter().all(is_same) {
            let message = "out overlaps an input without being the same array; pass another out, or \
                           the input itself to overwrite it";
            return Err(PyValueError::new_err(message));
        }
        // Of a small array a copy is cheaper than a buffer of a worker.
        let is_small = (out.bytes as u64) < DETACHED_FROM;
        if !shared.is_empty() && (is_small || work.reads_around()) {
            return self.fill_apart(py, inputs, out, work);
        }
        let start = std::ptr::with_exposed_provenance_mut(out.address);
        // SAFETY: Python holds on to the array for the time of the call, which the sink does not
        // outlive, and has seen that it may be written to. Where it is an input too, the sink knows.
        let sink = unsafe { ArraySink::new(start, out.bytes, out.dtype, shared.is_empty()) };
        self.run(py, self.task(inputs, Arc::new(sink), work)).map(drop)
    }

    /// The same into memory of its own first: where the work reads inputs beyond the piece it writes,
    /// or the array is small.
    fn fill_apart(&self, py: Python<'_>, inputs: &[Array], out: Array, work: Work) -> PyResult<()> {
        let mut copy = vec![0_u8; out.bytes];
        // SAFETY: the vector lives until the task is dropped, and is not touched before.
        let sink = unsafe { ArraySink::new(copy.as_mut_ptr(), out.bytes, out.dtype, true) };
        self.run(py, self.task(inputs, Arc::new(sink), work))?;
        let start = std::ptr::with_exposed_provenance_mut::<u8>(out.address);
        // SAFETY: as in `fill`; and the sources, which had the same memory, are gone.
        unsafe { std::slice::from_raw_parts_mut(start, out.bytes) }.copy_from_slice(&copy);
        Ok(())
    }

    fn numbers(
        &self,
        py: Python<'_>,
        inputs: &[Array],
        scalars: Vec<Scalar>,
    ) -> PyResult<Vec<f64>> {
        inputs.iter().try_for_each(|input| self.check(input))?;
        let task = self.task(inputs, Arc::new(Nowhere(DType::F32)), Work::numbers(scalars));
        self.run(py, task)
    }

    fn run(&self, py: Python<'_>, task: Task) -> PyResult<Vec<f64>> {
        let level = level(py)?;
        let threads = self.threads;
        take_part(py, task.bytes() < DETACHED_FROM, |control| {
            arrays::run(task, level, threads, control)
        })
    }
}

/// A plan whose tensors are computed when they are asked for.
#[pyclass(frozen, module = "oxmerge._core")]
pub(super) struct OnDemand(files::OnDemand);

#[pymethods]
impl OnDemand {
    /// Opens the inputs of a plan.
    #[new]
    fn open(py: Python<'_>, plan: PyRef<'_, Plan>) -> PyResult<Self> {
        let opened = files::OnDemand::open(plan.table(), ReadPath::Auto);
        opened.map(Self).map_err(|error| raise(py, &error))
    }

    /// Computes tensor `index` of the plan into `out`.
    fn compute(
        &self,
        py: Python<'_>,
        index: usize,
        out: Array,
        threads: Option<usize>,
    ) -> PyResult<()> {
        if index >= self.0.plan().len() {
            return Err(PyValueError::new_err(format!("the plan has no tensor {index}")));
        }
        let shape = self.0.plan().tensor(index).shape().to_vec();
        let call = Call { name: "", seed: 0, shape, threads };
        call.check(&out)?;
        let start = std::ptr::with_exposed_provenance_mut(out.address);
        // SAFETY: Python has just made the array, and holds on to it for the time of the call.
        let sink = unsafe { ArraySink::new(start, out.bytes, out.dtype, true) };
        let task = self.0.task(index, Arc::new(sink)).map_err(|error| raise(py, &error))?;
        call.run(py, task)?;
        self.0.check_unchanged(index).map_err(|error| raise(py, &error))
    }
}

/// The largest distance of two elements in steps of their type, and how many differ.
#[pyfunction]
pub(super) fn ulp_distance(
    py: Python<'_>,
    a: Array,
    b: Array,
    threads: Option<usize>,
) -> PyResult<(u64, u64)> {
    if a.dtype != b.dtype || a.bytes != b.bytes {
        return Err(PyValueError::new_err("both arrays must be of one type and length"));
    }
    let level = level(py)?;
    take_part(py, false, |control| {
        arrays::ulp_distance(&*a.source(), &*b.source(), a.elements(), level, threads, control)
    })
}

/// Merges `inputs` by `method` into `out`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "arguments of a Python function")]
pub(super) fn merge_arrays(
    py: Python<'_>,
    method: &str,
    inputs: Vec<Array>,
    base: Option<usize>,
    out: Array,
    shape: Vec<u64>,
    shared: &Bound<'_, PyDict>,
    own: Vec<Bound<'_, PyDict>>,
    name: &str,
    seed: u64,
    threads: Option<usize>,
) -> PyResult<()> {
    let source = |(index, (input, own)): (usize, (&Array, &Bound<'_, PyDict>))| {
        Ok(SourceTensor {
            model: format!("input {index}"),
            name: name.to_owned(),
            dtype: input.dtype,
            file: 0,
            start: 0,
            parameters: parameters(own)?,
        })
    };
    let sources = inputs.iter().zip(&own).enumerate().map(source).collect::<PyResult<_>>()?;
    let tensor = OutputTensor {
        name: name.to_owned(),
        shape,
        dtype: out.dtype,
        shard: 0,
        start: 0,
        sources,
        base,
        parameters: parameters(shared)?,
    };
    let work = Work::of(method, &tensor).map_err(|error| raise(py, &error))?;
    let call = Call { name, seed, shape: tensor.shape, threads };
    call.fill(py, &inputs, out, work)
}

/// Computes a piece of the methods, by name, into `out`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "arguments of a Python function")]
pub(super) fn fill_array(
    py: Python<'_>,
    piece: &str,
    inputs: Vec<Array>,
    out: Array,
    shape: Vec<u64>,
    numbers: Vec<f64>,
    name: &str,
    seed: u64,
    threads: Option<usize>,
) -> PyResult<()> {
    let number = || numbers.first().copied().unwrap_or(0.0);
    let value: Value = match piece {
        "weighted_sum" => pieces::weighted_sum(&numbers),
        "task_vector" => pieces::task_vector(),
        "top_k_mask" => pieces::top_k_mask(number() as u64),
        "sign_consensus" => pieces::sign_consensus(&numbers),
        "random_mask" => {
            let position = numbers.get(1).copied().unwrap_or(0.0);
            pieces::random_mask(number(), position as u32)
        }
        "convert" => pieces::convert(),
        other => return Err(PyValueError::new_err(format!("there is no piece `{other}`"))),
    };
    Call { name, seed, shape, threads }.fill(py, &inputs, out, Work::Formulas(vec![value]))
}

/// Computes numbers of whole arrays, by name.
#[pyfunction]
pub(super) fn numbers_of_arrays(
    py: Python<'_>,
    piece: &str,
    inputs: Vec<Array>,
    elements: u64,
    count: u64,
    threads: Option<usize>,
) -> PyResult<Vec<f64>> {
    let scalars = match piece {
        "kth_magnitude" => vec![pieces::kth_magnitude(count)],
        "absolute_sum" => vec![pieces::absolute_sum()],
        "largest_magnitude" => vec![pieces::largest_magnitude()],
        "dot" => vec![pieces::dot()],
        "gram" => pieces::gram(inputs.len(), None),
        "gram_of_differences" => {
            let base = inputs.len().saturating_sub(1);
            pieces::gram(base, Some(base))
        }
        other => return Err(PyValueError::new_err(format!("there is no piece `{other}`"))),
    };
    if elements == 0 {
        // A sum of nothing is 0; of ranks there is none, and Python asks for none.
        return Ok(vec![0.0; scalars.len()]);
    }
    let call = Call { name: "", seed: 0, shape: vec![elements], threads };
    call.numbers(py, &inputs, scalars)
}

//! Arrays in, arrays and numbers out.
//!
//! Python says what an array is (`oxmerge/arrays/views.py`) and hands over the arrays themselves; where
//! their elements lie they say (`exported`), and they are held while a function here runs.

#![expect(unsafe_code, reason = "borrows the memory of Python arrays for the time of a call")]

use std::ops::Range;
use std::sync::Arc;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::enter::{enter, take_part};
use super::error::raise;
use super::exported::{Array, Given, Held, export, export_all, may_wait};
use super::formula::Raised;
use super::plan::{Plan, parameters};
use super::spool::Spool;
use crate::dtype::DType;
use crate::engine::arrays::{self, ArraySink, ArraySource, Many};
use crate::engine::control::Control;
use crate::engine::files;
use crate::engine::source::{Nowhere, Sink, Source};
use crate::engine::task::{Task, Work};
use crate::formula::{Scalar, Value};
use crate::io::ReadPath;
use crate::kernels::Level;
use crate::methods::pieces;
use crate::plan::{OutputTensor, Parameters, SourceTensor};

/// Work on fewer bytes is over before another Python thread would have had its turn.
const DETACHED_FROM: u64 = 64 << 10;
/// The same for a sum of many arrays, all told. It takes a few milliseconds at the most.
const MANY_DETACHED_FROM: usize = 32 << 20;

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
    fn check(&self, array: &Array<'_>) -> PyResult<()> {
        let elements =
            self.shape.iter().try_fold(1_u64, |count, &length| count.checked_mul(length));
        if elements.is_some_and(|elements| elements == array.elements()) {
            return Ok(());
        }
        let shape = &self.shape;
        let message = format!("an array has {} elements, which is not {shape:?}", array.elements());
        Err(PyValueError::new_err(message))
    }

    fn task(&self, inputs: &[Array<'_>], sink: Arc<dyn Sink>, work: Work) -> Task {
        let sources = inputs.iter().map(|input| Arc::new(source(input)) as Arc<dyn Source>);
        let labels = (0..inputs.len()).map(|index| format!("input {index}")).collect();
        let sources = sources.collect();
        Task::new(self.name, self.seed, &self.shape, sources, labels, vec![sink], work)
    }

    /// Runs `work` into `out`.
    fn fill<'py>(
        &self,
        py: Python<'py>,
        inputs: &[Array<'py>],
        out: &Array<'py>,
        work: Work,
    ) -> PyResult<()> {
        inputs.iter().chain([out]).try_for_each(|array| self.check(array))?;
        if !matches!(work, Work::Identical) {
            let is_mask = out.dtype == DType::Bool;
            check_floats(inputs.iter().chain((!is_mask).then_some(out)))?;
        }
        let is_apart = check_overlap(inputs, out)?;
        if !is_apart && work.reads_around() {
            return self.fill_apart(py, inputs, out, work);
        }
        let task = self.task(inputs, Arc::new(sink(out, is_apart)), work);
        self.run(py, task, inputs.iter().chain([out])).map(drop)
    }

    /// The same into memory of its own first: where the work reads inputs beyond the piece it writes.
    fn fill_apart(
        &self,
        py: Python<'_>,
        inputs: &[Array<'_>],
        out: &Array<'_>,
        work: Work,
    ) -> PyResult<()> {
        let mut copy = vec![0_u8; out.bytes];
        // SAFETY: the vector lives until the task is dropped, and is not touched before.
        let sink = unsafe { ArraySink::new(copy.as_mut_ptr(), out.bytes, out.dtype, true) };
        self.run(py, self.task(inputs, Arc::new(sink), work), inputs.iter().chain([out]))?;
        if !copy.is_empty() {
            // SAFETY: as in `sink`; and the sources, which had the same memory, are gone.
            unsafe { std::slice::from_raw_parts_mut(out.start, out.bytes) }.copy_from_slice(&copy);
        }
        Ok(())
    }

    fn numbers<'py>(
        &self,
        py: Python<'py>,
        inputs: &[Array<'py>],
        scalars: Vec<Scalar>,
    ) -> PyResult<Vec<f64>> {
        inputs.iter().try_for_each(|input| self.check(input))?;
        check_floats(inputs)?;
        let task = self.task(inputs, Arc::new(Nowhere(DType::F32)), Work::numbers(scalars));
        self.run(py, task, inputs)
    }

    /// Runs a task over `arrays`.
    fn run<'a, 'py: 'a>(
        &self,
        py: Python<'py>,
        task: Task,
        arrays: impl IntoIterator<Item = &'a Array<'py>> + Clone,
    ) -> PyResult<Vec<f64>> {
        let (level, threads) = (level(py)?, self.threads);
        let is_brief = task.bytes() < DETACHED_FROM && !may_wait(arrays.clone());
        let held = Held::of(arrays)?;
        let found = take_part(py, is_brief, |control| arrays::run(task, level, threads, control));
        drop(held);
        found
    }
}

fn check_floats<'a, 'py: 'a>(arrays: impl IntoIterator<Item = &'a Array<'py>>) -> PyResult<()> {
    if arrays.into_iter().all(|array| array.dtype.is_float()) {
        return Ok(());
    }
    Err(PyTypeError::new_err("only floats can be computed with"))
}

pub(super) fn source(array: &Array<'_>) -> ArraySource {
    // SAFETY: its owner is held for the time of the call, which the source does not outlive. That no
    // one writes to it meanwhile is for the caller to see to, as with NumPy.
    unsafe { ArraySource::new(array.start, array.bytes, array.dtype) }
}

/// `array` has to be one that [`export`] found to be writable.
fn sink(array: &Array<'_>, is_apart: bool) -> ArraySink {
    // SAFETY: its owner is held for the time of the call, which the sink does not outlive, and lets it
    // be written to. Where it is an input too, the sink knows.
    unsafe { ArraySink::new(array.start, array.bytes, array.dtype, is_apart) }
}

/// Whether `out` is none of the inputs; an error if it is a part of one, or one a part of it.
fn check_overlap(inputs: &[Array<'_>], out: &Array<'_>) -> PyResult<bool> {
    let mut shared = inputs.iter().filter(|input| input.overlaps(out)).peekable();
    let is_apart = shared.peek().is_none();
    if shared.all(|input| input.is(out)) {
        return Ok(is_apart);
    }
    Err(overlapping())
}

#[cold]
fn overlapping() -> PyErr {
    let message = "out overlaps an input without being the same array; pass another out, or the input \
                   itself to overwrite it";
    PyValueError::new_err(message)
}

/// A plan whose tensors are computed when they are asked for.
#[pyclass(frozen, module = "oxmerge._core")]
pub(super) struct OnDemand(files::OnDemand, Raised);

#[pymethods]
impl OnDemand {
    /// Opens the inputs of a plan; those that are not here are read from `spool`.
    #[new]
    #[pyo3(signature = (plan, spool=None))]
    fn open(
        py: Python<'_>,
        plan: PyRef<'_, Plan>,
        spool: Option<PyRef<'_, Spool>>,
    ) -> PyResult<Self> {
        let table = plan.table();
        let spool = spool.map(|spool| spool.shared());
        let opened = py.detach(|| files::OnDemand::open(table, ReadPath::Auto, spool));
        let opened = opened.map_err(|error| raise(py, &error))?;
        Ok(Self(opened, plan.raised()))
    }

    /// Computes tensor `index` of the plan into `out`.
    fn compute(
        &self,
        py: Python<'_>,
        index: usize,
        out: Given<'_>,
        threads: Option<usize>,
    ) -> PyResult<()> {
        if index >= self.0.plan().len() {
            return Err(PyValueError::new_err(format!("the plan has no tensor {index}")));
        }
        let shape = self.0.plan().tensor(index).shape().to_vec();
        let call = Call { name: "", seed: 0, shape, threads };
        let (_, out) = export(Vec::new(), out)?;
        call.check(&out)?;
        let held = Held::of([&out])?;
        let task = self.0.task(index, Arc::new(sink(&out, true)));
        let task = self.1.or(task.map_err(|error| raise(py, &error)))?;
        let level = level(py)?;
        let work = |control: &Control| {
            arrays::run(task, level, threads, control)?;
            self.0.check_unchanged(index)
        };
        let run = match self.0.spool() {
            // However little there is to read, a disk may take any time.
            None => take_part(py, false, work),
            // Who waits for a network does not look at signals meanwhile.
            Some(spool) => enter(py, None, |control| {
                spool.begin();
                control.on_end(move || spool.stop());
                work(control)
            }),
        };
        drop(held);
        self.1.or(run)
    }
}

/// The largest distance of two elements in steps of their type, and how many differ.
#[pyfunction]
pub(super) fn ulp_distance(
    py: Python<'_>,
    a: Given<'_>,
    b: Given<'_>,
    threads: Option<usize>,
) -> PyResult<(u64, u64)> {
    let [a, b] = &export_all(vec![a, b])?[..] else { unreachable!("two were given") };
    if a.dtype != b.dtype || a.bytes != b.bytes {
        return Err(PyValueError::new_err("both arrays must be of one type and length"));
    }
    check_floats([a, b])?;
    let held = Held::of([a, b])?;
    let (level, elements) = (level(py)?, a.elements());
    let (a, b) = (source(a), source(b));
    let found = take_part(py, false, |control| {
        arrays::ulp_distance(&a, &b, elements, level, threads, control)
    });
    drop(held);
    found
}

/// Merges `inputs` by `method` into `out`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "arguments of a Python function")]
pub(super) fn merge_arrays(
    py: Python<'_>,
    method: &Bound<'_, PyAny>,
    inputs: Vec<Given<'_>>,
    base: Option<usize>,
    out: Given<'_>,
    shape: Vec<u64>,
    shared: &Bound<'_, PyDict>,
    own: Vec<Bound<'_, PyDict>>,
    name: &str,
    seed: u64,
    threads: Option<usize>,
) -> PyResult<()> {
    if own.len() != inputs.len() || base.is_some_and(|base| base >= inputs.len()) {
        return Err(PyValueError::new_err(
            "each input has parameters, and the base is one of them",
        ));
    }
    // What may run a program's code comes first: it could change an array that was looked at.
    let own: Vec<Parameters> = own.iter().map(parameters).collect::<PyResult<_>>()?;
    let shared = parameters(shared)?;
    let raised = Raised::default();
    let built_in = method.extract::<&str>().ok();
    let formula = built_in.is_none().then(|| raised.formula(method)).transpose()?;
    let (inputs, out) = export(inputs, out)?;
    let source = |(index, (input, parameters)): (usize, (&Array<'_>, Parameters))| SourceTensor {
        model: format!("input {index}"),
        name: name.to_owned(),
        dtype: input.dtype,
        file: 0,
        start: 0,
        parameters,
    };
    let sources = inputs.iter().zip(own).enumerate().map(source).collect();
    let tensor = OutputTensor {
        name: name.to_owned(),
        shape,
        dtype: out.dtype,
        shard: 0,
        start: 0,
        sources,
        base,
        parameters: shared,
        formula,
    };
    let work = Work::of(built_in.unwrap_or(name), &tensor).map_err(|error| raise(py, &error));
    let work = raised.or(work)?;
    let call = Call { name, seed, shape: tensor.shape, threads };
    raised.or(call.fill(py, &inputs, &out, work))
}

/// Computes a piece of the methods, by name, into `out`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "arguments of a Python function")]
pub(super) fn fill_array(
    py: Python<'_>,
    piece: &str,
    inputs: Vec<Given<'_>>,
    out: Given<'_>,
    shape: Vec<u64>,
    numbers: Vec<f64>,
    name: &str,
    seed: u64,
    threads: Option<usize>,
) -> PyResult<()> {
    let number = |at: usize| numbers.get(at).copied().unwrap_or(0.0);
    let value = match (piece, inputs.len()) {
        ("top_k_mask", 1) => pieces::top_k_mask(number(0) as u64),
        ("row_top_k_mask", 1) => pieces::row_top_k_mask(number(0) as u64, number(1) as u64),
        ("random_mask_by_rank", 1) => {
            pieces::random_mask_by_rank(number(0), number(1), number(2) as u32)
        }
        ("random_mask", 0) => pieces::random_mask(number(0), number(1) as u32),
        (_, count) => elementwise(piece, count, &numbers)?,
    };
    let (inputs, out) = export(inputs, out)?;
    Call { name, seed, shape, threads }.fill(py, &inputs, &out, Work::Formulas(vec![value]))
}

/// A piece of which an element depends on the same element of its inputs alone.
fn elementwise(piece: &str, inputs: usize, numbers: &[f64]) -> PyResult<Value> {
    Ok(match (piece, inputs, numbers) {
        ("weighted_sum", 1.., weights) if weights.len() == inputs => pieces::weighted_sum(weights),
        ("sign_consensus", 1.., weights) if weights.len() == inputs => {
            pieces::sign_consensus(weights)
        }
        ("lerp", 2, &[t]) => pieces::lerp(t),
        ("task_vector", 2, _) => pieces::task_vector(),
        ("convert", 1, _) => pieces::convert(),
        _ => {
            let message = format!("there is no piece `{piece}` of {inputs} arrays and {numbers:?}");
            return Err(PyValueError::new_err(message));
        }
    })
}

/// Computes a piece of the methods for many arrays: `inputs` has a list for each of its inputs.
#[pyfunction]
pub(super) fn fill_arrays(
    py: Python<'_>,
    piece: &str,
    inputs: Vec<Vec<Given<'_>>>,
    outs: Vec<Given<'_>>,
    numbers: Vec<f64>,
    threads: Option<usize>,
) -> PyResult<()> {
    if inputs.iter().any(|list| list.len() != outs.len()) {
        return Err(PyValueError::new_err("all lists must be of one length"));
    }
    let (value, width) = (elementwise(piece, inputs.len(), &numbers)?, inputs.len());
    let level = level(py)?;
    let mut lists: Vec<_> = inputs.into_iter().map(Vec::into_iter).collect();
    let (mut given, mut groups) = (Vec::with_capacity((width + 1) * outs.len()), Vec::new());
    for out in outs {
        let first = given.len();
        given.extend(lists.iter_mut().filter_map(Iterator::next));
        let same = given[first..].iter().position(|input: &Given<'_>| input.is(&out));
        let inputs = first..first + width;
        groups.push(Group { inputs, out: same.map_or(given.len(), |at| first + at) });
        if same.is_none() {
            given.push(out);
        }
    }
    let arrays = export_all(given)?;
    groups.iter().try_for_each(|group| group.check(py, &arrays))?;
    let outs = Outs::of(&groups, &arrays)?;
    let mut many = Many::new(width, groups.len());
    let memory = |array: &Array<'_>| (array.start, array.bytes, array.dtype);
    for group in &groups {
        let is_apart = outs.check(group, &arrays)?;
        let all = arrays[group.inputs.clone()].iter().chain([&arrays[group.out]]).map(memory);
        // SAFETY: as in `source` and `sink`; and an output was seen to be apart from all else.
        unsafe { many.push(all, is_apart) };
    }
    let bytes: usize = arrays.iter().map(|array| array.bytes).sum();
    let is_brief = bytes < MANY_DETACHED_FROM && !may_wait(&arrays);
    // While no other thread of Python runs, tensors stay what they are.
    let held = (!is_brief).then(|| Held::of(&arrays)).transpose()?;
    take_part(py, is_brief, |control| arrays::run_many(value, &many, level, threads, control))?;
    drop(held);
    Ok(())
}

/// One of many outputs and its inputs: where among all arrays they are.
struct Group {
    inputs: Range<usize>,
    out: usize,
}

impl Group {
    /// Checks that the output can take the result.
    fn check(&self, py: Python<'_>, arrays: &[Array<'_>]) -> PyResult<()> {
        let (inputs, out) = (&arrays[self.inputs.clone()], &arrays[self.out]);
        out.check_writable()?;
        check_floats(inputs.iter().chain([out]))?;
        if inputs.iter().all(|input| input.shape(py) == out.shape(py)) {
            return Ok(());
        }
        Err(PyValueError::new_err("the shapes of an output and its inputs differ"))
    }
}

/// Where many outputs lie: beginnings and ends, in order.
struct Outs(Vec<Range<usize>>);

impl Outs {
    /// An error if two of them share memory.
    fn of(groups: &[Group], arrays: &[Array<'_>]) -> PyResult<Self> {
        let outs = groups.iter().map(|group| arrays[group.out].place());
        let mut outs: Vec<_> = outs.filter(|out| !out.is_empty()).collect();
        outs.sort_unstable_by_key(|out| out.start);
        if outs.windows(2).all(|two| two[0].end <= two[1].start) {
            return Ok(Self(outs));
        }
        let message = "two of out share memory; pass arrays of their own, or leave one of them out";
        Err(PyValueError::new_err(message))
    }

    /// Whether the output of `group` is none of its inputs; an error if an input overlaps an output
    /// otherwise.
    fn check(&self, group: &Group, arrays: &[Array<'_>]) -> PyResult<bool> {
        let out = &arrays[group.out];
        let mut is_apart = true;
        for input in &arrays[group.inputs.clone()] {
            if input.is(out) {
                is_apart = false;
                continue;
            }
            let place = input.place();
            let after = self.0.partition_point(|other| other.start < place.end);
            if after > 0 && self.0[after - 1].end > place.start && !place.is_empty() {
                return Err(overlapping());
            }
        }
        Ok(is_apart)
    }
}

/// Computes numbers of whole arrays, by name.
#[pyfunction]
pub(super) fn numbers_of_arrays(
    py: Python<'_>,
    piece: &str,
    inputs: Vec<Given<'_>>,
    elements: u64,
    count: u64,
    threads: Option<usize>,
) -> PyResult<Vec<f64>> {
    let wanted = match piece {
        "dot" => 2..=2,
        "gram" => 1..=usize::MAX,
        "gram_of_differences" => 2..=usize::MAX,
        _ => 1..=1,
    };
    if !wanted.contains(&inputs.len()) {
        let message = format!("`{piece}` is of other than {} arrays", inputs.len());
        return Err(PyValueError::new_err(message));
    }
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
    call.numbers(py, &export_all(inputs)?, scalars)
}

//! One output tensor: what it is made of, and what that takes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::control::Control;
use super::source::{Sink, Source};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::formula::bind::Bindings;
use crate::formula::machine::TensorFrame;
use crate::formula::{Reduction, Scalar, Scope, Value, ValueNode};
use crate::formula::{listing, stage};
use crate::io::PAGE;
use crate::kernels::BLOCK;
use crate::methods;
use crate::plan::{ArrayFunction, Formula, OutputTensor};

/// Input bytes of one source that a piece has at the most: more gains nothing. A page less than
/// two huge pages, so that an output buffer with its odd start fills no third.
pub(crate) const LARGEST_PIECE: u64 = (4 << 20) - PAGE as u64;
/// Bytes of all inputs that are read at once, where they are copied: they stay in the cache.
const STEP_BYTES: u64 = 768 << 10;

/// What the outputs of a task are made by.
#[derive(Clone, Debug)]
pub enum Work {
    /// Arithmetic: a formula for each output.
    Formulas(Vec<Value>),
    /// Numbers of the whole tensor, each as a value; there is no output.
    Numbers(Vec<Value>),
    /// What functions of arrays make, one for each output.
    Arrays(Arrays),
    /// Every source must have the same bytes, which are each output.
    Identical,
}

/// Functions of arrays, and the shape of the tensor.
#[derive(Clone, Debug)]
pub struct Arrays {
    pub(crate) functions: Vec<ArrayFunction>,
    pub(crate) shape: Vec<u64>,
}

impl Arrays {
    fn is_whole(&self) -> bool {
        self.functions.iter().any(|function| function.whole)
    }

    /// Elements that the functions get at once. They do not depend on threads or memory, so neither
    /// does the output, whatever a function does with rows that come together.
    pub(crate) fn elements_a_call(&self, frame: &TensorFrame) -> u64 {
        let rows = (BLOCK as u64 / frame.row).max(1) * frame.row;
        if self.is_whole() { frame.elements } else { rows.min(frame.elements) }
    }

    /// The shape of so many elements: that of the tensor, or of rows.
    pub(crate) fn shape_of(&self, elements: u64, frame: &TensorFrame) -> Vec<u64> {
        if self.is_whole() { self.shape.clone() } else { vec![elements / frame.row, frame.row] }
    }
}

impl Work {
    /// What `method` does to make `tensor`.
    pub(crate) fn of(method: &str, tensor: &OutputTensor) -> Result<Self> {
        if !tensor.dtype.is_float() {
            return Ok(Self::Identical);
        }
        if methods::is_kept(tensor)? {
            let is_copy = tensor.sources.iter().all(|source| source.dtype == tensor.dtype);
            return Ok(if is_copy {
                Self::Identical
            } else {
                Self::Formulas(vec![Value::input(0)])
            });
        }
        let formula = match &tensor.formula {
            Some(Formula { arrays: Some(function), .. }) => {
                methods::refuse_scale(tensor)?;
                let (functions, shape) = (vec![function.clone()], tensor.shape.clone());
                return Ok(Self::Arrays(Arrays { functions, shape }));
            }
            Some(formula) => listing::read(formula, tensor.sources.len())?,
            None => methods::find(method)
                .ok_or_else(|| Error::plan(format!("there is no merge method `{method}`")))?
                .formula(tensor)?,
        };
        Ok(Self::Formulas(vec![methods::scaled(tensor, formula)?]))
    }

    /// Looking for `scalars`, which are of the whole tensor.
    pub fn numbers(scalars: Vec<Scalar>) -> Self {
        Self::Numbers(scalars.into_iter().map(Value::scalar).collect())
    }

    /// What it is to compute; nothing for a copy.
    pub(crate) fn values(&self) -> &[Value] {
        match self {
            Self::Formulas(values) | Self::Numbers(values) => values,
            Self::Arrays(_) | Self::Identical => &[],
        }
    }

    /// Both this and `other`, over the same sources.
    pub(crate) fn and(self, other: Self) -> Result<Self> {
        match (self, other) {
            (Self::Formulas(formulas), Self::Formulas(others)) => {
                Ok(Self::Formulas([formulas, others].concat()))
            }
            (Self::Arrays(arrays), Self::Arrays(others))
                if arrays.is_whole() == others.is_whole() =>
            {
                let functions = [arrays.functions, others.functions].concat();
                Ok(Self::Arrays(Arrays { functions, ..arrays }))
            }
            (Self::Identical, Self::Identical) => Ok(Self::Identical),
            (_, _) => {
                Err(Error::plan("a tensor cannot be made in such different ways in one pass")
                    .advice("run the merges one by one"))
            }
        }
    }

    /// The same, with everything that formulas have in common computed once.
    pub(crate) fn shared(self) -> Self {
        match self {
            Self::Formulas(formulas) => Self::Formulas(Bindings::default().bind_all(&formulas)),
            Self::Numbers(numbers) => Self::Numbers(Bindings::default().bind_all(&numbers)),
            Self::Arrays(_) | Self::Identical => self,
        }
    }

    /// Whether a piece of the output depends on more of the inputs than that piece, when the passes
    /// before it are done: on the rest of the rows that it touches.
    pub fn reads_around(&self) -> bool {
        let rows = stage::unknown_rows(self.values());
        !rows.reductions.is_empty() || !rows.rankings.is_empty()
    }

    /// The type of the outputs, if each of them is an input that is only rounded to it.
    fn only_rounds(&self, sinks: &[Arc<dyn Sink>]) -> Option<DType> {
        let Self::Formulas(values) = self else { return None };
        let dtype = sinks.first()?.dtype();
        let is_alike = dtype.is_float() && sinks.iter().all(|sink| sink.dtype() == dtype);
        let are_inputs = values.iter().all(|value| matches!(*value.0, ValueNode::Input(_)));
        (is_alike && are_inputs).then_some(dtype)
    }

    /// Whether columns are reduced and combined band by band.
    pub(crate) fn in_bands(&self, frame: &TensorFrame) -> bool {
        match self {
            Self::Formulas(values) => frame.has_bands() && stage::columns_come_last(values),
            Self::Numbers(_) | Self::Arrays(_) | Self::Identical => false,
        }
    }

    /// Whether inputs are read only once: nothing has to be reduced before the output is computed, or
    /// before the numbers that are looked for.
    pub(crate) fn reads_once(&self) -> bool {
        match self {
            Self::Numbers(numbers) => numbers.iter().all(stage::is_of_one_pass),
            _ => stage::unknown(self.values()).is_empty(),
        }
    }
}

/// Work, and what of it does not depend on where the elements are: the same for all tensors of a kind.
#[derive(Clone, Debug)]
pub(crate) struct Prepared {
    work: Work,
    pub(crate) reads_once: bool,
    in_bands: bool,
}

impl Prepared {
    pub(crate) fn new(work: Work, frame: &TensorFrame) -> Self {
        let (reads_once, in_bands) = (work.reads_once(), work.in_bands(frame));
        Self { work, reads_once, in_bands }
    }
}

/// One output tensor, or the same tensor of several merges: formulas over sources into sinks.
#[derive(Clone, Debug)]
pub struct Task {
    pub(crate) frame: TensorFrame,
    pub(crate) sources: Vec<Arc<dyn Source>>,
    /// What to call each source in a message.
    pub(crate) labels: Vec<Arc<str>>,
    pub(crate) sinks: Vec<Arc<dyn Sink>>,
    pub(crate) work: Work,
    /// Which source is the base.
    pub(crate) base: Option<usize>,
    /// Whether the working type is f64.
    pub(crate) double: bool,
    /// See [`Work::reads_once`].
    pub(crate) reads_once: bool,
    /// See [`Work::in_bands`].
    pub(crate) in_bands: bool,
}

impl Task {
    /// A tensor of `shape` called `name`; `seed` and `name` choose its random masks.
    pub fn new(
        name: &str,
        seed: u64,
        shape: &[u64],
        sources: Vec<Arc<dyn Source>>,
        labels: Vec<String>,
        sinks: Vec<Arc<dyn Sink>>,
        work: Work,
    ) -> Self {
        let frame = TensorFrame::new(name, seed, shape);
        let labels = labels.into_iter().map(Arc::from).collect();
        let prepared = Prepared::new(work.shared(), &frame);
        Self::prepared(frame, sources, labels, sinks, prepared)
    }

    /// The same of work that was prepared for a tensor of this shape.
    pub(crate) fn prepared(
        frame: TensorFrame,
        mut sources: Vec<Arc<dyn Source>>,
        labels: Vec<Arc<str>>,
        sinks: Vec<Arc<dyn Sink>>,
        Prepared { work, reads_once, in_bands }: Prepared,
    ) -> Self {
        if let Some(dtype) = work.only_rounds(&sinks) {
            for source in &mut sources {
                *source = source.rounded(dtype).unwrap_or_else(|| Arc::clone(source));
            }
        }
        let types = sources.iter().map(|source| source.dtype());
        let double = types.chain(sinks.iter().map(|sink| sink.dtype())).any(|t| t == DType::F64);
        let in_bands = in_bands && sinks.iter().all(|sink| sink.takes_any_piece());
        let base = None;
        Self { frame, sources, labels, sinks, work, base, double, reads_once, in_bands }
    }

    /// The same, with source `base` as the base, if it has one.
    #[must_use]
    pub fn with_base(mut self, base: Option<usize>) -> Self {
        self.base = base;
        self
    }

    /// The same, computed in f64 also where no type asks for it, if `asked`.
    #[must_use]
    pub fn in_f64(mut self, asked: bool) -> Self {
        self.double |= asked;
        self
    }

    /// Whether something has to be reduced over the whole model first.
    pub(crate) fn needs_sweep(&self) -> bool {
        !self.model_reductions().is_empty()
    }

    /// The sources that it reads, whatever its numbers turn out to be.
    pub(crate) fn inputs(&self) -> Vec<usize> {
        match &self.work {
            Work::Formulas(values) | Work::Numbers(values) => stage::inputs_of(values),
            Work::Arrays(_) | Work::Identical => (0..self.sources.len()).collect(),
        }
    }

    pub(crate) fn model_reductions(&self) -> Vec<Arc<Reduction>> {
        stage::next_stage(self.work.values(), Scope::Model, &self.frame).reductions
    }

    pub(crate) fn set_work(&mut self, work: Work) {
        let Prepared { work, reads_once, in_bands } = Prepared::new(work, &self.frame);
        self.in_bands = in_bands && self.sinks.iter().all(|sink| sink.takes_any_piece());
        (self.work, self.reads_once) = (work, reads_once);
    }

    /// Bytes of the sources and the outputs.
    pub(crate) fn bytes(&self) -> u64 {
        let types = self.sources.iter().map(|source| source.dtype());
        let types = types.chain(self.sinks.iter().map(|sink| sink.dtype()));
        self.frame.elements * types.map(|dtype| dtype.size() as u64).sum::<u64>()
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.frame.blocks()
    }

    /// Elements of a unit of functions of arrays: those of one call, or all where outputs take no
    /// pieces that begin anywhere.
    pub(crate) fn elements_of_calls(&self, arrays: &Arrays) -> u64 {
        let in_pieces = self.sinks.iter().all(|sink| sink.takes_any_piece());
        if in_pieces { arrays.elements_a_call(&self.frame) } else { self.frame.elements }
    }

    /// How many elements of the sources `inputs` a worker reads at once.
    pub(crate) fn step_elements(&self, inputs: &[usize]) -> u64 {
        let copied = inputs.iter().map(|&index| &self.sources[index]).filter(|s| !s.is_in_place());
        step_elements(copied.map(|source| source.dtype().size() as u64))
    }

    /// The elements of the blocks `blocks`.
    pub(crate) fn elements_of(&self, blocks: Range<u64>) -> Range<u64> {
        let block = BLOCK as u64;
        blocks.start * block..(blocks.end * block).min(self.frame.elements)
    }
}

/// Elements of the sources of these widths that a worker reads at once: whole blocks.
///
/// Bytes that are copied into a buffer are used from the second-level cache if they are few. Bytes
/// that are used in place are best mapped in one go.
pub(crate) fn step_elements(copied_widths: impl Iterator<Item = u64>) -> u64 {
    let block_elements = BLOCK as u64;
    let block: u64 = copied_widths.map(|width| width * block_elements).sum();
    let most = LARGEST_PIECE / block_elements;
    STEP_BYTES.checked_div(block).unwrap_or(most).clamp(1, most) * block_elements
}

/// The tasks of a run, each made when its turn comes: a model with experts has 100,000.
pub(crate) trait Tasks: Sync {
    /// How many there are.
    fn len(&self) -> usize;

    /// Task `index`. It may be made more than once.
    fn task(&self, index: usize) -> Result<Task>;

    /// Which kind of task it is: those of one kind have the same formula, shape and types.
    fn kind(&self, index: usize) -> usize {
        index
    }

    /// Whether nothing has to be reduced before task `index` is computed.
    fn reads_once(&self, index: usize) -> bool;

    /// Whether who writes may wait for inputs, and so for older tasks that have to make room.
    fn waits_for_room(&self) -> bool {
        false
    }

    /// Whether something has to be reduced over the whole model first.
    fn needs_sweep(&self) -> bool;

    /// Whether task `index` is this run's; if not, another run does it.
    fn is_ours(&self, index: usize) -> bool {
        let _ = index;
        true
    }

    /// Whether an earlier run has done task `index`.
    fn is_done(&self, index: usize) -> bool {
        let _ = index;
        false
    }

    /// What earlier runs have found on the way to what is reduced over all tasks.
    fn known_numbers(&self) -> BTreeMap<usize, Vec<f64>> {
        BTreeMap::new()
    }

    /// With what a sweep has `found`, what other runs have found for their tasks.
    fn with_others(
        &self,
        found: BTreeMap<usize, Vec<f64>>,
        control: &Control,
    ) -> Result<BTreeMap<usize, Vec<f64>>> {
        let _ = control;
        Ok(found)
    }

    /// Called when task `index` is done.
    fn finished(&self, index: usize) {
        let _ = index;
    }

    /// Called with what a sweep has found for task `index`.
    fn found(&self, index: usize, numbers: &[f64]) {
        let _ = (index, numbers);
    }

    /// How many tasks from `index` on are so small, and lie so close, that a worker does them in one
    /// go, when it may hold `bytes` of them.
    fn neighbours(&self, index: usize, bytes: u64) -> usize {
        let _ = (index, bytes);
        0
    }

    /// Tasks have read all that they read, in the sweep over the model or in the merge.
    fn are_read(&self, tasks: Range<usize>, in_sweep: bool) {
        let _ = (tasks, in_sweep);
    }

    /// Such neighbours, with their inputs read.
    fn gather<'a>(&'a self, tasks: Range<usize>) -> Result<Box<dyn Gathered + 'a>> {
        let _ = tasks;
        Err(Error::internal("these tasks have no neighbours"))
    }
}

/// Small neighbours whose inputs are in memory.
pub(crate) trait Gathered {
    /// The task at `index` of the run.
    fn task(&self, index: usize) -> Result<Task>;

    /// Writes what they have made.
    fn finish(self: Box<Self>) -> Result<()>;
}

impl Tasks for Vec<Task> {
    fn len(&self) -> usize {
        self.len()
    }

    fn task(&self, index: usize) -> Result<Task> {
        Ok(self[index].clone())
    }

    fn reads_once(&self, index: usize) -> bool {
        self[index].reads_once
    }

    fn needs_sweep(&self) -> bool {
        self.iter().any(Task::needs_sweep)
    }
}

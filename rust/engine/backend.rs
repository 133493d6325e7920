//! What computes. The engine decides which elements, reads them and writes them; a backend does
//! the arithmetic of a step, by running compiled code.
//!
//! There are two: [`simd`](super::simd), which runs the code chunk by chunk in the first-level
//! cache, and torch (`python/torch.rs`), which runs the same instructions over a whole piece. A
//! method does not know which. Both must give the bits of the numeric contract.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use super::fused::unchanged;
use super::need::Offload;
use super::passes::SearchView;
use crate::dtype::DType;
use crate::error::Result;
use crate::formula::code::Code;
use crate::formula::machine::{InputBytes, TensorFrame};
use crate::formula::masks::KeptMasks;
use crate::formula::selection::Histogram;
use crate::formula::stage::operands;
use crate::formula::{Reduction, ReductionKind, Value};
use crate::kernels::fold_halves;

/// A kind of arithmetic, shared by the workers of a run.
pub(crate) trait Backend: Debug + Send + Sync {
    /// What one worker thread computes with; called on that thread.
    fn worker(&self) -> Result<Box<dyn Arithmetic + '_>>;

    /// What it needs beside the engine's own buffers, if it takes whole pieces elsewhere.
    fn offload(&self) -> Option<Offload> {
        None
    }
}

/// One thread's arithmetic.
pub(crate) trait Arithmetic {
    /// Makes `code` ready to run over elements of one tensor. Random masks that are in `masks`
    /// need not be drawn.
    fn program<'a>(
        &self,
        frame: &'a TensorFrame,
        code: &'a Code,
        double: bool,
        masks: Option<&'a KeptMasks>,
    ) -> Result<Box<dyn Program + 'a>>;
}

/// Code that is ready to run over the steps of one tensor.
pub(crate) trait Program {
    /// Reduces the step segment by segment, counted from its first element, and counts for
    /// `searches`, whose values follow the operands of the reductions. With searches a segment is
    /// a block.
    fn reduce(
        &mut self,
        step: &Step<'_>,
        segment: u64,
        layout: &Layout,
        searches: &[SearchView],
        tally: &mut Tally,
    ) -> Result<()>;

    /// Adds the step's elements, in order, to what each reduction has for each column. The first
    /// element is of column `first`; a row has as many as there are sums.
    fn columns(
        &mut self,
        step: &Step<'_>,
        first: u64,
        layout: &Layout,
        sums: &mut [Vec<f64>],
    ) -> Result<()>;

    /// Computes the step's elements of some results, each into an output.
    fn combine(&mut self, step: &Step<'_>, outputs: &mut [Output<'_>]) -> Result<()>;

    /// The order keys of each result, element by element. For the few elements of a sample.
    fn keys(&mut self, step: &Step<'_>) -> Result<Vec<Vec<u64>>>;
}

/// A part of a unit whose inputs are at hand.
pub(crate) struct Step<'a> {
    /// The elements to compute.
    pub(crate) elements: Range<u64>,
    /// The bytes of the inputs that are used.
    pub(crate) inputs: &'a [Option<InputBytes<'a>>],
    /// What the code computes, with the results of row reductions put in.
    pub(crate) values: &'a [Value],
}

/// Where the elements of a step go in one of the outputs.
pub(crate) struct Output<'a> {
    /// Which of the code's results it takes.
    pub(crate) result: usize,
    pub(crate) dtype: DType,
    pub(crate) bytes: &'a mut [u8],
}

/// What reductions and searches found so far.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// For each reduction: a result a segment.
    pub(crate) sums: Vec<Vec<f64>>,
    /// For each search.
    pub(crate) counts: Vec<Histogram>,
}

impl Tally {
    pub(crate) fn new(layout: &Layout, searches: &[SearchView]) -> Self {
        Self {
            sums: vec![Vec::new(); layout.kinds.len()],
            counts: searches.iter().map(|search| Histogram::new(search.bins)).collect(),
        }
    }
}

/// Computes the step's elements of some results; those that are an input as it is are copied.
pub(crate) fn combine<'a>(
    program: &mut dyn Program,
    step: &Step<'_>,
    outputs: impl Iterator<Item = Output<'a>>,
) -> Result<()> {
    let mut computed = Vec::with_capacity(1);
    for output in outputs {
        match unchanged(&step.values[output.result], step.inputs, output.dtype) {
            Some(input) => output.bytes.copy_from_slice(input.part(&step.elements)),
            None => computed.push(output),
        }
    }
    if computed.is_empty() { Ok(()) } else { program.combine(step, &mut computed) }
}

/// Reductions laid out as operands: which results of the code each of them uses.
pub(crate) struct Layout {
    pub(crate) reductions: Vec<Arc<Reduction>>,
    pub(crate) kinds: Vec<(ReductionKind, usize, Option<usize>)>,
    pub(crate) operands: usize,
}

impl Layout {
    pub(crate) fn of(reductions: &[Arc<Reduction>]) -> (Self, Vec<Value>) {
        let (mut kinds, mut values) = (Vec::new(), Vec::new());
        for reduction in reductions {
            let left = values.len();
            values.extend(operands(reduction));
            kinds.push((reduction.kind, left, reduction.right.as_ref().map(|_| left + 1)));
        }
        let operands = values.len();
        (Self { reductions: reductions.to_vec(), kinds, operands }, values)
    }
}

/// What a reduction of nothing gives.
pub(crate) fn start_of(kind: ReductionKind) -> f64 {
    if kind == ReductionKind::Max { f64::NEG_INFINITY } else { 0.0 }
}

pub(crate) fn fold(kind: ReductionKind, values: &mut Vec<f64>) -> f64 {
    match kind {
        ReductionKind::Max => values.iter().copied().fold(f64::NEG_INFINITY, max),
        _ => fold_halves(values),
    }
}

/// The larger of two; the canonical NaN if either is NaN, and never −0.
pub(crate) fn max(a: f64, b: f64) -> f64 {
    let larger = if a.is_nan() || a > b { a } else { b };
    // Adding +0 turns −0 into +0 and changes nothing else.
    if larger.is_nan() { f64::NAN } else { larger + 0.0 }
}

/// `range` cut into parts of `length`; the last may be shorter.
pub(crate) fn steps(range: Range<u64>, length: u64) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    range.step_by(length as usize).map(move |start| start..end.min(start.saturating_add(length)))
}

//! What computes. The engine decides which elements, reads them and writes them; a backend does
//! the arithmetic of a step, by running a program.
//!
//! There are two: [`simd`](super::simd), which runs programs chunk by chunk in the first-level
//! cache, and torch (`python/torch.rs`), which runs the same programs over a whole piece. A method
//! does not know which. Both must give the bits of the numeric contract.

use std::fmt::Debug;
use std::ops::Range;

use super::need::Offload;
use crate::error::Result;
use crate::formula::ReductionKind;
use crate::formula::compile::Given;
use crate::formula::machine::{InputBytes, Known, TensorFrame};
use crate::formula::program::Program;
use crate::formula::selection::Counted;
use crate::kernels::fold_halves;

/// A kind of arithmetic, shared by the workers of a run.
pub(crate) trait Backend: Debug + Send + Sync {
    /// What one worker thread computes with; called on that thread.
    fn worker(&self) -> Result<Box<dyn Arithmetic + '_>>;

    /// What it needs beside the engine's own buffers, if it takes whole pieces elsewhere. Then it
    /// has no kernels for what is fused.
    fn offload(&self) -> Option<Offload> {
        None
    }
}

/// One thread's arithmetic.
pub(crate) trait Arithmetic {
    /// Makes ready to run `program` over elements of one tensor, of which so much is `known`.
    fn begin<'a>(
        &self,
        frame: &'a TensorFrame,
        program: &'a Program,
        known: &'a Known,
    ) -> Result<Box<dyn Run + 'a>>;
}

/// A program that is ready to run over the steps of one tensor.
pub(crate) trait Run {
    /// Computes the effects of a step.
    fn run(&mut self, step: &Step<'_>, results: &mut Results<'_>) -> Result<()>;
}

/// A part of a unit whose inputs are at hand.
pub(crate) struct Step<'a> {
    /// The elements to compute.
    pub(crate) elements: Range<u64>,
    /// The bytes of the inputs that are used.
    pub(crate) inputs: &'a [Option<InputBytes<'a>>],
    /// The vectors and marks of the program.
    pub(crate) given: &'a Given,
    /// Where columns are reduced: which of them the first element belongs to.
    pub(crate) column: u64,
}

/// What effects found so far, and where they store.
#[derive(Debug, Default)]
pub(crate) struct Results<'a> {
    /// For each output: the bytes of the step's elements.
    pub(crate) outputs: Vec<&'a mut [u8]>,
    /// For each reduction: a number a segment, one more at each; or a number a column.
    pub(crate) numbers: Vec<Vec<f64>>,
    /// For each search.
    pub(crate) counts: Vec<Counted>,
    /// For each sample: a key an element.
    pub(crate) keys: Vec<Vec<u64>>,
    /// For each ranking: a byte an element of a step, 1 where it is kept, else 0.
    pub(crate) kept: Vec<Vec<u8>>,
}

impl Results<'_> {
    /// Nothing found yet by `program`, which reduces segments and has no searches.
    pub(crate) fn of(program: &Program) -> Self {
        Self {
            numbers: vec![Vec::new(); program.kinds.len()],
            keys: vec![Vec::new(); program.samples],
            kept: vec![Vec::new(); program.rankings],
            ..Self::default()
        }
    }

    /// Nothing found yet by `program`, which reduces and searches a unit of `elements`.
    pub(crate) fn of_unit(program: &Program, elements: u64) -> Self {
        let counted = |interval| Counted::new(interval, elements);
        Self { counts: program.searches.iter().map(counted).collect(), ..Self::of(program) }
    }

    /// Nothing found yet by `program`, which reduces `columns` columns.
    pub(crate) fn of_columns(program: &Program, columns: u64) -> Self {
        let start = |&kind: &ReductionKind| vec![start_of(kind); columns as usize];
        Self { numbers: program.kinds.iter().map(start).collect(), ..Self::default() }
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

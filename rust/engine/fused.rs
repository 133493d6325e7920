//! Shapes of formula that have a kernel from bytes to bytes, with the same bits.
//!
//! The general way goes through slots; a weighted sum made in one go is faster, as
//! `benches/kernels.rs` shows. Only what a bench showed to need it is here.

use std::ops::Range;
use std::sync::Arc;

use super::backend::{Layout, Output, Step, steps};
use crate::dtype::DType;
use crate::formula::machine::{InputBytes, Machine};
use crate::formula::masks::MaskName;
use crate::formula::{BinaryOp, Reduction, ReductionKind, Scalar, Value, ValueNode};
use crate::kernels::{self, LANES, Lanes, Level, Real, SPAN, ThinnedTerm, Update, Votes};

type Inputs<'a> = [Option<InputBytes<'a>>];

/// Computes `step` into `outputs` if each of their values has such a shape and the working type is
/// f32.
pub(crate) fn run<T: Real>(
    machine: &Machine<'_, T>,
    step: &Step<'_>,
    outputs: &mut [Output<'_>],
) -> bool {
    let is_float = |output: &Output<'_>| output.dtype.is_float();
    if size_of::<T>() > size_of::<f32>() || !outputs.iter().all(is_float) {
        return false;
    }
    let shape = |output: &Output<'_>| Shape::of(step, output);
    let Some(shapes) = outputs.iter().map(shape).collect::<Option<Vec<_>>>() else { return false };
    for (shape, output) in shapes.iter().zip(outputs) {
        shape.run(machine, step, output);
    }
    true
}

/// The input that `value` is, if it is one of that type.
pub(crate) fn unchanged<'a>(
    value: &Value,
    inputs: &Inputs<'a>,
    dtype: DType,
) -> Option<InputBytes<'a>> {
    inputs[input(value)?].filter(|input| input.dtype == dtype)
}

/// A shape of formula that has a kernel.
pub(crate) enum Shape {
    /// Σ c·x of plain inputs.
    Weighted(Vec<(f64, usize)>),
    Shifted(Shifted),
    Thinned(ThinnedSum),
}

impl Shape {
    fn of(step: &Step<'_>, output: &Output<'_>) -> Option<Self> {
        let value = &step.values[output.result];
        let thinned = || thinned_sum(value).filter(|sum| sum.fits(step, output));
        Self::of_sum(value).or_else(|| thinned().map(Self::Thinned))
    }

    /// The shape of a sum of plain inputs, which takes all of them, of any float type.
    pub(crate) fn of_sum(value: &Value) -> Option<Self> {
        let weighted = weighted_inputs(value).map(Self::Weighted);
        weighted.or_else(|| shifted(value).map(Self::Shifted))
    }

    /// What a sum of input `own` and another one is, if the result replaces that input: and which
    /// the other is.
    pub(crate) fn update(&self, own: usize) -> Option<(usize, Update)> {
        let narrow = f32::from_f64;
        match self {
            Self::Weighted(terms) => match terms[..] {
                [(c, x), (d, y)] if x == own && y != own => {
                    Some((y, Update::Sum { own: narrow(c), other: narrow(d), other_first: false }))
                }
                [(d, y), (c, x)] if x == own && y != own => {
                    Some((y, Update::Sum { own: narrow(c), other: narrow(d), other_first: true }))
                }
                _ => None,
            },
            Self::Shifted(Shifted { base, terms, scale }) => match terms[..] {
                [(t, x)] if *base == own && x != own => {
                    Some((x, Update::Toward { t: narrow(t), scale: narrow(*scale) }))
                }
                [(t, x)] if x == own && *base != own => {
                    Some((*base, Update::From { t: narrow(t), scale: narrow(*scale) }))
                }
                _ => None,
            },
            Self::Thinned(_) => None,
        }
    }

    fn run<T: Real>(&self, machine: &Machine<'_, T>, step: &Step<'_>, output: &mut Output<'_>) {
        match self {
            Self::Thinned(sum) => sum.run(machine, step, output),
            _ => self.run_sum(machine.level(), step.inputs, &step.elements, output),
        }
    }

    /// Runs the shape of a sum.
    pub(crate) fn run_sum(
        &self,
        level: Level,
        inputs: &Inputs<'_>,
        elements: &Range<u64>,
        output: &mut Output<'_>,
    ) {
        let term = |&(c, input): &(f64, usize)| term(c, input, inputs, elements);
        match self {
            Self::Weighted(terms) => {
                let terms: Vec<_> = terms.iter().map(term).collect();
                kernels::weighted_sum_bytes(level, &terms, output.dtype, output.bytes);
            }
            Self::Shifted(Shifted { base, terms, scale }) => {
                let (_, dtype, bytes) = term(&(1.0, *base));
                let terms: Vec<_> = terms.iter().map(term).collect();
                let (base, scale) = ((dtype, bytes), f32::from_f64(*scale));
                let (dtype, bytes) = (output.dtype, &mut *output.bytes);
                kernels::weighted_difference_sum_bytes(level, base, &terms, scale, dtype, bytes);
            }
            Self::Thinned(_) => unreachable!("it is not made of plain inputs"),
        }
    }
}

/// The two inputs, if the reductions are all inner products of two inputs of one type in f32.
pub(crate) fn pair<T: Real>(step: &Step<'_>, layout: &Layout) -> Option<[usize; 2]> {
    let factors = |reduction: &Arc<Reduction>| {
        let right = reduction.right.as_ref()?;
        (reduction.kind == ReductionKind::Dot).then_some([input(&reduction.left)?, input(right)?])
    };
    let [aa, ab, bb] = layout.reductions.as_slice() else { return None };
    let [a, b] = factors(ab)?;
    let dtype = |index: usize| step.inputs[index].as_ref().map(|input| input.dtype);
    let is_gram = factors(aa)? == [a, a] && factors(bb)? == [b, b];
    let is_uniform = dtype(a) == dtype(b) && size_of::<T>() == size_of::<f32>();
    (is_gram && is_uniform).then_some([a, b])
}

/// The inner products of [`pair`] over one block.
pub(crate) fn products(
    level: Level,
    inputs: &Inputs<'_>,
    [a, b]: [usize; 2],
    block: &Range<u64>,
) -> Vec<Lanes> {
    let (_, dtype, a) = term(1.0, a, inputs, block);
    let (_, _, b) = term(1.0, b, inputs, block);
    let mut lanes = [[0.0; LANES]; 3];
    kernels::products_into(level, dtype, a, b, &mut lanes);
    lanes.to_vec()
}

/// base + lambda · Σ weight · scale · (what a random mask keeps of x − base), or the same with votes.
pub(crate) struct ThinnedSum {
    base: usize,
    terms: Vec<ThinnedVector>,
    votes: Votes,
    lambda: f64,
}

struct ThinnedVector {
    weight: f64,
    scale: f64,
    of: Thinned,
}

/// Terms that one kernel takes.
const MOST_THINNED: usize = 3;

impl ThinnedSum {
    /// Whether all is of one type, and one kernel takes all terms.
    fn fits(&self, step: &Step<'_>, output: &Output<'_>) -> bool {
        let is_uniform = |index: usize| {
            step.inputs[index].as_ref().is_some_and(|input| input.dtype == output.dtype)
        };
        is_uniform(self.base)
            && self.terms.len() <= MOST_THINNED
            && self.terms.iter().all(|term| is_uniform(term.of.x))
    }

    fn run<T: Real>(&self, machine: &Machine<'_, T>, step: &Step<'_>, output: &mut Output<'_>) {
        let keys: Vec<_> = self.terms.iter().map(|term| machine.mask_key(term.of.mask)).collect();
        let spans = steps(step.elements.clone(), SPAN as u64);
        for (span, out) in spans.zip(output.bytes.chunks_mut(SPAN * output.dtype.size())) {
            let bits = |(key, term): (_, &ThinnedVector)| {
                machine.random_bits(key, term.of.mask, span.start)
            };
            let bits: Vec<_> = keys.iter().zip(&self.terms).map(bits).collect();
            let stored = |input: usize| term(1.0, input, step.inputs, &span).2;
            let term = |(term, bits): (&ThinnedVector, _)| ThinnedTerm {
                weight: f32::from_f64(term.weight),
                scale: f32::from_f64(term.scale),
                input: stored(term.of.x),
                bits,
            };
            let terms: Vec<_> = self.terms.iter().zip(&bits).map(term).collect();
            kernels::thinned_sum_bytes(
                machine.level(),
                output.dtype,
                stored(self.base),
                &terms,
                self.votes,
                f32::from_f64(self.lambda),
                out,
            );
        }
    }
}

fn thinned_sum(value: &Value) -> Option<ThinnedSum> {
    let ValueNode::Binary(BinaryOp::Add, base, sum) = &*value.0 else { return None };
    let base = input(base)?;
    let (lambda, sum) = scaled_sum(sum);
    let (votes, terms) = match &*sum.0 {
        ValueNode::Elect { terms, average } => {
            let terms = terms.iter().map(|(weight, value)| (*weight, value)).collect();
            (if *average { Votes::Average } else { Votes::Elect }, terms)
        }
        _ => (Votes::None, weighted(sum)?),
    };
    let thinned = |(weight, value)| {
        let (scale, kept) = scaled(value);
        let (mask, whole) = kept.randomly_kept()?;
        let ValueNode::Binary(BinaryOp::Sub, x, b) = &*whole.0 else { return None };
        let of = Thinned { x: input(x)?, base, mask };
        (input(b) == Some(base)).then_some(ThinnedVector { weight, scale, of })
    };
    let terms = terms.into_iter().map(thinned).collect::<Option<_>>()?;
    Some(ThinnedSum { base, terms, votes, lambda })
}

/// `sum` as a number times another sum.
fn scaled_sum(sum: &Value) -> (f64, &Value) {
    match scaled(sum) {
        (scale, inner)
            if matches!(&*inner.0, ValueNode::WeightedSum(_) | ValueNode::Elect { .. }) =>
        {
            (scale, inner)
        }
        _ => (1.0, sum),
    }
}

/// `value` as a number times another value.
fn scaled(value: &Value) -> (f64, &Value) {
    match weighted(value).as_deref() {
        Some(&[(scale, inner)]) => (scale, inner),
        _ => (1.0, value),
    }
}

/// A task vector, and a random mask of it.
#[derive(Clone, Copy)]
pub(crate) struct Thinned {
    x: usize,
    base: usize,
    mask: MaskName,
}

/// The task vectors, if the reductions are the L1 norms of each, and of what a random mask keeps of
/// it, of inputs of one type in f32.
pub(crate) fn thinned<T: Real>(step: &Step<'_>, layout: &Layout) -> Option<Vec<Thinned>> {
    let (pairs, []) = layout.reductions.as_chunks::<2>() else { return None };
    let is_norm = |reduction: &Arc<Reduction>| reduction.kind == ReductionKind::AbsoluteSum;
    let dtype = |index: usize| step.inputs[index].as_ref().map(|input| input.dtype);
    let thinned = |[whole, kept]: &[Arc<Reduction>; 2]| {
        let ValueNode::Binary(BinaryOp::Sub, x, base) = &*whole.left.0 else { return None };
        let (x, base) = (input(x)?, input(base)?);
        let (mask, of) = kept.left.randomly_kept()?;
        let is_uniform = dtype(x) == dtype(base) && size_of::<T>() == size_of::<f32>();
        let are_norms = is_norm(whole) && is_norm(kept) && Arc::ptr_eq(&of.0, &whole.left.0);
        (are_norms && is_uniform).then_some(Thinned { x, base, mask })
    };
    pairs.iter().map(thinned).collect()
}

/// The L1 norms of [`thinned`] over one block.
pub(crate) fn norms<T: Real>(
    machine: &Machine<'_, T>,
    inputs: &Inputs<'_>,
    thinned: &[Thinned],
    block: &Range<u64>,
) -> Vec<Lanes> {
    let mut lanes = Vec::new();
    for &Thinned { x, base, mask } in thinned {
        let key = machine.mask_key(mask);
        let mut norms = [[0.0; LANES]; 2];
        for span in steps(block.clone(), SPAN as u64) {
            let bits = machine.random_bits(&key, mask, span.start);
            let (_, dtype, x) = term(1.0, x, inputs, &span);
            let (_, _, base) = term(1.0, base, inputs, &span);
            kernels::norms_into(machine.level(), dtype, x, base, &bits, &mut norms);
        }
        lanes.extend(norms);
    }
    lanes
}

fn term<'a>(
    coefficient: f64,
    input: usize,
    inputs: &Inputs<'a>,
    range: &Range<u64>,
) -> (f32, DType, &'a [u8]) {
    let input = inputs[input].as_ref().expect("an input that the formula uses was read");
    (f32::from_f64(coefficient), input.dtype, input.part(range))
}

/// Σ c·x of plain inputs.
fn weighted_inputs(value: &Value) -> Option<Vec<(f64, usize)>> {
    weighted(value)?.into_iter().map(|(c, value)| Some((c, input(value)?))).collect()
}

/// base + scale · Σ c·(x − base).
pub(crate) struct Shifted {
    base: usize,
    terms: Vec<(f64, usize)>,
    scale: f64,
}

fn shifted(value: &Value) -> Option<Shifted> {
    let ValueNode::Binary(BinaryOp::Add, base, sum) = &*value.0 else { return None };
    let base = input(base)?;
    let (scale, sum) = scaled_sum(sum);
    let difference = |(c, value): (f64, &Value)| match &*value.0 {
        ValueNode::Binary(BinaryOp::Sub, x, b) if input(b) == Some(base) => Some((c, input(x)?)),
        _ => None,
    };
    let terms: Option<Vec<_>> = weighted(sum)?.into_iter().map(difference).collect();
    Some(Shifted { base, terms: terms?, scale })
}

fn weighted(value: &Value) -> Option<Vec<(f64, &Value)>> {
    let ValueNode::WeightedSum(terms) = &*value.0 else { return None };
    terms.iter().map(|(c, value)| Some((Scalar::as_constant(c)?, value))).collect()
}

fn input(value: &Value) -> Option<usize> {
    match &*value.0 {
        ValueNode::Input(index) => Some(*index),
        _ => None,
    }
}

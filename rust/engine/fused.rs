//! Shapes of formula that have a kernel from bytes to bytes, with the same bits.
//!
//! The general way goes through slots; for two bf16 inputs a weighted sum made in one go is half
//! as fast again. Only what a bench showed to need it is here.

use std::ops::Range;

use super::work::Step;
use crate::dtype::DType;
use crate::formula::machine::InputBytes;
use crate::formula::{BinaryOp, Scalar, Value, ValueNode};
use crate::kernels::{self, Level, Real};

type Inputs<'a> = [Option<InputBytes<'a>>];

/// Computes `step` into `bytes` if its value has such a shape and the working type is f32.
pub(crate) fn run(level: Level, step: &Step<'_>, dtype: DType, bytes: &mut [u8]) -> bool {
    let double = |input: &InputBytes<'_>| input.dtype == DType::F64;
    if dtype == DType::F64 || step.inputs.iter().flatten().any(double) {
        return false;
    }
    let terms = |terms: &[(f64, usize)]| -> Vec<_> {
        terms.iter().map(|&(c, input)| term(c, input, step.inputs, &step.elements)).collect()
    };
    if let Some(sum) = weighted_inputs(&step.values[0]) {
        kernels::weighted_sum_bytes(level, &terms(&sum), dtype, bytes);
        return true;
    }
    if let Some(Shifted { base, terms: sum, scale }) = shifted(&step.values[0]) {
        let (_, base_dtype, base_bytes) = term(1.0, base, step.inputs, &step.elements);
        let (base, scale) = ((base_dtype, base_bytes), f32::from_f64(scale));
        kernels::weighted_difference_sum_bytes(level, base, &terms(&sum), scale, dtype, bytes);
        return true;
    }
    false
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
struct Shifted {
    base: usize,
    terms: Vec<(f64, usize)>,
    scale: f64,
}

fn shifted(value: &Value) -> Option<Shifted> {
    let ValueNode::Binary(BinaryOp::Add, base, sum) = &*value.0 else { return None };
    let base = input(base)?;
    let (scale, sum) = match weighted(sum)?.as_slice() {
        [(scale, inner)] if weighted(inner).is_some() => (*scale, (*inner).clone()),
        _ => (1.0, sum.clone()),
    };
    let difference = |(c, value): (f64, &Value)| match &*value.0 {
        ValueNode::Binary(BinaryOp::Sub, x, b) if input(b) == Some(base) => Some((c, input(x)?)),
        _ => None,
    };
    let terms: Option<Vec<_>> = weighted(&sum)?.into_iter().map(difference).collect();
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

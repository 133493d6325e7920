//! What is asked of tensors instead of merging them: numbers about each, in one pass over its inputs.
//!
//! They are written as methods are, of the same reductions, so they have the same fixed order and the
//! same bits for any threads and memory.
//!
//! Elements that are not finite are left out of sums, and counted. Nearly no tensor has any, and looking
//! for them takes half of the time. So a measure is first made as if there were none; a sum of squares
//! that is not finite then tells that there are, and that tensor is measured again with care. Where
//! all are finite both ways give the same bits.

use crate::dtype::DType;
use crate::formula::{BinaryOp, Scalar, Scope, Value};

/// A set of numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// How input 1 differs from input 0; with a third input, how their task vectors do, of which that
    /// is the base. Elements are left out of sums where a difference is not finite.
    ///
    /// The elements that are stored as other bits; those whose difference is zero; those it is finite
    /// of; the inner products d·d, a·a, b·b, a·b; the largest |d|; and how many of a and b have
    /// opposite signs. d is input 1 − input 0.
    Difference,
    /// What is odd about one tensor.
    ///
    /// How many elements are numbers, finite, and zero; the sum of the finite ones, and of their
    /// squares; the largest element, and the largest of their negatives.
    Soundness,
}

impl Measure {
    /// The measure of that name.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "difference" => Some(Self::Difference),
            "soundness" => Some(Self::Soundness),
            _ => None,
        }
    }

    /// Whether these numbers, found as if all elements were finite, show that some are not.
    pub(crate) fn shows_others(self, numbers: &[f64]) -> bool {
        let squares = match self {
            Self::Difference => numbers.get(3..6),
            Self::Soundness => numbers.get(4..5),
        };
        squares.is_some_and(|squares| squares.iter().any(|square| !square.is_finite()))
    }

    /// How many numbers there are about a tensor of floats.
    pub fn width(self) -> usize {
        match self {
            Self::Difference => 9,
            Self::Soundness => 7,
        }
    }

    /// Whether there is something to find out about inputs of these types.
    pub fn is_of(self, types: &[DType]) -> bool {
        let is_float = types.iter().all(|dtype| dtype.is_float());
        match (self, types) {
            (Self::Difference, [a, b]) => is_float || a == b,
            (Self::Difference, [_, _, _]) | (Self::Soundness, [_]) => is_float,
            _ => false,
        }
    }

    /// What is found out about inputs of these types, from the first number on: where they are no
    /// floats only the stored bits can be compared, and where they differ only the numbers. `finite` is
    /// as for [`difference`].
    pub(crate) fn of(self, types: &[DType], finite: Option<u64>) -> Vec<Scalar> {
        if self == Self::Soundness {
            return soundness(finite);
        }
        let is_alike = types[0] == types[1];
        let stored = if is_alike { Value::differing(0, 1) } else { Scalar::constant(f64::NAN) };
        let is_float = types.iter().all(|dtype| dtype.is_float());
        let numbers = if is_float { difference(types.len() > 2, finite) } else { Vec::new() };
        std::iter::once(stored).chain(numbers).collect()
    }
}

fn zero() -> Value {
    Value::scalar(0.0)
}

/// Zero where `value` is finite, else NaN.
fn less_itself(value: &Value) -> Value {
    value.binary(BinaryOp::Sub, value)
}

/// 1 where `value` is 0, of either sign.
fn is_zero(value: &Value) -> Value {
    value.binary(BinaryOp::Equal, &zero())
}

/// `values` with 0 for each element where one that is `checked` is not finite, and how many are left.
fn finite_of<const N: usize>(values: [Value; N], checked: &[&Value]) -> ([Value; N], Scalar) {
    let sum = checked.iter().map(|value| less_itself(value)).reduce(|sum, each| &sum + &each);
    let is_finite = is_zero(&sum.unwrap_or_else(zero));
    (values.map(|value| value.masked(&is_finite)), is_finite.sum(Scope::Tensor))
}

/// The numbers of [`Measure::Difference`] but for the first. `finite` is the number of elements, if all
/// are taken to be finite.
pub fn difference(has_base: bool, finite: Option<u64>) -> Vec<Scalar> {
    let (a, b) = (Value::input(0), Value::input(1));
    let d = &b - &a;
    let (a, b) = if has_base {
        let base = Value::input(2);
        (&a - &base, &b - &base)
    } else {
        (a, b)
    };
    let values = [d.clone(), a.clone(), b.clone()];
    let ([d, a, b], compared) = match finite {
        Some(elements) => (values, Scalar::constant(elements as f64)),
        None if has_base => finite_of(values, &[&d, &a, &b]),
        None => finite_of(values, &[&d]),
    };
    let opposite = zero().binary(BinaryOp::Greater, &(&a.sign() * &b.sign()));
    let dot = |a: &Value, b: &Value| a.dot(b, Scope::Tensor);
    vec![
        // Where a difference is left out it is 0 too; who asks takes those off.
        is_zero(&d).sum(Scope::Tensor),
        compared,
        dot(&d, &d),
        dot(&a, &a),
        dot(&b, &b),
        dot(&a, &b),
        d.abs().max(Scope::Tensor),
        opposite.sum(Scope::Tensor),
    ]
}

/// The numbers of [`Measure::Soundness`]; `finite` is as for [`difference`].
pub fn soundness(finite: Option<u64>) -> Vec<Scalar> {
    let x = Value::input(0);
    let ([kept], numbers, compared) = if let Some(elements) = finite {
        let all = Scalar::constant(elements as f64);
        ([x.clone()], all.clone(), all)
    } else {
        let (kept, compared) = finite_of([x.clone()], &[&x]);
        (kept, x.binary(BinaryOp::Equal, &x).sum(Scope::Tensor), compared)
    };
    vec![
        numbers,
        compared,
        is_zero(&x).sum(Scope::Tensor),
        kept.sum(Scope::Tensor),
        kept.dot(&kept, Scope::Tensor),
        x.max(Scope::Tensor),
        (&zero() - &x).max(Scope::Tensor),
    ]
}

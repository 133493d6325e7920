//! What is asked of tensors instead of merging them: numbers about each, in one pass over its inputs.
//!
//! They are written as methods are, of the same reductions, so they have the same fixed order and the
//! same bits for any threads and memory.

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
    /// floats only the stored bits can be compared, and where they differ only the numbers.
    pub(crate) fn of(self, types: &[DType]) -> Vec<Scalar> {
        if self == Self::Soundness {
            return soundness();
        }
        let is_alike = types[0] == types[1];
        let stored = if is_alike { Value::differing(0, 1) } else { Scalar::constant(f64::NAN) };
        let is_float = types.iter().all(|dtype| dtype.is_float());
        let numbers = if is_float { difference(types.len() > 2) } else { Vec::new() };
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

/// The numbers of [`Measure::Difference`] but for the first.
pub fn difference(has_base: bool) -> Vec<Scalar> {
    let (a, b) = (Value::input(0), Value::input(1));
    let d = &b - &a;
    let (a, b) = if has_base {
        let base = Value::input(2);
        (&a - &base, &b - &base)
    } else {
        (a, b)
    };
    let checked = if has_base { vec![&d, &a, &b] } else { vec![&d] };
    let checked = checked.into_iter().map(less_itself).reduce(|sum, each| &sum + &each);
    let is_finite = is_zero(&checked.unwrap_or_else(zero));
    let [d, a, b] = [d, a, b].map(|value| value.masked(&is_finite));
    let opposite = zero().binary(BinaryOp::Greater, &(&a.sign() * &b.sign()));
    let dot = |a: &Value, b: &Value| a.dot(b, Scope::Tensor);
    vec![
        // Where a difference is left out it is 0 too; who asks takes those off.
        is_zero(&d).sum(Scope::Tensor),
        is_finite.sum(Scope::Tensor),
        dot(&d, &d),
        dot(&a, &a),
        dot(&b, &b),
        dot(&a, &b),
        d.abs().max(Scope::Tensor),
        opposite.sum(Scope::Tensor),
    ]
}

/// The numbers of [`Measure::Soundness`].
pub fn soundness() -> Vec<Scalar> {
    let x = Value::input(0);
    let is_finite = is_zero(&less_itself(&x));
    let finite = x.masked(&is_finite);
    vec![
        x.binary(BinaryOp::Equal, &x).sum(Scope::Tensor),
        is_finite.sum(Scope::Tensor),
        is_zero(&x).sum(Scope::Tensor),
        finite.sum(Scope::Tensor),
        finite.dot(&finite, Scope::Tensor),
        x.max(Scope::Tensor),
        (&zero() - &x).max(Scope::Tensor),
    ]
}

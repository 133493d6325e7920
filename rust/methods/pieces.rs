//! What merge methods are made of, on its own: for analysis, and for methods of one's own.
//!
//! Each is a formula like a method's, over inputs that are numbered in the order they are given.

use crate::formula::{Among, Pick, Scalar, Scope, Value};

/// Σ wᵢ·xᵢ.
pub fn weighted_sum(weights: &[f64]) -> Value {
    Value::weighted_sum(weights.iter().copied().zip((0..weights.len()).map(Value::input)))
}

/// From input 0 to input 1: x₀ + t·(x₁ − x₀), in the second half from the other end. So both ends are
/// exact, and equal inputs stay what they are.
pub fn lerp(t: f64) -> Value {
    let (near, far) = if t < 0.5 { (0, 1) } else { (1, 0) };
    let (near, far) = (Value::input(near), Value::input(far));
    &near + &(&far - &near).scaled(if t < 0.5 { t } else { 1.0 - t })
}

/// x − base, input 1 being the base.
pub fn task_vector() -> Value {
    &Value::input(0) - &Value::input(1)
}

/// 1 for the `count` elements of largest magnitude, of equal ones those of lowest index; else 0.
pub fn top_k_mask(count: u64) -> Value {
    Value::input(0).abs().largest(count as f64)
}

/// 1 for the `count` elements of largest magnitude of each row, or of each `every` elements of a row if
/// that is not 0; else 0.
pub fn row_top_k_mask(count: u64, every: u64) -> Value {
    let among = if every == 0 { Among::Row } else { Among::Group(every) };
    Value::input(0).abs().picked_by_rank(among, Pick::Largest(count))
}

/// 1 with a probability that rises from the smallest magnitude of a row to the largest, else 0: the mask
/// that DELLA draws for the input at `position`.
pub fn random_mask_by_rank(lowest: f64, highest: f64, position: u32) -> Value {
    let pick = Pick::Random { lowest, highest, stream: position };
    Value::input(0).abs().picked_by_rank(Among::Row, pick)
}

/// 1 with probability `density`, else 0: the mask that DARE draws for the input at `position`.
pub fn random_mask(density: f64, position: u32) -> Value {
    Value::random_mask(density, position)
}

/// The sign of Σ wᵢ·xᵢ that a vote elects: 1 or −1, zero counting as positive; NaN for NaN.
pub fn sign_consensus(weights: &[f64]) -> Value {
    let sum = weighted_sum(weights);
    sum.at_least(&Value::scalar(0.0)).select(&Value::scalar(1.0), &sum.sign())
}

/// The input itself, to be stored in another type.
pub fn convert() -> Value {
    Value::input(0)
}

/// The magnitude of rank `count`, 1 being the largest.
pub fn kth_magnitude(count: u64) -> Scalar {
    Value::input(0).abs().order_statistic(count as f64)
}

/// The sum of the magnitudes.
pub fn absolute_sum() -> Scalar {
    Value::input(0).absolute_sum(Scope::Tensor)
}

/// The largest magnitude.
pub fn largest_magnitude() -> Scalar {
    Value::input(0).abs().max(Scope::Tensor)
}

/// The inner product of two inputs.
pub fn dot() -> Scalar {
    Value::input(0).dot(&Value::input(1), Scope::Tensor)
}

/// The inner products of every two of `inputs` inputs, of their differences to input `base` if there
/// is one: the upper triangle, row after row.
pub fn gram(inputs: usize, base: Option<usize>) -> Vec<Scalar> {
    let vector = |index: usize| match base {
        None => Value::input(index),
        Some(base) => &Value::input(index) - &Value::input(base),
    };
    let vectors: Vec<Value> = (0..inputs).map(vector).collect();
    let row = |at: usize| vectors[at..].iter().map(move |other| (at, other));
    (0..inputs).flat_map(row).map(|(at, other)| vectors[at].dot(other, Scope::Tensor)).collect()
}

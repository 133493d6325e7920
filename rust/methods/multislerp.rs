//! Spherical average of any number of models by weights, optionally of their differences to a base.
//!
//! The models' directions are averaged, the average is brought back to length one, and scaled by the
//! average length. mergekit then takes one step in the tangent space at that point; the tangent
//! vectors of a weighted average sum to zero there, so the step has no length, and is left out.
//!
//! Differs from mergekit where the weighted directions cancel out, which is told from a sum shorter
//! than 1e-6: there two models are averaged linearly, as in mergekit, and so are more, where mergekit
//! gives up.

use super::gram::Gram;
use super::linear::sum_of_weights;
use super::{Base, Class, Contract, Description, Inputs, Kind, Method, Parameter, Per, Preset};
use crate::error::Result;
use crate::formula::{Value, compute};
use crate::plan::OutputTensor;

/// A shorter sum of directions is rounding error.
const CANCELLED: f64 = 1e-6;

/// Spherical average.
#[derive(Debug)]
pub(crate) struct Multislerp;

impl Method for Multislerp {
    fn description(&self) -> Description {
        Description {
            name: "multislerp",
            title: "Multi-SLERP",
            formula: "s * m / |m|, with m = sum of w_i * x_i / |x_i| and s = sum of w_i * |x_i| \
                      (x_i minus the base, if there is one, which is added again)",
            class: Class::Gram,
            cost: "two reads of every input",
            paper: "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
            contract: Contract { base: Base::Optional, inputs: (1, None), others: (1, None) },
            parameters: const {
                &[
                    Parameter::weight(Per::Other, Preset::Nothing, "how much of this model"),
                    Parameter::new(
                        Per::Shared,
                        "normalize_weights",
                        Kind::Bool,
                        Preset::Bool(true),
                        "divide the weights by their sum",
                    ),
                    Parameter::new(
                        Per::Shared,
                        "eps",
                        Kind::Float,
                        Preset::Float(1e-8),
                        "is added to lengths; a shorter sum of directions has none",
                    )
                    .at_least(0.0),
                ]
            },
        }
    }

    fn differs(&self) -> &'static str {
        "more than two directions that cancel out are averaged linearly, where mergekit gives \
         up"
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        let inputs = Inputs::of(tensor);
        let others = inputs.others();
        if let [only] = others.as_slice() {
            return Ok(only.value.clone());
        }
        let mut weights =
            others.iter().map(|input| input.number("weight")).collect::<Result<Vec<_>>>()?;
        if inputs.flag("normalize_weights")? {
            let sum = sum_of_weights(&weights)?;
            weights.iter_mut().for_each(|weight| *weight /= sum);
        }
        let eps = inputs.number("eps")?;
        let base = inputs.optional_base();
        let from_base = |value: Value| base.as_ref().map_or(value.clone(), |base| &value - base);
        let vectors: Vec<Value> = others.into_iter().map(|input| from_base(input.value)).collect();
        let count = vectors.len();
        let coefficients = compute(&Gram::products(&vectors), count, move |products| {
            coefficients(&Gram::new(products, count), &weights, eps)
        });
        let sum = Value::weighted_sum(coefficients.into_iter().zip(vectors));
        Ok(base.map_or(sum.clone(), |base| &base + &sum))
    }
}

/// The coefficients of the vectors, from their inner products.
fn coefficients(gram: &Gram, weights: &[f64], eps: f64) -> Vec<f64> {
    let lengths = gram.lengths();
    let directions: Vec<f64> =
        weights.iter().zip(&lengths).map(|(weight, length)| weight / (length + eps)).collect();
    let length = gram.square(&directions).max(0.0).sqrt();
    if length < eps.max(CANCELLED) {
        return weights.to_vec();
    }
    let scale: f64 = weights.iter().zip(&lengths).map(|(weight, length)| weight * length).sum();
    directions.into_iter().map(|direction| scale * direction / length).collect()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that fails may panic")]
mod tests {
    use super::{Gram, coefficients};

    #[test]
    fn equal_vectors_stay_and_opposite_ones_are_averaged() {
        let equal = Gram::new(&[4.0, 4.0, 4.0], 2);
        let [a, b] = coefficients(&equal, &[0.25, 0.75], 1e-8).try_into().unwrap();
        assert!((a + b - 1.0).abs() < 1e-7, "{a} {b}");
        let opposite = Gram::new(&[4.0, -4.0, 4.0], 2);
        assert_eq!(coefficients(&opposite, &[0.5, 0.5], 1e-8), [0.5, 0.5]);
    }

    #[test]
    fn right_angles_keep_their_length() {
        let [a, b] =
            coefficients(&Gram::new(&[9.0, 0.0, 9.0], 2), &[0.5, 0.5], 0.0).try_into().unwrap();
        assert!((a - 0.5_f64.sqrt()).abs() < 1e-15 && a == b, "{a} {b}");
    }
}

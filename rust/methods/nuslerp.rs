//! Spherical interpolation by two weights: of whole tensors, of rows or of columns, optionally of
//! the differences to a base.
//!
//! Differs from mergekit where the vectors are nearly opposite: there the angle's sine is all
//! rounding error, and its reciprocal blows the result up. Such vectors are interpolated linearly.

use super::linear::divisor;
use super::{Base, Class, Contract, Description, Inputs, Kind, Method, Parameter, Per, Preset};
use crate::error::{Error, Result};
use crate::formula::{Scalar, Scope, Value, compute};
use crate::plan::OutputTensor;

/// A shorter vector has no direction.
const SHORTEST: f64 = 1e-7;
/// A squared sine below this means parallel, and the coefficients are those of a straight line to
/// within as much; on the opposite side the larger bound applies.
const PARALLEL: f64 = 1e-12;
const OPPOSITE: f64 = 1e-6;

/// Spherical interpolation by weights.
#[derive(Debug)]
pub(crate) struct Nuslerp;

impl Method for Nuslerp {
    fn description(&self) -> Description {
        Description {
            name: "nuslerp",
            title: "NuSLERP",
            formula: "slerp of two models (of their differences to the base, if there is one) \
                      with t = w_1 / (w_0 + w_1)",
            class: Class::Gram,
            cost: "two reads of every input",
            paper: "https://github.com/arcee-ai/mergekit",
            contract: Contract { base: Base::Optional, inputs: (2, Some(3)), others: (2, Some(2)) },
            parameters: const {
                &[
                    Parameter::weight(Per::Other, Preset::Nothing, "how much of this model"),
                    Parameter::new(
                        Per::Shared,
                        "nuslerp_flatten",
                        Kind::Bool,
                        Preset::Bool(true),
                        "one vector a tensor; else one for each row",
                    ),
                    Parameter::new(
                        Per::Shared,
                        "nuslerp_row_wise",
                        Kind::Bool,
                        Preset::Bool(false),
                        "without nuslerp_flatten: vectors along the first dimension (columns)",
                    ),
                ]
            },
        }
    }

    fn differs(&self) -> &'static str {
        "nearly opposite vectors are interpolated linearly, where mergekit's result can be a \
         thousand times too long"
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        let inputs = Inputs::of(tensor);
        let [first, second] = inputs.others().try_into().map_err(|_| two_models())?;
        let t = share_of_second(first.number("weight")?, second.number("weight")?);
        let scope = scope(&inputs)?;
        let (a, b) = (first.value, second.value);
        Ok(match inputs.optional_base() {
            None => interpolate(t, &a, &b, scope),
            Some(base) => &base + &interpolate(t, &(&a - &base), &(&b - &base), scope),
        })
    }
}

#[cold]
fn two_models() -> Error {
    Error::plan("nuslerp interpolates between exactly two models besides the base")
        .advice("list two models besides the base")
}

/// Weights that sum to zero give both models the same share.
fn share_of_second(first: f64, second: f64) -> f64 {
    divisor(&[first, second]).map_or(0.5, |sum| second / sum)
}

fn scope(inputs: &Inputs<'_>) -> Result<Scope> {
    Ok(match (inputs.flag("nuslerp_flatten")?, inputs.flag("nuslerp_row_wise")?) {
        (true, _) => Scope::Tensor,
        (false, false) => Scope::Row,
        (false, true) => Scope::Column,
    })
}

fn interpolate(t: f64, a: &Value, b: &Value, scope: Scope) -> Value {
    let gram: [Scalar; 3] = [a.dot(a, scope), a.dot(b, scope), b.dot(b, scope)];
    let coefficients = compute(&gram, 2, move |gram| {
        let [aa, ab, bb] = [gram[0], gram[1], gram[2]];
        coefficients(t, aa, ab, bb).to_vec()
    });
    Value::weighted_sum(coefficients.into_iter().zip([a.clone(), b.clone()]))
}

/// The coefficients of the two vectors, from their inner products.
///
/// The sine comes from the Gram determinant, which keeps its digits where 1 − cos² has none; a
/// vector without direction is at a right angle to every other.
fn coefficients(t: f64, aa: f64, ab: f64, bb: f64) -> [f64; 2] {
    let (norm_a, norm_b) = (aa.sqrt(), bb.sqrt());
    let cosine = (ab / (norm_a.max(SHORTEST) * norm_b.max(SHORTEST))).clamp(-1.0, 1.0);
    let sine_squared = if norm_a < SHORTEST || norm_b < SHORTEST {
        1.0 - cosine * cosine
    } else {
        ((aa * bb - ab * ab) / (aa * bb)).max(0.0)
    };
    let parallel = if cosine < 0.0 { OPPOSITE } else { PARALLEL };
    if sine_squared <= parallel {
        return [1.0 - t, t];
    }
    let angle = libm::atan2(sine_squared.sqrt(), cosine);
    let sine = libm::sin(angle);
    [libm::sin((1.0 - t) * angle) / sine, libm::sin(t * angle) / sine]
}

#[cfg(test)]
mod tests {
    use super::coefficients;

    #[test]
    fn nearly_parallel_vectors_are_interpolated() {
        for exponent in 1..20 {
            let scale = 1.0 + 10_f64.powi(-exponent);
            for noise in [0.0, 1e-17, -1e-17, 1e-13, 1e-9] {
                let [a, b] = coefficients(0.3, 1.0, scale * (1.0 - noise), scale * scale);
                assert!(
                    (a - 0.7).abs() < 1e-6 && (b - 0.3).abs() < 1e-6,
                    "{a} {b} {scale} {noise}"
                );
            }
        }
    }

    #[test]
    fn opposite_and_missing_vectors_do_not_blow_up() {
        let [a, b] = coefficients(0.3, 4.0, -2.0 + 1e-12, 1.0);
        assert!((a - 0.7).abs() < 1e-12 && (b - 0.3).abs() < 1e-12, "{a} {b}");
        let [a, b] = coefficients(0.5, 0.0, 0.0, 1.0);
        assert!((a - b).abs() < 1e-12 && (b - 0.5_f64.sqrt()).abs() < 1e-12, "{a} {b}");
    }
}

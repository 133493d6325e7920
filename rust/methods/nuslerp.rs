//! Spherical interpolation by two weights: of whole tensors, of rows or of columns, optionally of
//! the differences to a base.
//!
//! Differs from mergekit where the vectors are nearly opposite: there the angle's sine is all
//! rounding error, and its reciprocal blows the result up. Such vectors are interpolated linearly.

use super::{Contract, Description, Inputs, Method, Parameter, Preset};
use crate::error::{Error, Result};
use crate::formula::{Scalar, Scope, Value, compute};
use crate::plan::OutputTensor;

/// A weight sum nearer to zero than this gives both models the same share.
const SMALLEST_SUM: f64 = 1e-6;
/// A shorter vector has no direction.
const SHORTEST: f64 = 1e-7;
/// 1 − cos² below this means parallel; on the opposite side the larger bound applies.
const PARALLEL: f64 = 1e-16;
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
            class: "gram",
            cost: "two reads of every input",
            paper: "https://github.com/arcee-ai/mergekit",
            contract: Contract { base: "optional", inputs: (2, Some(3)), others: (2, Some(2)) },
            parameters: const {
                &[
                    Parameter::new(
                        "other",
                        "weight",
                        "float",
                        Preset::Nothing,
                        "how much of this model",
                    ),
                    Parameter::new(
                        "shared",
                        "nuslerp_flatten",
                        "bool",
                        Preset::Bool(true),
                        "one vector a tensor; else one for each row",
                    ),
                    Parameter::new(
                        "shared",
                        "nuslerp_row_wise",
                        "bool",
                        Preset::Bool(false),
                        "without nuslerp_flatten: vectors along the first dimension (columns)",
                    ),
                ]
            },
        }
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
}

fn share_of_second(first: f64, second: f64) -> f64 {
    let sum = first + second;
    if sum.abs() < SMALLEST_SUM { 0.5 } else { second / sum }
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

fn coefficients(t: f64, aa: f64, ab: f64, bb: f64) -> [f64; 2] {
    let norm = |square: f64| square.sqrt().max(SHORTEST);
    let cosine = (ab / (norm(aa) * norm(bb))).clamp(-1.0, 1.0);
    // The squared sine from the Gram determinant: it keeps its digits where 1 − cos² has none.
    let sine_squared = ((aa * bb - ab * ab) / (aa * bb).max(f64::MIN_POSITIVE)).max(0.0);
    let parallel = if cosine < 0.0 { OPPOSITE } else { PARALLEL };
    if sine_squared <= parallel {
        return [1.0 - t, t];
    }
    let angle = libm::acos(cosine);
    let sine = libm::sin(angle);
    [libm::sin((1.0 - t) * angle) / sine, libm::sin(t * angle) / sine]
}

//! Weighted average: Σ wᵢ·xᵢ / Σ wᵢ.

use super::{Base, Class, Contract, Description, Inputs, Kind, Method, Parameter, Per, Preset};
use crate::error::{Error, Result};
use crate::formula::Value;
use crate::kernels::cancels;
use crate::plan::OutputTensor;

/// Weighted average.
#[derive(Debug)]
pub(crate) struct Linear;

impl Method for Linear {
    fn description(&self) -> Description {
        Description {
            name: "linear",
            title: "Linear",
            formula: "sum of w_i * x_i, divided by the sum of w_i if normalize",
            class: Class::Elementwise,
            cost: "one read of every input",
            paper: "https://arxiv.org/abs/2203.05482",
            contract: Contract { base: Base::Ignored, inputs: (1, None), others: (0, None) },
            parameters: const {
                &[
                    Parameter::weight(Per::Input, Preset::Nothing, "how much of this model"),
                    Parameter::new(
                        Per::Shared,
                        "normalize",
                        Kind::Bool,
                        Preset::Bool(true),
                        "divide by the sum of the weights",
                    ),
                ]
            },
        }
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        let inputs = Inputs::of(tensor);
        let all = inputs.all();
        let weights = all.iter().map(|input| input.number("weight")).collect::<Result<Vec<_>>>()?;
        let divisor = if inputs.flag("normalize")? { sum_of_weights(&weights)? } else { 1.0 };
        let coefficients = weights.iter().map(|weight| weight / divisor);
        Ok(Value::weighted_sum(coefficients.zip(all.into_iter().map(|input| input.value))))
    }
}

/// The sum in listed order, to divide by; none if it is zero but for rounding: at most 1e-6 of the
/// sum of the magnitudes.
pub(super) fn divisor(weights: &[f64]) -> Option<f64> {
    let sum: f64 = weights.iter().sum();
    let magnitudes = weights.iter().map(|weight| weight.abs()).sum();
    (!cancels(sum, magnitudes)).then_some(sum)
}

/// The same; a sum of zero is an error, since something is to be divided by it.
pub fn sum_of_weights(weights: &[f64]) -> Result<f64> {
    let sum = divisor(weights).filter(|sum| sum.is_finite());
    sum.ok_or_else(|| {
        let is_finite = weights.iter().sum::<f64>().is_finite();
        let what = if is_finite { "zero" } else { "no finite number" };
        Error::plan(format!("the weights sum to {what}, and the result is to be divided by it"))
            .expected("a finite sum that is not zero")
            .found(format!("weights {weights:?}"))
            .advice("change a weight, or set `normalize: false`")
    })
}

//! Norm-preserving average: the weighted average, scaled to the average norm of its inputs.
//!
//! The average of vectors that point different ways is shorter than they are; a tensor of a merged
//! model then acts more weakly than in any of its sources. This restores the length.

use oxmerge::error::Result;
use oxmerge::formula::{Scalar, Scope, Value, compute};
use oxmerge::methods::{
    Base, Class, Contract, Description, Inputs, Kind, Method, Parameter, Per, Preset,
    sum_of_weights,
};
use oxmerge::plan::OutputTensor;

/// Norm-preserving average.
#[derive(Debug)]
pub(crate) struct NormAverage;

impl Method for NormAverage {
    fn description(&self) -> Description {
        Description {
            name: "norm_average",
            title: "Norm-preserving average",
            formula: "s * a, with a = sum of w_i * x_i / sum of w_i, \
                      and s = (sum of w_i * |x_i| / sum of w_i) / |a|",
            class: Class::Gram,
            cost: "two reads of every input",
            paper: "this document",
            contract: Contract { base: Base::Ignored, inputs: (1, None), others: (0, None) },
            parameters: const {
                &[Parameter::new(
                    Per::Input,
                    "weight",
                    Kind::Float,
                    Preset::Nothing,
                    "how much of this model",
                )
                .factor()]
            },
        }
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        let inputs = Inputs::of(tensor).all();
        let weights =
            inputs.iter().map(|input| input.number("weight")).collect::<Result<Vec<_>>>()?;
        let total = sum_of_weights(&weights)?;
        let shares: Vec<f64> = weights.iter().map(|weight| weight / total).collect();
        let average = Value::weighted_sum(
            shares.iter().copied().zip(inputs.iter().map(|input| input.value.clone())),
        );
        let mut squares: Vec<Scalar> =
            inputs.iter().map(|input| input.value.dot(&input.value, Scope::Tensor)).collect();
        squares.push(average.dot(&average, Scope::Tensor));
        let scale = compute(&squares, 1, move |squares| vec![scale(squares, &shares)]);
        Ok(average.scaled(scale[0].clone()))
    }
}

/// What brings the average to the average length. The last square is the average's own.
fn scale(squares: &[f64], shares: &[f64]) -> f64 {
    let wanted: f64 = squares.iter().zip(shares).map(|(square, share)| share * square.sqrt()).sum();
    match squares.last() {
        Some(&square) if square > 0.0 => wanted / square.sqrt(),
        _ => 1.0,
    }
}

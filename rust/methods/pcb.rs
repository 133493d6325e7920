//! PCB: elements compete, within a task vector by their size, between task vectors by how they agree.
//!
//! The score of an element is exp(N · n²) · tanh(d · Σ d): n is its magnitude as a share of the
//! largest, N the number of models. The `density` share of the largest scores is spread over 0 to 1,
//! the others are 0, and the elements are averaged by what comes out. The paper looks at whole
//! models; here each tensor competes for itself, so that a merge reads it while it is at hand.

use super::{
    Base, Class, Contract, Description, Input, Inputs, Kind, Method, Parameter, Per, Preset,
};
use crate::error::Result;
use crate::formula::{BinaryOp, Scalar, Scope, UnaryOp, Value, compute};
use crate::plan::OutputTensor;

/// A smaller sum of scores is divided by this.
const SMALLEST_DIVISOR: f64 = 1e-12;

/// Parameter competition balancing.
#[derive(Debug)]
pub(crate) struct Pcb;

impl Method for Pcb {
    fn description(&self) -> Description {
        Description {
            name: "pcb",
            title: "PCB-Merging",
            formula: "base + lambda * sum of s_i * d_i / sum of s_i, with d_i = w_i * (x_i - base) \
                      and s_i = exp(N * (|d_i| / max |d_i|)^2) * tanh(d_i * sum of d_j), of which \
                      the largest are spread over 0 to 1 and the others are 0",
            class: Class::Selection,
            cost: "three to five reads of every input",
            paper: "https://arxiv.org/abs/2410.02396",
            contract: Contract { base: Base::Required, inputs: (1, None), others: (0, None) },
            parameters: const {
                &[
                    Parameter::weight(
                        Per::Other,
                        Preset::Float(1.0),
                        "scales this model's task vector",
                    ),
                    Parameter::new(
                        Per::Other,
                        "density",
                        Kind::Float,
                        Preset::Float(0.2),
                        "the share of the task vector that is kept",
                    )
                    .from_to(0.0, 1.0),
                    Parameter::lambda("scales the average"),
                ]
            },
        }
    }

    fn differs(&self) -> &'static str {
        "each tensor competes for itself, where the paper looks at the whole model"
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        let inputs = Inputs::of(tensor);
        let base = inputs.base()?;
        let elements = inputs.elements() as f64;
        let vectors = inputs.weighted_task_vectors()?;
        let rank = |input: &Input<'_>| {
            let dropped = (elements * (1.0 - input.number("density")?.clamp(0.0, 1.0))).trunc();
            Ok((elements - dropped).max(1.0))
        };
        let ranks: Vec<f64> = inputs.others().iter().map(rank).collect::<Result<_>>()?;
        if vectors.is_empty() || inputs.elements() == 0 {
            return Ok(base);
        }
        let sum = Value::weighted_sum(vectors.iter().map(|vector| (1.0, vector.clone())));
        let count = vectors.len() as f64;
        let score = |vector: &Value| &size(vector, count) * &tanh(&(vector * &sum));
        let scores: Vec<Value> =
            vectors.iter().zip(ranks).map(|(vector, rank)| spread(&score(vector), rank)).collect();
        let one = |value: Value| (1.0, value);
        let weighted = vectors.iter().zip(&scores).map(|(vector, score)| one(vector * score));
        let divisor = Value::weighted_sum(scores.iter().cloned().map(one));
        let divisor = divisor.binary(BinaryOp::Max, &Value::scalar(SMALLEST_DIVISOR));
        let average = &Value::weighted_sum(weighted) / &divisor;
        Ok(&base + &average.scaled(inputs.number("lambda")?))
    }
}

/// exp(N · n²), with n the magnitude as a share of the largest.
fn size(vector: &Value, count: f64) -> Value {
    let magnitude = vector.abs();
    let per_largest: Vec<Scalar> = compute(&[magnitude.max(Scope::Tensor)], 1, |largest| {
        vec![if largest[0] > 0.0 { 1.0 / largest[0] } else { 0.0 }]
    });
    let share = &magnitude * &Value::scalar(per_largest[0].clone());
    (&Value::scalar(count) * &(&share * &share)).unary(UnaryOp::Exp)
}

/// The scores above that of `rank` as shares of the largest, counted from it; the others are 0.
fn spread(score: &Value, rank: f64) -> Value {
    let ends = [score.order_statistic(rank), score.max(Scope::Tensor)];
    let fit = compute(&ends, 2, |ends| {
        let width = ends[1] - ends[0];
        vec![ends[0], if width > 0.0 { 1.0 / width } else { 0.0 }]
    });
    let above = score - &Value::scalar(fit[0].clone());
    &above.binary(BinaryOp::Max, &Value::scalar(0.0)) * &Value::scalar(fit[1].clone())
}

/// 1 − 2 / (e²ˣ + 1), and near zero, where that has no digits, the series.
fn tanh(x: &Value) -> Value {
    let number = |value: f64| Value::scalar(value);
    let exponential = (x + x).unary(UnaryOp::Exp);
    let far = &number(1.0) - &(&number(2.0) / &(&exponential + &number(1.0)));
    let square = x * x;
    let series = &number(-1.0 / 3.0) + &(&number(2.0 / 15.0) * &square);
    let near = &(&(&series * &square) + &number(1.0)) * x;
    x.abs().binary(BinaryOp::Greater, &number(0.1)).select(&far, &near)
}

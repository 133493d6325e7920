//! Task arithmetic whose coefficients follow from how long the task vectors are, over the model.
//!
//! `MetaGPT` gives a model a share by its squared length: with that the mean loss over the tasks is
//! smallest, as far as a model is linear near the base. NAN gives it a share by the inverse of its
//! length: a model that has moved less far says more in each step.

use super::{Base, Class, Contract, Description, Inputs, Method, Parameter};
use crate::error::Result;
use crate::formula::{Scalar, Scope, Value, compute};
use crate::plan::OutputTensor;

/// Shares by squared length.
#[derive(Debug)]
pub(crate) struct MetaGpt;

/// Shares by inverse length.
#[derive(Debug)]
pub(crate) struct Nan;

const CONTRACT: Contract = Contract { base: Base::Required, inputs: (1, None), others: (0, None) };
const PARAMETERS: [Parameter; 1] = [Parameter::lambda("scales the sum")];
const COST: &str = "two reads of every input, the first over the whole model";

impl Method for MetaGpt {
    fn description(&self) -> Description {
        Description {
            name: "metagpt",
            title: "MetaGPT",
            formula: "base + lambda * sum of s_i * (x_i - base), with s_i = |x_i - base|^2 / sum \
                      of |x_j - base|^2 over all tensors",
            class: Class::Model,
            cost: COST,
            paper: "https://arxiv.org/abs/2406.11385",
            contract: CONTRACT,
            parameters: const { &PARAMETERS },
        }
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        by_length(tensor, |square| square)
    }
}

impl Method for Nan {
    fn description(&self) -> Description {
        Description {
            name: "nan",
            title: "NAN",
            formula: "base + lambda * sum of s_i * (x_i - base), with s_i = (1 / |x_i - base|) / \
                      sum of (1 / |x_j - base|) over all tensors",
            class: Class::Model,
            cost: COST,
            paper: "https://arxiv.org/abs/2505.16148",
            contract: CONTRACT,
            parameters: const { &PARAMETERS },
        }
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        by_length(tensor, |square| if square > 0.0 { 1.0 / square.sqrt() } else { 0.0 })
    }
}

/// Task vectors by shares of what `weight` makes of their squared lengths.
fn by_length(tensor: &OutputTensor, weight: fn(f64) -> f64) -> Result<Value> {
    let inputs = Inputs::of(tensor);
    let base = inputs.base()?;
    let vectors: Vec<Value> = inputs.others().iter().map(|input| &input.value - &base).collect();
    let squares: Vec<Scalar> =
        vectors.iter().map(|vector| vector.dot(vector, Scope::Model)).collect();
    let shares = compute(&squares, squares.len(), move |squares| {
        let weights: Vec<f64> = squares.iter().map(|square| weight(*square)).collect();
        let sum: f64 = weights.iter().sum();
        let share = |weight: f64| if sum == 0.0 { 0.0 } else { weight / sum };
        weights.into_iter().map(share).collect()
    });
    let sum = Value::weighted_sum(shares.into_iter().zip(vectors));
    Ok(&base + &sum.scaled(inputs.number("lambda")?))
}

//! Generalised task arithmetic: base + λ · Σ wᵢ · sparse(xᵢ − base), and what the eight methods of
//! that family share.
//!
//! A task vector is the difference of a model to the base. A method of the family may thin the task
//! vectors out, rescale them, let the models vote on the sign of every element, and divide by the
//! weights. Differs from mergekit in precision only: differences, weights and sums are f32 (f64
//! with f64 inputs), rounded once at the end, where mergekit rounds to the input type at each step.

use super::linear::divisor;
use super::{
    Base, Class, Contract, Description, Input, Inputs, Kind, Method, Parameter, Per, Preset,
};
use crate::error::Result;
use crate::formula::{Scalar, Scope, Value, compute};
use crate::plan::OutputTensor;

/// Task arithmetic.
#[derive(Debug)]
pub(crate) struct TaskArithmetic;

impl Method for TaskArithmetic {
    fn description(&self) -> Description {
        Description {
            name: "task_arithmetic",
            title: "Task Arithmetic",
            formula: "base + lambda * sum of w_i * (x_i - base)",
            class: Class::Elementwise,
            cost: "one read of every input",
            paper: "https://arxiv.org/abs/2212.04089",
            contract: CONTRACT,
            parameters: const {
                // Nothing is thinned out: the parameters that are about that do not act.
                let [weight, density, normalize, rescale, lambda, int8_mask] = family(false, false);
                &[weight, density.idle(), normalize, rescale.idle(), lambda, int8_mask]
            },
        }
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        merge_task_vectors(tensor, Votes::None, |vector, _| Ok(vector.clone()))
    }
}

/// The inputs that every method of the family takes.
pub(super) const CONTRACT: Contract =
    Contract { base: Base::Required, inputs: (1, None), others: (0, None) };

/// The parameters of the family, with a method's own defaults.
pub(super) const fn family(normalize: bool, rescale: bool) -> [Parameter; 6] {
    [
        Parameter::weight(Per::Other, Preset::Nothing, "how much of this model's task vector"),
        Parameter::new(
            Per::Other,
            "density",
            Kind::Float,
            Preset::Float(1.0),
            "the share of the task vector that is kept",
        )
        .from_to(0.0, 1.0),
        Parameter::new(
            Per::Shared,
            "normalize",
            Kind::Bool,
            Preset::Bool(normalize),
            "divide by the sum of the weights (with votes: of those that won)",
        ),
        Parameter::new(
            Per::Shared,
            "rescale",
            Kind::Bool,
            Preset::Bool(rescale),
            "scale a thinned task vector to the L1 norm it had",
        ),
        Parameter::lambda("scales the sum"),
        Parameter::new(
            Per::Shared,
            "int8_mask",
            Kind::Bool,
            Preset::Bool(false),
            "how mergekit keeps the signs of a vote",
        )
        .idle(),
    ]
}

/// Whether models vote on the sign of each element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Votes {
    /// No: all count.
    None,
    /// The sign of the weighted sum wins, zero counts as positive, the others are left out.
    Sum,
}

/// A task vector and which of its elements are kept.
pub(super) struct Thinning<'a> {
    /// Elements of the tensor.
    pub(super) elements: u64,
    /// The share to keep.
    pub(super) density: f64,
    /// Position among the models that are not the base.
    pub(super) position: u32,
    input: &'a Input<'a>,
    inputs: &'a Inputs<'a>,
}

/// base + λ · (votes over the weighted, thinned task vectors).
pub(super) fn merge_task_vectors(
    tensor: &OutputTensor,
    votes: Votes,
    thin: impl Fn(&Value, &Thinning<'_>) -> Result<Value>,
) -> Result<Value> {
    let inputs = Inputs::of(tensor);
    let base = inputs.base()?;
    let (mut weights, mut vectors) = (Vec::new(), Vec::new());
    for input in inputs.others() {
        let density = input.number("density")?;
        let (elements, position) = (inputs.elements(), input.position);
        let thinning = Thinning { elements, density, position, input: &input, inputs: &inputs };
        vectors.push(thin(&(&input.value - &base), &thinning)?);
        weights.push(input.number("weight")?);
    }
    if weights.iter().all(|&weight| weight == 0.0) {
        return Ok(base);
    }
    let normalize = inputs.flag("normalize")?;
    let sum = match votes {
        Votes::None => plain_sum(&weights, vectors, normalize),
        Votes::Sum => Value::elect(weights.into_iter().zip(vectors), normalize),
    };
    Ok(&base + &sum.scaled(inputs.number("lambda")?))
}

/// As in mergekit, nothing is divided by weights that sum to zero.
fn plain_sum(weights: &[f64], vectors: Vec<Value>, normalize: bool) -> Value {
    let divisor = if normalize { divisor(weights).unwrap_or(1.0) } else { 1.0 };
    Value::weighted_sum(weights.iter().map(|weight| weight / divisor).zip(vectors))
}

impl Thinning<'_> {
    /// A further number of this input.
    pub(super) fn number(&self, name: &str) -> Result<f64> {
        self.input.number(name)
    }

    /// The model whose task vector it is.
    pub(super) fn model(&self) -> &str {
        self.input.model()
    }

    /// The tensor's shape.
    pub(super) fn shape(&self) -> &[u64] {
        self.inputs.shape()
    }

    /// Whether all elements are kept.
    pub(super) fn keeps_all(&self) -> bool {
        self.density >= 1.0
    }

    /// `vector` where `mask` is 1, scaled back to its L1 norm if the recipe asks for it.
    pub(super) fn apply(&self, vector: &Value, mask: &Value) -> Result<Value> {
        let thinned = vector.masked(mask);
        if !self.inputs.flag("rescale")? {
            return Ok(thinned);
        }
        let sums = [vector.absolute_sum(Scope::Tensor), thinned.absolute_sum(Scope::Tensor)];
        let ratio: Vec<Scalar> = compute(&sums, 1, |sums| vec![rescale(sums[0], sums[1])]);
        Ok(thinned.scaled(ratio[0].clone()))
    }
}

/// The factor that restores the L1 norm `before`; 1 where either norm is next to nothing.
fn rescale(before: f64, after: f64) -> f64 {
    const NEXT_TO_NOTHING: f64 = 1e-7;
    if before < NEXT_TO_NOTHING || after < NEXT_TO_NOTHING { 1.0 } else { before / after }
}

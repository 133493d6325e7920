//! Methods that take one model's change for each element: `MagMax`, and the unified vector of EMR.

use super::{Base, Class, Contract, Description, Inputs, Method, Parameter, Per, Preset};
use crate::error::Result;
use crate::formula::{BinaryOp, Value};
use crate::plan::OutputTensor;

/// The change of the largest magnitude.
#[derive(Debug)]
pub(crate) struct Magmax;

/// The largest magnitude among the changes that have the sign of their sum.
#[derive(Debug)]
pub(crate) struct Emr;

const CONTRACT: Contract = Contract { base: Base::Required, inputs: (1, None), others: (0, None) };
const PARAMETERS: [Parameter; 2] = [
    Parameter::weight(
        Per::Other,
        Preset::Float(1.0),
        "scales this model's task vector before they are compared",
    ),
    Parameter::lambda("scales the result"),
];

impl Method for Magmax {
    fn description(&self) -> Description {
        Description {
            name: "magmax",
            title: "MagMax",
            formula: "base + lambda * the w_i * (x_i - base) of largest magnitude; the first of \
                      equal ones",
            class: Class::Elementwise,
            cost: "one read of every input",
            paper: "https://arxiv.org/abs/2407.06322",
            contract: CONTRACT,
            parameters: const { &PARAMETERS },
        }
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        let inputs = Inputs::of(tensor);
        let (base, mut vectors) = (inputs.base()?, inputs.weighted_task_vectors()?.into_iter());
        let Some(first) = vectors.next() else { return Ok(base) };
        let largest = vectors.fold(first, |largest, vector| {
            let is_larger = vector.abs().binary(BinaryOp::Greater, &largest.abs());
            is_larger.select(&vector, &largest)
        });
        Ok(&base + &largest.scaled(inputs.number("lambda")?))
    }
}

impl Method for Emr {
    fn description(&self) -> Description {
        Description {
            name: "emr",
            title: "EMR-Merging (unified model)",
            formula: "base + lambda * g * the largest |w_i * (x_i - base)| of sign g, with g the \
                      sign of their sum",
            class: Class::Elementwise,
            cost: "one read of every input",
            paper: "https://arxiv.org/abs/2405.17461",
            contract: CONTRACT,
            parameters: const { &PARAMETERS },
        }
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        let inputs = Inputs::of(tensor);
        let (base, vectors) = (inputs.base()?, inputs.weighted_task_vectors()?);
        let sum = Value::weighted_sum(vectors.iter().map(|vector| (1.0, vector.clone())));
        let sign = sum.sign();
        // A magnitude times a sign that agrees is the magnitude; of the others it is negative.
        let aligned = vectors.iter().map(|vector| vector * &sign);
        let nothing = Value::scalar(0.0);
        let largest =
            aligned.fold(nothing, |largest, vector| largest.binary(BinaryOp::Max, &vector));
        Ok(&base + &(&sign * &largest).scaled(inputs.number("lambda")?))
    }
}

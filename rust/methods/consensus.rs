//! Consensus merging: task arithmetic on the elements that several tasks use.
//!
//! A TALL mask says which elements of the sum of all task vectors a task uses: those where its own
//! part is large beside what the others add. Elements that fewer than `k` tasks use are left as in
//! the base: they are selfish, or of no use to anyone.

use super::{Base, Class, Contract, Description, Inputs, Kind, Method, Parameter, Per, Preset};
use crate::error::Result;
use crate::formula::Value;
use crate::plan::OutputTensor;

/// Task arithmetic with consensus masks.
#[derive(Debug)]
pub(crate) struct ConsensusTaskArithmetic;

impl Method for ConsensusTaskArithmetic {
    fn description(&self) -> Description {
        Description {
            name: "consensus_ta",
            title: "Consensus Task Arithmetic",
            formula: "base + lambda * s where at least k models have |v_i| >= tall * |s - v_i|, \
                      with v_i = w_i * (x_i - base) and s = sum of v_i",
            class: Class::Elementwise,
            cost: "one read of every input",
            paper: "https://arxiv.org/abs/2405.07813",
            contract: Contract { base: Base::Required, inputs: (1, None), others: (0, None) },
            parameters: const {
                &[
                    Parameter::weight(
                        Per::Other,
                        Preset::Float(1.0),
                        "how much of this model's task vector",
                    ),
                    Parameter::new(
                        Per::Other,
                        "tall",
                        Kind::Float,
                        Preset::Float(0.4),
                        "how large its part must be beside that of the others; 0.2 to 0.6 is usual",
                    )
                    .at_least(0.0),
                    Parameter::new(
                        Per::Shared,
                        "k",
                        Kind::Int,
                        Preset::Int(2),
                        "how many models must use an element",
                    )
                    .at_least(0.0),
                    Parameter::lambda("scales the sum"),
                ]
            },
        }
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        let inputs = Inputs::of(tensor);
        let base = inputs.base()?;
        let parts = inputs.weighted_task_vectors()?;
        let bounds: Vec<f64> =
            inputs.others().iter().map(|input| input.number("tall")).collect::<Result<_>>()?;
        if parts.is_empty() {
            return Ok(base);
        }
        let sum = Value::weighted_sum(parts.iter().map(|part| (1.0, part.clone())));
        let used = parts.iter().zip(bounds).map(|(part, bound)| {
            let others = (&sum - part).abs();
            (1.0, part.abs().at_least(&(&Value::scalar(bound) * &others)))
        });
        let count = Value::weighted_sum(used);
        let agreed = count.at_least(&Value::scalar(inputs.number("k")?));
        Ok(&base + &sum.masked(&agreed).scaled(inputs.number("lambda")?))
    }
}

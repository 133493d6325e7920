//! CABS: task vectors that do not overlap, and are equally sparse everywhere.
//!
//! One model after the other takes, of every `m` elements in a row, the `n` where its task vector is
//! largest among those that no model before it took. So no two models change the same element (the
//! conflicts), and none crowds into a few places (the balance). The first in the recipe chooses first.
//! A difference of zero takes nothing.

use super::{Base, Class, Contract, Description, Inputs, Kind, Method, Parameter, Per, Preset};
use crate::error::{Error, Result};
use crate::formula::{Among, Pick, Value};
use crate::kernels::BLOCK;
use crate::plan::OutputTensor;

/// Conflict-aware and balanced sparsification.
#[derive(Debug)]
pub(crate) struct Cabs;

impl Method for Cabs {
    fn description(&self) -> Description {
        Description {
            name: "cabs",
            title: "CABS",
            formula: "base + lambda * sum of w_i * (x_i - base) where that is among the n largest of \
                      each m in a row, of those that no model before took",
            class: Class::Selection,
            cost: "one read of every input",
            paper: "https://arxiv.org/abs/2503.01874",
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
                        "n",
                        Kind::Int,
                        Preset::Int(64),
                        "how many of each m elements in a row this model takes",
                    )
                    .at_least(0.0),
                    Parameter::new(
                        Per::Shared,
                        "m",
                        Kind::Int,
                        Preset::Int(256),
                        "elements of a row that the models share out among them",
                    )
                    .from_to(1.0, BLOCK as f64),
                    Parameter::lambda("scales the sum"),
                ]
            },
        }
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        let inputs = Inputs::of(tensor);
        let base = inputs.base()?;
        let m = inputs.number("m")?;
        let zero = Value::scalar(0.0);
        let (mut terms, mut taken) = (Vec::new(), zero.clone());
        for input in inputs.others() {
            let n = input.number("n")?;
            if n > m {
                return Err(Error::plan("a model cannot take more elements than there are")
                    .expected(format!("n of at most m, which is {m}"))
                    .found(format!("{n} for `{}`", input.model()))
                    .advice("choose a smaller `n`, or a larger `m`"));
            }
            let free = taken.select(&zero, &(&input.value - &base));
            let largest =
                free.abs().picked_by_rank(Among::Group(m as u64), Pick::Largest(n as u64));
            let part = free.masked(&largest);
            // No two parts overlap, so the sum is zero only where nothing was taken.
            taken = &taken + &part;
            terms.push((input.number("weight")?, part));
        }
        if terms.iter().all(|(weight, _)| *weight == 0.0) {
            return Ok(base);
        }
        let sum = Value::weighted_sum(terms);
        Ok(&base + &sum.scaled(inputs.number("lambda")?))
    }
}

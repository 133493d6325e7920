//! DARE: drop elements of each task vector at random, rescale what is left.
//!
//! Rescaling is by the observed ratio of L1 norms, as mergekit does, not by 1 / density. Masks
//! come from a counter-based generator: they depend on the seed, the tensor's name and the model's
//! position, not on threads or order. So they are not mergekit's masks, only of the same kind.

use super::task_arithmetic::{CONTRACT, Thinning, Votes, family, merge_task_vectors};
use super::{Class, Description, Method};
use crate::error::Result;
use crate::formula::Value;
use crate::plan::OutputTensor;

/// Drop and rescale, then add.
#[derive(Debug)]
pub(crate) struct DareLinear;

/// Drop and rescale, then elect signs as TIES does.
#[derive(Debug)]
pub(crate) struct DareTies;

const DIFFERS: &str = "random masks are drawn for each element by seed, tensor name and model, so they are \
    not those of mergekit for the same seed";
const PAPER: &str = "https://arxiv.org/abs/2311.03099";
const COST: &str = "two reads of every input; one with rescale: false";

impl Method for DareLinear {
    fn description(&self) -> Description {
        Description {
            name: "dare_linear",
            title: "Linear DARE",
            formula: "base + lambda * sum of w_i * r_i * (x_i - base) at random positions",
            class: Class::Selection,
            cost: COST,
            paper: PAPER,
            contract: CONTRACT,
            parameters: const { &family(false, true) },
        }
    }

    fn differs(&self) -> &'static str {
        DIFFERS
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        merge_task_vectors(tensor, Votes::None, drop_at_random)
    }
}

impl Method for DareTies {
    fn description(&self) -> Description {
        Description {
            name: "dare_ties",
            title: "DARE TIES",
            formula: "base + lambda * sum of the w_i * r_i * (x_i - base) at random positions \
                      that have the elected sign",
            class: Class::Selection,
            cost: COST,
            paper: PAPER,
            contract: CONTRACT,
            parameters: const { &family(false, true) },
        }
    }

    fn differs(&self) -> &'static str {
        DIFFERS
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        merge_task_vectors(tensor, Votes::Sum, drop_at_random)
    }
}

fn drop_at_random(vector: &Value, thinning: &Thinning<'_>) -> Result<Value> {
    if thinning.keeps_all() {
        return Ok(vector.clone());
    }
    if thinning.density <= 0.0 {
        return Ok(Value::scalar(0.0));
    }
    thinning.apply(vector, &Value::random_mask(thinning.density, thinning.position))
}

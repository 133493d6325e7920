//! TIES: keep the largest elements of each task vector, elect a sign, average those that agree.

use super::task_arithmetic::{CONTRACT, Thinning, Votes, family, merge_task_vectors};
use super::{Class, Description, Method};
use crate::error::Result;
use crate::formula::Value;
use crate::plan::OutputTensor;

/// Trim, elect sign, merge.
#[derive(Debug)]
pub(crate) struct Ties;

impl Method for Ties {
    fn description(&self) -> Description {
        Description {
            name: "ties",
            title: "TIES",
            formula: "base + lambda * mean of the w_i * (x_i - base) that are among the largest \
                      and have the elected sign",
            class: Class::Selection,
            cost: "one to four reads of every input",
            paper: "https://arxiv.org/abs/2306.01708",
            contract: CONTRACT,
            parameters: const { &family(true, false) },
        }
    }

    fn differs(&self) -> &'static str {
        "of equal magnitudes at the threshold those of lowest index are kept; mergekit keeps \
         any of them; the paper cuts over the whole model instead of each tensor"
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        merge_task_vectors(tensor, Votes::Sum, keep_largest)
    }
}

/// The `density` share of largest magnitude; at least one element, unless density is 0.
fn keep_largest(vector: &Value, thinning: &Thinning<'_>) -> Result<Value> {
    if thinning.keeps_all() {
        return Ok(vector.clone());
    }
    if thinning.density <= 0.0 || thinning.elements == 0 {
        return Ok(Value::scalar(0.0));
    }
    let count = (thinning.density * thinning.elements as f64).trunc().max(1.0);
    thinning.apply(vector, &vector.abs().largest(count))
}

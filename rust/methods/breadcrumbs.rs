//! Model Breadcrumbs: drop the smallest elements of each task vector, and the very largest.

use super::task_arithmetic::{CONTRACT, Thinning, Votes, family, merge_task_vectors};
use super::{Class, Description, Kind, Method, Parameter, Per, Preset};
use crate::error::Result;
use crate::formula::Value;
use crate::plan::OutputTensor;

/// Drop both ends, then add.
#[derive(Debug)]
pub(crate) struct Breadcrumbs;

/// Drop both ends, then elect signs as TIES does.
#[derive(Debug)]
pub(crate) struct BreadcrumbsTies;

const DIFFERS: &str = "of equal magnitudes at the threshold those of lowest index are kept; mergekit keeps \
    any of them";
const PAPER: &str = "https://arxiv.org/abs/2312.06795";
const COST: &str = "one to four reads of every input";
const PARAMETERS: [Parameter; 7] = {
    let [weight, density, normalize, rescale, lambda, mask] = family(false, false);
    let gamma = Parameter::new(
        Per::Other,
        "gamma",
        Kind::Float,
        Preset::Float(0.01),
        "the share of the task vector's largest elements that is dropped",
    )
    .from_to(0.0, 1.0);
    [weight, density, gamma, normalize, rescale, lambda, mask]
};

impl Method for Breadcrumbs {
    fn description(&self) -> Description {
        Description {
            name: "breadcrumbs",
            title: "Model Breadcrumbs",
            formula: "base + lambda * sum of the w_i * (x_i - base) that are neither among the \
                      largest nor among the smallest",
            class: Class::Selection,
            cost: COST,
            paper: PAPER,
            contract: CONTRACT,
            parameters: const { &PARAMETERS },
        }
    }

    fn differs(&self) -> &'static str {
        DIFFERS
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        merge_task_vectors(tensor, Votes::None, drop_both_ends)
    }
}

impl Method for BreadcrumbsTies {
    fn description(&self) -> Description {
        Description {
            name: "breadcrumbs_ties",
            title: "Model Breadcrumbs with TIES",
            formula: "base + lambda * sum of the w_i * (x_i - base) that are neither among the \
                      largest nor among the smallest, and have the elected sign",
            class: Class::Selection,
            cost: COST,
            paper: PAPER,
            contract: CONTRACT,
            parameters: const { &PARAMETERS },
        }
    }

    fn differs(&self) -> &'static str {
        DIFFERS
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        merge_task_vectors(tensor, Votes::Sum, drop_both_ends)
    }
}

/// The `density` share of an end that begins `gamma` below the largest.
///
/// Where both shares together are more than all, fewer of the largest are dropped.
fn drop_both_ends(vector: &Value, thinning: &Thinning<'_>) -> Result<Value> {
    if thinning.keeps_all() {
        return Ok(vector.clone());
    }
    let elements = thinning.elements as f64;
    let kept = (thinning.density * elements).trunc();
    if kept <= 0.0 {
        return Ok(Value::scalar(0.0));
    }
    let dropped = (thinning.number("gamma")? * elements).trunc().clamp(0.0, elements - kept);
    let magnitude = vector.abs();
    let upper = magnitude.largest(dropped + kept);
    if dropped == 0.0 {
        return thinning.apply(vector, &upper);
    }
    let largest = magnitude.largest(dropped);
    thinning.apply(vector, &largest.select(&Value::scalar(0.0), &upper))
}

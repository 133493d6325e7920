//! DELLA: drop elements of each task vector at random, small ones more often than large ones.
//!
//! Within a row the chance to be kept rises evenly with the rank of the magnitude, from `density` −
//! `epsilon` to `density` + `epsilon`. Rows are those of mergekit: a vector is one row, and with three
//! dimensions or more they run along the second. Its rescaling, too, is by the observed ratio of L1
//! norms, where the paper divides by each element's probability. Masks come from the generator that
//! DARE draws from. Ties rank by index, the first being the largest; an element that is alone in its
//! row, at which mergekit fails, is kept with probability `density`. A probability of exactly 0 or 1,
//! which mergekit refuses, is one like others.

use super::task_arithmetic::{CONTRACT, Thinning, Votes, family, merge_task_vectors};
use super::{Class, Description, Kind, Method, Parameter, Per, Preset};
use crate::error::{Error, Result};
use crate::formula::{Among, Pick, Value};
use crate::plan::OutputTensor;

/// Drop by rank, then elect signs as TIES does.
#[derive(Debug)]
pub(crate) struct Della;

/// Drop by rank, then add.
#[derive(Debug)]
pub(crate) struct DellaLinear;

const DIFFERS: &str = "random masks are drawn for each element by seed, tensor name and model, so they are \
    not those of mergekit for the same seed; an element that is alone in its row is kept \
    with probability density, where mergekit fails; probabilities of exactly 0 or 1 are \
    taken; the paper divides by each element's probability instead of rescaling by the \
    L1 norm";
const PAPER: &str = "https://arxiv.org/abs/2406.11617";
const COST: &str =
    "two reads of every input; one with rescale: false; one more where rows are long";

const fn parameters(normalize: bool) -> [Parameter; 7] {
    let [weight, density, normalize, rescale, lambda, mask] = family(normalize, true);
    let epsilon = Parameter::new(
        Per::Other,
        "epsilon",
        Kind::Float,
        Preset::Float(0.15),
        "how far the chance to be kept goes below and above density; both must be within 0 and 1",
    )
    .from_to(0.0, 0.5);
    [weight, density, epsilon, normalize, rescale, lambda, mask]
}

impl Method for Della {
    fn description(&self) -> Description {
        Description {
            name: "della",
            title: "DELLA",
            formula: "base + lambda * mean of the w_i * r_i * (x_i - base) at random positions, \
                      likelier where they are large in their row, that have the elected sign",
            class: Class::Selection,
            cost: COST,
            paper: PAPER,
            contract: CONTRACT,
            parameters: const { &parameters(true) },
        }
    }

    fn differs(&self) -> &'static str {
        DIFFERS
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        merge_task_vectors(tensor, Votes::Sum, drop_by_rank)
    }
}

impl Method for DellaLinear {
    fn description(&self) -> Description {
        Description {
            name: "della_linear",
            title: "Linear DELLA",
            formula: "base + lambda * sum of w_i * r_i * (x_i - base) at random positions, \
                      likelier where they are large in their row",
            class: Class::Selection,
            cost: COST,
            paper: PAPER,
            contract: CONTRACT,
            parameters: const { &parameters(false) },
        }
    }

    fn differs(&self) -> &'static str {
        DIFFERS
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        merge_task_vectors(tensor, Votes::None, drop_by_rank)
    }
}

fn drop_by_rank(vector: &Value, thinning: &Thinning<'_>) -> Result<Value> {
    let density = thinning.density;
    if thinning.keeps_all() {
        return Ok(vector.clone());
    }
    if density <= 0.0 {
        return Ok(Value::scalar(0.0));
    }
    let epsilon = thinning.number("epsilon")?;
    let (lowest, highest) = (density - epsilon, density + epsilon);
    if lowest < 0.0 || highest > 1.0 {
        return Err(Error::plan(
            "elements are kept with a probability from density - epsilon to density + epsilon",
        )
        .expected("both from 0 to 1")
        .found(format!("density {density} and epsilon {epsilon} for `{}`", thinning.model()))
        .advice("choose a smaller `epsilon`, or a density of 1, which keeps all"));
    }
    let pick = Pick::Random { lowest, highest, stream: thinning.position };
    let mask = vector.abs().picked_by_rank(rows(thinning.shape()), pick);
    thinning.apply(vector, &mask)
}

/// Vectors along the second dimension, if there is one.
fn rows(shape: &[u64]) -> Among {
    match shape {
        [_, length, rest @ ..] if !rest.is_empty() => {
            // An empty tensor may have any other dimensions.
            let stride = rest.iter().fold(1, |stride: u64, extent| stride.saturating_mul(*extent));
            Among::Vector { length: *length, stride }
        }
        _ => Among::Row,
    }
}

//! Model Stock: the average of the models, moved towards the base by as much as they disagree.
//!
//! Differs from mergekit in precision only. As there, the ratio t is not clamped: task vectors at an
//! obtuse angle to each other give a negative one. And as there, a product of lengths below 1e-6
//! counts as 1e-6, so that small tensors with small differences stay nearer to the base.

use super::gram::Gram;
use super::{Base, Class, Contract, Description, Inputs, Kind, Method, Parameter, Per, Preset};
use crate::error::{Error, Result};
use crate::formula::{Scalar, Scope, Value, compute};
use crate::plan::OutputTensor;

/// A product of two lengths is at least this.
const SMALLEST_PRODUCT: f64 = 1e-6;
/// A divisor nearer to zero than this leaves the base.
const SMALLEST_DIVISOR: f64 = 1e-6;

/// Average of fine-tuned models, by the angle between them.
#[derive(Debug)]
pub(crate) struct ModelStock;

impl Method for ModelStock {
    fn description(&self) -> Description {
        Description {
            name: "model_stock",
            title: "Model Stock",
            formula: "base + t * mean of (x_i - base), with t = N c / (1 + (N - 1) c) and c the \
                      mean cosine between the N differences",
            class: Class::Gram,
            cost: "two reads of every input",
            paper: "https://arxiv.org/abs/2403.19522",
            contract: Contract { base: Base::Required, inputs: (3, None), others: (2, None) },
            parameters: const {
                &[Parameter::new(
                    Per::Shared,
                    "filter_wise",
                    Kind::Bool,
                    Preset::Bool(false),
                    "a ratio for each row instead of one for the tensor",
                )]
            },
        }
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        let inputs = Inputs::of(tensor);
        let base = inputs.base()?;
        let vectors: Vec<Value> =
            inputs.others().iter().map(|input| &input.value - &base).collect();
        let count = vectors.len();
        if count < 2 {
            return Err(Error::plan("model_stock takes at least two models besides the base")
                .advice("list two models besides the base"));
        }
        let scope = if inputs.flag("filter_wise")? { Scope::Row } else { Scope::Tensor };
        let products = Gram::products_over(&vectors, scope);
        let share: Vec<Scalar> =
            compute(&products, 1, move |products| vec![share(&Gram::new(products, count), count)]);
        let sum = Value::weighted_sum(vectors.into_iter().map(|vector| (share[0].clone(), vector)));
        Ok(&base + &sum)
    }
}

/// The coefficient of each task vector: t / N.
fn share(gram: &Gram, count: usize) -> f64 {
    let lengths = gram.lengths();
    let mut cosines = 0.0;
    for first in 0..count {
        for second in first + 1..count {
            let product = (lengths[first] * lengths[second]).max(SMALLEST_PRODUCT);
            cosines += (gram.at(first, second) / product).clamp(-1.0, 1.0);
        }
    }
    let cosine = cosines / (count * (count - 1) / 2) as f64;
    let divisor = 1.0 + (count - 1) as f64 * cosine;
    if divisor.abs() < SMALLEST_DIVISOR { 0.0 } else { cosine / divisor }
}

#[cfg(test)]
mod tests {
    use super::{Gram, share};

    #[test]
    fn agreement_averages_and_disagreement_leaves_the_base() {
        assert_eq!(share(&Gram::new(&[4.0, 4.0, 4.0], 2), 2), 0.5);
        assert_eq!(share(&Gram::new(&[4.0, 0.0, 4.0], 2), 2), 0.0);
        assert_eq!(share(&Gram::new(&[4.0, -4.0, 4.0], 2), 2), 0.0);
        // c = 1/2 of three models: t = 3/2 / (1 + 1) = 3/4.
        let third = share(&Gram::new(&[4.0, 2.0, 2.0, 4.0, 2.0, 4.0], 3), 3);
        assert!((third - 0.25).abs() < 1e-15, "{third}");
    }
}

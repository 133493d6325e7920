//! SCE: select the elements that the models disagree on most, calculate a weight for each model,
//! erase what is against the majority.
//!
//! Differs from mergekit in precision, and where nothing is selected: that gives the base. As there,
//! weights are equal where the mean squares of all models sum to less than 1e-6, which holds for most
//! fine-tuned models.

use super::{Base, Class, Contract, Description, Inputs, Kind, Method, Parameter, Per, Preset};
use crate::error::Result;
use crate::formula::{BinaryOp, Scalar, Scope, Value, compute};
use crate::plan::OutputTensor;

/// A smaller sum of mean squares gives all models the same weight.
const SMALLEST_SUM: f64 = 1e-6;
/// What the weights of those who agree sum to, at least.
const SMALLEST_DIVISOR: f64 = 1e-6;

/// Select, calculate, erase.
#[derive(Debug)]
pub(crate) struct Sce;

impl Method for Sce {
    fn description(&self) -> Description {
        Description {
            name: "sce",
            title: "SCE",
            formula: "base + mean, by the mean square of each, of the (x_i - base) that have the \
                      elected sign and are where the variance between models is largest",
            class: Class::Selection,
            cost: "two to five reads of every input",
            paper: "https://arxiv.org/abs/2408.07990",
            contract: Contract { base: Base::Required, inputs: (1, None), others: (0, None) },
            parameters: const {
                &[
                    Parameter::new(
                        Per::Shared,
                        "select_topk",
                        Kind::Float,
                        Preset::Float(1.0),
                        "the share of the elements with any variance that is kept",
                    )
                    .from_to(0.0, 1.0),
                    Parameter::new(
                        Per::Shared,
                        "int8_mask",
                        Kind::Bool,
                        Preset::Bool(false),
                        "has no numeric effect",
                    )
                    .idle(),
                ]
            },
        }
    }

    fn differs(&self) -> &'static str {
        "of equal magnitudes at the threshold those of lowest index are kept; mergekit keeps \
         any of them"
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        let inputs = Inputs::of(tensor);
        let (base, share) = (inputs.base()?, inputs.number("select_topk")?);
        let mut vectors: Vec<Value> =
            inputs.others().iter().map(|input| &input.value - &base).collect();
        if vectors.is_empty() || share <= 0.0 || inputs.elements() == 0 {
            return Ok(base);
        }
        if share < 1.0 {
            let selected = most_varied(&vectors, share);
            vectors.iter_mut().for_each(|vector| *vector = vector.masked(&selected));
        }
        let weights = weights(&vectors, inputs.elements());
        let sum = Value::weighted_sum(vectors.iter().map(|vector| (1.0, vector.clone())));
        let agreeing = Value::agreeing(&sum, &vectors);
        let sum = Value::weighted_sum(
            weights
                .iter()
                .cloned()
                .zip(vectors.iter().zip(&agreeing).map(|(vector, agrees)| vector.masked(agrees))),
        );
        let divisor = Value::weighted_sum(weights.into_iter().zip(agreeing));
        let divisor = divisor.binary(BinaryOp::Max, &Value::scalar(SMALLEST_DIVISOR));
        Ok(&base + &(&sum / &divisor))
    }
}

/// 1 for a share of the elements whose variance between models is not zero: those where it is largest.
fn most_varied(vectors: &[Value], share: f64) -> Value {
    let part = 1.0 / vectors.len() as f64;
    let mean = Value::weighted_sum(vectors.iter().map(|vector| (part, vector.clone())));
    let square = |vector: &Value| {
        let distance = vector - &mean;
        &distance * &distance
    };
    let variance = Value::weighted_sum(vectors.iter().map(|vector| (part, square(vector))));
    let varied = variance.binary(BinaryOp::Greater, &Value::scalar(0.0)).sum(Scope::Tensor);
    let count: Vec<Scalar> = compute(&[varied], 1, move |varied| vec![(varied[0] * share).trunc()]);
    variance.largest(count[0].clone())
}

/// The weight of each model: its share of the mean squares.
fn weights(vectors: &[Value], elements: u64) -> Vec<Scalar> {
    let squares: Vec<Scalar> =
        vectors.iter().map(|vector| vector.dot(vector, Scope::Tensor)).collect();
    compute(&squares, squares.len(), move |squares| {
        let means: Vec<f64> = squares.iter().map(|square| square / elements as f64).collect();
        let sum: f64 = means.iter().sum();
        if sum.abs() < SMALLEST_SUM {
            return vec![1.0 / means.len() as f64; means.len()];
        }
        means.into_iter().map(|mean| mean / sum).collect()
    })
}

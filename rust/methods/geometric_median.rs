//! Geometric median: the point with the smallest sum of distances to all models.
//!
//! One model that is far from the others moves it less than it would move their average. It is a
//! weighted average of the models, so Weiszfeld's iteration runs on the weights alone.

use super::gram::Gram;
use super::linear::sum_of_weights;
use super::{Base, Class, Contract, Description, Inputs, Kind, Method, Parameter, Per, Preset};
use crate::error::Result;
use crate::formula::{Value, compute};
use crate::plan::OutputTensor;

/// A distance below this share of the largest counts as this share.
const NEAREST: f64 = 1e-9;

/// Geometric median.
#[derive(Debug)]
pub(crate) struct GeometricMedian;

impl Method for GeometricMedian {
    fn description(&self) -> Description {
        Description {
            name: "geometric_median",
            title: "Geometric median",
            formula: "the y with the smallest sum of w_i * |y - x_i|; distances are measured from \
                      the base if there is one, else from the first model",
            class: Class::Gram,
            cost: "two reads of every input",
            paper: "https://arxiv.org/abs/1912.13445",
            contract: Contract { base: Base::Optional, inputs: (1, None), others: (1, None) },
            parameters: const {
                &[
                    Parameter::new(
                        Per::Other,
                        "weight",
                        Kind::Float,
                        Preset::Float(1.0),
                        "how much this model's distance counts",
                    )
                    .at_least(0.0),
                    Parameter::new(
                        Per::Shared,
                        "max_iter",
                        Kind::Int,
                        Preset::Int(100),
                        "steps at the most",
                    )
                    .at_least(0.0),
                    Parameter::new(
                        Per::Shared,
                        "tol",
                        Kind::Float,
                        Preset::Float(1e-9),
                        "stop when no model's share changes by more",
                    )
                    .at_least(0.0),
                ]
            },
        }
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        let inputs = Inputs::of(tensor);
        let others = inputs.others();
        let weights =
            others.iter().map(|input| input.number("weight")).collect::<Result<Vec<_>>>()?;
        sum_of_weights(&weights)?;
        let (steps, tolerance) = (inputs.number("max_iter")? as u64, inputs.number("tol")?);
        let Some(first) = others.first() else { return inputs.base() };
        // Differences to something near keep the digits that the models' inner products lack.
        let origin = inputs.optional_base().unwrap_or_else(|| first.value.clone());
        let vectors: Vec<Value> = others.iter().map(|input| &input.value - &origin).collect();
        let count = vectors.len();
        let shares = compute(&Gram::products(&vectors), count, move |products| {
            median(&Gram::new(products, count), &weights, steps, tolerance)
        });
        Ok(&origin + &Value::weighted_sum(shares.into_iter().zip(vectors)))
    }
}

/// The share of each vector in the median.
fn median(gram: &Gram, weights: &[f64], steps: u64, tolerance: f64) -> Vec<f64> {
    let normalised = |weights: Vec<f64>| -> Vec<f64> {
        let sum: f64 = weights.iter().sum();
        weights.into_iter().map(|weight| weight / sum).collect()
    };
    let mut shares = normalised(weights.to_vec());
    for _ in 0..steps {
        let products = gram.times(&shares);
        let square: f64 =
            products.iter().zip(&shares).map(|(product, share)| product * share).sum();
        let distances: Vec<f64> = (0..weights.len())
            .map(|index| (square - 2.0 * products[index] + gram.at(index, index)).max(0.0).sqrt())
            .collect();
        let largest = distances.iter().copied().fold(0.0, f64::max);
        if largest == 0.0 {
            break;
        }
        let next = normalised(
            weights
                .iter()
                .zip(&distances)
                .map(|(weight, distance)| weight / distance.max(NEAREST * largest))
                .collect(),
        );
        let change = next.iter().zip(&shares).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        shares = next;
        if change <= tolerance {
            break;
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::{Gram, median};

    #[test]
    fn the_median_of_a_line_is_the_middle_point() {
        // 0, 1 and 10 on a line.
        let gram = Gram::new(&[0.0, 0.0, 0.0, 1.0, 10.0, 100.0], 3);
        let shares = median(&gram, &[1.0; 3], 1000, 0.0);
        let at = shares[1] + 10.0 * shares[2];
        assert!((at - 1.0).abs() < 1e-3, "{at}");
    }

    #[test]
    fn equal_vectors_share_alike() {
        assert_eq!(median(&Gram::new(&[4.0, 4.0, 4.0], 2), &[1.0, 1.0], 10, 0.0), [0.5, 0.5]);
    }
}

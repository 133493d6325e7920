//! Arcee fusion: takes over the elements of the other model that matter most.
//!
//! Importance is |x − base| times the row's KL divergence of softmax(x) from softmax(base). What
//! reaches median + 1.5 · (Q75 − Q25) of the tensor's importances is taken over.
//!
//! Differs from mergekit in two ways. The quartiles are exact, where mergekit draws a sample of
//! tensors with more than a million elements. And the result has the type of the inputs, where
//! mergekit writes f32.

use super::{Base, Class, Contract, Description, Inputs, Method};
use crate::error::Result;
use crate::formula::{Scalar, Scope, UnaryOp, Value, compute};
use crate::plan::OutputTensor;

/// Keeps a softmax away from zero.
const FLOOR: f64 = 1e-8;

/// Fusion by importance.
#[derive(Debug)]
pub(crate) struct ArceeFusion;

impl Method for ArceeFusion {
    fn description(&self) -> Description {
        Description {
            name: "arcee_fusion",
            title: "Arcee Fusion",
            formula: "base + (x - base) where |x - base| * KL(softmax(x), softmax(base)) of the \
                      row is at least median + 1.5 * (Q75 - Q25)",
            class: Class::Selection,
            cost: "three to five reads of both inputs",
            paper: "https://arcee.ai",
            contract: Contract { base: Base::Required, inputs: (2, Some(2)), others: (1, Some(1)) },
            parameters: &[],
        }
    }

    fn differs(&self) -> &'static str {
        "the quartiles are exact, where mergekit samples tensors of more than a million \
         elements; the result has the type of the inputs, where mergekit writes f32"
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        let inputs = Inputs::of(tensor);
        let base = inputs.base()?;
        let other = inputs.other()?;
        let difference = &other.value - &base;
        if inputs.elements() == 0 {
            return Ok(base);
        }
        let (p, q) = (softmax(&other.value), softmax(&base));
        let divergence = (&p * &(&p / &q).unary(UnaryOp::Ln)).sum(Scope::Row);
        let importance = &difference.abs() * &Value::scalar(divergence);
        let quantile = |share: f64| ascending(&importance, inputs.elements(), share);
        let quantiles = [quantile(0.25), quantile(0.5), quantile(0.75)];
        let threshold = compute(&quantiles, 1, |q| vec![q[1] + 1.5 * (q[2] - q[0])]);
        let is_important = importance.at_least(&Value::scalar(threshold[0].clone()));
        Ok(&base + &difference.masked(&is_important))
    }
}

/// The softmax of each row, and a little more.
fn softmax(x: &Value) -> Value {
    let shifted = x - &Value::scalar(x.max(Scope::Row));
    let exponential = shifted.unary(UnaryOp::Exp);
    let total = exponential.sum(Scope::Row);
    &(&exponential / &Value::scalar(total)) + &Value::scalar(FLOOR)
}

/// The element at index trunc(share · (n − 1)) of the ascending order.
fn ascending(values: &Value, elements: u64, share: f64) -> Scalar {
    let index = (share * (elements - 1) as f64).trunc();
    values.order_statistic(elements as f64 - index)
}

//! Arcee fusion, to prove the seams: row reductions, three order statistics, one combine.
//!
//! Takes over the elements of the other model whose importance, |b − a| times the row's KL
//! divergence of softmax(b) from softmax(a), reaches median + 1.5 · (Q75 − Q25).

use oxmerge::formula::{Scalar, Scope, UnaryOp, Value, compute};

/// The formula for a base `a` and another model `b` of `elements` elements.
pub(crate) fn formula(a: &Value, b: &Value, elements: u64) -> Value {
    let delta = b - a;
    let p = &softmax(b) + &Value::scalar(1e-8);
    let q = &softmax(a) + &Value::scalar(1e-8);
    let divergence = (&p * &(&p / &q).unary(UnaryOp::Ln)).sum(Scope::Row);
    let importance = &delta.abs() * &Value::scalar(divergence);
    let quantile = |share: f64| ascending(&importance, elements, share);
    let quantiles = [quantile(0.25), quantile(0.5), quantile(0.75)];
    let threshold = compute(&quantiles, 1, |q| vec![q[1] + 1.5 * (q[2] - q[0])]);
    let important = importance.at_least(&Value::scalar(threshold[0].clone()));
    a + &delta.masked(&important)
}

fn softmax(x: &Value) -> Value {
    let shifted = x - &Value::scalar(x.max(Scope::Row));
    let exponential = shifted.unary(UnaryOp::Exp);
    let total = exponential.sum(Scope::Row);
    &exponential / &Value::scalar(total)
}

/// The element at index trunc(share · (n − 1)) of the ascending order.
fn ascending(values: &Value, elements: u64, share: f64) -> Scalar {
    let index = (share * (elements - 1) as f64).trunc();
    values.order_statistic(elements as f64 - index)
}

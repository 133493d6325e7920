//! `MetaGPT` (arXiv 2406.11385), to prove the seams: a coefficient from a sweep over the whole model.
//!
//! base + Σ λᵢ·(xᵢ − base), with λᵢ = ‖xᵢ − base‖² / Σⱼ ‖xⱼ − base‖² and norms over all tensors.

use oxmerge::formula::{Scope, Value, compute};

/// The formula for a base and the other models.
pub(crate) fn formula(base: &Value, others: &[Value]) -> Value {
    let vectors: Vec<Value> = others.iter().map(|other| other - base).collect();
    let norms: Vec<_> = vectors.iter().map(|vector| vector.dot(vector, Scope::Model)).collect();
    let shares = compute(&norms, norms.len(), |norms| {
        let total: f64 = norms.iter().sum();
        norms.iter().map(|norm| norm / total).collect()
    });
    base + &Value::weighted_sum(shares.into_iter().zip(vectors))
}

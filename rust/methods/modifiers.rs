//! What a recipe may ask of any method, tensor by tensor: to leave a tensor to one model, and to scale
//! what the method adds to the base. They are parameters like a method's own, and have no place in any
//! of its formulas.
//!
//! A scale that grows with depth is `LiNeS` (<https://arxiv.org/abs/2410.17146>): the first layers, whose
//! features are general, stay near the base, and the last ones keep what was learned.

use serde_json::Value as Json;

use super::{Base, Inputs, Kind, Method, Parameter, Per, Preset};
use crate::error::{Error, Result};
use crate::formula::{BinaryOp, Value, ValueNode};
use crate::plan::OutputTensor;

const KEEP: &str = "keep";
const LAYER_SCALE: &str = "layer_scale";

/// The parameters that every method has besides its own.
pub static MODIFIERS: &[Parameter] = &[
    Parameter::new(
        Per::Shared,
        KEEP,
        Kind::Bool,
        Preset::Bool(false),
        "the tensor is that of one model",
    ),
    Parameter::new(
        Per::Shared,
        LAYER_SCALE,
        Kind::Float,
        Preset::Nothing,
        "a factor of what the method adds to the base",
    )
    .optional()
    .factor(),
];

/// Whether `tensor` is left to its only source.
pub(crate) fn is_kept(tensor: &OutputTensor) -> Result<bool> {
    let is_kept = tensor.parameters.get(KEEP).and_then(Json::as_bool).unwrap_or(false);
    if is_kept && tensor.sources.len() != 1 {
        return Err(Error::plan("a tensor that is kept has one source")
            .found(tensor.sources.len())
            .advice("make the plan anew from its recipe"));
    }
    Ok(is_kept)
}

/// What `method` makes `tensor` by, with what the method adds to the base scaled if that is asked for.
pub fn formula(method: &dyn Method, tensor: &OutputTensor) -> Result<Value> {
    let merged = method.formula(tensor)?;
    let Some(scale) = tensor.parameters.get(LAYER_SCALE).and_then(Json::as_f64) else {
        return Ok(merged);
    };
    let description = method.description();
    let base = match description.contract.base {
        Base::Ignored => None,
        Base::Required | Base::Optional => Inputs::of(tensor).optional_base(),
    };
    let base = base.ok_or_else(|| {
        let name = description.name;
        Error::plan(format!("`layer_scale` needs a base, and method `{name}` has none here"))
            .advice("make the plan anew from its recipe")
    })?;
    Ok(scaled(merged, &base, scale))
}

/// base + scale · (merged − base). A scale of 1 changes no bit, and one of 0 gives the base's.
///
/// Where the formula adds something to the base, that is what is scaled: it is not rounded before.
fn scaled(merged: Value, base: &Value, scale: f64) -> Value {
    if scale == 1.0 || merged.is_same_input(base) {
        return merged;
    }
    if scale == 0.0 {
        return base.clone();
    }
    let added = match &*merged.0 {
        ValueNode::Binary(BinaryOp::Add, to, added) if to.is_same_input(base) => added.clone(),
        _ => &merged - base,
    };
    base + &added.scaled(scale)
}

impl Value {
    fn is_same_input(&self, other: &Self) -> bool {
        match (&*self.0, &*other.0) {
            (ValueNode::Input(one), ValueNode::Input(other)) => one == other,
            _ => false,
        }
    }
}

//! What a recipe may ask of any method, tensor by tensor: to leave a tensor to one model, and to scale
//! what the method adds to the base. They are parameters like a method's own, and have no place in any
//! of its formulas.
//!
//! A scale that grows with depth is `LiNeS` (<https://arxiv.org/abs/2410.17146>): the first layers, whose
//! features are general, stay near the base, and the last ones keep what was learned.

use serde_json::Value as Json;

use super::{Inputs, Kind, Parameter, Per, Preset};
use crate::error::{Error, Result};
use crate::formula::{BinaryOp, Value, ValueNode};
use crate::plan::{OutputTensor, Parameters};

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

/// Whether tensors with these shared parameters are left to one model.
pub fn keeps(parameters: &Parameters) -> bool {
    parameters.get(KEEP).and_then(Json::as_bool).unwrap_or(false)
}

/// Whether `tensor` is left to its only source.
pub(crate) fn is_kept(tensor: &OutputTensor) -> Result<bool> {
    let is_kept = keeps(&tensor.parameters);
    if is_kept && tensor.sources.len() != 1 {
        return Err(Error::plan("a tensor that is kept has one source")
            .found(tensor.sources.len())
            .advice("make the plan anew from its recipe"));
    }
    Ok(is_kept)
}

/// What a formula makes of `tensor`, with what it adds to the base scaled if that is asked for.
pub fn scaled(tensor: &OutputTensor, merged: Value) -> Result<Value> {
    let Some(scale) = layer_scale(tensor) else { return Ok(merged) };
    let base = Inputs::of(tensor).optional_base().ok_or_else(|| {
        Error::plan("`layer_scale` scales what is added to a base, and there is none")
            .advice("name a `base_model`, or leave `layer_scale` out")
    })?;
    Ok(from_base(merged, &base, scale))
}

/// Of a method that is no formula: an error if a scale is asked for.
pub(crate) fn refuse_scale(tensor: &OutputTensor) -> Result<()> {
    if layer_scale(tensor).is_none() {
        return Ok(());
    }
    Err(Error::plan("`layer_scale` scales formulas, and this method is a function of arrays")
        .advice("scale in the function, or leave `layer_scale` out"))
}

fn layer_scale(tensor: &OutputTensor) -> Option<f64> {
    tensor.parameters.get(LAYER_SCALE).and_then(Json::as_f64)
}

/// base + scale · (merged − base). A scale of 1 changes no bit, and one of 0 gives the base's.
///
/// Where the formula adds something to the base, that is what is scaled: it is not rounded before.
fn from_base(merged: Value, base: &Value, scale: f64) -> Value {
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

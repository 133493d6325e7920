//! Merge methods: one short file each, a formula and a description.
//!
//! A method turns the resolved parameters of one output tensor into a [`Value`]; everything else
//! (passes, blocks, threads, files, devices) is the engine's. Semantics are those of mergekit
//! 0.1.5; where a method differs, its file says how and why.

mod dare;
mod inputs;
mod linear;
mod nuslerp;
mod passthrough;
pub mod pieces;
mod slerp;
mod task_arithmetic;
mod ties;

use std::fmt::Debug;

use serde::Serialize;

pub use inputs::{Input, Inputs};

use crate::error::Result;
use crate::formula::Value;
use crate::plan::OutputTensor;

/// What a merge method is and needs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Description {
    /// The name in recipes.
    pub name: &'static str,
    /// The name in model cards.
    pub title: &'static str,
    /// What an output element is, in one or two lines.
    pub formula: &'static str,
    /// The execution class: which passes it makes over a tensor.
    pub class: &'static str,
    /// How often the inputs are read, in words.
    pub cost: &'static str,
    /// Where it comes from.
    pub paper: &'static str,
    /// Which inputs it takes.
    pub contract: Contract,
    /// Its parameters.
    pub parameters: &'static [Parameter],
}

/// How many inputs a method takes, and whether one of them is a base.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Contract {
    /// `required`, `optional`, or `ignored` (the base is an input like any other).
    pub base: &'static str,
    /// Fewest and most inputs, the base among them.
    pub inputs: (u32, Option<u32>),
    /// Fewest and most inputs that are not the base.
    pub others: (u32, Option<u32>),
}

/// One parameter of a method.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Parameter {
    /// The name in recipes.
    pub name: &'static str,
    /// `float`, `int` or `bool`.
    pub kind: &'static str,
    /// What it is when the recipe does not say.
    pub default: Preset,
    /// Whether the recipe must say.
    pub required: bool,
    /// `shared` by all inputs of a tensor, one an `input`, or one for each `other` than the base.
    pub per: &'static str,
    /// What it does.
    pub help: &'static str,
}

/// What a parameter is when the recipe does not say.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(untagged)]
#[expect(missing_docs, reason = "each variant is named after the value it holds")]
pub enum Preset {
    Nothing,
    Bool(bool),
    Float(f64),
}

impl Parameter {
    /// A parameter; required if `default` is [`Preset::Nothing`].
    pub const fn new(
        per: &'static str,
        name: &'static str,
        kind: &'static str,
        default: Preset,
        help: &'static str,
    ) -> Self {
        let required = matches!(default, Preset::Nothing);
        Self { name, kind, default, required, per, help }
    }
}

/// A merge method.
pub trait Method: Debug + Sync {
    /// What it is and needs.
    fn description(&self) -> Description;

    /// What an element of the output is, from the elements of the sources.
    ///
    /// Parameters that make no sense together are an error of the plan.
    fn formula(&self, tensor: &OutputTensor) -> Result<Value>;
}

/// Every method, in the order in which they are listed.
pub static METHODS: &[&dyn Method] = &[
    &linear::Linear,
    &slerp::Slerp,
    &nuslerp::Nuslerp,
    &task_arithmetic::TaskArithmetic,
    &ties::Ties,
    &dare::DareLinear,
    &dare::DareTies,
    &passthrough::Passthrough,
];

/// The method of that name.
pub fn find(name: &str) -> Option<&'static dyn Method> {
    METHODS.iter().copied().find(|method| method.description().name == name)
}

//! Merge methods: one short file each, a formula and a description.
//!
//! A method turns the resolved parameters of one output tensor into a [`Value`]; everything else
//! (passes, blocks, threads, files, devices) is the engine's. Semantics are those of mergekit
//! 0.1.5; where a method differs, its file says how and why.

mod arcee_fusion;
mod breadcrumbs;
mod cabs;
mod consensus;
mod dare;
mod della;
mod expo;
mod geometric_median;
mod gram;
mod inputs;
mod karcher;
mod largest_change;
mod linear;
pub mod measures;
mod model_stock;
mod modifiers;
mod multislerp;
mod nearswap;
mod norms_of_models;
mod nuslerp;
mod passthrough;
mod pcb;
pub mod pieces;
mod ram;
mod sce;
mod slerp;
mod soup;
mod task_arithmetic;
mod ties;

use std::fmt::Debug;

use serde::Serialize;

pub use inputs::{Input, Inputs};
pub use linear::sum_of_weights;
pub use modifiers::{MODIFIERS, keeps, scaled};
pub(crate) use modifiers::{is_kept, refuse_scale};

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
    /// Which passes it makes over a tensor.
    pub class: Class,
    /// How often the inputs are read, in words.
    pub cost: &'static str,
    /// Where it comes from.
    pub paper: &'static str,
    /// Which inputs it takes.
    pub contract: Contract,
    /// Its parameters.
    pub parameters: &'static [Parameter],
}

/// The passes that a method makes before it combines, by what they leave.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// There are none.
    Elementwise,
    /// Inner products.
    Gram,
    /// What to keep of each input, and sums.
    Selection,
    /// Sums over all tensors, found by a sweep over the model before the merge.
    Model,
}

/// What a base is to a method.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Base {
    /// One of the inputs, which has to be there.
    Required,
    /// One of the inputs, which may be there.
    Optional,
    /// An input like any other.
    Ignored,
}

/// How many inputs a method takes, and whether one of them is a base.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Contract {
    /// What a base is to it.
    pub base: Base,
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
    /// What its values are.
    pub kind: Kind,
    /// What it is when the recipe does not say.
    pub default: Preset,
    /// Whether the recipe must say.
    pub required: bool,
    /// How many values it has.
    pub per: Per,
    /// What it may be: other values are refused.
    pub limits: Range,
    /// What it is where it is meant: other values are warned about in recipes.
    pub usual: Range,
    /// Whether it acts. mergekit takes some parameters that change no number.
    pub acts: bool,
    /// What it does.
    pub help: &'static str,
}

/// The least and the greatest value, both included; `None` for no bound.
pub type Range = (Option<f64>, Option<f64>);

/// A factor beyond this, either way, is probably a slip: 50 for 0.5, or a percentage.
pub const USUAL_FACTOR: f64 = 10.0;

/// What the values of a parameter are.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Finite numbers.
    Float,
    /// Whole numbers.
    Int,
    /// Switches.
    Bool,
}

/// How many values a parameter has for a tensor.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Per {
    /// One.
    Shared,
    /// One for each input.
    Input,
    /// One for each input but the base.
    Other,
}

/// What a parameter is when the recipe does not say.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(untagged)]
#[expect(missing_docs, reason = "each variant is named after the value it holds")]
pub enum Preset {
    Nothing,
    Bool(bool),
    Int(i64),
    Float(f64),
}

impl Parameter {
    /// A parameter of any value; required if `default` is [`Preset::Nothing`].
    pub const fn new(
        per: Per,
        name: &'static str,
        kind: Kind,
        default: Preset,
        help: &'static str,
    ) -> Self {
        let required = matches!(default, Preset::Nothing);
        let any = (None, None);
        Self { name, kind, default, required, per, limits: any, usual: any, acts: true, help }
    }

    /// What a model's part is multiplied by.
    pub const fn weight(per: Per, default: Preset, help: &'static str) -> Self {
        Self::new(per, "weight", Kind::Float, default, help).factor()
    }

    /// What the task vectors together are multiplied by.
    pub const fn lambda(help: &'static str) -> Self {
        Self::new(Per::Shared, "lambda", Kind::Float, Preset::Float(1.0), help).factor()
    }

    /// The same, which the recipe may leave out.
    #[must_use]
    pub const fn optional(self) -> Self {
        Self { required: false, ..self }
    }

    /// The same, with the least and the greatest value that it may have.
    #[must_use]
    pub const fn from_to(self, least: f64, greatest: f64) -> Self {
        Self { limits: (Some(least), Some(greatest)), ..self }
    }

    /// The same, with the least value that it may have.
    #[must_use]
    pub const fn at_least(self, least: f64) -> Self {
        Self { limits: (Some(least), None), ..self }
    }

    /// The same, with the values beyond which it is probably a slip.
    #[must_use]
    pub const fn usually(self, least: f64, greatest: f64) -> Self {
        Self { usual: (Some(least), Some(greatest)), ..self }
    }

    /// The same, usually no more than [`USUAL_FACTOR`], either way.
    #[must_use]
    pub const fn factor(self) -> Self {
        self.usually(-USUAL_FACTOR, USUAL_FACTOR)
    }

    /// The same, without effect on any number.
    #[must_use]
    pub const fn idle(self) -> Self {
        Self { acts: false, ..self }
    }
}

/// A merge method.
pub trait Method: Debug + Sync {
    /// What it is and needs.
    fn description(&self) -> Description;

    /// What other tools that have it do otherwise, but for rounding; nothing if that is all.
    fn differs(&self) -> &'static str {
        ""
    }

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
    &della::Della,
    &della::DellaLinear,
    &breadcrumbs::Breadcrumbs,
    &breadcrumbs::BreadcrumbsTies,
    &multislerp::Multislerp,
    &karcher::Karcher,
    &model_stock::ModelStock,
    &sce::Sce,
    &nearswap::Nearswap,
    &arcee_fusion::ArceeFusion,
    &ram::Ram,
    &ram::RamPlus,
    &passthrough::Passthrough,
    &soup::Soup,
    &soup::Ema,
    &geometric_median::GeometricMedian,
    &consensus::ConsensusTaskArithmetic,
    &largest_change::Magmax,
    &largest_change::Emr,
    &norms_of_models::MetaGpt,
    &norms_of_models::Nan,
    &expo::Expo,
    &pcb::Pcb,
    &cabs::Cabs,
];

/// The method of that name.
pub fn find(name: &str) -> Option<&'static dyn Method> {
    METHODS.iter().copied().find(|method| method.description().name == name)
}

//! `ExPO`: goes on in the direction of a fine-tuning, from a weaker model through a stronger one.

use super::{Base, Class, Contract, Description, Inputs, Kind, Method, Parameter, Per, Preset};
use crate::error::Result;
use crate::formula::Value;
use crate::plan::OutputTensor;

/// Extrapolation.
#[derive(Debug)]
pub(crate) struct Expo;

impl Method for Expo {
    fn description(&self) -> Description {
        Description {
            name: "expo",
            title: "ExPO",
            formula: "x + alpha * (x - base)",
            class: Class::Elementwise,
            cost: "one read of both inputs",
            paper: "https://arxiv.org/abs/2404.16792",
            contract: Contract { base: Base::Required, inputs: (2, Some(2)), others: (1, Some(1)) },
            parameters: const {
                &[Parameter::new(
                    Per::Shared,
                    "alpha",
                    Kind::Float,
                    Preset::Float(0.3),
                    "how far to go on; 0 is the model itself",
                )
                .factor()]
            },
        }
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        let inputs = Inputs::of(tensor);
        let base = inputs.base()?;
        let other = inputs.other()?;
        let x = other.value;
        Ok(&x + &(&x - &base).scaled(inputs.number("alpha")?))
    }
}

//! One model unchanged, or scaled: for stacking layers.

use super::{Base, Class, Contract, Description, Inputs, Kind, Method, Parameter, Per, Preset};
use crate::error::{Error, Result};
use crate::formula::Value;
use crate::plan::OutputTensor;

/// The input itself.
#[derive(Debug)]
pub(crate) struct Passthrough;

impl Method for Passthrough {
    fn description(&self) -> Description {
        Description {
            name: "passthrough",
            title: "Passthrough",
            formula: "x, or scale * x",
            class: Class::Elementwise,
            cost: "one read",
            paper: "https://arxiv.org/abs/2312.15166",
            contract: Contract { base: Base::Ignored, inputs: (1, Some(1)), others: (0, None) },
            parameters: const {
                &[Parameter::new(
                    Per::Input,
                    "scale",
                    Kind::Float,
                    Preset::Nothing,
                    "a factor; without it the tensor is copied",
                )
                .optional()
                .factor()]
            },
        }
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        let [input] = Inputs::of(tensor).all().try_into().map_err(|_| one_model())?;
        Ok(match input.optional_number("scale") {
            None => input.value,
            Some(scale) => input.value.scaled(scale),
        })
    }
}

#[cold]
fn one_model() -> Error {
    Error::plan("passthrough takes exactly one model")
        .advice("use `slices:` to take layers from several models")
}

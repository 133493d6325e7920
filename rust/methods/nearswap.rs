//! `NearSwap`: each element moves from the base towards the other model, by at most t.

use super::{Base, Class, Contract, Description, Inputs, Kind, Method, Parameter, Per, Preset};
use crate::error::Result;
use crate::formula::{BinaryOp, Value};
use crate::plan::OutputTensor;

/// Differences below this count as this.
const SMALLEST_DIFFERENCE: f64 = 1e-6;

/// Interpolation that is stronger where the models are near each other.
#[derive(Debug)]
pub(crate) struct Nearswap;

impl Method for Nearswap {
    fn description(&self) -> Description {
        Description {
            name: "nearswap",
            title: "NearSwap",
            formula: "w * x + (1 - w) * base, with w = t / |x - base|, from 0 to 1",
            class: Class::Elementwise,
            cost: "one read of both inputs",
            paper: "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
            contract: Contract { base: Base::Required, inputs: (2, Some(2)), others: (1, Some(1)) },
            parameters: const {
                &[Parameter::new(
                    Per::Shared,
                    "t",
                    Kind::Float,
                    Preset::Nothing,
                    "how far an element may move, in units of the weights",
                )
                .at_least(0.0)]
            },
        }
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        let inputs = Inputs::of(tensor);
        let (base, t) = (inputs.base()?, inputs.number("t")?);
        let other = inputs.other()?;
        let number = |value: f64| Value::scalar(value);
        let difference = (&base - &other.value).abs();
        let difference = difference.binary(BinaryOp::Max, &number(SMALLEST_DIFFERENCE));
        let weight = &number(t) / &difference;
        let weight = weight.binary(BinaryOp::Max, &number(0.0)).binary(BinaryOp::Min, &number(1.0));
        Ok(&(&weight * &other.value) + &(&(&number(1.0) - &weight) * &base))
    }
}

//! Spherical interpolation between the base and one other model, over the whole tensor.

use super::{Base, Class, Contract, Description, Inputs, Kind, Method, Parameter, Per, Preset};
use crate::error::Result;
use crate::formula::{Scope, Value, compute};
use crate::plan::OutputTensor;

/// Vectors closer to parallel (or opposite) than this are interpolated linearly.
const PARALLEL: f64 = 0.9995;
/// A shorter vector has no direction.
const SHORTEST: f64 = 1e-8;

/// Spherical interpolation.
#[derive(Debug)]
pub(crate) struct Slerp;

impl Method for Slerp {
    fn description(&self) -> Description {
        Description {
            name: "slerp",
            title: "SLERP",
            formula: "(sin((1-t)a) * base + sin(t a) * x) / sin a, with a the angle between them",
            class: Class::Gram,
            cost: "two reads of both inputs",
            paper: "https://en.wikipedia.org/wiki/Slerp",
            contract: Contract { base: Base::Required, inputs: (2, Some(2)), others: (1, Some(1)) },
            parameters: const {
                &[Parameter::new(
                    Per::Shared,
                    "t",
                    Kind::Float,
                    Preset::Nothing,
                    "0 is the base, 1 the other model; outside of that it extrapolates",
                )
                .usually(-0.5, 1.5)]
            },
        }
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        let inputs = Inputs::of(tensor);
        let t = inputs.number("t")?;
        let a = inputs.base()?;
        let other = inputs.other()?;
        let b = other.value;
        let whole = Scope::Tensor;
        let gram = [a.dot(&a, whole), a.dot(&b, whole), b.dot(&b, whole)];
        let coefficients = compute(&gram, 2, move |gram| {
            let [aa, ab, bb] = [gram[0], gram[1], gram[2]];
            coefficients(t, aa, ab, bb).to_vec()
        });
        Ok(Value::weighted_sum(coefficients.into_iter().zip([a, b])))
    }
}

/// The coefficients of the base and the other, from their inner products.
fn coefficients(t: f64, aa: f64, ab: f64, bb: f64) -> [f64; 2] {
    let norm = |square: f64| if square.sqrt() > SHORTEST { square.sqrt() } else { 1.0 };
    let cosine = (ab / (norm(aa) * norm(bb))).clamp(-1.0, 1.0);
    if cosine.abs() > PARALLEL {
        return [1.0 - t, t];
    }
    let angle = libm::acos(cosine);
    let sine = libm::sin(angle);
    [libm::sin((1.0 - t) * angle) / sine, libm::sin(t * angle) / sine]
}

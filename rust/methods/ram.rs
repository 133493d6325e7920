//! Reinforced Agent Merging: what one model alone has learned is kept whole, what several have
//! learned is averaged over those.
//!
//! RAM+ (tensor-local) makes up for the averaging: the more of a model's changes are shared, the
//! more its own are enlarged. Its result has the type of the inputs, where mergekit writes f32.

use super::{Base, Class, Contract, Description, Inputs, Kind, Method, Parameter, Per, Preset};
use crate::error::Result;
use crate::formula::{BinaryOp, Scalar, Scope, Value, compute};
use crate::plan::OutputTensor;

/// Reinforced Agent Merging.
#[derive(Debug)]
pub(crate) struct Ram;

/// The same with enlarged changes.
#[derive(Debug)]
pub(crate) struct RamPlus;

const PAPER: &str = "https://arxiv.org/abs/2601.13572";
const CONTRACT: Contract = Contract { base: Base::Required, inputs: (1, None), others: (0, None) };
const EPSILON: Parameter = Parameter::new(
    Per::Shared,
    "epsilon",
    Kind::Float,
    Preset::Float(1e-5),
    "smaller changes are none, in units of the weights",
)
.at_least(0.0);

impl Method for Ram {
    fn description(&self) -> Description {
        Description {
            name: "ram",
            title: "Reinforced Agent Merging",
            formula: "base + sum of the (x_i - base) above epsilon, divided by how many models \
                      have one there",
            class: Class::Elementwise,
            cost: "one read of every input",
            paper: PAPER,
            contract: CONTRACT,
            parameters: const { &[EPSILON] },
        }
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        let inputs = Inputs::of(tensor);
        let changes = Changes::of(&inputs)?;
        if changes.vectors.is_empty() {
            return Ok(changes.base);
        }
        let sum = sum(changes.vectors.iter().map(|vector| vector.kept.clone()));
        let divisor = changes.count.binary(BinaryOp::Max, &Value::scalar(1.0));
        Ok(&changes.base + &(&sum / &divisor))
    }
}

impl Method for RamPlus {
    fn description(&self) -> Description {
        Description {
            name: "ramplus_tl",
            title: "Reinforced Agent Merging Plus (tensor-local)",
            formula: "base + mean of the shared (x_i - base) + sum of L_i * its own, with L_i = \
                      1 + r * min(alpha, shared changes of i / its own changes)",
            class: Class::Selection,
            cost: "two reads of every input",
            paper: PAPER,
            contract: CONTRACT,
            parameters: const {
                &[
                    EPSILON,
                    Parameter::new(
                        Per::Shared,
                        "r",
                        Kind::Float,
                        Preset::Float(0.1),
                        "how much own changes are enlarged",
                    )
                    .at_least(0.0),
                    Parameter::new(
                        Per::Shared,
                        "alpha",
                        Kind::Float,
                        Preset::Float(0.2),
                        "the largest ratio of shared to own changes that counts",
                    )
                    .at_least(0.0),
                ]
            },
        }
    }

    fn differs(&self) -> &'static str {
        "the result has the type of the inputs, where mergekit writes f32"
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        let inputs = Inputs::of(tensor);
        let changes = Changes::of(&inputs)?;
        if changes.vectors.is_empty() {
            return Ok(changes.base);
        }
        let (epsilon, r, alpha) =
            (inputs.number("epsilon")?, inputs.number("r")?, inputs.number("alpha")?);
        let is_shared = changes.count.at_least(&Value::scalar(2.0));
        let nothing = Value::scalar(0.0);
        let own = |value: &Value| is_shared.select(&nothing, value);
        let factor = |vector: &Change| -> Scalar {
            let counts = [
                vector.is_there.masked(&is_shared).sum(Scope::Tensor),
                own(&vector.is_there).sum(Scope::Tensor),
            ];
            let factor = compute(&counts, 1, move |counts| {
                // Without changes of its own there is nothing to enlarge, and no ratio.
                let is_own = counts[1] > 0.0;
                let ratio = if is_own { counts[0] / counts[1].max(epsilon) } else { 0.0 };
                vec![1.0 + r * ratio.clamp(0.0, alpha.max(0.0))]
            });
            factor[0].clone()
        };
        let enlarged = Value::weighted_sum(
            changes.vectors.iter().map(|vector| (factor(vector), own(&vector.kept))),
        );
        let together = sum(changes.vectors.iter().map(|vector| vector.kept.masked(&is_shared)));
        let divisor = changes.count.binary(BinaryOp::Max, &Value::scalar(1.0));
        Ok(&changes.base + &(&(&together / &divisor) + &enlarged))
    }
}

/// What the models have changed.
struct Changes {
    base: Value,
    vectors: Vec<Change>,
    /// How many models have changed the element.
    count: Value,
}

/// What one model has changed.
struct Change {
    /// 1 where the change is larger than epsilon, else 0.
    is_there: Value,
    /// The change there, else 0.
    kept: Value,
}

impl Changes {
    fn of(inputs: &Inputs<'_>) -> Result<Self> {
        let (base, epsilon) = (inputs.base()?, Value::scalar(inputs.number("epsilon")?));
        let change = |value: &Value| {
            let vector = value - &base;
            let is_there = vector.abs().binary(BinaryOp::Greater, &epsilon);
            Change { kept: vector.masked(&is_there), is_there }
        };
        let vectors: Vec<Change> =
            inputs.others().iter().map(|input| change(&input.value)).collect();
        let count = sum(vectors.iter().map(|vector| vector.is_there.clone()));
        Ok(Self { base, vectors, count })
    }
}

fn sum(values: impl Iterator<Item = Value>) -> Value {
    Value::weighted_sum(values.map(|value| (1.0, value)))
}

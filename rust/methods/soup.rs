//! Averages over any number of checkpoints: the uniform soup, and the moving average of a training run.

use super::linear::sum_of_weights;
use super::{Base, Class, Contract, Description, Inputs, Kind, Method, Parameter, Per, Preset};
use crate::error::Result;
use crate::formula::Value;
use crate::plan::OutputTensor;

/// The average of all models; weights are one unless the recipe says otherwise.
#[derive(Debug)]
pub(crate) struct Soup;

/// The exponential moving average over checkpoints in the order of the recipe.
#[derive(Debug)]
pub(crate) struct Ema;

const CONTRACT: Contract = Contract { base: Base::Ignored, inputs: (1, None), others: (0, None) };

impl Method for Soup {
    fn description(&self) -> Description {
        Description {
            name: "soup",
            title: "Model Soup",
            formula: "sum of w_i * x_i / sum of w_i, with equal weights by default",
            class: Class::Elementwise,
            cost: "one read of every input",
            paper: "https://arxiv.org/abs/2203.05482",
            contract: CONTRACT,
            parameters: const {
                &[Parameter::weight(Per::Input, Preset::Float(1.0), "how much of this model")]
            },
        }
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        let all = Inputs::of(tensor).all();
        let weights = all.iter().map(|input| input.number("weight")).collect::<Result<Vec<_>>>()?;
        let sum = sum_of_weights(&weights)?;
        let shares = weights.into_iter().map(|weight| weight / sum);
        Ok(Value::weighted_sum(shares.zip(all.into_iter().map(|input| input.value))))
    }
}

impl Method for Ema {
    fn description(&self) -> Description {
        Description {
            name: "ema",
            title: "Exponential moving average",
            formula: "a_0 = x_0, a_i = decay * a_(i-1) + (1 - decay) * x_i, in listed order",
            class: Class::Elementwise,
            cost: "one read of every input",
            paper: "https://arxiv.org/abs/1412.6980",
            contract: CONTRACT,
            parameters: const {
                &[Parameter::new(
                    Per::Shared,
                    "decay",
                    Kind::Float,
                    Preset::Float(0.9),
                    "how much of the average so far is kept at each checkpoint",
                )
                .from_to(0.0, 1.0)]
            },
        }
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        let inputs = Inputs::of(tensor);
        let decay = inputs.number("decay")?;
        let all: Vec<Value> = inputs.all().into_iter().map(|input| input.value).collect();
        let coefficients = moving_average(decay, all.len());
        Ok(Value::weighted_sum(coefficients.into_iter().zip(all)))
    }
}

/// The coefficient of each of `count` checkpoints.
fn moving_average(decay: f64, count: usize) -> Vec<f64> {
    let mut coefficients = vec![0.0; count];
    let mut kept = 1.0;
    for at in (0..count).rev() {
        coefficients[at] = if at == 0 { kept } else { kept * (1.0 - decay) };
        kept *= decay;
    }
    coefficients
}

#[cfg(test)]
mod tests {
    use super::moving_average;

    #[test]
    fn the_coefficients_are_those_of_the_recursion() {
        assert_eq!(moving_average(0.5, 3), [0.25, 0.25, 0.5]);
        assert_eq!(moving_average(0.9, 1), [1.0]);
        assert_eq!(moving_average(0.0, 3), [0.0, 0.0, 1.0]);
        assert_eq!(moving_average(1.0, 3), [1.0, 0.0, 0.0]);
    }
}

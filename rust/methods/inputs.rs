//! The sources of one output tensor, as a method sees them.

use serde_json::Value as Json;

use crate::error::{Error, Result};
use crate::formula::Value;
use crate::plan::{OutputTensor, Parameters, SourceTensor};

/// The sources and parameters of one output tensor.
#[derive(Clone, Debug)]
pub struct Inputs<'a> {
    tensor: &'a OutputTensor,
}

/// An input and where it stands among those that are not the base.
#[derive(Clone, Debug)]
pub struct Input<'a> {
    /// Its elements.
    pub value: Value,
    /// Among those that are not the base: 0 for the first. The base has none of its own.
    pub position: u32,
    source: &'a SourceTensor,
}

impl<'a> Inputs<'a> {
    /// The sources of `tensor`.
    pub fn of(tensor: &'a OutputTensor) -> Self {
        Self { tensor }
    }

    /// Elements of the tensor.
    pub fn elements(&self) -> u64 {
        self.tensor.elements()
    }

    /// Its shape.
    pub fn shape(&self) -> &'a [u64] {
        &self.tensor.shape
    }

    /// The base model's elements.
    pub fn base(&self) -> Result<Value> {
        self.optional_base().ok_or_else(|| {
            Error::plan("this merge method needs a base model").advice("add `base_model:`")
        })
    }

    /// The base model's elements, if there is a base.
    pub fn optional_base(&self) -> Option<Value> {
        self.tensor.base.map(Value::input)
    }

    /// All inputs in listed order, the base among them.
    pub fn all(&self) -> Vec<Input<'a>> {
        self.numbered(|_| true)
    }

    /// The inputs that are not the base, in listed order.
    pub fn others(&self) -> Vec<Input<'a>> {
        self.numbered(|index| Some(index) != self.tensor.base)
    }

    /// The only input that is not the base, of a method that takes one.
    pub fn other(&self) -> Result<Input<'a>> {
        let count = self.others().len();
        let [other] = self.others().try_into().map_err(|_| {
            Error::plan("this merge method takes the base and one other model")
                .found(format!("{count} besides the base"))
                .advice("list one model besides the base")
        })?;
        Ok(other)
    }

    /// wᵢ · (xᵢ − base) for each input that is not the base, in listed order.
    pub fn weighted_task_vectors(&self) -> Result<Vec<Value>> {
        let base = self.base()?;
        let vector = |input: Input<'_>| Ok((&input.value - &base).scaled(input.number("weight")?));
        self.others().into_iter().map(vector).collect()
    }

    fn numbered(&self, wanted: impl Fn(usize) -> bool) -> Vec<Input<'a>> {
        let sources = self.tensor.sources.iter().enumerate().filter(|(index, _)| wanted(*index));
        let is_behind_base = |index: usize| self.tensor.base.is_some_and(|base| base < index);
        let input = |(index, source): (usize, &'a SourceTensor)| Input {
            value: Value::input(index),
            position: (index - usize::from(is_behind_base(index))) as u32,
            source,
        };
        sources.map(input).collect()
    }

    /// A shared number.
    pub fn number(&self, name: &str) -> Result<f64> {
        required_number(&self.tensor.parameters, name)
    }

    /// A shared switch.
    pub fn flag(&self, name: &str) -> Result<bool> {
        let value = self.tensor.parameters.get(name).and_then(Json::as_bool);
        value.ok_or_else(|| missing(name))
    }
}

impl Input<'_> {
    /// A number of this input.
    pub fn number(&self, name: &str) -> Result<f64> {
        required_number(&self.source.parameters, name)
            .map_err(|error| error.found(format!("none for `{}`", self.source.model)))
    }

    /// The model it is from.
    pub fn model(&self) -> &str {
        &self.source.model
    }

    /// A number of this input that the recipe may leave out.
    pub fn optional_number(&self, name: &str) -> Option<f64> {
        self.source.parameters.get(name).and_then(Json::as_f64)
    }
}

fn required_number(parameters: &Parameters, name: &str) -> Result<f64> {
    parameters.get(name).and_then(Json::as_f64).ok_or_else(|| missing(name))
}

#[cold]
fn missing(name: &str) -> Error {
    Error::plan(format!("the parameter `{name}` has no value"))
        .advice(format!("give it: `parameters: {{{name}: ...}}`"))
}

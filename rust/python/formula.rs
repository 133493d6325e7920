//! Formulas that Python wrote: a list of nodes as JSON, and the functions that its `compute` nodes call.

use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::error::Result;
use crate::formula::Value;
use crate::formula::listing::{self, HostFunction};

/// A Python function, and the length of the sequence that it returns; none for a number.
type Function = (Py<PyAny>, Option<usize>);

/// What a Python method returned for the parameters of one tensor.
pub(super) struct Written {
    nodes: String,
    functions: Vec<HostFunction>,
    raised: Raised,
}

/// The exception that a function of a formula raised, if one did.
#[derive(Clone, Default)]
pub(super) struct Raised(Arc<Mutex<Option<PyErr>>>);

impl Raised {
    /// `result`, or the exception that is behind it.
    pub(super) fn or<R>(&self, result: PyResult<R>) -> PyResult<R> {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(exception) => Err(exception),
            None => result,
        }
    }
}

impl<'py> FromPyObject<'_, 'py> for Written {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let (nodes, given): (String, Vec<Function>) = object.extract()?;
        let raised = Raised::default();
        let host = |(function, results)| host_function(function, results, raised.clone());
        Ok(Self { nodes, functions: given.into_iter().map(host).collect(), raised })
    }
}

impl Written {
    /// The formula, for a tensor with so many inputs.
    pub(super) fn value(&self, inputs: usize) -> Result<Value> {
        listing::read(&self.nodes, inputs, &self.functions)
    }

    /// Where exceptions of its functions go.
    pub(super) fn raised(&self) -> Raised {
        self.raised.clone()
    }
}

/// A Python function as the engine calls it.
fn host_function(function: Py<PyAny>, results: Option<usize>, raised: Raised) -> HostFunction {
    Arc::new(move |arguments| {
        let called = Python::attach(|py| call(py, &function, results, arguments));
        called.unwrap_or_else(|exception| {
            *raised.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(exception);
            // The engine stops as after a panic, and the caller finds the exception.
            resume_unwind(Box::new("a function of a formula raised an exception"))
        })
    })
}

fn call(
    py: Python<'_>,
    function: &Py<PyAny>,
    results: Option<usize>,
    arguments: &[f64],
) -> PyResult<Vec<f64>> {
    let returned = function.call1(py, PyTuple::new(py, arguments)?)?;
    let Some(count) = results else { return Ok(vec![returned.extract(py)?]) };
    let numbers: Vec<f64> = returned.extract(py)?;
    if numbers.len() == count {
        return Ok(numbers);
    }
    let name = function
        .getattr(py, "__qualname__")
        .map_or_else(|_| "a function of a formula".to_owned(), |name| format!("`{name}`"));
    let message = format!("{name} returned {} numbers, not {count} as said", numbers.len());
    Err(pyo3::exceptions::PyValueError::new_err(message))
}

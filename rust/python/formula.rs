//! Formulas that Python wrote: a list of nodes as JSON, and the functions that its `compute` nodes call.

use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::error::raise;
use crate::formula::listing;
use crate::plan::{Formula, HostFunction};

/// The exception that a function of a formula raised, if one did.
#[derive(Clone, Default)]
pub(super) struct Raised(Arc<Mutex<Option<PyErr>>>);

impl Raised {
    /// `result`; or of a failure, the exception that is behind it.
    pub(super) fn or<R>(&self, result: PyResult<R>) -> PyResult<R> {
        result.map_err(|failure| {
            let raised = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
            raised.unwrap_or(failure)
        })
    }

    /// The same, if it is one for a tensor with so many inputs.
    pub(super) fn checked(&self, written: &Bound<'_, PyAny>, inputs: usize) -> PyResult<Formula> {
        let formula = self.formula(written)?;
        let read = listing::read(&formula, inputs);
        self.or(read.map_err(|error| raise(written.py(), &error)))?;
        Ok(formula)
    }

    /// What Python hands over as a formula; its functions leave their exceptions here.
    pub(super) fn formula(&self, written: &Bound<'_, PyAny>) -> PyResult<Formula> {
        let (nodes, functions): (String, Vec<Py<PyAny>>) = written.extract()?;
        let functions = functions.into_iter().map(|function| self.host_function(function));
        Ok(Formula { nodes: nodes.into(), functions: functions.collect() })
    }

    /// A Python function as the engine calls it: it gets floats and returns a list of them.
    fn host_function(&self, function: Py<PyAny>) -> HostFunction {
        let raised = self.clone();
        Arc::new(move |arguments| {
            let called = Python::attach(|py| {
                function.call1(py, PyTuple::new(py, arguments)?)?.extract::<Vec<f64>>(py)
            });
            called.unwrap_or_else(|exception| {
                raised.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(exception);
                // The engine stops as after a panic, and the caller finds the exception.
                resume_unwind(Box::new("a function of a formula raised an exception"))
            })
        })
    }
}

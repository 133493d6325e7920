//! What methods in Python hand over: formulas, as nodes in JSON with the functions that they call; and
//! functions of arrays.

use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyByteArray, PyTuple};

use super::error::raise;
use crate::dtype::DType;
use crate::formula::listing;
use crate::kernels::{Level, Real, narrow, widen};
use crate::plan::{ArrayCall, ArrayFunction, Formula, HostFunction};

/// Elements that are converted at once.
const AT_ONCE: usize = 4096;

/// The exception that a function of a method raised, if one did.
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

    /// What a function gave. The engine stops at an exception as after a panic, and the caller of
    /// Python finds the exception here.
    fn or_unwind<R>(&self, called: PyResult<R>) -> R {
        called.unwrap_or_else(|exception| {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(exception);
            resume_unwind(Box::new("a function of a merge method raised an exception"))
        })
    }

    /// What Python hands over, if it is a formula for a tensor with so many inputs.
    pub(super) fn checked(&self, written: &Bound<'_, PyAny>, inputs: usize) -> PyResult<Formula> {
        let formula = self.formula(written)?;
        if formula.arrays.is_none() {
            let read = listing::read(&formula, inputs);
            self.or(read.map_err(|error| raise(written.py(), &error)))?;
        }
        Ok(formula)
    }

    /// What Python hands over: nodes, the functions that they call, and what makes the output
    /// instead, with whether it has to have the whole tensor.
    pub(super) fn formula(&self, written: &Bound<'_, PyAny>) -> PyResult<Formula> {
        type Written = (String, Vec<Py<PyAny>>, Option<(Py<PyAny>, bool)>);
        let (nodes, functions, arrays): Written = written.extract()?;
        let functions = functions.into_iter().map(|function| self.host_function(function));
        let arrays = arrays.map(|(function, whole)| self.array_function(function, whole));
        Ok(Formula { nodes: nodes.into(), functions: functions.collect(), arrays })
    }

    /// A Python function of floats, which returns a list of them.
    fn host_function(&self, function: Py<PyAny>) -> HostFunction {
        let raised = self.clone();
        Arc::new(move |arguments| {
            raised.or_unwind(Python::attach(|py| {
                function.call1(py, PyTuple::new(py, arguments)?)?.extract::<Vec<f64>>(py)
            }))
        })
    }

    /// A Python function of the bytes of arrays, their shape and type, which returns such bytes.
    fn array_function(&self, function: Py<PyAny>, whole: bool) -> ArrayFunction {
        let raised = self.clone();
        let call = move |call: &mut ArrayCall<'_>| {
            raised.or_unwind(Python::attach(|py| {
                if call.double {
                    call_arrays::<f64>(py, &function, DType::F64, call)
                } else {
                    call_arrays::<f32>(py, &function, DType::F32, call)
                }
            }));
        };
        ArrayFunction { call: Arc::new(call), whole }
    }
}

/// Calls `function` with arrays of `T`, which are `working`.
fn call_arrays<T: Real>(
    py: Python<'_>,
    function: &Py<PyAny>,
    working: DType,
    call: &mut ArrayCall<'_>,
) -> PyResult<()> {
    let size = |dtype: DType, bytes: &[u8]| bytes.len() / dtype.size() * working.size();
    let array = |&(dtype, bytes): &(DType, &[u8])| {
        PyByteArray::new_with(py, size(dtype, bytes), |into| {
            convert::<T>(dtype, bytes, working, into);
            Ok(())
        })
    };
    let inputs = call.inputs.iter().map(array).collect::<PyResult<Vec<_>>>()?;
    let shape = PyTuple::new(py, call.shape)?;
    let returned = function.call1(py, (inputs, shape, working.name()))?;
    let returned: PyBackedBytes = returned.extract(py)?;
    let (dtype, output) = &mut call.output;
    if returned.len() != size(*dtype, output) {
        return Err(PyValueError::new_err("a function of arrays returned another number of bytes"));
    }
    convert::<T>(working, &returned, *dtype, output);
    Ok(())
}

/// The elements of `from` in another type, by way of `T`.
fn convert<T: Real>(dtype: DType, from: &[u8], other: DType, into: &mut [u8]) {
    let level = Level::from_environment().unwrap_or_else(|_| Level::portable());
    let mut values = [T::ZERO; AT_ONCE];
    let parts = from.chunks(AT_ONCE * dtype.size()).zip(into.chunks_mut(AT_ONCE * other.size()));
    for (from, into) in parts {
        let values = &mut values[..from.len() / dtype.size()];
        widen(level, dtype, from, values);
        narrow(level, values, other, into);
    }
}

//! The only place where an [`Error`] becomes a Python exception.

use std::path::Path;

use pyo3::exceptions::{PyKeyboardInterrupt, PyOSError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::{Error, ErrorKind};

/// The exception for `error`: of `oxmerge.errors` with its parts as attributes, or a builtin one
/// where a builtin says it best.
pub(super) fn raise(py: Python<'_>, error: &Error) -> PyErr {
    let class = match error.kind() {
        ErrorKind::Io(_) => return os_error(error),
        ErrorKind::Interrupted => return PyKeyboardInterrupt::new_err(()),
        ErrorKind::Checkpoint => "CheckpointError",
        ErrorKind::Unsupported => "UnsupportedError",
        ErrorKind::Plan => "PlanError",
        ErrorKind::Memory => "MemoryBudgetError",
        ErrorKind::Device => "DeviceError",
        ErrorKind::Changed => "InputChangedError",
        ErrorKind::Output => "OutputError",
        ErrorKind::Waiting => "WaitsForOthersError",
        ErrorKind::Internal => "InternalError",
    };
    own(py, class, error).unwrap_or_else(|failure| failure)
}

/// With an errno, so that Python picks the subclass (`FileNotFoundError` and so on).
fn os_error(error: &Error) -> PyErr {
    let file = error.parts().file.map(|path| path.as_os_str().to_owned());
    let text = error.without_file().to_string();
    match (error.raw_os_error(), file) {
        (Some(number), Some(file)) => PyOSError::new_err((number, text, file)),
        (Some(number), None) => PyOSError::new_err((number, text)),
        (None, _) => PyOSError::new_err(error.to_string()),
    }
}

fn own(py: Python<'_>, class: &str, error: &Error) -> PyResult<PyErr> {
    let parts = error.parts();
    let keywords = PyDict::new(py);
    keywords.set_item("file", parts.file.map(Path::as_os_str))?;
    keywords.set_item("tensor", parts.tensor)?;
    keywords.set_item("expected", parts.expected)?;
    keywords.set_item("found", parts.found)?;
    keywords.set_item("advice", parts.advice)?;
    let class = py.import("oxmerge.errors")?.getattr(class)?;
    Ok(PyErr::from_value(class.call((error.message(),), Some(&keywords))?))
}

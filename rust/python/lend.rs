//! Lends memory of the engine to Python for the time of a call, without a copy.

#![expect(unsafe_code, reason = "a memory view has no lifetime that the compiler sees")]

use std::os::raw::c_char;

use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;

/// Memory views over buffers of the engine. None of them may be in use when a call is over.
#[derive(Debug, Default)]
pub(super) struct Lent(Vec<Py<PyAny>>);

impl Lent {
    /// A memory view over `bytes`, which the callee fills.
    pub(super) fn writable<'py>(
        &mut self,
        py: Python<'py>,
        bytes: &mut [u8],
    ) -> PyResult<Bound<'py, PyAny>> {
        self.view(py, bytes.as_mut_ptr(), bytes.len())
    }

    /// A memory view over `bytes`, which the callee only reads. It is writable all the same: torch
    /// warns about a tensor over memory that is not, though nobody writes to it.
    pub(super) fn readable<'py>(
        &mut self,
        py: Python<'py>,
        bytes: &[u8],
    ) -> PyResult<Bound<'py, PyAny>> {
        self.view(py, bytes.as_ptr().cast_mut(), bytes.len())
    }

    fn view<'py>(
        &mut self,
        py: Python<'py>,
        start: *mut u8,
        length: usize,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (start, length) = (start.cast::<c_char>(), length as ffi::Py_ssize_t);
        // SAFETY: the bytes stay where they are until the call is over, since the caller has
        // borrowed them for longer. The callee, `oxmerge/torch_backend.py`, keeps no view and no
        // tensor over one after a call, which `take_back` checks, and writes only to outputs.
        let view = unsafe { ffi::PyMemoryView_FromMemory(start, length, ffi::PyBUF_WRITE) };
        // SAFETY: it is a new reference, or null with an exception set.
        let view = unsafe { Bound::from_owned_ptr_or_err(py, view) }?;
        self.0.push(view.clone().unbind());
        Ok(view)
    }

    /// Takes the views back; whether nobody else refers to them any more, nor to their memory.
    pub(super) fn take_back(&self, py: Python<'_>) -> bool {
        let only_one = |view: &Py<PyAny>| {
            // SAFETY: a valid object, and the thread is attached to Python.
            unsafe { ffi::Py_REFCNT(view.bind(py).as_ptr()) == 1 }
        };
        // One that somebody kept can be of no use from here on, unless it was exported in turn.
        let release = |view: &Py<PyAny>| view.call_method0(py, intern!(py, "release")).is_ok();
        self.0.iter().fold(true, |all, view| only_one(view) & release(view) & all)
    }
}

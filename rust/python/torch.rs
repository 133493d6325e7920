//! The backend that hands steps to torch: `oxmerge/torch_backend.py` does what a machine does.
//!
//! Here compiled code becomes plain Python data, and buffers are lent for the time of a call. A
//! worker attaches to Python for each step; torch lets go of the GIL while it computes and copies.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyList, PyTuple};

use super::lend::Lent;
use crate::engine::backend::{Arithmetic, Backend, Layout, Output, Program, Step, Tally};
use crate::engine::need::Offload;
use crate::engine::passes::SearchView;
use crate::engine::simd::Simd;
use crate::error::{Error, ErrorKind, Result};
use crate::formula::code::{Argument, Code, Operation, Slot};
use crate::formula::machine::{InputBytes, TensorFrame};
use crate::formula::masks::KeptMasks;
use crate::formula::selection::ordinal_of_key;
use crate::formula::{ReductionKind, Scope};
use crate::kernels::{Counts, Level, MaskKey};

/// A `torch_backend.Backend`, and what went wrong in it.
#[derive(Debug)]
pub(super) struct Torch {
    backend: Py<PyAny>,
    offload: Offload,
    /// For the few elements that samples look at.
    host: Simd,
    failure: Failure,
}

/// A `torch_backend.Backend` as Python hands it over. It is that class itself and no other: memory is
/// lent to it, and what it does with that is known.
pub(super) struct Device<'py>(Bound<'py, PyAny>);

impl<'py> FromPyObject<'_, 'py> for Device<'py> {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let modules = object.py().import("sys")?.getattr("modules")?;
        let module = modules.call_method1("get", ("oxmerge.torch_backend",))?;
        if !module.is_none() && object.get_type().is(&module.getattr("Backend")?) {
            return Ok(Self(object.to_owned()));
        }
        Err(PyTypeError::new_err("device must be a torch_backend.Backend"))
    }
}

impl Device<'_> {
    pub(super) fn offload(&self) -> PyResult<Offload> {
        Ok(Offload {
            vram: self.0.getattr("vram")?.extract()?,
            devices: self.0.getattr("devices")?.len()?,
            is_host: self.0.getattr("is_host")?.extract()?,
        })
    }

    pub(super) fn open(self, level: Level) -> PyResult<Torch> {
        let offload = self.offload()?;
        let (backend, host, failure) = (self.0.unbind(), Simd(level), Failure::default());
        Ok(Torch { backend, offload, host, failure })
    }
}

/// The exception that a worker met first.
#[derive(Clone, Debug, Default)]
struct Failure(Arc<Mutex<Option<PyErr>>>);

impl Torch {
    /// The exception behind an error of a run, if one of torch is.
    pub(super) fn take_failure(&self) -> Option<PyErr> {
        self.failure.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Failure {
    /// Keeps `exception`, and says what it is in an error of the engine.
    fn note(&self, py: Python<'_>, exception: PyErr) -> Error {
        // Its frames refer to tensors, which refer to memory that was lent.
        if let Some(traceback) = exception.traceback(py) {
            let clear = |module: Bound<'_, PyModule>| {
                module.call_method1("clear_frames", (traceback,)).map(drop)
            };
            // It fails for frames that still run, of which there are none.
            let _ = py.import("traceback").and_then(clear);
        }
        let explained = py
            .import("oxmerge.torch_backend")
            .and_then(|module| module.call_method1("explain", (exception.value(py),)))
            .and_then(|explained| explained.extract::<(String, Option<String>)>());
        let (message, advice) =
            explained.unwrap_or_else(|_| (format!("torch failed: {exception}"), None));
        let error = Error::new(ErrorKind::Device, message);
        let mut first = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(exception);
        match advice {
            Some(advice) => error.advice(advice),
            None => error,
        }
    }
}

impl Backend for Torch {
    fn worker(&self) -> Result<Box<dyn Arithmetic + '_>> {
        // Of the class, whatever was put in its place in the object.
        let worker = |py: Python<'_>| {
            let class = self.backend.bind(py).get_type();
            class.getattr("worker")?.call1((&self.backend,)).map(Bound::unbind)
        };
        Python::attach(|py| match worker(py) {
            Ok(worker) => {
                Ok(Box::new(TorchWorker { worker, host: self.host, failure: self.failure.clone() })
                    as Box<dyn Arithmetic>)
            }
            Err(exception) => Err(self.failure.note(py, exception)),
        })
    }

    fn offload(&self) -> Option<Offload> {
        Some(self.offload)
    }
}

/// One thread's stream and staging buffers.
struct TorchWorker {
    worker: Py<PyAny>,
    host: Simd,
    failure: Failure,
}

impl Arithmetic for TorchWorker {
    fn program<'a>(
        &self,
        frame: &'a TensorFrame,
        code: &'a Code,
        double: bool,
        masks: Option<&'a KeptMasks>,
    ) -> Result<Box<dyn Program + 'a>> {
        let program = Python::attach(|py| {
            let encoder = Encoder { py, frame, double };
            let instructions = encoder.code(code);
            let results = instructions.and_then(|i| Ok((i, encoder.results(code)?)));
            let program = results.and_then(|(instructions, results)| {
                let arguments = (instructions, results, frame.row, frame.line, double);
                self.worker.call_method1(py, "program", arguments)
            });
            program.map_err(|exception| self.failure.note(py, exception))
        })?;
        let host = self.host.program(frame, code, double, masks)?;
        Ok(Box::new(TorchProgram { program, double, host, failure: self.failure.clone() }))
    }
}

/// Code as tuples: name of the operation, slot of the result, operands.
struct Encoder<'a, 'py> {
    py: Python<'py>,
    frame: &'a TensorFrame,
    double: bool,
}

impl<'py> Encoder<'_, 'py> {
    fn code(&self, code: &Code) -> PyResult<Bound<'py, PyList>> {
        let instructions = code.instructions.iter();
        let tuples: PyResult<Vec<_>> =
            instructions.map(|step| self.operation(step.out, &step.operation)).collect();
        PyList::new(self.py, tuples?)
    }

    fn results(&self, code: &Code) -> PyResult<Vec<Bound<'py, PyAny>>> {
        code.results.iter().map(|&result| self.argument(result)).collect()
    }

    fn operation(&self, out: Slot, operation: &Operation) -> PyResult<Bound<'py, PyTuple>> {
        let py = self.py;
        match operation {
            Operation::Load { input } => ("load", out, *input).into_pyobject(py),
            Operation::LoadDifference { input, base } => {
                ("load_difference", out, *input, *base).into_pyobject(py)
            }
            Operation::Fill { number } => ("fill", out, self.number(*number)).into_pyobject(py),
            Operation::Spread { axis, first, values } => {
                let axis = if *axis == Scope::Column { "column" } else { "row" };
                let values = PyByteArray::new(py, bytemuck::cast_slice(values));
                ("spread", out, axis, *first, values).into_pyobject(py)
            }
            Operation::Unary { op, a } => ("unary", out, format!("{op:?}"), *a).into_pyobject(py),
            Operation::Binary { op, a, b } => {
                let (a, b) = (self.argument(*a)?, self.argument(*b)?);
                ("binary", out, format!("{op:?}"), a, b).into_pyobject(py)
            }
            Operation::Select { mask, yes, no } => {
                let (yes, no) = (self.argument(*yes)?, self.argument(*no)?);
                ("select", out, *mask, yes, no).into_pyobject(py)
            }
            Operation::WeightedSum { terms } => {
                ("weighted_sum", out, self.terms(terms)).into_pyobject(py)
            }
            Operation::Elect { terms, average } => {
                ("elect", out, self.terms(terms), *average).into_pyobject(py)
            }
            Operation::Kept { a, chosen } => {
                let threshold = ordinal_of_key(chosen.threshold, self.double);
                ("kept", out, *a, threshold, chosen.equals_end).into_pyobject(py)
            }
            Operation::Trim { a, chosen } => {
                let threshold = ordinal_of_key(chosen.threshold, self.double);
                ("trim", out, *a, threshold, chosen.equals_end).into_pyobject(py)
            }
            Operation::Random { keep_below, stream } => {
                let (key, stream) = self.mask_words(*stream);
                ("random", out, *keep_below, key, stream).into_pyobject(py)
            }
            Operation::Drop { a, keep_below, stream, scale } => {
                let (key, stream) = self.mask_words(*stream);
                ("drop", out, *a, *keep_below, key, stream, self.number(*scale)).into_pyobject(py)
            }
        }
    }

    /// The key of a random mask, and the words of its counters that are the same for all.
    fn mask_words(&self, stream: u32) -> ((u32, u32), (u32, u32)) {
        let key = MaskKey::new(self.frame.seed, &self.frame.name, stream);
        let [_, _, low, high] = key.counter(0);
        let [first, second] = key.key();
        ((first, second), (low, high))
    }

    fn terms(&self, terms: &[(f64, Slot)]) -> Vec<(f64, Slot)> {
        terms.iter().map(|&(number, slot)| (self.number(number), slot)).collect()
    }

    fn argument(&self, argument: Argument) -> PyResult<Bound<'py, PyAny>> {
        Ok(match argument {
            Argument::Slot(slot) => slot.into_pyobject(self.py)?.into_any(),
            Argument::Number(number) => self.number(number).into_pyobject(self.py)?.into_any(),
        })
    }

    /// Rounded to the working type, as where it meets values.
    fn number(&self, number: f64) -> f64 {
        if self.double { number } else { f64::from(number as f32) }
    }
}

/// A `torch_backend.Program`.
struct TorchProgram<'a> {
    program: Py<PyAny>,
    double: bool,
    host: Box<dyn Program + 'a>,
    failure: Failure,
}

impl TorchProgram<'_> {
    /// Calls `method` with the step's elements and inputs and then `more`. What is lent is back
    /// afterwards.
    fn call<'py, M>(
        &self,
        py: Python<'py>,
        method: &str,
        step: &Step<'_>,
        more: impl FnOnce(&mut Lent) -> PyResult<M>,
    ) -> Result<()>
    where
        M: IntoIterator<Item = Bound<'py, PyAny>>,
    {
        let mut lent = Lent::default();
        let called = (|| {
            let Range { start, end } = step.elements;
            let inputs = lend_inputs(py, &mut lent, step)?;
            let first = [
                start.into_pyobject(py)?.into_any(),
                (end - start).into_pyobject(py)?.into_any(),
                inputs,
            ];
            let arguments: Vec<_> = first.into_iter().chain(more(&mut lent)?).collect();
            self.program.call_method1(py, method, PyTuple::new(py, arguments)?)
        })();
        let called = called.map_err(|exception| self.failure.note(py, exception));
        if lent.take_back(py) {
            called.map(drop)
        } else {
            Err(Error::internal("the torch backend kept memory that was lent to it"))
        }
    }
}

fn lend_inputs<'py>(
    py: Python<'py>,
    lent: &mut Lent,
    step: &Step<'_>,
) -> PyResult<Bound<'py, PyAny>> {
    let mut pair = |input: &InputBytes<'_>| {
        let bytes = lent.readable(py, input.part(&step.elements))?;
        Ok((input.dtype.name(), bytes))
    };
    let inputs: PyResult<Vec<_>> =
        step.inputs.iter().map(|input| input.as_ref().map(&mut pair).transpose()).collect();
    Ok(PyList::new(py, inputs?)?.into_any())
}

impl Program for TorchProgram<'_> {
    fn reduce(
        &mut self,
        step: &Step<'_>,
        segment: u64,
        layout: &Layout,
        searches: &[SearchView],
        tally: &mut Tally,
    ) -> Result<()> {
        let segments = (step.elements.end - step.elements.start).div_ceil(segment) as usize;
        let mut counted: Vec<Vec<i64>> =
            searches.iter().map(|search| vec![0; 1 + segments + search.bins]).collect();
        Python::attach(|py| {
            self.call(py, "reduce", step, |lent| {
                let found = tally.sums.iter_mut().map(|sums| {
                    let before = sums.len();
                    sums.resize(before + segments, 0.0);
                    &mut sums[before..]
                });
                let reductions = lend_results(py, lent, layout, found)?;
                let views = searches.iter().zip(&mut counted).map(|(view, counted)| {
                    let low = ordinal_of_key(view.low, self.double);
                    let high = ordinal_of_key(view.high, self.double);
                    let buffer = lent.writable(py, bytemuck::cast_slice_mut(counted))?;
                    (low, high, view.shift, view.bins, buffer).into_pyobject(py)
                });
                let views = PyList::new(py, views.collect::<PyResult<Vec<_>>>()?)?;
                Ok([segment.into_pyobject(py)?.into_any(), reductions, views.into_any()])
            })
        })?;
        let first = step.elements.start / segment;
        for (histogram, counted) in tally.counts.iter_mut().zip(counted) {
            let counted: Vec<u64> = counted.into_iter().map(i64::cast_unsigned).collect();
            histogram.above += counted[0];
            for (block, &inside) in (first..).zip(&counted[1..=segments]) {
                histogram.count(block, Counts { above: 0, inside });
            }
            for (bin, count) in histogram.bins.iter_mut().zip(&counted[1 + segments..]) {
                *bin += *count as u32;
            }
        }
        Ok(())
    }

    fn columns(
        &mut self,
        step: &Step<'_>,
        first: u64,
        layout: &Layout,
        sums: &mut [Vec<f64>],
    ) -> Result<()> {
        Python::attach(|py| {
            self.call(py, "columns", step, |lent| {
                let sums = sums.iter_mut().map(Vec::as_mut_slice);
                let first = first.into_pyobject(py)?.into_any();
                Ok([first, lend_results(py, lent, layout, sums)?])
            })
        })
    }

    fn combine(&mut self, step: &Step<'_>, outputs: &mut [Output<'_>]) -> Result<()> {
        Python::attach(|py| {
            self.call(py, "combine", step, |lent| {
                let entry = |output: &mut Output<'_>| {
                    let buffer = lent.writable(py, output.bytes)?;
                    Ok((output.result, output.dtype.name(), buffer))
                };
                let outputs: PyResult<Vec<_>> = outputs.iter_mut().map(entry).collect();
                Ok([PyList::new(py, outputs?)?.into_any()])
            })
        })
    }

    fn keys(&mut self, step: &Step<'_>) -> Result<Vec<Vec<u64>>> {
        self.host.keys(step)
    }
}

/// For each reduction its kind, its operands, and where its results go.
fn lend_results<'py, 'a>(
    py: Python<'py>,
    lent: &mut Lent,
    layout: &Layout,
    results: impl Iterator<Item = &'a mut [f64]>,
) -> PyResult<Bound<'py, PyAny>> {
    type Operands = (ReductionKind, usize, Option<usize>);
    let entry = |(&(kind, left, right), results): (&Operands, &'a mut [f64])| {
        let buffer = lent.writable(py, bytemuck::cast_slice_mut(results))?;
        (format!("{kind:?}"), left, right, buffer).into_pyobject(py)
    };
    let reductions: PyResult<Vec<_>> = layout.kinds.iter().zip(results).map(entry).collect();
    Ok(PyList::new(py, reductions?)?.into_any())
}

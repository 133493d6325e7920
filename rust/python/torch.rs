//! The backend that hands steps to torch: `oxmerge/torch_backend.py` does what a machine does.
//!
//! Here a program becomes plain Python data, and buffers are lent for the time of a call. A
//! worker attaches to Python for each step; torch lets go of the GIL while it computes and copies.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyList, PyTuple};

use super::lend::Lent;
use crate::engine::backend::{Arithmetic, Backend, Results, Run, Step};
use crate::engine::need::Offload;
use crate::engine::simd::Simd;
use crate::error::{Error, ErrorKind, Result};
use crate::formula::machine::{InputBytes, Known, Spans, TensorFrame};
use crate::formula::program::{
    Along, Argument, Effect, Instruction, Mask, Operation, Program, Slot,
};
use crate::formula::selection::{Interval, Look, ordinal_of_key};
use crate::formula::{Among, Pick, Scalar, Scope};
use crate::kernels::{Ends, Level, MaskKey, SPAN};

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
    fn begin<'a>(
        &self,
        frame: &'a TensorFrame,
        program: &'a Program,
        known: &'a Known,
    ) -> Result<Box<dyn Run + 'a>> {
        if program.effects.iter().any(|effect| matches!(effect, Effect::Keys { .. })) {
            return self.host.begin(frame, program, known);
        }
        let ready = Python::attach(|py| {
            let encoder = Encoder { py, frame, known, double: program.double };
            let ready = encoder.program(program).and_then(|(instructions, effects)| {
                let arguments = (instructions, effects, frame.row, frame.line, program.double);
                self.worker.call_method1(py, "program", arguments)
            });
            ready.map_err(|exception| self.failure.note(py, exception))
        })?;
        Ok(Box::new(TorchRun { ready, program, failure: self.failure.clone() }))
    }
}

/// A program as tuples. Of an instruction: name of the operation, slot of the result, slots that
/// nobody needs afterwards, operands. Of an effect: its name, and what it is of.
struct Encoder<'a, 'py> {
    py: Python<'py>,
    frame: &'a TensorFrame,
    known: &'a Known,
    double: bool,
}

impl<'py> Encoder<'_, 'py> {
    fn program(&self, program: &Program) -> PyResult<(Bound<'py, PyList>, Bound<'py, PyList>)> {
        let instruction = |Instruction { operation, out, dead }: &Instruction| {
            let (name, operands) = self.operation(operation)?;
            (name, *out, dead.clone(), operands).into_pyobject(self.py)
        };
        let instructions: PyResult<Vec<_>> = program.instructions.iter().map(instruction).collect();
        let effects =
            program.effects.iter().filter_map(|effect| self.effect(effect, program.along));
        let effects: PyResult<Vec<_>> = effects.collect();
        Ok((PyList::new(self.py, instructions?)?, PyList::new(self.py, effects?)?))
    }

    /// What was copied needs nobody.
    fn effect(&self, effect: &Effect, along: Along) -> Option<PyResult<Bound<'py, PyTuple>>> {
        let py = self.py;
        let encoded = match effect {
            Effect::Copy { .. } => return None,
            Effect::Store { dtype, a, .. } => {
                self.argument(*a).and_then(|a| ("store", a, dtype.name()).into_pyobject(py))
            }
            Effect::Reduce { kind, a, b, .. } => (|| {
                let b = b.map(|b| self.argument(b)).transpose()?;
                let (kind, a) = (format!("{kind:?}"), self.argument(*a)?);
                match along {
                    Along::Segments(length) => ("reduce", kind, a, b, length).into_pyobject(py),
                    Along::Columns => ("columns", kind, a, b).into_pyobject(py),
                }
            })(),
            Effect::Count { interval, a, .. } => (|| {
                let Interval { low, high, shift, .. } = *interval;
                let [low, high] = [low, high].map(|key| ordinal_of_key(key, self.double));
                let Along::Segments(length) = along else { unreachable!("blocks are counted") };
                ("count", self.argument(*a)?, low, high, shift, bins(interval), length)
                    .into_pyobject(py)
            })(),
            Effect::Rank { among, pick, a, .. } => self.rank(*among, *pick, *a),
            Effect::Differing { .. } | Effect::Keys { .. } | Effect::Fused(_) => {
                unreachable!("the host's kernels do that")
            }
        };
        Some(encoded)
    }

    /// How the vectors lie, and how many of the largest are kept, or which random mask it is.
    fn rank(&self, among: Among, pick: Pick, a: Argument) -> PyResult<Bound<'py, PyTuple>> {
        let Spans { size, within, stride } = self.frame.spans(among);
        let (a, spans) = (self.argument(a)?, (size, within, stride));
        match pick {
            Pick::Largest(count) => {
                // No vector has more elements than an i64 can say.
                let count = count.min(i64::MAX.cast_unsigned());
                ("largest_by_rank", a, spans, count).into_pyobject(self.py)
            }
            Pick::Random { lowest, highest, stream } => {
                let (key, stream) = self.mask_words(stream);
                let probabilities = (lowest, highest);
                ("random_by_rank", a, spans, probabilities, key, stream).into_pyobject(self.py)
            }
        }
    }

    fn operation(&self, operation: &Operation) -> PyResult<(&'static str, Bound<'py, PyTuple>)> {
        let py = self.py;
        Ok(match operation {
            Operation::Load { input } => ("load", (*input,).into_pyobject(py)?),
            Operation::Fill { number } => ("fill", (self.number(*number),).into_pyobject(py)?),
            Operation::Spread { vector } => ("spread", (*vector,).into_pyobject(py)?),
            Operation::Unary { op, a } => ("unary", (format!("{op:?}"), *a).into_pyobject(py)?),
            Operation::Binary { op, a, b } => {
                let (a, b) = (self.argument(*a)?, self.argument(*b)?);
                ("binary", (format!("{op:?}"), a, b).into_pyobject(py)?)
            }
            Operation::Select { mask, yes, no } => {
                let (yes, no) = (self.argument(*yes)?, self.argument(*no)?);
                ("select", (*mask, yes, no).into_pyobject(py)?)
            }
            Operation::WeightedSum { terms } => {
                ("weighted_sum", (self.terms(terms),).into_pyobject(py)?)
            }
            Operation::Elect { terms, average } => {
                ("elect", (self.terms(terms), *average).into_pyobject(py)?)
            }
            Operation::Kept { a, which } => {
                let chosen = self.known.chosen[*which];
                let threshold = ordinal_of_key(chosen.threshold, self.double);
                ("kept", (*a, threshold, chosen.equals_end).into_pyobject(py)?)
            }
            Operation::Mask { mask: Mask::Marked(marks) } => {
                ("marked", (*marks,).into_pyobject(py)?)
            }
            Operation::Mask { mask: Mask::Random((stream, keep_below)) } => {
                let (key, stream) = self.mask_words(*stream);
                ("random", (*keep_below, key, stream).into_pyobject(py)?)
            }
            Operation::LoadDifference { .. } | Operation::Trim { .. } | Operation::Drop { .. } => {
                unreachable!("nothing is fused for a device")
            }
        })
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
struct TorchRun<'a> {
    ready: Py<PyAny>,
    program: &'a Program,
    failure: Failure,
}

impl Run for TorchRun<'_> {
    /// Lends the step's inputs, and a buffer for each effect. What is lent is back afterwards.
    fn run(&mut self, step: &Step<'_>, results: &mut Results<'_>) -> Result<()> {
        let Range { start, end } = step.elements;
        let segments = match self.program.along {
            Along::Segments(length) => (end - start).div_ceil(length) as usize,
            Along::Columns => 0,
        };
        let before = results.numbers.first().map_or(0, Vec::len);
        results.numbers.iter_mut().for_each(|numbers| numbers.resize(before + segments, 0.0));
        results.kept.iter_mut().for_each(|kept| kept.resize((end - start) as usize, 0));
        let mut counted: Vec<Vec<i64>> = self
            .program
            .searches
            .iter()
            .map(|interval| vec![0; 1 + segments + bins(interval)])
            .collect();
        Python::attach(|py| {
            let mut lent = Lent::default();
            let called = (|| {
                let inputs = lend_inputs(py, &mut lent, step)?;
                let vectors = step.given.vectors.iter().map(|vector| encode_vector(py, vector));
                let vectors = vectors.collect::<PyResult<Vec<_>>>()?;
                let count = (end - start) as usize;
                let marks = step.given.marks.iter().map(|marks| {
                    let spans = (start..end).step_by(SPAN).map(|first| marks.bits(first));
                    let kept = spans.flat_map(|bits| {
                        (0..SPAN).map(move |at| bits[at % bits.len()] >> (at / bits.len()) & 1)
                    });
                    let kept: Vec<u8> = kept.take(count).map(|kept| kept as u8).collect();
                    PyByteArray::new(py, &kept)
                });
                let marks: Vec<_> = marks.collect();
                let skipped = if segments > 0 { before } else { 0 };
                let mut buffers = Buffers {
                    outputs: results.outputs.iter_mut().map(|output| Some(&mut **output)).collect(),
                    numbers: results.numbers.iter_mut(),
                    counted: counted.iter_mut(),
                    kept: results.kept.iter_mut(),
                };
                let mut found = Vec::new();
                for effect in &self.program.effects {
                    if let Some(bytes) = buffers.of(effect, skipped) {
                        found.push(lent.writable(py, bytes)?);
                    }
                }
                let given = (vectors, marks);
                let arguments = (start, end - start, inputs, given, step.column, found);
                self.ready.call_method1(py, "run", arguments)
            })();
            let called = called.map_err(|exception| self.failure.note(py, exception));
            if lent.take_back(py) {
                called.map(drop)
            } else {
                Err(Error::internal("the torch backend kept memory that was lent to it"))
            }
        })?;
        let Along::Segments(segment) = self.program.along else { return Ok(()) };
        let first = start / segment;
        for (counts, counted) in results.counts.iter_mut().zip(counted) {
            let counted: Vec<u64> = counted.into_iter().map(i64::cast_unsigned).collect();
            counts.above += counted[0];
            for (bin, count) in counts.bins.iter_mut().zip(&counted[1 + segments..]) {
                *bin += *count as u32;
            }
            if counts.bins.is_empty() {
                for (block, &high) in (first..).zip(&counted[1..=segments]) {
                    counts.count(block, |_| Ends { above: 0, high, low: 0 });
                }
            }
        }
        Ok(())
    }
}

/// Where effects put what they find, in their order.
struct Buffers<'a, N, C, K> {
    outputs: Vec<Option<&'a mut [u8]>>,
    numbers: N,
    counted: C,
    kept: K,
}

impl<'a, N, C, K> Buffers<'a, N, C, K>
where
    N: Iterator<Item = &'a mut Vec<f64>>,
    C: Iterator<Item = &'a mut Vec<i64>>,
    K: Iterator<Item = &'a mut Vec<u8>>,
{
    /// The bytes for `effect`; numbers begin behind those of earlier steps.
    fn of(&mut self, effect: &Effect, before: usize) -> Option<&'a mut [u8]> {
        match effect {
            Effect::Store { output, .. } => self.outputs[*output].take(),
            Effect::Reduce { .. } => {
                self.numbers.next().map(|numbers| bytemuck::cast_slice_mut(&mut numbers[before..]))
            }
            Effect::Count { .. } => {
                self.counted.next().map(|counted| bytemuck::cast_slice_mut(counted))
            }
            Effect::Rank { .. } => self.kept.next().map(Vec::as_mut_slice),
            Effect::Copy { .. }
            | Effect::Differing { .. }
            | Effect::Keys { .. }
            | Effect::Fused(_) => None,
        }
    }
}

/// The axis of a vector, its first entry, and its numbers as bytes of f64.
fn encode_vector<'py>(py: Python<'py>, vector: &Scalar) -> PyResult<Bound<'py, PyTuple>> {
    let (axis, first, values) = vector.as_vector().expect("a vector is known at each step");
    let axis = if axis == Scope::Column { "column" } else { "row" };
    (axis, first, PyByteArray::new(py, bytemuck::cast_slice(values))).into_pyobject(py)
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

/// What lies in an interval of one key is a bin too. No keys are kept: no memory is left for them.
fn bins(interval: &Interval) -> usize {
    match interval.look {
        Look::Bins(bins) => bins,
        Look::Keys => 1,
    }
}

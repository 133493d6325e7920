//! What a worker does with one unit of a pass.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use super::backend::{
    Arithmetic, Layout, Output, Program, Step, Tally, combine, fold, start_of, steps,
};
use super::control::Control;
use super::passes::{Found, Pass, SearchView};
use super::places::Places;
use super::source::{GRAIN, Place};
use super::task::Task;
use crate::dtype::DType;
use crate::error::{Error, ErrorKind, Result};
use crate::formula::bind::Bindings;
use crate::formula::code::Code;
use crate::formula::machine::{BAND, CHUNK, COLUMN_BLOCK, InputBytes};
use crate::formula::masks::KeptMasks;
use crate::formula::selection::Cut;
use crate::formula::stage::{inputs_of, next_stage, operands, row_reductions, unknown};
use crate::formula::{Reduction, Scalar, Scope, Selection, Value};
use crate::io::{AlignedBuffer, PAGE};
use crate::kernels::BLOCK;

/// Chunks that a sample for a selection looks at, and the bytes of their keys.
const SAMPLED_CHUNKS: u64 = 48;
pub(crate) const SAMPLE_BYTES: u64 = SAMPLED_CHUNKS * CHUNK as u64 * size_of::<u64>() as u64;

/// One thread's buffers.
pub(crate) struct Worker<'a> {
    arithmetic: Box<dyn Arithmetic + 'a>,
    control: &'a Control,
    scratch: Vec<AlignedBuffer>,
    outs: Vec<AlignedBuffer>,
    /// Bytes of output buffers that are in use while inputs are read.
    held: usize,
    /// Bytes that the buffers may have together.
    share: usize,
    /// Elements that may be read at once: a long row or a column block has more than a unit.
    most: u64,
    /// Whether the arithmetic wants as many at once.
    whole: bool,
    /// The random masks that the task in hand keeps.
    masks: Option<Arc<KeptMasks>>,
}

impl<'a> Worker<'a> {
    pub(crate) fn new(
        arithmetic: Box<dyn Arithmetic + 'a>,
        control: &'a Control,
        share: usize,
        whole: bool,
    ) -> Self {
        Self {
            arithmetic,
            control,
            scratch: Vec::new(),
            outs: Vec::new(),
            held: 0,
            share,
            most: 0,
            whole,
            masks: None,
        }
    }

    /// Does unit `unit` of `pass`.
    pub(crate) fn run(
        &mut self,
        task: &Task,
        pass: &Pass,
        unit: u64,
        blocks_a_unit: u64,
        masks: Option<&Arc<KeptMasks>>,
    ) -> Result<Found> {
        self.masks = masks.cloned();
        self.most = blocks_a_unit * BLOCK as u64;
        let first = unit * blocks_a_unit;
        let blocks = first..(first + blocks_a_unit).min(task.blocks());
        let found = match pass {
            Pass::Sample(selections) => self.sample(task, selections),
            Pass::Reduce { reductions, searches } => {
                self.reduce(task, blocks, reductions, searches)
            }
            Pass::Locate { selection, key, cut } => self.locate(task, selection, *key, *cut),
            Pass::Rows(reductions) => self.row(task, unit, reductions),
            Pass::Columns(reductions) => self.columns(task, unit, reductions),
            Pass::Bands(values) => self.band(task, unit, values),
            Pass::Combine(values) => {
                self.combine(task, task.elements_of(blocks), values).map(|()| Found::Nothing)
            }
            Pass::Identical => self.identical(task, blocks),
        };
        self.masks = None;
        found.map_err(|error| error.tensor(&task.frame.name))
    }

    /// Computes `values` over `elements` in steps: reads the inputs of a step, hands a program that
    /// can run it to `then`, and releases the inputs.
    ///
    /// Where `values` need rows to be reduced, whole rows are read and reduced first.
    fn in_steps(
        &mut self,
        task: &Task,
        elements: Range<u64>,
        values: &[Value],
        then: impl FnMut(&mut dyn Program, &Step<'_>) -> Result<()>,
    ) -> Result<()> {
        self.in_steps_and(task, elements, values, then, || Ok(()))
    }

    /// The same; `after` is called when the inputs of a step are not in use any more.
    fn in_steps_and(
        &mut self,
        task: &Task,
        elements: Range<u64>,
        values: &[Value],
        mut then: impl FnMut(&mut dyn Program, &Step<'_>) -> Result<()>,
        mut after: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        let inputs = inputs_of(values);
        let needs_rows = !row_reductions(values).is_empty();
        let code = (!needs_rows).then(|| Code::compile(values)).transpose()?;
        let masks = self.masks.clone();
        let masks = masks.as_deref();
        let program = |code| self.arithmetic.program(&task.frame, code, task.double, masks);
        let mut program = code.as_ref().map(program).transpose()?;
        let far = inputs.iter().any(|&index| task.sources[index].is_far(elements.clone()));
        let once = far && task.reads_once;
        let step =
            if once || self.whole { self.most } else { task.step_elements(&inputs).min(self.most) };
        if far && !once {
            inputs.iter().for_each(|&index| task.sources[index].prefetch(elements.clone()));
        }
        for elements in steps(elements, step) {
            self.control.check()?;
            let read = if needs_rows { whole_rows(task, &elements) } else { elements.clone() };
            self.make_room(task, &inputs, read.end - read.start, once);
            let bytes = read_inputs(task, &inputs, &read, &mut self.scratch, once)?;
            let count = |input: &InputBytes<'_>| input.bytes.len() as u64;
            self.control.add_read(bytes.iter().flatten().map(count).sum());
            if let Some(program) = &mut program {
                then(&mut **program, &Step { elements, inputs: &bytes, values })?;
            } else {
                let values = reduce_rows(&*self.arithmetic, task, &read, &bytes, values)?;
                let code = Code::compile(&values)?;
                let (frame, double) = (&task.frame, task.double);
                let mut program = self.arithmetic.program(frame, &code, double, masks)?;
                then(&mut *program, &Step { elements, inputs: &bytes, values: &values })?;
            }
            drop(bytes);
            after()?;
            for &index in &inputs {
                task.sources[index].release(read.clone());
            }
        }
        Ok(())
    }

    /// Lets go of buffers that earlier tensors needed, where with those that `elements` of this one
    /// need they would be too many.
    fn make_room(&mut self, task: &Task, inputs: &[usize], elements: u64, once: bool) {
        self.scratch.resize_with(task.sources.len().max(self.scratch.len()), Default::default);
        // As they are resident: large ones in huge pages, which they do not fill.
        let held = |buffer: &AlignedBuffer| AlignedBuffer::resident(buffer.capacity());
        // Direct reads take whole pages around the elements.
        let around = if once { 2 * PAGE } else { 0 };
        let bytes =
            |dtype: DType| AlignedBuffer::resident(elements as usize * dtype.size() + around);
        let wanted = |(index, scratch): (usize, &AlignedBuffer)| match task.sources.get(index) {
            Some(source) if inputs.contains(&index) => held(scratch).max(bytes(source.dtype())),
            _ => held(scratch),
        };
        let scratch: usize = self.scratch.iter().enumerate().map(wanted).sum();
        let outs: usize = self.outs.iter().map(held).sum();
        if scratch + outs + self.held > self.share {
            self.scratch.fill_with(Default::default);
            self.outs.fill_with(Default::default);
        }
    }

    /// Keys of some elements spread evenly over the tensor.
    fn sample(&mut self, task: &Task, selections: &[Arc<Selection>]) -> Result<Found> {
        let values: Vec<Value> = selections.iter().map(|s| s.value.clone()).collect();
        let sampled = SAMPLED_CHUNKS as usize * CHUNK;
        let mut keys: Vec<Vec<u64>> = values.iter().map(|_| Vec::with_capacity(sampled)).collect();
        let chunk = CHUNK as u64;
        let stride = task.frame.elements / SAMPLED_CHUNKS;
        for at in 0..SAMPLED_CHUNKS {
            let start = at * stride;
            let range = start..(start + chunk).min(task.frame.elements);
            self.in_steps(task, range, &values, |program, step| {
                let found = program.keys(step)?;
                keys.iter_mut().zip(found).for_each(|(keys, found)| keys.extend(found));
                Ok(())
            })?;
        }
        Ok(Found::Keys(keys))
    }

    fn reduce(
        &mut self,
        task: &Task,
        blocks: Range<u64>,
        reductions: &[Arc<Reduction>],
        searches: &[SearchView],
    ) -> Result<Found> {
        let (layout, mut values) = Layout::of(reductions);
        values.extend(searches.iter().map(|search| search.value.clone()));
        let mut tally = Tally::new(&layout, searches);
        let elements = task.elements_of(blocks.clone());
        self.in_steps(task, elements, &values, |program, step| {
            program.reduce(step, BLOCK as u64, &layout, searches, &mut tally)
        })?;
        let Tally { sums, counts } = tally;
        Ok(Found::Blocks { first: blocks.start, sums, counts })
    }

    fn locate(&mut self, task: &Task, selection: &Selection, key: u64, cut: Cut) -> Result<Found> {
        let elements = task.elements_of(cut.block..cut.block + 1);
        let value = std::slice::from_ref(&selection.value);
        let (mut seen, mut found) = (0, None);
        self.in_steps(task, elements, value, |program, step| {
            for (index, &found_key) in (step.elements.start..).zip(&program.keys(step)?[0]) {
                seen += u64::from(found_key == key);
                if seen == cut.nth {
                    found = found.or(Some(index));
                    break;
                }
            }
            Ok(())
        })?;
        found.map(Found::Index).ok_or_else(|| {
            let message = "an input changed while it was read: a value seen before is not there";
            Error::new(ErrorKind::Changed, message)
        })
    }

    /// One long row, read in steps.
    fn row(&mut self, task: &Task, row: u64, reductions: &[Arc<Reduction>]) -> Result<Found> {
        let (layout, values) = Layout::of(reductions);
        let start = row * task.frame.row;
        let mut tally = Tally::new(&layout, &[]);
        self.in_steps(task, start..start + task.frame.row, &values, |program, step| {
            program.reduce(step, BLOCK as u64, &layout, &[], &mut tally)
        })?;
        let blocks = reductions.iter().zip(&mut tally.sums);
        Ok(Found::Row(blocks.map(|(r, sums)| fold(r.kind, sums)).collect()))
    }

    /// Sums a column over the rows of column block `unit`, in row order.
    fn columns(&mut self, task: &Task, unit: u64, reductions: &[Arc<Reduction>]) -> Result<Found> {
        let (layout, values) = Layout::of(reductions);
        let line = task.frame.line;
        let end = ((unit + 1) * COLUMN_BLOCK * line).min(task.frame.elements);
        let columns = |reduction: &Arc<Reduction>| vec![start_of(reduction.kind); line as usize];
        let mut sums: Vec<Vec<f64>> = reductions.iter().map(columns).collect();
        self.in_steps(task, unit * COLUMN_BLOCK * line..end, &values, |program, step| {
            program.columns(step, step.elements.start % line, &layout, &mut sums)
        })?;
        Ok(Found::Columns(sums))
    }

    /// Reduces the columns of band `unit`, then computes them, both row by row.
    fn band(&mut self, task: &Task, unit: u64, values: &[Value]) -> Result<Found> {
        let line = task.frame.line;
        let columns = unit * BAND..((unit + 1) * BAND).min(line);
        let width = (columns.end - columns.start) as usize;
        let rows = (0..task.frame.elements).step_by(line as usize);
        let rows = rows.map(|row| row + columns.start..row + columns.end);
        let mut values = values.to_vec();
        loop {
            let ready = next_stage(&values, Scope::Column, false).reductions;
            if ready.is_empty() {
                break;
            }
            let (layout, operands) = Layout::of(&ready);
            let mut sums: Vec<Vec<f64>> =
                ready.iter().map(|reduction| vec![start_of(reduction.kind); width]).collect();
            for row in rows.clone() {
                let start = row.start;
                self.in_steps(task, row, &operands, |program, step| {
                    program.columns(step, step.elements.start - start, &layout, &mut sums)
                })?;
            }
            let mut bindings = Bindings::default();
            for (reduction, sums) in ready.iter().zip(sums) {
                bindings.reduction(reduction, Scalar::vector(Scope::Column, columns.start, sums));
            }
            values = bindings.bind_all(&values);
        }
        for row in rows {
            self.combine(task, row, &values)?;
        }
        Ok(Found::Nothing)
    }

    fn combine(&mut self, task: &Task, unit: Range<u64>, values: &[Value]) -> Result<()> {
        if !task.sinks.iter().all(|sink| sink.is_apart()) {
            return self.replace(task, unit, values);
        }
        let mut outs = std::mem::take(&mut self.outs);
        let mut places = Places::of(task, &mut outs, &unit)?;
        let held = |out: &AlignedBuffer| AlignedBuffer::resident(out.capacity());
        self.held = outs.iter().map(held).sum();
        let mut bytes = places.bytes(&mut outs);
        let computed = self.in_steps(task, unit.clone(), values, |program, step| {
            let outputs = task.sinks.iter().zip(&mut bytes).enumerate();
            let outputs = outputs.map(|(result, (sink, bytes))| {
                let dtype = sink.dtype();
                let at = |index: u64| (index - unit.start) as usize * dtype.size();
                let bytes = &mut bytes[at(step.elements.start)..at(step.elements.end)];
                Output { result, dtype, bytes }
            });
            combine(program, step, outputs)
        });
        let written = computed.and_then(|()| places.write(task, &outs, self.control));
        (self.outs, self.held) = (outs, 0);
        written
    }

    /// The same where outputs are inputs: a few elements at a time are computed apart, and put where
    /// they belong when their inputs are not in use any more.
    fn replace(&mut self, task: &Task, unit: Range<u64>, values: &[Value]) -> Result<()> {
        self.most = self.most.min(GRAIN as u64);
        let apart = RefCell::new((unit.start..unit.start, vec![Vec::new(); task.sinks.len()]));
        let compute = |program: &mut dyn Program, step: &Step<'_>| {
            let (elements, buffers) = &mut *apart.borrow_mut();
            elements.clone_from(&step.elements);
            let count = (elements.end - elements.start) as usize;
            let outputs = task.sinks.iter().zip(buffers).enumerate();
            let outputs = outputs.map(|(result, (sink, buffer))| {
                let dtype = sink.dtype();
                buffer.resize(count * dtype.size(), 0);
                Output { result, dtype, bytes: buffer }
            });
            combine(program, step, outputs)
        };
        let control = self.control;
        let put = || {
            let (elements, buffers) = &*apart.borrow();
            for (sink, buffer) in task.sinks.iter().zip(buffers) {
                if let Some(Place(bytes)) = sink.place(elements) {
                    bytes.copy_from_slice(buffer);
                }
                control.add_written(buffer.len() as u64);
            }
            Ok(())
        };
        self.in_steps_and(task, unit, values, compute, put)
    }

    /// Copies what all sources agree on.
    fn identical(&mut self, task: &Task, blocks: Range<u64>) -> Result<Found> {
        check_one_type(task)?;
        let range = task.elements_of(blocks);
        self.make_room(task, &[0, 1], range.end - range.start, false);
        self.scratch.resize_with(self.scratch.len().max(2), Default::default);
        let [scratch, other_scratch, ..] = self.scratch.as_mut_slice() else { unreachable!() };
        let first = task.sources[0].read(range.clone(), scratch)?;
        for (source, label) in task.sources.iter().zip(&task.labels).skip(1) {
            self.control.check()?;
            let other = source.read(range.clone(), other_scratch)?;
            if first != other {
                return Err(differs(task, label));
            }
            source.release(range.clone());
        }
        self.control.add_read(first.len() as u64 * task.sources.len() as u64);
        let mut places = Places::of(task, &mut self.outs, &range)?;
        for bytes in places.bytes(&mut self.outs) {
            bytes.copy_from_slice(first);
        }
        places.write(task, &self.outs, self.control)?;
        task.sources[0].release(range);
        Ok(Found::Nothing)
    }
}

/// Copied bytes mean the same only in the same type.
fn check_one_type(task: &Task) -> Result<()> {
    let first = task.sources[0].dtype();
    let sources = task.sources.iter().map(|source| source.dtype());
    let mut types = sources.chain(task.sinks.iter().map(|sink| sink.dtype()));
    types.find(|&dtype| dtype != first).map_or(Ok(()), |other| {
        Err(Error::plan("a tensor that is copied must have one type, also as the output")
            .expected(first)
            .found(other)
            .advice("give an output of that type"))
    })
}

#[cold]
fn differs(task: &Task, label: &str) -> Error {
    Error::plan("integer and bool tensors are copied, and so must be the same in every model")
        .expected(format!("the bytes of {}", task.labels[0]))
        .found(format!("others in {label}"))
        .advice("leave one of the models out, or make the tensors equal first")
}

/// Reads `elements` of the sources `inputs`; the others stay absent.
fn read_inputs<'a>(
    task: &'a Task,
    inputs: &[usize],
    elements: &Range<u64>,
    scratch: &'a mut [AlignedBuffer],
    once: bool,
) -> Result<Vec<Option<InputBytes<'a>>>> {
    let mut all = Vec::with_capacity(task.sources.len());
    for (index, (source, scratch)) in task.sources.iter().zip(scratch).enumerate() {
        if !inputs.contains(&index) {
            all.push(None);
            continue;
        }
        let bytes = if once {
            source.read_once(elements.clone(), scratch)?
        } else {
            source.read(elements.clone(), scratch)?
        };
        all.push(Some(InputBytes { dtype: source.dtype(), first: elements.start, bytes }));
    }
    Ok(all)
}

/// The rows that `elements` touch, whole.
fn whole_rows(task: &Task, elements: &Range<u64>) -> Range<u64> {
    let row = task.frame.row;
    elements.start / row * row..(elements.end.div_ceil(row) * row).min(task.frame.elements)
}

/// `values` with the reductions over the rows of `read` put in.
fn reduce_rows(
    arithmetic: &dyn Arithmetic,
    task: &Task,
    read: &Range<u64>,
    inputs: &[Option<InputBytes<'_>>],
    values: &[Value],
) -> Result<Vec<Value>> {
    let mut values = values.to_vec();
    loop {
        let mut ready = row_reductions(&values);
        ready.retain(|reduction| unknown(&operands(reduction)).is_empty());
        if ready.is_empty() {
            return Ok(values);
        }
        let (layout, operands) = Layout::of(&ready);
        let code = Code::compile(&operands)?;
        // Rows begin anywhere, so kept masks are of no use.
        let mut program = arithmetic.program(&task.frame, &code, task.double, None)?;
        let step = Step { elements: read.clone(), inputs, values: &operands };
        let mut tally = Tally::new(&layout, &[]);
        program.reduce(&step, task.frame.row, &layout, &[], &mut tally)?;
        let mut bindings = Bindings::default();
        for (reduction, results) in ready.iter().zip(tally.sums) {
            let first = read.start / task.frame.row;
            bindings.reduction(reduction, Scalar::vector(Scope::Row, first, results));
        }
        values = bindings.bind_all(&values);
    }
}

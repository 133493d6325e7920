//! What a worker does with one unit of a pass.

use std::ops::Range;
use std::sync::Arc;

use super::control::Control;
use super::source::{Place, Sink};
use super::task::{Found, Pass, SearchView, Task, max};
use crate::dtype::DType;
use crate::error::{Error, ErrorKind, Result};
use crate::formula::bind::Bindings;
use crate::formula::code::Code;
use crate::formula::machine::{CHUNK, COLUMN_BLOCK, InputBytes, Machine};
use crate::formula::masks::KeptMasks;
use crate::formula::selection::{Cut, Histogram};
use crate::formula::stage::{inputs_of, operands, row_reductions, unknown};
use crate::formula::{Reduction, ReductionKind, Scalar, Scope, Selection, Value};
use crate::io::AlignedBuffer;
use crate::kernels::{self, BLOCK, LANES, Lanes, Level, Real, fold_halves};

/// Chunks that a sample for a selection looks at, and the bytes of their keys.
const SAMPLED_CHUNKS: u64 = 48;
pub(crate) const SAMPLE_BYTES: u64 = SAMPLED_CHUNKS * CHUNK as u64 * size_of::<u64>() as u64;

/// A part of a unit whose inputs are at hand.
pub(crate) struct Step<'a> {
    /// The elements to compute.
    pub(crate) elements: Range<u64>,
    /// The bytes of the inputs that are used.
    pub(crate) inputs: &'a [Option<InputBytes<'a>>],
    /// What the machine computes, with the results of row reductions put in.
    pub(crate) values: &'a [Value],
}

/// Where the elements of a step go in one of the outputs.
pub(crate) struct Output<'a> {
    pub(crate) dtype: DType,
    pub(crate) bytes: &'a mut [u8],
}

/// One thread's buffers.
#[derive(Debug)]
pub(crate) struct Worker<'a> {
    pub(crate) level: Level,
    pub(crate) control: &'a Control,
    scratch: Vec<AlignedBuffer>,
    outs: Vec<AlignedBuffer>,
    /// Bytes of output buffers that are in use while inputs are read.
    held: usize,
    /// Bytes that the buffers may have together.
    share: usize,
    /// Elements that may be read at once: a long row or a column block has more than a unit.
    most: u64,
    /// The random masks that the task in hand keeps.
    masks: Option<Arc<KeptMasks>>,
}

impl<'a> Worker<'a> {
    pub(crate) fn new(level: Level, control: &'a Control, share: usize) -> Self {
        Self {
            level,
            control,
            scratch: Vec::new(),
            outs: Vec::new(),
            held: 0,
            share,
            most: 0,
            masks: None,
        }
    }

    /// Does unit `unit` of `pass`.
    pub(crate) fn run<T: Real>(
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
            Pass::Sample(selections) => self.sample::<T>(task, selections),
            Pass::Reduce { reductions, searches } => {
                self.reduce::<T>(task, blocks, reductions, searches)
            }
            Pass::Locate { selection, key, cut } => self.locate::<T>(task, selection, *key, *cut),
            Pass::Rows(reductions) => self.row::<T>(task, unit, reductions),
            Pass::Columns(reductions) => self.columns::<T>(task, unit, reductions),
            Pass::Combine(values) => self.combine::<T>(task, blocks, values),
            Pass::Identical => self.identical(task, blocks),
        };
        self.masks = None;
        found.map_err(|error| error.tensor(&task.frame.name))
    }

    /// Computes `values` over `elements` in steps: reads the inputs of a step, hands a machine that
    /// can run any chunk of it to `then`, and releases the inputs.
    ///
    /// Where `values` need rows to be reduced, whole rows are read and reduced first.
    fn in_steps<T: Real>(
        &mut self,
        task: &Task,
        elements: Range<u64>,
        values: &[Value],
        mut then: impl FnMut(&mut Machine<'_, T>, &Step<'_>) -> Result<()>,
    ) -> Result<()> {
        let inputs = inputs_of(values);
        let needs_rows = !row_reductions(values).is_empty();
        let code = (!needs_rows).then(|| Code::compile(values));
        let masks = self.masks.clone();
        let masks = masks.as_deref();
        let machine = |code| Machine::<T>::new(self.level, &task.frame, code, masks);
        let mut machine = code.as_ref().map(machine);
        let far = inputs.iter().any(|&index| task.sources[index].is_far(elements.clone()));
        let once = far && task.reads_once;
        let step = if once { self.most } else { task.step_elements(&inputs).min(self.most) };
        if far && !once {
            inputs.iter().for_each(|&index| task.sources[index].prefetch(elements.clone()));
        }
        for elements in steps(elements, step) {
            if self.control.is_cancelled() {
                return Err(Error::new(ErrorKind::Interrupted, "interrupted"));
            }
            let read = if needs_rows { whole_rows(task, &elements) } else { elements.clone() };
            self.make_room(task, &inputs, read.end - read.start);
            let bytes = read_inputs(task, &inputs, &read, &mut self.scratch, once)?;
            let count = |input: &InputBytes<'_>| input.bytes.len() as u64;
            self.control.add_read(bytes.iter().flatten().map(count).sum());
            if let Some(machine) = &mut machine {
                then(machine, &Step { elements, inputs: &bytes, values })?;
            } else {
                let values = reduce_rows::<T>(self.level, task, &read, &bytes, values);
                let code = Code::compile(&values);
                let mut machine = Machine::<T>::new(self.level, &task.frame, &code, masks);
                then(&mut machine, &Step { elements, inputs: &bytes, values: &values })?;
            }
            for &index in &inputs {
                task.sources[index].release(read.clone());
            }
        }
        Ok(())
    }

    /// Lets go of buffers that earlier tensors needed, where with those that `elements` of this one
    /// need they would be too many.
    fn make_room(&mut self, task: &Task, inputs: &[usize], elements: u64) {
        self.scratch.resize_with(task.sources.len().max(self.scratch.len()), Default::default);
        let bytes = |dtype: DType| elements as usize * dtype.size();
        let wanted = |(index, scratch): (usize, &AlignedBuffer)| match task.sources.get(index) {
            Some(source) if inputs.contains(&index) => {
                scratch.capacity().max(bytes(source.dtype()))
            }
            _ => scratch.capacity(),
        };
        let scratch: usize = self.scratch.iter().enumerate().map(wanted).sum();
        let outs: usize = self.outs.iter().map(AlignedBuffer::capacity).sum();
        if scratch + outs + self.held > self.share {
            self.scratch.fill_with(Default::default);
            self.outs.fill_with(Default::default);
        }
    }

    /// Keys of some elements spread evenly over the tensor.
    fn sample<T: Real>(&mut self, task: &Task, selections: &[Arc<Selection>]) -> Result<Found> {
        let values: Vec<Value> = selections.iter().map(|s| s.value.clone()).collect();
        let sampled = SAMPLED_CHUNKS as usize * CHUNK;
        let mut keys: Vec<Vec<u64>> = values.iter().map(|_| Vec::with_capacity(sampled)).collect();
        let chunk = CHUNK as u64;
        let stride = task.frame.elements / SAMPLED_CHUNKS;
        for at in 0..SAMPLED_CHUNKS {
            let start = at * stride;
            let range = start..(start + chunk).min(task.frame.elements);
            self.in_steps::<T>(task, range, &values, |machine, step| {
                machine.run(&step.elements, step.inputs);
                for (index, keys) in keys.iter_mut().enumerate() {
                    keys.extend(machine.chunk(index).iter().map(|value| value.key()));
                }
                Ok(())
            })?;
        }
        Ok(Found::Keys(keys))
    }

    fn reduce<T: Real>(
        &mut self,
        task: &Task,
        blocks: Range<u64>,
        reductions: &[Arc<Reduction>],
        searches: &[SearchView],
    ) -> Result<Found> {
        let (layout, mut values) = Layout::of(reductions);
        values.extend(searches.iter().map(|search| search.value.clone()));
        let mut sums = vec![Vec::new(); reductions.len()];
        let mut counts: Vec<Histogram> =
            searches.iter().map(|search| Histogram::new(search.bins)).collect();
        let level = self.level;
        let pair = super::fused::pair(task, reductions).filter(|_| searches.is_empty());
        let elements = task.elements_of(blocks.clone());
        self.in_steps::<T>(task, elements, &values, |machine, step| {
            for block in steps(step.elements.clone(), BLOCK as u64) {
                let mut lanes = layout.lanes();
                if let Some(pair) = pair {
                    lanes = super::fused::products(level, step.inputs, pair, &block);
                } else {
                    for range in chunks(block.clone()) {
                        machine.run(&range, step.inputs);
                        layout.accumulate(level, machine, &mut lanes);
                        let searches = searches.iter().zip(&mut counts);
                        for (at, (view, histogram)) in searches.enumerate() {
                            let values = machine.chunk(layout.operands + at);
                            count(level, view, &values, block.start / BLOCK as u64, histogram);
                        }
                    }
                }
                for (sums, sum) in sums.iter_mut().zip(layout.fold(lanes)) {
                    sums.push(sum);
                }
            }
            Ok(())
        })?;
        Ok(Found::Blocks { first: blocks.start, sums, counts })
    }

    fn locate<T: Real>(
        &mut self,
        task: &Task,
        selection: &Selection,
        key: u64,
        cut: Cut,
    ) -> Result<Found> {
        let elements = task.elements_of(cut.block..cut.block + 1);
        let value = std::slice::from_ref(&selection.value);
        let (mut nth, mut found) = (cut.nth, None);
        self.in_steps::<T>(task, elements, value, |machine, step| {
            for range in chunks(step.elements.clone()) {
                machine.run(&range, step.inputs);
                let values = machine.chunk(0);
                for (offset, _) in values.iter().enumerate().filter(|(_, v)| v.key() == key) {
                    nth -= 1;
                    if nth == 0 {
                        found = Some(range.start + offset as u64);
                        return Ok(());
                    }
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
    fn row<T: Real>(
        &mut self,
        task: &Task,
        row: u64,
        reductions: &[Arc<Reduction>],
    ) -> Result<Found> {
        let (layout, values) = Layout::of(reductions);
        let start = row * task.frame.row;
        let mut blocks: Vec<Vec<f64>> = vec![Vec::new(); reductions.len()];
        let level = self.level;
        self.in_steps::<T>(task, start..start + task.frame.row, &values, |machine, step| {
            for block in steps(step.elements.clone(), BLOCK as u64) {
                let results = layout.block(level, machine, block, step.inputs);
                blocks.iter_mut().zip(results).for_each(|(sums, sum)| sums.push(sum));
            }
            Ok(())
        })?;
        let folded = reductions.iter().zip(&mut blocks).map(|(r, sums)| fold(r.kind, sums));
        Ok(Found::Row(folded.collect()))
    }

    /// Sums a column over the rows of column block `unit`, in row order.
    fn columns<T: Real>(
        &mut self,
        task: &Task,
        unit: u64,
        reductions: &[Arc<Reduction>],
    ) -> Result<Found> {
        let (layout, values) = Layout::of(reductions);
        let line = task.frame.line;
        let end = ((unit + 1) * COLUMN_BLOCK * line).min(task.frame.elements);
        let columns = |reduction: &Arc<Reduction>| vec![start_of(reduction.kind); line as usize];
        let mut sums: Vec<Vec<f64>> = reductions.iter().map(columns).collect();
        self.in_steps::<T>(task, unit * COLUMN_BLOCK * line..end, &values, |machine, step| {
            for range in chunks(step.elements.clone()) {
                machine.run(&range, step.inputs);
                layout.add_to_columns(machine, &range, line, &mut sums);
            }
            Ok(())
        })?;
        Ok(Found::Columns(sums))
    }

    fn combine<T: Real>(
        &mut self,
        task: &Task,
        blocks: Range<u64>,
        values: &[Value],
    ) -> Result<Found> {
        let unit = task.elements_of(blocks);
        let level = self.level;
        let mut outs = std::mem::take(&mut self.outs);
        let mut places = Places::of(task, &mut outs, &unit);
        self.held = outs.iter().map(AlignedBuffer::capacity).sum();
        let mut bytes = places.bytes(&mut outs);
        let computed = self.in_steps::<T>(task, unit.clone(), values, |machine, step| {
            let outputs = task.sinks.iter().zip(&mut bytes);
            let mut outputs: Vec<Output<'_>> = outputs
                .map(|(sink, bytes)| {
                    let dtype = sink.dtype();
                    let at = |index: u64| (index - unit.start) as usize * dtype.size();
                    let range = at(step.elements.start)..at(step.elements.end);
                    Output { dtype, bytes: &mut bytes[range] }
                })
                .collect();
            if !super::fused::run(level, step, &mut outputs) {
                interpret(level, machine, step, &mut outputs);
            }
            Ok(())
        });
        let written = computed.and_then(|()| places.write(task, &outs, self.control));
        (self.outs, self.held) = (outs, 0);
        written.map(|()| Found::Nothing)
    }

    /// Copies what all sources agree on.
    fn identical(&mut self, task: &Task, blocks: Range<u64>) -> Result<Found> {
        let range = task.elements_of(blocks);
        self.make_room(task, &[0, 1], range.end - range.start);
        self.scratch.resize_with(self.scratch.len().max(2), Default::default);
        let [scratch, other_scratch, ..] = self.scratch.as_mut_slice() else { unreachable!() };
        let first = task.sources[0].read(range.clone(), scratch)?;
        for (source, label) in task.sources.iter().zip(&task.labels).skip(1) {
            let other = source.read(range.clone(), other_scratch)?;
            if first != other {
                return Err(differs(task, label));
            }
            source.release(range.clone());
        }
        self.control.add_read(first.len() as u64 * task.sources.len() as u64);
        let mut places = Places::of(task, &mut self.outs, &range);
        for bytes in places.bytes(&mut self.outs) {
            bytes.copy_from_slice(first);
        }
        places.write(task, &self.outs, self.control)?;
        task.sources[0].release(range);
        Ok(Found::Nothing)
    }
}

#[cold]
fn differs(task: &Task, label: &str) -> Error {
    Error::plan("integer and bool tensors are copied, and so must be the same in every model")
        .expected(format!("the bytes of {}", task.labels[0]))
        .found(format!("others in {label}"))
        .advice("leave one of the models out, or make the tensors equal first")
}

/// Where the bytes of some elements go in each output: into memory of the sink's own, or into a part
/// of a buffer that is then handed to the sink.
struct Places<'a> {
    first: u64,
    own: Vec<Option<Place<'a>>>,
    buffered: Vec<Range<usize>>,
}

impl<'a> Places<'a> {
    /// Makes room for `elements` in `outs`, a buffer for each sink that has no memory of its own.
    fn of(task: &'a Task, outs: &mut Vec<AlignedBuffer>, elements: &Range<u64>) -> Self {
        outs.resize_with(task.sinks.len().max(outs.len()), Default::default);
        let own: Vec<_> = task.sinks.iter().map(|sink| sink.place(elements)).collect();
        let buffered = |(sink, (own, out)): (&Arc<dyn Sink>, (&Option<_>, &mut AlignedBuffer))| {
            let bytes = (elements.end - elements.start) as usize * sink.dtype().size();
            if own.is_some() {
                return 0..bytes;
            }
            let start = sink.buffer_offset(elements.start);
            out.grow(start + bytes);
            start..start + bytes
        };
        let buffered = task.sinks.iter().zip(own.iter().zip(outs)).map(buffered).collect();
        Self { first: elements.start, own, buffered }
    }

    fn bytes<'b>(&'b mut self, outs: &'b mut [AlignedBuffer]) -> Vec<&'b mut [u8]> {
        let each = self.own.iter_mut().zip(self.buffered.iter().zip(outs));
        each.map(|(own, (buffered, out))| match own {
            Some(Place(bytes)) => &mut **bytes,
            None => &mut out.as_mut_slice()[buffered.clone()],
        })
        .collect()
    }

    /// Hands what is in buffers to the sinks.
    fn write(&self, task: &Task, outs: &[AlignedBuffer], control: &Control) -> Result<()> {
        let each = self.own.iter().zip(self.buffered.iter().zip(outs));
        for (sink, (own, (buffered, out))) in task.sinks.iter().zip(each) {
            if own.is_none() {
                sink.write(self.first, out, buffered.clone())?;
            }
            control.add_written(buffered.len() as u64);
        }
        Ok(())
    }
}

/// The general way to compute the outputs: chunk by chunk, in slots.
fn interpret<T: Real>(
    level: Level,
    machine: &mut Machine<'_, T>,
    step: &Step<'_>,
    outputs: &mut [Output<'_>],
) {
    for chunk in chunks(step.elements.clone()) {
        machine.run(&chunk, step.inputs);
        for (index, output) in outputs.iter_mut().enumerate() {
            let (dtype, first) = (output.dtype, step.elements.start);
            let at = |index: u64| (index - first) as usize * dtype.size();
            let bytes = &mut output.bytes[at(chunk.start)..at(chunk.end)];
            if dtype == DType::Bool {
                kernels::narrow_to_bool(level, &machine.chunk(index), bytes);
            } else {
                kernels::narrow(level, &machine.chunk(index), dtype, bytes);
            }
        }
    }
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

/// Reductions laid out as operands: which results of the machine each of them uses.
struct Layout {
    kinds: Vec<(ReductionKind, usize, Option<usize>)>,
    operands: usize,
}

impl Layout {
    fn of(reductions: &[Arc<Reduction>]) -> (Self, Vec<Value>) {
        let (mut kinds, mut values) = (Vec::new(), Vec::new());
        for reduction in reductions {
            let left = values.len();
            values.extend(operands(reduction));
            kinds.push((reduction.kind, left, reduction.right.as_ref().map(|_| left + 1)));
        }
        (Self { kinds, operands: values.len() }, values)
    }

    fn lanes(&self) -> Vec<Lanes> {
        self.kinds.iter().map(|&(kind, ..)| [start_of(kind); LANES]).collect()
    }

    fn accumulate<T: Real>(&self, level: Level, machine: &Machine<'_, T>, lanes: &mut [Lanes]) {
        for (&(kind, left, right), lanes) in self.kinds.iter().zip(lanes) {
            let a = machine.chunk(left);
            match kind {
                ReductionKind::Sum => kernels::sum_into(level, &a, lanes),
                ReductionKind::AbsoluteSum => kernels::absolute_sum_into(level, &a, lanes),
                ReductionKind::Max => kernels::max_into(level, &a, lanes),
                ReductionKind::Dot => {
                    let b = machine.chunk(right.unwrap_or(left));
                    kernels::dot_into(level, &a, &b, lanes);
                }
            }
        }
    }

    fn fold(&self, lanes: Vec<Lanes>) -> Vec<f64> {
        let folded = self.kinds.iter().zip(lanes);
        folded.map(|(&(kind, ..), lanes)| fold(kind, &mut lanes.to_vec())).collect()
    }

    /// Reduces one block, which begins at element `block.start`.
    fn block<T: Real>(
        &self,
        level: Level,
        machine: &mut Machine<'_, T>,
        block: Range<u64>,
        inputs: &[Option<InputBytes<'_>>],
    ) -> Vec<f64> {
        let mut lanes = self.lanes();
        for range in chunks(block) {
            machine.run(&range, inputs);
            self.accumulate(level, machine, &mut lanes);
        }
        self.fold(lanes)
    }

    fn add_to_columns<T: Real>(
        &self,
        machine: &Machine<'_, T>,
        range: &Range<u64>,
        line: u64,
        sums: &mut [Vec<f64>],
    ) {
        for (&(kind, left, right), sums) in self.kinds.iter().zip(sums) {
            let (a, b) = (machine.chunk(left), machine.chunk(right.unwrap_or(left)));
            for (offset, (a, b)) in a.iter().zip(b.iter()).enumerate() {
                let sum = &mut sums[((range.start + offset as u64) % line) as usize];
                *sum = match kind {
                    ReductionKind::Sum => *sum + a.to_f64(),
                    ReductionKind::AbsoluteSum => *sum + a.to_f64().abs(),
                    ReductionKind::Dot => *sum + a.to_f64() * b.to_f64(),
                    ReductionKind::Max => max(*sum, a.to_f64()),
                };
            }
        }
    }
}

/// What a reduction of nothing gives.
fn start_of(kind: ReductionKind) -> f64 {
    if kind == ReductionKind::Max { f64::NEG_INFINITY } else { 0.0 }
}

pub(crate) fn fold(kind: ReductionKind, values: &mut Vec<f64>) -> f64 {
    match kind {
        ReductionKind::Max => values.iter().copied().fold(f64::NEG_INFINITY, max),
        _ => fold_halves(values),
    }
}

fn count<T: Real>(
    level: Level,
    view: &SearchView,
    values: &[T],
    block: u64,
    histogram: &mut Histogram,
) {
    let counts = if view.low == view.high {
        let counts = kernels::count(level, values, view.low, view.high);
        histogram.bins[0] += counts.inside as u32;
        counts
    } else {
        kernels::histogram(level, values, view.low, view.high, view.shift, &mut histogram.bins)
    };
    histogram.count(block, counts);
}

/// The rows that `elements` touch, whole.
fn whole_rows(task: &Task, elements: &Range<u64>) -> Range<u64> {
    let row = task.frame.row;
    elements.start / row * row..(elements.end.div_ceil(row) * row).min(task.frame.elements)
}

/// `values` with the reductions over the rows of `read` put in.
fn reduce_rows<T: Real>(
    level: Level,
    task: &Task,
    read: &Range<u64>,
    inputs: &[Option<InputBytes<'_>>],
    values: &[Value],
) -> Vec<Value> {
    let mut values = values.to_vec();
    loop {
        let mut ready = row_reductions(&values);
        ready.retain(|reduction| unknown(&operands(reduction)).is_empty());
        if ready.is_empty() {
            return values;
        }
        let (layout, operands) = Layout::of(&ready);
        let code = Code::compile(&operands);
        // Rows begin anywhere, so kept masks are of no use.
        let mut machine = Machine::<T>::new(level, &task.frame, &code, None);
        let mut results: Vec<Vec<f64>> = vec![Vec::new(); ready.len()];
        for row in steps(read.clone(), task.frame.row) {
            let row = layout.block(level, &mut machine, row, inputs);
            results.iter_mut().zip(row).for_each(|(results, result)| results.push(result));
        }
        let mut bindings = Bindings::default();
        for (reduction, results) in ready.iter().zip(results) {
            let first = read.start / task.frame.row;
            bindings.reduction(reduction, Scalar::vector(Scope::Row, first, results));
        }
        values = bindings.bind_all(&values);
    }
}

/// `range` cut into parts of `length`; the last may be shorter.
fn steps(range: Range<u64>, length: u64) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    range.step_by(length as usize).map(move |start| start..end.min(start.saturating_add(length)))
}

fn chunks(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    steps(range, CHUNK as u64)
}

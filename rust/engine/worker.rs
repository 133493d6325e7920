//! What a worker does with one unit of a pass.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::{Arc, PoisonError};

use super::ahead::{Ahead, Held};
use super::backend::{Arithmetic, Results, Run, Step, fold, steps};
use super::control::Control;
use super::digest::{AT_ONCE, Node};
use super::passes::{Found, Marked, Pass, References};
use super::places::Places;
use super::simd::{draws_of, picked};
use super::source::{GRAIN, Place, Sink};
use super::task::{Task, Work};
use crate::dtype::DType;
use crate::error::{Error, ErrorKind, Result};
use crate::formula::compile::{Given, Level as Rows, Staged};
use crate::formula::machine::{BAND, COLUMN_BLOCK, InputBytes, Known, RANKED_AT_ONCE, TensorFrame};
use crate::formula::masks::Marks;
use crate::formula::program::{Along, Effect, Program};
use crate::formula::selection::{Counted, LastKept, RUN, Wanted, sampled_runs};
use crate::formula::{Pick, Ranking, Scope};
use crate::io::{AlignedBuffer, PAGE};
use crate::kernels::{self, BLOCK, Descent, Level, MaskKey, Ordinal, Picked, Ranker, SPAN};
use crate::plan::ArrayCall;

/// Elements of a tensor that may be asked for all at once.
const PREFETCHED_WHOLE: u64 = 32 << 20;

/// A program, and how it comes to what it is given.
#[derive(Clone, Copy)]
enum Code<'a> {
    /// Every step is given the same.
    Given(&'a Program, &'a Given),
    /// What whole vectors give is found in each step, whose elements they lie around. Of these rankings
    /// what is kept is marked for later passes.
    Staged(&'a Staged, &'a [Marked]),
}

impl<'a> Code<'a> {
    fn program(&self) -> &'a Program {
        match self {
            Self::Given(program, _) => program,
            Self::Staged(code, _) => &code.program,
        }
    }
}

impl<'a> From<&'a Staged> for Code<'a> {
    fn from(code: &'a Staged) -> Self {
        Self::Staged(code, &[])
    }
}

/// One thread's buffers.
pub(crate) struct Worker<'a> {
    arithmetic: Box<dyn Arithmetic + 'a>,
    control: &'a Control,
    scratch: Vec<AlignedBuffer>,
    outs: Vec<AlignedBuffer>,
    /// Bytes of output buffers that are in use while inputs are read.
    held: usize,
    /// Bytes that the buffers may have together.
    allowance: usize,
    /// Elements that may be read at once: a long row or a column block has more than a unit.
    most: u64,
    /// Whether the arithmetic wants as many at once.
    whole: bool,
    /// The instruction set of what is not the backend's.
    level: Level,
    /// What is known of the task in hand.
    known: Arc<Known>,
}

impl<'a> Worker<'a> {
    pub(crate) fn new(
        arithmetic: Box<dyn Arithmetic + 'a>,
        control: &'a Control,
        allowance: usize,
        whole: bool,
        level: Level,
    ) -> Self {
        Self {
            arithmetic,
            control,
            scratch: Vec::new(),
            outs: Vec::new(),
            held: 0,
            allowance,
            most: 0,
            whole,
            level,
            known: Arc::default(),
        }
    }

    /// How many elements of what was read are computed at once: of what is hashed and compared so few
    /// that they are still in the cache then. A device wants all.
    fn at_once(&self, task: &Task) -> u64 {
        let is_digested = task.sinks.iter().any(|sink| sink.digester().is_some());
        if is_digested && !self.whole { AT_ONCE } else { u64::MAX }
    }

    /// Does unit `unit` of `pass`.
    pub(crate) fn run(
        &mut self,
        task: &Task,
        pass: &Pass,
        unit: u64,
        blocks_a_unit: u64,
        known: &Arc<Known>,
    ) -> Result<Found> {
        self.known = Arc::clone(known);
        self.most = blocks_a_unit * BLOCK as u64;
        let first = unit * blocks_a_unit;
        let blocks = first..(first + blocks_a_unit).min(task.blocks());
        let found = match pass {
            Pass::Sample { wanted, code } => self.sample(task, wanted, code),
            Pass::Reduce { marks, code, ahead, .. } => {
                self.reduce(task, blocks, marks, code, ahead.as_deref())
            }
            Pass::Locate { key, last, code, .. } => self.locate(task, *key, *last, code),
            Pass::Rows(code) if task.frame.stores_rows() => self.row(task, unit, code),
            Pass::Rows(code) => self.rows(task, blocks, code),
            Pass::Rank { marks, code } => self.rank(task, unit, marks, code),
            Pass::Columns(code) => self.columns(task, unit, code),
            Pass::Bands { references, code } => self.band(task, unit, references, code),
            Pass::Combine { references, code, held } => {
                let held = held.get(unit as usize);
                let held = held
                    .and_then(|held| held.lock().unwrap_or_else(PoisonError::into_inner).take());
                let unit = task.elements_of(blocks);
                let written = match held {
                    Some(held) => self.settle(task, unit, references, code, held),
                    None => self.combine(task, unit, references, code.into()),
                };
                written.map(|()| Found::Nothing)
            }
            Pass::Arrays => self.arrays(task, unit).map(|()| Found::Nothing),
            Pass::Identical => self.identical(task, blocks),
        };
        self.known = Arc::default();
        found.map_err(|error| error.tensor(&task.frame.name))
    }

    /// Runs `code` over the elements of `parts`, in steps: reads the inputs of a step, hands it to
    /// `then` with the program that can run it, and releases the inputs.
    fn in_steps<'b>(
        &mut self,
        task: &Task,
        parts: impl IntoIterator<Item = Range<u64>>,
        code: impl Into<Code<'b>>,
        then: impl FnMut(&mut dyn Run, Step<'_>) -> Result<()>,
    ) -> Result<()> {
        self.in_steps_and(task, parts, code.into(), then, || Ok(()))
    }

    /// The same; `after` is called when the inputs of a step are not in use any more.
    fn in_steps_and(
        &mut self,
        task: &Task,
        parts: impl IntoIterator<Item = Range<u64>>,
        code: Code<'_>,
        mut then: impl FnMut(&mut dyn Run, Step<'_>) -> Result<()>,
        mut after: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        let frame = &task.frame;
        let known = Arc::clone(&self.known);
        let mut program = self.arithmetic.begin(frame, code.program(), &known)?;
        let (inputs, spans, least) = match code {
            Code::Given(program, _) => (&program.inputs, None, 0),
            Code::Staged(code, _) => {
                (&code.inputs, frame.widest(&code.among), code.least_step(frame))
            }
        };
        for part in parts {
            let far = inputs.iter().any(|&index| task.sources[index].is_far(part.clone()));
            let once = far && task.reads_once;
            let mut at_once = if once || self.whole {
                self.most
            } else {
                task.step_elements(inputs).max(least).min(self.most)
            };
            // No segment goes on in another step, if one has room for it.
            if let Along::Segments(length) = code.program().along
                && at_once > length
            {
                at_once -= at_once % length;
            }
            if far && !once {
                inputs.iter().for_each(|&index| task.sources[index].prefetch(part.clone()));
            }
            for elements in steps(part, at_once) {
                self.control.check()?;
                let read = match spans {
                    Some(spans) => spans.whole(&elements, frame.elements),
                    None => elements.clone(),
                };
                self.make_room(task, inputs, read.end - read.start, once);
                let bytes = read_inputs(task, inputs, &read, &mut self.scratch, once)?;
                let count =
                    |&index: &usize| task.sources[index].stored_bytes(read.end - read.start);
                self.control.add_read(inputs.iter().map(count).sum());
                let found;
                let given = match code {
                    Code::Given(_, given) => given,
                    Code::Staged(code, marks) => {
                        let (arithmetic, level) = (&*self.arithmetic, self.level);
                        found = given_by_row(
                            arithmetic, frame, &known, &read, &bytes, code, marks, level,
                        )?;
                        &found
                    }
                };
                then(&mut *program, Step { elements, inputs: &bytes, given, column: 0 })?;
                drop(bytes);
                after()?;
                for &index in inputs {
                    task.sources[index].release(read.clone());
                }
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
        if scratch + outs + self.held > self.allowance {
            self.scratch.fill_with(Default::default);
            self.outs.fill_with(Default::default);
        }
    }

    /// Guesses where thresholds lie from runs of elements spread evenly over the tensor.
    fn sample(&mut self, task: &Task, wanted: &[Wanted], code: &Staged) -> Result<Found> {
        let (runs, run) = (sampled_runs(task.frame.elements), RUN as u64);
        let mut results = Results::of(&code.program);
        results.keys.iter_mut().for_each(|keys| keys.reserve_exact((runs * run) as usize));
        let stride = task.frame.elements / runs;
        let parts = (0..runs).map(|at| at * stride);
        let parts = parts.map(|start| start..(start + run).min(task.frame.elements));
        // Each run alone would wait for the device. The pass that comes next reads the whole.
        for source in code.inputs.iter().map(|&index| &task.sources[index]) {
            if !source.is_far(0..task.frame.elements) {
                continue;
            }
            if task.frame.elements <= PREFETCHED_WHOLE {
                source.prefetch(0..task.frame.elements);
            } else {
                parts.clone().for_each(|part| source.prefetch(part));
            }
        }
        self.in_steps(task, parts, code, |program, step| program.run(&step, &mut results))?;
        let guesses = wanted.iter().zip(&results.keys).map(|(wanted, keys)| wanted.guess(keys));
        Ok(Found::Guesses(guesses.collect()))
    }

    fn reduce(
        &mut self,
        task: &Task,
        blocks: Range<u64>,
        marks: &[Marked],
        code: &Staged,
        ahead: Option<&Ahead>,
    ) -> Result<Found> {
        let elements = task.elements_of(blocks.clone());
        if let Some(ahead) = ahead
            && let Some(held) = ahead.hold(task, &elements)?
        {
            return self.reduce_ahead(task, blocks, ahead, held);
        }
        let mut results = Results::of_unit(&code.program, elements.end - elements.start);
        let code = Code::Staged(code, marks);
        self.in_steps(task, [elements], code, |program, step| program.run(&step, &mut results))?;
        let Results { numbers: sums, mut counts, .. } = results;
        counts.iter_mut().for_each(Counted::shrink);
        Ok(Found::Blocks { first: blocks.start, sums, counts, held: None })
    }

    /// The same of a pass that only counts, and what of the outputs is known by now into `held`.
    fn reduce_ahead(
        &mut self,
        task: &Task,
        blocks: Range<u64>,
        ahead: &Ahead,
        mut held: Held,
    ) -> Result<Found> {
        self.known = Arc::clone(&ahead.known);
        let unit = task.elements_of(blocks.clone());
        let Ahead { code, references, .. } = ahead;
        let Results { mut counts, .. } = Results::of_unit(&code.program, unit.end - unit.start);
        let mut outs = std::mem::take(&mut held.outs);
        let mut places = Places::of(task, &mut outs, &unit)?;
        let mut bytes = places.bytes(&mut outs);
        let (mut marks, mut fits) = (Vec::new(), true);
        let (level, at_once) = (self.level, self.at_once(task));
        self.in_steps(task, [unit.clone()], code, |program, step| {
            for elements in steps(step.elements.clone(), at_once) {
                let step = Step { elements, ..step };
                marks.resize((step.elements.end - step.elements.start) as usize, 0);
                let outputs = parts(task, &unit, &step.elements, &mut bytes);
                let outputs = outputs.chain([marks.as_mut_slice()]).collect();
                let mut results =
                    Results { outputs, counts: std::mem::take(&mut counts), ..Results::default() };
                store(program, &code.program, &step, &mut results)?;
                counts = results.counts;
                let (before, outputs) = (held.undecided(), results.outputs);
                fits = fits && held.gather(&step, outputs.last().expect("marks are an output"));
                if fits && held.undecided() == before && at_once == AT_ONCE {
                    let nodes = digested(level, task, &step, &outputs, references);
                    held.digested.push((step.elements.start, nodes));
                }
            }
            Ok(())
        })?;
        counts.iter_mut().for_each(Counted::shrink);
        held.outs = outs;
        held.shrink();
        let held = fits.then_some(held);
        Ok(Found::Blocks { first: blocks.start, sums: Vec::new(), counts, held })
    }

    /// Finishes and writes a unit whose outputs were computed ahead.
    fn settle(
        &mut self,
        task: &Task,
        unit: Range<u64>,
        references: &References,
        code: &Staged,
        mut held: Held,
    ) -> Result<()> {
        let mut outs = std::mem::take(&mut held.outs);
        let mut places = Places::of(task, &mut outs, &unit)?;
        let mut bytes = places.bytes(&mut outs);
        self.decide(task, code, &held, &mut bytes)?;
        let read: Vec<Option<usize>> = task
            .sinks
            .iter()
            .zip(references)
            .map(|(sink, reference)| reference.filter(|_| sink.digester().is_some()))
            .collect();
        let inputs: Vec<usize> =
            (0..task.sources.len()).filter(|&at| read.contains(&Some(at))).collect();
        let mut digested = std::mem::take(&mut held.digested).into_iter().peekable();
        for part in steps(unit.clone(), AT_ONCE) {
            self.control.check()?;
            if let Some((first, nodes)) = digested.next_if(|(first, _)| *first == part.start) {
                let digesters = task.sinks.iter().map(|sink| sink.digester());
                let each = digesters.zip(nodes).filter_map(|(to, node)| to.zip(node));
                each.for_each(|(digester, node)| digester.add(first, node));
                continue;
            }
            self.make_room(task, &inputs, part.end - part.start, false);
            let read = read_inputs(task, &inputs, &part, &mut self.scratch, false)?;
            let count = |&index: &usize| task.sources[index].stored_bytes(part.end - part.start);
            self.control.add_read(inputs.iter().map(count).sum());
            let outputs = parts(task, &unit, &part, &mut bytes);
            for ((sink, reference), out) in task.sinks.iter().zip(references).zip(outputs) {
                let reference = reference.and_then(|input| read[input].as_ref());
                digest(self.level, &**sink, &part, out, reference);
            }
            inputs.iter().for_each(|&index| task.sources[index].release(part.clone()));
        }
        let written = places.write(task, &outs, self.control);
        held.outs = outs;
        written
    }

    /// Computes the elements of `held` that were undecided, and puts them into the outputs.
    fn decide(
        &self,
        task: &Task,
        code: &Staged,
        held: &Held,
        bytes: &mut [&mut [u8]],
    ) -> Result<()> {
        let (elements, known) = (0..held.undecided(), held.among(&self.known));
        if elements.is_empty() {
            return Ok(());
        }
        let frame = TensorFrame::new(&task.frame.name, task.frame.seed, &[elements.end]);
        let (inputs, given) = (held.inputs(task.sources.len()), Given::default());
        let room = |sink: &Arc<dyn Sink>| vec![0; elements.end as usize * sink.dtype().size()];
        let mut decided: Vec<Vec<u8>> = task.sinks.iter().map(room).collect();
        let outputs = decided.iter_mut().map(Vec::as_mut_slice).collect();
        let step = Step { elements, inputs: &inputs, given: &given, column: 0 };
        let mut results = Results { outputs, ..Results::default() };
        let mut program = self.arithmetic.begin(&frame, &code.program, &known)?;
        store(&mut *program, &code.program, &step, &mut results)?;
        for ((sink, decided), out) in task.sinks.iter().zip(&decided).zip(bytes) {
            held.put(sink.dtype(), decided, out);
        }
        Ok(())
    }

    fn locate(&mut self, task: &Task, key: u64, last: LastKept, code: &Staged) -> Result<Found> {
        let elements = task.elements_of(last.block..last.block + 1);
        let first = elements.start;
        let mut results = Results::of(&code.program);
        self.in_steps(task, [elements], code, |program, step| program.run(&step, &mut results))?;
        let mut equals = (first..).zip(&results.keys[0]).filter(|(_, found)| **found == key);
        let found = equals.nth(last.nth as usize - 1);
        found.map(|(index, _)| Found::Index(index)).ok_or_else(|| {
            let message = "an input changed while it was read: a value seen before is not there";
            Error::new(ErrorKind::Changed, message)
        })
    }

    /// One long row, read in steps.
    fn row(&mut self, task: &Task, row: u64, code: &Staged) -> Result<Found> {
        let start = row * task.frame.row;
        let mut results = Results::of(&code.program);
        let row = std::iter::once(start..start + task.frame.row);
        self.in_steps(task, row, code, |program, step| program.run(&step, &mut results))?;
        let blocks = code.program.kinds.iter().zip(&mut results.numbers);
        Ok(Found::Row(blocks.map(|(&kind, blocks)| fold(kind, blocks)).collect()))
    }

    /// The short rows that begin in `blocks`.
    fn rows(&mut self, task: &Task, blocks: Range<u64>, code: &Staged) -> Result<Found> {
        let (row, Range { start, end }) = (task.frame.row, task.elements_of(blocks));
        let (first, end) = (start.div_ceil(row), end.div_ceil(row));
        let mut results = Results::of(&code.program);
        let rows = std::iter::once(first * row..end * row);
        self.in_steps(task, rows, code, |program, step| program.run(&step, &mut results))?;
        Ok(Found::Blocks { first, sums: results.numbers, counts: Vec::new(), held: None })
    }

    /// Ranks some of the vectors that lie interleaved in a long span: as many as can be held.
    fn rank(&mut self, task: &Task, unit: u64, marks: &[Marked], code: &Staged) -> Result<Found> {
        let frame = &task.frame;
        let spans = frame.spans(marks[0].0.among);
        let (width, bands) = spans.bands();
        let span = spans.nth(unit / bands, frame.elements);
        let band = unit % bands * width..(unit % bands * width + width).min(spans.stride);
        let parts = || spans.parts(&span, &band);
        if spans.size / spans.stride > RANKED_AT_ONCE {
            return self.descend(task, &span, &band, marks, code);
        }
        let mut results = Results::of(&code.program);
        let room = (parts().map(|part| part.end - part.start)).sum::<u64>() as usize;
        results.keys.iter_mut().for_each(|keys| keys.reserve_exact(room));
        self.in_steps(task, parts(), code, |program, step| program.run(&step, &mut results))?;
        for ((ranking, which), keys) in marks.iter().zip(results.keys) {
            let key = |stream| MaskKey::new(frame.seed, &frame.name, stream);
            let draws = draws_of(self.level, ranking.pick, key, parts());
            let stride = (band.end - band.start) as usize;
            let picked = picked(ranking.pick, &draws);
            let kept = if code.program.double {
                kept_of::<i64>(self.level, keys, stride, picked)
            } else {
                kept_of::<i32>(self.level, keys, stride, picked)
            };
            let mut rest = kept.as_slice();
            for part in parts() {
                let (own, others) = rest.split_at((part.end - part.start) as usize);
                self.known.marks[*which].keep(self.level, part.start, own);
                rest = others;
            }
        }
        Ok(Found::Nothing)
    }

    /// Ranks one vector that is too long to be held, by going through it again and again.
    fn descend(
        &mut self,
        task: &Task,
        span: &Range<u64>,
        band: &Range<u64>,
        marks: &[Marked],
        code: &Staged,
    ) -> Result<Found> {
        let frame = &task.frame;
        let spans = frame.spans(marks[0].0.among);
        let (start, stride) = (span.start + band.start, spans.stride);
        let length = (span.end - start).div_ceil(stride);
        let descent = |_| Descent::new(RANKED_AT_ONCE as usize);
        let mut descents: Vec<Descent> = marks.iter().map(descent).collect();
        for _ in 0..length.div_ceil(RANKED_AT_ONCE) {
            let (mut results, mut index) = (Results::of(&code.program), 0);
            let parts = spans.parts(span, band);
            self.in_steps(task, parts, code, |program, step| {
                program.run(&step, &mut results)?;
                for (descent, keys) in descents.iter_mut().zip(&mut results.keys) {
                    descent.take(index, keys);
                    keys.clear();
                }
                index += step.elements.end - step.elements.start;
                Ok(())
            })?;
            for ((ranking, which), descent) in marks.iter().zip(&mut descents) {
                let (mut begun, mut draws) = (u64::MAX, Vec::new());
                for (index, place) in descent.next_down() {
                    let element = start + index * stride;
                    let is_kept = match ranking.pick {
                        Pick::Largest(count) => place < count,
                        Pick::Random { lowest, highest, .. } => {
                            let key = |stream| MaskKey::new(frame.seed, &frame.name, stream);
                            let first = element / SPAN as u64 * SPAN as u64;
                            if first != begun {
                                let part = std::iter::once(first..first + SPAN as u64);
                                draws = draws_of(self.level, ranking.pick, key, part);
                                begun = first;
                            }
                            let (last, draw) = (length - 1, draws[(element - first) as usize]);
                            u64::from(draw) < kernels::bound(last - place, last, lowest, highest)
                        }
                    };
                    self.known.marks[*which].keep(self.level, element, &[u8::from(is_kept)]);
                }
            }
        }
        Ok(Found::Nothing)
    }

    /// Sums a column over the rows of column block `unit`, in row order.
    fn columns(&mut self, task: &Task, unit: u64, code: &Staged) -> Result<Found> {
        let line = task.frame.line;
        let end = ((unit + 1) * COLUMN_BLOCK * line).min(task.frame.elements);
        let mut results = Results::of_columns(&code.program, line);
        let rows = std::iter::once(unit * COLUMN_BLOCK * line..end);
        self.in_steps(task, rows, code, |program, step| {
            let column = step.elements.start % line;
            program.run(&Step { column, ..step }, &mut results)
        })?;
        Ok(Found::Columns(results.numbers))
    }

    /// Reduces the columns of band `unit`, then computes them, both row by row.
    fn band(
        &mut self,
        task: &Task,
        unit: u64,
        references: &References,
        code: &Staged,
    ) -> Result<Found> {
        let line = task.frame.line;
        let columns = unit * BAND..((unit + 1) * BAND).min(line);
        let rows = (0..task.frame.elements).step_by(line as usize);
        let rows = rows.map(|row| row + columns.start..row + columns.end);
        let known = Arc::clone(&self.known);
        let reduce = |Rows { program, .. }: &Rows, given: &Given| {
            let mut results = Results::of_columns(program, columns.end - columns.start);
            let code = Code::Given(program, given);
            self.in_steps(task, rows.clone(), code, |program, step| {
                let column = (step.elements.start - columns.start) % line;
                program.run(&Step { column, ..step }, &mut results)
            })?;
            Ok((results.numbers, Vec::new()))
        };
        let given = code.given(Scope::Column, columns.start, &known, reduce)?;
        for row in rows {
            self.combine(task, row, references, Code::Given(&code.program, &given))?;
        }
        Ok(Found::Nothing)
    }

    fn combine(
        &mut self,
        task: &Task,
        unit: Range<u64>,
        references: &References,
        code: Code<'_>,
    ) -> Result<()> {
        if !task.sinks.iter().all(|sink| sink.is_apart()) {
            return self.replace(task, unit, code);
        }
        let mut outs = std::mem::take(&mut self.outs);
        let mut places = Places::of(task, &mut outs, &unit)?;
        let held = |out: &AlignedBuffer| AlignedBuffer::resident(out.capacity());
        self.held = outs.iter().map(held).sum();
        let mut bytes = places.bytes(&mut outs);
        let level = self.level;
        let at_once = self.at_once(task);
        let computed = self.in_steps(task, [unit.clone()], code, |program, step| {
            for elements in steps(step.elements.clone(), at_once) {
                let step = Step { elements, ..step };
                let outputs = parts(task, &unit, &step.elements, &mut bytes).collect();
                let mut results = Results { outputs, ..Results::default() };
                store(program, code.program(), &step, &mut results)?;
                let outputs = task.sinks.iter().zip(&results.outputs).zip(references);
                for ((sink, out), reference) in outputs {
                    let reference = reference.and_then(|input| step.inputs[input].as_ref());
                    digest(level, &**sink, &step.elements, out, reference);
                }
            }
            Ok(())
        });
        let written = computed.and_then(|()| places.write(task, &outs, self.control));
        (self.outs, self.held) = (outs, 0);
        written
    }

    /// The same where outputs are inputs: a few elements at a time are computed apart, and put where
    /// they belong when their inputs are not in use any more.
    fn replace(&mut self, task: &Task, unit: Range<u64>, code: Code<'_>) -> Result<()> {
        self.most = self.most.min(GRAIN as u64);
        let apart = RefCell::new((unit.start..unit.start, vec![Vec::new(); task.sinks.len()]));
        let compute = |program: &mut dyn Run, step: Step<'_>| {
            let (elements, buffers) = &mut *apart.borrow_mut();
            elements.clone_from(&step.elements);
            let count = (elements.end - elements.start) as usize;
            let part = |(sink, buffer): (&Arc<dyn Sink>, &'_ mut Vec<u8>)| {
                buffer.resize(count * sink.dtype().size(), 0);
            };
            task.sinks.iter().zip(&mut *buffers).for_each(part);
            let outputs = buffers.iter_mut().map(Vec::as_mut_slice).collect();
            let mut results = Results { outputs, ..Results::default() };
            store(program, code.program(), &step, &mut results)
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
        self.in_steps_and(task, [unit], code, compute, put)
    }

    /// Has functions of arrays make unit `unit` of the outputs.
    fn arrays(&mut self, task: &Task, unit: u64) -> Result<()> {
        let Work::Arrays(arrays) = &task.work else {
            return Err(Error::internal("there are no functions of arrays"));
        };
        let length = task.elements_of_calls(arrays);
        let unit = unit * length..((unit + 1) * length).min(task.frame.elements);
        let mut outs = std::mem::take(&mut self.outs);
        let mut places = Places::of(task, &mut outs, &unit)?;
        let held = |out: &AlignedBuffer| AlignedBuffer::resident(out.capacity());
        self.held = outs.iter().map(held).sum();
        let mut bytes = places.bytes(&mut outs);
        let all: Vec<usize> = (0..task.sources.len()).collect();
        for part in steps(unit.clone(), arrays.elements_a_call(&task.frame)) {
            self.control.check()?;
            self.make_room(task, &all, part.end - part.start, false);
            let read = read_inputs(task, &all, &part, &mut self.scratch, false)?;
            let inputs: Vec<_> =
                read.iter().flatten().map(|input| (input.dtype, input.bytes)).collect();
            let elements = part.end - part.start;
            let count = task.sources.iter().map(|source| source.stored_bytes(elements)).sum();
            self.control.add_read(count);
            let shape = arrays.shape_of(part.end - part.start, &task.frame);
            for ((function, sink), out) in arrays.functions.iter().zip(&task.sinks).zip(&mut bytes)
            {
                let at = |index: u64| (index - unit.start) as usize * sink.dtype().size();
                let output = (sink.dtype(), &mut out[at(part.start)..at(part.end)]);
                let (shape, inputs, double) = (&shape[..], &inputs[..], task.double);
                (function.call)(&mut ArrayCall { shape, inputs, double, output });
                let reference = read[task.base.unwrap_or(0)].as_ref();
                digest(self.level, &**sink, &part, &out[at(part.start)..at(part.end)], reference);
            }
            for source in &task.sources {
                source.release(part.clone());
            }
        }
        let written = places.write(task, &outs, self.control);
        (self.outs, self.held) = (outs, 0);
        written
    }

    /// Copies what all sources agree on.
    fn identical(&mut self, task: &Task, blocks: Range<u64>) -> Result<Found> {
        check_one_type(task)?;
        let range = task.elements_of(blocks);
        let mut outs = std::mem::take(&mut self.outs);
        let mut places = Places::of(task, &mut outs, &range)?;
        self.held = outs.iter().map(|out| AlignedBuffer::resident(out.capacity())).sum();
        let mut bytes = places.bytes(&mut outs);
        // Two at a time; what is read stays in the cache until it is hashed.
        let both: Vec<usize> = (0..task.sources.len().min(2)).collect();
        let at_once = task.step_elements(&both).min(self.most);
        for part in steps(range.clone(), at_once) {
            self.make_room(task, &both, part.end - part.start, false);
            self.scratch.resize_with(self.scratch.len().max(2), Default::default);
            let [scratch, other_scratch, ..] = self.scratch.as_mut_slice() else { unreachable!() };
            let first = task.sources[0].read(part.clone(), scratch)?;
            for (source, label) in task.sources.iter().zip(&task.labels).skip(1) {
                self.control.check()?;
                let other = source.read(part.clone(), other_scratch)?;
                if first != other {
                    return Err(differs(task, label));
                }
                source.release(part.clone());
            }
            let elements = part.end - part.start;
            let count = task.sources.iter().map(|source| source.stored_bytes(elements)).sum();
            self.control.add_read(count);
            let dtype = task.sources[0].dtype();
            let same = InputBytes { dtype, first: part.start, bytes: first };
            let at = |index: u64| (index - range.start) as usize * dtype.size();
            for (sink, bytes) in task.sinks.iter().zip(&mut bytes) {
                bytes[at(part.start)..at(part.end)].copy_from_slice(first);
                digest(self.level, &**sink, &part, first, Some(&same));
            }
            task.sources[0].release(part);
        }
        places.write(task, &outs, self.control)?;
        (self.outs, self.held) = (outs, 0);
        Ok(Found::Nothing)
    }
}

/// What is kept of interleaved vectors that have these order keys.
fn kept_of<O: Ordinal>(level: Level, keys: Vec<u64>, stride: usize, picked: Picked<'_>) -> Vec<u8> {
    let ordinals: Vec<O> = keys.into_iter().map(O::from_key).collect();
    let mut kept = vec![0; ordinals.len()];
    Ranker::new(level).pick(&ordinals, stride, picked, &mut kept);
    kept
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

/// The bytes of `elements` in each output, of which `bytes` are those of `unit`.
fn parts<'b>(
    task: &Task,
    unit: &Range<u64>,
    elements: &Range<u64>,
    bytes: &'b mut [&mut [u8]],
) -> impl Iterator<Item = &'b mut [u8]> {
    let range = elements.start - unit.start..elements.end - unit.start;
    task.sinks.iter().zip(bytes).map(move |(sink, bytes)| {
        let at = |index: u64| index as usize * sink.dtype().size();
        &mut bytes[at(range.start)..at(range.end)]
    })
}

/// Does what `program` has to do for the outputs of a step: copies what is an input as it is, and
/// computes the others.
pub(super) fn store(
    run: &mut dyn Run,
    program: &Program,
    step: &Step<'_>,
    results: &mut Results<'_>,
) -> Result<()> {
    copy(program, step, results);
    if program.only_copies() { Ok(()) } else { run.run(step, results) }
}

/// Tells `elements` of an output, whose bytes are `out`, to its digest, if one is wanted.
fn digest(
    level: Level,
    sink: &dyn Sink,
    elements: &Range<u64>,
    out: &[u8],
    reference: Option<&InputBytes<'_>>,
) {
    if let Some(digester) = sink.digester() {
        let reference = reference.map(|input| (input.dtype, input.part(elements)));
        digester.take(level, elements.start, out, reference);
    }
}

/// What is known of a step of each output, for its digest, if one is wanted.
fn digested(
    level: Level,
    task: &Task,
    step: &Step<'_>,
    outputs: &[&mut [u8]],
    references: &References,
) -> Vec<Option<Node>> {
    let each = task.sinks.iter().zip(outputs).zip(references);
    each.map(|((sink, out), reference)| {
        let reference = reference.and_then(|input| step.inputs[input].as_ref());
        let reference = reference.map(|input| (input.dtype, input.part(&step.elements)));
        sink.digester().map(|digester| digester.node(level, step.elements.clone(), out, reference))
    })
    .collect()
}

/// Puts the bytes of inputs that are outputs as they are in their places.
fn copy(program: &Program, step: &Step<'_>, results: &mut Results<'_>) {
    for effect in &program.effects {
        if let Effect::Copy { output, input } = *effect {
            let input = step.inputs[input].as_ref().expect("an input that is copied was read");
            results.outputs[output].copy_from_slice(input.part(&step.elements));
        }
    }
}

/// What the program of `code` is given, from the whole rows of `read`. What rankings keep is put into
/// the task's marks, if they are `kept`.
#[expect(clippy::too_many_arguments, reason = "what a worker has while its buffers are lent")]
fn given_by_row(
    arithmetic: &dyn Arithmetic,
    frame: &TensorFrame,
    known: &Known,
    read: &Range<u64>,
    inputs: &[Option<InputBytes<'_>>],
    code: &Staged,
    kept: &[Marked],
    level: Level,
) -> Result<Given> {
    code.given(Scope::Row, read.start / frame.row, known, |rows, given| {
        let Rows { rankings, program, .. } = rows;
        let mut results = Results::of(program);
        let step = Step { elements: read.clone(), inputs, given, column: 0 };
        arithmetic.begin(frame, program, known)?.run(&step, &mut results)?;
        let marks = |(ranking, bytes): (&Arc<Ranking>, Vec<u8>)| {
            let whole = kept.iter().find(|(other, _)| Arc::ptr_eq(ranking, other));
            let marks = match whole {
                Some((_, which)) => Arc::clone(&known.marks[*which]),
                None => Arc::new(Marks::new(read)?),
            };
            marks.keep(level, read.start, &bytes);
            Ok(marks)
        };
        let marks = rankings.iter().zip(results.kept).map(marks).collect::<Result<_>>()?;
        Ok((results.numbers, marks))
    })
}

//! Runs the instructions of a program over a piece of a tensor, chunk by chunk.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::compile::Given;
use super::masks::{KeptMasks, Marks};
use super::program::{Argument, Mask, Operation, Program, Side, Slot};
use super::{Among, Chosen, MaskName, Scalar, Scope};
use crate::dtype::DType;
use crate::kernels::{self, BLOCK, Level, MaskBits, MaskKey, Operand, Real, SPAN};

/// Elements a chunk: a few slots of it fit the first-level cache. Divides a block.
pub(crate) const CHUNK: usize = SPAN;

/// Rows a block of a column reduction has; part of the fixed shape of the numeric contract.
pub(crate) const COLUMN_BLOCK: u64 = 1024;

/// Columns of a band, in which they are reduced and combined together where there are many.
pub(crate) const BAND: u64 = BLOCK as u64;

/// Elements in a row that are whole vectors, and those that come next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spans {
    /// Elements of a span.
    pub(crate) size: u64,
    /// Spans begin anew after so many elements: a row, or the span itself.
    pub(crate) within: u64,
    /// How many vectors lie interleaved in a span.
    pub(crate) stride: u64,
}

impl Spans {
    /// The span that element `at` lies in, of a tensor of `elements`.
    pub(crate) fn around(&self, at: u64, elements: u64) -> Range<u64> {
        let begin = at / self.within * self.within;
        let start = begin + (at - begin) / self.size * self.size;
        start..(start + self.size).min(begin + self.within).min(elements)
    }

    /// Elements of a step that needs whole spans: whole blocks, and some spans.
    pub(crate) fn least_step(self) -> u64 {
        (SPANS_A_STEP * self.size).next_multiple_of(BLOCK as u64)
    }

    /// How many vectors of a long span are ranked at once, and how often that is until all are.
    pub(crate) fn bands(&self) -> (u64, u64) {
        let length = (self.size / self.stride).max(1);
        let width = (RANKED_AT_ONCE / length).clamp(1, self.stride);
        (width, self.stride.div_ceil(width))
    }

    /// Elements that are ranked at once of a long span.
    pub(crate) fn held(&self) -> u64 {
        ((self.size / self.stride).max(1) * self.bands().0).min(RANKED_AT_ONCE)
    }

    /// The elements of a `band` of the vectors of `span`, in order, as parts that lie together.
    pub(crate) fn parts(
        self,
        span: &Range<u64>,
        band: &Range<u64>,
    ) -> impl Iterator<Item = Range<u64>> {
        let is_whole = band.end - band.start == self.stride;
        let (step, first) = if is_whole { (BLOCK as u64, 0) } else { (self.stride, band.start) };
        let length = if is_whole { step } else { band.end - band.start };
        let end = span.end;
        let starts = (span.start + first..end).step_by(step as usize);
        starts.map(move |start| start..(start + length).min(end))
    }

    /// How many there are in a tensor of `elements`.
    pub(crate) fn count(&self, elements: u64) -> u64 {
        elements.div_ceil(self.within) * self.within.div_ceil(self.size)
    }

    /// The span of that number.
    pub(crate) fn nth(&self, number: u64, elements: u64) -> Range<u64> {
        let each = self.within.div_ceil(self.size);
        self.around(number / each * self.within + number % each * self.size, elements)
    }

    /// The spans that some of `elements` touch, whole.
    pub(crate) fn whole(&self, part: &Range<u64>, elements: u64) -> Range<u64> {
        let last = part.end.saturating_sub(1).max(part.start);
        self.around(part.start, elements).start..self.around(last, elements).end
    }

    /// The spans of `part`, which begins and ends with one.
    pub(crate) fn each(self, part: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let end = part.end;
        let first = self.around(part.start, end);
        std::iter::successors(Some(first), move |span| {
            (span.end < end).then(|| self.around(span.end, end))
        })
    }
}

/// The least number that both divide.
fn common_multiple(one: u64, other: u64) -> u64 {
    let (mut divisor, mut rest) = (one, other);
    while rest > 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    (one / divisor.max(1)).saturating_mul(other)
}

/// Elements of a row, from which on what is kept of rows is small beside the tensor.
const LEAST_KEPT_ROW: u64 = 64;
/// Spans of a step at the least. Two more may be read, around it.
const SPANS_A_STEP: u64 = 8;
/// Elements of a step that are ranked while their keys are in the nearest caches, and the rest of their
/// span.
pub(crate) const RANKED_TOGETHER: u64 = 1 << 14;
/// Elements of interleaved vectors, or of one, that are ranked at once.
pub(crate) const RANKED_AT_ONCE: u64 = 1 << 18;

/// What a tensor's elements are called when random masks are drawn, and how they lie in rows.
#[derive(Clone, Debug)]
pub(crate) struct TensorFrame {
    pub(crate) name: String,
    pub(crate) seed: u64,
    /// Elements.
    pub(crate) elements: u64,
    /// Length of a row: the last dimension.
    pub(crate) row: u64,
    /// Length of a line across the first dimension: elements / first dimension.
    pub(crate) line: u64,
}

impl TensorFrame {
    pub(crate) fn new(name: &str, seed: u64, shape: &[u64]) -> Self {
        let elements: u64 = shape.iter().product();
        let row = shape.last().copied().unwrap_or(1).max(1);
        let line = elements / shape.first().copied().unwrap_or(1).max(1);
        Self { name: name.to_owned(), seed, elements, row, line: line.max(1) }
    }

    /// Blocks of the fixed reduction shape.
    pub(crate) fn blocks(&self) -> u64 {
        self.elements.div_ceil(BLOCK as u64)
    }

    pub(crate) fn rows(&self) -> u64 {
        self.elements / self.row
    }

    /// How what is ranked among each other lies.
    pub(crate) fn spans(&self, among: Among) -> Spans {
        let (row, elements) = (self.row, self.elements.max(1));
        match among {
            Among::Row => Spans { size: row, within: row, stride: 1 },
            Among::Group(size) => Spans { size: size.clamp(1, row), within: row, stride: 1 },
            Among::Vector { length, stride } => {
                let stride = stride.clamp(1, elements);
                let size = length.saturating_mul(stride).clamp(1, elements);
                Spans { size, within: size, stride }
            }
        }
    }

    /// The least spans in which whole vectors of all of `among` lie: the widest of them, where the
    /// others begin anew; of groups of several sizes, what all of these divide, or the row.
    pub(crate) fn widest(&self, among: &[Among]) -> Option<Spans> {
        let all = || among.iter().map(|&among| self.spans(among));
        let widest = all().max_by_key(|spans| (spans.size, spans.within))?;
        if widest.size >= self.row {
            return Some(widest);
        }
        let common = all().fold(1, |common, spans| common_multiple(common, spans.size));
        Some(Spans { size: common.min(self.row), ..widest })
    }

    /// Vectors that do not lie within a block are ranked once, in a pass of their own.
    pub(crate) fn stores_marks(&self, among: Among) -> bool {
        self.spans(among).size > BLOCK as u64
    }

    /// Rows that are longer than a block are reduced once, in a pass of their own.
    pub(crate) fn stores_rows(&self) -> bool {
        self.row > BLOCK as u64
    }

    /// Rows within a block are reduced wherever they are needed, or once and the results kept, if they are
    /// not tiny.
    pub(crate) fn keeps_rows(&self) -> bool {
        (LEAST_KEPT_ROW..=BLOCK as u64).contains(&self.row)
    }

    /// Whether there are few rows of many columns: then a state for each column is too much, and
    /// the columns are taken band by band, each through all rows.
    pub(crate) fn has_bands(&self) -> bool {
        self.line > BAND && self.column_blocks() == 1
    }

    /// Blocks of the fixed shape of a column reduction.
    pub(crate) fn column_blocks(&self) -> u64 {
        (self.elements / self.line).div_ceil(COLUMN_BLOCK)
    }

    /// Which entry of a row or column vector element `index` uses.
    fn entry(&self, axis: Scope, index: u64) -> u64 {
        match axis {
            Scope::Column => index % self.line,
            _ => index / self.row,
        }
    }

    /// How many elements from `index` on use the same entry.
    fn run_length(&self, axis: Scope, index: u64) -> u64 {
        match axis {
            Scope::Column => 1,
            _ => self.row - index % self.row,
        }
    }
}

/// What passes over a tensor found for the programs of later ones.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    /// What each selection keeps.
    pub(crate) chosen: Vec<Chosen>,
    /// What each ranking keeps.
    pub(crate) marks: Vec<Arc<Marks>>,
    /// Random masks that need not be drawn.
    pub(crate) masks: Option<Arc<KeptMasks>>,
}

/// The bytes of one input around a piece.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InputBytes<'a> {
    pub(crate) dtype: DType,
    /// Flat index of the first element in `bytes`.
    pub(crate) first: u64,
    pub(crate) bytes: &'a [u8],
}

impl<'a> InputBytes<'a> {
    pub(crate) fn part(&self, range: &Range<u64>) -> &'a [u8] {
        let size = self.dtype.size();
        let start = (range.start - self.first) as usize * size;
        &self.bytes[start..start + (range.end - range.start) as usize * size]
    }
}

/// Slots, and what is needed to fill them.
#[derive(Debug)]
pub(crate) struct Machine<'a, T> {
    level: Level,
    pub(crate) frame: &'a TensorFrame,
    pub(crate) program: &'a Program,
    /// The keys of the random masks, by stream.
    pub(crate) keys: HashMap<u32, MaskKey>,
    known: &'a Known,
    slots: Vec<Vec<T>>,
    length: usize,
}

impl<'a, T: Real> Machine<'a, T> {
    pub(crate) fn new(
        level: Level,
        frame: &'a TensorFrame,
        program: &'a Program,
        known: &'a Known,
    ) -> Self {
        let streams = program.streams();
        let key = |stream| (stream, MaskKey::new(frame.seed, &frame.name, stream));
        let keys = streams.into_iter().map(key).collect();
        let slots = vec![Vec::new(); program.slots];
        Self { level, frame, program, keys, known, slots, length: 0 }
    }

    /// Computes elements `range` (at most a chunk) from `inputs`, which are indexed as the
    /// formula's are; inputs that the program does not load may be absent.
    pub(crate) fn compute(
        &mut self,
        range: &Range<u64>,
        inputs: &[Option<InputBytes<'_>>],
        given: &Given,
    ) {
        self.length = (range.end - range.start) as usize;
        self.slots.iter_mut().for_each(|slot| slot.resize(self.length, T::ZERO));
        let mut at = 0;
        while let Some(instruction) = self.program.instructions.get(at) {
            if let Some(end) = self.end_of_unused(at) {
                at = end;
                continue;
            }
            let mut out = std::mem::take(&mut self.slots[instruction.out]);
            self.step(&instruction.operation, range, inputs, given, &mut out);
            self.slots[instruction.out] = out;
            at += 1;
        }
    }

    /// Where the side of a select ends that begins with instruction `at`, if no element takes it. What
    /// its slots then hold is not looked at.
    fn end_of_unused(&self, at: usize) -> Option<usize> {
        let is_unused = |side: &&Side| {
            let zero = T::ZERO.key();
            let mask = self.slot(side.mask);
            let zeros = || kernels::count(self.level, mask, zero, zero).inside;
            let starts_here = side.instructions.start == at;
            starts_here && zeros() == if side.is_yes { mask.len() as u64 } else { 0 }
        };
        self.program.sides.iter().find(is_unused).map(|side| side.instructions.end)
    }

    /// The instruction set it runs with.
    pub(crate) fn level(&self) -> Level {
        self.level
    }

    /// The value of an argument over the chunk that was computed last, also where it is one number
    /// everywhere.
    pub(crate) fn chunk(&self, argument: Argument) -> Cow<'_, [T]> {
        match self.operand(argument) {
            Operand::Slice(values) => values.into(),
            Operand::Scalar(value) => vec![value; self.length].into(),
        }
    }

    fn step(
        &self,
        operation: &Operation,
        range: &Range<u64>,
        inputs: &[Option<InputBytes<'_>>],
        given: &Given,
        out: &mut [T],
    ) {
        match operation {
            Operation::Load { input } => {
                let input = inputs[*input].expect("an input that the program loads was read");
                kernels::widen(self.level, input.dtype, input.part(range), out);
            }
            Operation::LoadDifference { input, base } => {
                let input = inputs[*input].expect("an input that the program loads was read");
                let (bytes, base) = (input.part(range), self.slot(*base));
                kernels::widen_difference(self.level, input.dtype, bytes, base, out);
            }
            Operation::Fill { number } => out.fill(T::from_f64(*number)),
            Operation::Spread { vector } => self.spread(&given.vectors[*vector], range.start, out),
            Operation::Unary { op, a } => kernels::unary(self.level, *op, self.slot(*a), out),
            Operation::Binary { op, a, b } => {
                kernels::binary(self.level, *op, self.operand(*a), self.operand(*b), out);
            }
            Operation::Select { mask, yes, no } => {
                let (yes, no) = (self.operand(*yes), self.operand(*no));
                kernels::select(self.level, self.slot(*mask), yes, no, out);
            }
            Operation::WeightedSum { terms } => {
                kernels::weighted_sum(self.level, &self.terms(terms), out);
            }
            Operation::Elect { terms, average } => {
                kernels::elect(self.level, &self.terms(terms), *average, out);
            }
            Operation::Kept { a, which } => {
                self.cut(kernels::keep, self.chosen(*which), range.start, self.slot(*a), out);
            }
            Operation::Trim { a, which } => {
                self.cut(kernels::trim, self.chosen(*which), range.start, self.slot(*a), out);
            }
            Operation::Mask { mask } => {
                let bits = self.bits(*mask, range.start, given);
                kernels::unpack_mask(self.level, &bits, out);
            }
            Operation::Drop { a, mask, scale } => {
                let bits = self.bits(*mask, range.start, given);
                kernels::masked(self.level, &bits, T::from_f64(*scale), self.slot(*a), out);
            }
        }
    }

    /// What a selection keeps.
    pub(crate) fn chosen(&self, which: usize) -> Chosen {
        self.known.chosen[which]
    }

    /// The mask of the chunk from element `first` on.
    pub(crate) fn bits(&self, mask: Mask, first: u64, given: &Given) -> MaskBits {
        match mask {
            Mask::Random(name) => self.random_bits(name, first),
            Mask::Marked(which) => given.marks[which].bits(first),
        }
    }

    fn random_bits(&self, name: MaskName, first: u64) -> MaskBits {
        let draw = || kernels::random_bits(self.level, &self.keys[&name.0], first, name.1);
        match &self.known.masks {
            Some(masks) if first.is_multiple_of(SPAN as u64) => masks.span(name, first, draw),
            _ => draw(),
        }
    }

    fn terms(&self, terms: &[(f64, Slot)]) -> Vec<(T, &[T])> {
        terms.iter().map(|&(c, slot)| (T::from_f64(c), self.slot(slot))).collect()
    }

    fn slot(&self, slot: Slot) -> &[T] {
        &self.slots[slot]
    }

    fn operand(&self, argument: Argument) -> Operand<'_, T> {
        match argument {
            Argument::Slot(slot) => Operand::Slice(self.slot(slot)),
            Argument::Number(number) => Operand::Scalar(T::from_f64(number)),
        }
    }

    /// Runs `cut` on the elements up to the last equal one that is kept, with equals, and on those
    /// behind it, without: the index may lie inside this chunk.
    fn cut(
        &self,
        cut: impl Fn(Level, &[T], u64, bool, &mut [T]),
        chosen: Chosen,
        first: u64,
        values: &[T],
        out: &mut [T],
    ) {
        let end = chosen.equals_end.saturating_sub(first).min(values.len() as u64) as usize;
        let (before, after) = out.split_at_mut(end);
        cut(self.level, &values[..end], chosen.threshold, true, before);
        cut(self.level, &values[end..], chosen.threshold, false, after);
    }

    fn spread(&self, vector: &Scalar, start: u64, out: &mut [T]) {
        let (axis, first, values) = vector.as_vector().expect("a vector is known at each step");
        let (mut at, end) = (start, start + out.len() as u64);
        while at < end {
            let until = end.min(at + self.frame.run_length(axis, at));
            let value = T::from_f64(values[(self.frame.entry(axis, at) - first) as usize]);
            out[(at - start) as usize..(until - start) as usize].fill(value);
            at = until;
        }
    }
}

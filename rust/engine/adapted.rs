//! A source that an adapter changes: `W + s·B·A`, computed while the base is read.
//!
//! A piece is made in steps of a few rows. A worker holds the right factor of the product that it is
//! in, which every row needs, and reads the rows of the left one as it comes to them; so what it takes
//! depends on the rank and the length of a row, not on the size of the tensor. `NUMERICS.md` says in
//! which order numbers are added.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, ThreadId};

use bytemuck::Pod;

use super::source::{Memory, Source};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::io::{AlignedBuffer, InputReader, PAGE};
use crate::kernels::{
    BLOCK, LANES, Lanes, Level, Product, Real, Tiles, dot_into, fold_halves, low_rank_bytes,
    narrow, widen,
};
use crate::plan::{Adapted, Factor, Magnitude, Replaced, Term};

/// Elements of the tensor that are made at a time, unless a row of the left factor is longer.
const STEP: u64 = 4 * BLOCK as u64;
/// Numbers of the left factor that are held at a time, unless one row of it has more.
const LEFT: u64 = 128 << 10;
/// Numbers of a factor that are read at a time.
const CHUNK: u64 = 16 << 10;
/// More than any machine has: larger needs, which a file may claim, are refused just so.
const MOST_MEMORY: u64 = 1 << 48;

/// What workers hold between the pieces of a tensor, by thread.
#[derive(Debug, Default)]
pub struct Desks {
    single: Arc<Pool<f32>>,
    double: Arc<Pool<f64>>,
}

impl Desks {
    /// Forgets what threads have at hand.
    pub(super) fn clear(&self) {
        self.single.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.double.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

type Pool<T> = Mutex<HashMap<ThreadId, Desk<T>>>;

/// What a worker reads into, and the right factors that it has at hand.
#[derive(Debug, Default)]
struct Desk<T> {
    /// The task that they are of.
    task: u64,
    base: AlignedBuffer,
    read: AlignedBuffer,
    numbers: Vec<T>,
    left: Vec<T>,
    /// The elements of a step, where more is done to them than adding products.
    values: Vec<T>,
    /// A block of a row whose norm is looked for.
    block: Vec<T>,
    /// By source and term.
    right: Vec<((usize, usize), Tiles<T>)>,
}

/// A source that an adapter changes.
#[derive(Debug)]
struct AdaptedSource<T> {
    base: Arc<dyn Source>,
    adapted: Arc<Adapted>,
    /// The files of the adapter, by number.
    files: Vec<(u32, Arc<InputReader>)>,
    elements: u64,
    /// The task that it is a source of, and which.
    task: u64,
    number: usize,
    pool: Arc<Pool<T>>,
    /// The type of what is read.
    dtype: DType,
    /// Rows at which terms begin or end, in order.
    cuts: Vec<u64>,
    /// The ranks of all terms of a row together, at the most.
    rank: u64,
    /// Found when it is first needed.
    scaling: OnceLock<Scaling<T>>,
    /// Held while it is looked for.
    search: Mutex<()>,
    level: Level,
}

/// What brings rows or columns to their magnitudes.
#[derive(Debug)]
enum Scaling<T> {
    /// The magnitudes of rows, and the factors of those that were come to.
    Rows(Vec<f64>, Vec<OnceLock<T>>),
    /// The factors of all columns.
    Columns(Vec<T>),
}

/// A number that no other task of the process has.
pub fn task_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Source `number` of task `task`: what `adapted` makes of `base`, which has so many elements, as
/// elements of `dtype`. `files` are those of the adapter.
pub fn adapted(
    base: Arc<dyn Source>,
    adapted: &Arc<Adapted>,
    dtype: DType,
    elements: u64,
    files: Vec<(u32, Arc<InputReader>)>,
    (task, number): (u64, usize),
    desks: &Desks,
) -> Arc<dyn Source> {
    fn new<T: Real + Pod>(
        base: Arc<dyn Source>,
        adapted: &Arc<Adapted>,
        elements: u64,
        files: Vec<(u32, Arc<InputReader>)>,
        (task, number): (u64, usize),
        pool: &Arc<Pool<T>>,
    ) -> Arc<dyn Source> {
        let ends = adapted.terms.iter().flat_map(|term| [term.rows.start, term.rows.end]);
        let mut cuts: Vec<u64> = ends.collect();
        cuts.sort_unstable();
        cuts.dedup();
        Arc::new(AdaptedSource {
            base,
            adapted: Arc::clone(adapted),
            files,
            elements,
            task,
            number,
            pool: Arc::clone(pool),
            dtype: AdaptedSource::<T>::WORKING,
            rank: most_at_a_row(&adapted.terms, &cuts, |term| term.rank),
            cuts,
            scaling: OnceLock::new(),
            search: Mutex::new(()),
            level: Level::from_environment().unwrap_or(Level::portable()),
        })
    }
    match dtype {
        DType::F64 => new(base, adapted, elements, files, (task, number), &desks.double),
        _ => new(base, adapted, elements, files, (task, number), &desks.single),
    }
}

/// The most that the terms of a row have together.
fn most_at_a_row(terms: &[Term], cuts: &[u64], of: impl Fn(&Term) -> u64) -> u64 {
    // Experts have a term each, and there may be many.
    if terms.windows(2).all(|pair| pair[0].rows.end <= pair[1].rows.start) {
        return terms.iter().map(of).max().unwrap_or(0);
    }
    let at = |row: &u64| {
        let of_row = terms.iter().filter(|term| term.rows.contains(row));
        of_row.map(&of).fold(0, u64::saturating_add)
    };
    cuts.iter().map(at).max().unwrap_or(0)
}

impl<T: Real + Pod> AdaptedSource<T> {
    const WORKING: DType = if size_of::<T>() == size_of::<f64>() { DType::F64 } else { DType::F32 };

    /// Calls `make` with what this thread has at hand.
    fn at_desk<R>(&self, make: impl FnOnce(&mut Desk<T>) -> Result<R>) -> Result<R> {
        let lock = || self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        let thread = thread::current().id();
        let mut desk = lock().remove(&thread).unwrap_or_default();
        if desk.task != self.task {
            (desk.task, desk.right) = (self.task, Vec::new());
        }
        let outcome = make(&mut desk);
        lock().insert(thread, desk);
        outcome
    }

    fn columns(&self) -> u64 {
        self.adapted.columns
    }

    /// The rows that `elements` are in.
    fn rows_of(&self, elements: &Range<u64>) -> Range<u64> {
        elements.start / self.columns()..elements.end.div_ceil(self.columns())
    }

    /// Rows that a step has at the most, if it has whole ones.
    fn rows_at_once(&self) -> u64 {
        (STEP / self.columns()).min(LEFT / self.rank.max(1)).max(1)
    }

    /// `elements` in steps: whole rows as far as they fit, none of which one term has and the next has
    /// not; longer rows in parts.
    fn steps(&self, elements: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let columns = self.columns();
        let at_once = self.rows_at_once();
        let mut start = elements.start;
        std::iter::from_fn(move || {
            let (row, first) = (start / columns, start);
            let cut = self.cuts.get(self.cuts.partition_point(|&cut| cut <= row));
            let last = cut.map_or(row + at_once, |&cut| cut.min(row + at_once));
            start = elements.end.min(last * columns).min(first + STEP.max(columns.min(STEP)));
            (first < elements.end).then_some(first..start)
        })
    }

    /// Whether all that is done is to add products.
    fn only_adds(&self) -> bool {
        self.adapted.magnitude.is_none() && self.adapted.replaced.is_none()
    }

    /// The result for `elements`.
    fn fill(
        &self,
        elements: Range<u64>,
        out: &mut [u8],
        once: bool,
        desk: &mut Desk<T>,
    ) -> Result<()> {
        let at = |element: u64| (element - elements.start) as usize * self.dtype.size();
        for step in self.steps(elements.clone()) {
            let out = &mut out[at(step.start)..at(step.end)];
            if self.only_adds() {
                self.sum(&step, self.dtype, out, once, desk)?;
                continue;
            }
            let mut values = std::mem::take(&mut desk.values);
            values.resize((step.end - step.start) as usize, T::ZERO);
            self.sum_into(&step, &mut values, once, desk)?;
            if let Some(magnitude) = &self.adapted.magnitude {
                self.scale(magnitude, &step, &mut values, desk)?;
            }
            if let Some(replaced) = &self.adapted.replaced {
                self.replace(replaced, &step, &mut values, desk)?;
            }
            narrow(self.level, &values, self.dtype, out);
            desk.values = values;
        }
        Ok(())
    }

    /// The tensor with all terms added, for the elements of a step, in the working type.
    fn sum_into(
        &self,
        step: &Range<u64>,
        out: &mut [T],
        once: bool,
        desk: &mut Desk<T>,
    ) -> Result<()> {
        self.sum(step, Self::WORKING, bytemuck::cast_slice_mut(out), once, desk)
    }

    /// The same, rounded to `dtype`.
    fn sum(
        &self,
        step: &Range<u64>,
        dtype: DType,
        out: &mut [u8],
        once: bool,
        desk: &mut Desk<T>,
    ) -> Result<()> {
        let rows = self.rows_of(step);
        let in_step = |term: &Term| term.rows.start < rows.end && rows.start < term.rows.end;
        let terms = &self.adapted.terms;
        desk.right.retain(|((source, at), _)| *source != self.number || in_step(&terms[*at]));
        let mut left = std::mem::take(&mut desk.left);
        left.clear();
        let mut places = Vec::new();
        for (at, term) in terms.iter().enumerate().filter(|(_, term)| in_step(term)) {
            let start = left.len();
            left.resize(start + ((rows.end - rows.start) * term.rank) as usize, T::ZERO);
            let lines = rows.start - term.rows.start..rows.end - term.rows.start;
            self.numbers(&term.left, lines.clone(), term.rank, desk, |line, k, number| {
                left[start + ((line - lines.start) * term.rank + k) as usize] = number;
            })?;
            places.push((term, start, self.hold((self.number, at), term, desk)?));
        }
        let Desk { base, right, .. } = desk;
        let bytes = if once {
            self.base.read_once(step.clone(), base)?
        } else {
            self.base.read(step.clone(), base)?
        };
        let stored = self.base.dtype();
        for Block { rows: of, first, width, elements } in blocks(step, self.columns()) {
            let product = |&(term, start, held): &(&Term, usize, usize)| {
                let at = |row: u64| start + ((row - rows.start) * term.rank) as usize;
                Product {
                    left: &left[at(of.start)..at(of.end)],
                    right: &right[held].1,
                    scale: T::from_f64(term.scale),
                }
            };
            let products: Vec<_> = places.iter().map(product).collect();
            let at = |dtype: DType| elements.start * dtype.size()..elements.end * dtype.size();
            let (base, out) = ((stored, &bytes[at(stored)]), &mut out[at(dtype)]);
            low_rank_bytes(self.level, base, &products, first, width, dtype, out);
        }
        desk.left = left;
        Ok(())
    }

    /// Takes the right factor of a term to the desk, unless it is there; its place.
    fn hold(&self, key: (usize, usize), term: &Term, desk: &mut Desk<T>) -> Result<usize> {
        if let Some(known) = desk.right.iter().position(|(each, _)| *each == key) {
            return Ok(known);
        }
        let columns = self.columns();
        let mut tiles = Tiles::new(term.rank as usize, columns as usize);
        let mut put = |column, step, number| tiles.put(step as usize, column as usize, number);
        match &term.right {
            None => (0..columns).for_each(|column| put(column, 0, T::ONE)),
            Some(right) => self.numbers(right, 0..columns, term.rank, desk, put)?,
        }
        desk.right.push((key, tiles));
        Ok(desk.right.len() - 1)
    }

    fn reader(&self, file: u32) -> Result<&InputReader> {
        let found = self.files.iter().find(|(number, _)| *number == file);
        found.map(|(_, reader)| &**reader).ok_or_else(|| Error::internal("an adapter is not open"))
    }

    /// Hands the numbers of some lines of a factor to `put`, with line and step of the rank.
    fn numbers(
        &self,
        factor: &Factor,
        lines: Range<u64>,
        rank: u64,
        desk: &mut Desk<T>,
        mut put: impl FnMut(u64, u64, T),
    ) -> Result<()> {
        let Factor { file, dtype, start, line, step } = *factor;
        let reader = self.reader(file)?;
        let mut run = |first: u64, count: u64, take: &mut dyn FnMut(u64, T)| {
            for begin in (0..count).step_by(CHUNK as usize) {
                let count = CHUNK.min(count - begin) as usize;
                let byte = start + (first + begin) * dtype.size() as u64;
                let bytes = reader.read(byte, count * dtype.size(), &mut desk.read)?;
                desk.numbers.resize(CHUNK as usize, T::ZERO);
                let numbers = &mut desk.numbers[..count];
                if dtype == DType::F64 && Self::WORKING != DType::F64 {
                    // A factor that is more exact than what it is for: rounded once.
                    let wide = bytes.chunks_exact(dtype.size()).map(bytemuck::pod_read_unaligned);
                    numbers.iter_mut().zip(wide).for_each(|(to, from)| *to = T::from_f64(from));
                } else {
                    widen(self.level, dtype, bytes, numbers);
                }
                (begin..).zip(&*numbers).for_each(|(at, &number)| take(at, number));
            }
            Ok(())
        };
        if step == 1 && line == rank {
            let count = (lines.end - lines.start) * rank;
            return run(lines.start * line, count, &mut |at, number| {
                put(lines.start + at / rank, at % rank, number);
            });
        }
        if line == 1 {
            for k in 0..rank {
                run(lines.start + k * step, lines.end - lines.start, &mut |at, number| {
                    put(lines.start + at, k, number);
                })?;
            }
            return Ok(());
        }
        let span = (rank - 1) * step + 1;
        for at in lines {
            if span <= CHUNK {
                run(at * line, span, &mut |place, number| {
                    if place % step == 0 {
                        put(at, place / step, number);
                    }
                })?;
                continue;
            }
            for k in 0..rank {
                run(at * line + k * step, 1, &mut |_, number| put(at, k, number))?;
            }
        }
        Ok(())
    }

    /// Brings the elements of a step to the magnitudes of their rows or columns.
    fn scale(
        &self,
        magnitude: &Magnitude,
        step: &Range<u64>,
        out: &mut [T],
        desk: &mut Desk<T>,
    ) -> Result<()> {
        for Block { rows, first, width, elements } in blocks(step, self.columns()) {
            for (row, line) in rows.zip(out[elements].chunks_mut(width)) {
                match self.scaling(magnitude, desk)? {
                    Scaling::Rows(magnitudes, factors) => {
                        let (known, row) = (&factors[row as usize], row as usize);
                        let factor = if let Some(&factor) = known.get() {
                            factor
                        } else {
                            let norm = self.norm_of_row(row as u64, desk)?;
                            *known.get_or_init(|| to_magnitude(magnitudes[row], norm))
                        };
                        line.iter_mut().for_each(|value| *value = factor * *value);
                    }
                    Scaling::Columns(factors) => {
                        let factors = &factors[first..first + width];
                        let both = line.iter_mut().zip(factors);
                        both.for_each(|(value, &factor)| *value = factor * *value);
                    }
                }
            }
        }
        Ok(())
    }

    /// The magnitudes; of columns all factors, which takes a pass over the tensor.
    fn scaling(&self, magnitude: &Magnitude, desk: &mut Desk<T>) -> Result<&Scaling<T>> {
        if let Some(known) = self.scaling.get() {
            return Ok(known);
        }
        let _search = self.search.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = self.scaling.get() {
            return Ok(known);
        }
        let &Magnitude { file, dtype, start, of_rows } = magnitude;
        let columns = self.columns();
        let count = if of_rows { self.elements / columns } else { columns };
        let mut magnitudes = vec![0.0; count as usize];
        let numbers = Factor { file, dtype, start, line: 1, step: 1 };
        self.numbers(&numbers, 0..count, 1, desk, |line, _, number| {
            magnitudes[line as usize] = number.to_f64();
        })?;
        let found = if of_rows {
            Scaling::Rows(magnitudes, (0..count).map(|_| OnceLock::new()).collect())
        } else {
            let mut sums = vec![0.0; count as usize];
            let mut values = std::mem::take(&mut desk.block);
            for step in self.steps(0..self.elements) {
                values.resize((step.end - step.start) as usize, T::ZERO);
                self.sum_into(&step, &mut values, false, desk)?;
                for (at, value) in (step.start..).zip(&values) {
                    let value = value.to_f64();
                    sums[(at % columns) as usize] += value * value;
                }
            }
            desk.block = values;
            let norms = sums.iter().map(|sum| sum.sqrt());
            let each = magnitudes.iter().zip(norms);
            Scaling::Columns(each.map(|(&m, norm)| to_magnitude(m, norm)).collect())
        };
        Ok(self.scaling.get_or_init(|| found))
    }

    /// The length of a row with all terms added.
    fn norm_of_row(&self, row: u64, desk: &mut Desk<T>) -> Result<f64> {
        let (start, end) = (row * self.columns(), (row + 1) * self.columns());
        let (mut sums, mut values) = (Vec::new(), std::mem::take(&mut desk.block));
        for block in (start..end).step_by(BLOCK) {
            let block = block..end.min(block + BLOCK as u64);
            values.resize((block.end - block.start) as usize, T::ZERO);
            self.sum_into(&block, &mut values, false, desk)?;
            let mut lanes: Lanes = [0.0; LANES];
            dot_into(self.level, &values, &values, &mut lanes);
            sums.push(fold_halves(&mut lanes.to_vec()));
        }
        desk.block = values;
        Ok(fold_halves(&mut sums).sqrt())
    }

    /// Puts in the rows that are another tensor's.
    fn replace(
        &self,
        replaced: &Replaced,
        step: &Range<u64>,
        out: &mut [T],
        desk: &mut Desk<T>,
    ) -> Result<()> {
        let (columns, Replaced { rows, file, dtype, start }) = (self.columns(), replaced);
        let within = self.rows_of(step);
        let first = rows.partition_point(|(row, _)| *row < within.start);
        for &(row, place) in rows[first..].iter().take_while(|(row, _)| *row < within.end) {
            let begin = (row * columns).max(step.start);
            let end = ((row + 1) * columns).min(step.end);
            let byte = start + (place * columns + begin - row * columns) * dtype.size() as u64;
            let numbers = Factor { file: *file, dtype: *dtype, start: byte, line: 1, step: 1 };
            self.numbers(&numbers, 0..end - begin, 1, desk, |line, _, number| {
                out[(begin - step.start + line) as usize] = number;
            })?;
        }
        Ok(())
    }

    fn read_as<'a>(
        &'a self,
        elements: Range<u64>,
        once: bool,
        scratch: &'a mut AlignedBuffer,
    ) -> Result<&'a [u8]> {
        let length = (elements.end - elements.start) as usize * self.dtype.size();
        scratch.grow(length)?;
        let out = &mut scratch.as_mut_slice()[..length];
        self.at_desk(|desk| self.fill(elements, out, once, desk))?;
        Ok(&scratch.as_slice()[..length])
    }
}

/// What brings a vector of length `norm` to its magnitude. One of nothing but zeros stays so.
fn to_magnitude<T: Real>(magnitude: f64, norm: f64) -> T {
    if norm == 0.0 { T::ZERO } else { T::from_f64(magnitude / norm) }
}

impl<T: Real + Pod> Source for AdaptedSource<T> {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn rounded(&self, dtype: DType) -> Option<Arc<dyn Source>> {
        Some(Arc::new(Self {
            base: Arc::clone(&self.base),
            adapted: Arc::clone(&self.adapted),
            files: self.files.clone(),
            pool: Arc::clone(&self.pool),
            dtype,
            cuts: self.cuts.clone(),
            scaling: OnceLock::new(),
            search: Mutex::new(()),
            ..*self
        }))
    }

    fn memory(&self) -> Memory {
        let number = size_of::<T>() as u64;
        let base = STEP as usize * self.base.dtype().size() + 2 * PAGE;
        let read = CHUNK * (number + size_of::<f64>() as u64);
        let values = if self.only_adds() { 0 } else { STEP * number };
        let block = if self.adapted.magnitude.is_some() { STEP * number } else { 0 };
        // Rows that are computed together have their numbers twice.
        let left = self.rank.saturating_mul(2 * self.rows_at_once() * number);
        let below = self.base.memory().reading;
        let reading = [AlignedBuffer::resident(base) as u64, read, values, block, left, below];
        let shared = match &self.adapted.magnitude {
            None => 0,
            // A magnitude, and a factor that may not be there yet.
            Some(Magnitude { of_rows: true, .. }) => 24 * (self.elements / self.columns()),
            // A magnitude, a sum and a factor, a norm.
            Some(Magnitude { of_rows: false, .. }) => 24 * self.columns(),
        };
        let sum =
            |parts: &[u64]| parts.iter().copied().fold(0, u64::saturating_add).min(MOST_MEMORY);
        let bytes = |term: &Term| Tiles::<T>::bytes(term.rank, self.columns());
        let held = most_at_a_row(&self.adapted.terms, &self.cuts, bytes).min(MOST_MEMORY);
        Memory { reading: sum(&reading), held, shared: shared.min(MOST_MEMORY) }
    }

    fn stored_bytes(&self, elements: u64) -> u64 {
        let factors = u128::from(self.adapted.bytes(self.elements)) * u128::from(elements);
        let factors = (factors / u128::from(self.elements.max(1))) as u64;
        self.base.stored_bytes(elements) + factors
    }

    fn is_far(&self, elements: Range<u64>) -> bool {
        self.base.is_far(elements)
    }

    fn prefetch(&self, elements: Range<u64>) {
        self.base.prefetch(elements);
    }

    fn read<'a>(
        &'a self,
        elements: Range<u64>,
        scratch: &'a mut AlignedBuffer,
    ) -> Result<&'a [u8]> {
        self.read_as(elements, false, scratch)
    }

    fn read_once<'a>(
        &'a self,
        elements: Range<u64>,
        scratch: &'a mut AlignedBuffer,
    ) -> Result<&'a [u8]> {
        // A norm reads the row again.
        self.read_as(elements, self.adapted.magnitude.is_none(), scratch)
    }

    fn release(&self, elements: Range<u64>) {
        self.base.release(elements);
    }
}

/// Elements that are whole rows, or part of one.
struct Block {
    rows: Range<u64>,
    /// The first of their columns, and how many they are.
    first: usize,
    width: usize,
    /// Where they are among those of the step.
    elements: Range<usize>,
}

/// `elements` of a matrix as blocks: the rest of a row, whole rows, the beginning of a row.
fn blocks(elements: &Range<u64>, columns: u64) -> impl Iterator<Item = Block> {
    let (start, end) = (elements.start, elements.end);
    let mut at = start;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let (row, first) = (at / columns, at % columns);
        let whole = if first == 0 { (end - at) / columns } else { 0 };
        let (rows, width) =
            if whole > 0 { (whole, columns) } else { (1, (columns - first).min(end - at)) };
        let from = at;
        at += rows * width;
        Some(Block {
            rows: row..row + rows,
            first: first as usize,
            width: width as usize,
            elements: (from - start) as usize..(at - start) as usize,
        })
    })
}

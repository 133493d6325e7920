//! Arrays in memory as sources and sinks, and running a task over them.
//!
//! The second user of the engine's seams. Inputs are used where they are, and the output is
//! computed where it belongs; there is no budget to keep, since nothing is allocated but a few
//! chunks. A small array is done on the calling thread, without any other.

#![expect(unsafe_code, reason = "borrows memory that the caller keeps alive")]

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use super::backend::{Arithmetic, Results, Run, Step, steps};
use super::control::Control;
use super::memory::MemoryPlan;
use super::simd::Simd;
use super::source::{GRAIN, Place, Sink, Source};
use super::task::{Task, Work};
use super::worker::store;
use super::{Goal, Settings, run_all};
use crate::dtype::DType;
use crate::error::{Error, ErrorKind, Result};
use crate::formula::Value;
use crate::formula::compile::{Given, Purpose};
use crate::formula::machine::{InputBytes, Known, TensorFrame};
use crate::formula::program::{Along, Effect, Fused, Program, Setting};
use crate::io::AlignedBuffer;
use crate::kernels::{self, BLOCK, Level, Update};

/// Below so many bytes of inputs and output, starting a thread costs more than it gains; it is only
/// done where it is asked for.
const PARALLEL_FROM: u64 = 8 << 20;
/// The same for many arrays, which take one after the other: less than a thread that has to be started
/// could gain where others want the cores too.
const MANY_PARALLEL_FROM: u64 = 32 << 20;
/// Elements of many arrays that are computed at a time where they replace an input: they and what
/// they are made of fit the first-level cache.
const APART: u64 = 2048;
/// Blocks that a worker takes at once at the most.
const PIECE_BLOCKS: u64 = 16;

/// Memory with the elements of a tensor.
#[derive(Clone, Copy, Debug)]
struct Memory {
    start: *mut u8,
    bytes: usize,
    dtype: DType,
}

// SAFETY: only an address; who made it promised that the memory may be used from any thread.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Where `elements` lie, as an offset and a length in bytes.
    fn part(&self, elements: &Range<u64>) -> Range<usize> {
        let size = self.dtype.size();
        let part = elements.start as usize * size..elements.end as usize * size;
        assert!(part.start <= part.end && part.end <= self.bytes, "elements of the array");
        part
    }

    fn elements(&self) -> u64 {
        (self.bytes / self.dtype.size()) as u64
    }

    /// The bytes of `elements`.
    ///
    /// # Safety
    ///
    /// The memory is there, and nobody writes to that part while the slice is in use.
    unsafe fn slice<'a>(&self, elements: &Range<u64>) -> &'a [u8] {
        let part = self.part(elements);
        if part.is_empty() {
            return &[];
        }
        // SAFETY: the part lies within the memory, by the check in `part`.
        let start = unsafe { self.start.add(part.start) };
        // SAFETY: as promised.
        unsafe { std::slice::from_raw_parts(start, part.len()) }
    }

    /// The bytes of `elements`, to write to.
    ///
    /// # Safety
    ///
    /// The memory is there, and nobody else uses that part while the slice is in use.
    unsafe fn place<'a>(&self, elements: &Range<u64>) -> &'a mut [u8] {
        let part = self.part(elements);
        if part.is_empty() {
            return &mut [];
        }
        // SAFETY: the part lies within the memory, by the check in `part`.
        let start = unsafe { self.start.add(part.start) };
        // SAFETY: as promised.
        unsafe { std::slice::from_raw_parts_mut(start, part.len()) }
    }
}

/// A tensor in memory that someone else owns.
#[derive(Debug)]
pub struct ArraySource(Memory);

impl ArraySource {
    /// `bytes` bytes of elements at `start`.
    ///
    /// # Safety
    ///
    /// While the source exists, the memory must stay readable; and while a slice that it gave is in
    /// use, nobody may write to that part.
    pub unsafe fn new(start: *const u8, bytes: usize, dtype: DType) -> Self {
        Self(Memory { start: start.cast_mut(), bytes, dtype })
    }
}

impl Source for ArraySource {
    fn dtype(&self) -> DType {
        self.0.dtype
    }

    fn is_in_place(&self) -> bool {
        true
    }

    fn read<'a>(&'a self, elements: Range<u64>, _: &'a mut AlignedBuffer) -> Result<&'a [u8]> {
        // SAFETY: readable and not written to meanwhile, as promised to `new`.
        Ok(unsafe { self.0.slice(&elements) })
    }
}

/// Memory that someone else owns, for the elements of an output.
#[derive(Debug)]
pub struct ArraySink {
    memory: Memory,
    is_apart: bool,
    /// A bit for each grain that was handed out: nobody gets the same memory twice.
    taken: Vec<AtomicU64>,
}

impl ArraySink {
    /// `bytes` bytes for elements at `start`. With `is_apart` the memory belongs to no source of the
    /// task; without, an element is written only when nobody uses that of a source any more.
    ///
    /// # Safety
    ///
    /// While the sink exists, the memory must stay writable, and nobody else may use it; but the
    /// sources of the same task may, if `is_apart` is false.
    pub unsafe fn new(start: *mut u8, bytes: usize, dtype: DType, is_apart: bool) -> Self {
        let grains = (bytes / dtype.size()).div_ceil(GRAIN);
        let taken = (0..grains.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { memory: Memory { start, bytes, dtype }, is_apart, taken }
    }

    /// The memory of `elements`: whole grains, each of them once.
    fn take(&self, elements: &Range<u64>) -> Place<'_> {
        let grain = GRAIN as u64;
        assert!(elements.start.is_multiple_of(grain), "a piece begins with a grain");
        for grain in elements.start / grain..elements.end.div_ceil(grain) {
            let bit = 1 << (grain % 64);
            let before = self.taken[(grain / 64) as usize].fetch_or(bit, Ordering::Relaxed);
            assert_eq!(before & bit, 0, "grain {grain} is written twice");
        }
        // SAFETY: writable, as promised to `new`; and no other slice has these bytes, since their
        // grains were not taken before.
        Place(unsafe { self.memory.place(elements) })
    }
}

impl Sink for ArraySink {
    fn dtype(&self) -> DType {
        self.memory.dtype
    }

    fn place(&self, elements: &Range<u64>) -> Option<Place<'_>> {
        Some(self.take(elements))
    }

    fn is_apart(&self) -> bool {
        self.is_apart
    }

    fn write(&self, first: u64, buffer: &AlignedBuffer, bytes: Range<usize>) -> Result<()> {
        let end = first + (bytes.len() / self.memory.dtype.size()) as u64;
        self.take(&(first..end)).0.copy_from_slice(&buffer.as_slice()[bytes]);
        Ok(())
    }
}

/// Runs `task`, whose sources and sink are in memory, on at most `threads` threads (as many as there
/// are cores, unless given). What it found, if it looks for numbers.
pub fn run(
    task: Task,
    level: Level,
    threads: Option<usize>,
    control: &Control,
) -> Result<Vec<f64>> {
    let wanted = if let Work::Numbers(numbers) = &task.work { numbers.len() } else { 0 };
    let workers = workers(task.bytes(), PARALLEL_FROM, task.blocks(), threads);
    let share = (task.blocks() / (4 * workers as u64)).clamp(1, PIECE_BLOCKS);
    let settings = Settings { level, workers, memory: u64::MAX, largest_piece: Some(share) };
    let memory = MemoryPlan::unbounded(workers);
    if task.needs_sweep() {
        let message = "not supported yet: a sum over the whole model, for one tensor in memory";
        return Err(Error::new(ErrorKind::Unsupported, message)
            .advice("merge files with `oxmerge merge` or `oxmerge.merge`"));
    }
    let goal = Goal::Merge(None);
    let found = run_all(&Simd(level), &vec![task], &settings, &memory, control, goal)?;
    let numbers = found.into_values().next().unwrap_or_default();
    if numbers.len() == wanted {
        Ok(numbers)
    } else {
        Err(Error::plan("there is nothing to compute a number from: the array has no elements"))
    }
}

/// Many outputs that are made by one formula, each of inputs of its own.
#[derive(Debug)]
pub struct Many {
    /// Inputs of each.
    inputs: usize,
    /// The inputs and the output of each, one after the other.
    memory: Vec<Memory>,
    /// For each, whether its output is none of its inputs.
    is_apart: Vec<bool>,
}

impl Many {
    /// Room for `count` outputs, of `inputs` inputs each.
    pub fn new(inputs: usize, count: usize) -> Self {
        let memory = Vec::with_capacity((inputs + 1) * count);
        Self { inputs, memory, is_apart: Vec::with_capacity(count) }
    }

    /// Adds one: start, bytes and type of each input and then of the output.
    ///
    /// # Safety
    ///
    /// While `self` exists, the memory must stay where it is, that of the output writable, and nobody
    /// may write to the inputs or use the output. With `is_apart` the output is none of its inputs;
    /// else it may be, as a whole. It overlaps nothing else that is added.
    pub unsafe fn push(
        &mut self,
        arrays: impl IntoIterator<Item = (*mut u8, usize, DType)>,
        is_apart: bool,
    ) {
        let before = self.memory.len();
        let arrays = arrays.into_iter();
        self.memory.extend(arrays.map(|(start, bytes, dtype)| Memory { start, bytes, dtype }));
        let added = &self.memory[before..];
        let elements = |memory: &Memory| memory.bytes / memory.dtype.size();
        assert_eq!(added.len(), self.inputs + 1, "an output and its inputs");
        assert!(added.windows(2).all(|two| elements(&two[0]) == elements(&two[1])), "one length");
        self.is_apart.push(is_apart);
    }

    fn one(&self, index: usize) -> (&[Memory], &Memory) {
        let width = self.inputs + 1;
        let (out, inputs) =
            self.memory[index * width..][..width].split_last().expect("an output at least");
        (inputs, out)
    }
}

/// Computes `value`, of which an element depends on the same element of the inputs and on nothing
/// else, for each of `many`.
///
/// A task for each would cost more than the arithmetic does where arrays are small: this is only a
/// loop, over blocks of all of them.
pub fn run_many(
    value: Value,
    many: &Many,
    level: Level,
    threads: Option<usize>,
    control: &Control,
) -> Result<()> {
    let work = Work::Formulas(vec![value]).shared();
    if !work.reads_once() || work.reads_around() {
        return Err(Error::internal("the elements of the formula depend on others"));
    }
    let programs = Programs::of(&work.values()[0], many)?;
    let blocks = |index: usize| {
        let elements = many.one(index).1.elements();
        let starts = (0..elements).step_by(BLOCK);
        starts.map(move |start| (index, start..(start + BLOCK as u64).min(elements)))
    };
    let blocks: Vec<(usize, Range<u64>)> = (0..many.is_apart.len()).flat_map(blocks).collect();
    let bytes = many.memory.iter().map(|memory| memory.bytes as u64).sum();
    let workers = workers(bytes, MANY_PARALLEL_FROM, blocks.len() as u64, threads);
    let run = (blocks.len() / (8 * workers)).max(1);
    let next = AtomicUsize::new(0);
    let work = || -> Result<()> {
        let (simd, frame) = (Simd(level), TensorFrame::new("", 0, &[]));
        let known = Known::default();
        let begin = |program| simd.begin(&frame, program, &known);
        let mut loops = Loop {
            level,
            runs: programs.distinct.iter().map(begin).collect::<Result<_>>()?,
            apart: Vec::new(),
        };
        loop {
            let first = next.fetch_add(run, Ordering::Relaxed);
            let Some(mine) = blocks.get(first..).filter(|left| !left.is_empty()) else {
                return Ok(());
            };
            control.check()?;
            for (index, part) in &mine[..run.min(mine.len())] {
                // SAFETY: as promised to `push`; and this block of this output is handed out once.
                unsafe { loops.compute(many, *index, part, &programs)? };
            }
        }
    };
    in_threads(workers, work).into_iter().collect()
}

/// The program of each of many outputs: one for each set of types.
struct Programs {
    distinct: Vec<Program>,
    /// Which of them makes each output.
    of: Vec<usize>,
}

impl Programs {
    fn of(value: &Value, many: &Many) -> Result<Self> {
        let mut programs = Self { distinct: Vec::new(), of: Vec::new() };
        let mut settings: Vec<Vec<DType>> = Vec::new();
        for index in 0..many.is_apart.len() {
            let (inputs, out) = many.one(index);
            let is_same = |types: &Vec<DType>| {
                types.iter().copied().eq(inputs.iter().chain([out]).map(|memory| memory.dtype))
            };
            let found = settings.iter().position(is_same);
            programs.of.push(found.unwrap_or(settings.len()));
            if found.is_none() {
                let types: Vec<DType> =
                    inputs.iter().chain([out]).map(|memory| memory.dtype).collect();
                let double = types.contains(&DType::F64);
                let inputs = types[..inputs.len()].to_vec();
                let setting = Setting { inputs, double, fuses: true };
                let purpose = Purpose::Store(value.clone(), out.dtype);
                let along = Along::Segments(BLOCK as u64);
                programs.distinct.push(Program::compile(&[purpose], along, &setting)?);
                settings.push(types);
            }
        }
        Ok(programs)
    }
}

/// What a thread computes many arrays with.
struct Loop<'a> {
    level: Level,
    /// For each program.
    runs: Vec<Box<dyn Run + 'a>>,
    /// For elements that replace an input.
    apart: Vec<u8>,
}

impl Loop<'_> {
    /// Computes elements `part` of output `index`.
    ///
    /// # Safety
    ///
    /// The memory is there, and nobody else uses that part of the output.
    unsafe fn compute(
        &mut self,
        many: &Many,
        index: usize,
        part: &Range<u64>,
        programs: &Programs,
    ) -> Result<()> {
        let Self { level, runs, apart } = self;
        let ((inputs, out), is_apart) = (many.one(index), many.is_apart[index]);
        let which = programs.of[index];
        let (program, run) = (&programs.distinct[which], &mut *runs[which]);
        let (dtype, size) = (out.dtype, out.dtype.size());
        if let Some((other, update)) = replaced(program, inputs, out) {
            // SAFETY: that part is there, and is not written to: it is other memory than the output.
            let other = unsafe { other.slice(part) };
            // SAFETY: that part is there, and nobody else uses it.
            let own = unsafe { out.place(part) };
            kernels::update_bytes(*level, update, dtype, other, own);
            return Ok(());
        }
        for elements in steps(part.clone(), if is_apart { BLOCK as u64 } else { APART }) {
            let count = (elements.end - elements.start) as usize;
            // SAFETY: of each input that part is there and is not written to meanwhile: where it is
            // the output, it is when it has been used.
            let bytes_of = |memory: &Memory| unsafe { memory.slice(&elements) };
            let mut compute = |bytes: &mut [u8]| {
                let input = |memory: &Memory| {
                    let (dtype, bytes) = (memory.dtype, bytes_of(memory));
                    Some(InputBytes { dtype, first: elements.start, bytes })
                };
                let inputs: Vec<_> = inputs.iter().map(input).collect();
                let elements = elements.clone();
                let given = &Given::default();
                let step = Step { elements, inputs: &inputs, given, column: 0 };
                let mut results = Results { outputs: vec![bytes], ..Results::default() };
                store(run, program, &step, &mut results)
            };
            // SAFETY: that part is there, and nobody else uses it.
            let place = || unsafe { out.place(&elements) };
            if is_apart {
                compute(place())?;
            } else {
                apart.resize(count * size, 0);
                compute(apart)?;
                place().copy_from_slice(apart);
            }
        }
        Ok(())
    }
}

/// How `out` becomes a sum of itself and of another of the inputs, if that is what `program` computes
/// and both are of one type.
fn replaced<'a>(
    program: &Program,
    inputs: &'a [Memory],
    out: &Memory,
) -> Option<(&'a Memory, Update)> {
    let [Effect::Fused(fused)] = program.effects.as_slice() else { return None };
    let mut same = inputs.iter().enumerate().filter(|(_, input)| input.start == out.start);
    let (own, memory) = same.next()?;
    let (other, update) = update(fused, own).filter(|_| same.next().is_none())?;
    let is_uniform = memory.dtype == out.dtype && inputs[other].dtype == out.dtype;
    (is_uniform && !program.double).then_some((&inputs[other], update))
}

/// What a sum of input `own` and another one is, if the result replaces that input: and which the
/// other is.
fn update(fused: &Fused, own: usize) -> Option<(usize, Update)> {
    let narrow = |number: f64| number as f32;
    match fused {
        Fused::WeightedSum { terms, .. } => match terms[..] {
            [(c, x), (d, y)] if x == own && y != own => {
                Some((y, Update::Sum { own: narrow(c), other: narrow(d), other_first: false }))
            }
            [(d, y), (c, x)] if x == own && y != own => {
                Some((y, Update::Sum { own: narrow(c), other: narrow(d), other_first: true }))
            }
            _ => None,
        },
        Fused::Shifted { base, terms, scale, .. } => match terms[..] {
            [(t, x)] if *base == own && x != own => {
                Some((x, Update::Toward { t: narrow(t), scale: narrow(*scale) }))
            }
            [(t, x)] if x == own && *base != own => {
                Some((*base, Update::From { t: narrow(t), scale: narrow(*scale) }))
            }
            _ => None,
        },
        _ => None,
    }
}

/// Runs `work` on `workers` threads, this one among them.
fn in_threads<R: Send>(workers: usize, work: impl Fn() -> R + Copy + Send) -> Vec<R> {
    if workers == 1 {
        return vec![work()];
    }
    thread::scope(|scope| {
        // This thread works too, so a system that refuses threads only makes it slower.
        let others: Vec<_> = (1..workers)
            .map_while(|_| thread::Builder::new().spawn_scoped(scope, work).ok())
            .collect();
        let own = work();
        let joined = others
            .into_iter()
            .map(|other| other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        joined.chain([own]).collect()
    })
}

/// How far two arrays of `elements` elements of one type are apart: the largest distance of two
/// elements, and how many differ.
///
/// It makes no part of a merge, so it is no formula: only a loop over blocks.
pub fn ulp_distance(
    a: &dyn Source,
    b: &dyn Source,
    elements: u64,
    level: Level,
    threads: Option<usize>,
    control: &Control,
) -> Result<(u64, u64)> {
    let blocks = elements.div_ceil(BLOCK as u64);
    let bytes = elements * (a.dtype().size() + b.dtype().size()) as u64;
    let next = AtomicU64::new(0);
    let work = || -> Result<(u64, u64)> {
        let mut found = (0, 0);
        let (mut left, mut right) = (AlignedBuffer::default(), AlignedBuffer::default());
        loop {
            let block = next.fetch_add(1, Ordering::Relaxed);
            if block >= blocks {
                return Ok(found);
            }
            control.check()?;
            let start = block * BLOCK as u64;
            let part = start..(start + BLOCK as u64).min(elements);
            let (a_bytes, b_bytes) = (a.read(part.clone(), &mut left)?, b.read(part, &mut right)?);
            let (largest, differing) = kernels::ulp_distance(level, a.dtype(), a_bytes, b_bytes);
            found = (found.0.max(largest), found.1 + differing);
        }
    };
    let results: Vec<Result<(u64, u64)>> =
        in_threads(workers(bytes, PARALLEL_FROM, blocks, threads), work);
    results.into_iter().try_fold((0, 0), |found, part| {
        let part = part?;
        Ok((found.0.max(part.0), found.1 + part.1))
    })
}

fn workers(bytes: u64, from: u64, blocks: u64, threads: Option<usize>) -> usize {
    let most = blocks.max(1) as usize;
    let cores = || thread::available_parallelism().map_or(1, usize::from);
    threads.unwrap_or_else(|| if bytes >= from { cores() } else { 1 }).clamp(1, most)
}

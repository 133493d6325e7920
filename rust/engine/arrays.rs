//! Arrays in memory as sources and sinks, and running a task over them.
//!
//! The second user of the engine's seams. Inputs are used where they are, and the output is
//! computed where it belongs; there is no budget to keep, since nothing is allocated but a few
//! chunks. A small array is done on the calling thread, without any other.

#![expect(unsafe_code, reason = "borrows memory that the caller keeps alive")]

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use super::control::Control;
use super::memory::MemoryPlan;
use super::simd::Simd;
use super::source::{Place, Sink, Source};
use super::task::{Task, Work};
use super::{Goal, Settings, run_all};
use crate::dtype::DType;
use crate::error::{Error, ErrorKind, Result};
use crate::io::AlignedBuffer;
use crate::kernels::{self, BLOCK, Level};

/// Below so many bytes of inputs and output, starting a thread costs more than it gains; it is only
/// done where it is asked for.
const PARALLEL_FROM: u64 = 8 << 20;
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
        let part = self.0.part(&elements);
        if part.is_empty() {
            return Ok(&[]);
        }
        // SAFETY: the part lies within the memory, by the check in `part`.
        let start = unsafe { self.0.start.add(part.start) };
        // SAFETY: readable and not written to meanwhile, as promised to `new`.
        Ok(unsafe { std::slice::from_raw_parts(start, part.len()) })
    }
}

/// Memory that someone else owns, for the elements of an output.
#[derive(Debug)]
pub struct ArraySink {
    memory: Memory,
    /// Whether elements may be written while inputs are read.
    is_apart: bool,
    /// A bit for each block that was handed out: nobody gets the same memory twice.
    taken: Vec<AtomicU64>,
}

impl ArraySink {
    /// `bytes` bytes for elements at `start`. With `is_apart` the memory belongs to no source of the
    /// task; without, an element is written only when its piece of every source has been used.
    ///
    /// # Safety
    ///
    /// While the sink exists, the memory must stay writable, and nobody else may use it; but the
    /// sources of the same task may, if `is_apart` is false.
    pub unsafe fn new(start: *mut u8, bytes: usize, dtype: DType, is_apart: bool) -> Self {
        let blocks = (bytes / dtype.size()).div_ceil(BLOCK);
        let taken = (0..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { memory: Memory { start, bytes, dtype }, is_apart, taken }
    }

    /// The memory of `elements`: whole blocks, each of them once.
    fn take(&self, elements: &Range<u64>) -> Place<'_> {
        let part = self.memory.part(elements);
        if part.is_empty() {
            return Place(&mut []);
        }
        let block = BLOCK as u64;
        assert!(elements.start.is_multiple_of(block), "a piece begins with a block");
        for block in elements.start / block..elements.end.div_ceil(block) {
            let bit = 1 << (block % 64);
            let before = self.taken[(block / 64) as usize].fetch_or(bit, Ordering::Relaxed);
            assert_eq!(before & bit, 0, "block {block} is written twice");
        }
        // SAFETY: the part lies within the memory, by the check in `part`.
        let start = unsafe { self.memory.start.add(part.start) };
        // SAFETY: writable, as promised to `new`; and no other slice has these bytes, since their
        // blocks were not taken before.
        Place(unsafe { std::slice::from_raw_parts_mut(start, part.len()) })
    }
}

impl Sink for ArraySink {
    fn dtype(&self) -> DType {
        self.memory.dtype
    }

    fn place(&self, elements: &Range<u64>) -> Option<Place<'_>> {
        self.is_apart.then(|| self.take(elements))
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
    let workers = workers(task.bytes(), task.blocks(), threads);
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
    let results: Vec<Result<(u64, u64)>> = thread::scope(|scope| {
        // This thread works too, so a system that refuses threads only makes it slower.
        let others: Vec<_> = (1..workers(bytes, blocks, threads))
            .map_while(|_| thread::Builder::new().spawn_scoped(scope, work).ok())
            .collect();
        let own = work();
        let joined = others
            .into_iter()
            .map(|other| other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        joined.chain([own]).collect()
    });
    results.into_iter().try_fold((0, 0), |found, part| {
        let part = part?;
        Ok((found.0.max(part.0), found.1 + part.1))
    })
}

fn workers(bytes: u64, blocks: u64, threads: Option<usize>) -> usize {
    let most = blocks.max(1) as usize;
    let cores = || match bytes {
        PARALLEL_FROM.. => thread::available_parallelism().map_or(1, usize::from),
        _ => 1,
    };
    threads.unwrap_or_else(cores).clamp(1, most)
}

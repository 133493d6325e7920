//! The memory budget: how large a piece may be so that the peak stays below it.
//!
//! The peak is the high-water mark of the whole process's resident set. It is made of what was
//! there before (interpreter, modules), the state of the passes (a histogram for each selection,
//! block sums), and for each worker the piece in hand: the pages of every input and the output
//! buffer. The first two follow from the plan; what is left is shared by the workers.

use std::fs;

use super::task::Work;
use crate::dtype::DType;
use crate::error::{Error, ErrorKind, Result};
use crate::formula::machine::TensorFrame;
use crate::formula::stage::unknown;
use crate::formula::{Scope, Value};
use crate::kernels::BLOCK;

/// Input bytes of one source that a piece has at the most: more gains nothing. A page less than
/// two huge pages, so that an output buffer with its odd start fills no third.
const LARGEST_PIECE: u64 = (4 << 20) - 4096;
/// Stacks, allocator and scheduler, a worker and in all. Measured, rounded up.
const WORKER_OVERHEAD: u64 = 192 << 10;
const ENGINE_OVERHEAD: u64 = 2 << 20;
/// Bytes of a histogram in a worker and in a task, and how many tasks may be under way.
const HISTOGRAM_BYTES: u64 = 65_536 * 4;
const SEARCH_BYTES: u64 = 65_536 * 8;

/// How a run keeps within its budget.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The budget asked for, bytes.
    pub budget: u64,
    /// Resident before the engine starts.
    pub baseline: u64,
    /// Predicted high-water mark.
    pub predicted: u64,
    /// Threads.
    pub workers: usize,
    /// Bytes a worker may hold of pieces.
    pub worker_bytes: u64,
}

/// What one tensor needs: bytes of a block of all inputs and the output, and of the passes' state.
#[derive(Clone, Copy, Debug, Default)]
pub struct Need {
    block: u64,
    blocks: u64,
    /// Input bytes of the widest source's block.
    widest: u64,
    worker_state: u64,
    shared_state: u64,
}

impl Need {
    /// The need of a tensor made by `work` from sources of these types.
    pub(crate) fn new(
        frame: &TensorFrame,
        work: &Work,
        sources: impl Iterator<Item = DType>,
        output: DType,
    ) -> Self {
        let sizes: Vec<u64> = sources.map(|dtype| dtype.size() as u64).collect();
        let block = BLOCK as u64;
        let mut need = Self {
            block: (sizes.iter().sum::<u64>() + output.size() as u64) * block,
            blocks: frame.blocks(),
            widest: sizes.iter().max().unwrap_or(&0) * block,
            ..Self::default()
        };
        if let Work::Formula(formula) = work {
            need.add_passes(frame, formula);
        }
        need
    }

    fn add_passes(&mut self, frame: &TensorFrame, formula: &Value) {
        let waits = unknown(std::slice::from_ref(formula));
        let searches = waits.selections.len() as u64;
        self.worker_state += searches * HISTOGRAM_BYTES;
        self.shared_state += searches * (SEARCH_BYTES + 4 * frame.blocks());
        for reduction in &waits.reductions {
            match reduction.scope {
                Scope::Row if frame.stores_rows() => self.shared_state += 8 * frame.rows(),
                // Rows at the edges of a piece are read whole.
                Scope::Row => self.blocks += 2,
                Scope::Column => {
                    self.worker_state += 8 * frame.line;
                    self.shared_state += 8 * frame.line * (frame.column_blocks() + 1);
                }
                Scope::Tensor | Scope::Model => self.shared_state += 8 * frame.blocks(),
            }
        }
    }

    /// Blocks in a piece when a worker may hold `bytes`.
    pub(crate) fn piece_blocks(&self, bytes: u64) -> u64 {
        let most = (LARGEST_PIECE / self.widest.max(1)).max(1);
        (bytes / self.block.max(1)).clamp(1, most)
    }

    fn piece_bytes(&self, bytes: u64) -> u64 {
        self.piece_blocks(bytes).min(self.blocks) * self.block
    }
}

impl MemoryPlan {
    /// Divides `budget` among at most `workers` threads; `baseline` is resident already.
    ///
    /// Uses fewer threads before it refuses; refuses with the number that would do.
    pub fn new(needs: &[Need], budget: u64, workers: usize, baseline: u64) -> Result<Self> {
        let most = |of: fn(&Need) -> u64| needs.iter().map(of).max().unwrap_or(0);
        let (block, worker_state) = (most(|need| need.block), most(|need| need.worker_state));
        let shared = ENGINE_OVERHEAD + largest_states(needs, workers);
        let fixed = |workers: u64| baseline + shared + workers * (worker_state + WORKER_OVERHEAD);
        let fits = |workers: &u64| fixed(*workers) + workers * block <= budget;
        let Some(workers) = (1..=workers.max(1) as u64).rev().find(fits) else {
            return Err(refused(budget, fixed(1) + block));
        };
        let worker_bytes = (budget - fixed(workers)) / workers;
        let mut pieces: Vec<u64> =
            needs.iter().map(|need| need.piece_bytes(worker_bytes)).collect();
        pieces.sort_unstable_by(|a, b| b.cmp(a));
        let largest = pieces.first().copied().unwrap_or(0);
        let predicted = fixed(workers) + workers * largest;
        Ok(Self { budget, baseline, predicted, workers: workers as usize, worker_bytes })
    }
}

/// The states of the tasks that may be under way at once.
fn largest_states(needs: &[Need], workers: usize) -> u64 {
    let mut states: Vec<u64> = needs.iter().map(|need| need.shared_state).collect();
    states.sort_unstable_by(|a, b| b.cmp(a));
    states.iter().take(super::tasks_under_way(workers)).sum()
}

#[cold]
fn refused(budget: u64, needed: u64) -> Error {
    let mebibytes = |bytes: u64| bytes.div_ceil(1 << 20);
    Error::new(ErrorKind::Memory, "the memory budget is too small for one block of every input")
        .expected(format!("at least {} MiB", mebibytes(needed)))
        .found(format!("{} MiB", mebibytes(budget)))
        .advice(format!("use --memory {}MiB or more", mebibytes(needed)))
}

/// A number of KiB that the kernel reports about this process, in bytes.
fn status_bytes(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap_or_default();
    let number = line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
    number.unwrap_or(0) * 1024
}

/// Bytes of this process that are resident now.
pub fn resident() -> u64 {
    status_bytes("VmRSS:")
}

/// The most bytes of this process that were ever resident.
pub fn peak_resident() -> u64 {
    status_bytes("VmHWM:")
}

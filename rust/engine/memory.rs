//! The memory budget: how large a piece may be so that the peak stays below it.
//!
//! The peak is the high-water mark of the whole process's resident set. It is made of what was
//! there before (interpreter, modules), the state of the passes (a histogram for each selection,
//! block sums), and for each worker the piece in hand: the pages of every input and the output
//! buffer. The first two follow from the plan; what is left is shared by the workers.
//!
//! A piece that is used in place costs more than its bytes: a map may make whole windows of
//! [`MAP_MARGIN`] bytes resident, and a piece touches one more than it fills. Where the workers'
//! shares are too small for that, pieces stay below [`MAPPED_FROM`] and are read by position,
//! which is as fast there.

use std::fs;

use super::task::Work;
use super::work::SAMPLE_BYTES;
use crate::dtype::DType;
use crate::error::{Error, ErrorKind, Result};
use crate::formula::machine::{CHUNK, TensorFrame};
use crate::formula::selection::{HISTOGRAM_BYTES, SEARCH_BYTES};
use crate::formula::stage::unknown;
use crate::formula::{Scope, Value};
use crate::io::{MAP_MARGIN, MAPPED_FROM, PAGE};
use crate::kernels::BLOCK;

const BLOCK_ELEMENTS: u64 = BLOCK as u64;
/// Input bytes of one source that a piece has at the most: more gains nothing. A page less than
/// two huge pages, so that an output buffer with its odd start fills no third.
pub(crate) const LARGEST_PIECE: u64 = (4 << 20) - PAGE as u64;
/// Below this, a piece that is used in place makes too much memory around it resident.
const SMALLEST_MAPPED_PIECE: u64 = 2 * MAP_MARGIN as u64;
/// Stack, allocator and scheduler, a worker and in all. Measured, rounded up.
const WORKER_OVERHEAD: u64 = 64 << 10;
const ENGINE_OVERHEAD: u64 = 1 << 20;
/// Bytes of a row's results in a worker, for each reduction: the results themselves in a vector
/// that doubles, and what is computed from them.
const ROW_BYTES: u64 = 24;
/// What a budget that is refused is told to be larger than needed: what a process has resident
/// before the engine starts is not quite the same each time.
const REFUSAL_SLACK: u64 = 1 << 20;

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

/// An amount of memory of which a part is used only when it has to be: pages around a mapped
/// piece, histograms of values that a sample does not narrow down.
///
/// The budget is kept with all of it; half of the uncertain part is what to expect.
#[derive(Clone, Copy, Debug, Default)]
struct Amount {
    certain: u64,
    uncertain: u64,
}

impl Amount {
    fn most(self) -> u64 {
        self.certain + self.uncertain
    }

    fn expected(self) -> u64 {
        self.certain + self.uncertain / 2
    }

    fn plus(self, other: Self, times: u64) -> Self {
        Self {
            certain: self.certain + times * other.certain,
            uncertain: self.uncertain + times * other.uncertain,
        }
    }
}

/// What one tensor needs: for a piece of it, and for the state of its passes.
#[derive(Clone, Debug, Default)]
pub struct Need {
    elements: u64,
    /// Bytes an element, and whether long pieces are used in place, of each source that is read
    /// at the same time as the others.
    sources: Vec<(u64, bool)>,
    output: u64,
    /// Elements around a piece that are read as well, to have whole rows.
    edge: u64,
    /// Reductions over the rows of a piece, and the length of a row.
    row_reductions: u64,
    row: u64,
    /// Keys that a worker takes as a sample, at a time when it has no piece.
    sample: u64,
    worker_state: Amount,
    shared_state: Amount,
}

impl Need {
    /// The need of a tensor made by `work` from sources of these types; true for a source that is
    /// mapped.
    pub(crate) fn new(
        frame: &TensorFrame,
        work: &Work,
        sources: impl Iterator<Item = (DType, bool)>,
        output: DType,
    ) -> Self {
        let mut need = Self {
            elements: frame.elements,
            sources: sources.map(|(dtype, mapped)| (dtype.size() as u64, mapped)).collect(),
            output: output.size() as u64,
            row: frame.row,
            ..Self::default()
        };
        match work {
            Work::Formula(formula) => need.add_passes(frame, formula),
            // The first is kept while the others are compared with it, one by one.
            Work::Identical => need.sources.truncate(2),
        }
        need
    }

    fn add_passes(&mut self, frame: &TensorFrame, formula: &Value) {
        let waits = unknown(std::slice::from_ref(formula));
        let searches = waits.selections.len() as u64;
        // The machine's slots: a few for each source.
        self.worker_state.certain += (2 * self.sources.len() as u64 + 4) * 4 * CHUNK as u64;
        self.worker_state.uncertain += searches * HISTOGRAM_BYTES;
        self.sample = searches * SAMPLE_BYTES;
        self.shared_state.uncertain += searches * SEARCH_BYTES;
        self.shared_state.certain += searches * 4 * frame.blocks();
        for reduction in &waits.reductions {
            match reduction.scope {
                Scope::Row if frame.stores_rows() => {
                    self.shared_state.certain += 8 * frame.rows();
                }
                Scope::Row => {
                    self.edge = 2 * frame.row;
                    self.row_reductions += 1;
                }
                Scope::Column => {
                    self.worker_state.certain += 8 * frame.line;
                    self.shared_state.certain += 8 * frame.line;
                    // Summed up before there is output; the allocator may keep it until later.
                    self.shared_state.uncertain += 8 * frame.line * frame.column_blocks();
                }
                Scope::Tensor | Scope::Model => self.shared_state.certain += 8 * frame.blocks(),
            }
        }
    }

    /// What a worker holds of a piece of `blocks` blocks.
    fn piece(&self, blocks: u64) -> Amount {
        let elements = (blocks * BLOCK_ELEMENTS).min(self.elements);
        let read = (elements + self.edge).min(self.elements);
        let whole_pages = |bytes: u64| bytes.next_multiple_of(PAGE as u64);
        let mut amount = Amount {
            certain: whole_pages(elements * self.output) + PAGE as u64,
            uncertain: self.row_reductions * ROW_BYTES * (read / self.row.max(1)),
        };
        for &(size, mapped) in &self.sources {
            let bytes = whole_pages(read * size);
            amount.certain += bytes;
            if mapped && bytes >= MAPPED_FROM as u64 {
                // Wherever it begins, it touches so many windows at the most.
                let margin = MAP_MARGIN as u64;
                amount.uncertain += bytes.next_multiple_of(margin) + margin - bytes;
            }
        }
        amount.uncertain += self.sample.saturating_sub(amount.most());
        amount
    }

    /// Whether all of a piece of `blocks` blocks is read by position, or enough of it in place to
    /// be worth what becomes resident around it.
    fn is_sensible(&self, blocks: u64) -> bool {
        let elements = (blocks * BLOCK_ELEMENTS + self.edge).min(self.elements);
        let mapped = self.sources.iter().filter(|(_, mapped)| *mapped);
        let widest = mapped.map(|(size, _)| elements * size).max().unwrap_or(0);
        elements == self.elements || !(MAPPED_FROM as u64..SMALLEST_MAPPED_PIECE).contains(&widest)
    }

    /// Blocks in a piece when a worker may hold `bytes`.
    pub(crate) fn piece_blocks(&self, bytes: u64) -> u64 {
        let widest = self.sources.iter().map(|(size, _)| *size).max().unwrap_or(0);
        let most = LARGEST_PIECE / (widest.max(1) * BLOCK_ELEMENTS);
        (1..=most.min(self.elements.div_ceil(BLOCK_ELEMENTS)).max(1))
            .rev()
            .find(|&blocks| self.is_sensible(blocks) && self.piece(blocks).most() <= bytes)
            .unwrap_or(1)
    }
}

impl MemoryPlan {
    /// Divides `budget` among at most `workers` threads; `baseline` is resident already.
    ///
    /// Uses fewer threads before it refuses; refuses with the number that would do.
    pub fn new(needs: &[Need], budget: u64, workers: usize, baseline: u64) -> Result<Self> {
        let most = |of: fn(&Need) -> Amount| {
            needs.iter().map(of).max_by_key(|amount| amount.most()).unwrap_or_default()
        };
        let worker = Amount { certain: WORKER_OVERHEAD, uncertain: 0 }
            .plus(most(|need| need.worker_state), 1);
        let shared = Amount { certain: baseline + ENGINE_OVERHEAD, uncertain: 0 };
        let fixed = |workers: u64| {
            let states = largest_states(needs, workers as usize);
            shared.plus(states, 1).plus(worker, workers)
        };
        let block = most(|need| need.piece(1)).most();
        let fits = |workers: &u64| fixed(*workers).most() + workers * block <= budget;
        let Some(workers) = (1..=workers.max(1) as u64).rev().find(fits) else {
            return Err(refused(budget, fixed(1).most() + block));
        };
        let worker_bytes = (budget - fixed(workers).most()) / workers;
        let piece = needs
            .iter()
            .map(|need| need.piece(need.piece_blocks(worker_bytes)))
            .max_by_key(|piece| piece.most())
            .unwrap_or_default();
        Ok(Self {
            budget,
            baseline,
            predicted: fixed(workers).plus(piece, workers).expected(),
            workers: workers as usize,
            worker_bytes: piece.most(),
        })
    }
}

/// The states of the tasks that may be under way at once.
fn largest_states(needs: &[Need], workers: usize) -> Amount {
    let mut states: Vec<Amount> = needs.iter().map(|need| need.shared_state).collect();
    states.sort_unstable_by_key(|state| std::cmp::Reverse(state.most()));
    let under_way = states.into_iter().take(super::tasks_under_way(workers));
    under_way.fold(Amount::default(), |sum, state| sum.plus(state, 1))
}

#[cold]
fn refused(budget: u64, needed: u64) -> Error {
    let needed = needed + REFUSAL_SLACK;
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

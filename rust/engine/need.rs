//! What a tensor needs in memory: for a piece of it in a worker, for the state of its passes, and on
//! a device.
//!
//! A piece that is used in place costs more than its bytes: a map may make whole windows of
//! [`MAP_MARGIN`] bytes resident, and a piece touches one more than it fills. Where the workers'
//! shares are too small for that, pieces stay below [`MAPPED_FROM`] and are read by position,
//! which is as fast there.

use std::sync::Arc;

use super::ahead;
use super::digest::DIGEST_BYTES;
use super::source::{Memory, Source};
use super::task::{LARGEST_PIECE, Task, Work, step_elements};
use crate::dtype::DType;
use crate::formula::machine::{BAND, CHUNK, RANKED_TOGETHER, TensorFrame};
use crate::formula::masks::{self, Marks};
use crate::formula::selection::{self, HISTOGRAM_BYTES, SEARCH_BYTES, SEARCH_BYTES_A_BLOCK};
use crate::formula::stage::{self, unknown};
use crate::formula::{Among, Reduction, Scope, Value};
use crate::io::{AlignedBuffer, MAP_MARGIN, MAPPED_FROM, PAGE};
use crate::kernels::{BLOCK, CELL};

const BLOCK_ELEMENTS: u64 = BLOCK as u64;
/// Elements up to which a tensor is done together with its neighbours.
pub(super) const SMALL: u64 = BLOCK_ELEMENTS;
/// Below this, a piece that is used in place makes too much memory around it resident.
const SMALLEST_MAPPED_PIECE: u64 = 3 << 20;
/// Bytes of a row's results in a worker, for each reduction: the results themselves in a vector
/// that doubles, and what is computed from them.
const ROW_BYTES: u64 = 24;
/// Bytes of an element that is ranked in a worker: its order key, its draw, and whether it is kept, as a
/// byte and as a bit; of a vector that is gone through again and again, two keys with indices.
const RANKED_BYTES: u64 = 14;
const DESCENT_BYTES: u64 = 32;
/// Bytes of an element of a step that is ranked: whether it is kept, as a byte, in a vector that doubles,
/// and as a bit. Of those that are ranked together: its order key.
const KEPT_BYTES: u64 = 3;
const KEY_BYTES: u64 = 8;
/// Bytes of an element of one ranking at a time: its draw, in a vector that doubles. And of its vector:
/// its bin, its place, the bound of a place, whether it is open, and, where vectors are interleaved, a
/// copy; else what sorting takes; of one that is gone through again and again, the next elements.
const DRAWN_BYTES: u64 = 8;
const PLACED_BYTES: u64 = 40;
/// Tables of bins.
const BINS_BYTES: u64 = 160 << 10;
const NEXT_BYTES: u64 = 16;
/// What a vector of results takes besides them: itself, and what the allocator adds.
const VECTOR_BYTES: u64 = 64;
/// What a piece has on a device, an element: values of the working type beside one an input;
/// temporaries (terms of a sum and their running sums, keys and bins, words of a generator); and
/// copies of a vector of rows or columns. `tests/test_torch_backend.py` measures them.
const VALUES_ON_DEVICE: u64 = 4;
const TEMPORARIES_ON_DEVICE: u64 = 48;
const VECTOR_COPIES: u64 = 4;
/// Further temporaries where vectors are ranked: their numbers, orders and places.
const RANKED_ON_DEVICE: u64 = 48;
/// What does not grow with the piece; on a device of its own, what torch's allocator takes at once.
const HOST_TENSORS: u64 = 1 << 20;
const DEVICE_SEGMENTS: u64 = 64 << 20;

/// What arithmetic that is done elsewhere needs: whole pieces at once, and memory for them.
#[derive(Clone, Copy, Debug)]
pub struct Offload {
    /// Bytes that the tensors on one device may take.
    pub vram: u64,
    /// Devices that share the work.
    pub devices: usize,
    /// Whether the device's memory is that of this process.
    pub is_host: bool,
}

impl Offload {
    /// What each of `workers` may hold on its device.
    pub(super) fn for_each_of(self, workers: u64) -> u64 {
        self.vram / workers.div_ceil(self.devices as u64)
    }
}

/// An amount of memory: what to expect, and what it is at the most. They differ where memory is
/// used only when it has to be: pages around a mapped piece, histograms of values that a sample
/// does not narrow down, buffers for inputs that turn out not to be in the page cache.
///
/// The budget is kept with the most; the prediction is what to expect.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Amount {
    pub(super) expected: u64,
    pub(super) most: u64,
}

impl Amount {
    pub(super) fn certain(bytes: u64) -> Self {
        Self { expected: bytes, most: bytes }
    }

    /// As likely as not.
    pub(super) fn uncertain(bytes: u64) -> Self {
        Self { expected: bytes / 2, most: bytes }
    }

    pub(super) fn plus(self, other: Self, times: u64) -> Self {
        Self {
            expected: self.expected.saturating_add(times.saturating_mul(other.expected)),
            most: self.most.saturating_add(times.saturating_mul(other.most)),
        }
    }

    fn add(&mut self, other: Self) {
        *self = self.plus(other, 1);
    }
}

/// What outputs take that are computed ahead.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    /// All that are expected of a tensor.
    pub(super) expected: u64,
    pub(super) units: u64,
    /// What a unit may take beside what is expected, while it is in hand.
    pub(super) surplus: u64,
}

/// How a source's bytes get to a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Used where they are, in a map.
    InPlace,
    /// Copied from the page cache, a step at a time.
    Copied,
    /// Read past the page cache, a piece at a time.
    Direct,
}

impl Way {
    /// How the `elements` of `source` will come, as things are now.
    pub(crate) fn of(source: &dyn Source, elements: u64, once: bool) -> Self {
        if source.is_in_place() {
            Self::InPlace
        } else if once && source.is_far(0..elements) {
            Self::Direct
        } else {
            Self::Copied
        }
    }
}

/// What one tensor needs: for a piece of it, and for the state of its passes.
#[derive(Clone, Debug, Default)]
pub struct Need {
    elements: u64,
    /// Bytes an element of each source that is read at the same time as the others, and how.
    sources: Vec<(u64, Way)>,
    /// Whether sources are read only once.
    reads_once: bool,
    /// Whether a source that is copied may turn out to be read past the page cache: it is read once, or
    /// once when a sweep over the model is over. Pieces leave room for that, and so are smaller.
    may_be_direct: bool,
    /// Bytes an element of each output.
    outputs: Vec<u64>,
    /// Elements around a piece that are read as well, to have whole rows.
    edge: u64,
    /// Reductions over the rows of a piece, and the length of a row.
    row_reductions: u64,
    row: u64,
    /// Those of them whose results are kept, if there is room.
    kept_rows: u64,
    /// Rankings of short vectors, and what a step of whole ones has at the least.
    rankings: u64,
    least_step: u64,
    /// Elements that functions of arrays get at once, if they make the outputs.
    a_call: Option<u64>,
    /// Selections, each of which is searched for.
    searches: u64,
    /// Whether outputs can be computed ahead.
    is_ahead: bool,
    pub(super) worker_state: Amount,
    pub(super) shared_state: Amount,
    /// Random masks, numbers about rows and keys of searches, if there is room to keep them.
    pub(super) kept: Amount,
    /// Bytes of an element of the working type.
    working: u64,
    /// Bytes of results by row or column, all rows or columns together.
    vectors: u64,
    pub(super) offload: Option<Offload>,
}

impl Need {
    /// The need of `task`.
    pub(crate) fn of(task: &Task) -> Self {
        let sources = task.sources.iter().map(|source| {
            (source.dtype(), Way::of(&**source, task.frame.elements, task.reads_once))
        });
        let outputs = task.sinks.iter().map(|sink| sink.dtype());
        let mut need = Self::new(&task.frame, &task.work, task.in_bands, sources, outputs);
        for Memory { held, shared, .. } in task.sources.iter().map(|source| source.memory()) {
            need.worker_state.add(Amount::certain(held));
            need.shared_state.add(Amount::certain(shared));
        }
        // A worker reads one source after the other.
        let reading = task.sources.iter().map(|source| source.memory().reading).max();
        need.worker_state.add(Amount::certain(reading.unwrap_or(0)));
        need.in_f64(task.double)
    }

    /// The need of a tensor made by `work` from sources of these types that come this way.
    pub(crate) fn new(
        frame: &TensorFrame,
        work: &Work,
        in_bands: bool,
        sources: impl Iterator<Item = (DType, Way)>,
        outputs: impl Iterator<Item = DType>,
    ) -> Self {
        let mut need = Self {
            elements: frame.elements,
            sources: sources.map(|(dtype, way)| (dtype.size() as u64, way)).collect(),
            reads_once: work.reads_once(),
            may_be_direct: work.reads_once() || stage::wait_for_model_alone(work.values()),
            outputs: outputs.map(|dtype| dtype.size() as u64).collect(),
            row: frame.row,
            ..Self::default()
        };
        need.worker_state.add(Amount::uncertain(need.outputs.len() as u64 * DIGEST_BYTES));
        let copied = need.sources.iter().filter(|(_, way)| *way != Way::InPlace);
        let (copied, outputs) = (copied.map(|(size, _)| size).sum(), need.outputs.iter().sum());
        need.is_ahead = ahead::suits(work.values(), frame.elements, outputs, copied);
        let mut sizes = need.outputs.iter().chain(need.sources.iter().map(|(size, _)| size));
        let is_double = sizes.any(|&size| size == 8);
        need.working = if is_double { 8 } else { 4 };
        match work {
            Work::Formulas(_) | Work::Numbers(_) => need.add_passes(frame, work.values(), in_bands),
            Work::Arrays(arrays) => need.a_call = Some(arrays.elements_a_call(frame)),
            // The first is kept while the others are compared with it, one by one.
            Work::Identical => need.sources.truncate(2),
        }
        need
    }

    /// The same, computed in f64 also where no type asks for it, if `asked`.
    pub(crate) fn in_f64(mut self, asked: bool) -> Self {
        if asked {
            self.working = size_of::<f64>() as u64;
        }
        self
    }

    fn add_passes(&mut self, frame: &TensorFrame, formulas: &[Value], in_bands: bool) {
        let waits = unknown(formulas);
        let searches = waits.selections.len() as u64;
        // The machine's slots: a few for each source, one for each further output.
        let slots = (2 * self.sources.len() + formulas.len() + 3) as u64;
        self.worker_state.add(Amount::certain(slots * size_of::<f64>() as u64 * CHUNK as u64));
        self.worker_state.add(Amount::uncertain(searches * HISTOGRAM_BYTES));
        self.shared_state.add(Amount::uncertain(searches * SEARCH_BYTES));
        let blocks = searches * SEARCH_BYTES_A_BLOCK * frame.blocks();
        self.shared_state.add(Amount::uncertain(blocks));
        self.searches = searches;
        let kept_keys = searches * selection::kept_bytes(frame.elements);
        let masks = masks::bytes(formulas, frame.elements) + masks::marked_bytes(formulas, frame);
        let rows = stage::kept_rows_bytes(formulas, frame);
        if rows > 0 {
            self.kept_rows = stage::rows_of_passes(formulas).len() as u64;
        }
        let certain = masks + rows;
        self.kept = Amount { expected: certain + kept_keys / 2, most: certain + kept_keys };
        if in_bands {
            // Where two bands meet, in every row, pages are put together, and cells of digests.
            let cells = 2 * CELL as u64 * size_of::<f64>() as u64;
            let seams = 2 * (frame.elements / frame.line) * (PAGE as u64 + cells);
            self.worker_state.add(Amount::uncertain(formulas.len() as u64 * seams));
        }
        let mut one_ranking = 0;
        let mut in_steps = Vec::new();
        for ranking in &waits.rankings {
            let spans = frame.spans(ranking.among);
            let vector = spans.size / spans.stride;
            let (held, placed) = if frame.stores_marks(ranking.among) {
                self.shared_state.add(Amount::certain(Marks::bytes(frame.elements)));
                let (each, placed) = if vector > spans.held() {
                    (DESCENT_BYTES, NEXT_BYTES * spans.held())
                } else {
                    (RANKED_BYTES, PLACED_BYTES * vector)
                };
                self.worker_state.add(Amount::uncertain(each * spans.held()));
                (spans.held(), placed)
            } else {
                in_steps.push(ranking.among);
                self.rankings += 1;
                (0, PLACED_BYTES * vector)
            };
            one_ranking = one_ranking.max(DRAWN_BYTES * held + placed + BINS_BYTES);
        }
        self.worker_state.add(Amount::uncertain(one_ranking));
        let by_row = |reduction: &Arc<Reduction>| reduction.scope == Scope::Row;
        if !in_steps.is_empty() && !frame.stores_rows() && waits.reductions.iter().any(by_row) {
            in_steps.push(Among::Row);
        }
        if let Some(spans) = frame.widest(&in_steps) {
            // Whole vectors of all rankings are ranked together.
            let together = (RANKED_TOGETHER + spans.size).min(frame.elements);
            let an_element = self.rankings * KEY_BYTES + DRAWN_BYTES;
            self.worker_state.add(Amount::uncertain(an_element * together));
            self.edge = self.edge.max(2 * spans.size);
            self.least_step = self.least_step.max(spans.least_step());
        }
        for reduction in &waits.reductions {
            match reduction.scope {
                Scope::Row if frame.stores_rows() => {
                    self.vectors += 8 * frame.rows();
                    self.shared_state.add(Amount::certain(8 * frame.rows()));
                }
                Scope::Row => {
                    self.edge = self.edge.max(2 * frame.row);
                    self.row_reductions += 1;
                }
                Scope::Column if in_bands => {
                    // The sums, and what is computed from them.
                    self.vectors += 8 * BAND;
                    self.worker_state.add(Amount::certain(2 * 8 * BAND));
                }
                Scope::Column => {
                    self.vectors += 8 * frame.line;
                    self.worker_state.add(Amount::certain(8 * frame.line));
                    self.shared_state.add(Amount::certain(8 * frame.line));
                    // Summed up before there is output; the allocator may keep it until later.
                    let blocks = (8 * frame.line + VECTOR_BYTES) * frame.column_blocks();
                    self.shared_state.add(Amount::uncertain(blocks));
                }
                Scope::Tensor | Scope::Model => {
                    self.shared_state.add(Amount::certain(8 * frame.blocks()));
                }
            }
        }
    }

    /// The same where the arithmetic is done elsewhere.
    pub(crate) fn on(self, offload: Option<Offload>) -> Self {
        Self { offload, ..self }
    }

    /// Elements of a piece of `blocks` blocks, and of the rows around it.
    fn around(&self, blocks: u64) -> u64 {
        (blocks * BLOCK_ELEMENTS + self.edge).min(self.elements)
    }

    /// Bytes an element of all sources and outputs.
    fn stored(&self) -> u64 {
        self.sources.iter().map(|(size, _)| size).chain(&self.outputs).sum()
    }

    /// Bytes that a piece of `blocks` blocks takes on the device: its inputs and output, a few
    /// values of the working type, temporaries of eight bytes, vectors.
    pub(super) fn device(&self, blocks: u64) -> u64 {
        let Some(Offload { is_host, .. }) = self.offload else { return 0 };
        let held = (self.sources.len() + self.outputs.len()) as u64 + VALUES_ON_DEVICE;
        let values = held * self.working;
        let fixed = if is_host { HOST_TENSORS } else { DEVICE_SEGMENTS };
        let ranked = if self.rankings > 0 { RANKED_ON_DEVICE } else { 0 };
        let each = self.stored() + values + TEMPORARIES_ON_DEVICE + ranked;
        self.around(blocks) * each + VECTOR_COPIES * self.vectors + fixed
    }

    /// What computing elsewhere takes of this process's memory: the tensors themselves, or buffers
    /// from which a device copies.
    pub(super) fn beside(&self, blocks: u64) -> Amount {
        match self.offload {
            None => Amount::default(),
            // The C library's allocator, which torch uses there, keeps some of what is freed.
            Some(Offload { is_host: true, .. }) => Amount::uncertain(self.device(blocks) * 3 / 2),
            Some(_) => Amount::certain(self.around(blocks) * self.stored()),
        }
    }

    /// What a worker holds where functions make `elements` at once: the bytes as they are stored,
    /// arrays of the working type, the result as an array and as bytes, and as much again for what
    /// the functions make on the way.
    fn call(&self, elements: u64) -> Amount {
        let stored = self.sources.iter().map(|(size, _)| size).chain(&self.outputs);
        let stored = stored.map(|size| AlignedBuffer::resident((elements * size) as usize + PAGE));
        let arrays = (self.sources.len() as u64 + 2) * elements * self.working;
        Amount::certain(stored.sum::<usize>() as u64 + 2 * arrays)
    }

    /// What a worker holds of a piece of `blocks` blocks.
    pub(super) fn piece(&self, blocks: u64) -> Amount {
        if let Some(elements) = self.a_call {
            return self.call(elements);
        }
        let elements = (blocks * BLOCK_ELEMENTS).min(self.elements);
        let output =
            |size: &u64| AlignedBuffer::resident(elements as usize * *size as usize + PAGE) as u64;
        let mut amount = Amount::certain(self.outputs.iter().map(output).sum());
        let widths = self.sources.iter().filter(|(_, way)| *way != Way::InPlace);
        let step = match self.offload {
            None => step_elements(widths.map(|(size, _)| *size)).max(self.least_step).min(elements),
            Some(_) => elements,
        };
        let rows = (step + self.edge).min(self.elements) / self.row.max(1);
        amount.add(Amount::uncertain(self.row_reductions * ROW_BYTES * rows));
        // Those of a unit, in a vector that doubles, until they are with the others.
        let rows = (elements + self.edge).min(self.elements) / self.row.max(1);
        amount.add(Amount::uncertain(self.kept_rows * 2 * size_of::<f64>() as u64 * rows));
        let ranked = (step + self.edge).min(self.elements);
        amount.add(Amount::uncertain(self.rankings * KEPT_BYTES * ranked));
        for &(size, way) in &self.sources {
            amount.add(self.input(size, way, step, elements));
        }
        if self.searches > 0 {
            let most = self.searches * selection::unit_bytes(elements);
            amount.add(Amount { expected: most / 4, most });
            amount.most = amount.most.max(self.sample());
        }
        if self.is_ahead {
            // A mark for each element of a step, a bit for each of a block that a selection keeps, and results
            // for those that were undecided.
            let decided = ahead::most_undecided(elements) * self.outputs.iter().sum::<u64>();
            let bits = self.searches * BLOCK_ELEMENTS / u64::from(u8::BITS);
            amount.add(Amount::certain(step + bits));
            amount.add(Amount::uncertain(decided));
        }
        amount
    }

    /// What its outputs take in pieces of `blocks` blocks, if they are computed ahead.
    pub(super) fn held(&self, blocks: u64) -> Option<Held> {
        if !self.is_ahead || self.offload.is_some() {
            return None;
        }
        let inputs = self.sources.iter().map(|(size, _)| size).sum();
        let unit = (blocks * BLOCK_ELEMENTS).min(self.elements);
        let expected = |elements| {
            let all = self.searches * selection::expected_undecided(self.elements);
            let share = (all as f64 * (elements as f64 / self.elements as f64)) as u64;
            share.min(ahead::most_undecided(elements))
        };
        let bytes =
            |elements, undecided| ahead::held_bytes(&self.outputs, inputs, elements, undecided);
        let most = bytes(unit, ahead::most_undecided(unit));
        Some(Held {
            expected: bytes(self.elements, expected(self.elements)),
            units: self.elements.div_ceil(unit),
            surplus: most - bytes(unit, expected(unit)),
        })
    }

    /// What one worker holds of samples, at a time when it has no piece.
    pub(super) fn sample(&self) -> u64 {
        match self.searches {
            0 => 0,
            // One more is ranked.
            searches => (searches + 1) * selection::sample_bytes(self.elements),
        }
    }

    /// What a worker holds of one input.
    fn input(&self, size: u64, way: Way, step: u64, elements: u64) -> Amount {
        let bytes = |elements: u64| (elements + self.edge).min(self.elements) * size;
        let buffer = |bytes: u64| AlignedBuffer::resident(bytes as usize) as u64;
        let direct = buffer(bytes(elements) + 2 * PAGE as u64);
        match way {
            Way::InPlace if bytes(elements) >= MAPPED_FROM as u64 => {
                // Wherever it begins, it touches so many windows at the most.
                let (bytes, margin) = (bytes(elements), MAP_MARGIN as u64);
                let around = bytes.next_multiple_of(margin) + margin - bytes;
                Amount::certain(bytes).plus(Amount::uncertain(around), 1)
            }
            Way::InPlace => Amount::certain(buffer(bytes(elements))),
            Way::Direct => Amount::certain(direct),
            Way::Copied => {
                let copied = buffer(bytes(step));
                Amount { expected: copied, most: if self.may_be_direct { direct } else { copied } }
            }
        }
    }

    /// Whether a piece of `blocks` blocks that is used in place, if any is, is large enough to be
    /// worth what becomes resident around it.
    fn is_sensible(&self, blocks: u64) -> bool {
        let elements = self.around(blocks);
        let mapped = self.sources.iter().filter(|(_, way)| *way == Way::InPlace);
        let widest = mapped.map(|(size, _)| elements * size).max().unwrap_or(0);
        elements == self.elements || !(MAPPED_FROM as u64..SMALLEST_MAPPED_PIECE).contains(&widest)
    }

    /// Whether the tensor is so small that it is done with its neighbours.
    pub(super) fn is_small(&self) -> bool {
        self.elements <= SMALL
    }

    /// Bytes of all sources and outputs.
    pub(super) fn bytes(&self) -> u64 {
        self.elements * self.stored()
    }

    /// Whether its inputs are read only once.
    pub fn reads_once(&self) -> bool {
        self.reads_once
    }

    /// Blocks in a piece when a worker may hold `bytes`, and `device_bytes` on its device.
    pub(super) fn blocks_within(&self, bytes: u64, device_bytes: u64) -> u64 {
        let widest = self.sources.iter().map(|(size, _)| *size).max().unwrap_or(0);
        let most = LARGEST_PIECE / (widest.max(1) * BLOCK_ELEMENTS);
        let fits = |&blocks: &u64| {
            let held = self.piece(blocks).most + self.beside(blocks).most;
            held <= bytes && self.device(blocks) <= device_bytes
        };
        (1..=most.min(self.elements.div_ceil(BLOCK_ELEMENTS)).max(1))
            .rev()
            .find(|blocks| self.is_sensible(*blocks) && fits(blocks))
            .unwrap_or(1)
    }
}

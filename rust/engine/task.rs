//! One output tensor on its way: which pass it is in, what the finished passes found.

use std::ops::Range;
use std::sync::Arc;

use super::backend::fold;
use super::memory::{Need, Way, step_elements};
use super::source::{Sink, Source};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::formula::bind::Bindings;
use crate::formula::machine::{BAND, TensorFrame};
use crate::formula::masks::{self, KeptMasks};
use crate::formula::selection::{Cut, Histogram, Progress, Search, value_of_key};
use crate::formula::stage::{self, Stage};
use crate::formula::{
    Chosen, Reduction, ReductionKind, Scalar, Scope, Selection, Value, ValueNode,
};
use crate::kernels::{BLOCK, Real};
use crate::methods;
use crate::plan::OutputTensor;

/// What the outputs of a task are made by.
#[derive(Clone, Debug)]
pub enum Work {
    /// Arithmetic: a formula for each output.
    Formulas(Vec<Value>),
    /// Numbers of the whole tensor, each as a value; there is no output.
    Numbers(Vec<Value>),
    /// Every source must have the same bytes, which are each output.
    Identical,
}

impl Work {
    /// What `method` does to make `tensor`.
    pub(crate) fn of(method: &str, tensor: &OutputTensor) -> Result<Self> {
        if !tensor.dtype.is_float() {
            return Ok(Self::Identical);
        }
        let method = methods::find(method)
            .ok_or_else(|| Error::plan(format!("there is no merge method `{method}`")))?;
        Ok(Self::Formulas(vec![method.formula(tensor)?]))
    }

    /// Looking for `scalars`, which are of the whole tensor.
    pub fn numbers(scalars: Vec<Scalar>) -> Self {
        Self::Numbers(scalars.into_iter().map(Value::scalar).collect())
    }

    /// What it is to compute; nothing for a copy.
    pub(crate) fn values(&self) -> &[Value] {
        match self {
            Self::Formulas(values) | Self::Numbers(values) => values,
            Self::Identical => &[],
        }
    }

    /// Both this and `other`, over the same sources.
    pub(crate) fn and(self, other: Self) -> Result<Self> {
        match (self, other) {
            (Self::Formulas(formulas), Self::Formulas(others)) => {
                Ok(Self::Formulas([formulas, others].concat()))
            }
            (Self::Identical, Self::Identical) => Ok(Self::Identical),
            (_, _) => Err(Error::plan("a tensor cannot be both merged and copied in one pass")
                .advice("run the merges one by one")),
        }
    }

    /// The same, with everything that formulas have in common computed once.
    pub(crate) fn shared(self) -> Self {
        match self {
            Self::Formulas(formulas) => Self::Formulas(Bindings::default().bind_all(&formulas)),
            Self::Numbers(numbers) => Self::Numbers(Bindings::default().bind_all(&numbers)),
            Self::Identical => Self::Identical,
        }
    }

    /// Whether a piece of the output depends on more of the inputs than that piece, when the passes
    /// before it are done: on the rest of the rows that it touches.
    pub fn reads_around(&self) -> bool {
        !stage::row_reductions(self.values()).is_empty()
    }

    /// Whether columns are reduced and combined band by band.
    pub(crate) fn in_bands(&self, frame: &TensorFrame) -> bool {
        match self {
            Self::Formulas(values) => frame.has_bands() && stage::columns_come_last(values),
            Self::Numbers(_) | Self::Identical => false,
        }
    }

    /// Whether nothing has to be reduced before the output is computed.
    pub(crate) fn reads_once(&self) -> bool {
        stage::unknown(self.values()).is_empty()
    }
}

/// One output tensor, or the same tensor of several merges: formulas over sources into sinks.
#[derive(Debug)]
pub struct Task {
    pub(crate) frame: TensorFrame,
    pub(crate) sources: Vec<Arc<dyn Source>>,
    /// What to call each source in a message.
    pub(crate) labels: Vec<String>,
    pub(crate) sinks: Vec<Arc<dyn Sink>>,
    pub(crate) work: Work,
    /// Whether the working type is f64.
    pub(crate) double: bool,
    /// See [`Work::reads_once`].
    pub(crate) reads_once: bool,
    /// See [`Work::in_bands`].
    pub(crate) in_bands: bool,
}

impl Task {
    /// A tensor of `shape` called `name`; `seed` and `name` choose its random masks.
    pub fn new(
        name: &str,
        seed: u64,
        shape: &[u64],
        sources: Vec<Arc<dyn Source>>,
        labels: Vec<String>,
        sinks: Vec<Arc<dyn Sink>>,
        work: Work,
    ) -> Self {
        let frame = TensorFrame::new(name, seed, shape);
        let types = sources.iter().map(|source| source.dtype());
        let double = types.chain(sinks.iter().map(|sink| sink.dtype())).any(|t| t == DType::F64);
        let (reads_once, in_bands) = (false, false);
        let work = work.shared();
        let nothing = Work::Identical;
        let mut task =
            Self { frame, sources, labels, sinks, work: nothing, double, reads_once, in_bands };
        task.set_work(work);
        task
    }

    /// Whether something has to be reduced over the whole model first.
    pub(crate) fn needs_sweep(&self) -> bool {
        !self.model_reductions().is_empty()
    }

    fn model_reductions(&self) -> Vec<Arc<Reduction>> {
        stage::next_stage(self.work.values(), Scope::Model, false).reductions
    }

    fn set_work(&mut self, work: Work) {
        self.reads_once = work.reads_once();
        self.in_bands =
            work.in_bands(&self.frame) && self.sinks.iter().all(|sink| sink.takes_any_piece());
        self.work = work;
    }

    pub(crate) fn need(&self) -> Need {
        let sources = self.sources.iter().map(|source| {
            (source.dtype(), Way::of(&**source, self.frame.elements, self.reads_once))
        });
        let outputs = self.sinks.iter().map(|sink| sink.dtype());
        Need::new(&self.frame, &self.work, self.in_bands, sources, outputs)
    }

    /// Bytes of the sources and the outputs.
    pub(crate) fn bytes(&self) -> u64 {
        let types = self.sources.iter().map(|source| source.dtype());
        let types = types.chain(self.sinks.iter().map(|sink| sink.dtype()));
        self.frame.elements * types.map(|dtype| dtype.size() as u64).sum::<u64>()
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.frame.blocks()
    }

    /// How many elements of the sources `inputs` a worker reads at once.
    pub(crate) fn step_elements(&self, inputs: &[usize]) -> u64 {
        let copied = inputs.iter().map(|&index| &self.sources[index]).filter(|s| !s.is_in_place());
        step_elements(copied.map(|source| source.dtype().size() as u64))
    }

    /// The elements of the blocks `blocks`.
    pub(crate) fn elements_of(&self, blocks: Range<u64>) -> Range<u64> {
        let block = BLOCK as u64;
        blocks.start * block..(blocks.end * block).min(self.frame.elements)
    }
}

/// What the workers do with each unit of a pass.
pub(crate) enum Pass {
    /// Look at a few elements, to guess where the thresholds lie.
    Sample(Vec<Arc<Selection>>),
    /// Reduce blocks, and count for selections.
    Reduce { reductions: Vec<Arc<Reduction>>, searches: Vec<SearchView> },
    /// Find the flat index of one element in one block.
    Locate { selection: Arc<Selection>, key: u64, cut: Cut },
    /// Reduce whole rows, one a unit.
    Rows(Vec<Arc<Reduction>>),
    /// Reduce columns over some rows, one column block a unit.
    Columns(Vec<Arc<Reduction>>),
    /// Reduce columns and compute the outputs, one band of columns a unit.
    Bands(Vec<Value>),
    /// Compute the outputs.
    Combine(Vec<Value>),
    /// Compare the sources and copy the first.
    Identical,
}

/// The part of a [`Search`] that a worker needs.
pub(crate) struct SearchView {
    /// Which of the task's searches.
    pub(crate) index: usize,
    pub(crate) value: Value,
    pub(crate) low: u64,
    pub(crate) high: u64,
    pub(crate) shift: u32,
    pub(crate) bins: usize,
}

/// What a worker brings back from a unit.
pub(crate) enum Found {
    Nothing,
    /// For each selection: keys of sampled elements.
    Keys(Vec<Vec<u64>>),
    /// For each reduction: a result a block, from block `first` on; for each search: counts.
    Blocks {
        first: u64,
        sums: Vec<Vec<f64>>,
        counts: Vec<Histogram>,
    },
    Index(u64),
    /// For each reduction: the result of the row.
    Row(Vec<f64>),
    /// For each reduction: a result a column.
    Columns(Vec<Vec<f64>>),
}

struct Searching {
    selection: Arc<Selection>,
    search: Search,
    chosen: Option<Chosen>,
    cut: Option<Cut>,
}

/// A task that has begun.
pub(crate) struct Active {
    pub(crate) task: Arc<Task>,
    /// What to compute, with everything put in that finished passes found; nothing for a copy.
    values: Vec<Value>,
    /// Where to stop: before the merge itself, when only model-wide sums are wanted.
    sweep: bool,
    pub(crate) pass: Arc<Pass>,
    pub(crate) units: u64,
    issued: u64,
    pub(crate) finished: u64,
    /// Blocks a unit of a pass over the tensor has.
    pub(crate) blocks_a_unit: u64,
    /// The reductions of the stage it is in, and whether a pass has summed them.
    reductions: Vec<Arc<Reduction>>,
    summed: bool,
    results: Vec<Vec<f64>>,
    columns: Vec<Vec<Vec<f64>>>,
    searching: Vec<Searching>,
    /// The random masks that are kept between its passes, and the bytes that they may take.
    pub(crate) masks: Option<Arc<KeptMasks>>,
    pub(crate) mask_bytes: u64,
    /// The numbers it looked for: of a sweep, in the order of the formula's model-wide reductions.
    pub(crate) numbers: Vec<f64>,
}

impl Active {
    /// Begins `task`; with `sweep`, only its model-wide reductions. Keeps its random masks if they
    /// are wanted more than once and take no more than `mask_room` bytes.
    pub(crate) fn begin(
        task: Arc<Task>,
        blocks_a_unit: u64,
        sweep: bool,
        mask_room: u64,
    ) -> Option<Self> {
        let values = task.work.values().to_vec();
        let elements = task.frame.elements;
        let bytes = masks::bytes(&values, elements);
        let mask_bytes = if bytes <= mask_room { bytes } else { 0 };
        let masks = (mask_bytes > 0).then(|| KeptMasks::new(&values, elements)).flatten();
        let mut active = Self {
            task,
            values,
            sweep,
            pass: Arc::new(Pass::Identical),
            units: 0,
            issued: 0,
            finished: 0,
            blocks_a_unit,
            reductions: Vec::new(),
            summed: false,
            results: Vec::new(),
            columns: Vec::new(),
            searching: Vec::new(),
            masks: masks.map(Arc::new),
            mask_bytes,
            numbers: Vec::new(),
        };
        active.next_pass().then_some(active)
    }

    fn enter(&mut self, pass: Pass, units: u64) -> bool {
        self.pass = Arc::new(pass);
        (self.units, self.issued, self.finished) = (units, 0, 0);
        true
    }

    /// The next unit to hand out, if there is one.
    ///
    /// Reductions go backwards, so that the combine, which must write forwards, begins with what they
    /// have left in the caches.
    pub(crate) fn issue(&mut self) -> Option<u64> {
        let unit = (self.issued < self.units).then_some(self.issued)?;
        self.issued += 1;
        let backwards = matches!(*self.pass, Pass::Reduce { .. });
        Some(if backwards { self.units - 1 - unit } else { unit })
    }

    fn units_of_blocks(&self) -> u64 {
        self.task.blocks().div_ceil(self.blocks_a_unit)
    }

    /// Enters the pass that comes next; false if there is none.
    fn next_pass(&mut self) -> bool {
        if matches!(self.task.work, Work::Identical) {
            return !self.sweep && self.enter(Pass::Identical, self.units_of_blocks());
        }
        if self.sweep {
            let stage = stage::next_stage(&self.values, Scope::Model, false);
            return !stage.is_empty() && self.begin_stage(stage);
        }
        let stored = self.task.frame.stores_rows();
        for scope in [Scope::Tensor, Scope::Column, Scope::Row] {
            if scope == Scope::Row && !stored {
                continue;
            }
            let stage = stage::next_stage(&self.values, scope, stored);
            if scope == Scope::Column && self.task.in_bands && !stage.is_empty() {
                let bands = self.task.frame.line.div_ceil(BAND);
                return self.enter(Pass::Bands(self.values.clone()), bands);
            }
            if !stage.is_empty() {
                return self.begin_stage(stage);
            }
        }
        if matches!(self.task.work, Work::Numbers(_)) {
            self.numbers = self.values.iter().map(number).collect();
            return false;
        }
        self.enter(Pass::Combine(self.values.clone()), self.units_of_blocks())
    }

    fn begin_stage(&mut self, stage: Stage) -> bool {
        let Stage { reductions, selections } = stage;
        let scope = reductions.first().map(|reduction| reduction.scope);
        self.results = vec![Vec::new(); reductions.len()];
        self.reductions.clone_from(&reductions);
        self.summed = false;
        match scope {
            Some(Scope::Row) => {
                let rows = self.task.frame.rows();
                self.results.iter_mut().for_each(|rows_of| rows_of.resize(rows as usize, 0.0));
                self.enter(Pass::Rows(reductions), rows)
            }
            Some(Scope::Column) => {
                let blocks = self.task.frame.column_blocks();
                self.columns = vec![Vec::new(); blocks as usize];
                self.enter(Pass::Columns(reductions), blocks)
            }
            _ => {
                let blocks = self.task.blocks() as usize;
                self.results.iter_mut().for_each(|sums| sums.resize(blocks, 0.0));
                self.begin_searches(&selections)
            }
        }
    }

    fn begin_searches(&mut self, selections: &[Arc<Selection>]) -> bool {
        let begin = if self.task.double { begin_search::<f64> } else { begin_search::<f32> };
        self.searching = selections.iter().map(|selection| begin(selection, &self.task)).collect();
        let open: Vec<_> = self
            .searching
            .iter()
            .filter(|s| s.chosen.is_none())
            .map(|s| Arc::clone(&s.selection))
            .collect();
        if open.is_empty() || self.task.blocks() < 4 {
            return self.enter_reduce();
        }
        self.enter(Pass::Sample(open), 1)
    }

    fn enter_reduce(&mut self) -> bool {
        let searches: Vec<SearchView> = self
            .searching
            .iter()
            .enumerate()
            .filter(|(_, searching)| searching.chosen.is_none() && searching.cut.is_none())
            .map(|(index, Searching { selection, search, .. })| SearchView {
                index,
                value: selection.value.clone(),
                low: search.low,
                high: search.high,
                shift: search.shift(),
                bins: search.bins(),
            })
            .collect();
        // Sums are taken in the stage's first pass; later ones only narrow the searches.
        let reductions = if self.summed { Vec::new() } else { self.reductions.clone() };
        self.summed = true;
        if searches.is_empty() && reductions.is_empty() {
            return self.locate_or_bind();
        }
        self.enter(Pass::Reduce { reductions, searches }, self.units_of_blocks())
    }

    fn locate_or_bind(&mut self) -> bool {
        if let Some(waiting) = self.searching.iter().find(|s| s.chosen.is_none()) {
            let cut = waiting.cut.expect("a search that is not over waits for an index");
            let selection = Arc::clone(&waiting.selection);
            return self.enter(Pass::Locate { selection, key: waiting.search.low, cut }, 1);
        }
        self.bind()
    }

    /// Takes what a unit found. True if the task goes on, false if it is over.
    pub(crate) fn take(&mut self, unit: u64, found: Found) -> bool {
        match found {
            Found::Nothing => {}
            Found::Keys(keys) => self.guess(keys),
            Found::Blocks { first, sums, counts } => self.add(first, &sums, &counts),
            Found::Index(index) => self.located(index),
            Found::Row(results) => {
                for (rows, result) in self.results.iter_mut().zip(results) {
                    rows[unit as usize] = result;
                }
            }
            Found::Columns(sums) => self.columns[unit as usize] = sums,
        }
        self.finished += 1;
        if self.finished < self.units { true } else { self.advance() }
    }

    fn guess(&mut self, keys: Vec<Vec<u64>>) {
        let open = self.searching.iter_mut().filter(|searching| searching.chosen.is_none());
        for (searching, keys) in open.zip(keys) {
            searching.search.guess(keys);
        }
    }

    fn add(&mut self, first: u64, sums: &[Vec<f64>], counts: &[Histogram]) {
        for (all, part) in self.results.iter_mut().zip(sums) {
            all[first as usize..first as usize + part.len()].copy_from_slice(part);
        }
        let Pass::Reduce { searches, .. } = &*self.pass else { return };
        for (view, counted) in searches.iter().zip(counts) {
            self.searching[view.index].search.add(counted);
        }
    }

    fn located(&mut self, index: u64) {
        let Pass::Locate { selection, .. } = &*self.pass else { return };
        for searching in &mut self.searching {
            if Arc::ptr_eq(&searching.selection, selection) {
                searching.chosen = Some(searching.search.located(index));
            }
        }
    }

    /// Every unit of the pass is done.
    fn advance(&mut self) -> bool {
        let pass = Arc::clone(&self.pass);
        match &*pass {
            Pass::Combine(_) | Pass::Bands(_) | Pass::Identical => false,
            Pass::Sample(_) => self.enter_reduce(),
            Pass::Locate { .. } => self.locate_or_bind(),
            Pass::Rows(_) | Pass::Columns(_) => self.bind(),
            Pass::Reduce { reductions, searches } => {
                self.fold_blocks(reductions);
                for view in searches {
                    self.searching[view.index].advance();
                }
                self.enter_reduce()
            }
        }
    }

    /// Block results become one number a reduction.
    fn fold_blocks(&mut self, reductions: &[Arc<Reduction>]) {
        for (reduction, blocks) in reductions.iter().zip(&mut self.results) {
            *blocks = vec![fold(reduction.kind, blocks)];
        }
    }

    /// Puts the stage's results into the formula and goes on to the next pass.
    fn bind(&mut self) -> bool {
        let reductions = std::mem::take(&mut self.reductions);
        let results = std::mem::take(&mut self.results);
        if self.sweep {
            self.numbers = results.into_iter().map(|mut blocks| blocks.remove(0)).collect();
            return false;
        }
        let mut bindings = Bindings::default();
        for (reduction, values) in reductions.iter().zip(results) {
            if let Some(result) = Self::bound(reduction, values) {
                bindings.reduction(reduction, result);
            }
        }
        self.bind_columns(&reductions, &mut bindings);
        for searching in std::mem::take(&mut self.searching) {
            let chosen = searching.chosen.expect("a bound search is over");
            let value = value_of_key(chosen.threshold, self.task.double);
            bindings.selection(&searching.selection, chosen, value);
        }
        self.values = bindings.bind_all(&self.values);
        self.next_pass()
    }

    /// What a reduction gave; of columns `bind_columns` knows.
    fn bound(reduction: &Reduction, mut values: Vec<f64>) -> Option<Scalar> {
        match reduction.scope {
            Scope::Row => Some(Scalar::vector(Scope::Row, 0, values)),
            Scope::Column => None,
            Scope::Tensor | Scope::Model => Some(Scalar::constant(values.remove(0))),
        }
    }

    fn bind_columns(&mut self, reductions: &[Arc<Reduction>], bindings: &mut Bindings) {
        if self.columns.is_empty() {
            return;
        }
        let columns = std::mem::take(&mut self.columns);
        for (at, reduction) in reductions.iter().enumerate() {
            let width = columns[0][at].len();
            let fold = |column: usize| {
                let mut blocks = columns.iter().map(|block| block[at][column]).collect();
                fold(reduction.kind, &mut blocks)
            };
            let values = (0..width).map(fold).collect();
            bindings.reduction(reduction, Scalar::vector(Scope::Column, 0, values));
        }
    }
}

impl Searching {
    fn advance(&mut self) {
        match self.search.advance() {
            Progress::Again => {}
            Progress::Locate(cut) => self.cut = Some(cut),
            Progress::Done(chosen) => self.chosen = Some(chosen),
        }
    }
}

fn begin_search<T: Real>(selection: &Arc<Selection>, task: &Task) -> Searching {
    let elements = task.frame.elements;
    let count = selection.count.as_constant().unwrap_or(0.0).max(0.0) as u64;
    let nothing = Chosen { threshold: T::NAN.key(), equals_end: 0 };
    let search = Search::new::<T>(count.clamp(1, elements.max(1)), elements.max(1), task.blocks());
    let chosen = (count == 0 || elements == 0).then_some(nothing);
    Searching { selection: Arc::clone(selection), search, chosen, cut: None }
}

/// Puts what was reduced over the whole model into the formulas.
///
/// `found` has, for each task, what the sweep found. Results are folded over the tasks in order.
pub(crate) fn bind_model_results(tasks: &mut [Task], found: &[Vec<f64>]) -> Result<()> {
    let merged: Vec<usize> = (0..tasks.len()).filter(|&task| !found[task].is_empty()).collect();
    let Some(&first) = merged.first() else { return Ok(()) };
    let reductions = tasks[first].model_reductions();
    for &at in &merged {
        let own = tasks[at].model_reductions();
        if !own.iter().map(identity).eq(reductions.iter().map(identity)) {
            let message = "what is reduced over the whole model is not the same for every tensor";
            return Err(Error::plan(message)
                .tensor(&tasks[at].frame.name)
                .advice("give every tensor the same weights: a weight of zero drops an input"));
        }
    }
    let fold_all = |(at, reduction): (usize, &Arc<Reduction>)| {
        fold(reduction.kind, &mut merged.iter().map(|&task| found[task][at]).collect())
    };
    let results: Vec<f64> = reductions.iter().enumerate().map(fold_all).collect();
    for &at in &merged {
        let mut bindings = Bindings::default();
        for (reduction, result) in tasks[at].model_reductions().iter().zip(&results) {
            bindings.reduction(reduction, Scalar::constant(*result));
        }
        let bound = bindings.bind_all(tasks[at].work.values());
        tasks[at].set_work(Work::Formulas(bound));
    }
    Ok(())
}

/// What tells the reductions of a formula apart: their kinds, and the inputs they read.
fn identity(reduction: &Arc<Reduction>) -> (ReductionKind, Vec<usize>) {
    (reduction.kind, stage::inputs_of(&stage::operands(reduction)))
}

/// The number that a value became when everything was put in.
fn number(value: &Value) -> f64 {
    match &*value.0 {
        ValueNode::Scalar(scalar) => scalar.as_constant().unwrap_or(f64::NAN),
        _ => unreachable!("a number was wanted, not elements"),
    }
}

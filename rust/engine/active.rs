//! A task on its way: which pass it is in, and what the finished passes found.

use std::sync::Arc;

use super::backend::fold;
use super::passes::{Found, Pass, SearchView};
use super::task::{Task, Work};
use crate::formula::bind::Bindings;
use crate::formula::machine::BAND;
use crate::formula::masks::{self, KeptMasks};
use crate::formula::selection::{self, Counted, Cut, Guess, Progress, Search, value_of_key};
use crate::formula::stage::{self, Stage};
use crate::formula::{Chosen, Reduction, Scalar, Scope, Selection, Value, ValueNode};
use crate::kernels::Real;

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
    /// The random masks that are kept between its passes.
    pub(crate) masks: Option<Arc<KeptMasks>>,
    /// Bytes that each of its searches may keep of keys.
    search_room: u64,
    /// Bytes that masks and searches may take together.
    pub(crate) kept_bytes: u64,
    /// The numbers it looked for: of a sweep, in the order of the formula's model-wide reductions.
    pub(crate) numbers: Vec<f64>,
}

impl Active {
    /// Begins `task`; with `sweep`, only its model-wide reductions. Keeps its random masks, if they
    /// are wanted more than once, and the keys of its searches, if they take no more than `room`
    /// bytes.
    pub(crate) fn begin(
        task: Arc<Task>,
        blocks_a_unit: u64,
        sweep: bool,
        room: u64,
    ) -> Option<Self> {
        let values = task.work.values().to_vec();
        let elements = task.frame.elements;
        let searches = stage::unknown(&values).selections.len() as u64;
        let within = |bytes: u64, room: u64| if bytes <= room { bytes } else { 0 };
        let search_bytes = within(searches * selection::kept_bytes(elements), room);
        let mask_bytes = within(masks::bytes(&values, elements), room - search_bytes);
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
            search_room: search_bytes / searches.max(1),
            kept_bytes: search_bytes + mask_bytes,
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
        let begin = |selection| begin(selection, &self.task, self.search_room);
        self.searching = selections.iter().map(begin).collect();
        let open = self.searching.iter().filter(|searching| searching.chosen.is_none());
        let open = open.map(|s| (Arc::clone(&s.selection), s.search.wanted()));
        let (selections, ranks): (Vec<_>, Vec<_>) = open.unzip();
        if selections.is_empty() || selection::sampled_runs(self.task.frame.elements) == 0 {
            return self.enter_reduce();
        }
        self.enter(Pass::Sample { selections, ranks }, 1)
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
                interval: search.interval(),
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
            return self.enter(Pass::Locate { selection, key: waiting.search.threshold(), cut }, 1);
        }
        self.bind()
    }

    /// Takes what a unit found. True if the task goes on, false if it is over.
    pub(crate) fn take(&mut self, unit: u64, found: Found) -> bool {
        match found {
            Found::Nothing => {}
            Found::Guesses(guesses) => self.begin_at(guesses),
            Found::Blocks { first, sums, counts } => self.add(first, &sums, counts),
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

    fn begin_at(&mut self, guesses: Vec<Guess>) {
        let open = self.searching.iter_mut().filter(|searching| searching.chosen.is_none());
        for (searching, guess) in open.zip(guesses) {
            searching.search.begin_at(guess);
        }
    }

    fn add(&mut self, first: u64, sums: &[Vec<f64>], counts: Vec<Counted>) {
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
            Pass::Sample { .. } => self.enter_reduce(),
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

fn begin_search<T: Real>(selection: &Arc<Selection>, task: &Task, room: u64) -> Searching {
    let elements = task.frame.elements;
    let count = selection.count.as_constant().unwrap_or(0.0).max(0.0) as u64;
    let nothing = Chosen { threshold: T::NAN.key(), equals_end: 0 };
    let search = Search::new::<T>(count.clamp(1, elements.max(1)), elements.max(1), room);
    let chosen = (count == 0 || elements == 0).then_some(nothing);
    Searching { selection: Arc::clone(selection), search, chosen, cut: None }
}

/// The number that a value became when everything was put in.
fn number(value: &Value) -> f64 {
    match &*value.0 {
        ValueNode::Scalar(scalar) => scalar.as_constant().unwrap_or(f64::NAN),
        _ => unreachable!("a number was wanted, not elements"),
    }
}

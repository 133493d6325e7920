//! A task on its way: which pass it is in, and what the finished passes found.

use std::sync::Arc;

use super::backend::fold;
use super::passes::{Found, Marked, Pass};
use super::task::{Task, Work};
use crate::error::Result;
use crate::formula::bind::Bindings;
use crate::formula::compile::{Purpose, Staged};
use crate::formula::machine::BAND;
use crate::formula::masks::{self, KeptMasks, Marks};
use crate::formula::program::{Along, Setting};
use crate::formula::selection::{self, Counted, Guess, LastKept, Progress, Search, value_of_key};
use crate::formula::stage::{self, Stage};
use crate::formula::{Chosen, Ranking, Reduction, Scalar, Scope, Selection, Value, ValueNode};
use crate::kernels::{BLOCK, Real};

struct Searching {
    selection: Arc<Selection>,
    search: Search,
    chosen: Option<Chosen>,
    last: Option<LastKept>,
}

/// The bytes that a task may keep between its passes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    /// Of keys, for each of its searches.
    a_search: u64,
    searches: u64,
    /// Of random masks.
    masks: u64,
    /// Of what is kept of short rows.
    ranked: u64,
}

impl Room {
    /// What `task` can use of `left` bytes: keys of its searches, if there are any, and random masks,
    /// and marks, if they are wanted more than once; each all or nothing.
    pub(crate) fn of(task: &Task, left: u64) -> Self {
        let (values, elements) = (task.work.values(), task.frame.elements);
        let within = |bytes: u64, left: u64| if bytes <= left { bytes } else { 0 };
        let searches = stage::unknown(values).selections.len() as u64;
        let keys = within(searches * selection::kept_bytes(elements), left);
        let masks = within(masks::bytes(values, elements), left - keys);
        let ranked = within(masks::marked_bytes(values, &task.frame), left - keys - masks);
        Self { a_search: keys / searches.max(1), searches, masks, ranked }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.a_search * self.searches + self.masks + self.ranked
    }
}

/// A task that has begun.
pub(crate) struct Active {
    pub(crate) task: Arc<Task>,
    /// What to compute, with everything put in that finished passes found; nothing for a copy.
    values: Vec<Value>,
    setting: Setting,
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
    /// What the pass it is in ranks for later ones.
    marked: Vec<Marked>,
    /// The random masks that are kept between its passes.
    pub(crate) masks: Option<Arc<KeptMasks>>,
    /// What masks and searches may take.
    pub(crate) room: Room,
    /// The numbers it looked for: of a sweep, in the order of the formula's model-wide reductions.
    pub(crate) numbers: Vec<f64>,
}

impl Active {
    /// Begins `task`; with `sweep`, only its model-wide reductions. Nothing if there is nothing to
    /// do. `fuses` says whether the backend has kernels for what is fused.
    pub(crate) fn begin(
        task: Arc<Task>,
        blocks_a_unit: u64,
        sweep: bool,
        fuses: bool,
        room: Room,
    ) -> Result<Option<Self>> {
        let values = task.work.values().to_vec();
        let elements = task.frame.elements;
        let masks = (room.masks > 0).then(|| KeptMasks::new(&values, elements)).flatten();
        let inputs = task.sources.iter().map(|source| source.dtype()).collect();
        let setting = Setting { inputs, double: task.double, fuses };
        let mut active = Self {
            task,
            values,
            setting,
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
            marked: Vec::new(),
            masks: masks.map(Arc::new),
            room,
            numbers: Vec::new(),
        };
        Ok(active.next_pass()?.then_some(active))
    }

    fn enter(&mut self, pass: Pass, units: u64) -> bool {
        self.pass = Arc::new(pass);
        (self.units, self.issued, self.finished) = (units, 0, 0);
        true
    }

    /// Compiles what is to be done with each segment of a block.
    fn code(&self, purposes: &[Purpose]) -> Result<Staged> {
        let along = Along::Segments(BLOCK as u64);
        Staged::by_row(purposes, along, self.task.frame.row, &self.setting)
    }

    fn reductions(reductions: &[Arc<Reduction>]) -> Vec<Purpose> {
        reductions.iter().cloned().map(Purpose::Reduce).collect()
    }

    /// Each output's formula, to be stored as its type.
    fn stores(&self) -> Vec<Purpose> {
        let each = self.values.iter().zip(&self.task.sinks);
        each.map(|(value, sink)| Purpose::Store(value.clone(), sink.dtype())).collect()
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
    fn next_pass(&mut self) -> Result<bool> {
        if matches!(self.task.work, Work::Identical) {
            return Ok(!self.sweep && self.enter(Pass::Identical, self.units_of_blocks()));
        }
        if let Work::Arrays(arrays) = &self.task.work {
            let units = self.task.frame.elements.div_ceil(self.task.elements_of_calls(arrays));
            return Ok(!self.sweep && self.enter(Pass::Arrays, units));
        }
        if self.sweep {
            let stage = stage::next_stage(&self.values, Scope::Model, &self.task.frame);
            return if stage.is_empty() { Ok(false) } else { self.begin_stage(stage) };
        }
        let stored = self.task.frame.stores_rows();
        for scope in [Scope::Tensor, Scope::Column, Scope::Row] {
            if scope == Scope::Row && !stored {
                continue;
            }
            let stage = stage::next_stage(&self.values, scope, &self.task.frame);
            if scope == Scope::Column && self.task.in_bands && !stage.is_empty() {
                let bands = self.task.frame.line.div_ceil(BAND);
                let along = Along::Segments(BLOCK as u64);
                let code = Staged::by_column(&self.stores(), along, &self.setting)?;
                return Ok(self.enter(Pass::Bands(code), bands));
            }
            if !stage.is_empty() {
                return self.begin_stage(stage);
            }
        }
        let rankings = stage::next_rankings(&self.values, &self.task.frame);
        if !rankings.is_empty() {
            return self.enter_rank(rankings);
        }
        if matches!(self.task.work, Work::Numbers(_)) {
            self.numbers = self.values.iter().map(number).collect();
            return Ok(false);
        }
        let code = self.code(&self.stores())?;
        Ok(self.enter(Pass::Combine(code), self.units_of_blocks()))
    }

    fn enter_rank(&mut self, rankings: Vec<Arc<Ranking>>) -> Result<bool> {
        let frame = &self.task.frame;
        let spans = frame.spans(rankings[0].among);
        let units = spans.count(frame.elements) * spans.bands().1;
        let keys: Vec<_> =
            rankings.iter().map(|ranking| Purpose::Keys(ranking.value.clone())).collect();
        let code = self.code(&keys)?;
        let marks = rankings.into_iter().map(|ranking| self.marks_of(ranking));
        let marks = marks.collect::<Result<_>>()?;
        Ok(self.enter(Pass::Rank { marks, code }, units))
    }

    fn marks_of(&self, ranking: Arc<Ranking>) -> Result<Marked> {
        Ok((ranking, Arc::new(Marks::new(&(0..self.task.frame.elements))?)))
    }

    fn begin_stage(&mut self, stage: Stage) -> Result<bool> {
        let Stage { reductions, selections, .. } = stage;
        let scope = reductions.first().map(|reduction| reduction.scope);
        self.results = vec![Vec::new(); reductions.len()];
        self.reductions.clone_from(&reductions);
        self.summed = false;
        match scope {
            Some(Scope::Row) => {
                let rows = self.task.frame.rows();
                self.results.iter_mut().for_each(|rows_of| rows_of.resize(rows as usize, 0.0));
                let code = self.code(&Self::reductions(&reductions))?;
                Ok(self.enter(Pass::Rows(code), rows))
            }
            Some(Scope::Column) => {
                let blocks = self.task.frame.column_blocks();
                self.columns = vec![Vec::new(); blocks as usize];
                let (purposes, row) = (Self::reductions(&reductions), self.task.frame.row);
                let code = Staged::by_row(&purposes, Along::Columns, row, &self.setting)?;
                Ok(self.enter(Pass::Columns(code), blocks))
            }
            _ => {
                let blocks = self.task.blocks() as usize;
                self.results.iter_mut().for_each(|sums| sums.resize(blocks, 0.0));
                self.begin_searches(&selections)
            }
        }
    }

    fn begin_searches(&mut self, selections: &[Arc<Selection>]) -> Result<bool> {
        let begin = if self.task.double { begin_search::<f64> } else { begin_search::<f32> };
        let begin = |selection| begin(selection, &self.task, self.room.a_search);
        self.searching = selections.iter().map(begin).collect();
        let open = self.searching.iter().filter(|searching| searching.chosen.is_none());
        let open = open.map(|s| (Purpose::Keys(s.selection.value.clone()), s.search.wanted()));
        let (purposes, wanted): (Vec<_>, Vec<_>) = open.unzip();
        if purposes.is_empty() || selection::sampled_runs(self.task.frame.elements) == 0 {
            return self.enter_reduce();
        }
        let code = self.code(&purposes)?;
        Ok(self.enter(Pass::Sample { wanted, code }, 1))
    }

    fn enter_reduce(&mut self) -> Result<bool> {
        let open = self.searching.iter().enumerate();
        let open =
            open.filter(|(_, searching)| searching.chosen.is_none() && searching.last.is_none());
        let open = open.map(|(index, Searching { selection, search, .. })| {
            (index, Purpose::Count(selection.value.clone(), search.interval()))
        });
        let (searches, counts): (Vec<_>, Vec<_>) = open.unzip();
        // Sums are taken in the stage's first pass; later ones only narrow the searches.
        let mut purposes =
            if self.summed { Vec::new() } else { Self::reductions(&self.reductions) };
        self.summed = true;
        purposes.extend(counts);
        if purposes.is_empty() {
            return self.locate_or_bind();
        }
        let code = self.code(&purposes)?;
        if self.room.ranked > 0 && self.marked.is_empty() {
            let rankings = code.levels.iter().flat_map(|level| &level.rankings).cloned();
            self.marked = rankings.map(|ranking| self.marks_of(ranking)).collect::<Result<_>>()?;
        }
        let marks = self.marked.clone();
        Ok(self.enter(Pass::Reduce { searches, marks, code }, self.units_of_blocks()))
    }

    fn locate_or_bind(&mut self) -> Result<bool> {
        let open = self.searching.iter().position(|searching| searching.chosen.is_none());
        let Some(search) = open else { return self.bind() };
        let waiting = &self.searching[search];
        let last = waiting.last.expect("a search that is not over waits for an index");
        let code = self.code(&[Purpose::Keys(waiting.selection.value.clone())])?;
        let key = waiting.search.threshold();
        Ok(self.enter(Pass::Locate { search, key, last, code }, 1))
    }

    /// Takes what a unit found. True if that was the pass's last unit: then [`Self::advance`] it.
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
        self.finished == self.units
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
        for (&search, counted) in searches.iter().zip(counts) {
            self.searching[search].search.add(counted);
        }
    }

    fn located(&mut self, index: u64) {
        let Pass::Locate { search, .. } = *self.pass else { return };
        let searching = &mut self.searching[search];
        searching.chosen = Some(searching.search.located(index));
    }

    /// Every unit of the pass is done: enters the next. False if the task is over.
    pub(crate) fn advance(&mut self) -> Result<bool> {
        let pass = Arc::clone(&self.pass);
        match &*pass {
            Pass::Combine(_) | Pass::Bands(_) | Pass::Arrays | Pass::Identical => Ok(false),
            Pass::Sample { .. } => self.enter_reduce(),
            Pass::Locate { .. } => self.locate_or_bind(),
            Pass::Rows(_) | Pass::Columns(_) => self.bind(),
            Pass::Rank { marks, .. } => {
                self.marked.clone_from(marks);
                self.bind()
            }
            Pass::Reduce { searches, code, .. } => {
                for (&kind, blocks) in code.program.kinds.iter().zip(&mut self.results) {
                    *blocks = vec![fold(kind, blocks)];
                }
                for &search in searches {
                    self.searching[search].advance();
                }
                self.enter_reduce()
            }
        }
    }

    /// Puts the stage's results into the formula and goes on to the next pass.
    fn bind(&mut self) -> Result<bool> {
        let reductions = std::mem::take(&mut self.reductions);
        let results = std::mem::take(&mut self.results);
        if self.sweep {
            self.numbers = results.into_iter().map(|mut blocks| blocks.remove(0)).collect();
            return Ok(false);
        }
        let mut bindings = Bindings::default();
        for (reduction, values) in reductions.iter().zip(results) {
            if let Some(result) = Self::bound(reduction, values) {
                bindings.reduction(reduction, result);
            }
        }
        self.bind_columns(&reductions, &mut bindings);
        for (ranking, marks) in std::mem::take(&mut self.marked) {
            bindings.ranking(&ranking, marks);
        }
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
            Progress::Locate(last) => self.last = Some(last),
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
    Searching { selection: Arc::clone(selection), search, chosen, last: None }
}

/// The number that a value became when everything was put in.
fn number(value: &Value) -> f64 {
    match &*value.0 {
        ValueNode::Scalar(scalar) => scalar.as_constant().unwrap_or(f64::NAN),
        _ => unreachable!("a number was wanted, not elements"),
    }
}

//! A task on its way: which pass it is in, and what the finished passes found.

use std::sync::{Arc, Mutex};

use super::ahead::{self, Ahead, Held, HeldRoom};
use super::backend::fold;
use super::passes::{Found, Marked, Pass, References};
use super::task::{Task, Work};
use crate::dtype::DType;
use crate::error::Result;
use crate::formula::bind::Bindings;
use crate::formula::compile::{Purpose, Staged};
use crate::formula::machine::{BAND, Known};
use crate::formula::masks::{self, KeptMasks, Marks};
use crate::formula::program::{Along, Setting};
use crate::formula::selection::{
    self, Bracket, Counted, Guess, LastKept, Progress, Search, value_of_key,
};
use crate::formula::stage::{self, Stage};
use crate::formula::{Among, Chosen, Reduction, Scalar, Scope, Selection, Value, ValueNode};
use crate::kernels::{BLOCK, Real};

struct Searching {
    selection: Arc<Selection>,
    search: Search,
    /// Where a sample says that it lies.
    bracket: Option<Bracket>,
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
    /// Of the numbers about short rows.
    rows: u64,
    /// Of what is kept of short rows that are ranked.
    ranked: u64,
}

impl Room {
    /// What `task` can use of `left` bytes: keys of its searches, if there are any, and numbers about
    /// rows, random masks and marks, if they are wanted more than once; each all or nothing, those that
    /// spare the most for a byte first.
    pub(crate) fn of(task: &Task, left: u64) -> Self {
        let (values, elements) = (task.work.values(), task.frame.elements);
        let within = |bytes: u64, left: u64| if bytes <= left { bytes } else { 0 };
        let searches = stage::unknown(values).selections.len() as u64;
        let rows = within(stage::kept_rows_bytes(values, &task.frame), left);
        let keys = within(searches * selection::kept_bytes(elements), left - rows);
        let left = left - rows - keys;
        let masks = within(masks::bytes(values, elements), left);
        let ranked = within(masks::marked_bytes(values, &task.frame), left - masks);
        Self { a_search: keys / searches.max(1), searches, masks, rows, ranked }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.a_search * self.searches + self.masks + self.rows + self.ranked
    }
}

/// A stage that a task entered: its formula then, what is to be found, and the first pass.
#[derive(Clone)]
struct Entered {
    values: Vec<Value>,
    stage: Stage,
    pass: Arc<Pass>,
    units: u64,
}

/// The stages of tasks of one kind. As long as no numbers were found they are the same for all of
/// them, so that formulas are bound and compiled for the first one only.
#[derive(Default)]
pub(crate) struct Stages(Vec<Entered>);

/// A task that has begun.
pub(crate) struct Active<'a> {
    pub(crate) task: Arc<Task>,
    /// The stages of others of its kind, as long as they are its own.
    others: Option<&'a mut Stages>,
    /// How many stages it has entered.
    stages: usize,
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
    /// The stage it is in, and whether a pass has summed its reductions.
    stage: Stage,
    summed: bool,
    results: Vec<Vec<f64>>,
    columns: Vec<Vec<Vec<f64>>>,
    searching: Vec<Searching>,
    /// What outputs may take that are computed ahead, until they are.
    held_room: Option<Arc<HeldRoom>>,
    /// The units that were computed ahead, if any are.
    held: Vec<Option<Held>>,
    /// What was found for later passes, and random masks.
    pub(crate) known: Arc<Known>,
    /// What masks and searches may take.
    pub(crate) room: Room,
    /// The numbers it looked for: of a sweep, in the order of the formula's model-wide reductions.
    pub(crate) numbers: Vec<f64>,
}

impl<'a> Active<'a> {
    /// Begins `task`; with `sweep`, only its model-wide reductions. Nothing if there is nothing to
    /// do. `fuses` says whether the backend has kernels for what is fused. `others` are tasks of
    /// the same kind, with as many blocks and as much room. Outputs may be computed ahead where they
    /// are given a `held_room`, and inputs would have to be copied again.
    pub(crate) fn begin(
        task: Arc<Task>,
        blocks_a_unit: u64,
        sweep: bool,
        fuses: bool,
        (room, held_room): (Room, Option<Arc<HeldRoom>>),
        others: Option<&'a mut Stages>,
    ) -> Result<Option<Self>> {
        let values = task.work.values().to_vec();
        let elements = task.frame.elements;
        let bytes = |types: &mut dyn Iterator<Item = DType>| types.map(|t| t.size() as u64).sum();
        let outputs = bytes(&mut task.sinks.iter().map(|sink| sink.dtype()));
        let copied = task.sources.iter().filter(|source| !source.is_in_place());
        let copied = bytes(&mut copied.map(|source| source.dtype()));
        let suits = !sweep && ahead::suits(&values, elements, outputs, copied);
        let held_room = held_room.filter(|_| suits);
        let masks = (room.masks > 0).then(|| KeptMasks::new(&values, elements)).flatten();
        let inputs = task.sources.iter().map(|source| source.dtype()).collect();
        let setting = Setting { inputs, double: task.double, fuses };
        let known = Known { masks: masks.map(Arc::new), ..Known::default() };
        let mut active = Self {
            task,
            others,
            stages: 0,
            values,
            setting,
            sweep,
            pass: Arc::new(Pass::Identical),
            units: 0,
            issued: 0,
            finished: 0,
            blocks_a_unit,
            stage: Stage::default(),
            summed: false,
            results: Vec::new(),
            columns: Vec::new(),
            searching: Vec::new(),
            held_room,
            held: Vec::new(),
            known: Arc::new(known),
            room,
            numbers: Vec::new(),
        };
        Ok(active.next_stage()?.then_some(active))
    }

    fn enter(&mut self, pass: impl Into<Arc<Pass>>, units: u64) -> bool {
        self.pass = pass.into();
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
    fn stores(&self, values: &[Value]) -> Vec<Purpose> {
        let each = values.iter().zip(&self.task.sinks);
        each.map(|(value, sink)| Purpose::Store(value.clone(), sink.dtype())).collect()
    }

    /// What each output is compared with. Those of several merges are told apart, so that each has the
    /// reference that it would have alone.
    fn references(&self, values: &[Value]) -> References {
        let reference = |value: &Value| {
            let inputs = stage::inputs_of(std::slice::from_ref(value));
            self.task.base.filter(|base| inputs.contains(base)).or(inputs.first().copied())
        };
        values.iter().map(reference).collect()
    }

    /// The next unit to hand out, if there is one.
    ///
    /// Reductions go backwards, so that the combine, which must write forwards, begins with what they
    /// have left in the caches; but not where nothing comes after them.
    pub(crate) fn issue(&mut self) -> Option<u64> {
        let unit = (self.issued < self.units).then_some(self.issued)?;
        self.issued += 1;
        let backwards = matches!(*self.pass, Pass::Reduce { .. }) && !self.task.reads_once;
        Some(if backwards { self.units - 1 - unit } else { unit })
    }

    fn units_of_blocks(&self) -> u64 {
        self.task.blocks().div_ceil(self.blocks_a_unit)
    }

    /// Enters the stage that comes next; false if there is none.
    fn next_stage(&mut self) -> Result<bool> {
        if self.follows_others()? {
            return Ok(true);
        }
        let (others, before) = (self.others.take(), self.stages);
        let goes_on = self.find_stage()?;
        // A stage in which there is nothing to look for is over by now, and has no pass to follow.
        if self.stages == before
            && let Some(others) = others
        {
            let (values, stage) = (self.values.clone(), self.stage.clone());
            let (pass, units) = (Arc::clone(&self.pass), self.units);
            others.0.push(Entered { values, stage, pass, units });
            self.others = Some(others);
        }
        self.stages += 1;
        Ok(goes_on)
    }

    /// Enters the next stage as others of its kind did, if some did.
    fn follows_others(&mut self) -> Result<bool> {
        let others = self.others.as_ref();
        let entered = others.and_then(|Stages(others)| others.get(self.stages).cloned());
        let Some(Entered { values, stage, pass, units }) = entered else { return Ok(false) };
        self.values = values;
        self.prepare(stage)?;
        self.summed = matches!(*pass, Pass::Reduce { .. });
        self.stages += 1;
        Ok(self.enter(pass, units))
    }

    /// Finds the next stage of the formula, and compiles its first pass.
    fn find_stage(&mut self) -> Result<bool> {
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
        if self.room.rows > 0 {
            let stage = stage::next_rows(&self.values, &self.task.frame);
            if !stage.is_empty() {
                return self.begin_stage(stage);
            }
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
                let purposes = self.stores(&self.values);
                let code = Staged::by_column(&purposes, along, &self.setting)?;
                let references = self.references(&self.values);
                return Ok(self.enter(Pass::Bands { references, code }, bands));
            }
            if !stage.is_empty() {
                return self.begin_stage(stage);
            }
        }
        let stage = stage::next_rankings(&self.values, &self.task.frame);
        if !stage.is_empty() {
            return self.begin_stage(stage);
        }
        if matches!(self.task.work, Work::Numbers(_)) {
            self.numbers = self.values.iter().map(number).collect();
            return Ok(false);
        }
        let code = self.code(&self.stores(&self.values))?;
        let references = self.references(&self.values);
        let held = std::mem::take(&mut self.held).into_iter().map(Mutex::new).collect();
        Ok(self.enter(Pass::Combine { references, code, held }, self.units_of_blocks()))
    }

    /// Makes room for what the passes of `stage` find.
    fn prepare(&mut self, stage: Stage) -> Result<()> {
        let frame = &self.task.frame;
        let (results, columns) = match stage.scope() {
            Some(Scope::Row) => (frame.rows(), 0),
            Some(Scope::Column) => (0, frame.column_blocks()),
            _ => (frame.blocks(), 0),
        };
        self.results = vec![vec![0.0; results as usize]; stage.reductions.len()];
        self.columns = vec![Vec::new(); columns as usize];
        let begin = if self.task.double { begin_search::<f64> } else { begin_search::<f32> };
        let begin = |selection| begin(selection, &self.task, self.room.a_search);
        self.searching = stage.selections.iter().map(begin).collect();
        self.add_marks(stage.rankings.len())?;
        self.stage = stage;
        self.summed = false;
        Ok(())
    }

    /// Makes room for what the rankings of the stage keep, which are so many.
    fn add_marks(&mut self, count: usize) -> Result<()> {
        let marks = |_| Marks::new(&(0..self.task.frame.elements)).map(Arc::new);
        let marks = (0..count).map(marks).collect::<Result<Vec<_>>>()?;
        Arc::make_mut(&mut self.known).marks.extend(marks);
        Ok(())
    }

    /// The rankings of the stage, and which of the task's they are: the last ones.
    fn marked(&self) -> Vec<Marked> {
        let rankings = &self.stage.rankings;
        rankings.iter().cloned().zip(self.known.marks.len() - rankings.len()..).collect()
    }

    fn enter_rank(&mut self, among: Among) -> Result<bool> {
        let frame = &self.task.frame;
        let spans = frame.spans(among);
        let units = spans.count(frame.elements) * spans.bands().1;
        let marks = self.marked();
        let keys: Vec<_> =
            marks.iter().map(|(ranking, _)| Purpose::Keys(ranking.value.clone())).collect();
        let code = self.code(&keys)?;
        Ok(self.enter(Pass::Rank { marks, code }, units))
    }

    fn begin_stage(&mut self, stage: Stage) -> Result<bool> {
        let scope = stage.scope();
        let purposes = Self::reductions(&stage.reductions);
        let among = stage.rankings.first().map(|ranking| ranking.among);
        self.prepare(stage)?;
        if let Some(among) = among {
            return self.enter_rank(among);
        }
        match scope {
            Some(Scope::Row) if self.task.frame.stores_rows() => {
                Ok(self.enter(Pass::Rows(self.code(&purposes)?), self.task.frame.rows()))
            }
            Some(Scope::Row) => {
                let row = self.task.frame.row;
                let code = Staged::by_row(&purposes, Along::Segments(row), row, &self.setting)?;
                Ok(self.enter(Pass::Rows(code), self.units_of_blocks()))
            }
            Some(Scope::Column) => {
                let row = self.task.frame.row;
                let code = Staged::by_row(&purposes, Along::Columns, row, &self.setting)?;
                Ok(self.enter(Pass::Columns(code), self.task.frame.column_blocks()))
            }
            _ => self.begin_searches(),
        }
    }

    fn begin_searches(&mut self) -> Result<bool> {
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
            if self.summed { Vec::new() } else { Self::reductions(&self.stage.reductions) };
        self.summed = true;
        purposes.extend(counts);
        if purposes.is_empty() {
            return self.locate_or_bind();
        }
        let code = self.code(&purposes)?;
        let ahead = self.ahead(purposes)?;
        if self.room.ranked > 0 && self.stage.rankings.is_empty() {
            let rankings = code.levels.iter().flat_map(|level| &level.rankings);
            self.stage.rankings.extend(rankings.cloned());
            self.add_marks(self.stage.rankings.len())?;
        }
        let marks = self.marked();
        Ok(self.enter(Pass::Reduce { searches, marks, code, ahead }, self.units_of_blocks()))
    }

    /// How the first pass that has `counts` to do computes the outputs too, if that can be.
    fn ahead(&mut self, counts: Vec<Purpose>) -> Result<Option<Box<Ahead>>> {
        let Some(room) = self.held_room.take() else { return Ok(None) };
        let brackets: Option<Vec<_>> = self.searching.iter().map(Searching::bracket).collect();
        let Some(brackets) = brackets else { return Ok(None) };
        let mut known = Known::clone(&self.known);
        let (first, count) = (known.chosen.len(), brackets.len());
        known.chosen.extend(brackets.iter().map(|bracket| bracket.least));
        known.chosen.extend(brackets.iter().map(|bracket| bracket.most));
        let mut bindings = Bindings::default();
        for (which, Searching { selection, .. }) in (first..).zip(&self.searching) {
            // The formula computes with no threshold, or it would not be here.
            bindings.selection(selection, which, f64::NAN);
        }
        let selected = self.searching.iter().map(|found| found.selection.value.clone());
        let values: Vec<Value> = self.values.iter().cloned().chain(selected).collect();
        let mut values = bindings.bind_all(&values);
        let selected = values.split_off(self.values.len());
        let kept = |(which, value): (usize, &Value)| {
            Value::new(ValueNode::Kept { value: value.clone(), which })
        };
        let between = (first..)
            .zip(&selected)
            .map(|(which, value)| &kept((which + count, value)) - &kept((which, value)));
        let undecided = between.reduce(|all, next| &all + &next);
        let Some(undecided) = undecided else { return Ok(None) };
        let mut purposes = counts;
        purposes.extend(self.stores(&values));
        purposes.push(Purpose::Store(undecided, DType::Bool));
        self.held.resize_with(self.units_of_blocks() as usize, || None);
        let (code, known) = (self.code(&purposes)?, Arc::new(known));
        let references = self.references(&values);
        Ok(Some(Box::new(Ahead { code, known, references, room })))
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
            Found::Blocks { first, sums, counts, held } => {
                self.add(first, &sums, counts);
                if held.is_some() {
                    self.held[unit as usize] = held;
                }
            }
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
            searching.bracket = Some(guess.bracket);
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
            Pass::Combine { .. } | Pass::Bands { .. } | Pass::Arrays | Pass::Identical => Ok(false),
            Pass::Sample { .. } => self.enter_reduce(),
            Pass::Locate { .. } => self.locate_or_bind(),
            Pass::Rank { .. } | Pass::Rows(_) | Pass::Columns(_) => self.bind(),
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
        let marked = self.marked();
        let stage = std::mem::take(&mut self.stage);
        let results = std::mem::take(&mut self.results);
        if self.sweep {
            self.numbers = results.into_iter().map(|mut blocks| blocks.remove(0)).collect();
            return Ok(false);
        }
        let searching = std::mem::take(&mut self.searching);
        let chosen = searching.iter().map(|found| found.chosen.expect("a bound search is over"));
        let is_bracketed = |(found, chosen): (&Searching, Chosen)| {
            found.bracket().is_some_and(|bracket| bracket.contains(chosen))
        };
        if !searching.iter().zip(chosen.clone()).all(is_bracketed) {
            self.held.clear();
        }
        let known = Arc::make_mut(&mut self.known);
        let first = known.chosen.len();
        known.chosen.extend(chosen);
        if stage.gives_numbers() {
            self.others = None;
        } else if self.follows_others()? {
            return Ok(true);
        }
        let mut bindings = Bindings::default();
        for (reduction, values) in stage.reductions.iter().zip(results) {
            if let Some(result) = Self::bound(reduction, values) {
                bindings.reduction(reduction, result);
            }
        }
        self.bind_columns(&stage.reductions, &mut bindings);
        for (ranking, which) in &marked {
            bindings.ranking(ranking, *which);
        }
        let found = searching.iter().zip(&self.known.chosen[first..]);
        for (which, (Searching { selection, .. }, chosen)) in (first..).zip(found) {
            let value = value_of_key(chosen.threshold, self.task.double);
            bindings.selection(selection, which, value);
        }
        self.values = bindings.bind_all(&self.values);
        self.next_stage()
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
    fn bracket(&self) -> Option<Bracket> {
        self.bracket.or(self.chosen.map(Bracket::of))
    }

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
    Searching { selection: Arc::clone(selection), search, bracket: None, chosen, last: None }
}

/// The number that a value became when everything was put in.
fn number(value: &Value) -> f64 {
    match &*value.0 {
        ValueNode::Scalar(scalar) => scalar.as_constant().unwrap_or(f64::NAN),
        _ => unreachable!("a number was wanted, not elements"),
    }
}

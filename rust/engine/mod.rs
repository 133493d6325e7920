//! Runs tasks: takes pieces to workers, passes in order, memory within the budget.
//!
//! Every output tensor is a [`Task`]. A task goes through passes (a sample, reductions, one combine)
//! and a pass is cut into units, most of them of whole 64 Ki-element blocks. Workers take the next
//! unit of the oldest task that has one, so the passes over one tensor follow each other while it is
//! in the page cache, and begin the next task when the oldest ones only wait. A few more workers than
//! cores hide the latency of reads and writes. Threads live as long as a run: nothing is left to a
//! fork.

mod active;
pub mod adapted;
mod ahead;
pub mod arrays;
pub(crate) mod backend;
pub mod control;
pub mod digest;
pub mod files;
pub mod journal;
pub mod listing;
pub mod manifest;
pub mod measuring;
pub mod memory;
#[cfg(feature = "python")]
mod merge;
mod model_wide;
pub mod need;
#[cfg_attr(not(feature = "python"), expect(dead_code, reason = "only Python makes parts"))]
mod part;
pub(crate) mod passes;
mod places;
#[cfg(feature = "python")]
pub(crate) mod rehearsal;
mod resume;
pub mod rows;
pub(crate) mod simd;
pub mod source;
mod strided;
pub mod task;
pub mod verifying;
mod worker;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

#[cfg(feature = "python")]
pub(crate) use merge::{Surroundings, merge, predict};
#[cfg(feature = "python")]
pub(crate) use part::{Exchange, Part};

use active::{Active, Room, Stages};
use ahead::HeldRoom;
use backend::Backend;
use control::Control;
use memory::{MemoryPlan, tasks_under_way};
use model_wide::ModelResults;
use need::Need;
use passes::{Found, Pass};
use simd::Simd;
use source::Sink;
use task::{Task, Tasks};
use worker::Worker;

use crate::error::{Error, Result};
use crate::formula::machine::Known;
use crate::kernels::Level;

/// How a run is to be done. None of it changes a byte of the output.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The instruction set.
    pub level: Level,
    /// Threads; fewer are used when the memory is small.
    pub workers: usize,
    /// Bytes that the whole process may have resident.
    pub memory: u64,
    /// Blocks a piece has at the most; for tests.
    pub largest_piece: Option<u64>,
}

/// What a run did.
#[derive(Clone, Debug)]
pub struct Report {
    /// From the first read to the last flush.
    pub seconds: f64,
    /// Bytes of inputs read, re-reads included.
    pub bytes_read: u64,
    /// Bytes of tensors written.
    pub bytes_written: u64,
    /// Tensors finished.
    pub tensors: u64,
    /// Those of them that an earlier run had finished.
    pub tensors_kept: u64,
    /// How the memory was shared out.
    pub memory: MemoryPlan,
    /// The high-water mark of the process's resident set afterwards.
    pub peak_memory: u64,
    /// The instruction set used.
    pub level: Level,
}

/// Of how many kinds of small neighbours a worker remembers the passes: a layer has few kinds, and
/// this memory is not in the plan but in what is allowed for each worker.
const MOST_KINDS: usize = 8;

/// How many of them write at once, where others have something to prepare.
fn most_writing(workers: usize) -> usize {
    workers - workers / 4
}

/// Runs all `tasks`. On an error or a cancellation the workers stop after the piece in hand.
#[expect(clippy::needless_pass_by_value, reason = "what was run is over, and its sinks closed")]
pub fn run(tasks: Vec<Task>, settings: &Settings, control: &Control) -> Result<Report> {
    run_on(&Simd(settings.level), &tasks, settings, control)
}

/// The same, with the arithmetic of `backend`.
pub(crate) fn run_on(
    backend: &dyn Backend,
    tasks: &Vec<Task>,
    settings: &Settings,
    control: &Control,
) -> Result<Report> {
    let offload = backend.offload();
    let needs: Vec<_> = tasks.iter().map(|task| (Need::of(task).on(offload), 1)).collect();
    let memory = MemoryPlan::new(&needs, settings.memory, settings.workers, memory::resident(), 0)?;
    run_planned(backend, tasks, settings, memory, control)
}

/// The same in memory that was shared out before.
pub(crate) fn run_planned(
    backend: &dyn Backend,
    tasks: &dyn Tasks,
    settings: &Settings,
    memory: MemoryPlan,
    control: &Control,
) -> Result<Report> {
    let started = Instant::now();
    let mut model = None;
    // What an earlier run has made needs no numbers any more.
    let is_left = |index| tasks.is_ours(index) && !tasks.is_done(index);
    if tasks.needs_sweep() && (0..tasks.len()).any(is_left) {
        let found = run_all(backend, tasks, settings, &memory, control, Goal::Sweep)?;
        let found = tasks.with_others(found, control)?;
        model = Some(ModelResults::fold(tasks, &found)?);
    }
    run_all(backend, tasks, settings, &memory, control, Goal::Merge(model.as_ref()))?;
    let counted = control.snapshot();
    Ok(Report {
        seconds: started.elapsed().as_secs_f64(),
        bytes_read: counted.bytes_read,
        bytes_written: counted.bytes_written - counted.bytes_kept,
        tensors: counted.tensors,
        tensors_kept: (0..tasks.len()).filter(|&index| tasks.is_done(index)).count() as u64,
        memory,
        peak_memory: memory::peak_resident(),
        level: settings.level,
    })
}

/// What to do with each task.
#[derive(Clone, Copy)]
enum Goal<'a> {
    /// Look for what is reduced over the whole model.
    Sweep,
    /// All of it, with the results of the sweep if there was one.
    Merge(Option<&'a ModelResults>),
}

/// Goes over all tasks; the numbers that those found which look for some.
fn run_all(
    backend: &dyn Backend,
    tasks: &dyn Tasks,
    settings: &Settings,
    memory: &MemoryPlan,
    control: &Control,
    goal: Goal<'_>,
) -> Result<BTreeMap<usize, Vec<f64>>> {
    let known = if matches!(goal, Goal::Sweep) { tasks.known_numbers() } else { BTreeMap::new() };
    let schedule = Schedule {
        state: Mutex::new(State::new(memory.kept_room, known)),
        changed: Condvar::new(),
        held_room: HeldRoom::new(memory.held_room),
        backend,
        level: settings.level,
        tasks,
        memory,
        largest_piece: settings.largest_piece.unwrap_or(u64::MAX).max(1),
        under_way: tasks_under_way(memory.workers),
        most_writing: most_writing(memory.workers),
        control,
        goal,
    };
    let work = || schedule.work(memory.worker_bytes as usize);
    thread::scope(|scope| {
        // This thread works too, so a system that refuses threads only makes it slower.
        for _ in 1..memory.workers {
            if thread::Builder::new().spawn_scoped(scope, work).is_err() {
                break;
            }
        }
        work();
    });
    let State { failure, numbers, .. } =
        schedule.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    failure.map_or(Ok(numbers), Err)
}

/// What the workers share.
struct Schedule<'a> {
    state: Mutex<State>,
    changed: Condvar,
    /// What outputs may take that are computed ahead.
    held_room: Arc<HeldRoom>,
    backend: &'a dyn Backend,
    level: Level,
    tasks: &'a dyn Tasks,
    memory: &'a MemoryPlan,
    /// Blocks a piece has at the most.
    largest_piece: u64,
    under_way: usize,
    /// See [`most_writing`].
    most_writing: usize,
    control: &'a Control,
    goal: Goal<'a>,
}

struct State {
    next_task: usize,
    active: VecDeque<(usize, Active<'static>)>,
    /// What each task found, if it looks for numbers.
    numbers: BTreeMap<usize, Vec<f64>>,
    failure: Option<Error>,
    /// Bytes that further tasks may keep between their passes.
    kept_room: u64,
    /// How many workers have a unit of a pass that writes.
    writing: usize,
    /// How many tasks are not in `active`, since a worker is about to have them enter a pass.
    between_passes: usize,
}

impl State {
    fn new(kept_room: u64, numbers: BTreeMap<usize, Vec<f64>>) -> Self {
        Self {
            next_task: 0,
            active: VecDeque::new(),
            numbers,
            failure: None,
            kept_room,
            writing: 0,
            between_passes: 0,
        }
    }

    /// The next unit of the oldest task that has one, and is in a pass that is `wanted`.
    fn issue(&mut self, wanted: impl Fn(&Pass) -> bool) -> Option<Unit> {
        let active = self.active.iter_mut().filter(|(_, active)| wanted(&active.pass));
        let unit = |(index, active): &mut (usize, Active<'_>)| {
            let number = active.issue()?;
            Some(Unit::of(active, *index, number))
        };
        let unit = active.into_iter().find_map(unit)?;
        self.writing += usize::from(unit.pass.writes());
        Some(unit)
    }
}

/// One unit for one worker.
struct Unit {
    index: usize,
    task: Arc<Task>,
    pass: Arc<Pass>,
    known: Arc<Known>,
    number: u64,
    blocks: u64,
}

impl Unit {
    fn of(active: &Active<'_>, index: usize, number: u64) -> Self {
        Self {
            number,
            index,
            task: Arc::clone(&active.task),
            pass: Arc::clone(&active.pass),
            known: Arc::clone(&active.known),
            blocks: active.blocks_a_unit,
        }
    }
}

/// A task that goes on, or the numbers of one that is over.
type Advanced = std::result::Result<Active<'static>, Vec<f64>>;

enum Next {
    Do(Unit),
    /// Begin the task that comes next, or do small ones that lie together.
    Begin(Range<usize>),
    Wait,
    Over,
}

/// What `work` gives. A panic in it, or in a function that a formula calls, is an error: it must not
/// leave the other workers waiting.
fn guarded<R>(tensor: &str, work: impl FnOnce() -> Result<R>) -> Result<R> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|_| {
        let error = Error::internal("a worker of the engine panicked");
        Err(if tensor.is_empty() { error } else { error.tensor(tensor) })
    })
}

/// Stops the others when a worker panics outside of a unit: they would wait for it for ever.
struct Alarm<'a>(&'a Schedule<'a>);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let error = Error::internal("the scheduler panicked");
            self.0.note(&mut self.0.lock(), Err(error));
        }
    }
}

impl Schedule<'_> {
    fn work(&self, share: usize) {
        let _alarm = Alarm(self);
        let arithmetic = match self.backend.worker() {
            Ok(arithmetic) => arithmetic,
            Err(error) => return self.note(&mut self.lock(), Err(error)),
        };
        let whole = self.backend.offload().is_some();
        let mut worker = Worker::new(arithmetic, self.control, share, whole, self.level);
        let mut state = self.lock();
        loop {
            match self.next(&mut state) {
                Next::Over => break,
                Next::Wait => {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                Next::Begin(tasks) => {
                    drop(state);
                    state = self.begin(&mut worker, tasks);
                    self.changed.notify_all();
                }
                Next::Do(mut unit) => {
                    drop(state);
                    let found = Self::run(&mut worker, &unit);
                    unit.known = Arc::default();
                    state = self.lock();
                    if let Some(mut active) = self.take(&mut state, &unit, found) {
                        // What is computed from numbers takes its time; others go on meanwhile.
                        drop(state);
                        let (index, room, task) = (unit.index, active.room, Arc::clone(&unit.task));
                        drop(unit);
                        let advanced = guarded(&task.frame.name, || active.advance());
                        let advanced = advanced.map(|goes_on| {
                            let numbers = std::mem::take(&mut active.numbers);
                            if goes_on { Ok(active) } else { Err(numbers) }
                        });
                        state = self.lock();
                        state = self.go_on(state, index, &task, room, advanced);
                    }
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(worker: &mut Worker<'_>, unit: &Unit) -> Result<Found> {
        let Unit { task, pass, known, number, blocks, .. } = unit;
        guarded(&task.frame.name, || worker.run(task, pass, *number, *blocks, known))
    }

    fn next(&self, state: &mut State) -> Next {
        if state.failure.is_none() && self.control.is_cancelled() {
            state.failure = Some(control::interrupted());
            self.changed.notify_all();
        }
        if state.failure.is_some() {
            return Next::Over;
        }
        while state.next_task < self.tasks.len() && self.is_done(state, state.next_task) {
            let done = state.next_task..state.next_task + 1;
            self.tasks.are_read(done, matches!(self.goal, Goal::Sweep));
            state.next_task += 1;
        }
        let has_room = state.active.len() + state.between_passes < self.under_way;
        let may_begin = has_room && state.next_task < self.tasks.len();
        // Who writes soon waits for the disk. When those are enough, the others prepare what comes
        // next; else the disk would wait for them later.
        if state.writing >= self.most_writing && !self.tasks.waits_for_room() {
            if let Some(unit) = state.issue(|pass| !pass.writes()) {
                return Next::Do(unit);
            }
            if may_begin && !self.tasks.reads_once(state.next_task) {
                return self.take_up(state);
            }
        }
        if let Some(unit) = state.issue(|_| true) {
            return Next::Do(unit);
        }
        if may_begin {
            return self.take_up(state);
        }
        if state.active.is_empty() && state.between_passes == 0 { Next::Over } else { Next::Wait }
    }

    /// Whether there is nothing to do with a task: another run does it, or an earlier one has.
    fn is_done(&self, state: &State, index: usize) -> bool {
        if !self.tasks.is_ours(index) {
            return true;
        }
        match self.goal {
            Goal::Sweep => state.numbers.contains_key(&index),
            Goal::Merge(_) => self.tasks.is_done(index),
        }
    }

    /// The tasks to begin next: one, or small ones that lie together.
    fn take_up(&self, state: &mut State) -> Next {
        let first = state.next_task;
        let together = match self.goal {
            Goal::Merge(None) => self.tasks.neighbours(first, self.memory.group_bytes / 2),
            Goal::Merge(Some(_)) | Goal::Sweep => 0,
        };
        state.next_task += together.max(1);
        state.between_passes += 1;
        Next::Begin(first..state.next_task)
    }

    /// Begins a task, or does small ones whole.
    fn begin(&self, worker: &mut Worker<'_>, tasks: Range<usize>) -> MutexGuard<'_, State> {
        if tasks.len() > 1 {
            let outcome = guarded("", || self.do_neighbours(worker, tasks));
            let mut state = self.lock();
            state.between_passes -= 1;
            let outcome = outcome.map(|numbers| state.numbers.extend(numbers));
            self.note(&mut state, outcome);
            return state;
        }
        let index = tasks.start;
        let task = match guarded("", || self.make(index)) {
            Ok(task) => Arc::new(task),
            Err(error) => {
                let mut state = self.lock();
                self.note(&mut state, Err(error));
                return state;
            }
        };
        self.control.begin_tensor(&task.frame.name);
        let room = {
            let mut state = self.lock();
            let room = Room::of(&task, state.kept_room);
            state.kept_room -= room.bytes();
            room
        };
        let begun = self.first_pass(&task, room);
        self.go_on(self.lock(), index, &task, room, begun)
    }

    fn make(&self, index: usize) -> Result<Task> {
        let mut task = self.tasks.task(index)?;
        if let Goal::Merge(Some(model)) = self.goal {
            model.bind(&mut task);
        }
        Ok(task)
    }

    /// A task in its first pass; no numbers if there is nothing to do: it has no elements, or nothing
    /// for this sweep.
    fn first_pass(&self, task: &Arc<Task>, room: Room) -> Result<Advanced> {
        if task.frame.elements == 0 {
            return Ok(Err(Vec::new()));
        }
        let offload = self.backend.offload();
        let blocks = self.memory.piece_blocks(&Need::of(task).on(offload)).min(self.largest_piece);
        let is_sweep = matches!(self.goal, Goal::Sweep);
        let fuses = offload.is_none();
        let rooms = (room, (self.memory.held_room > 0).then(|| Arc::clone(&self.held_room)));
        let active = Active::begin(Arc::clone(task), blocks, is_sweep, fuses, rooms, None)?;
        Ok(active.map_or_else(|| Err(Vec::new()), Ok))
    }

    /// Does small tasks that lie together, one after the other; what those found that look for numbers.
    fn do_neighbours(
        &self,
        worker: &mut Worker<'_>,
        tasks: Range<usize>,
    ) -> Result<Vec<(usize, Vec<f64>)>> {
        let gathered = self.tasks.gather(tasks.clone())?;
        self.tasks.are_read(tasks.clone(), false);
        // Half is for their inputs and outputs, half for what one keeps between its passes: with all
        // of its keys at hand a selection is over in one pass, and needs no histogram. A device
        // always counts, so there it keeps none.
        let fuses = self.backend.offload().is_none();
        let left = if fuses { self.memory.group_bytes / 2 } else { 0 };
        let (mut kinds, mut numbers) = (HashMap::new(), Vec::new());
        for index in tasks.clone() {
            self.control.check()?;
            let task = Arc::new(gathered.task(index)?);
            if index == tasks.start {
                self.control.begin_tensor(&task.frame.name);
            }
            let kind = self.tasks.kind(index);
            if kinds.len() == MOST_KINDS && !kinds.contains_key(&kind) {
                kinds.clear();
            }
            let kind = kinds.entry(kind);
            let (room, others) = kind.or_insert_with(|| (Room::of(&task, left), Stages::default()));
            let rooms = (*room, None);
            let begun = Active::begin(Arc::clone(&task), 1, false, fuses, rooms, Some(others));
            let Some(mut active) = begun.map_err(|error| error.tensor(&task.frame.name))? else {
                return Err(Error::internal("a small tensor has nothing to do"));
            };
            let mut goes_on = true;
            while goes_on {
                let number = active.issue().ok_or_else(|| Error::internal("a pass has no unit"))?;
                let found = Self::run(worker, &Unit::of(&active, index, number))?;
                if active.take(number, found) {
                    goes_on = active.advance().map_err(|error| error.tensor(&task.frame.name))?;
                }
            }
            if !active.numbers.is_empty() {
                numbers.push((index, active.numbers));
            }
        }
        gathered.finish()?;
        tasks.clone().for_each(|index| self.tasks.finished(index));
        self.control.finish_tensors(tasks.len() as u64);
        Ok(numbers)
    }

    /// Puts a result where it belongs; the task if that was the last of its pass.
    fn take(
        &self,
        state: &mut State,
        unit: &Unit,
        found: Result<Found>,
    ) -> Option<Active<'static>> {
        state.writing -= usize::from(unit.pass.writes());
        let at = state.active.iter().position(|(index, _)| *index == unit.index)?;
        match found.map(|found| state.active[at].1.take(unit.number, found)) {
            Ok(false) => None,
            Ok(true) => {
                state.between_passes += 1;
                state.active.remove(at).map(|(_, active)| active)
            }
            Err(error) => {
                self.note(state, Err(error));
                None
            }
        }
    }

    /// Goes on with a task that entered a pass, or finishes it if it is over.
    fn go_on<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        index: usize,
        task: &Task,
        room: Room,
        advanced: Result<Advanced>,
    ) -> MutexGuard<'a, State> {
        match advanced {
            Ok(Ok(active)) => {
                state.between_passes -= 1;
                let at = state.active.partition_point(|(other, _)| *other < index);
                state.active.insert(at, (index, active));
            }
            Ok(Err(numbers)) => {
                drop(state);
                self.tasks.are_read(index..index + 1, matches!(self.goal, Goal::Sweep));
                let outcome = self.finish(index, task, &numbers);
                state = self.lock();
                state.between_passes -= 1;
                if !numbers.is_empty() {
                    state.numbers.insert(index, numbers);
                }
                state.kept_room += room.bytes();
                self.note(&mut state, outcome);
            }
            Err(error) => self.note(&mut state, Err(error.tensor(&task.frame.name))),
        }
        self.changed.notify_all();
        state
    }

    fn finish(&self, index: usize, task: &Task, numbers: &[f64]) -> Result<()> {
        if matches!(self.goal, Goal::Sweep) {
            if !numbers.is_empty() {
                self.tasks.found(index, numbers);
            }
            return Ok(());
        }
        self.control.finish_tensors(1);
        let finish = |sink: &Arc<dyn Sink>| sink.finish();
        task.sinks.iter().try_for_each(finish).map_err(|error| error.tensor(&task.frame.name))?;
        self.tasks.finished(index);
        Ok(())
    }

    fn note(&self, state: &mut State, outcome: Result<()>) {
        if let Err(error) = outcome {
            state.failure.get_or_insert(error);
            self.changed.notify_all();
            self.control.end_waits();
        }
    }
}

//! Runs tasks: takes pieces to workers, passes in order, memory within the budget.
//!
//! Every output tensor is a [`Task`]. A task goes through passes (a sample, reductions, one combine)
//! and a pass is cut into units, most of them of whole 64 Ki-element blocks. Workers take the next
//! unit of the oldest task that has one, so the passes over one tensor follow each other while it is
//! in the page cache, and begin the next task when the oldest ones only wait. A few more workers than
//! cores hide the latency of reads and writes. Threads live as long as a run: nothing is left to a
//! fork.

mod active;
pub mod arrays;
pub(crate) mod backend;
pub mod control;
pub mod files;
mod fused;
pub mod memory;
#[cfg(feature = "python")]
mod merge;
mod model_wide;
pub mod need;
pub(crate) mod passes;
mod places;
#[cfg(feature = "python")]
pub(crate) mod rehearsal;
pub(crate) mod simd;
pub mod source;
pub mod task;
mod worker;

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

#[cfg(feature = "python")]
pub(crate) use merge::{merge, predict};

use active::Active;
use backend::Backend;
use control::Control;
use memory::MemoryPlan;
use model_wide::ModelResults;
use passes::{Found, Pass};
use simd::Simd;
use source::Sink;
use task::{Task, Tasks};
use worker::Worker;

use crate::error::{Error, Result};
use crate::formula::masks::{self, KeptMasks};
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
    /// How the memory was shared out.
    pub memory: MemoryPlan,
    /// The high-water mark of the process's resident set afterwards.
    pub peak_memory: u64,
    /// The instruction set used.
    pub level: Level,
}

/// How many tasks may be under way at once.
pub(crate) fn tasks_under_way(workers: usize) -> usize {
    workers + 2
}

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
    let needs: Vec<_> = tasks.iter().map(|task| (task.need().on(offload), 1)).collect();
    let memory = MemoryPlan::new(&needs, settings.memory, settings.workers, memory::resident())?;
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
    if tasks.needs_sweep()? {
        let found = run_all(backend, tasks, settings, &memory, control, Goal::Sweep)?;
        model = Some(ModelResults::fold(tasks, &found)?);
    }
    run_all(backend, tasks, settings, &memory, control, Goal::Merge(model.as_ref()))?;
    let counted = control.snapshot();
    Ok(Report {
        seconds: started.elapsed().as_secs_f64(),
        bytes_read: counted.bytes_read,
        bytes_written: counted.bytes_written,
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
    let schedule = Schedule {
        state: Mutex::new(State::new(memory.mask_room)),
        changed: Condvar::new(),
        backend,
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
    backend: &'a dyn Backend,
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
    /// How many workers are about to begin tasks.
    beginning: usize,
    active: VecDeque<(usize, Active)>,
    /// What each task found, if it looks for numbers.
    numbers: BTreeMap<usize, Vec<f64>>,
    failure: Option<Error>,
    /// Bytes that the random masks of further tasks may take.
    mask_room: u64,
    /// How many workers have a unit of a pass that writes.
    writing: usize,
}

impl State {
    fn new(mask_room: u64) -> Self {
        Self {
            next_task: 0,
            beginning: 0,
            active: VecDeque::new(),
            numbers: BTreeMap::new(),
            failure: None,
            mask_room,
            writing: 0,
        }
    }

    /// Bytes for the random masks of `task`: all that it needs, or none.
    fn take_mask_room(&mut self, task: &Task) -> u64 {
        let wanted = masks::bytes(task.work.values(), task.frame.elements);
        let room = if wanted <= self.mask_room { wanted } else { 0 };
        self.mask_room -= room;
        room
    }

    /// Adds a task that has begun, among older and younger ones.
    fn add(&mut self, index: usize, active: Active) {
        let place = self.active.partition_point(|(other, _)| *other < index);
        self.active.insert(place, (index, active));
    }

    /// The next unit of the oldest task that has one, and is in a pass that is `wanted`.
    fn issue(&mut self, wanted: impl Fn(&Pass) -> bool) -> Option<Unit> {
        let active = self.active.iter_mut().filter(|(_, active)| wanted(&active.pass));
        let unit = |(index, active): &mut (usize, Active)| {
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
    masks: Option<Arc<KeptMasks>>,
    number: u64,
    blocks: u64,
}

impl Unit {
    fn of(active: &Active, index: usize, number: u64) -> Self {
        Self {
            number,
            index,
            task: Arc::clone(&active.task),
            pass: Arc::clone(&active.pass),
            masks: active.masks.clone(),
            blocks: active.blocks_a_unit,
        }
    }
}

enum Next {
    Do(Unit),
    /// The task that comes next, or small ones that lie together.
    Begin(Range<usize>),
    Wait,
    Over,
}

/// Stops the others when a worker panics outside of a unit: they would wait for it for ever.
struct Alarm<'a>(&'a Schedule<'a>);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let error = Error::internal("the scheduler panicked");
            self.0.lock().failure.get_or_insert(error);
            self.0.changed.notify_all();
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
        let mut worker = Worker::new(arithmetic, self.control, share, whole);
        let mut state = self.lock();
        loop {
            match self.next(&mut state) {
                Next::Over => break,
                Next::Wait => {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                Next::Begin(tasks) => {
                    drop(state);
                    let begun = self.begin(&mut worker, tasks);
                    state = self.lock();
                    state.beginning -= 1;
                    match begun {
                        Ok(Some((index, active))) => state.add(index, active),
                        Ok(None) => {}
                        Err(error) => self.note(&mut state, Err(error)),
                    }
                    self.changed.notify_all();
                }
                Next::Do(mut unit) => {
                    drop(state);
                    let found = Self::run(&mut worker, &unit);
                    unit.masks = None;
                    state = self.lock();
                    if let Some(done) = self.take(&mut state, &unit, found) {
                        drop(state);
                        // The masks are let go of before others get their room.
                        let mask_bytes = done.mask_bytes;
                        drop(done);
                        let outcome = self.finish(&unit.task);
                        state = self.lock();
                        state.mask_room += mask_bytes;
                        self.note(&mut state, outcome);
                    }
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(worker: &mut Worker<'_>, unit: &Unit) -> Result<Found> {
        let Unit { task, pass, masks, number, blocks, .. } = unit;
        // A panic in a worker must not leave the others waiting for its unit.
        let run = std::panic::AssertUnwindSafe(|| {
            worker.run(task, pass, *number, *blocks, masks.as_ref())
        });
        std::panic::catch_unwind(run).unwrap_or_else(|_| {
            Err(Error::internal("a worker of the engine panicked").tensor(&task.frame.name))
        })
    }

    fn next(&self, state: &mut State) -> Next {
        if state.failure.is_none() && self.control.is_cancelled() {
            state.failure = Some(control::interrupted());
            self.changed.notify_all();
        }
        if state.failure.is_some() {
            return Next::Over;
        }
        let has_room = state.active.len() + state.beginning < self.under_way;
        let may_begin = has_room && state.next_task < self.tasks.len();
        // Who writes soon waits for the disk. When those are enough, the others prepare what comes
        // next; else the disk would wait for them later.
        if state.writing >= self.most_writing {
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
        let is_over = state.active.is_empty() && state.beginning == 0;
        if is_over { Next::Over } else { Next::Wait }
    }

    /// The tasks to begin next: one, or small ones that lie together.
    fn take_up(&self, state: &mut State) -> Next {
        let first = state.next_task;
        let together = match self.goal {
            Goal::Merge(None) => self.tasks.neighbours(first, self.memory.group_bytes),
            Goal::Merge(Some(_)) | Goal::Sweep => 0,
        };
        state.next_task += together.max(1);
        state.beginning += 1;
        Next::Begin(first..state.next_task)
    }

    /// Begins a task, or does small ones whole. What is under way then.
    fn begin(
        &self,
        worker: &mut Worker<'_>,
        tasks: Range<usize>,
    ) -> Result<Option<(usize, Active)>> {
        if tasks.len() > 1 {
            return self.do_neighbours(worker, tasks).map(|()| None);
        }
        let index = tasks.start;
        let mut task = self.tasks.task(index)?;
        if let Goal::Merge(Some(model)) = self.goal {
            model.bind(&mut task);
        }
        self.control.begin_tensor(&task.frame.name);
        let task = Arc::new(task);
        if task.frame.elements > 0 {
            let blocks = task.need().on(self.backend.offload()).piece_blocks(self.memory);
            let blocks = blocks.min(self.largest_piece);
            let is_sweep = matches!(self.goal, Goal::Sweep);
            let room = self.lock().take_mask_room(&task);
            if let Some(active) = Active::begin(Arc::clone(&task), blocks, is_sweep, room) {
                self.lock().mask_room += room - active.mask_bytes;
                return Ok(Some((index, active)));
            }
            self.lock().mask_room += room;
        }
        self.finish(&task)?;
        Ok(None)
    }

    /// Does small tasks that lie together, one after the other.
    fn do_neighbours(&self, worker: &mut Worker<'_>, tasks: Range<usize>) -> Result<()> {
        let gathered = self.tasks.gather(tasks.clone())?;
        self.control.begin_tensor(&gathered.task(tasks.start)?.frame.name);
        for index in tasks.clone() {
            self.control.check()?;
            let task = Arc::new(gathered.task(index)?);
            let Some(mut active) = Active::begin(task, 1, false, 0) else {
                return Err(Error::internal("a small tensor has nothing to do"));
            };
            let mut goes_on = true;
            while goes_on {
                let number = active.issue().ok_or_else(|| Error::internal("a pass has no unit"))?;
                let unit = Unit::of(&active, index, number);
                let found = Self::run(worker, &unit)?;
                goes_on = active.take(number, found);
            }
        }
        gathered.finish()?;
        self.control.finish_tensors(tasks.len() as u64);
        Ok(())
    }

    /// Puts a result where it belongs; the task if that was its last.
    fn take(&self, state: &mut State, unit: &Unit, found: Result<Found>) -> Option<Active> {
        state.writing -= usize::from(unit.pass.writes());
        let at = state.active.iter().position(|(index, _)| *index == unit.index)?;
        let taken = found.map(|found| state.active[at].1.take(unit.number, found));
        self.changed.notify_all();
        match taken {
            Ok(true) => None,
            Ok(false) => {
                let (index, mut active) = state.active.remove(at)?;
                let numbers = std::mem::take(&mut active.numbers);
                if !numbers.is_empty() {
                    state.numbers.insert(index, numbers);
                }
                Some(active)
            }
            Err(error) => {
                state.failure.get_or_insert(error);
                None
            }
        }
    }

    fn finish(&self, task: &Task) -> Result<()> {
        if matches!(self.goal, Goal::Sweep) {
            return Ok(());
        }
        self.control.finish_tensors(1);
        let finish = |sink: &Arc<dyn Sink>| sink.finish();
        task.sinks.iter().try_for_each(finish).map_err(|error| error.tensor(&task.frame.name))
    }

    fn note(&self, state: &mut State, outcome: Result<()>) {
        if let Err(error) = outcome {
            state.failure.get_or_insert(error);
            self.changed.notify_all();
        }
    }
}

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
pub mod listing;
pub mod memory;
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

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use active::{Active, Room};
use backend::Backend;
use control::Control;
use memory::{MemoryPlan, tasks_under_way};
use model_wide::bind_model_results;
use need::Need;
use passes::{Found, Pass};
use simd::Simd;
use source::Sink;
use task::Task;
use worker::Worker;

use crate::error::{Error, Result};
use crate::formula::masks::KeptMasks;
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

/// How many of them write at once, where others have something to prepare.
fn most_writing(workers: usize) -> usize {
    workers - workers / 4
}

/// Runs all `tasks`. On an error or a cancellation the workers stop after the piece in hand.
pub fn run(tasks: Vec<Task>, settings: &Settings, control: &Control) -> Result<Report> {
    run_on(&Simd(settings.level), tasks, settings, control)
}

/// The same, with the arithmetic of `backend`.
pub(crate) fn run_on(
    backend: &dyn Backend,
    mut tasks: Vec<Task>,
    settings: &Settings,
    control: &Control,
) -> Result<Report> {
    let started = Instant::now();
    let baseline = memory::resident();
    let offload = backend.offload();
    let needs: Vec<Need> = tasks.iter().map(|task| Need::of(task).on(offload)).collect();
    let memory = MemoryPlan::new(&needs, settings.memory, settings.workers, baseline)?;
    if tasks.iter().any(Task::needs_sweep) {
        let sums = run_all(backend, &mut tasks, settings, &memory, control, true)?;
        bind_model_results(&mut tasks, &sums)?;
    }
    run_all(backend, &mut tasks, settings, &memory, control, false)?;
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

/// Goes over all tasks; the numbers that each found. A sweep looks for those of the model only.
fn run_all(
    backend: &dyn Backend,
    tasks: &mut Vec<Task>,
    settings: &Settings,
    memory: &MemoryPlan,
    control: &Control,
    sweep: bool,
) -> Result<Vec<Vec<f64>>> {
    let shared: Vec<Arc<Task>> = tasks.drain(..).map(Arc::new).collect();
    let most = settings.largest_piece.unwrap_or(u64::MAX).max(1);
    let schedule = Schedule {
        state: Mutex::new(State::new(shared.len(), memory.kept_room)),
        changed: Condvar::new(),
        backend,
        tasks: &shared,
        piece_blocks: shared
            .iter()
            .map(|task| memory.piece_blocks(&Need::of(task).on(backend.offload())).min(most))
            .collect(),
        under_way: tasks_under_way(memory.workers),
        most_writing: most_writing(memory.workers),
        control,
        sweep,
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
    if let Some(failure) = failure {
        return Err(failure);
    }
    let unshare = |task| Arc::try_unwrap(task).expect("what was under way is over");
    tasks.extend(shared.into_iter().map(unshare));
    Ok(numbers)
}

/// What the workers share.
struct Schedule<'a> {
    state: Mutex<State>,
    changed: Condvar,
    backend: &'a dyn Backend,
    tasks: &'a [Arc<Task>],
    piece_blocks: Vec<u64>,
    under_way: usize,
    /// See [`most_writing`].
    most_writing: usize,
    control: &'a Control,
    sweep: bool,
}

struct State {
    next_task: usize,
    active: VecDeque<(usize, Active)>,
    /// What each task found, if it looks for numbers.
    numbers: Vec<Vec<f64>>,
    failure: Option<Error>,
    /// Bytes that further tasks may keep between their passes.
    kept_room: u64,
    /// How many workers have a unit of a pass that writes.
    writing: usize,
    /// How many tasks are not in `active`, since a worker is about to have them enter a pass.
    between_passes: usize,
}

impl State {
    fn new(tasks: usize, kept_room: u64) -> Self {
        let numbers = vec![Vec::new(); tasks];
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
        let unit = |(index, active): &mut (usize, Active)| {
            Some(Unit {
                number: active.issue()?,
                index: *index,
                task: Arc::clone(&active.task),
                pass: Arc::clone(&active.pass),
                masks: active.masks.clone(),
                blocks: active.blocks_a_unit,
            })
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

/// A task that goes on, or the numbers of one that is over.
type Advanced = std::result::Result<Active, Vec<f64>>;

enum Next {
    Do(Unit),
    /// Begin this task, which may keep so much.
    Begin(usize, Room),
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
                Next::Begin(index, room) => {
                    drop(state);
                    let begun = self.begin(index, room);
                    state = self.lock();
                    state = self.go_on(state, index, room, begun);
                }
                Next::Do(mut unit) => {
                    drop(state);
                    let found = Self::run(&mut worker, &unit);
                    unit.masks = None;
                    state = self.lock();
                    if let Some(mut active) = self.take(&mut state, &unit, found) {
                        // What is computed from numbers takes its time; others go on meanwhile.
                        drop(state);
                        let (index, room) = (unit.index, active.room);
                        drop(unit);
                        let advanced = active.advance();
                        let advanced = advanced.map(|goes_on| {
                            let numbers = std::mem::take(&mut active.numbers);
                            if goes_on { Ok(active) } else { Err(numbers) }
                        });
                        state = self.lock();
                        state = self.go_on(state, index, room, advanced);
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
        let next_task = self.tasks.get(state.next_task);
        let next_task =
            next_task.filter(|_| state.active.len() + state.between_passes < self.under_way);
        // Who writes soon waits for the disk. When those are enough, the others prepare what comes
        // next; else the disk would wait for them later.
        if state.writing >= self.most_writing {
            if let Some(unit) = state.issue(|pass| !pass.writes()) {
                return Next::Do(unit);
            }
            if next_task.is_some_and(|task| !task.reads_once) {
                return self.next_task(state);
            }
        }
        if let Some(unit) = state.issue(|_| true) {
            return Next::Do(unit);
        }
        if next_task.is_some() {
            return self.next_task(state);
        }
        if state.active.is_empty() && state.between_passes == 0 { Next::Over } else { Next::Wait }
    }

    /// The next task.
    fn next_task(&self, state: &mut State) -> Next {
        let index = state.next_task;
        state.next_task += 1;
        let task = &self.tasks[index];
        self.control.begin_tensor(&task.frame.name);
        let room = Room::of(task, state.kept_room);
        state.kept_room -= room.bytes();
        state.between_passes += 1;
        Next::Begin(index, room)
    }

    /// Task `index` in its first pass; no numbers if there is nothing to do: it has no elements, or
    /// nothing for this sweep.
    fn begin(&self, index: usize, room: Room) -> Result<Advanced> {
        let task = Arc::clone(&self.tasks[index]);
        if task.frame.elements == 0 {
            return Ok(Err(Vec::new()));
        }
        let (blocks, fuses) = (self.piece_blocks[index], self.backend.offload().is_none());
        let active = Active::begin(task, blocks, self.sweep, fuses, room)?;
        Ok(active.map_or_else(|| Err(Vec::new()), Ok))
    }

    /// Puts a result where it belongs; the task if that was the last of its pass.
    fn take(&self, state: &mut State, unit: &Unit, found: Result<Found>) -> Option<Active> {
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
                let outcome = self.finish(index);
                state = self.lock();
                state.between_passes -= 1;
                state.numbers[index] = numbers;
                state.kept_room += room.bytes();
                self.note(&mut state, outcome);
            }
            Err(error) => self.note(&mut state, Err(error.tensor(&self.tasks[index].frame.name))),
        }
        self.changed.notify_all();
        state
    }

    fn finish(&self, index: usize) -> Result<()> {
        if self.sweep {
            return Ok(());
        }
        self.control.finish_tensor();
        let task = &self.tasks[index];
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

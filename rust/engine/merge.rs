//! A merge from beginning to end: what it needs, whether that is allowed, the run, and whether the
//! inputs are still what they were.

use std::sync::Arc;

use super::backend::Backend;
use super::control::Control;
use super::digest::{Digests, Observer};
use super::files::{self, FileModes, Merges};
use super::journal::Journals;
use super::memory::{self, MemoryPlan};
use super::need::{Need, Offload};
use super::{Report, Settings, run_planned};
use crate::error::Result;
use crate::io::{self, OutputFolder};
use crate::plan::{InputFile, Plan};

/// What is told of finished tensors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Telling<'a> {
    /// Told of each; without it there are no digests, and no journal.
    pub(crate) digests: Option<&'a Arc<Digests>>,
    /// Where an earlier run has told of them, and this one does.
    pub(crate) journals: Option<Journals<'a>>,
}

/// Executes merges of the same tensors: reads the inputs once, and writes the shards of each plan,
/// under partial names, into its folder. Also tells which files of each were written, and how they
/// were left.
///
/// Memory is shared out once, before any space is taken: what cannot fit is refused. `planned` is the
/// most that was resident while the merge was planned, where that was the peak of the process.
pub(crate) fn merge(
    backend: &dyn Backend,
    merges: &[(&Plan, OutputFolder)],
    modes: FileModes,
    settings: &Settings,
    planned: u64,
    telling: Telling<'_>,
    control: &Control,
) -> Result<(Report, Vec<Vec<InputFile>>)> {
    let (plans, folders): (Vec<&Plan>, Vec<&OutputFolder>) =
        merges.iter().map(|(plan, folder)| (*plan, folder)).unzip();
    let files = &plans.first().map_or(&[][..], |plan| &plan.files);
    plans.first().map_or(Ok(()), |plan| check_placed(plan))?;
    let (mut tasks, needs) = Merges::open(plans.clone(), modes.read)?;
    let needs = on(needs, backend.offload());
    let (budget, workers) = (settings.memory, settings.workers);
    let memory = MemoryPlan::new(&needs, budget, workers, memory::resident(), planned)?;
    drop(needs);
    let Telling { digests, journals } = telling;
    if let (Some(digests), Some(journals)) = (digests, journals) {
        tasks.resume(&folders, journals, digests, workers, control)?;
    }
    tasks.create_shards(&folders, modes.write).inspect_err(|_| tasks.remove_unvouched())?;
    if let Some(digests) = digests {
        tasks.observe(Arc::clone(digests) as Arc<dyn Observer>);
    }
    let run = || run_planned(backend, &tasks, settings, memory, control);
    let report = tasks.journaled(control, run)?;
    io::check_unchanged(files)?;
    Ok((report, tasks.written()))
}

/// Fails if a file that is read is not here.
fn check_placed(plan: &Plan) -> Result<()> {
    let used = plan.files_of(plan.tensors());
    let remote = used.into_iter().find_map(|file| plan.files[file].remote.as_ref());
    remote.map_or(Ok(()), |remote| Err(files::not_here(remote)))
}

/// How `settings.memory` bytes would be shared out by merges that are made together; and whether an
/// input is read more than once.
pub(crate) fn predict(
    plans: &[&Plan],
    modes: FileModes,
    offload: Option<Offload>,
    memory: u64,
    workers: usize,
) -> Result<(MemoryPlan, bool)> {
    let (tasks, needs) = Merges::open(plans.to_vec(), modes.read)?;
    drop(tasks);
    let needs = on(needs, offload);
    // Who runs them holds what is known of each tensor.
    let tensors = plans.first().map_or(0, |plan| plan.len());
    let resident = memory::resident() + Digests::bytes(plans.len(), tensors);
    let memory = MemoryPlan::new(&needs, memory, workers, resident, 0)?;
    Ok((memory, needs.iter().any(|(need, _)| !need.reads_once())))
}

/// The same needs where the arithmetic is done on `offload`.
fn on(needs: Vec<(Need, usize)>, offload: Option<Offload>) -> Vec<(Need, usize)> {
    needs.into_iter().map(|(need, count)| (need.on(offload), count)).collect()
}

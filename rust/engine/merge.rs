//! A merge from beginning to end: what it needs, whether that is allowed, the run, and whether the
//! inputs are still what they were.

use std::sync::Arc;

use super::backend::Backend;
use super::control::Control;
use super::digest::{Digests, Observer};
use super::files::{FileModes, Merges};
use super::journal::{self, Journals};
use super::memory::{self, MemoryPlan};
use super::need::{Need, Offload};
use super::part::Part;
use super::{Report, Settings, run_planned};
use crate::error::Result;
use crate::io::{self, OutputFolder, Spool};
use crate::plan::{InputFile, Plan};

/// What there is beside a merge.
#[derive(Debug)]
pub(crate) struct Surroundings<'a> {
    /// The most that was resident while the merge was planned, where that was the peak of the process.
    pub(crate) planned: u64,
    /// What files that are not here come by, and the bytes that those may take who fetch them.
    pub(crate) spool: Option<Arc<Spool>>,
    pub(crate) beside: u64,
    /// Told of each tensor that is finished; without it there are no digests, and no journal.
    pub(crate) digests: Option<&'a Arc<Digests>>,
    /// Where an earlier run has told of them, and this one does.
    pub(crate) journals: Option<Journals<'a>>,
    /// Which part of the plans is made, unless it is all of them.
    pub(crate) part: Option<Part>,
}

/// Executes merges of the same tensors: reads the inputs once, and writes the shards of each plan,
/// under partial names, into its folder. Also tells which files of each were written, and how they
/// were left.
///
/// Memory is shared out once, before any space is taken: what cannot fit is refused.
pub(crate) fn merge(
    backend: &dyn Backend,
    merges: &[(&Plan, OutputFolder)],
    modes: FileModes,
    settings: &Settings,
    around: Surroundings<'_>,
    control: &Control,
) -> Result<(Report, Vec<Vec<InputFile>>)> {
    let (plans, folders): (Vec<&Plan>, Vec<&OutputFolder>) =
        merges.iter().map(|(plan, folder)| (*plan, folder)).unzip();
    let files = &plans.first().map_or(&[][..], |plan| &plan.files);
    let Surroundings { planned, spool, beside, digests, journals, part } = around;
    if let Some(spool) = spool.clone() {
        control.on_end(move || spool.stop());
    }
    let (mut tasks, needs) = Merges::open(plans.clone(), modes.read, spool.clone())?;
    tasks.part = part;
    tasks.check_readable()?;
    let needs = on(needs, backend.offload());
    let (budget, workers) = (settings.memory, settings.workers);
    let tensors = plans.first().map_or(0, |plan| plan.len());
    let journal = if journals.is_some() { journal::bytes(tensors) } else { 0 };
    let baseline = memory::resident() + beside + journal;
    let memory = MemoryPlan::new(&needs, budget, workers, baseline, planned)?;
    drop(needs);
    if let (Some(digests), Some(journals)) = (digests, journals) {
        tasks.resume(&folders, journals, digests, workers, control)?;
    }
    tasks.create_shards(&folders, modes.write).inspect_err(|_| tasks.remove_unvouched())?;
    if let Some(digests) = digests {
        tasks.observe(Arc::clone(digests) as Arc<dyn Observer>);
    }
    if let Some(spool) = spool {
        spool.begin();
    }
    let run = || run_planned(backend, &tasks, settings, memory, control);
    let report = tasks.journaled(control, run)?;
    io::check_unchanged(files)?;
    Ok((report, tasks.written()))
}

/// How `memory` bytes would be shared out by merges that are made together, where `beside` bytes
/// are for others; and whether an input is read more than once.
pub(crate) fn predict(
    plans: &[&Plan],
    modes: FileModes,
    offload: Option<Offload>,
    memory: u64,
    workers: usize,
    beside: u64,
) -> Result<(MemoryPlan, bool)> {
    let (tasks, needs) = Merges::open(plans.to_vec(), modes.read, None)?;
    drop(tasks);
    let needs = on(needs, offload);
    // Who runs them holds what is known of each tensor, and writes it down.
    let tensors = plans.first().map_or(0, |plan| plan.len());
    let known = Digests::bytes(plans.len(), tensors) + journal::bytes(tensors);
    let resident = memory::resident() + beside + known;
    let memory = MemoryPlan::new(&needs, memory, workers, resident, 0)?;
    Ok((memory, needs.iter().any(|(need, _)| !need.reads_once())))
}

/// The same needs where the arithmetic is done on `offload`.
fn on(needs: Vec<(Need, usize)>, offload: Option<Offload>) -> Vec<(Need, usize)> {
    needs.into_iter().map(|(need, count)| (need.on(offload), count)).collect()
}

//! A merge from beginning to end: what it needs, whether that is allowed, the run, and whether the
//! inputs are still what they were.

use std::path::Path;

use super::backend::Backend;
use super::control::Control;
use super::files::{FileModes, Merges};
use super::memory::{self, MemoryPlan};
use super::need::{Need, Offload};
use super::{Report, Settings, run_planned};
use crate::error::Result;
use crate::io;
use crate::plan::Plan;

/// Executes merges of the same tensors: reads the inputs once, and writes the shards of each plan,
/// under partial names, into its directory.
///
/// Memory is shared out once, before any space is taken: what cannot fit is refused.
pub(crate) fn merge(
    backend: &dyn Backend,
    merges: &[(&Plan, &Path)],
    modes: FileModes,
    settings: &Settings,
    control: &Control,
) -> Result<Report> {
    let (plans, directories): (Vec<&Plan>, Vec<&Path>) = merges.iter().copied().unzip();
    let files = &plans.first().map_or(&[][..], |plan| &plan.files);
    let mut tasks = Merges::open(plans.clone(), modes.read)?;
    let needs = needs_on(&tasks, backend.offload())?;
    let memory = MemoryPlan::new(&needs, settings.memory, settings.workers, memory::resident())?;
    drop(needs);
    tasks.create_shards(&directories, modes.write)?;
    let report = run_planned(backend, &tasks, settings, memory, control)?;
    io::check_unchanged(files)?;
    Ok(report)
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
    let tasks = Merges::open(plans.to_vec(), modes.read)?;
    let needs = needs_on(&tasks, offload)?;
    let planned = MemoryPlan::new(&needs, memory, workers, memory::resident())?;
    Ok((planned, needs.iter().any(|(need, _)| !need.reads_once())))
}

fn needs_on(tasks: &Merges<'_>, offload: Option<Offload>) -> Result<Vec<(Need, usize)>> {
    let needs = tasks.needs()?;
    Ok(needs.into_iter().map(|(need, count)| (need.on(offload), count)).collect())
}

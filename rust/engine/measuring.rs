//! Numbers about the tensors of files: a merge whose formulas are numbers, and which writes nothing.

use std::collections::BTreeMap;

use super::control::Control;
use super::files::{Merges, Purpose};
use super::memory::{self, MemoryPlan};
use super::simd::Simd;
use super::{Goal, Settings, run_all};
use crate::error::Result;
use crate::io::{self, ReadPath};
use crate::methods::measures::Measure;
use crate::plan::Plan;

/// What a tensor's numbers take besides themselves, until all are found.
const KEPT_WITH: u64 = 64;

/// Finds the numbers of each tensor of `plan`: as many as `measure` has, one tensor after the other.
/// NaN stands where there is none, and 0 for all of a tensor without elements.
pub fn measure(
    measure: Measure,
    plan: &Plan,
    read: ReadPath,
    settings: &Settings,
    control: &Control,
) -> Result<Vec<f64>> {
    // Each number is there twice at the end.
    let results = plan.len() as u64 * (2 * 8 * measure.width() as u64 + KEPT_WITH);
    let find = |plan: &Plan, is_finite: bool| {
        let purpose = Purpose::Measured(measure, is_finite);
        let (tasks, needs) = Merges::open_to(purpose, vec![plan], read, None)?;
        let baseline = memory::resident() + results;
        let memory = MemoryPlan::new(&needs, settings.memory, settings.workers, baseline, 0)?;
        let backend = Simd(settings.level);
        run_all(&backend, &tasks, settings, &memory, control, Goal::Merge(None))
    };
    let mut found = find(plan, true)?;
    let others = found.iter().filter(|(_, numbers)| measure.shows_others(numbers));
    let others: Vec<usize> = others.map(|(&row, _)| row).collect();
    if !others.is_empty() {
        let again = find(&plan.only(&others), false)?;
        found.extend(again.into_iter().map(|(at, numbers)| (others[at], numbers)));
    }
    io::check_unchanged(&plan.files)?;
    Ok(in_rows(found, plan.len(), measure.width()))
}

fn in_rows(found: BTreeMap<usize, Vec<f64>>, rows: usize, width: usize) -> Vec<f64> {
    let mut all = vec![0.0; rows * width];
    for (row, numbers) in found {
        let row = &mut all[row * width..][..width];
        row.fill(f64::NAN);
        row[..numbers.len()].copy_from_slice(&numbers);
    }
    all
}

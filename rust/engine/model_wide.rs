//! What is reduced over the whole model: folded over the tensors, and put into their formulas.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use super::backend::fold;
use super::task::{Task, Tasks, Work};
use crate::error::{Error, Result};
use crate::formula::bind::Bindings;
use crate::formula::stage;
use crate::formula::{Reduction, ReductionKind, Scalar};

/// What was reduced over the whole model: the results of each formula's reductions, in their order.
pub(crate) struct ModelResults(Vec<f64>);

impl ModelResults {
    /// Folds what the sweep `found` for each task over the tasks in order.
    pub(crate) fn fold(tasks: &dyn Tasks, found: &BTreeMap<usize, Vec<f64>>) -> Result<Self> {
        let mut merged = found.keys().copied();
        let Some(first) = merged.next() else { return Ok(Self(Vec::new())) };
        let reductions = tasks.task(first)?.model_reductions();
        let mut kinds = HashSet::from([tasks.kind(first)]);
        for at in merged {
            if !kinds.insert(tasks.kind(at)) {
                continue;
            }
            let task = tasks.task(at)?;
            if !task.model_reductions().iter().map(identity).eq(reductions.iter().map(identity)) {
                let message =
                    "what is reduced over the whole model is not the same for every tensor";
                return Err(Error::plan(message).tensor(&task.frame.name).advice(
                    "give every tensor the same weights: a weight of zero drops an input",
                ));
            }
        }
        let fold_all = |(at, reduction): (usize, &Arc<Reduction>)| {
            let each = found.values().filter_map(|numbers| numbers.get(at).copied());
            fold(reduction.kind, &mut each.collect())
        };
        Ok(Self(reductions.iter().enumerate().map(fold_all).collect()))
    }

    /// Puts the results into the formulas of `task`.
    pub(crate) fn bind(&self, task: &mut Task) {
        let reductions = task.model_reductions();
        if reductions.is_empty() {
            return;
        }
        let mut bindings = Bindings::default();
        for (reduction, result) in reductions.iter().zip(&self.0) {
            bindings.reduction(reduction, Scalar::constant(*result));
        }
        let bound = bindings.bind_all(task.work.values());
        task.set_work(Work::Formulas(bound));
    }
}

/// What tells the reductions of a formula apart: their kinds, and the inputs they read.
fn identity(reduction: &Arc<Reduction>) -> (ReductionKind, Vec<usize>) {
    (reduction.kind, stage::inputs_of(&stage::operands(reduction)))
}

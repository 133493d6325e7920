//! What is reduced over the whole model: folded over the tensors, and put into their formulas.

use std::sync::Arc;

use super::backend::fold;
use super::task::{Task, Work};
use crate::error::{Error, Result};
use crate::formula::bind::Bindings;
use crate::formula::stage;
use crate::formula::{Reduction, ReductionKind, Scalar};

/// Puts what was reduced over the whole model into the formulas.
///
/// `found` has, for each task, what the sweep found. Results are folded over the tasks in order.
pub(crate) fn bind_model_results(tasks: &mut [Task], found: &[Vec<f64>]) -> Result<()> {
    let merged: Vec<usize> = (0..tasks.len()).filter(|&task| !found[task].is_empty()).collect();
    let Some(&first) = merged.first() else { return Ok(()) };
    let reductions = tasks[first].model_reductions();
    for &at in &merged {
        let own = tasks[at].model_reductions();
        if !own.iter().map(identity).eq(reductions.iter().map(identity)) {
            let message = "what is reduced over the whole model is not the same for every tensor";
            return Err(Error::plan(message)
                .tensor(&tasks[at].frame.name)
                .advice("give every tensor the same weights: a weight of zero drops an input"));
        }
    }
    let fold_all = |(at, reduction): (usize, &Arc<Reduction>)| {
        fold(reduction.kind, &mut merged.iter().map(|&task| found[task][at]).collect())
    };
    let results: Vec<f64> = reductions.iter().enumerate().map(fold_all).collect();
    for &at in &merged {
        let mut bindings = Bindings::default();
        for (reduction, result) in tasks[at].model_reductions().iter().zip(&results) {
            bindings.reduction(reduction, Scalar::constant(*result));
        }
        let bound = bindings.bind_all(tasks[at].work.values());
        tasks[at].set_work(Work::Formulas(bound));
    }
    Ok(())
}

/// What tells the reductions of a formula apart: their kinds, and the inputs they read.
fn identity(reduction: &Arc<Reduction>) -> (ReductionKind, Vec<usize>) {
    (reduction.kind, stage::inputs_of(&stage::operands(reduction)))
}

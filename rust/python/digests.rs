//! What is known of the tensors that a merge has made.

use std::sync::Arc;

use pyo3::prelude::*;

use super::enter::enter;
use crate::engine::digest;
use crate::engine::files::OnDemand;
use crate::io::ReadPath;
use crate::plan::Plan;

/// Digests and statistics of the tensors of one merge.
#[pyclass(frozen, module = "oxmerge._core")]
pub(super) struct Digests {
    plan: Arc<Plan>,
    all: Arc<digest::Digests>,
    merge: usize,
}

impl Digests {
    pub(super) fn new(plan: Arc<Plan>, all: Arc<digest::Digests>, merge: usize) -> Self {
        Self { plan, all, merge }
    }

    /// What is known of each tensor, while `look` looks at it.
    pub(super) fn look<R>(&self, look: impl FnOnce(&[Option<digest::TensorDigest>]) -> R) -> R {
        look(&self.all.of(self.merge))
    }
}

#[pymethods]
impl Digests {
    /// The tensors that have elements which are NaN or infinite: index, and how many are which.
    fn nonfinite(&self) -> Vec<(usize, u64, u64)> {
        self.look(|known| {
            let each = known.iter().enumerate().filter_map(|(index, known)| {
                let found = known.as_ref()?.statistics?;
                (!found.is_finite()).then_some((index, found.nan, found.infinite))
            });
            each.collect()
        })
    }

    /// Of the tensors that are made of several inputs and were compared with one of them: how many there
    /// are, and how many have an element of another value.
    fn changes(&self) -> (usize, usize) {
        self.look(|known| {
            let merged = self.plan.tensors().zip(known);
            let compared = merged.filter(|(tensor, _)| tensor.sources().len() > 1);
            let compared = compared.filter_map(|(_, known)| known.as_ref()?.statistics);
            let compared = compared.filter(|found| found.compared > 0);
            compared.fold((0, 0), |(all, changed), found| {
                (all + 1, changed + usize::from(found.changed > 0))
            })
        })
    }

    /// Of the tensors at `indices`: whether an input has elements that are NaN or infinite. Reads
    /// them; of those that are not here nothing is known.
    fn have_odd_inputs(&self, py: Python<'_>, indices: Vec<usize>) -> PyResult<Vec<Option<bool>>> {
        enter(py, None, |control| {
            let inputs = OnDemand::open(Arc::clone(&self.plan), ReadPath::Auto, None)?;
            indices.iter().map(|&index| inputs.has_odd_input(index, control)).collect()
        })
    }
}

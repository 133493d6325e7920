//! The passes over a tensor: what a worker does with each unit, and what it brings back.

use std::sync::Arc;

use crate::formula::selection::{Counted, Cut, Guess, Interval, Rank};
use crate::formula::{Reduction, Selection, Value};

/// What the workers do with each unit of a pass.
pub(crate) enum Pass {
    /// Look at a few elements, to guess where the thresholds lie.
    Sample { selections: Vec<Arc<Selection>>, ranks: Vec<Rank> },
    /// Reduce blocks, and count for selections.
    Reduce { reductions: Vec<Arc<Reduction>>, searches: Vec<SearchView> },
    /// Find the flat index of one element in one block.
    Locate { selection: Arc<Selection>, key: u64, cut: Cut },
    /// Reduce whole rows, one a unit.
    Rows(Vec<Arc<Reduction>>),
    /// Reduce columns over some rows, one column block a unit.
    Columns(Vec<Arc<Reduction>>),
    /// Reduce columns and compute the outputs, one band of columns a unit.
    Bands(Vec<Value>),
    /// Compute the outputs.
    Combine(Vec<Value>),
    /// Compare the sources and copy the first.
    Identical,
}

impl Pass {
    /// Whether its units end with output that is written.
    pub(crate) fn writes(&self) -> bool {
        matches!(self, Self::Bands(_) | Self::Combine(_) | Self::Identical)
    }
}

/// The part of a [`Search`](crate::formula::selection::Search) that a worker needs.
pub(crate) struct SearchView {
    /// Which of the task's searches.
    pub(crate) index: usize,
    pub(crate) value: Value,
    pub(crate) interval: Interval,
}

/// What a worker brings back from a unit.
pub(crate) enum Found {
    Nothing,
    /// For each selection: where its threshold may lie.
    Guesses(Vec<Guess>),
    /// For each reduction: a result a block, from block `first` on; for each search: counts.
    Blocks {
        first: u64,
        sums: Vec<Vec<f64>>,
        counts: Vec<Counted>,
    },
    Index(u64),
    /// For each reduction: the result of the row.
    Row(Vec<f64>),
    /// For each reduction: a result a column.
    Columns(Vec<Vec<f64>>),
}

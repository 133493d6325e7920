//! The passes over a tensor: what a worker does with each unit, and what it brings back.

use std::sync::{Arc, Mutex};

use super::ahead::{Ahead, Held};
use crate::formula::Ranking;
use crate::formula::compile::Staged;
use crate::formula::selection::{Counted, Guess, LastKept, Wanted};

/// A ranking, and which of the task's it is, by which its marks are known.
pub(crate) type Marked = (Arc<Ranking>, usize);

/// For each output, the input that its digest compares it with: the base if it is read, else the first
/// that is.
pub(crate) type References = Vec<Option<usize>>;

/// What the workers do with each unit of a pass. It is compiled when the pass is entered.
#[derive(Debug)]
pub(crate) enum Pass {
    /// Look at a few elements, to guess where the thresholds lie.
    Sample { wanted: Vec<Wanted>, code: Staged },
    /// Reduce blocks, and count for some of the task's searches; mark what is kept of short rows that
    /// are ranked on the way, for later passes. Outputs may be computed ahead.
    Reduce { searches: Vec<usize>, marks: Vec<Marked>, code: Staged, ahead: Option<Box<Ahead>> },
    /// Find the flat index of an element, for one of the searches, in one block.
    Locate { search: usize, key: u64, last: LastKept, code: Staged },
    /// Reduce whole rows: a long one a unit; of short ones, those that begin in some blocks.
    Rows(Staged),
    /// Rank long vectors, some of those that lie together a unit, and mark what is kept.
    Rank { marks: Vec<Marked>, code: Staged },
    /// Reduce columns over some rows, one column block a unit.
    Columns(Staged),
    /// Reduce columns and compute the outputs, one band of columns a unit.
    Bands { references: References, code: Staged },
    /// Compute the outputs, or finish the units that are `held`.
    Combine { references: References, code: Staged, held: Vec<Mutex<Option<Held>>> },
    /// Call functions of arrays.
    Arrays,
    /// Compare the sources and copy the first.
    Identical,
}

impl Pass {
    /// Whether its units end with output that is written.
    pub(crate) fn writes(&self) -> bool {
        matches!(self, Self::Bands { .. } | Self::Combine { .. } | Self::Arrays | Self::Identical)
    }
}

/// What a worker brings back from a unit.
pub(crate) enum Found {
    Nothing,
    /// For each selection: where its threshold may lie.
    Guesses(Vec<Guess>),
    /// For each reduction: a result a block or short row, from the one `first` on; for each search: counts; and the
    /// outputs, if they were computed ahead.
    Blocks {
        first: u64,
        sums: Vec<Vec<f64>>,
        counts: Vec<Counted>,
        held: Option<Held>,
    },
    Index(u64),
    /// For each reduction: the result of the row.
    Row(Vec<f64>),
    /// For each reduction: a result a column.
    Columns(Vec<Vec<f64>>),
}

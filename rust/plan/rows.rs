//! Rows by token: the vocabulary tensor that an input would be if its model had the output's tokens.
//!
//! Each output row is a row of the input's own tensor, of another input's, the mean of several, or
//! zero. A [`RowMap`] says which, in runs of consecutive rows: vocabularies mostly agree, so that a
//! few runs say it all. One map serves the embedding, the head and the head's bias.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::error::{Error, Result};

/// More rows than any vocabulary has.
pub const MOST_ROWS: u64 = 1 << 22;
/// More models than any merge has.
const MOST_PARTS: u32 = 1 << 12;

/// Where the rows of a run come from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// Consecutive rows of a part, from this one on.
    Part {
        /// Which of the parts.
        part: u32,
        /// The first of its rows.
        first: u32,
    },
    /// Nothing but zeros.
    Zero,
    /// Each is the mean of these rows, given by part and row.
    Mean(Vec<(u32, u32)>),
    /// Each is the mean of all rows before this run, which is the last.
    MeanAbove,
}

/// What each output row is, as runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct RowMap {
    /// The first row after each run.
    ends: Vec<u32>,
    origins: Vec<Origin>,
    /// How each part is used.
    uses: Vec<Use>,
}

/// How a part is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Use {
    /// How many rows it must have.
    rows: u64,
    /// Whether rows of it are in a mean.
    in_mean: bool,
}

impl RowMap {
    /// The map of these runs, each of so many rows; what goes on as the run before did, joins it.
    pub fn of(runs: impl IntoIterator<Item = Result<(u32, Origin)>>) -> Result<Self> {
        let mut map = Self::default();
        for run in runs {
            let (count, origin) = run?;
            if count > 0 {
                map.push(count, origin)?;
            }
        }
        map.ends.shrink_to_fit();
        map.origins.shrink_to_fit();
        Ok(map)
    }

    fn push(&mut self, count: u32, origin: Origin) -> Result<()> {
        let before = self.rows() as u32;
        let end = self.rows() + u64::from(count);
        if end > MOST_ROWS {
            return Err(Error::plan("there are more rows than a vocabulary has")
                .expected(format_args!("at most {MOST_ROWS}"))
                .found(end));
        }
        match &origin {
            Origin::Part { part, first } => {
                self.use_part(*part, u64::from(*first) + u64::from(count))?;
            }
            Origin::Mean(rows) if rows.is_empty() => {
                return Err(Error::plan("a row is the mean of no rows"));
            }
            Origin::Mean(rows) => {
                for &(part, row) in rows {
                    self.use_part(part, u64::from(row) + 1)?.in_mean = true;
                }
            }
            Origin::MeanAbove if before == 0 => {
                return Err(Error::plan("a row is the mean of no rows"));
            }
            Origin::MeanAbove | Origin::Zero => {}
        }
        let start = self.ends.len().checked_sub(2).map_or(0, |at| self.ends[at]);
        let joins = match (self.origins.last(), &origin) {
            (Some(Origin::MeanAbove), Origin::MeanAbove) | (Some(Origin::Zero), Origin::Zero) => {
                true
            }
            (Some(Origin::MeanAbove), _) => {
                return Err(Error::plan("rows that are the mean of those above come last"));
            }
            (Some(Origin::Part { part, first }), Origin::Part { part: other, first: next }) => {
                part == other && u64::from(*first) + u64::from(before - start) == u64::from(*next)
            }
            _ => false,
        };
        if joins {
            self.ends.pop();
        } else {
            self.origins.push(origin);
        }
        self.ends.push(end as u32);
        Ok(())
    }

    /// Takes down that a part must have so many rows.
    fn use_part(&mut self, part: u32, rows: u64) -> Result<&mut Use> {
        if part >= MOST_PARTS {
            return Err(Error::plan("a row is taken from where there is none")
                .expected(format_args!("a part below {MOST_PARTS}"))
                .found(part));
        }
        let part = part as usize;
        self.uses.resize(self.uses.len().max(part + 1), Use::default());
        let of_part = &mut self.uses[part];
        of_part.rows = of_part.rows.max(rows);
        Ok(of_part)
    }

    /// How many rows there are.
    pub fn rows(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0).into()
    }

    /// The runs with their rows, in order.
    pub fn runs(&self) -> impl Iterator<Item = (Range<u64>, &Origin)> {
        self.runs_from(0)
    }

    /// The runs from the one on that has row `row`.
    pub fn runs_from(&self, row: u64) -> impl Iterator<Item = (Range<u64>, &Origin)> {
        let first = self.ends.partition_point(|&end| u64::from(end) <= row);
        (first..self.ends.len()).map(|at| {
            let start = at.checked_sub(1).map_or(0, |before| self.ends[before]);
            (start.into()..self.ends[at].into(), &self.origins[at])
        })
    }

    /// Whether each row is the one with its number in part `part`, which has `rows`.
    pub fn is_whole(&self, part: u32, rows: u64) -> bool {
        self.origins == [Origin::Part { part, first: 0 }] && self.rows() == rows
    }

    /// The type that holds its rows of parts of these types: theirs where they have one and rows are
    /// only taken, else one that arithmetic is done in.
    pub fn dtype(&self, parts: &[DType]) -> DType {
        let used = self.uses.iter().zip(parts).filter(|(each, _)| each.rows > 0);
        let types = used.map(
            |(Use { in_mean, .. }, dtype)| {
                if *in_mean { dtype.arithmetic() } else { *dtype }
            },
        );
        let is_mean = matches!(self.origins.last(), Some(Origin::MeanAbove));
        let types = types.chain(is_mean.then_some(DType::F32));
        // All rows may be zero.
        types.reduce(DType::promote).or_else(|| parts.first().copied()).unwrap_or(DType::F32)
    }

    /// Checks that parts of so many rows have all that it takes.
    pub fn check(&self, parts: &[u64]) -> Result<()> {
        let all = parts.iter().map(Some).chain(std::iter::repeat(None));
        for (part, (used, rows)) in self.uses.iter().zip(all).enumerate() {
            if used.rows > rows.copied().unwrap_or(0) {
                return Err(Error::plan("a row is taken from where there is none")
                    .expected(format_args!("{} rows in part {part}", used.rows))
                    .found(rows.copied().unwrap_or(0)));
            }
        }
        Ok(())
    }
}

//! What an adapter makes of a tensor: `W + s·B·A`, and what PEFT has besides.
//!
//! The tensor is seen as a matrix of rows of [`Adapted::columns`] elements. Every kind of adapter
//! is such a matrix with factors that lie in their files in one order or another: those of an embedding or of
//! GPT-2's `Conv1D` are transposed, a convolution's kernel is one long row, each expert has rows and
//! factors of its own. So a factor is told by where its numbers are, not by the kind of its module.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::InputFile;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// What is done to a tensor, in this order: terms are added, rows or columns are scaled to their
/// magnitudes, rows are put in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adapted {
    /// The type that the tensor's own elements are stored in.
    pub dtype: DType,
    /// Elements of a row.
    pub columns: u64,
    /// Low-rank products, added in listed order.
    pub terms: Vec<Term>,
    /// Magnitudes that rows or columns are brought to.
    pub magnitude: Option<Magnitude>,
    /// Rows of another tensor that stand in for those of this one.
    pub replaced: Option<Replaced>,
    /// Where the tensor's own elements lie, unless that is one after the other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strides: Option<Strides>,
}

/// More dimensions than a tensor of any program has.
pub(crate) const MAX_DIMENSIONS: usize = 64;
/// How often a view may show each of its elements, on average: no small file makes a huge tensor.
const MOST_SHOWN: u64 = 1 << 26;

/// The dimensions of a view: extent, and elements of the file from one index to the next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Strides(pub Vec<(u64, u64)>);

/// `scale · left · right`, added to some rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Term {
    /// Which rows.
    pub rows: Range<u64>,
    /// The number of products that are summed for an element.
    pub rank: u64,
    /// What their sum is multiplied by.
    pub scale: f64,
    /// A line for each of the rows.
    pub left: Factor,
    /// A line for each column; nothing where all of it is 1.
    pub right: Option<Factor>,
}

/// A matrix in a file, of which a number of line `i` and step `k` of the rank is element
/// `i · line + k · step`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Factor {
    /// Index into the plan's files.
    pub file: u32,
    /// Its element type.
    pub dtype: DType,
    /// The first byte of its first number.
    pub start: u64,
    /// Elements from one line to the next.
    pub line: u64,
    /// Elements from one step of the rank to the next.
    pub step: u64,
}

/// A number for each row, or each column.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Magnitude {
    /// Index into the plan's files.
    pub file: u32,
    /// Its element type.
    pub dtype: DType,
    /// The first byte of its first number.
    pub start: u64,
    /// Whether it is that of the rows.
    pub of_rows: bool,
}

/// Rows that lie one after the other elsewhere.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replaced {
    /// Which rows of the tensor each stands in for, in ascending order; and its place there.
    pub rows: Vec<(u64, u64)>,
    /// Index into the plan's files.
    pub file: u32,
    /// Its element type.
    pub dtype: DType,
    /// The first byte of the first.
    pub start: u64,
}

impl Adapted {
    /// A tensor of that shape that lies otherwise, and is changed by nothing.
    pub fn view(dtype: DType, shape: &[u64], strides: Strides) -> Self {
        let columns = shape.last().copied().unwrap_or(1);
        let strides = Some(strides);
        Self { dtype, columns, terms: Vec::new(), magnitude: None, replaced: None, strides }
    }

    /// Whether its numbers are those of the file: then they come in their own type.
    pub fn is_view(&self) -> bool {
        let is_changed =
            !self.terms.is_empty() || self.magnitude.is_some() || self.replaced.is_some();
        self.strides.is_some() && !is_changed
    }

    /// The element type of the result, where arithmetic is in f64 or not.
    pub fn result(&self, double: bool) -> DType {
        match double {
            _ if self.is_view() => self.dtype,
            true => DType::F64,
            false => self.dtype.arithmetic(),
        }
    }

    /// How many elements of the file, from its first on, a tensor of so many elements lies in.
    pub fn span(&self, elements: u64) -> u64 {
        self.strides.as_ref().map_or(elements, |strides| strides.span().unwrap_or(u64::MAX))
    }

    /// The files that it reads besides the tensor's own, each as often as it is read from.
    pub fn files(&self) -> impl Iterator<Item = u32> {
        let factors = |term: &Term| {
            std::iter::once(term.left.file).chain(term.right.as_ref().map(|right| right.file))
        };
        let terms = self.terms.iter().flat_map(factors);
        let others = self.magnitude.iter().map(|magnitude| magnitude.file);
        terms.chain(others).chain(self.replaced.iter().map(|replaced| replaced.file))
    }

    /// The same with each file called otherwise.
    #[must_use]
    pub fn in_files(mut self, of: impl Fn(u32) -> u32) -> Self {
        for Term { left, right, .. } in &mut self.terms {
            left.file = of(left.file);
            right.iter_mut().for_each(|right| right.file = of(right.file));
        }
        self.magnitude.iter_mut().for_each(|magnitude| magnitude.file = of(magnitude.file));
        self.replaced.iter_mut().for_each(|replaced| replaced.file = of(replaced.file));
        self
    }

    /// How many rows a tensor of so many elements has.
    pub fn rows(&self, elements: u64) -> u64 {
        elements / self.columns.max(1)
    }

    /// Bytes of factors, magnitudes and rows.
    pub fn bytes(&self, elements: u64) -> u64 {
        let size = |dtype: DType, count: u64| count.saturating_mul(dtype.size() as u64);
        let term = |term: &Term| {
            let left = size(term.left.dtype, (term.rows.end - term.rows.start) * term.rank);
            left + term
                .right
                .as_ref()
                .map_or(0, |right| size(right.dtype, self.columns * term.rank))
        };
        let terms: u64 = self.terms.iter().map(term).fold(0, u64::saturating_add);
        let magnitude = self.magnitude.as_ref().map_or(0, |magnitude| {
            let count = if magnitude.of_rows { self.rows(elements) } else { self.columns };
            size(magnitude.dtype, count)
        });
        let replaced = self.replaced.as_ref().map_or(0, |replaced| {
            size(replaced.dtype, self.columns.saturating_mul(replaced.rows.len() as u64))
        });
        terms.saturating_add(magnitude).saturating_add(replaced)
    }

    /// Checks that it can be done to a tensor of so many elements, and that all of it lies within
    /// `files`.
    pub fn check(&self, elements: u64, files: &[InputFile]) -> Result<()> {
        if !self.dtype.is_float() && !self.is_view() {
            return Err(wrong("only floats can be adapted").found(self.dtype));
        }
        if self.strides.as_ref().is_some_and(|strides| strides.elements() != Some(elements)) {
            return Err(wrong("a view has another shape than its tensor").found(format_args!(
                "{elements} elements, and the extents and strides {:?}",
                self.strides
            )));
        }
        if self.columns == 0 || elements == 0 || !elements.is_multiple_of(self.columns) {
            return Err(wrong("a tensor does not have rows of that length")
                .expected(format_args!("a part of {elements} elements"))
                .found(self.columns));
        }
        let rows = self.rows(elements);
        for Term { rows: of, rank, scale, left, right } in &self.terms {
            if of.start >= of.end || of.end > rows {
                return Err(wrong("a product is added to rows that are not there")
                    .expected(format_args!("rows below {rows}"))
                    .found(format_args!("{of:?}")));
            }
            if *rank == 0 || right.is_none() && *rank != 1 || !scale.is_finite() {
                return Err(wrong("a product has no rank, or no scale")
                    .found(format_args!("rank {rank}, scale {scale}")));
            }
            left.check(of.end - of.start, *rank, files)?;
            right.iter().try_for_each(|right| right.check(self.columns, *rank, files))?;
        }
        if let Some(Magnitude { file, dtype, start, of_rows }) = self.magnitude {
            let count = if of_rows { rows } else { self.columns };
            Factor { file, dtype, start, line: 1, step: 1 }.check(count, 1, files)?;
        }
        if let Some(Replaced { rows: of, file, dtype, start }) = &self.replaced {
            let is_sorted = of.is_sorted_by(|(one, _), (other, _)| one < other);
            if !is_sorted || of.last().is_none_or(|(last, _)| *last >= rows) {
                return Err(wrong("rows are put in where there are none, or not in order")
                    .expected(format_args!("ascending, below {rows}")));
            }
            let most = of.iter().map(|(_, place)| place.saturating_add(1)).max().unwrap_or(0);
            let lines =
                Factor { file: *file, dtype: *dtype, start: *start, line: self.columns, step: 1 };
            lines.check(most, self.columns, files)?;
        }
        Ok(())
    }
}

impl Strides {
    /// How many elements the view has; nothing if that is no number, or if it shows what it lies in
    /// more often than any view does.
    pub(crate) fn elements(&self) -> Option<u64> {
        if self.0.len() > MAX_DIMENSIONS {
            return None;
        }
        let elements = self.0.iter().try_fold(1u64, |all, &(extent, _)| all.checked_mul(extent))?;
        (elements / MOST_SHOWN <= self.span()?).then_some(elements)
    }

    /// How many elements of the file it lies in, from its first on; nothing if that is no number.
    pub fn span(&self) -> Option<u64> {
        let last = |&(extent, stride): &(u64, u64)| extent.checked_sub(1)?.checked_mul(stride);
        self.0.iter().try_fold(1u64, |all, dimension| all.checked_add(last(dimension)?))
    }
}

impl Factor {
    /// Checks that so many lines lie within their file.
    fn check(&self, lines: u64, rank: u64, files: &[InputFile]) -> Result<()> {
        if !self.dtype.is_float() {
            return Err(wrong("a factor must have floats").found(self.dtype));
        }
        let file = files.get(self.file as usize);
        let file = file.ok_or_else(|| wrong("the plan has no file of that number"))?;
        // Each number has a place of its own, so that a small file makes no large factor.
        if lines > 1 && self.line == 0 || rank > 1 && self.step == 0 {
            return Err(wrong("the numbers of a factor lie in one place"));
        }
        let last = (lines.saturating_sub(1)).checked_mul(self.line).and_then(|at| {
            at.checked_add(rank.saturating_sub(1).checked_mul(self.step)?)?.checked_add(1)
        });
        let end = last
            .and_then(|count| count.checked_mul(self.dtype.size() as u64))
            .and_then(|bytes| bytes.checked_add(self.start));
        if end.is_none_or(|end| end > file.size) {
            return Err(wrong("a factor lies past the end of its file")
                .file(&file.path)
                .expected(format_args!("at most {} bytes", file.size))
                .found(format_args!("{lines} lines of {rank} from byte {}", self.start)));
        }
        Ok(())
    }
}

#[cold]
fn wrong(message: &str) -> Error {
    Error::plan(message)
}

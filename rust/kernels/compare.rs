//! What an output became: elements that are no plain numbers, and how far it is from a reference.
//!
//! It is counted and summed while both lie in the cache, so it must cost little. Elements that are
//! NaN, infinite or as large as their type can say are rare, and show in the sums of a cell: these are
//! not finite then, or huge. So the loop does not look for them, and a cell whose sums are so is gone
//! through once more, one by one.
//!
//! Cells are smaller than the blocks of other sums, and are folded as a tree of neighbours: pieces of
//! an output may begin anywhere, and a cell that two of them share is small enough to be kept until
//! it is whole.

use std::marker::PhantomData;

use super::convert::{Bf16, F16, F32, F64, Format, check_bytes};
use super::level::{Kernel, Level};
use super::real::{Ordinal, Real};
use super::reduce::{LANES, Lanes};
use crate::dtype::DType;

/// Elements of a cell, counted from a tensor's first.
pub const CELL: usize = 1024;
/// Changes when the shape of the sums does, since results then differ.
pub const COMPARISON_VERSION: u32 = 1;

/// What is known of some elements of an output.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Comparison {
    /// Elements that are NaN.
    pub nan: u64,
    /// Elements that are infinite.
    pub infinite: u64,
    /// Elements of the greatest finite magnitude that their type has.
    pub saturated: u64,
    /// Elements that were compared with a reference.
    pub compared: u64,
    /// Those of them that have another value than the reference.
    pub changed: u64,
    /// The sum of the squares of output minus reference, where both are finite.
    pub difference: f64,
    /// The sum of the squares of the reference, where both are finite.
    pub norm: f64,
}

impl Comparison {
    /// Whether all elements are finite.
    pub fn is_finite(&self) -> bool {
        self.nan == 0 && self.infinite == 0
    }

    /// The norm of output minus reference by that of the reference, if that is a number.
    pub fn relative_change(&self) -> Option<f64> {
        let ratio = self.difference.sqrt() / self.norm.sqrt();
        (self.compared > 0 && ratio.is_finite()).then_some(ratio)
    }

    /// What is known of these elements and of the `next` ones together.
    #[must_use]
    pub fn and(self, next: Self) -> Self {
        Self {
            nan: self.nan + next.nan,
            infinite: self.infinite + next.infinite,
            saturated: self.saturated + next.saturated,
            compared: self.compared + next.compared,
            changed: self.changed + next.changed,
            difference: self.difference + next.difference,
            norm: self.norm + next.norm,
        }
    }

    /// What is known of cells that follow each other, the first of which begins at a multiple of
    /// their number that is rounded up to a power of two: neighbours are folded, then neighbours of
    /// these, until one is left.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub fn fold(mut cells: Vec<Self>) -> Self {
        while cells.len() > 1 {
            let pair = |pair: &[Self]| pair.iter().copied().reduce(Self::and);
            cells = cells.chunks(2).filter_map(pair).collect();
        }
        cells[0]
    }
}

/// The output and what it is compared with, in the same type, and the working type.
#[derive(Clone, Copy)]
struct Compare<'a, F: Format, T> {
    out: &'a [F::Bytes],
    reference: &'a [F::Bytes],
    working: PhantomData<T>,
}

/// A number for each lane.
type Each<T> = [T; LANES];

/// What a loop over elements adds up, by lane.
struct Sums<T: Real> {
    changed: Each<<T::Ordinal as Ordinal>::Counter>,
    difference: Lanes,
    norm: Lanes,
}

impl<T: Real> Sums<T> {
    /// Adds up to [`LANES`] elements to the first lanes.
    #[inline(always)]
    fn add<F: Format>(&mut self, out: &[F::Bytes], reference: &[F::Bytes]) {
        for lane in 0..out.len() {
            let (x, y) = (F::widen::<T>(out[lane]), F::widen::<T>(reference[lane]));
            self.changed[lane] += (x != y).into();
            let (x, y) = (x.to_f64(), y.to_f64());
            self.difference[lane] += (x - y) * (x - y);
            self.norm[lane] += y * y;
        }
    }
}

impl<F: Format, T: Real> Kernel for Compare<'_, F, T> {
    type Output = Option<Comparison>;

    /// All elements, if none of them is NaN, infinite or saturated.
    #[inline(always)]
    fn run(self) -> Self::Output {
        let mut sums = Sums::<T> {
            changed: [Default::default(); LANES],
            difference: [0.0; LANES],
            norm: [0.0; LANES],
        };
        let (out, out_rest) = self.out.as_chunks::<LANES>();
        let (reference, reference_rest) = self.reference.as_chunks::<LANES>();
        for (out, reference) in out.iter().zip(reference) {
            sums.add::<F>(out, reference);
        }
        sums.add::<F>(out_rest, &reference_rest[..out_rest.len()]);
        let (difference, norm) = (folded(sums.difference), folded(sums.norm));
        // An output x of the greatest magnitude is that far from zero, so the larger of |x − y| and |y|
        // is half of it at the least. What rounding takes from a quarter of its square leaves an eighth.
        let is_plain = difference + norm < F::LARGEST * F::LARGEST / 8.0;
        is_plain.then(|| Comparison {
            compared: self.out.len() as u64,
            changed: sums.changed.into_iter().map(Into::into).sum::<u64>(),
            difference,
            norm,
            ..Comparison::default()
        })
    }
}

impl<F: Format, T: Real> Compare<'_, F, T> {
    /// All elements, one by one.
    fn one_by_one(&self) -> Comparison {
        let mut found = Comparison { compared: self.out.len() as u64, ..Comparison::default() };
        let (mut difference, mut norm) = ([0.0; LANES], [0.0; LANES]);
        for (at, (&out, &reference)) in self.out.iter().zip(self.reference).enumerate() {
            let (x, y) = (F::widen::<T>(out), F::widen::<T>(reference));
            found.changed += u64::from(x != y && !(x.is_nan() && y.is_nan()));
            let (x, y) = (x.to_f64(), y.to_f64());
            found.nan += u64::from(x.is_nan());
            found.infinite += u64::from(x.is_infinite());
            found.saturated += u64::from(x.abs() == F::LARGEST);
            if x.is_finite() && y.is_finite() {
                difference[at % LANES] += (x - y) * (x - y);
                norm[at % LANES] += y * y;
            }
        }
        (found.difference, found.norm) = (folded(difference), folded(norm));
        found
    }
}

/// The lanes, folded in halves.
fn folded(mut lanes: Lanes) -> f64 {
    for half in [8, 4, 2, 1] {
        for at in 0..half {
            lanes[at] += lanes[at + half];
        }
    }
    lanes[0]
}

/// Compares at most a cell of an output with a reference that was rounded to the same type. Without a
/// reference nothing is compared.
///
/// Zeros of either sign have the same value, and so has one NaN as another.
///
/// # Panics
///
/// If the type is no float type, or the slices differ in length.
pub fn compare(level: Level, dtype: DType, out: &[u8], reference: Option<&[u8]>) -> Comparison {
    fn go<F: Format, T: Real>(level: Level, out: &[u8], reference: &[u8]) -> Comparison {
        let (out, reference) = (F::elements(out), F::elements(reference));
        let both = Compare::<F, T> { out, reference, working: PhantomData };
        level.run(both).unwrap_or_else(|| both.one_by_one())
    }
    let with = reference.unwrap_or(out);
    check_bytes("the reference", dtype, with, out.len() / dtype.size());
    let found = match dtype {
        DType::Bf16 => go::<Bf16, f32>(level, out, with),
        DType::F16 => go::<F16, f32>(level, out, with),
        DType::F32 => go::<F32, f32>(level, out, with),
        DType::F64 => go::<F64, f64>(level, out, with),
        _ => unreachable!("checked to be a float type"),
    };
    match reference {
        Some(_) => found,
        None => Comparison { compared: 0, changed: 0, difference: 0.0, norm: 0.0, ..found },
    }
}

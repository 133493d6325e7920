//! What an output became: elements that are no plain numbers, and how far it is from a reference.
//!
//! It is counted and summed while both lie in the cache, so it must cost little. A cell is summed in
//! f32, which is half the work of f64: each lane adds 64 terms, none of which is negative, so a sum is
//! within 4·10⁻⁶ of the exact one. Sums of cells are added in f64. Where squares are too large or too
//! small for f32, the sums of the cell show it, and it is summed once more in f64.
//!
//! Elements that are NaN, infinite or as large as their type can say are rare, and show in the sums
//! too: these are not finite then, or huge. So the loop does not look for them, and a cell whose
//! sums in f64 are so is gone through a third time, one by one.
//!
//! Cells are smaller than the blocks of other sums, and are folded as a tree of neighbours: pieces of
//! an output may begin anywhere, and a cell that two of them share is small enough to be kept until
//! it is whole.

use std::marker::PhantomData;
use std::slice;

use super::convert::{Bf16, F16, F32, F64, Format, check_bytes};
use super::level::{Kernel, Level};
use super::real::{Ordinal, Real};
use super::reduce::{LANES, Lanes};
use crate::dtype::DType;

/// Elements of a cell, counted from a tensor's first.
pub const CELL: usize = 1024;
/// Changes when the shape of the sums does, since results then differ.
pub const COMPARISON_VERSION: u32 = 2;
/// What a cell's sum in f32 is at least if it is right: 2⁻¹⁰⁰. A square below the normal numbers loses
/// 2⁻¹⁵⁰ at most, so a whole cell of them 2⁻¹⁴⁰.
const LEAST: f64 = 1.0 / (1_u128 << 100) as f64;

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
    pub fn fold(cells: &mut [Self]) -> Self {
        let mut left = cells.len();
        while left > 1 {
            for at in 0..left / 2 {
                cells[at] = cells[2 * at].and(cells[2 * at + 1]);
            }
            if left % 2 == 1 {
                cells[left / 2] = cells[left - 1];
            }
            left = left.div_ceil(2);
        }
        cells[0]
    }
}

/// Cells that the loop takes at once: what is found of one is folded while the next is gone through.
pub const CELLS: usize = 8;

/// Whole cells of an output and what they are compared with, in the same type, and the type of the sums.
#[derive(Clone, Copy)]
struct Compare<'a, F: Format, T> {
    out: &'a [[F::Bytes; CELL]],
    reference: &'a [[F::Bytes; CELL]],
    sums: PhantomData<T>,
}

/// What a loop over a cell finds by lane, if no element is NaN, infinite or saturated.
#[derive(Clone, Copy)]
struct Found<T: Real> {
    changed: [<T::Ordinal as Ordinal>::Counter; LANES],
    difference: [T; LANES],
    norm: [T; LANES],
}

impl<F: Format, T: Real> Kernel for Compare<'_, F, T> {
    type Output = [Found<T>; CELLS];

    #[inline(always)]
    fn run(self) -> Self::Output {
        let (changed, zeros) = ([Default::default(); LANES], [T::ZERO; LANES]);
        let mut all = [Found { changed, difference: zeros, norm: zeros }; CELLS];
        for (found, (out, reference)) in all.iter_mut().zip(self.out.iter().zip(self.reference)) {
            // A copy, so that the lanes stay in registers.
            let mut lanes = *found;
            let rows = out.as_chunks::<LANES>().0.iter().zip(reference.as_chunks::<LANES>().0);
            for (out, reference) in rows {
                for lane in 0..LANES {
                    let (x, y) = (F::widen::<T>(out[lane]), F::widen::<T>(reference[lane]));
                    lanes.changed[lane] += (x != y).into();
                    lanes.difference[lane] += (x - y) * (x - y);
                    lanes.norm[lane] += y * y;
                }
            }
            *found = lanes;
        }
        all
    }
}

impl<T: Real> Found<T> {
    /// What is known of a cell with this `reference`, if the sums are right and show that no element
    /// is NaN, infinite or saturated.
    fn of_cell<F: Format>(&self, reference: &[F::Bytes; CELL]) -> Option<Comparison> {
        let changed = self.changed.iter().map(|&changed| changed.into()).sum();
        let [difference, norm] =
            [self.difference, self.norm].map(|lanes| folded(&lanes.map(T::to_f64)));
        let least = if size_of::<T>() < size_of::<f64>() { LEAST } else { 0.0 };
        let is_zero = |&element: &F::Bytes| F::widen::<T>(element) == T::ZERO;
        let is_right = (difference >= least || changed == 0)
            && (norm >= least || reference.iter().fold(true, |all, it| all & is_zero(it)));
        // An output x of the greatest magnitude is that far from zero, so the larger of |x − y|
        // and |y| is half of it at the least. What rounding takes from a quarter of its square
        // leaves an eighth. In f32 that square is infinite, unless the type is F16.
        let is_plain = difference + norm < F::LARGEST * F::LARGEST / 8.0;
        let compared = CELL as u64;
        let found = Comparison { compared, changed, difference, norm, ..Comparison::default() };
        (is_right && is_plain).then_some(found)
    }
}

impl<F: Format, T: Real> Compare<'_, F, T> {
    fn found(self, level: Level) -> [Comparison; CELLS] {
        let all = level.run(self);
        let mut cells = [Comparison::default(); CELLS];
        let each = all.iter().zip(self.out.iter().zip(self.reference));
        for (cell, (found, (out, reference))) in cells.iter_mut().zip(each) {
            let found = found.of_cell::<F>(reference);
            *cell = found.unwrap_or_else(|| with_care::<F>(level, out, reference));
        }
        cells
    }
}

/// The same of a cell whose squares may be too large or too small for f32, or which is odd.
#[cold]
fn with_care<F: Format>(
    level: Level,
    out: &[F::Bytes; CELL],
    reference: &[F::Bytes; CELL],
) -> Comparison {
    let (one, of_one) = (slice::from_ref(out), slice::from_ref(reference));
    let [found, ..] =
        level.run(Compare::<F, f64> { out: one, reference: of_one, sums: PhantomData });
    found.of_cell::<F>(reference).unwrap_or_else(|| one_by_one::<F>(out, reference))
}

/// The same of up to a cell, one by one.
#[cold]
fn one_by_one<F: Format>(out: &[F::Bytes], reference: &[F::Bytes]) -> Comparison {
    let mut found = Comparison { compared: out.len() as u64, ..Comparison::default() };
    let (mut difference, mut norm) = ([0.0; LANES], [0.0; LANES]);
    for (at, (&out, &reference)) in out.iter().zip(reference).enumerate() {
        let (x, y) = (F::widen::<f64>(out), F::widen::<f64>(reference));
        found.changed += u64::from(x != y && !(x.is_nan() && y.is_nan()));
        found.nan += u64::from(x.is_nan());
        found.infinite += u64::from(x.is_infinite());
        found.saturated += u64::from(x.abs() == F::LARGEST);
        if x.is_finite() && y.is_finite() {
            difference[at % LANES] += (x - y) * (x - y);
            norm[at % LANES] += y * y;
        }
    }
    (found.difference, found.norm) = (folded(&difference), folded(&norm));
    found
}

/// The lanes, folded in halves.
fn folded(lanes: &Lanes) -> f64 {
    let eight: [f64; 8] = std::array::from_fn(|at| lanes[at] + lanes[at + 8]);
    let four: [f64; 4] = std::array::from_fn(|at| eight[at] + eight[at + 4]);
    let two: [f64; 2] = std::array::from_fn(|at| four[at] + four[at + 2]);
    two[0] + two[1]
}

/// Compares at most [`CELLS`] cells of an output with a reference that was rounded to the same type. Without a
/// reference nothing is compared.
///
/// Zeros of either sign have the same value, and so has one NaN as another.
///
/// # Panics
///
/// If the type is no float type, the slices differ in length, or are longer.
pub fn compare(level: Level, dtype: DType, out: &[u8], reference: Option<&[u8]>) -> Comparison {
    fn go<F: Format, T: Real>(level: Level, out: &[u8], reference: &[u8]) -> Comparison {
        let (out, reference) = (F::elements(out), F::elements(reference));
        let (cells, rest) = out.as_chunks::<CELL>();
        let (of_cells, of_rest) = reference.as_chunks::<CELL>();
        let both = |out, reference| Compare::<F, T> { out, reference, sums: PhantomData };
        let mut found = both(cells, of_cells).found(level);
        if !rest.is_empty() {
            // Zeros beside zeros add nothing to a sum.
            let padded = |rest: &[F::Bytes]| {
                let mut cell = [[F::narrow(0.0_f32); CELL]];
                cell[0][..rest.len()].copy_from_slice(rest);
                cell
            };
            let [last, ..] = both(&padded(rest), &padded(of_rest)).found(level);
            found[cells.len()] = Comparison { compared: rest.len() as u64, ..last };
        }
        Comparison::fold(&mut found[..(cells.len() + usize::from(!rest.is_empty())).max(1)])
    }
    let with = reference.unwrap_or(out);
    assert!(out.len() <= CELLS * CELL * dtype.size(), "so many cells are not compared at once");
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

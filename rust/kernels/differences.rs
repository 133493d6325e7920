//! All numbers about how two stored inputs differ, in one go.
//!
//! Made one by one from widened chunks they load and convert each element ten times. Here a cell is widened
//! once, into memory that stays in the first-level cache; what counts and what sums up are loops of
//! their own over it, each of one shape. The sums are those of [`dot_into`](super::dot_into): the same
//! lanes, the same order, the same bits.

use super::compare::CELL;
use super::convert::{Bf16, F16, F32, Format, check_bytes};
use super::level::{Kernel, Level};
use super::real::Real;
use super::reduce::{LANES, Lanes};
use crate::dtype::DType;

/// How b differs from a, and d = b − a, rounded to f32.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Differences {
    /// Elements whose difference is zero.
    pub same: u64,
    /// Elements of which one is above zero, and the other below.
    pub flips: u64,
    /// The largest |d|, as a bit pattern: that of a NaN if there is one, which is above all others.
    largest: u32,
    /// By lane, the sums of d·d, a·a, a·b and b·b, multiplied in f64.
    pub sums: [Lanes; 4],
}

impl Differences {
    /// Of nothing yet, to be added to these sums.
    pub fn from(sums: [Lanes; 4]) -> Self {
        Self { sums, ..Self::default() }
    }

    /// The largest |d|, the canonical NaN if any is NaN; 0 of nothing.
    pub fn largest(&self) -> f64 {
        let largest = f32::from_bits(self.largest);
        if largest.is_nan() { f64::NAN } else { largest.into() }
    }
}

struct Add<'a, F: Format> {
    a: &'a [[F::Bytes; CELL]],
    b: &'a [[F::Bytes; CELL]],
    found: &'a mut Differences,
}

impl<F: Format> Kernel for Add<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let [mut x, mut y, mut d] = [[0.0_f32; CELL]; 3];
        for (a, b) in self.a.iter().zip(self.b) {
            for at in 0..CELL {
                (x[at], y[at]) = (F::widen(a[at]), F::widen(b[at]));
                d[at] = y[at] - x[at];
            }
            let (mut same, mut flips, mut largest) = (0_u32, 0_u32, 0_u32);
            for at in 0..CELL {
                same += u32::from(d[at] == 0.0);
                let [x_below, x_above] = [x[at] < 0.0, x[at] > 0.0].map(u32::from);
                let [y_below, y_above] = [y[at] < 0.0, y[at] > 0.0].map(u32::from);
                flips += x_below & y_above | x_above & y_below;
                largest = largest.max(d[at].to_bits() & 0x7FFF_FFFF);
            }
            self.found.same += u64::from(same);
            self.found.flips += u64::from(flips);
            self.found.largest = self.found.largest.max(largest);
            let [mut dd, mut aa, mut ab, mut bb] = self.found.sums;
            let rows = x.as_chunks::<LANES>().0.iter().zip(y.as_chunks::<LANES>().0);
            for ((x, y), d) in rows.zip(d.as_chunks::<LANES>().0) {
                for lane in 0..LANES {
                    let (x, y, d) = (x[lane].to_f64(), y[lane].to_f64(), d[lane].to_f64());
                    dd[lane] += d * d;
                    aa[lane] += x * x;
                    ab[lane] += x * y;
                    bb[lane] += y * y;
                }
            }
            self.found.sums = [dd, aa, ab, bb];
        }
    }
}

/// Adds what is found of stored elements to `found`. The slices start at a multiple of 16 in their
/// block.
///
/// # Panics
///
/// If the slices differ in length, or the type is not BF16, F16 or F32.
pub fn differences_into(level: Level, dtype: DType, a: &[u8], b: &[u8], found: &mut Differences) {
    fn go<F: Format>(level: Level, a: &[u8], b: &[u8], found: &mut Differences) {
        let (a, a_rest) = F::elements(a).as_chunks::<CELL>();
        let (b, b_rest) = F::elements(b).as_chunks::<CELL>();
        level.run(Add::<F> { a, b, found });
        if !a_rest.is_empty() {
            // Zeros beside zeros add nothing to a sum, and are the same.
            let padded = |rest: &[F::Bytes]| {
                let mut cell = [[F::narrow(0.0_f32); CELL]];
                cell[0][..rest.len()].copy_from_slice(rest);
                cell
            };
            level.run(Add::<F> { a: &padded(a_rest), b: &padded(b_rest), found });
            found.same -= (CELL - a_rest.len()) as u64;
        }
    }
    assert_eq!(a.len(), b.len(), "both sides must have the same length");
    check_bytes("a side", dtype, a, a.len() / dtype.size());
    match dtype {
        DType::Bf16 => go::<Bf16>(level, a, b, found),
        DType::F16 => go::<F16>(level, a, b, found),
        DType::F32 => go::<F32>(level, a, b, found),
        _ => unreachable!("{dtype} is not widened to f32"),
    }
}

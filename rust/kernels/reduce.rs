//! Sums whose bits do not depend on who computed them.
//!
//! Addition of floats is not associative, so the order of a sum must be fixed for its result to
//! be, and a fixed order must still leave room for SIMD and for threads. Hence this shape:
//!
//! 1. A tensor is cut into blocks of [`BLOCK`] elements, counted from its first element. A block is
//!    summed by one thread; blocks may be summed by any.
//! 2. Within a block, element i is added to lane i mod [`LANES`], in order of i. Sixteen lanes of
//!    f64 are two AVX-512 registers, four AVX2 ones, eight SSE or NEON ones: enough to keep the
//!    adder busy, and the same additions on all of them.
//! 3. The lanes of a block, then the sums of the blocks, are folded in halves ([`fold_halves`]),
//!    which also keeps the error growth logarithmic.
//!
//! Elements and products are widened to f64 first; a product of two f32 is exact there.

use super::level::{Kernel, Level};
use super::real::Real;

/// Elements of a block.
pub const BLOCK: usize = 65_536;
/// Partial sums of a block.
pub const LANES: usize = 16;
/// The partial sums of a block.
pub type Lanes = [f64; LANES];
/// Changes when the shape of the sums does, since results then differ.
pub const REDUCTION_VERSION: u32 = 1;

/// `lanes[i % 16] = step(lanes[i % 16], term(i))` over one or two slices of the same length.
macro_rules! reduction {
    ($(#[$doc:meta])* $kernel:ident, $lanes:ident, [$($slice:ident),+], $step:expr) => {
        $(#[$doc])*
        struct $kernel<'a, T> {
            $($slice: &'a [T],)+
            lanes: &'a mut Lanes,
        }

        impl<T: Real> Kernel for $kernel<'_, T> {
            type Output = ();

            #[inline(always)]
            fn run(self) {
                // A copy, so that the lanes stay in registers.
                let mut $lanes = *self.lanes;
                $(let $slice = self.$slice.as_chunks::<LANES>();)+
                for chunk in reduction!(@zip $($slice),+) {
                    let reduction!(@pattern $($slice),+) = chunk;
                    for lane in 0..LANES {
                        $lanes[lane] = $step($lanes[lane], $($slice[lane].to_f64()),+);
                    }
                }
                $(let $slice = $slice.1;)+
                for lane in 0..reduction!(@first $($slice),+).len() {
                    $lanes[lane] = $step($lanes[lane], $($slice[lane].to_f64()),+);
                }
                *self.lanes = $lanes;
            }
        }
    };
    (@zip $a:ident) => { $a.0 };
    (@zip $a:ident, $b:ident) => { $a.0.iter().zip($b.0) };
    (@pattern $a:ident) => { $a };
    (@pattern $a:ident, $b:ident) => { ($a, $b) };
    (@first $a:ident $(, $b:ident)?) => { $a };
}

reduction!(Sum, lanes, [values], |lane: f64, value: f64| lane + value);
reduction!(AbsoluteSum, lanes, [values], |lane: f64, value: f64| lane + value.abs());
reduction!(Dot, lanes, [a, b], |lane: f64, a: f64, b: f64| lane + a * b);

struct Maximum<'a, T> {
    values: &'a [T],
    lanes: &'a mut Lanes,
}

/// The greater; NaN is taken, and then kept, since nothing compares greater.
#[inline(always)]
fn greater<T: Real>(lane: T, value: T) -> T {
    if value > lane || value.is_nan() { value } else { lane }
}

impl<T: Real> Kernel for Maximum<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        // In the type of the values, which need not be widened then.
        let mut greatest = [T::from_f64(f64::NEG_INFINITY); LANES];
        let (values, rest) = self.values.as_chunks::<LANES>();
        for values in values {
            for lane in 0..LANES {
                greatest[lane] = greater(greatest[lane], values[lane]);
            }
        }
        for (greatest, &value) in greatest.iter_mut().zip(rest) {
            *greatest = greater(*greatest, value);
        }
        for (lane, greatest) in self.lanes.iter_mut().zip(greatest) {
            *lane = greater(*lane, greatest.to_f64());
        }
    }
}

/// `lanes[i % 16] += values[i]`. The slice starts at a multiple of 16 in its block.
pub fn sum_into<T: Real>(level: Level, values: &[T], lanes: &mut Lanes) {
    level.run(Sum { values, lanes });
}

/// `lanes[i % 16] += |values[i]|`. The slice starts at a multiple of 16 in its block.
pub fn absolute_sum_into<T: Real>(level: Level, values: &[T], lanes: &mut Lanes) {
    level.run(AbsoluteSum { values, lanes });
}

/// `lanes[i % 16] = max(lanes[i % 16], values[i])`; the canonical NaN where any value is NaN, and
/// never −0. The lanes start at minus infinity.
pub fn max_into<T: Real>(level: Level, values: &[T], lanes: &mut Lanes) {
    level.run(Maximum { values, lanes });
    for lane in lanes {
        // Adding +0 turns −0 into +0 and changes nothing else.
        *lane = if lane.is_nan() { <f64 as Real>::NAN } else { *lane + 0.0 };
    }
}

/// `lanes[i % 16] += a[i]·b[i]`, multiplied in f64. The slices start at a multiple of 16 in their
/// block.
///
/// # Panics
///
/// If the slices differ in length.
pub fn dot_into<T: Real>(level: Level, a: &[T], b: &[T], lanes: &mut Lanes) {
    assert_eq!(a.len(), b.len(), "the factors must have the same length");
    level.run(Dot { a, b, lanes });
}

/// Sums by adding the upper half to the lower until one is left, after padding with +0 to a power
/// of two. Of nothing, +0. Leaves intermediate results in `values`.
pub fn fold_halves(values: &mut Vec<f64>) -> f64 {
    values.resize(values.len().next_power_of_two(), 0.0);
    let mut half = values.len() / 2;
    while half > 0 {
        let (low, high) = values.split_at_mut(half);
        for (low, high) in low.iter_mut().zip(high) {
            *low += *high;
        }
        half /= 2;
    }
    values[0]
}

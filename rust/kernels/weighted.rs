//! The weighted sum of any number of inputs: what most merges come down to.
//!
//! `out = c₀·x₀`, then `out = out + cᵢ·xᵢ` in listed order, each product and each sum rounded. The
//! order is the contract; keeping the running sum in a register between up to four terms is what
//! makes it fast. More terms continue from the output, which changes no rounding.

use super::level::{Kernel, Level};
use super::real::Real;

/// Terms that one pass takes: the most that a merge commonly has.
pub(crate) const FUSED: usize = 4;

struct WeightedSum<'a, T, const N: usize> {
    coefficients: [T; N],
    inputs: [&'a [T]; N],
    out: &'a mut [T],
    /// Whether to start from what `out` holds.
    accumulate: bool,
}

impl<T: Real, const N: usize> Kernel for WeightedSum<'_, T, N> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let inputs = self.inputs.map(|input| &input[..self.out.len()]);
        let term = |term: usize, index: usize| self.coefficients[term] * inputs[term][index];
        if self.accumulate {
            for (index, value) in self.out.iter_mut().enumerate() {
                *value = (0..N).fold(*value, |sum, next| sum + term(next, index));
            }
        } else {
            for (index, value) in self.out.iter_mut().enumerate() {
                *value = (1..N).fold(term(0, index), |sum, next| sum + term(next, index));
            }
        }
    }
}

fn pass<T: Real, const N: usize>(
    level: Level,
    terms: &[(T, &[T])],
    out: &mut [T],
    accumulate: bool,
) {
    let coefficients = std::array::from_fn(|term| terms[term].0);
    let inputs = std::array::from_fn(|term| terms[term].1);
    level.run(WeightedSum::<T, N> { coefficients, inputs, out, accumulate });
}

/// `out = c₀·x₀ + c₁·x₁ + …`, in that order, each step rounded.
///
/// # Panics
///
/// If there is no term, or one is not as long as `out`.
pub fn weighted_sum<T: Real>(level: Level, terms: &[(T, &[T])], out: &mut [T]) {
    assert!(!terms.is_empty(), "a weighted sum needs a term to start from");
    for (_, input) in terms {
        assert_eq!(input.len(), out.len(), "a term and the output must have the same length");
    }
    for (position, few) in terms.chunks(FUSED).enumerate() {
        accumulate(level, few, out, position > 0);
    }
}

/// Up to [`FUSED`] terms, from the first product or onto what `out` holds.
pub(crate) fn accumulate<T: Real>(
    level: Level,
    terms: &[(T, &[T])],
    out: &mut [T],
    accumulate: bool,
) {
    match terms.len() {
        1 => pass::<T, 1>(level, terms, out, accumulate),
        2 => pass::<T, 2>(level, terms, out, accumulate),
        3 => pass::<T, 3>(level, terms, out, accumulate),
        FUSED => pass::<T, FUSED>(level, terms, out, accumulate),
        count => unreachable!("{count} terms in one pass"),
    }
}

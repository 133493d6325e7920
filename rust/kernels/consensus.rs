//! The sign vote of TIES: models that pull an element the other way are left out.
//!
//! For each element: the weighted values are summed, in order; the sign of the sum wins, zero
//! counting as positive; the weighted values of that sign are summed, in order, and divided by the
//! sum of their weights where that is wanted (and [not zero](cancels)). A value of zero has no sign
//! and joins neither side; a NaN makes the result NaN. Written out with the elementwise kernels this
//! takes some twenty passes over chunks; here it takes one, a group of elements at a time in
//! registers, for any number of models.

use super::level::{Kernel, Level};
use super::real::Real;

/// Elements that are voted on together: two AVX-512 registers of f32.
const GROUP: usize = 32;

/// Whether to average is a constant: half of the sums are only for that. So is whether the weights
/// can cancel each other, for which their magnitudes are summed too.
struct Elect<'a, T, const AVERAGE: bool, const CANCELS: bool> {
    terms: &'a [(T, &'a [T])],
    out: &'a mut [T],
}

/// Beside the magnitudes of its terms, what a sum is at most if it is zero but for rounding.
pub(crate) const CANCELLED: f64 = 1e-6;

/// Whether a sum is zero but for rounding: next to nothing beside the sum of its terms' magnitudes.
/// Nothing is divided by such a sum.
pub(crate) fn cancels<T: Real>(sum: T, magnitudes: T) -> bool {
    sum.abs() <= T::from_f64(CANCELLED) * magnitudes
}

/// Whether the sum of some of these weights can be zero while its terms are not. Sums of one sign
/// cannot, unless they overflow.
pub(super) fn can_cancel<T: Real>(weights: &(impl Iterator<Item = T> + Clone)) -> bool {
    let sum = weights.clone().fold(T::ZERO, |sum, weight| sum + weight.abs());
    let has = |holds: fn(T) -> bool| weights.clone().any(holds);
    !sum.to_f64().is_finite() || (has(|weight| weight > T::ZERO) && has(|weight| weight < T::ZERO))
}

impl<T: Real, const AVERAGE: bool, const CANCELS: bool> Elect<'_, T, AVERAGE, CANCELS> {
    /// Elements from `start` on, as many as `out` has.
    #[inline(always)]
    fn group(&self, start: usize, out: &mut [T; GROUP]) {
        let weighted = |&(weight, values): &(T, &[T])| {
            let values: &[T; GROUP] =
                values[start..start + GROUP].try_into().expect("a slice of that length");
            values.map(|value| weight * value)
        };
        let mut vote = [T::ZERO; GROUP];
        for (at, term) in self.terms.iter().enumerate() {
            let values = weighted(term);
            for (vote, value) in vote.iter_mut().zip(values) {
                *vote = if at == 0 { value } else { *vote + value };
            }
        }
        let [mut sum, mut share, mut magnitudes] = [[T::ZERO; GROUP]; 3];
        for term in self.terms {
            let values = weighted(term);
            let magnitude = term.0.abs();
            for at in 0..GROUP {
                let agrees =
                    if vote[at] >= T::ZERO { values[at] > T::ZERO } else { values[at] < T::ZERO };
                sum[at] += if agrees { values[at] } else { T::ZERO };
                share[at] += if agrees { term.0 } else { T::ZERO };
                if CANCELS {
                    magnitudes[at] += if agrees { magnitude } else { T::ZERO };
                }
            }
        }
        for at in 0..GROUP {
            let is_zero =
                if CANCELS { cancels(share[at], magnitudes[at]) } else { share[at] == T::ZERO };
            let divisor = if is_zero { T::ONE } else { share[at] };
            let elected = if AVERAGE { sum[at] / divisor } else { sum[at] };
            out[at] = if vote[at].is_nan() { T::NAN } else { elected };
        }
    }
}

impl<T: Real, const AVERAGE: bool, const CANCELS: bool> Kernel for Elect<'_, T, AVERAGE, CANCELS> {
    type Output = ();

    #[inline(always)]
    fn run(mut self) {
        let out = std::mem::take(&mut self.out);
        let (groups, rest) = out.as_chunks_mut::<GROUP>();
        let done = groups.len() * GROUP;
        for (at, group) in groups.iter_mut().enumerate() {
            self.group(at * GROUP, group);
        }
        for (at, value) in rest.iter_mut().enumerate() {
            let terms = self.terms.iter().map(|&(weight, values)| (weight, values[done + at]));
            *value = elect_one(terms, AVERAGE);
        }
    }
}

/// The vote on one element.
#[inline(always)]
pub(crate) fn elect_one<T: Real>(terms: impl Iterator<Item = (T, T)> + Clone, average: bool) -> T {
    let weighted = terms.map(|(weight, value)| (weight, weight * value));
    let vote = weighted.clone().map(|(_, value)| value).reduce(|sum, value| sum + value);
    if vote.is_some_and(T::is_nan) {
        return T::NAN;
    }
    let positive = vote.is_none_or(|vote| vote >= T::ZERO);
    let [mut sum, mut share, mut magnitudes] = [T::ZERO; 3];
    for (weight, value) in weighted {
        if if positive { value > T::ZERO } else { value < T::ZERO } {
            sum += value;
            share += weight;
            magnitudes += weight.abs();
        }
    }
    if average && !cancels(share, magnitudes) { sum / share } else { sum }
}

/// `out[i]` is the sum of the `weight · value` that have the sign of the sum of them all; with
/// `average`, divided by the sum of their weights, if that is not [zero](cancels).
///
/// # Panics
///
/// If there is no term, or one is not as long as `out`.
pub fn elect<T: Real>(level: Level, terms: &[(T, &[T])], average: bool, out: &mut [T]) {
    assert!(!terms.is_empty(), "a vote needs a voter");
    for (_, values) in terms {
        assert_eq!(values.len(), out.len(), "a term and the output must have the same length");
    }
    match (average, average && can_cancel(&terms.iter().map(|term| term.0))) {
        (false, _) => level.run(Elect::<T, false, false> { terms, out }),
        (true, false) => level.run(Elect::<T, true, false> { terms, out }),
        (true, true) => level.run(Elect::<T, true, true> { terms, out }),
    }
}

//! The exponential and the logarithm, of additions, multiplications, divisions and bits only: so
//! every machine and every device that follows IEEE 754 gives the same numbers.
//!
//! Both are computed in f64, whatever the working type: the series have as many terms as it needs, and
//! results are within a unit in the last place of f64, or as good as correctly rounded in f32. There is
//! no branch and no conversion to an integer, which some instruction sets lack, so that loops are
//! vectorised for all of them. `python/oxmerge/torch_kernels.py` does the same steps.

use std::f64::consts::{FRAC_1_SQRT_2, LOG2_E};

/// What a working type asks for.
pub(super) struct Extent {
    /// Terms of the series: of eʳ those after the first two, of ln those after the first.
    pub(super) exp: usize,
    pub(super) ln: usize,
    /// A power beyond which eˣ is infinite, and 0 where it is negative.
    pub(super) most: f64,
}

pub(super) const F32: Extent = Extent { exp: 8, ln: 6, most: 160.0 };
pub(super) const F64: Extent = Extent { exp: 12, ln: 11, most: 800.0 };

/// ln 2 in two parts: a whole number of up to 11 bits times the first is exact.
const LN_2_HIGH: f64 = 6.931_471_803_691_238e-1;
const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;
/// Bits behind the point in a f64, and what its exponent is counted from.
const FRACTION: u32 = 52;
const BIAS: u64 = 1023;
/// Up to this power, and down to its opposite, 2ᵏ is a normal number.
const MOST_AT_ONCE: f64 = 700.0;
/// 1.5 · 2⁵². Added to a smaller number, it leaves no bits behind the point: the sum is rounded to a whole
/// number, which its lowest bits are.
const TO_WHOLE: f64 = 6_755_399_441_055_744.0;
/// 2⁵². Its lowest bits, put to those of a small whole number, add that number.
const FROM_WHOLE: f64 = 4_503_599_627_370_496.0;

/// 1/2!, 1/3!, …
const fn factorials<const TERMS: usize>() -> [f64; TERMS] {
    let (mut terms, mut n, mut factorial) = ([0.0; TERMS], 0, 1.0);
    while n < TERMS {
        factorial *= (n + 2) as f64;
        terms[n] = 1.0 / factorial;
        n += 1;
    }
    terms
}

/// 2/3, 2/5, …
const fn odd_parts<const TERMS: usize>() -> [f64; TERMS] {
    let (mut terms, mut n) = ([0.0; TERMS], 0);
    while n < TERMS {
        terms[n] = 2.0 / (2 * n + 3) as f64;
        n += 1;
    }
    terms
}

/// `terms[0] + x · (terms[1] + x · (…))`.
#[inline(always)]
fn series<const TERMS: usize>(x: f64, terms: &[f64; TERMS]) -> f64 {
    let mut sum = terms[TERMS - 1];
    for term in terms[..TERMS - 1].iter().rev() {
        sum = term + x * sum;
    }
    sum
}

/// 2ᵏ for a whole k that a normal number has for an exponent, given as `k + TO_WHOLE`.
#[inline(always)]
fn power_of_two(shifted: f64) -> f64 {
    f64::from_bits((shifted.to_bits().wrapping_add(BIAS)) << FRACTION)
}

/// eˣ: 2ᵏ · eʳ with |r| ≤ ln 2 / 2, by the Taylor series.
#[inline(always)]
pub(super) fn exp<const TERMS: usize>(x: f64, most: f64) -> f64 {
    // Beyond these k would leave its range. NaN stays, to the end.
    let x = x.clamp(-most, most);
    let k = (x * LOG2_E + TO_WHOLE) - TO_WHOLE;
    let r = (x - k * LN_2_HIGH) - k * LN_2_LOW;
    // The small terms first: 1 is added once.
    let sum = 1.0 + (r + (r * r) * series(r, const { &factorials::<TERMS>() }));
    if most <= MOST_AT_ONCE {
        return sum * power_of_two(k + TO_WHOLE);
    }
    // In two steps, since 2ᵏ itself may not be a normal number.
    let half = k * 0.5 + TO_WHOLE;
    let rest = (k - (half - TO_WHOLE)) + TO_WHOLE;
    sum * power_of_two(half) * power_of_two(rest)
}

/// ln x: k · ln 2 + ln m with m in √½ to √2, by the series in s = (m − 1) / (m + 1).
#[inline(always)]
pub(super) fn ln<const TERMS: usize>(x: f64) -> f64 {
    // Subnormal numbers are made normal ones.
    let is_small = x < f64::MIN_POSITIVE;
    let normal = if is_small { x * power_of_two(TO_WHOLE + 54.0) } else { x };
    // With √½ moved to where an exponent begins, the exponent is k, and the rest is how far m is from it.
    let least = FRAC_1_SQRT_2.to_bits();
    let moved = normal.to_bits().wrapping_add((BIAS << FRACTION) - least);
    let exponent = f64::from_bits((moved >> FRACTION) | FROM_WHOLE.to_bits()) - FROM_WHOLE;
    let k = exponent - (if is_small { BIAS as f64 + 54.0 } else { BIAS as f64 });
    let m = f64::from_bits((moved & ((1 << FRACTION) - 1)) + least);
    let rest = m - 1.0;
    let s = rest / (2.0 + rest);
    let square = s * s;
    let sum = square * series(square, const { &odd_parts::<TERMS>() });
    // 2s is rest − rest²/2 + s · rest²/2, of which rest is exact.
    let half = 0.5 * rest * rest;
    let found = k * LN_2_HIGH - ((half - (s * (half + sum) + k * LN_2_LOW)) - rest);
    let found = if x == f64::INFINITY { x } else { found };
    let found = if x == 0.0 { f64::NEG_INFINITY } else { found };
    if x >= 0.0 { found } else { f64::NAN }
}

#[cfg(test)]
mod tests {
    use super::{F32, F64};

    fn exp(x: f64) -> f64 {
        super::exp::<{ F64.exp }>(x, F64.most)
    }

    fn ln(x: f64) -> f64 {
        super::ln::<{ F64.ln }>(x)
    }

    #[test]
    fn they_are_near_those_of_libm() {
        let mut x = -750.0;
        while x < 715.0 {
            let (ours, theirs) = (exp(x), libm::exp(x));
            assert!(
                (ours - theirs).abs() <= 4e-16 * theirs + 1e-323 || ours == theirs,
                "e^{x}: {ours} {theirs}"
            );
            if theirs > 0.0 && theirs.is_finite() {
                let (ours, wanted) = (ln(theirs), libm::log(theirs));
                assert!((ours - wanted).abs() <= 4e-16 * wanted.abs() + 4e-17, "ln {theirs}");
            }
            x += 0.137;
        }
    }

    #[test]
    fn with_fewer_terms_they_are_as_near_as_f32_shows() {
        let mut x = -80.0;
        while x < 80.0 {
            let (ours, theirs) = (super::exp::<{ F32.exp }>(x, F32.most), libm::exp(x));
            assert!((ours - theirs).abs() <= 3e-11 * theirs, "e^{x}: {ours} {theirs}");
            let (ours, wanted) = (super::ln::<{ F32.ln }>(theirs), libm::log(theirs));
            assert!((ours - wanted).abs() <= 3e-11 * wanted.abs() + 4e-17, "ln {theirs}");
            x += 0.0137;
        }
    }

    #[test]
    fn ends_are_what_they_should_be() {
        assert_eq!((exp(0.0), ln(1.0)), (1.0, 0.0));
        assert_eq!((exp(f64::INFINITY), exp(f64::NEG_INFINITY)), (f64::INFINITY, 0.0));
        assert_eq!((ln(0.0), ln(f64::INFINITY)), (f64::NEG_INFINITY, f64::INFINITY));
        assert!(exp(f64::NAN).is_nan() && ln(f64::NAN).is_nan() && ln(-1.0).is_nan());
    }
}

//! The exponential and the logarithm, of additions, multiplications, divisions and bits only: so
//! every machine and every device that follows IEEE 754 gives the same numbers.
//!
//! Both are computed in f64, whatever the working type, and are within a unit in the last place
//! there. `python/oxmerge/torch_kernels.py` does the same steps.

use std::f64::consts::{LOG2_E, SQRT_2};

/// ln 2 in two parts: a whole number of up to 11 bits times the first is exact.
const LN_2_HIGH: f64 = 6.931_471_803_691_238e-1;
const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;
/// Bits behind the point in a f64, and what its exponent is counted from.
const FRACTION: u32 = 52;
const BIAS: i64 = 1023;

/// eˣ: 2ᵏ · eʳ with |r| ≤ ln 2 / 2, by the Taylor series of degree 13.
pub(super) fn exp(x: f64) -> f64 {
    if x.is_nan() {
        return f64::NAN;
    }
    // Beyond these the result is 0 or infinite, and k would leave its range.
    let x = x.clamp(-800.0, 800.0);
    let k = (x * LOG2_E).round_ties_even();
    let r = (x - k * LN_2_HIGH) - k * LN_2_LOW;
    let mut sum = 1.0;
    for n in (3..=13).rev() {
        sum = 1.0 + r * sum / f64::from(n);
    }
    // The small terms first: 1 is added once.
    let sum = 1.0 + (r + 0.5 * (r * r) * sum);
    // In two steps: 2ᵏ itself may be beyond the range of normal numbers.
    let half = (k * 0.5).floor();
    sum * power_of_two(half) * power_of_two(k - half)
}

/// 2ᵏ for a whole k that a normal number has for an exponent.
fn power_of_two(k: f64) -> f64 {
    f64::from_bits(((k as i64 + BIAS) as u64) << FRACTION)
}

/// ln x: k · ln 2 + ln m with m in √½ to √2, by the series in s = (m − 1) / (m + 1).
pub(super) fn ln(x: f64) -> f64 {
    if x.is_nan() || x < 0.0 {
        return f64::NAN;
    }
    if x == 0.0 {
        return f64::NEG_INFINITY;
    }
    if x == f64::INFINITY {
        return x;
    }
    let (normal, shift) =
        if x < f64::MIN_POSITIVE { (x * power_of_two(54.0), 54.0) } else { (x, 0.0) };
    let bits = normal.to_bits();
    let exponent = (bits >> FRACTION) as i64 - BIAS;
    let fraction = bits & ((1 << FRACTION) - 1);
    let m = f64::from_bits(fraction | ((BIAS as u64) << FRACTION));
    let is_large = m > SQRT_2;
    let m = if is_large { m * 0.5 } else { m };
    let k = exponent as f64 + if is_large { 1.0 } else { 0.0 } - shift;
    let rest = m - 1.0;
    let s = rest / (2.0 + rest);
    let square = s * s;
    let mut sum = 0.0;
    for n in (1..=11).rev() {
        sum = square * (sum + 2.0 / f64::from(2 * n + 1));
    }
    // 2s is rest − rest²/2 + s · rest²/2, of which rest is exact.
    let half = 0.5 * rest * rest;
    k * LN_2_HIGH - ((half - (s * (half + sum) + k * LN_2_LOW)) - rest)
}

#[cfg(test)]
mod tests {
    use super::{exp, ln};

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
    fn ends_are_what_they_should_be() {
        assert_eq!((exp(0.0), ln(1.0)), (1.0, 0.0));
        assert_eq!((exp(f64::INFINITY), exp(f64::NEG_INFINITY)), (f64::INFINITY, 0.0));
        assert_eq!((ln(0.0), ln(f64::INFINITY)), (f64::NEG_INFINITY, f64::INFINITY));
        assert!(exp(f64::NAN).is_nan() && ln(f64::NAN).is_nan() && ln(-1.0).is_nan());
    }
}

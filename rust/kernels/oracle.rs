//! The kernels again, one element at a time: the definition that the fast ones are tested against.
//!
//! Written to be read, not to be fast. Nothing here is shared with the kernels but the arithmetic
//! of [`Real`]; conversions, order keys and the generator are defined anew, from the formats'
//! definitions.

use super::compare::{CELL, Comparison};
use super::elementwise::{BinaryOp, UnaryOp};
use super::order::Counts;
use super::random::MaskKey;
use super::rank::Picked;
use super::real::Real;
use super::reduce::{LANES, Lanes};
use crate::dtype::DType;

/// A binary floating-point format: a sign bit, then exponent bits, then mantissa bits.
#[derive(Clone, Copy, Debug)]
struct Shape {
    exponent_bits: u32,
    mantissa_bits: u32,
}

impl Shape {
    fn of(dtype: DType) -> Self {
        let (exponent_bits, mantissa_bits) = match dtype {
            DType::Bf16 => (8, 7),
            DType::F16 => (5, 10),
            DType::F32 => (8, 23),
            DType::F64 => (11, 52),
            _ => panic!("{dtype} is not a float type"),
        };
        Self { exponent_bits, mantissa_bits }
    }

    /// The pattern of +infinity; the patterns above it are NaN.
    fn infinity(self) -> u64 {
        ((1 << self.exponent_bits) - 1) << self.mantissa_bits
    }

    /// The positive quiet NaN without payload.
    fn nan(self) -> u64 {
        self.infinity() | 1 << (self.mantissa_bits - 1)
    }

    /// The value of a non-negative pattern. At infinity the exponents go on, to the value that
    /// would come next after the greatest finite one.
    fn value(self, pattern: u64) -> f64 {
        let bias = (1 << (self.exponent_bits - 1)) - 1;
        let exponent = (pattern >> self.mantissa_bits) as i32;
        let mantissa = pattern & ((1 << self.mantissa_bits) - 1);
        let significand = if exponent == 0 { mantissa } else { mantissa | 1 << self.mantissa_bits };
        libm::scalbn(significand as f64, exponent.max(1) - bias - self.mantissa_bits as i32)
    }

    /// The pattern nearest to a non-negative value; of two equally near, the even one.
    fn nearest(self, value: f64) -> u64 {
        // Patterns order as their values do: find the last one not above the value.
        let (mut below, mut above) = (0, self.infinity());
        if value >= self.value(above) {
            return above;
        }
        while above - below > 1 {
            let middle = below.midpoint(above);
            *(if self.value(middle) <= value { &mut below } else { &mut above }) = middle;
        }
        // Exact: f64 has more than the one bit that this needs beyond either.
        let tie = self.value(below).midpoint(self.value(above));
        let up = value > tie || (value >= tie && below % 2 == 1);
        if up { above } else { below }
    }
}

/// The value of one stored element.
pub fn widen<T: Real>(dtype: DType, bytes: &[u8]) -> T {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    if dtype == DType::F64 {
        return T::from_f64(f64::from_le_bytes(word));
    }
    let (shape, sign_bit) = (Shape::of(dtype), 1 << (8 * dtype.size() - 1));
    let pattern = u64::from_le_bytes(word);
    let magnitude = pattern & !sign_bit;
    let value = match magnitude {
        _ if magnitude > shape.infinity() => f64::NAN,
        _ if magnitude == shape.infinity() => f64::INFINITY,
        _ => shape.value(magnitude),
    };
    T::from_f64(if pattern & sign_bit == 0 { value } else { -value })
}

/// The stored element nearest to a value; of two equally near, the even one.
pub fn narrow<T: Real>(dtype: DType, value: T) -> Vec<u8> {
    let shape = Shape::of(dtype);
    let value = value.to_f64();
    let sign = u64::from(value.is_sign_negative()) << (8 * dtype.size() - 1);
    let pattern = match dtype {
        _ if value.is_nan() => shape.nan(),
        DType::F64 => value.to_bits(),
        _ => sign | shape.nearest(value.abs()),
    };
    pattern.to_le_bytes()[..dtype.size()].to_vec()
}

/// `a op b`.
pub fn binary<T: Real>(op: BinaryOp, a: T, b: T) -> T {
    let negative_zero = |value: T| value == T::ZERO && value.bits() != 0;
    let has_nan = a.is_nan() || b.is_nan();
    let less = a < b || (a == b && negative_zero(a) && !negative_zero(b));
    match op {
        BinaryOp::Add => a + b,
        BinaryOp::Sub => a - b,
        BinaryOp::Mul => a * b,
        BinaryOp::Div => a / b,
        BinaryOp::Max | BinaryOp::Min if has_nan => T::NAN,
        BinaryOp::Max => *(if less { &b } else { &a }),
        BinaryOp::Min => *(if less { &a } else { &b }),
        BinaryOp::Greater => T::truth(a > b),
        BinaryOp::GreaterEqual => T::truth(a >= b),
        BinaryOp::Equal => T::truth(a == b),
    }
}

/// `op a`.
pub fn unary<T: Real>(op: UnaryOp, a: T) -> T {
    match op {
        UnaryOp::Neg => -a,
        UnaryOp::Abs => a.abs(),
        UnaryOp::Sign if a > T::ZERO => T::ONE,
        UnaryOp::Sign if a < T::ZERO => -T::ONE,
        UnaryOp::Sign if a == T::ZERO => T::ZERO,
        UnaryOp::Sign => T::NAN,
        UnaryOp::Sqrt => a.sqrt(),
        UnaryOp::Exp => a.exp(),
        UnaryOp::Ln => a.ln(),
    }
}

/// `yes` where the mask is not zero, else `no`.
pub fn select<T: Real>(mask: T, yes: T, no: T) -> T {
    if mask == T::ZERO { no } else { yes }
}

/// `c₀·x₀ + c₁·x₁ + …` of one element, in that order.
pub fn weighted_sum<T: Real>(terms: &[(T, T)]) -> T {
    let products = terms.iter().map(|&(coefficient, value)| coefficient * value);
    products.reduce(|sum, product| sum + product).expect("a term to start from")
}

/// `base + scale·(c₀·(x₀ − base) + …)` of one element, in that order.
pub fn weighted_difference_sum<T: Real>(base: T, terms: &[(T, T)], scale: T) -> T {
    let differences: Vec<_> =
        terms.iter().map(|&(coefficient, value)| (coefficient, value - base)).collect();
    let sum = weighted_sum(&differences);
    base + if scale == T::ONE { sum } else { sum * scale }
}

/// `value + scale·(l₀·r₀ + l₁·r₁ + …)`, in listed order; each product is added without being rounded.
pub fn low_rank<T: Real>(value: T, scale: T, products: &[(T, T)]) -> T {
    let Some((&(left, right), rest)) = products.split_first() else { return value };
    let sum = rest.iter().fold(left * right, |sum, &(left, right)| left.mul_add(right, sum));
    scale.mul_add(sum, value)
}

/// The sum of those `weight · value` that have the sign of the sum of them all (zero counts as
/// positive), divided by the sum of their weights if an average is asked for and that is more than
/// 1e-6 of the sum of their magnitudes.
pub fn elect<T: Real>(terms: &[(T, T)], average: bool) -> T {
    let weighted: Vec<T> = terms.iter().map(|&(weight, value)| weight * value).collect();
    let vote = weighted.iter().copied().reduce(|sum, value| sum + value).expect("a voter");
    if vote.is_nan() {
        return T::NAN;
    }
    let winner = if vote >= T::ZERO { T::ONE } else { -T::ONE };
    let (mut sum, mut share, mut magnitudes) = (T::ZERO, T::ZERO, T::ZERO);
    for (&(weight, _), value) in terms.iter().zip(weighted) {
        if unary(UnaryOp::Sign, value) == winner {
            sum += value;
            share += weight;
            magnitudes += weight.abs();
        }
    }
    let is_zero = share.abs() <= T::from_f64(1e-6) * magnitudes;
    if average && !is_zero { sum / share } else { sum }
}

/// The order key: zero is in the middle, its neighbours beside it, NaN at the top.
pub fn key<T: Real>(value: T) -> u64 {
    let width = 8 * size_of::<T>() as u32;
    let middle = 1 << (width - 1);
    let magnitude = value.bits() & (middle - 1);
    match value {
        _ if value.is_nan() => u64::MAX >> (64 - width),
        _ if value < T::ZERO => middle - magnitude,
        _ => middle + magnitude,
    }
}

/// What a draw must be below for the element of a rank, 0 being the smallest and `last` the largest, to
/// be kept: its probability goes from `lowest` to `highest` in even steps. A lone one has their mean.
pub fn bound_of_rank(rank: u64, last: u64, lowest: f64, highest: f64) -> f64 {
    let share = if last == 0 { 0.5 } else { rank as f64 / last as f64 };
    let probability = lowest + (highest - lowest) * share;
    (probability * 4_294_967_296.0 + 0.5).floor()
}

/// What is kept of a vector by rank: it is sorted from the largest down, and of equal elements the first
/// comes first.
pub fn kept_by_rank<T: Real>(values: &[T], picked: Picked<'_>) -> Vec<u8> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by_key(|&at| std::cmp::Reverse(key(values[at])));
    let mut kept = vec![0; values.len()];
    for (place, &at) in order.iter().enumerate() {
        let is_kept = match picked {
            Picked::Largest(count) => (place as u64) < count,
            Picked::Random { lowest, highest, draws } => {
                let last = values.len() - 1;
                let bound = bound_of_rank((last - place) as u64, last as u64, lowest, highest);
                f64::from(draws[at]) < bound
            }
        };
        kept[at] = u8::from(is_kept);
    }
    kept
}

/// Adds the keys inside the interval to their bins, and counts.
pub fn histogram<T: Real>(
    values: &[T],
    low: u64,
    high: u64,
    shift: u32,
    bins: &mut [u32],
) -> Counts {
    let mut counts = Counts::default();
    for key in values.iter().map(|&value| key(value)) {
        if key > high {
            counts.above += 1;
        } else if key >= low {
            counts.inside += 1;
            bins[((key - low) >> shift) as usize] += 1;
        }
    }
    counts
}

/// Whether a cut keeps a value: its key is above the threshold, or equal to it where that will do.
pub fn is_kept<T: Real>(value: T, threshold: u64, equals: bool) -> bool {
    key(value) > threshold || (equals && key(value) == threshold)
}

/// Folds term after term into the lanes in turn.
pub fn reduce(terms: &[f64], lanes: &mut Lanes, step: impl Fn(f64, f64) -> f64) {
    for (index, &term) in terms.iter().enumerate() {
        let lane = &mut lanes[index % LANES];
        *lane = step(*lane, term);
    }
}

/// The sum of 2ⁿ values: that of the element-wise sum of both halves.
pub fn fold_halves(values: &[f64]) -> f64 {
    match values {
        [] => 0.0,
        &[value] => value,
        _ => {
            let half = values.len().next_power_of_two() / 2;
            let upper = values[half..].iter().copied().chain(std::iter::repeat(0.0));
            let sums: Vec<_> =
                values[..half].iter().zip(upper).map(|(low, high)| low + high).collect();
            fold_halves(&sums)
        }
    }
}

/// Philox4x32-10 as published: ten rounds of two wide multiplications, the key raised in between.
pub fn philox4x32(mut key: [u32; 2], mut counter: [u32; 4]) -> [u32; 4] {
    for _ in 0..10 {
        let first = 0xD251_1F53_u64 * u64::from(counter[0]);
        let second = 0xCD9E_8D57_u64 * u64::from(counter[2]);
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key[1],
            first as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// The draw of element `index`, of 32 bits: the high half from one counter, the low half from the
/// same place of another.
pub fn draw(key: &MaskKey, index: u64) -> u32 {
    let counter = index / 512 * 64 + index % 64;
    let place = index % 512 / 64;
    let half = |counter: u64| {
        let word = philox4x32(key.key(), key.counter(counter))[(place % 4) as usize];
        if place < 4 { word & 0xFFFF } else { word >> 16 }
    };
    half(counter) << 16 | half(1 << 63 | counter)
}

/// What is known of a whole output, compared with a reference of the same type, if there is one.
pub fn comparison(dtype: DType, out: &[u8], reference: Option<&[u8]>) -> Comparison {
    let values = |bytes: &[u8]| -> Vec<f64> {
        bytes.chunks(dtype.size()).map(|element| widen(dtype, element)).collect()
    };
    let largest = {
        let shape = Shape::of(dtype);
        if dtype == DType::F64 { f64::MAX } else { shape.value(shape.infinity() - 1) }
    };
    let out = values(out);
    let count = |is_so: fn(&f64) -> bool| out.iter().filter(|value| is_so(value)).count() as u64;
    let mut found = Comparison {
        nan: count(|value| value.is_nan()),
        infinite: count(|value| value.is_infinite()),
        saturated: out.iter().filter(|value| value.abs() == largest).count() as u64,
        ..Comparison::default()
    };
    let Some(reference) = reference.map(values) else { return found };
    let pairs: Vec<_> = out.into_iter().zip(reference).collect();
    found.compared = pairs.len() as u64;
    let is_same = |&(x, y): &(f64, f64)| x == y || (x.is_nan() && y.is_nan());
    found.changed = pairs.iter().filter(|&pair| !is_same(pair)).count() as u64;
    let most = if dtype == DType::F64 { 0.0 } else { largest * largest / 8.0 };
    [found.difference, found.norm] = sums_of_squares(&pairs, most);
    found
}

/// The sums of the squares of x − y and of y, where both are finite. That of more than a cell is that
/// of the largest power of two of cells that leaves some, and of the rest. A cell is summed in f32 if
/// no square is lost or too large there, and its sums are less than `most`; else in f64.
fn sums_of_squares(pairs: &[(f64, f64)], most: f64) -> [f64; 2] {
    if pairs.len() > CELL {
        let cells = pairs.len().div_ceil(CELL);
        let (left, right) = pairs.split_at(cells.next_power_of_two() / 2 * CELL);
        let [left, right] = [left, right].map(|half| sums_of_squares(half, most));
        return [left[0] + right[0], left[1] + right[1]];
    }
    let [difference, norm] = sums_of_cell(pairs, |value| f64::from(value as f32));
    let least = libm::exp2(-100.0);
    let is_in_f32 = (difference >= least || pairs.iter().all(|(x, y)| x == y))
        && (norm >= least || pairs.iter().all(|&(_, y)| y == 0.0))
        && difference + norm < most;
    if is_in_f32 {
        return [difference, norm];
    }
    let finite = |&(x, y): &(f64, f64)| {
        if x.is_finite() && y.is_finite() { (x, y) } else { (0.0, 0.0) }
    };
    sums_of_cell(&pairs.iter().map(finite).collect::<Vec<_>>(), |value| value)
}

/// The same of a cell in the type that `round` rounds to.
fn sums_of_cell(pairs: &[(f64, f64)], round: fn(f64) -> f64) -> [f64; 2] {
    let sum = |terms: Vec<f64>| {
        let squares: Vec<_> = terms.into_iter().map(round).map(|term| round(term * term)).collect();
        let mut lanes = [0.0; LANES];
        reduce(&squares, &mut lanes, |lane, term| round(lane + term));
        fold_halves(&lanes)
    };
    [sum(pairs.iter().map(|(x, y)| x - y).collect()), sum(pairs.iter().map(|&(_, y)| y).collect())]
}

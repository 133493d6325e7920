//! Weighted sums from bytes to bytes.
//!
//! Widening into a buffer, summing buffers and narrowing the result moves each element through the
//! cache four times. Where all types agree, which is nearly always, one loop can widen, sum and
//! narrow in registers; that is what brings a merge of two models to the speed of a copy. Anything
//! else goes through buffers on the stack, a piece at a time. Both compute the same thing in the
//! same order, so the bits agree.

use super::convert::{Bf16, F16, F32, Format, check_bytes, narrow, widen};
use super::elementwise::{BinaryOp, Operand, binary};
use super::level::{Kernel, Level};
use super::weighted::{FUSED, accumulate};
use crate::dtype::DType;

/// A coefficient and a stored input.
pub type Term<'a> = (f32, DType, &'a [u8]);

/// Elements of a piece of the unfused path: a few buffers of it fit the first-level cache.
const PIECE: usize = 1024;

struct SumBytes<'a, F: Format, const N: usize> {
    coefficients: [f32; N],
    inputs: [&'a [F::Bytes]; N],
    out: &'a mut [F::Bytes],
}

impl<F: Format, const N: usize> Kernel for SumBytes<'_, F, N> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let inputs = self.inputs.map(|input| &input[..self.out.len()]);
        let term = |term: usize, index: usize| {
            self.coefficients[term] * F::widen::<f32>(inputs[term][index])
        };
        for (index, bytes) in self.out.iter_mut().enumerate() {
            let sum = (1..N).fold(term(0, index), |sum, next| sum + term(next, index));
            *bytes = F::narrow(sum);
        }
    }
}

struct DifferenceBytes<'a, F: Format, const N: usize> {
    base: &'a [F::Bytes],
    coefficients: [f32; N],
    inputs: [&'a [F::Bytes]; N],
    scale: f32,
    out: &'a mut [F::Bytes],
}

impl<F: Format, const N: usize> Kernel for DifferenceBytes<'_, F, N> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let base = &self.base[..self.out.len()];
        let inputs = self.inputs.map(|input| &input[..self.out.len()]);
        for (index, bytes) in self.out.iter_mut().enumerate() {
            let base = F::widen::<f32>(base[index]);
            let term = |term: usize| {
                self.coefficients[term] * (F::widen::<f32>(inputs[term][index]) - base)
            };
            let sum = (1..N).fold(term(0), |sum, next| sum + term(next));
            // A scale of 1 changes nothing, so it needs no case of its own.
            *bytes = F::narrow(base + sum * self.scale);
        }
    }
}

/// What becomes of an element that is replaced, from what it is and from an element beside it.
#[derive(Clone, Copy, Debug)]
pub enum Update {
    /// `own`·x + `other`·y.
    Sum {
        /// The coefficient of what is replaced.
        own: f32,
        /// That of the other.
        other: f32,
        /// Whether the product of the other comes first.
        other_first: bool,
    },
    /// x + (t·(y − x))·scale.
    Toward {
        /// The coefficient of the difference.
        t: f32,
        /// By what the product is multiplied.
        scale: f32,
    },
    /// The same from the other end: y + (t·(x − y))·scale.
    From {
        /// The coefficient of the difference.
        t: f32,
        /// By what the product is multiplied.
        scale: f32,
    },
}

struct UpdateBytes<'a, F: Format, O> {
    other: &'a [F::Bytes],
    own: &'a mut [F::Bytes],
    operation: O,
}

trait UpdateOperation {
    fn of(&self, own: f32, other: f32) -> f32;
}

struct OwnFirst(f32, f32);
struct OtherFirst(f32, f32);
struct Toward(f32, f32);
struct From(f32, f32);

impl UpdateOperation for OwnFirst {
    #[inline(always)]
    fn of(&self, own: f32, other: f32) -> f32 {
        self.0 * own + self.1 * other
    }
}

impl UpdateOperation for OtherFirst {
    #[inline(always)]
    fn of(&self, own: f32, other: f32) -> f32 {
        self.1 * other + self.0 * own
    }
}

impl UpdateOperation for Toward {
    #[inline(always)]
    fn of(&self, own: f32, other: f32) -> f32 {
        own + self.0 * (other - own) * self.1
    }
}

impl UpdateOperation for From {
    #[inline(always)]
    fn of(&self, own: f32, other: f32) -> f32 {
        other + self.0 * (own - other) * self.1
    }
}

impl<F: Format, O: UpdateOperation> Kernel for UpdateBytes<'_, F, O> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let other = &self.other[..self.own.len()];
        for (own, other) in self.own.iter_mut().zip(other) {
            *own = F::narrow(self.operation.of(F::widen(*own), F::widen(*other)));
        }
    }
}

fn update<F: Format>(level: Level, update: Update, other: &[u8], own: &mut [u8]) {
    let (other, own) = (F::elements(other), F::elements_mut(own));
    match update {
        Update::Sum { own: c, other: d, other_first: false } => {
            level.run(UpdateBytes::<F, _> { other, own, operation: OwnFirst(c, d) });
        }
        Update::Sum { own: c, other: d, other_first: true } => {
            level.run(UpdateBytes::<F, _> { other, own, operation: OtherFirst(c, d) });
        }
        Update::Toward { t, scale } => {
            level.run(UpdateBytes::<F, _> { other, own, operation: Toward(t, scale) });
        }
        Update::From { t, scale } => {
            level.run(UpdateBytes::<F, _> { other, own, operation: From(t, scale) });
        }
    }
}

/// Replaces stored elements, with the bits of [`weighted_sum_bytes`] and
/// [`weighted_difference_sum_bytes`] of the same two inputs.
///
/// # Panics
///
/// If a length does not fit, or the type is not BF16, F16 or F32.
pub fn update_bytes(level: Level, by: Update, dtype: DType, other: &[u8], own: &mut [u8]) {
    check(&[(1.0, dtype, other)], dtype, own);
    match dtype {
        DType::Bf16 => update::<Bf16>(level, by, other, own),
        DType::F16 => update::<F16>(level, by, other, own),
        DType::F32 => update::<F32>(level, by, other, own),
        _ => panic!("{dtype} is not computed with in f32"),
    }
}

fn sum_pass<F: Format, const N: usize>(level: Level, terms: &[Term<'_>], out: &mut [u8]) {
    level.run(SumBytes::<F, N> {
        coefficients: std::array::from_fn(|term| terms[term].0),
        inputs: std::array::from_fn(|term| F::elements(terms[term].2)),
        out: F::elements_mut(out),
    });
}

fn sum_uniform<F: Format>(level: Level, terms: &[Term<'_>], out: &mut [u8]) {
    match terms.len() {
        1 => sum_pass::<F, 1>(level, terms, out),
        2 => sum_pass::<F, 2>(level, terms, out),
        3 => sum_pass::<F, 3>(level, terms, out),
        FUSED => sum_pass::<F, FUSED>(level, terms, out),
        count => unreachable!("{count} terms in one pass"),
    }
}

fn difference_pass<F: Format, const N: usize>(
    level: Level,
    base: &[u8],
    terms: &[Term<'_>],
    scale: f32,
    out: &mut [u8],
) {
    level.run(DifferenceBytes::<F, N> {
        base: F::elements(base),
        coefficients: std::array::from_fn(|term| terms[term].0),
        inputs: std::array::from_fn(|term| F::elements(terms[term].2)),
        scale,
        out: F::elements_mut(out),
    });
}

fn difference_uniform<F: Format>(
    level: Level,
    base: &[u8],
    terms: &[Term<'_>],
    scale: f32,
    out: &mut [u8],
) {
    match terms.len() {
        1 => difference_pass::<F, 1>(level, base, terms, scale, out),
        2 => difference_pass::<F, 2>(level, base, terms, scale, out),
        3 => difference_pass::<F, 3>(level, base, terms, scale, out),
        count => unreachable!("{count} terms in one pass"),
    }
}

/// The bytes of elements `start..start + count`.
fn piece(dtype: DType, bytes: &[u8], start: usize, count: usize) -> &[u8] {
    &bytes[start * dtype.size()..(start + count) * dtype.size()]
}

fn check(terms: &[Term<'_>], dtype: DType, out: &[u8]) -> usize {
    assert!(!terms.is_empty(), "a weighted sum needs a term to start from");
    let count = out.len() / dtype.size();
    check_bytes("the output", dtype, out, count);
    for &(_, dtype, input) in terms {
        check_bytes("a term", dtype, input, count);
    }
    count
}

/// Whether one loop can take all terms: few of them, and all of the output's type.
fn is_uniform(terms: &[Term<'_>], most: usize, dtype: DType) -> bool {
    terms.len() <= most && terms.iter().all(|term| term.1 == dtype)
}

/// [`weighted_sum`](super::weighted_sum) in f32 between stored elements.
///
/// # Panics
///
/// If there is no term, a length does not fit, or a type is not BF16, F16 or F32.
pub fn weighted_sum_bytes(level: Level, terms: &[Term<'_>], dtype: DType, out: &mut [u8]) {
    check(terms, dtype, out);
    match dtype {
        DType::Bf16 if is_uniform(terms, FUSED, dtype) => sum_uniform::<Bf16>(level, terms, out),
        DType::F16 if is_uniform(terms, FUSED, dtype) => sum_uniform::<F16>(level, terms, out),
        DType::F32 if is_uniform(terms, FUSED, dtype) => sum_uniform::<F32>(level, terms, out),
        _ => sum_pieces(level, terms, dtype, out),
    }
}

fn sum_pieces(level: Level, terms: &[Term<'_>], dtype: DType, out: &mut [u8]) {
    let (mut wide, mut sum) = ([0.0_f32; PIECE], [0.0_f32; PIECE]);
    for (position, out) in out.chunks_mut(PIECE * dtype.size()).enumerate() {
        let count = out.len() / dtype.size();
        let (wide, sum) = (&mut wide[..count], &mut sum[..count]);
        for (order, &(coefficient, dtype, input)) in terms.iter().enumerate() {
            widen(level, dtype, piece(dtype, input, position * PIECE, count), wide);
            accumulate(level, &[(coefficient, &*wide)], sum, order > 0);
        }
        narrow(level, sum, dtype, out);
    }
}

/// `base + scale·(c₀·(x₀ − base) + c₁·(x₁ − base) + …)` in f32 between stored elements, in that
/// order, each step rounded.
///
/// # Panics
///
/// If there is no term, a length does not fit, or a type is not BF16, F16 or F32.
pub fn weighted_difference_sum_bytes(
    level: Level,
    base: (DType, &[u8]),
    terms: &[Term<'_>],
    scale: f32,
    dtype: DType,
    out: &mut [u8],
) {
    let count = check(terms, dtype, out);
    check_bytes("the base", base.0, base.1, count);
    if base.0 != dtype || !is_uniform(terms, 3, dtype) {
        return difference_pieces(level, base, terms, scale, dtype, out);
    }
    match dtype {
        DType::Bf16 => difference_uniform::<Bf16>(level, base.1, terms, scale, out),
        DType::F16 => difference_uniform::<F16>(level, base.1, terms, scale, out),
        DType::F32 => difference_uniform::<F32>(level, base.1, terms, scale, out),
        _ => difference_pieces(level, base, terms, scale, dtype, out),
    }
}

fn difference_pieces(
    level: Level,
    (base_dtype, base_bytes): (DType, &[u8]),
    terms: &[Term<'_>],
    scale: f32,
    dtype: DType,
    out: &mut [u8],
) {
    let [mut base, mut wide, mut difference, mut sum] = [[0.0_f32; PIECE]; 4];
    for (position, out) in out.chunks_mut(PIECE * dtype.size()).enumerate() {
        let count = out.len() / dtype.size();
        let start = position * PIECE;
        let (base, sum) = (&mut base[..count], &mut sum[..count]);
        let (wide, difference) = (&mut wide[..count], &mut difference[..count]);
        widen(level, base_dtype, piece(base_dtype, base_bytes, start, count), base);
        for (order, &(coefficient, dtype, input)) in terms.iter().enumerate() {
            widen(level, dtype, piece(dtype, input, start, count), wide);
            let (wide, base) = (Operand::Slice(&*wide), Operand::Slice(&*base));
            binary(level, BinaryOp::Sub, wide, base, difference);
            accumulate(level, &[(coefficient, &*difference)], sum, order > 0);
        }
        binary(level, BinaryOp::Mul, Operand::Slice(sum), Operand::Scalar(scale), difference);
        binary(level, BinaryOp::Add, Operand::Slice(base), Operand::Slice(difference), sum);
        narrow(level, sum, dtype, out);
    }
}

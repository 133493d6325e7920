//! A sum of randomly thinned task vectors onto their base, from bytes to bytes.
//!
//! What DARE computes when the ratios of the norms are known, and TIES when its masks are. Step by
//! step each element goes through the cache a dozen times; here it is widened, subtracted, masked,
//! weighted, voted on and narrowed in registers. Each step is rounded as by the kernels it stands
//! for, in the same order, so the bits agree.

use super::consensus::{can_cancel, cancels};
use super::convert::{Bf16, F16, F32, Format, check_bytes};
use super::level::{Kernel, Level};
use super::mask_bits::{BITS, MaskBits, SPAN};
use crate::dtype::DType;

/// Elements by the same bit of a mask.
const ROW: usize = SPAN / BITS;

/// A task vector: input − base, what a mask keeps of it, times `scale`, then times `weight`.
#[derive(Clone, Copy, Debug)]
pub struct ThinnedTerm<'a> {
    /// What the merge weighs it with.
    pub weight: f32,
    /// What it is rescaled by.
    pub scale: f32,
    /// The stored input.
    pub input: &'a [u8],
    /// The mask of its elements.
    pub bits: &'a MaskBits,
}

/// How the terms come together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Votes {
    /// They are added up.
    None,
    /// As [`elect`](super::elect) does.
    Elect,
    /// The same, divided by the sum of the weights that agree.
    Average,
}

struct Thinned<
    'a,
    F: Format,
    const N: usize,
    const VOTES: bool,
    const AVERAGE: bool,
    const CANCELS: bool,
> {
    base: &'a [F::Bytes],
    inputs: [&'a [F::Bytes]; N],
    terms: [ThinnedTerm<'a>; N],
    lambda: f32,
    out: &'a mut [F::Bytes],
}

/// The weighted values summed up, or those of the sign of their sum.
#[inline(always)]
fn together<const N: usize, const VOTES: bool, const AVERAGE: bool, const CANCELS: bool>(
    weights: [f32; N],
    values: [f32; N],
) -> f32 {
    let total = (1..N).fold(values[0], |sum, next| sum + values[next]);
    if !VOTES {
        return total;
    }
    let [mut sum, mut share, mut magnitudes] = [0.0; 3];
    for term in 0..N {
        let agrees = if total >= 0.0 { values[term] > 0.0 } else { values[term] < 0.0 };
        sum += if agrees { values[term] } else { 0.0 };
        share += if agrees { weights[term] } else { 0.0 };
        if CANCELS {
            magnitudes += if agrees { weights[term].abs() } else { 0.0 };
        }
    }
    let is_zero = if CANCELS { cancels(share, magnitudes) } else { share == 0.0 };
    let divisor = if is_zero { 1.0 } else { share };
    let elected = if AVERAGE { sum / divisor } else { sum };
    if total.is_nan() { total } else { elected }
}

impl<F: Format, const N: usize, const VOTES: bool, const AVERAGE: bool, const CANCELS: bool>
    Thinned<'_, F, N, VOTES, AVERAGE, CANCELS>
{
    /// Element `index` of the row of elements that have `bit`.
    #[inline(always)]
    fn element(&self, base: F::Bytes, inputs: [F::Bytes; N], index: usize, bit: usize) -> F::Bytes {
        let base = F::widen::<f32>(base);
        let values = std::array::from_fn(|at| {
            let ThinnedTerm { weight, scale, bits, .. } = self.terms[at];
            let difference = F::widen::<f32>(inputs[at]) - base;
            let kept = if bits[index] & (1 << bit) == 0 { 0.0 } else { difference };
            weight * (scale * kept)
        });
        let weights = self.terms.map(|term| term.weight);
        F::narrow(base + self.lambda * together::<N, VOTES, AVERAGE, CANCELS>(weights, values))
    }
}

impl<F: Format, const N: usize, const VOTES: bool, const AVERAGE: bool, const CANCELS: bool> Kernel
    for Thinned<'_, F, N, VOTES, AVERAGE, CANCELS>
{
    type Output = ();

    #[inline(always)]
    fn run(mut self) {
        let (out, out_rest) = std::mem::take(&mut self.out).as_chunks_mut::<ROW>();
        let (base, base_rest) = self.base.as_chunks::<ROW>();
        let inputs = self.inputs.map(|input| input.as_chunks::<ROW>());
        let last_bit = out.len();
        for (bit, (out, base)) in out.iter_mut().zip(base).enumerate() {
            let inputs = inputs.map(|(rows, _)| &rows[bit]);
            for index in 0..ROW {
                let inputs = inputs.map(|input| input[index]);
                out[index] = self.element(base[index], inputs, index, bit);
            }
        }
        for (index, (out, &base)) in out_rest.iter_mut().zip(base_rest).enumerate() {
            let inputs = inputs.map(|(_, rest)| rest[index]);
            *out = self.element(base, inputs, index, last_bit);
        }
    }
}

/// `base + lambda · (terms together)` in f32 between stored elements of one type, up to a span of
/// them.
///
/// # Panics
///
/// If there are not one to three terms, more elements than a mask has, a length does not fit, or the
/// type is not BF16, F16 or F32.
pub fn thinned_sum_bytes(
    level: Level,
    dtype: DType,
    base: &[u8],
    terms: &[ThinnedTerm<'_>],
    votes: Votes,
    lambda: f32,
    out: &mut [u8],
) {
    let count = out.len() / dtype.size();
    assert!(count <= SPAN, "a mask has the bits of a span");
    check_bytes("the output", dtype, out, count);
    check_bytes("the base", dtype, base, count);
    for term in terms {
        check_bytes("an input", dtype, term.input, count);
    }
    match dtype {
        DType::Bf16 => with_format::<Bf16>(level, base, terms, votes, lambda, out),
        DType::F16 => with_format::<F16>(level, base, terms, votes, lambda, out),
        DType::F32 => with_format::<F32>(level, base, terms, votes, lambda, out),
        _ => unreachable!("{dtype} is not widened to f32"),
    }
}

fn with_format<F: Format>(
    level: Level,
    base: &[u8],
    terms: &[ThinnedTerm<'_>],
    votes: Votes,
    lambda: f32,
    out: &mut [u8],
) {
    match *terms {
        [a] => with_terms::<F, 1>(level, base, [a], votes, lambda, out),
        [a, b] => with_terms::<F, 2>(level, base, [a, b], votes, lambda, out),
        [a, b, c] => with_terms::<F, 3>(level, base, [a, b, c], votes, lambda, out),
        _ => unreachable!("{} terms in one pass", terms.len()),
    }
}

fn with_terms<F: Format, const N: usize>(
    level: Level,
    base: &[u8],
    terms: [ThinnedTerm<'_>; N],
    votes: Votes,
    lambda: f32,
    out: &mut [u8],
) {
    let (base, out) = (F::elements(base), F::elements_mut(out));
    let inputs = terms.map(|term| F::elements(term.input));
    match votes {
        Votes::None => {
            level.run(Thinned::<F, N, false, false, false> { base, inputs, terms, lambda, out });
        }
        Votes::Elect => {
            level.run(Thinned::<F, N, true, false, false> { base, inputs, terms, lambda, out });
        }
        Votes::Average if can_cancel(&terms.iter().map(|term| term.weight)) => {
            level.run(Thinned::<F, N, true, true, true> { base, inputs, terms, lambda, out });
        }
        Votes::Average => {
            level.run(Thinned::<F, N, true, true, false> { base, inputs, terms, lambda, out });
        }
    }
}

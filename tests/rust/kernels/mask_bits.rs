use super::{LENGTHS, assert_same, config, each_level};
use oxmerge::dtype::DType;
use oxmerge::kernels::{
    BITS, BinaryOp, MaskBits, MaskKey, Operand, SPAN, ThinnedTerm, Votes, binary, elect, masked,
    narrow, random_bits, thinned_sum_bytes, unpack_mask, weighted_sum, widen, widen_difference,
};
use proptest::prelude::*;

/// Bits of which each element's can be told.
fn bits() -> (MaskBits, impl Fn(usize) -> bool) {
    let keeps = |element: usize| element * element % 7 < 3;
    let mut bits: MaskBits = [0; SPAN / BITS];
    for element in 0..SPAN {
        bits[element % bits.len()] |= u32::from(keeps(element)) << (element / bits.len());
    }
    (bits, keeps)
}

each_level! {
    /// One kernel for what many do step by step.
    fn thinned_sums_are_their_steps<T>(level) {
        let dtype = prop::sample::select(&[DType::Bf16, DType::F16, DType::F32][..]);
        let votes = prop::sample::select(&[Votes::None, Votes::Elect, Votes::Average][..]);
        let length = prop::sample::select(&[0, 1, 63, 64, 65, 1000, SPAN][..]);
        // The last weights cancel each other.
        let weights = prop::sample::select(&[[0.5_f32, 0.2, -0.1], [0.3, 0.4, -0.700_000_1]][..]);
        let case = (dtype, votes, length, 1..=3_usize, weights, any::<u64>());
        proptest!(config(64), |((dtype, votes, length, count, weights, seed) in case)| {
            let byte = |at: usize| (seed.wrapping_mul(at as u64 | 1) >> 9) as u8;
            let stored =
                |from: usize| (from..from + length * dtype.size()).map(byte).collect::<Vec<_>>();
            let inputs: Vec<_> = (1..=count).map(|at| stored(7 * at)).collect();
            let bits: Vec<_> = (0..count)
                .map(|at| random_bits(level, &MaskKey::new(seed, "x", at as u32), 0, 1 << 31))
                .collect();
            let term = |at: usize| ThinnedTerm {
                weight: weights[at],
                scale: 1.0 + at as f32 / 3.0,
                input: &inputs[at],
                bits: &bits[at],
            };
            let terms: Vec<_> = (0..count).map(term).collect();
            let base = stored(0);
            let mut fast = vec![1; base.len()];
            thinned_sum_bytes(level, dtype, &base, &terms, votes, 0.7, &mut fast);

            let empty = || vec![0.0_f32; length];
            let (mut wide, mut vector, mut sum) = (empty(), empty(), empty());
            widen(level, dtype, &base, &mut wide);
            let mut weighted = Vec::new();
            for term in &terms {
                let mut kept = empty();
                widen_difference(level, dtype, term.input, &wide, &mut vector);
                masked(level, term.bits, term.scale, &vector, &mut kept);
                weighted.push((term.weight, kept));
            }
            let weighted: Vec<_> = weighted.iter().map(|(weight, kept)| (*weight, &**kept)).collect();
            match votes {
                Votes::None => weighted_sum(level, &weighted, &mut sum),
                Votes::Elect => elect(level, &weighted, false, &mut sum),
                Votes::Average => elect(level, &weighted, true, &mut sum),
            }
            let (a, lambda) = (Operand::Slice(&sum), Operand::Scalar(0.7));
            binary(level, BinaryOp::Mul, a, lambda, &mut vector);
            let (a, b) = (Operand::Slice(&wide), Operand::Slice(&vector));
            let mut merged = empty();
            binary(level, BinaryOp::Add, a, b, &mut merged);
            let mut slow = vec![2; base.len()];
            narrow(level, &merged, dtype, &mut slow);
            prop_assert_eq!(fast, slow);
        });
    }

    /// Every element by itself, of a whole span and of less.
    fn bits_become_numbers<T>(level) {
        let (bits, keeps) = bits();
        for length in LENGTHS.into_iter().filter(|&length| length <= SPAN).chain([SPAN]) {
            let mut mask = vec![T::NAN; length];
            unpack_mask(level, &bits, &mut mask);
            let expected: Vec<T> = (0..length).map(|element| T::truth(keeps(element))).collect();
            assert_eq!(mask, expected);
        }
    }

    /// Each is what it is times the scale: of what is dropped, zero, with the sign of the scale.
    fn bits_choose_values<T>(level) {
        let (bits, keeps) = bits();
        for length in LENGTHS.into_iter().filter(|&length| length <= SPAN).chain([SPAN]) {
            let value = |at: usize| if at.is_multiple_of(5) { T::NAN } else { -T::from_f64(at as f64) };
            let values: Vec<T> = (0..length).map(value).collect();
            let mut out = vec![T::NAN; length];
            for scale in [T::ONE, T::from_f64(-0.7)] {
                masked(level, &bits, scale, &values, &mut out);
                let kept = |at: usize| scale * if keeps(at) { values[at] } else { T::ZERO };
                let expected: Vec<T> = (0..length).map(kept).collect();
                assert_same(level, &out, &expected);
            }
        }
    }
}

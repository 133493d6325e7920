use super::{LENGTHS, assert_same, config, each_level};
use oxmerge::dtype::DType;
use oxmerge::kernels::{BinaryOp, Operand, binary, elect, oracle, widen, widen_difference};
use proptest::prelude::*;

each_level! {
    fn elect_is_like_the_oracle<T>(level) {
        let length = prop_oneof![prop::sample::select(&LENGTHS[..]), 0..100_usize];
        let terms = (1..6_usize, length).prop_flat_map(|(count, length)| {
            let values = prop::collection::vec(T::interesting(), length);
            prop::collection::vec((T::interesting(), values), count)
        });
        proptest!(config(96), |(terms in terms, average in any::<bool>())| {
            let slices: Vec<(T, &[T])> = terms.iter().map(|(w, x)| (*w, &x[..])).collect();
            let mut out = vec![T::ONE; slices[0].1.len()];
            elect(level, &slices, average, &mut out);
            let voters = |i: usize| slices.iter().map(|(w, x)| (*w, x[i])).collect::<Vec<_>>();
            let expected: Vec<T> =
                (0..out.len()).map(|i| oracle::elect(&voters(i), average)).collect();
            assert_same(level, &out, &expected);
        });
    }

    /// Weights that cancel each other but for rounding: nothing is divided by what is left of them.
    fn nothing_is_divided_by_weights_that_cancel<T>(level) {
        let nearly = [0.7, 0.1, -0.8].map(|weight: f64| T::from_f64(weight * (1.0 + 1e-7)));
        let off = T::from_f64(-0.8 * (1.0 + 3e-6));
        for length in LENGTHS {
            let values = [1.0, 1.0, -1.0].map(|value| vec![T::from_f64(value); length]);
            let merge = |weights: [T; 3]| {
                let terms: Vec<(T, &[T])> =
                    weights.into_iter().zip(values.iter().map(|values| &values[..])).collect();
                let mut out = vec![T::ZERO; length];
                elect(level, &terms, true, &mut out);
                let voters = |i: usize| terms.iter().map(|(w, x)| (*w, x[i])).collect::<Vec<_>>();
                let expected: Vec<T> = (0..length).map(|i| oracle::elect(&voters(i), true)).collect();
                assert_same(level, &out, &expected);
                out
            };
            assert!(merge(nearly).iter().all(|value| (value.to_f64() - 1.6).abs() < 1e-5));
            let [first, second, _] = nearly;
            assert!(merge([first, second, off]).iter().all(|value| value.to_f64() < -5e5));
        }
    }

    fn a_widened_difference_is_widening_and_subtracting<T>(level) {
        let dtype = prop::sample::select(&[DType::Bf16, DType::F16, DType::F32][..]);
        let case = (dtype, prop::sample::select(&LENGTHS[..]), any::<u64>());
        proptest!(config(48), |((dtype, length, seed) in case)| {
            let word = |i: usize| (seed.wrapping_mul(i as u64 | 1) >> 7) as u8;
            let src: Vec<u8> = (0..length * dtype.size()).map(word).collect();
            let base: Vec<T> = (0..length).map(|i| T::from_pattern(u64::from(word(i)) << 20)).collect();
            let (mut fused, mut wide, mut apart) =
                (vec![T::ONE; length], vec![T::ONE; length], vec![T::ONE; length]);
            widen_difference(level, dtype, &src, &base, &mut fused);
            widen(level, dtype, &src, &mut wide);
            let operands = (Operand::Slice(&wide[..]), Operand::Slice(&base[..]));
            binary(level, BinaryOp::Sub, operands.0, operands.1, &mut apart);
            assert_same(level, &fused, &apart);
        });
    }
}

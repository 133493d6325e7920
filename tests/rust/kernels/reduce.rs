use super::{TestReal, assert_same, config, each_level};
use oxmerge::dtype::DType;
use oxmerge::kernels::{
    BinaryOp, LANES, Lanes, Level, MaskKey, SPAN, absolute_sum_into, dot_into, fold_halves, masked,
    max_into, norms_into, oracle, products_into, random_bits, sum_into, widen, widen_difference,
};
use proptest::prelude::*;

#[track_caller]
fn assert_lanes(
    level: Level,
    start: f64,
    fast: impl FnOnce(&mut Lanes),
    terms: &[f64],
    step: impl Fn(f64, f64) -> f64,
) {
    let (mut lanes, mut expected) = ([start; LANES], [start; LANES]);
    fast(&mut lanes);
    oracle::reduce(terms, &mut expected, step);
    assert_same(level, &lanes, &expected);
}

each_level! {
    fn products_are_three_dots<T>(level) {
        let dtype = prop::sample::select(&[DType::Bf16, DType::F16, DType::F32][..]);
        let case = (dtype, prop::sample::select(&super::LENGTHS[..]), any::<u64>());
        proptest!(config(48), |((dtype, length, seed) in case)| {
            let byte = |at: usize| (seed.wrapping_mul(at as u64 | 1) >> 9) as u8;
            let stored = |from: usize| (from..from + length * dtype.size()).map(byte).collect();
            let [a, b]: [Vec<u8>; 2] = [stored(0), stored(7)];
            let [mut x, mut y] = [vec![0.0_f32; length], vec![0.0_f32; length]];
            widen(level, dtype, &a, &mut x);
            widen(level, dtype, &b, &mut y);
            let (mut fast, mut slow) = ([[0.5; LANES]; 3], [[0.5; LANES]; 3]);
            products_into(level, dtype, &a, &b, &mut fast);
            dot_into(level, &x, &x, &mut slow[0]);
            dot_into(level, &x, &y, &mut slow[1]);
            dot_into(level, &y, &y, &mut slow[2]);
            assert_same(level, &fast.concat(), &slow.concat());
        });
    }

    fn norms_are_two_absolute_sums<T>(level) {
        let dtype = prop::sample::select(&[DType::Bf16, DType::F16, DType::F32][..]);
        let length = prop_oneof![prop::sample::select(&[0, 15, 16, 63, 64, 65, 1000][..]), Just(SPAN)];
        proptest!(config(48), |(dtype in dtype, length in length, seed in any::<u64>())| {
            let byte = |at: usize| (seed.wrapping_mul(at as u64 | 1) >> 9) as u8;
            let stored = |from: usize| (from..from + length * dtype.size()).map(byte).collect();
            let [x, base]: [Vec<u8>; 2] = [stored(0), stored(7)];
            let bits = random_bits(level, &MaskKey::new(seed, "x", 0), 0, 1 << 31);
            let [mut wide, mut vector, mut kept] =
                std::array::from_fn(|_| vec![0.0_f32; length]);
            widen(level, dtype, &base, &mut wide);
            widen_difference(level, dtype, &x, &wide, &mut vector);
            masked(level, &bits, 1.0, &vector, &mut kept);
            let (mut fast, mut slow) = ([[0.5; LANES]; 2], [[0.5; LANES]; 2]);
            norms_into(level, dtype, &x, &base, &bits, &mut fast);
            absolute_sum_into(level, &vector, &mut slow[0]);
            absolute_sum_into(level, &kept, &mut slow[1]);
            assert_same(level, &fast.concat(), &slow.concat());
        });
    }

    fn reductions_are_like_the_oracle<T>(level) {
        let case = T::slice().prop_flat_map(|a| {
            let b = prop::collection::vec(T::interesting(), a.len());
            (Just(a), b)
        });
        proptest!(config(64), |((a, b) in case)| {
            let wide: Vec<f64> = a.iter().map(|a| a.to_f64()).collect();
            let magnitudes: Vec<f64> = wide.iter().map(|a| a.abs()).collect();
            let products: Vec<f64> = wide.iter().zip(&b).map(|(a, b)| a * b.to_f64()).collect();
            let add = |lane, term| lane + term;
            let max = |lane, term| oracle::binary(BinaryOp::Max, lane, term) + 0.0;
            assert_lanes(level, 0.5, |lanes| sum_into(level, &a, lanes), &wide, add);
            assert_lanes(level, 0.5, |lanes| absolute_sum_into(level, &a, lanes), &magnitudes, add);
            assert_lanes(level, 0.5, |lanes| dot_into(level, &a, &b, lanes), &products, add);
            assert_lanes(level, f64::NEG_INFINITY, |lanes| max_into(level, &a, lanes), &wide, max);
        });
    }

    /// A block may be summed in pieces, if they start at multiples of sixteen.
    fn pieces_sum_as_the_whole<T>(level) {
        let values: Vec<T> = (0..1000).map(|i| T::from_f64(1.0 / f64::from(i + 1))).collect();
        let (mut whole, mut pieces) = ([0.0; LANES], [0.0; LANES]);
        sum_into(level, &values, &mut whole);
        for piece in values.chunks(48) {
            sum_into(level, piece, &mut pieces);
        }
        assert_same(level, &whole, &pieces);
    }
}

#[test]
fn folding_is_like_the_oracle() {
    proptest!(config(256), |(values in prop::collection::vec(f64::interesting(), 0..70))| {
        let expected = oracle::fold_halves(&values);
        let folded = fold_halves(&mut values.clone());
        assert_same(Level::portable(), &[folded], &[expected]);
    });
}

#[test]
fn folding_pads_with_zeros_at_the_end() {
    // (1 + 3) + (2 + 0), where another order would lose the small one.
    let folded = fold_halves(&mut vec![1e16, 1.0, -1e16]);
    assert_eq!(folded.to_bits(), 1.0_f64.to_bits(), "folded to {folded}");
    assert_eq!(fold_halves(&mut Vec::new()).to_bits(), 0, "nothing sums to +0");
}

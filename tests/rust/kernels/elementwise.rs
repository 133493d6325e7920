use super::{TestReal, assert_bits, assert_same, config, each_level};
use oxmerge::kernels::{BinaryOp, Level, Operand, Real, UnaryOp, binary, oracle, select, unary};
use proptest::prelude::*;

fn run<T: Real>(
    level: Level,
    op: BinaryOp,
    a: Operand<'_, T>,
    b: Operand<'_, T>,
    n: usize,
) -> Vec<T> {
    let mut out = vec![T::ONE; n];
    binary(level, op, a, b, &mut out);
    out
}

/// Slices of one length.
fn slices<T: TestReal>(count: usize) -> BoxedStrategy<Vec<Vec<T>>> {
    T::slice()
        .prop_flat_map(move |first| {
            let length = first.len();
            let other = prop::collection::vec(T::interesting(), length);
            prop::collection::vec(other, count - 1).prop_map(move |mut slices| {
                slices.push(first.clone());
                slices
            })
        })
        .boxed()
}

each_level! {
    fn binary_is_like_the_oracle<T>(level) {
        proptest!(config(32), |(slices in slices::<T>(2), scalar in T::interesting())| {
            let (a, b) = (&slices[0][..], &slices[1][..]);
            let n = a.len();
            for op in BinaryOp::ALL {
                let expected: Vec<T> = (0..n).map(|i| oracle::binary(op, a[i], b[i])).collect();
                assert_same(level, &run(level, op, Operand::Slice(a), Operand::Slice(b), n), &expected);
                let expected: Vec<T> = a.iter().map(|&a| oracle::binary(op, a, scalar)).collect();
                assert_same(level, &run(level, op, Operand::Slice(a), Operand::Scalar(scalar), n), &expected);
                let expected: Vec<T> = b.iter().map(|&b| oracle::binary(op, scalar, b)).collect();
                assert_same(level, &run(level, op, Operand::Scalar(scalar), Operand::Slice(b), n), &expected);
                let expected = vec![oracle::binary(op, scalar, scalar); n];
                assert_same(level, &run(level, op, Operand::Scalar(scalar), Operand::Scalar(scalar), n), &expected);
            }
        });
    }

    fn extremes_and_comparisons_of_specials_are_exact<T>(level) {
        let (a, b): (Vec<T>, Vec<T>) = T::specials()
            .into_iter()
            .flat_map(|a| T::specials().into_iter().map(move |b| (a, b)))
            .unzip();
        for op in &BinaryOp::ALL[4..] {
            let expected: Vec<T> = a.iter().zip(&b).map(|(&a, &b)| oracle::binary(*op, a, b)).collect();
            let fast = run(level, *op, Operand::Slice(&a), Operand::Slice(&b), a.len());
            assert_bits(level, &fast, &expected);
        }
    }

    fn zeros_have_an_order<T>(level) {
        let (plus, minus) = (T::ZERO, -T::ZERO);
        for (a, b) in [(plus, minus), (minus, plus)] {
            let (a, b) = (Operand::Slice(std::slice::from_ref(&a)), Operand::Scalar(b));
            assert_bits(level, &run(level, BinaryOp::Max, a, b, 1), &[plus]);
            assert_bits(level, &run(level, BinaryOp::Min, a, b, 1), &[minus]);
        }
    }

    fn unary_is_like_the_oracle<T>(level) {
        proptest!(config(64), |(a in T::slice())| {
            for op in UnaryOp::ALL {
                let mut out = vec![T::ONE; a.len()];
                unary(level, op, &a, &mut out);
                let expected: Vec<T> = a.iter().map(|&a| oracle::unary(op, a)).collect();
                assert_same(level, &out, &expected);
            }
        });
    }

    fn sign_is_exact_on_specials<T>(level) {
        let a = T::specials();
        let mut out = vec![T::ONE; a.len()];
        unary(level, UnaryOp::Sign, &a, &mut out);
        let expected: Vec<T> = a.iter().map(|&a| oracle::unary(UnaryOp::Sign, a)).collect();
        assert_bits(level, &out, &expected);
    }

    fn select_keeps_bits<T>(level) {
        proptest!(config(32), |(slices in slices::<T>(3), scalar in T::interesting())| {
            let (mask, yes, no) = (&slices[0], &slices[1], &slices[2]);
            let n = mask.len();
            let mut out = vec![T::ONE; n];
            select(level, mask, Operand::Slice(yes), Operand::Slice(no), &mut out);
            let expected: Vec<T> = (0..n).map(|i| oracle::select(mask[i], yes[i], no[i])).collect();
            assert_bits(level, &out, &expected);
            select(level, mask, Operand::Scalar(scalar), Operand::Slice(no), &mut out);
            let expected: Vec<T> = (0..n).map(|i| oracle::select(mask[i], scalar, no[i])).collect();
            assert_bits(level, &out, &expected);
            select(level, mask, Operand::Slice(yes), Operand::Scalar(scalar), &mut out);
            let expected: Vec<T> = (0..n).map(|i| oracle::select(mask[i], yes[i], scalar)).collect();
            assert_bits(level, &out, &expected);
        });
    }
}

#[test]
#[should_panic(expected = "the right operand and the output")]
fn lengths_must_agree() {
    let (a, b) = ([1.0_f32; 2], [1.0_f32; 3]);
    binary(Level::portable(), BinaryOp::Add, Operand::Slice(&a), Operand::Slice(&b), &mut [0.0; 2]);
}

use super::{LENGTHS, assert_same, config};
use oxmerge::dtype::DType;
use oxmerge::kernels::{
    CELL, Differences, LANES, Level, differences_into, dot_into, oracle, products_into,
};
use proptest::prelude::*;

/// Stored elements: any bits, half of them as in the other.
fn stored(dtype: DType, length: usize, seed: u64) -> [Vec<u8>; 2] {
    let byte = |at: usize, salt: u64| ((seed ^ salt).wrapping_mul(at as u64 | 1) >> 9) as u8;
    let a: Vec<u8> = (0..length * dtype.size()).map(|at| byte(at, 0)).collect();
    let mut b = a.clone();
    for at in (0..b.len()).filter(|at| at / dtype.size() % 2 == 1) {
        b[at] = byte(at, 0x5555_5555_5555);
    }
    [a, b]
}

#[test]
fn all_numbers_are_those_of_kernels_of_their_own() {
    let lengths = LENGTHS.into_iter().chain([CELL - 1, CELL, 3 * CELL + 17]).collect::<Vec<_>>();
    let dtype = prop::sample::select(&[DType::Bf16, DType::F16, DType::F32][..]);
    let case = (dtype, prop::sample::select(lengths), any::<u64>());
    proptest!(config(64), |((dtype, length, seed) in case)| {
        let [a, b] = stored(dtype, length, seed);
        let values = |bytes: &[u8]| -> Vec<f32> {
            bytes.chunks(dtype.size()).map(|bytes| oracle::widen::<f32>(dtype, bytes)).collect()
        };
        let (x, y) = (values(&a), values(&b));
        let apart: Vec<f32> = x.iter().zip(&y).map(|(x, y)| y - x).collect();
        let count = |is_so: fn(f32, f32) -> bool| {
            x.iter().zip(&y).filter(|(x, y)| is_so(**x, **y)).count() as u64
        };
        let same = count(|x, y| y - x == 0.0);
        let flips = count(|x, y| (x < 0.0 && y > 0.0) || (x > 0.0 && y < 0.0));
        let is_odd = apart.iter().any(|d| d.is_nan());
        let largest = apart.iter().fold(0.0, |largest: f64, d| largest.max(f64::from(d.abs())));
        for level in Level::available() {
            let mut sums = [[0.5; LANES]; 4];
            let [dd, products @ ..] = &mut sums;
            dot_into(level, &apart, &apart, dd);
            products_into(level, dtype, &a, &b, products);
            let mut found = Differences::from([[0.5; LANES]; 4]);
            differences_into(level, dtype, &a, &b, &mut found);
            prop_assert_eq!((found.same, found.flips), (same, flips));
            assert_same(level, &[found.largest()], &[if is_odd { f64::NAN } else { largest }]);
            assert_same(level, &found.sums.concat(), &sums.concat());
        }
    });
}

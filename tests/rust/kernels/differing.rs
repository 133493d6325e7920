use super::{LENGTHS, config, misaligned};
use oxmerge::kernels::{Level, differing};
use proptest::prelude::*;

#[test]
fn elements_that_differ_in_any_bit_are_counted() {
    let case = (prop::sample::select(&[1_usize, 2, 4, 8][..]), prop::sample::select(&LENGTHS[..]));
    for level in Level::available() {
        proptest!(config(48), |((size, length) in case.clone(), seed in any::<u64>())| {
            let byte = |at: usize| (seed.wrapping_mul(at as u64 | 1) >> 9) as u8;
            let a: Vec<u8> = (0..length * size).map(byte).collect();
            let flip = |(at, byte): (usize, &u8)| byte ^ ((1 << (at % 8)) * u8::from(at % 7 == 3));
            let b: Vec<u8> = a.iter().enumerate().map(flip).collect();
            let slow = a.chunks(size).zip(b.chunks(size)).filter(|(a, b)| a != b).count();
            let (a, b) = (misaligned(&a), misaligned(&b));
            prop_assert_eq!(differing(level, size, &a[1..], &b[1..]), slow as u64);
            prop_assert_eq!(differing(level, size, &a[1..], &a[1..]), 0);
        });
    }
}

#[test]
fn more_than_a_narrow_counter_holds() {
    let (zeros, ones) = (vec![0; 200_001], vec![1; 200_001]);
    for level in Level::available() {
        assert_eq!(differing(level, 1, &zeros, &ones), 200_001);
    }
}

#[test]
#[should_panic(expected = "the elements must be whole")]
fn elements_are_whole() {
    differing(Level::portable(), 4, &[0; 7], &[0; 7]);
}

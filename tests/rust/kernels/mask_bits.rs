use super::{LENGTHS, assert_same, each_level};
use oxmerge::kernels::{BITS, MaskBits, SPAN, masked, unpack_mask};

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

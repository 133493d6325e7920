//! How many stored elements differ, whatever type they have.

use super::level::{Kernel, Level};

/// A loop over elements of one width.
struct Differing<'a, const SIZE: usize> {
    a: &'a [[u8; SIZE]],
    b: &'a [[u8; SIZE]],
}

impl<const SIZE: usize> Kernel for Differing<'_, SIZE> {
    type Output = u64;

    #[inline(always)]
    fn run(self) -> u64 {
        let mut differing = 0;
        // Parts whose count fits the narrow counter that vectors of it are made of.
        for (a, b) in self.a.chunks(1 << 15).zip(self.b.chunks(1 << 15)) {
            let mut count = 0_u32;
            for (a, b) in a.iter().zip(b) {
                count += u32::from(a != b);
            }
            differing += u64::from(count);
        }
        differing
    }
}

/// How many elements of `size` bytes differ in any bit.
///
/// # Panics
///
/// If the slices differ in length, or are no whole elements of 1, 2, 4 or 8 bytes.
pub fn differing(level: Level, size: usize, a: &[u8], b: &[u8]) -> u64 {
    fn go<const SIZE: usize>(level: Level, a: &[u8], b: &[u8]) -> u64 {
        let (a, rest) = a.as_chunks();
        assert!(rest.is_empty(), "the elements must be whole");
        level.run(Differing::<SIZE> { a, b: b.as_chunks().0 })
    }
    assert_eq!(a.len(), b.len(), "both sides must have the same length");
    match size {
        1 => go::<1>(level, a, b),
        2 => go::<2>(level, a, b),
        4 => go::<4>(level, a, b),
        8 => go::<8>(level, a, b),
        other => panic!("no element has {other} bytes"),
    }
}

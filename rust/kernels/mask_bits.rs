//! Masks as bits: what random masks are drawn as and kept as, in little memory.
//!
//! The bits of a span lie so that no operation goes across lanes: word `w` of the `n` has element
//! `w + n·b` as its bit `b`. So one step of a loop is `n` elements by the same bit.

use super::level::{Kernel, Level};
use super::real::Real;

/// Elements that a word holds.
pub const BITS: usize = u32::BITS as usize;
/// Elements that are marked together.
pub const SPAN: usize = 2048;
/// The mask of a span.
pub type MaskBits = [u32; SPAN / BITS];

struct Unpack<'a, T> {
    bits: &'a MaskBits,
    mask: &'a mut [T],
}

impl<T: Real> Kernel for Unpack<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (bit, mask) in self.mask.chunks_mut(self.bits.len()).enumerate() {
            for (value, &word) in mask.iter_mut().zip(self.bits) {
                *value = T::truth(word & (1 << bit) != 0);
            }
        }
    }
}

struct Pack<'a> {
    kept: &'a [u8],
    bits: &'a mut MaskBits,
}

impl Kernel for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (bit, kept) in self.kept.chunks(self.bits.len()).enumerate() {
            for (word, &kept) in self.bits.iter_mut().zip(kept) {
                *word |= u32::from(kept != 0) << bit;
            }
        }
    }
}

struct Masked<'a, T> {
    bits: &'a MaskBits,
    scale: T,
    values: &'a [T],
    out: &'a mut [T],
}

impl<T: Real> Kernel for Masked<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let each = self.out.chunks_mut(self.bits.len()).zip(self.values.chunks(self.bits.len()));
        for (bit, (out, values)) in each.enumerate() {
            for ((out, &value), &word) in out.iter_mut().zip(values).zip(self.bits) {
                *out = self.scale * if word & (1 << bit) == 0 { T::ZERO } else { value };
            }
        }
    }
}

/// The first elements of a mask as ones and zeros.
///
/// # Panics
///
/// If there are more than a span.
pub fn unpack_mask<T: Real>(level: Level, bits: &MaskBits, mask: &mut [T]) {
    assert!(mask.len() <= SPAN, "a mask has the bits of a span");
    level.run(Unpack { bits, mask });
}

/// The mask that keeps the elements whose byte is not 0, and none behind them.
///
/// # Panics
///
/// If there are more than a span.
pub fn pack_mask(level: Level, kept: &[u8]) -> MaskBits {
    assert!(kept.len() <= SPAN, "a mask has the bits of a span");
    let mut bits = [0; _];
    level.run(Pack { kept, bits: &mut bits });
    bits
}

/// The mask of the span that begins at element `skipped` of two in a row.
///
/// # Panics
///
/// If it begins behind the second one.
pub fn mask_from([first, second]: [&MaskBits; 2], skipped: usize) -> MaskBits {
    assert!(skipped <= SPAN, "the span must begin within the first one");
    std::array::from_fn(|word| {
        let from = word + skipped;
        let (word, bit) = (from % first.len(), from / first.len());
        let both = u64::from(second[word]) << BITS | u64::from(first[word]);
        (both >> bit) as u32
    })
}

/// `out[i] = scale · values[i]` where the mask has a one, else scale · 0.
///
/// # Panics
///
/// If there are more elements than a span has, or the lengths differ.
pub fn masked<T: Real>(level: Level, bits: &MaskBits, scale: T, values: &[T], out: &mut [T]) {
    assert!(out.len() <= SPAN, "a mask has the bits of a span");
    assert_eq!(values.len(), out.len(), "the values and the output must have the same length");
    level.run(Masked { bits, scale, values, out });
}
